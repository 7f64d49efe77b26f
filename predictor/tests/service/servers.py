"""The real servers of tests/monitoring.

By their path: pytest knows the package that this one is in as `tests`, and then there is no other of that name.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.monitoring.servers import PrometheusServer, check, environment, free_port, promtool
else:
    path = Path(__file__).parents[3] / "tests" / "monitoring" / "servers.py"
    spec = importlib.util.spec_from_file_location("monitoring_servers", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    PrometheusServer, check, environment = found.PrometheusServer, found.check, found.environment
    free_port, promtool = found.free_port, found.promtool

__all__ = ["PrometheusServer", "check", "environment", "free_port", "promtool"]
