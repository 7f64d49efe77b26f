"""A worker's beginning and its end."""

import asyncio
import time

import pytest
from citadel_gateway.metrics import read_report
from citadel_gateway.worker import process

from gateway.tests.client import ask, chat, connect, get, until
from gateway.tests.fake_engine import FakeEngine, stream_bytes
from gateway.tests.site import Running, Site


async def test_a_stopping_worker_finishes_what_it_has(gateway: Running, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.03, 30
    streaming, kept = await connect(gateway.port), await connect(gateway.port)
    kept.send(chat())
    assert "connection" not in (await kept.reply()).headers
    streaming.send(chat(stream=True))
    await streaming.head()
    stopping = asyncio.create_task(gateway.stop())
    await until(lambda: gateway.gate.stopping)
    kept.send(chat())  # a last request on a kept connection is answered, and told that it was the last
    reply = await kept.reply()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert await kept.at_end()
    body = b""
    while part := await streaming.chunk():
        body += part
    assert body == stream_bytes(30, "one")
    assert await streaming.at_end()
    await kept.close()
    await streaming.close()
    await stopping
    with pytest.raises(ConnectionRefusedError):
        await connect(gateway.port)


@pytest.mark.alone
async def test_an_idle_connection_gets_a_short_grace(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(chat())
    await wire.reply()
    began = time.monotonic()
    await gateway.stop()
    assert await wire.at_end()
    assert time.monotonic() - began < 1.5
    await wire.close()


async def test_readiness_ends_with_the_stop(gateway: Running, engine: FakeEngine) -> None:
    engine.mode = "hang"
    busy, kept = await connect(gateway.port), await connect(gateway.port)
    busy.send(chat())
    await until(lambda: engine.seen)
    stopping = asyncio.create_task(gateway.stop())
    await until(lambda: gateway.gate.stopping)
    kept.send(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await kept.reply()).status == 503
    await busy.close()
    await kept.close()
    await stopping


async def test_what_takes_too_long_is_cut_with_an_error(
    site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.1)
    site.config["timeouts"]["drain"] = 0.4
    site.model("one", engine.port)
    gateway = await Running(site).start()
    streaming, waiting, idle = [await connect(gateway.port) for _ in range(3)]
    engine.mode = "stall"
    streaming.send(chat(stream=True))
    await streaming.head()
    engine.mode = "hang"
    waiting.send(chat())
    idle.send(b"GET ")
    await until(lambda: len(engine.seen) == 2)
    await gateway.stop()
    last = b""
    while part := await streaming.chunk():
        last = part
    assert b'"code":"gateway_restarting"' in last
    assert (await waiting.reply()).error() == "gateway_restarting"
    for wire in (streaming, waiting, idle):
        await wire.close()
    gateway.quiet()
    assert {line["outcome"] for line in site.log()} == {"cut"}


async def test_figures_survive_a_restart(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    for runs in (1, 2):
        gateway = await Running(site).start()
        assert (await ask(gateway.port, chat())).status == 200
        await gateway.stop()
        report = read_report(gateway.worker.report_path)
        assert report is not None
        (sample,) = report.counters["llm_gateway_requests_total"]
        assert (sample.labels, sample.value) == (("one", "chat", "200"), runs)
        assert report.gauges["llm_gateway_inflight_requests"][0].value == 0


async def test_figures_are_written_while_it_runs(gateway: Running) -> None:
    await ask(gateway.port, chat())
    await until(
        lambda: (found := read_report(gateway.worker.report_path)) and found.counters["llm_gateway_bytes_total"]
    )
    await until(lambda: gateway.site.log())


async def test_a_log_that_cannot_be_written_is_counted(site: Site, engine: FakeEngine) -> None:
    site.config["access_log"] = str(site.folder / "no" / "log")
    site.model("one", engine.port)
    gateway = await Running(site).start()
    assert (await ask(gateway.port, chat())).status == 200
    lost = gateway.worker.metrics.counters["llm_gateway_access_log_lost_total"]
    await until(lambda: lost.get(()) == 1)
    assert (await get(gateway.port, "/v1/models")).status == 200
    await gateway.stop()
    assert lost[()] == 2
