"""Escalation against a real Alertmanager, with our own routes: who is told, once, through every fault."""

import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from filter.citadel_alertmanager import alertmanager_config, escalation_rules

from tests.monitoring import servers
from tests.unit.test_citadel_escalator import escalator

PATIENCE = 30.0
LEVELS = {2: 100, 3: 200}  # seconds of the injected clock


class Sink:
    """Whom Alertmanager notifies: remembers what came, by path. ``broken``: answers 500 and forgets."""

    def __init__(self) -> None:
        self.came: list[tuple[str, dict[str, Any]]] = []
        self.broken = False
        self.refused = 0
        self.keys: set[str] = set()
        sink = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sink.keys |= {key for key in [self.headers["Authorization"]] if key}
                if sink.broken:
                    sink.refused += 1
                else:
                    sink.came.append((self.path, body))
                self.send_response(500 if sink.broken else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def people(self) -> list[tuple[str, dict[str, Any]]]:
        """What came to somebody, so not to the gateway's feed."""
        return [entry for entry in self.came if entry[0] != "/v1/alerts"]

    def fed(self) -> set[tuple[str, str]]:
        """Level and status of all that the gateway's feed was told of."""
        alerts = [alert for where, body in self.came if where == "/v1/alerts" for alert in body["alerts"]]
        return {(alert["labels"].get("escalation", "1"), alert["status"]) for alert in alerts}

    def told(self, path: str, status: str = "firing") -> int:
        """How many notifications of this state came to this path."""
        return sum(where == path and body["status"] == status for where, body in self.came)


class Site:
    """An Alertmanager with the matrix's routes, a sink for each level, and an escalator whose clock the test moves."""

    def __init__(self, folder: Path) -> None:
        self.sink = Sink()
        channels = {name: {"kind": "webhook", "url": f"{self.sink.url}/{name}"} for name in ("one", "two", "three")}
        self.given: dict[str, Any] = {
            "levels": LEVELS,
            "timing": {"group_wait": 0.1, "group_interval": 0.3, "repeat_interval": 3600},
            "channels": channels,
            "matrix": [{"team": "*", "severity": "critical", "levels": {1: ["one"], 2: ["two"], 3: ["three"]}}],
        }
        (folder / "gateway.key").write_text("a-key")
        key = str(folder / "gateway.key")
        part = alertmanager_config(self.given, gateways=[self.sink.url], gateway_key_file=key, folder=str(folder))
        config = {
            "route": {"receiver": "operator", "group_wait": "100ms", "routes": [part["route"]]},
            "receivers": [
                {"name": "operator", "webhook_configs": [{"url": f"{self.sink.url}/operator"}]},
                *part["receivers"],
            ],
            "inhibit_rules": part["inhibit_rules"],
            "templates": [str(Path(__file__).parents[2] / "templates/alertmanager/*.tmpl")],
        }
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        self.alertmanager = servers.AlertmanagerServer(folder / "alertmanager.yml", folder / "data")
        self.folder = folder
        self.moved = 0.0  # both clocks, by so many seconds
        self.jumped = 0.0  # the time of day alone
        self.labels = {"suite": "citadel", "alertname": "LLMEngineDown", "severity": "critical", "team": "models"}
        self.started: datetime | None = None

    def start(self) -> None:
        self.alertmanager.start()
        self.restart_escalator()

    def restart_escalator(self) -> None:
        settings = escalator.Settings(
            self.alertmanager.url,
            tuple(map(escalator.rule_from, escalation_rules(self.given))),
            str(self.folder / "state.json"),
            timeout=5,
            settle=60,
        )
        self.escalator = escalator.Escalator(settings, self.clock)

    def clock(self) -> Any:
        now = escalator.right_now()
        return escalator.Moment(now.wall + self.moved + self.jumped, now.measured + self.moved, now.boot)

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.alertmanager.url}/api/v2/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read() or b"null")

    def fire(self) -> None:
        """As Prometheus does, again and again with the same start."""
        self.started = self.started or datetime.now(UTC)
        alert = {"labels": self.labels, "annotations": {"summary": "it is down", "runbook_url": "http://docs/x"}}
        ends = self.started + timedelta(hours=1)
        self.call("alerts", [{**alert, "startsAt": self.started.isoformat(), "endsAt": ends.isoformat()}])

    def resolve(self) -> None:
        assert self.started
        stamps = {"startsAt": self.started.isoformat(), "endsAt": datetime.now(UTC).isoformat()}
        self.call("alerts", [{"labels": self.labels, "annotations": {}, **stamps}])

    def silence(self, comment: str, **more: str) -> None:
        now = datetime.now(UTC)
        labels = {"alertname": "LLMEngineDown", "suite": "citadel", **more}
        matchers = [{"name": name, "value": value, "isRegex": False, "isEqual": True} for name, value in labels.items()]
        until = now + timedelta(hours=1)
        body = {"matchers": matchers, "createdBy": "ann", "comment": comment, "startsAt": now.isoformat()}
        self.call("silences", body | {"endsAt": until.isoformat()})

    def look(self, seconds: float = 0.0) -> list[int] | None:
        """The levels told by a look after so many seconds of the injected clock; ``None``: it failed."""
        self.moved += seconds
        decision = self.escalator.tick()
        return None if decision is None else [level for level, _, _ in decision.told]

    def levels(self) -> list[str]:
        """Of what fires in Alertmanager; level 1 is empty."""
        return sorted(alert["labels"].get("escalation", "") for alert in self.call("alerts"))

    def until(self, path: str, count: int = 1, status: str = "firing") -> None:
        wait_for(lambda: self.sink.told(path, status) >= count, f"{count} {status} at {path}: {self.sink.came}")
        assert self.sink.told(path, status) == count

    def nothing_more(self) -> None:
        """Nothing comes in the time in which several groups would have been flushed."""
        before = self.sink.people()
        time.sleep(1.5)
        assert self.sink.people() == before


