"""An alert goes up the levels to everybody's stand-in, across a restart, until somebody acknowledges it."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from testinfra.host import Host

AMTOOL = "amtool --alertmanager.url=http://127.0.0.1:9093"
SINKS = "http://127.0.0.1:3100"
STATE = "/var/lib/citadel-escalator/state.json"
PATIENCE = 120.0
RUN = int(time.time())  # a host that is tried again still knows the alerts of the last time


@pytest.fixture
def received(fetch: Callable[..., Any]) -> Callable[[str], list[str]]:
    """In order, the sinks that were told of an alert of this name."""

    def ask(name: str) -> list[str]:
        return [entry["sink"] for entry in fetch(f"{SINKS}/received").json() if name in json.dumps(entry["body"])]

    return ask


@pytest.fixture
def alert(host: Host) -> Iterator[Callable[[str], None]]:
    """``alert(NAME)`` lets it fire for ten minutes."""
    names: list[str] = []

    def change(name: str, minutes: int) -> None:
        end = host.check_output(f"date --utc --date='{minutes} minutes' +%Y-%m-%dT%H:%M:%SZ")
        labels = f"alertname={name} suite=citadel team=platform severity=critical"
        host.check_output(f"{AMTOOL} alert add {labels} --annotation=summary='{name} is bad' --end={end}")

    def fire(name: str) -> None:
        names.append(name)
        change(name, 10)

    yield fire
    for name in names:
        change(name, -1)


def wait_for(true: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def test_it_goes_up_across_a_restart_and_no_level_comes_twice(
    host: Host, alert: Callable[[str], None], received: Callable[[str], list[str]]
) -> None:
    name = f"GoesUp{RUN}"
    alert(name)
    wait_for(lambda: {"slack", "pagerduty", "mail"} <= set(received(name)), lambda: received(name))
    before = json.loads(host.file(STATE).content_string)["firings"]
    host.check_output("systemctl restart citadel-escalator")
    wait_for(lambda: "webhook/duty" in received(name), lambda: host.file(STATE).content_string)
    after = json.loads(host.file(STATE).content_string)["firings"]
    key = next(key for key in before if name in key)
    assert (before[key]["level"], after[key]["level"]) == (2, 3)
    assert after[key]["since"] == before[key]["since"]
    assert before[key]["age"] < 30 <= after[key]["age"], "time went on from where it was"
    time.sleep(3)
    assert sorted(received(name)) == ["mail", "pagerduty", "slack", "webhook/duty"]


def test_an_acknowledgement_stops_it(
    host: Host, alert: Callable[[str], None], received: Callable[[str], list[str]]
) -> None:
    name = f"IsSeen{RUN}"
    alert(name)
    wait_for(lambda: "slack" in received(name), lambda: received(name))
    host.check_output(f"{AMTOOL} silence add alertname={name} --author=ann --comment='ack: looking' --duration=10m")
    time.sleep(15)  # more than the delay of level 2
    assert received(name) == ["slack"]


def test_alertmanager_away_while_a_level_is_due(
    host: Host, alert: Callable[[str], None], received: Callable[[str], list[str]]
) -> None:
    name = f"IsDue{RUN}"
    alert(name)
    wait_for(lambda: "slack" in received(name), lambda: received(name))
    host.check_output("systemctl stop prometheus-alertmanager")
    time.sleep(8)
    host.check_output("systemctl start prometheus-alertmanager")
    wait_for(lambda: host.run(f"{AMTOOL} alert query").rc == 0, lambda: "Alertmanager does not come back")
    began = json.loads(host.file(STATE).content_string)["firings"]
    assert any(name in key for key in began), "not forgotten"
    since = next(firing["since"] for key, firing in began.items() if name in key)
    stamp = host.check_output(f"date --utc --date=@{since} +%Y-%m-%dT%H:%M:%S.%3NZ")
    labels = f"alertname={name} suite=citadel team=platform severity=critical"
    end = host.check_output("date --utc --date='10 minutes' +%Y-%m-%dT%H:%M:%SZ")
    host.check_output(f"{AMTOOL} alert add {labels} --annotation=summary='{name}' --start={stamp} --end={end}")
    wait_for(lambda: {"pagerduty", "mail"} <= set(received(name)), lambda: received(name))
    assert received(name).count("slack") == 1
