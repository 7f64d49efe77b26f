"""Draw the dashboards for the documentation, from the generated series in a real Prometheus of its own.

    python -m tests.monitoring.draw docs/images

The series end at a fixed moment, so that a drawing changes only when a dashboard or the renderer does.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.monitoring import series
from tests.monitoring.servers import run_prometheus
from tools.dashboards import FOLDER
from tools.dashboards.drawing import draw


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = series.build(place)
        with run_prometheus(series.configuration(place), data, *series.OPTIONS) as url:
            for path in sorted(FOLDER.glob("*.json")):
                draw(json.loads(path.read_text()), url, series.END, folder / f"dashboard-{path.stem}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