def wait_for(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        made.start()
        made.look()
        yield made
    finally:
        made.alertmanager.remove()
        made.sink.server.shutdown()
        made.sink.server.server_close()


def test_each_level_is_told_once_and_is_told_of_the_end(site: Site) -> None:
    site.fire()
    assert site.look() == []
    site.until("/one")
    assert site.look(101) == [2]
    site.until("/two")
    assert site.look(100) == [3]
    site.until("/three")
    for _ in range(5):
        assert site.look(5000) == []
    site.nothing_more()
    assert [site.sink.told(path) for path in ("/one", "/two", "/three", "/operator")] == [1, 1, 1, 0]
    alert = next(body["alerts"][0] for path, body in site.sink.came if path == "/three")
    assert alert["labels"] == {**site.labels, "escalation": "3"}
    assert alert["annotations"]["runbook_url"] == "http://docs/x"
    assert alert["annotations"]["escalated_from"]
    site.resolve()
    site.look(1)
    for path in ("/one", "/two", "/three"):
        site.until(path, status="resolved")
    assert site.levels() == []
    every = {(level, status) for level in "123" for status in ("firing", "resolved")}
    wait_for(lambda: site.sink.fed() == every, f"the feed knows {site.sink.fed()}")
    assert site.sink.keys == {"Bearer a-key"}


@pytest.mark.parametrize("level", ["", "2"])
def test_an_acknowledgement_stops_it(site: Site, level: str) -> None:
    """Whether the silence was made from the alert or from its copy of level 2."""
    site.fire()
    site.look(1)
    assert site.look(101) == [2]
    site.until("/two")
    site.silence("ack: Ann looks", **({"escalation": level} if level else {}))
    site.look(1)
    assert site.levels() == [""]
    for _ in range(3):
        assert site.look(5000) == []
    site.nothing_more()
    assert site.sink.told("/three") == 0
    assert 'citadel_escalator_alerts{state="acknowledged"} 1\n' in site.escalator.metrics()


def test_another_silence_is_no_acknowledgement(site: Site) -> None:
    site.fire()
    site.look(1)
    site.silence("maintenance")
    site.look(1)
    assert site.look(5000) == []
    assert 'citadel_escalator_alerts{state="suppressed"} 1\n' in site.escalator.metrics()


def test_alertmanager_away_while_a_level_is_due(site: Site) -> None:
    site.fire()
    site.look(1)
    site.until("/one")
    site.alertmanager.stop()
    assert site.look(150) is None
    assert site.look(1) is None
    assert site.escalator.pause == 2
    site.alertmanager.start()
    assert site.look(1) == [], "it has forgotten the alert until Prometheus repeats it"
    assert site.escalator.memory.firings
    site.fire()
    assert site.look(1) == [2]
    site.until("/two")
    assert site.look(60) == [3]
    site.until("/three")
    site.nothing_more()
    assert site.sink.told("/one") == 1


def test_alertmanager_restarts_after_a_level_was_told(site: Site) -> None:
    site.fire()
    site.look(1)
    site.look(101)
    site.until("/two")
    site.nothing_more()  # it is told before Alertmanager has noted that it is
    site.alertmanager.stop()
    site.alertmanager.start()
    assert site.look(1) == []
    site.fire()
    assert site.look(1) == []
    assert site.levels() == ["", "2"]
    site.nothing_more()
    assert site.sink.told("/two") == 1


def test_a_restart_between_two_levels(site: Site) -> None:
    site.fire()
    site.look(1)
    assert site.look(101) == [2]
    site.until("/two")
    site.restart_escalator()
    assert site.look(1) == []
    assert site.look(50) == []
    assert site.look(60) == [3]
    site.until("/three")
    site.nothing_more()
    assert site.sink.told("/two") == 1


def test_a_lost_state_file(site: Site) -> None:
    site.fire()
    site.look(1)
    site.look(101)
    site.until("/two")
    (site.folder / "state.json").write_text('{"at": ')
    site.restart_escalator()
    assert site.look(1) == []
    assert site.look(150) == [3]
    site.until("/three")
    site.nothing_more()
    assert site.sink.told("/two") == 1


def test_an_answer_that_was_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fire()
    site.look(1)
    post = site.escalator.alertmanager.post

    def lost(alerts: list[Any]) -> None:
        post(alerts)
        raise escalator.Trouble("unreachable", "connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(site.escalator.alertmanager, "post", lost)
        assert site.look(101) is None
    assert site.look(1) == [2]
    assert site.look(1) == []
    site.until("/two")
    site.nothing_more()
    assert 'citadel_escalations_total{level="2",severity="critical"} 1\n' in site.escalator.metrics()


def test_a_receiver_that_answers_500_for_a_while(site: Site) -> None:
    """Alertmanager goes on trying by itself; we send nothing a second time."""
    site.fire()
    site.look(1)
    site.until("/one")
    site.sink.broken = True
    assert site.look(101) == [2]
    wait_for(lambda: site.sink.refused >= 2, "Alertmanager tries again")
    assert [site.look(5) for _ in range(3)] == [[], [], []]
    assert site.sink.told("/two") == 0
    site.sink.broken = False
    site.until("/two")
    site.nothing_more()
    assert 'citadel_escalations_total{level="2",severity="critical"} 1\n' in site.escalator.metrics()


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_jump_of_the_clock(site: Site, jump: float) -> None:
    site.fire()
    site.look(1)
    site.until("/one")
    site.jumped = jump
    assert site.look(1) == []
    assert site.look(50) == []
    assert site.levels() == [""]
    assert site.look(60) == [2]
    site.until("/two")
    assert "citadel_escalator_clock_jumps_total 1\n" in site.escalator.metrics()


def test_a_warning_beside_a_critical_alert_is_not_told(site: Site) -> None:
    """Our inhibition holds in the real one, and for a copy too."""
    site.fire()
    warning = {**site.labels, "severity": "warning"}
    site.call("alerts", [{"labels": warning, "annotations": {}}])
    other = {"alertname": "LLMEngineDown", "severity": "warning"}
    site.call("alerts", [{"labels": other, "annotations": {}}])
    site.until("/operator")
    found = {(alert["labels"].get("suite"), alert["labels"]["severity"]): alert for alert in site.call("alerts")}
    assert found["citadel", "warning"]["status"]["state"] == "suppressed"
    assert found[None, "warning"]["status"]["state"] == "active", "the operator's alerts are not ours to inhibit"
