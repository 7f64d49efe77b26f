"""What is foretold from five weeks, and what the predictor survives. These tests disturb the host of this scenario."""

import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
UNIT = "citadel-predictor.service"
URL = "http://127.0.0.1:9110/metrics"
SHORT, LONG = ("1h", "6h", "1d"), ("7d", "30d")
FORETOLD = {  # those of the role's targets for which files/series.py makes series
    "requests": SHORT + LONG,
    "tokens": SHORT + LONG,
    "cost": SHORT + LONG,
    "kv-cache": SHORT + LONG,
    "filesystem": ("1d", *LONG),
}


class Shown:
    """What the predictor shows at one moment."""

    def __init__(self, text: str) -> None:
        self.lines: list[tuple[str, dict[str, str], float]] = [
            (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
            for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)
        ]

    def all(self, name: str, **labels: str) -> list[float]:
        return [value for each, has, value in self.lines if each == name and labels.items() <= has.items()]

    def one(self, name: str, **labels: str) -> float:
        """NaN if it is not there."""
        found = self.all(name, **labels)
        assert len(found) <= 1, f"{name}{labels} is there {len(found)} times"
        return found[0] if found else math.nan

    def foretold(self) -> set[tuple[str, str]]:
        """(target, horizon) of the forecasts that have all three quantiles, finite."""
        named = {(has["target"], has.get("horizon", "")) for name, has, _ in self.lines if name == "llm_forecast_value"}
        return {
            (target, horizon)
            for target, horizon in named
            if sum(map(math.isfinite, self.all("llm_forecast_value", target=target, horizon=horizon))) == 3
        }


@pytest.fixture
def shown(fetch: Callable[..., Any]) -> Callable[[], Shown]:
    return lambda: Shown(fetch(URL).body)


@pytest.fixture
def when(host: Host, shown: Callable[[], Shown]) -> Callable[..., Shown]:
    """What is shown as soon as it is so; the journal if it never is."""

    def wait(wanted: Callable[[Shown], bool], patience: float = 120) -> Shown:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if wanted(found := shown()):
                return found
            time.sleep(1)
        pytest.fail(host.check_output("journalctl --no-pager --lines=30 --unit=%s", UNIT))

    return wait


@pytest.fixture
def whole(when: Callable[..., Shown]) -> Shown:
    """All that the series allow is foretold."""
    wanted = {(target, horizon) for target, horizons in FORETOLD.items() for horizon in horizons}
    return when(lambda found: wanted <= found.foretold())


@pytest.fixture
def no_prometheus(host: Host) -> Iterator[None]:
    host.check_output("systemctl stop prometheus")
    yield
    host.check_output("systemctl start prometheus")


def pid(host: Host) -> int:
    return int(host.check_output("systemctl show --value --property=MainPID %s", UNIT))


def test_each_target_with_series_is_foretold(whole: Shown) -> None:
    for target in FORETOLD:
        assert whole.one("llm_forecast_history_days", target=target) == pytest.approx(35, abs=1)
    missing = {has["target"] for name, has, _ in whole.lines if has.get("reason") == "no_series"}
    assert missing == {"active-users", "first-token", "cpu", "memory", "limit-store", "budget"}


def test_the_methods_in_use_have_earned_it(whole: Shown) -> None:
    """1 is the error of "as yesterday" within the series."""
    errors = [(value, has["method"]) for name, has, value in whole.lines if name == "llm_forecast_mase"]
    assert len(errors) >= 4 * 3
    assert [error for error in errors if error[0] >= 1 and error != (1, "naive")] == []
    for target in ("requests", "tokens", "cost"):
        assert math.isnan(whole.one("llm_forecast_value", target=target, horizon="1d", quantile="0.5", method="naive"))
        assert whole.one("llm_forecast_mase", target=target, horizon="1d") < 0.5


def test_the_day_on_which_the_disk_is_full(host: Host, whole: Shown) -> None:
    """A point a day from 49 %: 90 % are reached 41 days after the midnight from which files/series.py counts."""
    seconds_of_today = int(host.check_output("date --utc +%s")) % 86400
    early, middle, late = (
        whole.one("llm_forecast_limit_eta_seconds", target="filesystem", quantile=level) / 86400
        for level in ("0.1", "0.5", "0.9")
    )
    assert early <= middle <= late
    assert middle == pytest.approx(41 - 35 - seconds_of_today / 86400, abs=1)


@pytest.mark.parametrize("how", ["systemctl restart", "systemctl kill --signal=KILL"])
def test_what_was_learnt_outlives_its_process(
    host: Host, whole: Shown, when: Callable[..., Shown], shown: Callable[[], Shown], how: str
) -> None:
    before = pid(host)
    host.check_output(f"{how} {UNIT}")
    after = when(lambda found: whole.foretold() <= found.foretold() and pid(host) not in {0, before})
    assert not after.all("llm_forecast_fit_seconds_count"), "methods were judged anew"
    assert after.one("llm_forecast_history_days", target="requests") >= 34


def test_without_prometheus_it_shows_its_last_word_and_says_so(
    host: Host, whole: Shown, when: Callable[..., Shown], no_prometheus: None
) -> None:
    before = pid(host)
    down = when(lambda found: found.one("llm_predictor_up_to_date") == 0)
    assert whole.foretold() <= down.foretold()
    assert down.one("llm_predictor_degraded", target="requests", reason="unreachable") == 1
    assert down.one("llm_predictor_errors_total", reason="unreachable") >= 1
    assert pid(host) == before


def test_it_recovers_with_prometheus(host: Host, when: Callable[..., Shown]) -> None:
    host.check_output("systemctl start prometheus")
    back = when(lambda found: found.one("llm_predictor_up_to_date") == 1)
    assert math.isnan(back.one("llm_predictor_degraded", target="requests", reason="unreachable"))


def test_settings_that_cannot_be_used_are_not_put_in_place(host: Host) -> None:
    path = "/etc/citadel-predictor/predictor.json"
    before = (host.file(path).content_string, pid(host))
    wrong = '{"predictor_targets": [{"name": "raw", "query": "llm_gateway_requests_total"}]}'
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/predictor/converge.yml", "-e", wrong]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "does not select a recording rule" in run.stdout
    assert (host.file(path).content_string, pid(host)) == before
