"""The five Grafana dashboards as Python: plain dictionaries of the classic schema (39, Grafana 10.4 to 13), no library.

`python -m tools.dashboards` writes files/monitoring/dashboards/*.json; with `--check` it writes nothing, and fails if
one is stale.
A module for each dashboard says what is on it, `panels` how a panel is written, `reading` how one is executed.
"""

from pathlib import Path
from typing import Any

from tools.dashboards import business, cost, operations, quality, realtime

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "files" / "monitoring" / "dashboards"


def build() -> dict[str, dict[str, Any]]:
    """Every dashboard, by the name of its file."""
    modules = (operations, business, realtime, quality, cost)
    return {module.__name__.rpartition(".")[2]: module.build() for module in modules}
