"""Chat over a WebSocket, through a worker and the control process as a client has it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from citadel_gateway.control import chat, sockets
from citadel_gateway.control.chat import parsed
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.tests.client import ADMIN, KEY, Wire, get, head_of, until
from gateway.tests.fake_engine import FakeEngine, event_bytes
from gateway.tests.live_site import LiveSite, closed, drained, said, say

BODY = {"model": "one", "messages": [{"role": "user", "content": "Say a word"}]}
STREAM = {**BODY, "stream": True}


@pytest.fixture
async def socket(live: LiveSite) -> AsyncIterator[ClientConnection]:
    async with live.socket() as found:
        assert (await said(found))["type"] == "ready"
        yield found


async def all_of(socket: ClientConnection, *names: str) -> dict[str, list[dict[str, Any]]]:
    """What comes for these requests, up to the end of the last."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    ends = 0
    while ends < len(names):
        message = await said(socket)
        found[message["id"]].append(message)
        ends += message["type"] in ("done", "response", "error", "cancelled")
    return found


async def refused(live: LiveSite, **more: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with live.socket(**more):
            pass
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_a_whole_reply(socket: ClientConnection, engine: FakeEngine) -> None:
    await say(socket, type="request", id="a", body={**BODY, "temperature": 0.0}, headers={"X-Request-ID": "mine"})
    reply = await said(socket)
    assert (reply["type"], reply["id"], reply["status"], reply["request_id"]) == ("response", "a", 200, "mine")
    assert reply["data"]["choices"][0]["message"]["content"] == "It is 42."
    assert json.loads(engine.seen[-1].body)["temperature"] == 0.0


async def test_a_stream_event_by_event(socket: ClientConnection) -> None:
    await say(socket, type="request", id="a", body=STREAM)
    first, *events, last = (await all_of(socket, "a"))["a"]
    assert first["type"] == "started"
    assert first["request_id"]
    assert last == {"type": "done", "id": "a"}
    assert [b"data: " + json.dumps(one["data"]).encode() + b"\n\n" for one in events] == [
        event_bytes(number, "one") for number in range(5)
    ]


async def test_many_at_once(socket: ClientConnection, engine: FakeEngine) -> None:
    engine.delay = 0.02
    names = [str(number) for number in range(20)]
    for name in names:
        await say(socket, type="request", id=name, body=STREAM)
    found = await all_of(socket, *names)
    assert all([one["type"] for one in found[name]] == ["started", *["event"] * 5, "done"] for name in names)
    await say(socket, type="request", id="0", body=BODY)  # an id is free again at its end
    assert (await said(socket))["type"] == "response"


async def test_cancel_reaches_the_engine(live: LiveSite, socket: ClientConnection, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.05, 1000
    await say(socket, type="request", id="a", body=STREAM)
    await say(socket, type="request", id="b", body={**STREAM, "model": "uno"})
    await until(lambda: len(engine.seen) == 2)
    await say(socket, type="cancel", id="a")
    await until(lambda: engine.cancelled == 1)
    while (message := await said(socket))["type"] != "cancelled":
        assert message["type"] in ("started", "event")
    assert message["id"] == "a"
    assert (await said(socket))["id"] == "b"
    await say(socket, type="cancel", id="never")  # not an error
    await socket.close()
    await until(lambda: engine.cancelled == 2)
    await until(lambda: live.running.gate.core.open <= 1)  # that of the tunnel's own, if it is counted


async def test_errors_keep_their_shape(socket: ClientConnection, engine: FakeEngine) -> None:
    await say(socket, type="request", id="a", body={**BODY, "model": "nothing"})
    error = await said(socket)
    assert (error["type"], error["id"], error["status"]) == ("error", "a", 404)
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["code"] == "model_not_found"
    engine.mode = "503"
    await say(socket, type="request", id="b", body=BODY)
    assert (await said(socket))["status"] == 503
    engine.mode = "die"
    await say(socket, type="request", id="c", body=STREAM)
    *_, last = (await all_of(socket, "c"))["c"]
    assert (last["type"], last["status"]) == ("error", 502)


async def test_messages_that_are_none(socket: ClientConnection) -> None:
    for message, code in (
        ("{", "invalid_message"),
        ("[]", "invalid_message"),
        ('{"type":"nothing"}', "invalid_message"),
        ('{"type":"request","id":"a"}', "invalid_message"),
        ('{"type":"request","id":"","body":{}}', "invalid_message"),
        ('{"type":"request","id":"a","body":{},"headers":{"Authorization":"x"}}', "invalid_message"),
        ('{"type":"request","id":"a","body":{},"headers":{"X-A":"a\\r\\nb: c"}}', "invalid_message"),
        ('{"type":"request","id":"a","body":{},"headers":{"X-Citadel-Peer":"1"}}', "invalid_header"),
        ('{"type":"request","id":"a","body":{},"endpoint":"admin"}', "invalid_message"),
        ("[" * 100_000, "invalid_message"),
        (b"\xff\xfe", "invalid_message"),
    ):
        await socket.send(message)
        error = await said(socket)
        assert (error["type"], error["error"]["code"]) == ("error", code)
        await say(socket, type="ping", data="still here")
        assert await said(socket) == {"type": "pong", "data": "still here"}


async def test_bounds(
    live: LiveSite, socket: ClientConnection, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "AT_ONCE", 2)
    engine.mode = "hang"
    for name in ("a", "b", "a", "c"):
        await say(socket, type="request", id=name, body=BODY)
    first, second = await said(socket), await said(socket)
    assert (first["error"]["code"], "id" in first) == ("id_in_use", False)
    assert (second["error"]["code"], second["id"], second["status"]) == ("too_many_requests", "c", 429)
    with pytest.raises(ConnectionClosed):  # the close frame may be lost: nobody reads the rest of such a message
        await asyncio.gather(socket.send("x" * (sockets.MESSAGE_BYTES + 1)), drained(socket))
    await until(lambda: not live.part("lines").open)


async def test_who_may(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await refused(live, key="sk-wrong") == (401, "invalid_api_key")
    assert await refused(live, key=ADMIN) == (403, "insufficient_scope")
    assert (await refused(live, path=f"/v1/ws/chat?api_key={KEY}"))[0] == 400
    assert await refused(live, origin="https://elsewhere.example") == (403, "origin_not_allowed")
    for origin in ("https://page.example", f"http://127.0.0.1:{live.port}"):
        async with live.socket(origin=origin) as socket:
            assert (await said(socket))["type"] == "ready"
    monkeypatch.setattr(live.part("lines"), "each", 1)
    async with live.socket() as socket:
        assert (await said(socket))["type"] == "ready"
        assert await refused(live) == (429, "too_many_connections")
    assert (await get(live.port, "/v1/ws/chat")).status == 426


async def test_the_first_message_brings_the_key(live: LiveSite) -> None:
    async with live.socket(key="") as socket:
        await say(socket, type="auth", key=KEY)
        assert (await said(socket))["type"] == "ready"
        await say(socket, type="request", id="a", body=BODY)
        assert (await said(socket))["type"] == "response"
    for first, code in (
        ({"type": "auth", "key": "sk-wrong"}, "invalid_api_key"),
        ({"type": "auth", "key": "line\nbreak"}, "invalid_api_key"),
        ({"type": "auth", "key": ADMIN}, "insufficient_scope"),
        ({"type": "request"}, "missing_api_key"),
    ):
        async with live.socket(key="") as socket:
            await say(socket, **first)
            assert (await said(socket))["error"]["code"] == code
            assert await closed(socket) == (1008, code)


async def test_few_without_a_key(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.part("lines"), "nobody", 1)
    async with live.socket(key="") as socket:
        assert await refused(live, key="") == (429, "too_many_connections")
        await say(socket, type="auth", key=KEY)
        await said(socket)
        async with live.socket(key="") as second:  # the first has a key now
            await say(second, type="auth", key=KEY)
            assert (await said(second))["type"] == "ready"
    page = await get(live.port, "/metrics", ADMIN)
    for name in ("long_connections", "resumable_streams", 'alerts{status="firing"}'):
        assert f"\nllm_gateway_{name} ".encode() in page.body


async def test_cancel_is_quick(socket: ClientConnection, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.01, 10_000
    taken = []
    for number in range(3):
        await say(socket, type="request", id="a", body=STREAM)
        while (await said(socket))["type"] != "event":
            pass
        started = asyncio.get_running_loop().time()
        await say(socket, type="cancel", id="a")
        await until(lambda count=number: engine.cancelled > count)  # type: ignore[misc]  # its default is what it is for
        taken.append(asyncio.get_running_loop().time() - started)
        while (await said(socket))["type"] != "cancelled":
            pass
    assert min(taken) < 0.1  # of three, because the machine may be busy with others


async def test_nobody_waits_for_a_key_for_ever(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "AUTH_SECONDS", 0.05)
    async with live.socket(key="") as socket:
        assert (await closed(socket)) == (1008, "missing_api_key")


async def test_a_revoked_key_ends_it(live: LiveSite, socket: ClientConnection) -> None:
    live.site.keys = [key for key in live.site.keys if key["id"] != "user"]
    live.site.write()
    live.state.look()
    await say(socket, type="request", id="a", body=BODY)
    assert (await said(socket))["error"]["code"] == "invalid_api_key"
    assert (await closed(socket))[0] == 1008


async def test_a_drain_ends_what_runs_and_says_so(live: LiveSite, socket: ClientConnection, engine: FakeEngine) -> None:
    engine.delay = 0.1
    await say(socket, type="request", id="a", body=STREAM)
    await until(lambda: engine.seen)
    stopping = asyncio.create_task(live.stop())
    kinds = []
    refusals = 0
    while (message := await said(socket))["type"] != "done":
        kinds.append(message["type"])
        if message["type"] == "draining":
            await say(socket, type="request", id="late", body=BODY)
        refusals += message.get("error", {}).get("code") == "restarting"
    assert kinds.count("event") == 5
    assert refusals == 1
    assert await closed(socket) == (1012, "restarting")
    await stopping


async def test_a_worker_that_stops_is_not_held_up(live: LiveSite, socket: ClientConnection) -> None:
    """Its report says so; what runs ends, and the connection closes for another worker to take."""
    started = asyncio.get_running_loop().time()
    stopping = asyncio.create_task(live.running.stop())
    assert await closed(socket) == (1012, "restarting")
    await stopping
    assert asyncio.get_running_loop().time() - started < 10


async def test_a_fault_of_ours_is_an_end_too(
    live: LiveSite, socket: ClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(live.part("client"), "ask", broken)
        await say(socket, type="request", id="a", body=BODY)
        error = await said(socket)
    assert (error["id"], error["status"], error["error"]["code"]) == ("a", 500, "internal_error")
    await say(socket, type="request", id="a", body=BODY)
    assert (await said(socket))["type"] == "response"


async def test_who_pings_and_does_not_read_fills_no_memory(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CLOSE_SECONDS", 0.1)
    wire = Wire(*await asyncio.open_unix_connection(live.settings.control_socket))
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    wire.send(head_of("GET", "/v1/ws/chat", {**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}))
    assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    for _ in range(20):
        wire.send(ping * 2000)
        await wire.writer.drain()
    buffered = [one.transport.get_write_buffer_size() for one in live.server.server_state.connections]
    assert max(buffered) < 500_000
    started = asyncio.get_running_loop().time()
    await live.stop()  # nor does a client that has not said its key hold it up
    assert asyncio.get_running_loop().time() - started < sockets.AUTH_SECONDS / 2
    await wire.close()


async def test_idle_connections_end(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "IDLE_SECONDS", 0.05)
    async with live.socket() as socket:
        assert (await closed(socket)) == (1001, "idle")


async def test_a_slow_reader_slows_the_engine(live: LiveSite, engine: FakeEngine) -> None:
    """Nothing on the way holds a whole answer: the engine stands still, and goes on when somebody reads."""
    engine.events = 200_000
    async with live.socket(max_queue=1) as socket:
        await said(socket)
        await say(socket, type="request", id="a", body=STREAM)
        await until(lambda: engine.open and next(iter(engine.open)).transport.get_write_buffer_size() > 60_000)
        await asyncio.sleep(0.3)
        assert next(iter(engine.open)).transport.get_write_buffer_size() > 60_000
        await say(socket, type="cancel", id="a")
        count = 0
        while (await said(socket))["type"] != "cancelled":
            count += 1
        assert count < 100_000


def test_parts_of_an_event() -> None:
    assert parsed(b'event: delta\ndata: {"a":\ndata: 1}\n\n') == ("delta", b'{"a":\n1}')
    assert parsed(b": nothing\r\ndata:x\r\n\r\n") == (None, b"x")
