"""Event streams, through a worker: first everything, then what changes."""

from typing import Any

import pytest
from citadel_gateway.control import streams

from gateway.tests.client import ADMIN, KEY, ask, connect, get, head_of, post, until
from gateway.tests.live_site import ALERTER, READER, Events, LiveSite
from gateway.tests.test_alerts import notification, one


async def opened(live: LiveSite, name: str, key: str = READER) -> Events:
    wire = await connect(live.port)
    wire.send(head_of("GET", f"/v1/stream/{name}", {"Authorization": f"Bearer {key}"}))
    status, headers = await wire.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    return Events(wire)


def merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    found = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = merged(found.get(name), value)
    return found


async def test_figures(live: LiveSite) -> None:
    stream = await opened(live, "metrics")
    kind, figures = await stream.next()
    assert kind == "snapshot"
    assert list(figures["models"]) == ["one"]
    for _ in range(3):
        live.part("live").look()
        kind, change = await stream.next()
        assert kind == "delta"
        figures = merged(figures, change)
        if figures["at"] == live.part("live").figures["at"]:
            assert figures == live.part("live").figures
    await stream.wire.close()
    await until(lambda: not live.part("lines").open)


async def test_states(live: LiveSite) -> None:
    stream = await opened(live, "status", ADMIN)
    kind, first = await stream.next()
    assert (kind, list(first["models"])) == ("snapshot", ["one"])
    assert (await ask(live.port, post("/admin/models/one/drain", b"", key=ADMIN))).status == 200
    live.part("live").look()
    while (found := await stream.next())[1]["state"] != "draining":
        assert found[0] == "model"
    assert found[1]["model"] == "one"
    live.site.models = [{**live.site.models[0], "name": "two", "aliases": []}]
    live.site.write()
    live.state.look()
    live.part("live").look()
    kinds = {(await stream.next())[1]["model"] for _ in range(2)}
    assert kinds == {"one", "two"}
    await stream.wire.close()


async def test_alerts(live: LiveSite) -> None:
    await ask(live.port, post("/v1/alerts", notification(one()), key=ALERTER))
    stream = await opened(live, "alerts")
    kind, first = await stream.next()
    assert (kind, len(first["alerts"])) == ("snapshot", 1)
    await ask(live.port, post("/v1/alerts", notification(one(status="resolved")), key=ALERTER))
    kind, alert = await stream.next()
    assert (kind, alert["fingerprint"], alert["status"]) == ("alert", "f1", "resolved")
    await stream.wire.close()


async def test_who_may(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("metrics", "status", "alerts"):
        assert (await get(live.port, f"/v1/stream/{name}", "")).status == 401
        assert (await get(live.port, f"/v1/stream/{name}", KEY)).error() == "insufficient_scope"
    monkeypatch.setattr(live.part("lines"), "each", 1)
    stream = await opened(live, "alerts")
    reply = await get(live.port, "/v1/stream/alerts", READER)
    assert (reply.status, reply.error(), reply.headers["retry-after"]) == (429, "too_many_connections", "10")
    await stream.wire.close()
    await until(lambda: not live.part("lines").open)
    monkeypatch.setattr(live.part("lines"), "total", 0)
    assert (await get(live.port, "/v1/stream/alerts", READER)).status == 503


async def test_a_silent_stream_shows_that_it_lives(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.01)
    stream = await opened(live, "alerts")
    await stream.next()
    assert await stream.wire.chunk() == b": still here\n\n"
    await stream.wire.close()


async def test_a_revoked_key_ends_its_streams(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.05)
    stream = await opened(live, "alerts")
    await stream.next()
    live.site.keys = [key for key in live.site.keys if key["id"] != "reader"]
    live.site.write()
    live.state.look()
    kind, error = await stream.next()
    assert (kind, error["error"]["code"]) == ("error", "invalid_api_key")
    assert await stream.wire.chunk() == b""
    await stream.wire.close()


async def test_streams_end_when_their_worker_stops(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.05)
    stream = await opened(live, "alerts")
    await stream.next()
    (line,) = live.part("lines").open
    live.part("lines").look(frozenset((line.worker,)))
    assert await stream.wire.chunk() == b""
    await stream.wire.close()
