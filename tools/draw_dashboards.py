"""Draw the dashboards from a Prometheus into PNG files, in the layout that Grafana would give them.

For the documentation and the validation report, and to look at a change without a Grafana:

    python -m tools.draw_dashboards http://127.0.0.1:9090 /tmp/drawings

It shows what the queries bring, in the panels' units, colours and thresholds; it is not Grafana, and says so below each
drawing. The drawings in docs/images come from the generated series of the tests: `python -m tests.monitoring.draw`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tools.dashboards import FOLDER
from tools.dashboards.drawing import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.draw_dashboards", description=__doc__.splitlines()[0])
    parser.add_argument("url", help="address of a Prometheus, http://HOST:PORT")
    parser.add_argument("folder", type=Path, help="where dashboard-<name>.png are written")
    parser.add_argument(
        "--time", type=float, default=None, help="the end of what is drawn, in seconds since the epoch; now"
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="only this dashboard; may be given again")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(FOLDER.glob("*.json")):
        if not options.only or path.stem in options.only:
            target = options.folder / f"dashboard-{path.stem}.png"
            draw(json.loads(path.read_text()), options.url, options.time or time.time(), target)
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
