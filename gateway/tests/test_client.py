"""The control process as a client of a worker: whole events, and an end that the engine notices."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from citadel_gateway.control.client import Client, Unreachable, end_of_event

from gateway.tests.client import KEY, until
from gateway.tests.fake_engine import FakeEngine, event_bytes, stream_bytes
from gateway.tests.site import Running, Site, free_port

PATH = "/v1/chat/completions"


def asking(**more: object) -> bytes:
    return json.dumps({"model": "one", "messages": [{"role": "user", "content": "Say a word"}], **more}).encode()


@pytest.fixture
async def client(gateway: Running) -> AsyncIterator[Client]:
    async with Client(f"http://127.0.0.1:{gateway.port}") as found:
        yield found


async def test_a_reply(client: Client) -> None:
    async with client.ask("POST", PATH, KEY, asking(), {"x-request-id": "mine"}) as reply:
        assert (reply.status, reply.is_stream, reply.request_id) == (200, False, "mine")
        assert json.loads(await reply.body())["choices"][0]["message"]["content"] == "It is 42."
    async with client.ask("GET", "/v1/models", KEY) as reply:
        assert json.loads(await reply.body())["data"][0]["id"] == "one"


async def test_events_are_whole_and_untouched(client: Client) -> None:
    async with client.ask("POST", PATH, KEY, asking(stream=True), {"x-fake": "split"}) as reply:
        assert reply.is_stream
        events = [event async for event in reply.events()]
    assert b"".join(events) == stream_bytes(5, "one")
    assert events[0] == event_bytes(0, "one")
    assert len(events) == 6


async def test_a_refusal_is_a_reply(client: Client) -> None:
    async with client.ask("POST", PATH, "sk-wrong", asking()) as reply:
        assert reply.status == 401
        assert json.loads(await reply.body())["error"]["code"] == "invalid_api_key"


async def test_leaving_tells_the_engine(client: Client, gateway: Running, engine: FakeEngine) -> None:
    engine.delay = 0.05
    engine.events = 1000
    async with client.ask("POST", PATH, KEY, asking(stream=True)) as reply:
        async for _ in reply.events():
            break
    started = asyncio.get_running_loop().time()
    await until(lambda: engine.cancelled == 1)
    assert asyncio.get_running_loop().time() - started < 1
    await until(lambda: gateway.gate.core.open == 0)


async def test_connections_are_kept(client: Client, gateway: Running) -> None:
    for _ in range(5):
        async with client.ask("POST", PATH, KEY, asking()) as reply:
            await reply.body()
    assert gateway.server is not None
    assert len(gateway.server.server_state.connections) == 1


async def test_too_much_is_no_reply(client: Client, engine: FakeEngine) -> None:
    engine.mode = "big"
    with pytest.raises(Unreachable, match="too large"):
        async with client.ask("POST", PATH, KEY, asking()) as reply:
            await reply.body(limit=1000)


async def test_nobody_there() -> None:
    async with Client(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(Unreachable) as caught:
            async with client.ask("GET", "/v1/models", KEY):
                pass
    assert json.loads(caught.value.body())["error"]["code"] == "gateway_unavailable"


async def test_a_reply_that_breaks_off() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(Unreachable):
            async with client.ask("GET", "/", KEY) as reply:
                await reply.body()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("address", "url"),
    [("", "http://127.0.0.1:9"), ("::", "http://[::1]:9"), ("10.1.2.3", "http://10.1.2.3:9")],
)
def test_the_address(site: Site, address: str, url: str) -> None:
    site.config["listen"] = {"address": address, "port": 9}
    assert Client.of(site.settings).url == url


def test_ends_of_events() -> None:
    assert end_of_event(b"data: 1\n\ndata: 2\r\n\r\n") == 9
    assert end_of_event(b"data: 1\n\ndata: 2\r\n\r\n", 9) == 20
    assert end_of_event(b"data: 1\n") == -1
