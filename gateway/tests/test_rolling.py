"""A rolling restart under load: two real workers on one socket, 50 streams at any time, clients that keep coming."""

import asyncio
import contextlib
import socket

from gateway.tests.client import ask, chat, connect
from gateway.tests.fake_engine import FakeEngine, stream_bytes
from gateway.tests.processes import SystemdWorker
from gateway.tests.site import Site

STREAMS = 50


async def test_a_rolling_restart_cuts_no_stream_and_refuses_nobody(site: Site, engine: FakeEngine) -> None:
    engine.events, engine.delay = 25, 0.05
    site.model("one", engine.port)
    site.config["timeouts"]["drain"] = 30
    config = site.write()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
    port = listener.getsockname()[1]
    workers = [SystemdWorker(number, config, listener) for number in (1, 2)]
    for worker in workers:
        await worker.start()
    over = asyncio.Event()
    done = {"streams": 0, "visits": 0, "kept": 0, "told": 0}

    async def stream() -> None:
        while not over.is_set():
            reply = await ask(port, chat(stream=True))
            assert reply.body == stream_bytes(25, "one")
            done["streams"] += 1

    async def visit() -> None:
        """A new connection for every request."""
        while not over.is_set():
            assert (await ask(port, chat())).status == 200
            done["visits"] += 1
            await asyncio.sleep(0.005)

    async def stay() -> None:
        """A kept connection, given up only when the gateway says so."""
        wire = await connect(port)
        while not over.is_set():
            wire.send(chat())
            reply = await wire.reply()
            assert reply.status == 200
            done["kept"] += 1
            if reply.headers.get("connection") == "close":
                done["told"] += 1
                await wire.close()
                wire = await connect(port)
            await asyncio.sleep(0.02)
        await wire.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(stream())
        for _ in range(3):
            group.create_task(visit())
        for _ in range(4):
            group.create_task(stay())
        await asyncio.sleep(0.5)
        for worker in workers:
            assert await worker.stop() == 0
            await worker.start()
        over.set()
    for worker in workers:
        assert await worker.stop() == 0
    listener.close()
    assert done["streams"] >= 2 * STREAMS
    assert done["visits"] > 50
    assert done["told"] >= 4  # both workers have said it to those who stayed
    lines = site.log()
    assert {(line["status"], line["outcome"]) for line in lines} == {(200, "ok")}
    assert len(lines) == done["streams"] + done["visits"] + done["kept"]


async def test_a_killed_worker_leaves_the_socket_to_its_brother(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    config = site.write()
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    port = listener.getsockname()[1]
    one, two = SystemdWorker(1, config, listener), SystemdWorker(2, config, listener)
    await one.start()
    await two.start()
    assert "WATCHDOG=1" in await one.word("WATCHDOG=1")
    assert one.process is not None
    one.process.kill()
    await asyncio.to_thread(one.process.wait)
    with contextlib.closing(listener):
        for _ in range(20):
            assert (await ask(port, chat())).status == 200
        assert await two.stop() == 0
    assert one.manager is not None
    one.manager.close()
