"""Write the dashboards, or say which of the files are stale."""

import argparse
import json
import sys
from pathlib import Path

from tools.dashboards import FOLDER, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.dashboards", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is not what would be written"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (files/monitoring/dashboards)")
    options = parser.parse_args()
    wanted = {f"{name}.json": json.dumps(board, indent=1) + "\n" for name, board in build().items()}
    there = {path.name: path.read_text() for path in options.folder.glob("*.json")}
    stale = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if options.check:
        for name in stale:
            print(f"{options.folder / name} is not what tools/dashboards makes: run make dashboards", file=sys.stderr)
        return bool(stale)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in wanted:
            (options.folder / name).write_text(wanted[name])
        else:
            (options.folder / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
