"""Streams that go on where a client lost them: byte for byte, bounded, and only for whom they belong to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from citadel_gateway.control import resume
from citadel_gateway.control.resume import Recording, Recordings
from citadel_gateway.errors import Refusal
from hypothesis import given
from hypothesis import strategies as st

from gateway.tests.client import ADMIN, KEY, Reply, Wire, ask, chat, connect, get, head_of, until
from gateway.tests.fake_engine import FakeEngine, event_bytes, stream_bytes
from gateway.tests.live_site import LiveSite

PATH = "/v1/chat/completions"
BODY = {"model": "one", "messages": [{"role": "user", "content": "Say a word"}], "stream": True}


class Side:
    """Clients of the control socket, as a worker is one that relays to it."""

    def __init__(self, live: LiveSite) -> None:
        self.live = live

    async def send(self, method: str, path: str, key: str = KEY, body: bytes = b"", **headers: str) -> Wire:
        wire = Wire(*await asyncio.open_unix_connection(self.live.settings.control_socket))
        lines = {name.replace("_", "-"): value for name, value in headers.items()}
        lines |= {"Authorization": f"Bearer {key}", "Content-Length": str(len(body)), "X-Citadel-Worker": "1"}
        wire.send(head_of(method, path, lines) + body)
        return wire

    async def ask(self, method: str, path: str, key: str = KEY, body: bytes = b"", **headers: str) -> Reply:
        wire = await self.send(method, path, key, body, **headers)
        reply = await wire.reply(method)
        await wire.close()
        return reply

    async def begin(self, name: str = "r1", **more: object) -> Wire:
        body = json.dumps({**BODY, **more}).encode()
        wire = await self.send("POST", PATH, body=body, X_Request_Id=name, X_Citadel_Resumable="1")
        status, headers = await wire.head()
        assert (status, headers["x-request-id"], headers["x-citadel-resumable"]) == (200, name, "1")
        return wire

    async def resume(self, after: int, name: str = "r1") -> Reply:
        return await self.ask("GET", f"/v1/streams/{name}", Last_Event_Id=str(after))

    @property
    def kept(self) -> Recordings:
        found: Recordings = self.live.part("recordings")
        return found


@pytest.fixture
def side(live: LiveSite) -> Side:
    return Side(live)


def numbered(first: int, last: int) -> bytes:
    """The events of a whole stream of the fake engine, with their ids."""
    events = [*(event_bytes(number, "one") for number in range(5)), b"data: [DONE]\n\n"]
    return b"".join(b"id: %d\n%b" % (number, events[number - 1]) for number in range(first, last + 1))


def without_ids(stream: bytes) -> bytes:
    return b"\n".join(line for line in stream.split(b"\n") if not line.startswith(b"id: "))


async def rest(wire: Wire) -> bytes:
    parts = []
    while part := await wire.chunk():
        parts.append(part)
    await wire.close()
    return b"".join(parts)


async def test_byte_for_byte_but_for_the_ids(side: Side, engine: FakeEngine) -> None:
    stream = await rest(await side.begin())
    assert stream == numbered(1, 6)
    assert without_ids(stream) == stream_bytes(5, "one")
    assert "x-citadel-resumable" not in engine.seen[-1].headers
    again = await side.resume(0)
    assert (again.status, again.body) == (200, numbered(1, 6))
    assert again.headers["content-type"].startswith("text/event-stream")
    assert (await side.resume(4)).body == numbered(5, 6)
    assert (await side.resume(6)).body == b""


async def test_the_generation_goes_on_while_the_client_is_away(side: Side, engine: FakeEngine) -> None:
    engine.delay = 0.05
    wire = await side.begin()
    assert await wire.chunk() == numbered(1, 1)
    await wire.close()
    reply = await side.resume(1)
    assert reply.body == numbered(2, 6)
    assert engine.cancelled == 0
    assert len(engine.seen) == 1


async def test_a_second_reader_takes_the_place_of_the_first(side: Side, engine: FakeEngine) -> None:
    engine.delay = 0.05
    first = await side.begin()
    await first.chunk()
    second = await side.resume(0)
    assert second.body == numbered(1, 6)
    assert not (await rest(first)).endswith(b"[DONE]\n\n")


async def test_who_stays_away_too_long_ends_it(side: Side, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.delay, engine.events = 0.05, 1000
    wire = await side.begin()
    await wire.chunk()
    await wire.close()
    monkeypatch.setattr(resume, "AWAY_SECONDS", 0.05)
    await until(lambda: engine.cancelled == 1)
    reply = await side.resume(1)
    assert (reply.status, reply.error()) == (410, "stream_gone")
    assert not side.kept.kept


async def test_a_deliberate_end(side: Side, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.05, 1000
    wire = await side.begin()
    await wire.chunk()
    assert (await side.ask("DELETE", "/v1/streams/r1")).status == 204
    await until(lambda: engine.cancelled == 1)
    await rest(wire)
    assert (await side.ask("DELETE", "/v1/streams/r1")).status == 410


async def test_it_belongs_to_a_user(side: Side) -> None:
    await rest(await side.begin())
    for method in ("GET", "DELETE"):
        reply = await side.ask(method, "/v1/streams/r1", "sk-other")
        assert (reply.status, reply.error()) == (404, "stream_not_found")
        assert (await side.ask(method, "/v1/streams/r1", "")).status == 401
        assert (await side.ask(method, "/v1/streams/r1", ADMIN)).status == 403
    assert (await side.resume(0)).status == 200


async def test_what_cannot_be(side: Side, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    await rest(await side.begin())
    for after in ("7", "x", "-1", "9" * 40):
        assert (await side.ask("GET", "/v1/streams/r1", Last_Event_Id=after)).status == 400
    plain = json.dumps({**BODY, "stream": False}).encode()
    for body, more, status, code in (
        (plain, {"X_Request_Id": "r2"}, 400, "not_a_stream"),
        (b"{", {"X_Request_Id": "r2"}, 400, "invalid_request"),
        (json.dumps(BODY).encode(), {}, 400, "request_id_missing"),
        (json.dumps(BODY).encode(), {"X_Request_Id": "r1"}, 409, "stream_exists"),
        (json.dumps({**BODY, "model": "no"}).encode(), {"X_Request_Id": "r2"}, 404, "model_not_found"),
    ):
        reply = await side.ask("POST", PATH, body=body, X_Citadel_Resumable="1", **more)
        assert (reply.status, reply.error()) == (status, code)
    assert (await side.ask("POST", PATH, body=json.dumps(BODY).encode(), X_Request_Id="r2")).status == 404
    assert (await side.resume(0, "r2")).status == 404  # a refusal leaves nothing behind
    engine.mode = "503"
    reply = await side.ask("POST", PATH, body=json.dumps(BODY).encode(), X_Request_Id="r2", X_Citadel_Resumable="1")
    assert reply.status == 503
    monkeypatch.setattr(resume, "EACH", 1)
    reply = await side.ask("POST", PATH, body=json.dumps(BODY).encode(), X_Request_Id="r3", X_Citadel_Resumable="1")
    assert (reply.status, reply.error()) == (429, "too_many_streams")
    monkeypatch.setattr(resume, "EACH", 2)
    monkeypatch.setattr(resume, "STREAMS", 1)
    reply = await side.ask("POST", PATH, body=json.dumps(BODY).encode(), X_Request_Id="r3", X_Citadel_Resumable="1")
    assert reply.status == 503


async def test_no_worker(side: Side) -> None:
    await side.live.running.stop()
    body = json.dumps(BODY).encode()
    reply = await side.ask("POST", PATH, body=body, X_Request_Id="r1", X_Citadel_Resumable="1")
    assert (reply.status, reply.error()) == (503, "gateway_unavailable")
    assert not side.kept.kept


async def test_a_stream_that_breaks_says_so_to_each_reader(side: Side, engine: FakeEngine) -> None:
    engine.mode = "die"
    stream = await rest(await side.begin())
    assert b'"error"' in stream
    assert (await side.resume(2)).body == stream[len(numbered(1, 2)) :]


async def test_a_fault_of_ours_is_an_answer(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(side.live.part("client"), "ask", broken)
        body = json.dumps(BODY).encode()
        with suppress(asyncio.IncompleteReadError):
            reply = await side.ask("POST", PATH, body=body, X_Request_Id="r1", X_Citadel_Resumable="1")
            assert reply.status == 500
    assert not side.kept.kept


# the buffer ---------------------------------------------------------------------------------------------------------
class FakeReply:
    def __init__(self, count: int) -> None:
        self.count = count

    async def events(self) -> AsyncIterator[bytes]:
        for number in range(1, self.count + 1):
            yield b"data: %03d\n\n" % number


def recording(limit: int) -> Recording:
    return Recording("user", "r1", lambda: 0.0, lambda: limit)


async def read(found: Recording, after: int) -> list[bytes]:
    return [event async for event in found.read(found.attach(after))]


async def test_without_a_reader_the_oldest_go() -> None:
    found = recording(limit=55)
    await found.record(FakeReply(20))  # type: ignore[arg-type]  # has what is used
    assert (found.first, found.last, found.size) == (16, 20, 55)
    assert found.has(15)
    assert not found.has(14)
    assert [event[:6] for event in await read(found, 15)] == [b"id: %d" % number for number in range(16, 21)]


async def test_a_slow_reader_is_waited_for() -> None:
    found = recording(limit=55)
    reader = found.attach(0)
    task = asyncio.create_task(found.record(FakeReply(100)))  # type: ignore[arg-type]  # has what is used
    await asyncio.sleep(0.01)
    assert found.last == 6  # one more than there is room for
    got = []
    async for event in found.read(reader):
        got.append(event)
        if len(got) == 50:
            break
    found.detach(reader)
    await task  # nobody reads any more: the rest comes at once
    assert got == [b"id: %d\ndata: %03d\n\n" % (number, number) for number in range(1, 51)]
    assert found.last == 100
    with pytest.raises(Refusal):
        Recordings(lambda: 0.0).find("user", "r1")


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=6), st.integers(11, 200))
def test_readers_get_each_event_once_in_order(count: int, cuts: list[int], limit: int) -> None:
    async def run() -> None:
        found = recording(limit)
        task = asyncio.create_task(found.record(FakeReply(count)))  # type: ignore[arg-type]  # has what is used
        got: list[bytes] = []
        for cut in [*cuts, None]:
            reader = found.attach(len(got))
            async for event in found.read(reader):
                got.append(event)
                if cut is not None and len(got) >= cut:
                    break
        await task
        assert got == [b"id: %d\ndata: %03d\n\n" % (number, number) for number in range(1, count + 1)]

    asyncio.run(run())


# through a worker ---------------------------------------------------------------------------------------------------
async def test_the_whole_way(live: LiveSite, engine: FakeEngine) -> None:
    """A client that loses its connection to a worker goes on through another connection."""
    engine.delay = 0.05
    wire = await connect(live.port)
    wire.send(chat(stream=True, headers={"X-Citadel-Resumable": "1", "X-Request-ID": "mine"}))
    status, headers = await wire.head()
    assert (status, headers["x-request-id"], headers["x-citadel-resumable"]) == (200, "mine", "1")
    assert (await wire.chunk()).startswith(b"id: 1\ndata: ")
    await wire.close()
    reply = await get(live.port, "/v1/streams/mine", headers={"Last-Event-ID": "1"})
    assert (reply.status, reply.body) == (200, numbered(2, 6))
    assert len(engine.seen) == 1
    assert engine.cancelled == 0
    assert (await get(live.port, "/v1/streams/mine", "sk-other")).status == 404
    refused = await ask(live.port, chat(headers={"X-Citadel-Resumable": "1"}))
    assert refused.error() == "not_a_stream"
    refused = await ask(live.port, chat(stream=True, key="sk-wrong", headers={"X-Citadel-Resumable": "1"}))
    assert refused.status == 401


async def test_a_large_prompt(live: LiveSite) -> None:
    """Its body may be as large as that of any other completion."""
    request = chat(stream=True, headers={"X-Citadel-Resumable": "1"}, padding="x" * 2_000_000)
    reply = await ask(live.port, request)
    assert reply.status == 200
    assert without_ids(reply.body) == stream_bytes(5, "one")
