"""Alerts: what Alertmanager sends, once, twice, late, too much, and over a restart."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.control import alerts
from citadel_gateway.control.alerts import Alert, Alerts, decode_notification
from hypothesis import given
from hypothesis import strategies as st

from gateway.tests.client import ADMIN, KEY, Reply, ask, get, post, until
from gateway.tests.live_site import ALERTER, READER, LiveSite

NOW = 1_900_000_000.0
START = "2030-03-17T17:00:00.123456789Z"


def notification(*sent: dict[str, Any], **more: Any) -> bytes:
    """As Alertmanager 0.25 writes it."""
    whole = {
        "version": "4",
        "groupKey": '{}:{alertname="EngineDown"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "citadel",
        "groupLabels": {"alertname": "EngineDown"},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alerts:9093",
        "alerts": list(sent),
        **more,
    }
    return json.dumps(whole).encode()


def one(name: str = "EngineDown", status: str = "firing", fingerprint: str = "f1", **more: Any) -> dict[str, Any]:
    return {
        "status": status,
        "labels": {"alertname": name, "severity": "critical", "model": "one"},
        "annotations": {"summary": "The engine is down", "runbook_url": "https://runbooks.example/EngineDown"},
        "startsAt": START,
        "endsAt": "0001-01-01T00:00:00Z" if status == "firing" else "2030-03-17T17:10:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=up",
        "fingerprint": fingerprint,
        **more,
    }


class Hour:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hour() -> Hour:
    return Hour()


@pytest.fixture
def store(tmp_path: Path, hour: Hour) -> Alerts:
    return Alerts(tmp_path / "alerts.json", hour)


def take(store: Alerts, *sent: dict[str, Any]) -> int:
    return store.take(decode_notification(notification(*sent)))


def test_one_fires_and_is_resolved(store: Alerts, hour: Hour) -> None:
    assert take(store, one()) == 1
    (alert,) = store.all()
    assert (alert.name, alert.status, alert.ends) == ("EngineDown", "firing", 0)
    assert alert.starts == pytest.approx(1_900_000_000 - 2800, abs=100_000)
    hour.now += 600
    assert take(store, one(status="resolved")) == 1
    (alert,) = store.all()
    assert alert.status == "resolved"
    assert 0 < alert.ends <= hour.now


def test_the_same_again_is_no_news(store: Alerts, hour: Hour) -> None:
    take(store, one())
    version = store.changes.version
    hour.now += 60
    assert take(store, one(), one()) == 0
    assert store.changes.version == version
    assert store.all()[0].seen == hour.now
    assert take(store, one(annotations={"summary": "worse"})) == 1


def test_late_news_of_an_earlier_time_count_for_nothing(store: Alerts) -> None:
    take(store, one(startsAt="2030-03-17T18:00:00Z"))
    assert take(store, one(status="resolved")) == 0
    assert store.all()[0].status == "firing"


def test_without_a_fingerprint_the_labels_are_one(store: Alerts) -> None:
    take(store, one(fingerprint=""), one(fingerprint="", labels={"alertname": "Other"}), one(fingerprint=""))
    assert [alert.name for alert in store.all()] == ["EngineDown", "Other"]


def test_the_order(store: Alerts) -> None:
    take(store, one(fingerprint="over", status="resolved"))
    take(store, one(fingerprint="mild", labels={"severity": "warning"}), one(fingerprint="bad"))
    assert [alert.fingerprint for alert in store.all()] == ["bad", "mild", "over"]


def test_bounds(store: Alerts, hour: Hour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "MOST", 5)
    take(store, one(fingerprint="over", status="resolved"))
    for number in range(8):
        hour.now += 1
        take(store, one(fingerprint=str(number), labels={"a" * 500: "b" * 5000} | dict.fromkeys("cdefgh", "")))
    assert sorted(store.entries) == ["3", "4", "5", "6", "7"]
    assert set(store.versions) == set(store.entries)
    labels = store.entries["7"].labels
    assert max(map(len, labels)) == 128
    assert max(map(len, labels.values())) == 2048


def test_the_old_goes(store: Alerts, hour: Hour) -> None:
    take(store, one(fingerprint="over", status="resolved"), one(fingerprint="silent"))
    hour.now += alerts.RESOLVED_SECONDS + 1
    take(store, one(fingerprint="other"))
    assert set(store.entries) == {"silent", "other"}
    hour.now += alerts.SILENT_SECONDS + 1
    take(store)
    assert {one.status for one in store.all()} == {"resolved"}


async def test_it_survives_a_restart(store: Alerts) -> None:
    take(store, one(), one(fingerprint="f2", status="resolved"))
    await store.keep()
    written = store.path.stat().st_mtime_ns
    await store.keep()  # nothing new, nothing written
    assert store.path.stat().st_mtime_ns == written
    assert Alerts(store.path).all() == store.all()
    store.path.write_text("{")
    assert Alerts(store.path).all() == []


async def test_a_full_disk_costs_the_memory_of_them_only(
    store: Alerts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    take(store, one())
    with monkeypatch.context() as patch:
        patch.setattr(alerts, "write_atomically", full)
        await store.keep()
    assert "no space" in caplog.text
    await store.keep()
    assert len(Alerts(store.path).all()) == 1


async def test_subscribers_hear_of_changes(store: Alerts) -> None:
    heard: list[Alert] = []

    async def listen() -> None:
        async for alert in store.updates():
            heard.append(alert)  # noqa: PERF401  # one by one, without end

    task = asyncio.create_task(listen())
    await asyncio.sleep(0)
    take(store, one(), one(fingerprint="f2"))
    take(store, one(status="resolved"))
    await until(lambda: len(heard) == 2)  # a slow reader gets the latest of each
    assert {alert.status for alert in heard} == {"resolved", "firing"}
    take(store, one(fingerprint="f3"))
    await until(lambda: len(heard) == 3)
    task.cancel()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 3)), max_size=30))
def test_whatever_the_order_the_newest_start_wins(events: list[tuple[str, bool, int]]) -> None:
    store = Alerts(Path("/nonexistent/alerts.json"), lambda: NOW)
    starts: dict[str, int] = {}
    for fingerprint, firing, hour in events:
        status = "firing" if firing else "resolved"
        take(store, one(fingerprint=fingerprint, status=status, startsAt=f"2030-03-17T1{hour}:00:00Z"))
        starts[fingerprint] = max(hour, starts.get(fingerprint, 0))
    assert set(store.entries) == set(starts)
    order = sorted(store.entries.values(), key=lambda alert: alert.starts)
    assert [starts[alert.fingerprint] for alert in order] == sorted(starts.values())
    assert set(store.versions) <= set(store.entries)


# over HTTP ----------------------------------------------------------------------------------------------------------
async def send(live: LiveSite, body: bytes, key: str = ALERTER) -> Reply:
    return await ask(live.port, post("/v1/alerts", body, key=key))


async def test_the_webhook(live: LiveSite) -> None:
    reply = await send(live, notification(one(), one(fingerprint="f2", status="resolved")))
    assert (reply.status, reply.json()) == (200, {"received": 2, "changed": 2})
    found = (await get(live.port, "/v1/alerts", READER)).json()["alerts"]
    assert [alert["fingerprint"] for alert in found] == ["f1", "f2"]
    assert found[0]["annotations"]["runbook_url"] == "https://runbooks.example/EngineDown"
    found = (await get(live.port, "/v1/alerts?status=resolved", ADMIN)).json()["alerts"]
    assert [alert["fingerprint"] for alert in found] == ["f2"]
    await live.stop()
    assert len(Alerts(Path(live.settings.state_dir) / "alerts.json").all()) == 2


async def test_who_may_and_what_is_none(live: LiveSite) -> None:
    for key, status in (("", 401), ("sk-wrong", 401), (KEY, 403), (READER, 403)):
        assert (await send(live, notification(), key)).status == status
    assert (await get(live.port, "/v1/alerts", KEY)).status == 403
    for bad in (b"{", b"[]", b'{"alerts":[{"labels":[]}]}', b"\xff", b"[" * 100_000, b'{"alerts":1}'):
        reply = await send(live, bad)
        assert (reply.status, reply.error()) == (400, "invalid_request")
    assert (await send(live, notification(version="3"))).status == 400
    assert (await send(live, notification(*[one()] * 5001))).status in (400, 413)
    assert (await get(live.port, "/v1/alerts?status=maybe", READER)).status == 400
