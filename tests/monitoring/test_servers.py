"""The servers of the other tests here do start, and refuse what is wrong."""

import urllib.error
from pathlib import Path

import pytest

from tests.monitoring import servers

ROUTE = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"


def test_a_prometheus_starts_and_reloads(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text("global: {scrape_interval: 15s}\n")
    server = servers.PrometheusServer(config, tmp_path / "data")
    try:
        server.start()
        server.reload()
        config.write_text("unknown: true\n")
        with pytest.raises(urllib.error.HTTPError):
            server.reload()
    finally:
        server.remove()


def test_an_alertmanager_starts(tmp_path: Path) -> None:
    config = tmp_path / "alertmanager.yml"
    config.write_text(ROUTE)
    with servers.run_alertmanager(config, tmp_path / "data") as url:
        assert url.startswith("http://127.0.0.1:")
    assert servers.check(servers.amtool(), "check-config", config).returncode == 0


def test_the_tools_say_what_is_wrong(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text("groups: [{name: a, rules: [{record: b, expr: 'sum('}]}]\n")
    done = servers.check(servers.promtool(), "check", "rules", rules)
    assert done.returncode != 0
    assert "parse error" in done.stderr
