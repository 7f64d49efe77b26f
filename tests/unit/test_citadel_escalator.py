"""citadel-escalator: what it decides at which time, what it refuses and what it remembers, with a fake Alertmanager."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "roles/escalator/files/citadel-escalator"
START = 1_790_000_000.0
LEVELS = {2: 900.0, 3: 2700.0}


def load_escalator() -> ModuleType:
    loader = SourceFileLoader("citadel_escalator", str(SOURCE))
    spec = importlib.util.spec_from_loader("citadel_escalator", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["citadel_escalator"] = module
    loader.exec_module(module)
    return module


sys.dont_write_bytecode = True
escalator = load_escalator()


class World:
    """An Alertmanager in memory and a clock; ``look`` decides and carries out what is decided."""

    def __init__(self) -> None:
        self.wall, self.measured, self.boot, self.born = START, 1000.0, "boot-1", "alertmanager-1"
        self.alerts: dict[str, dict[str, Any]] = {}
        self.acks: set[str] = set()
        self.memory = escalator.Memory()
        self.rules = [
            escalator.Rule("*", "critical", LEVELS),
            escalator.Rule("models", "critical", {2: 300.0}),
            escalator.Rule("platform", "info", {}),
        ]
        self.told: list[int] = []
        self.states: dict[str, int] = {}

    @property
    def now(self) -> Any:
        return escalator.Moment(self.wall, self.measured, self.boot)

    def fire(self, name: str = "A", since: float | None = None, **labels: str) -> dict[str, Any]:
        labels = {"suite": "citadel", "alertname": name, "team": "platform", "severity": "critical"} | labels
        began = self.wall if since is None else since
        stamp = datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds")
        alert = {
            "labels": labels,
            "annotations": {"summary": f"{name} is bad", "runbook_url": "http://docs/a"},
            "startsAt": stamp,
            "updatedAt": stamp,
            "fingerprint": name.lower(),
            "generatorURL": "http://prometheus/graph",
            "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
        }
        self.alerts[json.dumps(labels, sort_keys=True)] = alert
        return alert

    def resolve(self, name: str = "A") -> None:
        for key, alert in list(self.alerts.items()):
            if alert["labels"]["alertname"] == name and "escalation" not in alert["labels"]:
                del self.alerts[key]

    def copies(self, name: str = "A") -> dict[str, dict[str, Any]]:
        found = [alert for alert in self.alerts.values() if alert["labels"]["alertname"] == name]
        return {a["labels"]["escalation"]: a for a in found if "escalation" in a["labels"]}

    def decide(self) -> Any:
        return escalator.decide(
            list(self.alerts.values()), self.acks, self.born, self.memory, self.now, self.rules, settle=120
        )

    def take(self, posts: list[dict[str, Any]]) -> None:
        """What Alertmanager does with a post."""
        for post in posts:
            key = json.dumps(post["labels"], sort_keys=True)
            if "endsAt" in post:
                self.alerts.pop(key, None)
            else:
                there = self.alerts.get(key) or {
                    "startsAt": "2026-01-01T00:00:00.000Z",
                    "updatedAt": "2026-01-01T00:00:15.000Z",
                    "fingerprint": key,
                    "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
                }
                self.alerts[key] = {**there, **post}

    def look(self, seconds: float = 0.0, *, wall: float | None = None) -> list[int]:
        """The levels told by a look after so many seconds; ``wall``: by how much the time of day moves instead."""
        self.measured += seconds
        self.wall += seconds if wall is None else wall
        decision = self.decide()
        self.take(decision.posts)
        self.memory, self.states = decision.memory, {k: v for k, v in decision.states.items() if v}
        self.told += [level for level, _, _ in decision.told]
        return [level for level, _, _ in decision.told]


@pytest.fixture
def world() -> World:
    made = World()
    made.look()
    made.look(15)
    return made


def test_levels_come_after_their_time_and_once(world: World) -> None:
    original = world.fire()
    assert world.look(15) == []
    assert world.states == {"waiting": 1}
    assert world.look(884) == []
    assert world.look(2) == [2]
    assert world.states == {"escalated": 1}
    for _ in range(5):
        assert world.look(15) == []
    copy = world.copies()["2"]
    assert copy["labels"] == {**original["labels"], "escalation": "2"}
    assert copy["annotations"].items() >= original["annotations"].items()
    assert copy["annotations"]["escalated_from"] == f"a since {original['startsAt']}"
    assert copy["generatorURL"] == original["generatorURL"]
    assert world.look(1710) == []
    assert world.look(15) == [3]
    assert world.look(100_000) == []
    assert set(world.copies()) == {"2", "3"}


def test_each_look_keeps_copies_alive(world: World) -> None:
    world.fire()
    world.look(901)
    assert [post["labels"]["escalation"] for post in world.decide().posts] == ["2"]
    assert not {"startsAt", "endsAt"} & world.decide().posts[0].keys()


def test_a_resolved_alert_ends_its_copies_and_begins_anew(world: World) -> None:
    world.fire()
    world.look(901)
    world.look(1801)
    world.resolve()
    ended = world.decide().posts
    assert {post["labels"]["escalation"] for post in ended} == {"2", "3"}
    assert {post["endsAt"] for post in ended} == {"2026-01-01T00:00:15.000Z"}, "Alertmanager's time, not ours"
    world.look(15)
    assert world.copies() == {}
    world.fire()
    assert world.look(15) == []
    assert world.look(890) == [2]


def test_an_alert_that_comes_again_between_two_looks_is_a_new_one(world: World) -> None:
    world.fire()
    world.look(901)
    world.fire(since=world.wall + 10)
    assert world.look(15) == []
    assert world.copies() == {}
    assert world.look(901) == [2]


def test_the_same_alert_of_a_second_prometheus_is_the_same_firing(world: World) -> None:
    """Alertmanager keeps the earlier start of the two."""
    world.fire()
    world.look(901)
    world.fire(since=world.wall - 950)
    assert world.look(15) == []
    assert set(world.copies()) == {"2"}


def test_rules_are_the_teams_own_or_those_of_all_others(world: World) -> None:
    world.fire("Own", team="models")
    world.fire("Info", severity="info")
    world.fire("Unheard", severity="none")
    world.fire("Other", team="business")
    assert world.look(301) == [2]
    assert set(world.copies("Own")) == {"2"}
    assert world.states == {"waiting": 1, "escalated": 1, "exempt": 2}
    assert world.look(10_000) == [2, 3]
    assert world.copies("Info") == world.copies("Unheard") == {}


def test_the_watchdog_goes_nowhere(world: World) -> None:
    world.fire("CitadelWatchdog")
    assert world.look(10_000) == []
    assert world.states == {"exempt": 1}


def test_level_1_may_be_written_out(world: World) -> None:
    world.fire(escalation="1")
    assert world.look(901) == [2]
    assert set(world.copies()) == {"1", "2"}


# --- acknowledgement -------------------------------------------------------------------------------------------------


def silence(alert: dict[str, Any], name: str = "s1") -> None:
    alert["status"] = {"state": "suppressed", "silencedBy": [name], "inhibitedBy": []}


def loud(alert: dict[str, Any]) -> None:
    alert["status"] = {"state": "active", "silencedBy": [], "inhibitedBy": []}


def test_an_acknowledgement_stops_it(world: World) -> None:
    alert = world.fire()
    world.look(100)
    silence(alert)
    world.acks = {"s1"}
    assert world.look(100_000) == []
    assert world.states == {"acknowledged": 1}


def test_an_acknowledgement_ends_the_copies(world: World) -> None:
    alert = world.fire()
    world.look(901)
    silence(alert)
    world.acks = {"s1"}
    world.look(15)
    assert world.copies() == {}
    assert world.look(100_000) == []


def test_after_an_acknowledgement_the_clock_runs_anew(world: World) -> None:
    alert = world.fire()
    world.look(800)
    silence(alert)
    world.acks = {"s1"}
    world.look(5000)
    loud(alert)
    world.acks = set()
    assert world.look(15) == []
    assert world.look(890) == []
    assert world.look(15) == [2]
    silence(alert)
    world.acks = {"s2", "s1"}
    world.look(5000)
    loud(alert)
    world.acks = set()
    assert world.look(15) == []
    assert world.copies() == {}, "level 2 is not told a second time"
    assert world.look(1700) == []
    assert world.look(100) == [3]


def test_a_silence_made_from_a_copy_acknowledges_too(world: World) -> None:
    """It fits the copy alone, which ends with it; it counts until it ends itself."""
    world.fire()
    world.look(901)
    silence(world.copies()["2"])
    world.acks = {"s1"}
    world.look(15)
    assert world.copies() == {}
    assert world.look(100_000) == []
    world.acks = set()
    assert world.look(15) == []
    assert world.look(1801) == [3]


def test_another_silence_halts_the_clock(world: World) -> None:
    alert = world.fire()
    world.look(600)
    silence(alert)
    world.look(15)
    assert world.look(100_000) == []
    assert world.states == {"suppressed": 1}
    loud(alert)
    assert world.look(15) == []
    assert world.look(280) == []
    assert world.look(20) == [2]


def test_a_copy_lives_on_under_an_inhibition(world: World) -> None:
    alert = world.fire()
    world.look(901)
    alert["status"] = {"state": "suppressed", "silencedBy": [], "inhibitedBy": ["b"]}
    assert world.look(100_000) == []
    assert set(world.copies()) == {"2"}


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_jump_of_the_clock_escalates_nothing(world: World, jump: float) -> None:
    world.fire()
    world.look(15)
    assert world.look(15, wall=jump) == []
    world.fire("New", since=world.wall - jump)
    assert world.look(15) == []
    assert world.look(840) == []
    assert world.look(20) == [2], "the old one, by measured time"
    assert world.look(60) == [2], "and the new one"


def test_time_counts_on_while_alertmanager_is_away(world: World) -> None:
    world.fire()
    world.look(15)
    world.measured += 1000
    world.wall += 1000  # failed looks change nothing
    assert world.look() == [2]


def test_all_levels_that_are_due_are_told(world: World) -> None:
    world.fire()
    world.look(15)
    assert world.look(3000) == [2, 3]


def test_a_lost_answer_counts_and_sends_nothing_again(world: World) -> None:
    world.fire()
    world.look(15)
    world.measured += 900
    world.take(world.decide().posts)  # arrived, but nobody said so: the old memory stays
    assert world.look(1) == [2]
    assert world.look(15) == []
    assert world.told == [2]


def test_a_restart_goes_on_counting(world: World, tmp_path: Path) -> None:
    world.fire()
    world.look(600)
    escalator.remember(tmp_path / "state", world.memory)
    world.memory = escalator.recall(tmp_path / "state")
    assert world.look(280) == []
    assert world.look(30) == [2]


def test_a_restart_goes_on_counting_after_a_jump(world: World, tmp_path: Path) -> None:
    world.fire()
    world.look(600)
    escalator.remember(tmp_path / "state", world.memory)
    world.memory = escalator.recall(tmp_path / "state")
    assert world.look(100, wall=86_400) == []


def test_a_reboot_counts_by_the_time_of_day_but_no_more_than_a_level(world: World) -> None:
    world.fire()
    world.look(600)
    world.boot, world.measured = "boot-2", 10.0
    assert world.look(20, wall=86_400) == [2]
    assert world.look(15) == []
    assert world.look(1790) == [3]
    world.boot, world.measured = "boot-3", 10.0
    assert world.look(20, wall=-86_400) == []


def test_without_memory_it_goes_by_what_alertmanager_holds(world: World) -> None:
    world.fire()
    world.look(1000)
    world.memory = escalator.Memory()
    assert world.look(15) == []
    assert set(world.copies()) == {"2"}
    assert world.look(1600) == []
    assert world.look(100) == [3]


def test_the_first_look_brings_an_old_alert_to_the_next_level_at_most() -> None:
    world = World()
    world.fire(since=START - 90_000)
    assert world.look() == [2]
    assert world.look(1790) == []
    assert world.look(20) == [3]


def test_an_alertmanager_that_forgot_is_given_time(world: World) -> None:
    """Alertmanager keeps alerts in memory: after its restart it learns them from Prometheus anew."""
    alert = world.fire()
    world.look(901)
    kept, world.alerts = world.alerts, {}
    world.born = "alertmanager-2"
    assert world.decide().posts == []
    world.look(15)
    world.look(30)
    world.alerts = {key: found for key, found in kept.items() if found is alert}
    assert world.look(15) == []
    assert set(world.copies()) == {"2"}, "the copy is back, and not counted as sent"
    assert world.told == [2]
    assert world.look(1730) == []
    assert world.look(20) == [3], "time has counted on"


def test_what_stays_away_is_over(world: World) -> None:
    world.fire()
    world.look(901)
    world.resolve()
    world.born = "alertmanager-2"
    world.look(15)
    assert set(world.copies()) == {"2"}
    world.look(130)
    assert world.copies() == {}
    assert world.memory.firings == {}


def test_what_somebody_posted_by_hand_is_left_alone(world: World) -> None:
    world.fire("Hand", escalation="2")
    world.look(15)
    assert set(world.copies("Hand")) == {"2"}


@pytest.mark.parametrize("origin", ["", "a since yesterday"])
def test_a_copy_of_an_unknown_origin_ends(world: World, origin: str) -> None:
    world.fire()
    world.fire(escalation="2")["annotations"]["escalated_from"] = origin
    assert world.look(15) == []
    assert world.copies() == {}


# --- configuration and state -----------------------------------------------------------------------------------------

RULES = [{"team": "*", "severity": "critical", "levels": {"2": 900, "3": 2700}}]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Path]:
    def write(**change: Any) -> Path:
        good: dict[str, Any] = {
            "alertmanager": "http://127.0.0.1:1",
            "rules": RULES,
            "state_file": str(tmp_path / "state.json"),
            "port": 0,
            "timeout": 5,
        }
        path = tmp_path / "escalator.json"
        path.write_text(json.dumps({k: v for k, v in (good | change).items() if v is not None}))
        return path

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rules": None}, "is not an object with rules"),
        ({"rules": [{"team": "a"}]}, 'rules has {"team": "a"}: give team, severity and levels'),
        ({"rules": [{**RULES[0], "levels": {"2": 5, "3": 5}}]}, "the third the later"),
        ({"rules": [{**RULES[0], "levels": {"4": 5}}]}, "levels are 2 and 3"),
        ({"rules": [{**RULES[0], "levels": {"2": 0}}]}, "seconds more than 0"),
        ({"intervall": 5}, "has intervall, which is not known: it has alertmanager, ca_file"),
        ({"interval": "5"}, 'interval is "5"'),
        ({"interval": 0}, "interval and timeout are more than 0"),
        ({"listen": 5}, "listen is 5"),
        ({"port": 70_000}, "port is 70000"),
        ({"alertmanager": "am:9093"}, "alertmanager is 'am:9093'"),
        ({"username": "me"}, "one of username and password_file: give both"),
        ({"username": "me", "password_file": "/no/such"}, "cannot read /no/such"),
        ({"ca_file": "/no/ca.crt"}, "cannot read /no/ca.crt"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(
    configure: Callable[..., Path], change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert escalator.main(["--config", str(configure(**change)), "--check"]) == 78
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_no_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert escalator.main(["--config", str(tmp_path / "none"), "--check"]) == 78
    (tmp_path / "none").write_text("{")
    assert escalator.main(["--config", str(tmp_path / "none")]) == 78
    assert "deploy it again" in capsys.readouterr().err


def test_a_good_configuration_is_taken(configure: Callable[..., Path]) -> None:
    assert escalator.main(["--config", str(configure()), "--check"]) == 0


def test_a_damaged_state_file_is_said_and_set_aside(
    configure: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = escalator.settings_from(configure())
    for damage in ("{", '{"at": {}}', "[]", '{"at": null, "firings": {}, "born": "", "quiet": 0}'):
        (tmp_path / "state.json").write_text(damage)
        made = escalator.Escalator(settings)
        assert made.memory == escalator.Memory()
        assert made.errors["state"] == 1
        assert "going on with what Alertmanager holds" in capsys.readouterr().err
        assert (tmp_path / "state.damaged").read_text() == damage
        assert not (tmp_path / "state.json").exists()


def test_the_state_file_is_whole_or_the_old_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    world.fire("A", note="\u00e4")
    world.look(15)
    escalator.remember(path, world.memory)
    assert escalator.recall(path) == world.memory

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        escalator.remember(path, escalator.Memory())
    assert escalator.recall(path) == world.memory


# --- the service, against a stand-in ---------------------------------------------------------------------------------


class StandIn:
    """As much of Alertmanager's API as is asked for; ``status`` other than 200 answers everything with it."""

    def __init__(self) -> None:
        self.world = World()
        self.silences: Any = []
        self.status = 200
        self.broken: str | None = None
        self.posted: list[Any] = []
        self.headers: list[dict[str, str]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                answers = {
                    "/api/v2/status": {"uptime": stand_in.world.born},
                    "/api/v2/silences": stand_in.silences,
                    "/api/v2/alerts": list(stand_in.world.alerts.values()),
                }
                stand_in.headers.append(dict(self.headers))
                self.answer(json.dumps(answers[path]) if stand_in.broken is None else stand_in.broken)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stand_in.status == 200:
                    stand_in.posted += body
                    stand_in.world.take(body)
                self.answer("")

            def answer(self, text: str) -> None:
                self.send_response(stand_in.status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def service(stand_in: StandIn, configure: Callable[..., Path]) -> Any:
    settings = escalator.settings_from(configure(alertmanager=stand_in.url + "/"))
    return escalator.Escalator(settings, lambda: stand_in.world.now)


def test_it_escalates_what_alertmanager_holds(service: Any, stand_in: StandIn) -> None:
    world = stand_in.world
    service.tick()
    world.fire()
    world.wall, world.measured = world.wall + 901, world.measured + 901
    service.tick()
    assert set(world.copies()) == {"2"}
    page = service.metrics()
    assert 'citadel_escalations_total{level="2",severity="critical"} 1\n' in page
    assert 'citadel_escalations_total{level="3",severity="critical"} 0\n' in page
    assert 'citadel_escalator_alerts{state="escalated"} 1\n' in page
    assert f"citadel_escalator_last_success_timestamp_seconds {world.wall:.15g}\n" in page
    assert service.health() == (True, "last good look 0 s ago")
    world.measured += 100
    assert service.health()[0] is False


@pytest.mark.parametrize(
    ("comment", "state", "stops"),
    [
        ("ack Ann", "active", True),
        (" ACK: looking", "active", True),
        ("Acknowledged", "active", True),
        ("maintenance", "active", False),
        ("not ack", "active", False),
        ("ack", "expired", False),
        ("ack", "pending", False),
    ],
)
def test_what_an_acknowledgement_is(service: Any, stand_in: StandIn, comment: str, state: str, stops: bool) -> None:
    silence(stand_in.world.fire())
    stand_in.silences = [{"id": "s1", "comment": comment, "status": {"state": state}}]
    assert service.tick().states["acknowledged"] == int(stops)


def test_failures_are_counted_said_once_and_tried_again(
    service: Any, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert service.health() == (False, "Alertmanager has not answered yet")
    stand_in.status = 500
    pauses = []
    for _ in range(7):
        assert service.tick() is None
        pauses.append(service.pause)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert service.errors["refused"] == 7
    assert capsys.readouterr().err.count("time counts on") == 1
    stand_in.status = 200
    assert service.tick() is not None
    assert service.pause == 15
    assert "answers again after 7 failed attempts" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["<html>", "null", "{}", '[{"labels": {}}]', '{"uptime": 1}'])
def test_an_answer_that_is_none_is_counted(service: Any, stand_in: StandIn, answer: str) -> None:
    stand_in.broken = answer
    assert service.tick() is None
    assert service.errors["answer"] == 1


def test_nobody_there_is_counted(configure: Callable[..., Path]) -> None:
    service = escalator.Escalator(escalator.settings_from(configure()))
    assert service.tick() is None
    assert service.errors["unreachable"] == 1


def test_a_full_disk_stops_nothing(
    service: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.world.fire(since=START - 1000)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(escalator, "remember", full)
    assert [level for level, _, _ in service.tick().told] == [2]
    assert service.tick().told == []
    assert service.errors["state"] == 2
    assert "make room" in capsys.readouterr().err


def test_a_jump_is_counted_and_said(service: Any, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    service.tick()
    stand_in.world.wall += 3600
    service.tick()
    assert "citadel_escalator_clock_jumps_total 1\n" in service.metrics()
    assert "has jumped by +3600 s" in capsys.readouterr().err


def test_it_logs_in_with_its_password_file(stand_in: StandIn, configure: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "password").write_text("open sesame\n")
    change = {"username": "citadel", "password_file": str(tmp_path / "password")}
    service = escalator.Escalator(escalator.settings_from(configure(alertmanager=stand_in.url, **change)))
    assert service.tick() is not None
    assert {headers["Authorization"] for headers in stand_in.headers} == {"Basic Y2l0YWRlbDpvcGVuIHNlc2FtZQ=="}


def test_once_prints_what_it_found(
    stand_in: StandIn, configure: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.world.fire(since=START)
    assert escalator.main(["--config", str(configure(alertmanager=stand_in.url)), "--once"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["told"][0]["level"] == 2
    assert said["told"][0]["alert"]["alertname"] == "A"
    stand_in.status = 503
    assert escalator.main(["--config", str(configure(alertmanager=stand_in.url)), "--once"]) == 1


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_service_tells_systemd_serves_and_stops(
    stand_in: StandIn, configure: Callable[..., Path], tmp_path: Path
) -> None:
    port = free_port()
    config = configure(alertmanager=stand_in.url, port=port, interval=0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = subprocess.Popen([sys.executable, SOURCE, "--config", config], env=environment)
        try:
            assert systemd.recv(1000) == b"READY=1"
            assert systemd.recv(1000) == b"WATCHDOG=1\nSTATUS=no alerts"
            assert get(f"http://127.0.0.1:{port}/healthz") == (200, "last good look 0 s ago\n")
            assert "citadel_escalator_alerts" in get(f"http://127.0.0.1:{port}/metrics?x=1")[1]
            assert get(f"http://127.0.0.1:{port}/")[0] == 404
            stand_in.status = 500
            deadline = time.monotonic() + 20
            while get(f"http://127.0.0.1:{port}/healthz")[0] == 200 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert get(f"http://127.0.0.1:{port}/healthz")[0] == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


def test_a_taken_port_is_said(
    service: Any, stand_in: StandIn, configure: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    port = stand_in.server.server_address[1]
    taken = escalator.Escalator(escalator.settings_from(configure(port=port)))
    assert escalator.run(taken, lambda _: True) == 1
    assert "change escalator_port" in capsys.readouterr().err


def test_a_refusal_is_told_to_systemd(configure: Callable[..., Path], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [sys.executable, str(SOURCE), "--config", str(configure(port=-1))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 78
        assert systemd.recv(1000).startswith(b"STATUS=refused: port is -1")
