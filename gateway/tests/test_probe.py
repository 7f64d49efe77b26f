"""Asking an engine whether it is well."""

import asyncio

from citadel_gateway.worker.probe import probe

from gateway.tests.fake_engine import FakeEngine
from gateway.tests.site import free_port


async def test_verdicts(engine: FakeEngine) -> None:
    assert await probe("127.0.0.1", engine.port, "k", 1.0) == "up"
    engine.health = 503
    assert await probe("127.0.0.1", engine.port, "k", 1.0) == "down"
    assert await probe("127.0.0.1", free_port(), "k", 1.0) == "down"


async def test_an_engine_that_accepts_and_says_nothing() -> None:
    async def client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    async with server:
        assert await probe("127.0.0.1", server.sockets[0].getsockname()[1], "k", 0.1) == "silent"
        await asyncio.sleep(0.4)
