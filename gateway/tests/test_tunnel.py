"""An upgraded connection: bytes both ways through the worker."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.tests.client import connect, head_of, until
from gateway.tests.site import Running

UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "abc", "Authorization": "Bearer sk"}


class FakeControl:
    """A server on the control socket that switches protocols and then echoes."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.flood = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n" + b"x" * self.flood)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def control(gateway: Running) -> AsyncIterator[FakeControl]:
    fake = FakeControl()
    server = await asyncio.start_unix_server(fake.client, gateway.site.config["control_socket"])
    yield fake
    server.close()


async def test_bytes_go_both_ways(gateway: Running, control: FakeControl) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/v1/ws/chat?x=1", UPGRADE) + b"first")
    assert (await wire.head())[0] == 101
    assert await wire.reader.readexactly(5) == b"first"
    for number in range(50):
        wire.send(b"%d" % number * 1000)
        await wire.reader.readexactly(len(b"%d" % number) * 1000)
    head = control.heads[0]
    assert head.startswith(b"GET /v1/ws/chat?x=1 HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n")
    for line in (
        b"sec-websocket-key: abc",
        b"authorization: Bearer sk",
        b"x-citadel-worker: 1",
        b"x-forwarded-for: 127",
    ):
        assert line in head
    await wire.close()
    await until(lambda: control.writers[0].is_closing())
    await gateway.stop()
    assert [(line["status"], line["outcome"]) for line in gateway.site.log()] == [(101, "tunnel")]


async def test_a_megabyte_each_way_through_small_buffers(gateway: Running, control: FakeControl) -> None:
    control.flood = 8_000_000
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/ws", UPGRADE))
    await wire.head()
    await asyncio.sleep(0.2)  # nobody reads: the flood waits on the control's side
    assert len(await wire.reader.readexactly(8_000_000)) == 8_000_000
    data = b"y" * 4_000_000
    wire.send(data)
    await asyncio.sleep(0.1)
    assert await wire.reader.readexactly(len(data)) == data
    await wire.close()


async def test_the_end_of_either_side_is_the_end(gateway: Running, control: FakeControl) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/ws", UPGRADE))
    await wire.head()
    control.writers[0].close()
    assert await wire.at_end()
    await wire.close()


async def test_no_control_process_no_tunnel(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/ws", UPGRADE))
    assert await wire.at_end()
    await wire.close()


async def test_an_upgrade_sent_ahead_is_refused(gateway: Running, control: FakeControl) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/nothing") + head_of("GET", "/ws", UPGRADE))
    assert (await wire.reply()).status == 502  # the stand-in for control answers 101 to a plain request
    assert (await wire.reply()).status == 400
    await wire.close()
