"""Requests on their way: relayed byte for byte, and what happens when an engine fails."""

import asyncio
import json
import time

import pytest

from gateway.tests.client import Wire, ask, chat, connect, until
from gateway.tests.fake_engine import FakeEngine, stream_bytes
from gateway.tests.site import Running, Site


async def test_a_reply_is_passed_on_whole(gateway: Running, engine: FakeEngine) -> None:
    reply = await ask(gateway.port, chat(temperature=0.5))
    assert reply.status == 200
    assert reply.json()["choices"][0]["message"]["content"] == "It is 42."
    assert reply.headers["content-type"] == "application/json"
    assert "server" not in reply.headers
    assert json.loads(engine.seen[0].body) == {
        "model": "one",
        "messages": [{"role": "user", "content": "Say a word"}],
        "temperature": 0.5,
    }


async def test_a_stream_is_passed_on_byte_for_byte(gateway: Running, engine: FakeEngine) -> None:
    engine.events = 50
    reply = await ask(gateway.port, chat(stream=True))
    assert reply.chunked
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.body == stream_bytes(50, "one")


async def test_events_that_come_in_pieces_are_joined(gateway: Running, engine: FakeEngine) -> None:
    engine.mode = "split"
    wire = await connect(gateway.port)
    wire.send(chat(stream=True))
    await wire.head()
    parts = []
    while part := await wire.chunk():
        assert part.startswith(b"data: ")
        assert part.endswith(b"\n\n")
        parts.append(part)
    assert b"".join(parts) == stream_bytes(5, "one")
    await wire.close()


@pytest.mark.alone
async def test_the_first_event_comes_at_once(gateway: Running, engine: FakeEngine) -> None:
    engine.delay = 0.3
    wire = await connect(gateway.port)
    began = time.monotonic()
    wire.send(chat(stream=True))
    await wire.head()
    await wire.chunk()
    assert time.monotonic() - began < 0.25
    await wire.close()


async def test_the_alias_becomes_the_name_the_engine_knows(gateway: Running, engine: FakeEngine) -> None:
    await ask(gateway.port, chat(model="uno", tools=[{"function": {"name": "f", "parameters": {"model": "uno"}}}]))
    sent = json.loads(engine.seen[0].body)
    assert sent["model"] == "one"
    assert sent["tools"][0]["function"]["parameters"] == {"model": "uno"}


async def test_what_the_engine_gets_of_the_headers(gateway: Running, engine: FakeEngine) -> None:
    headers = {
        "X-Request-ID": "abc-1",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "no",
        "Cookie": "no",
        "Keep-Alive": "300",
        "Accept-Encoding": "gzip",
        "Traceparent": "00-1-2-01",
        "X-Forwarded-For": "1.2.3.4",
    }
    reply = await ask(gateway.port, chat(headers=headers))
    seen = engine.seen[0].headers
    assert reply.headers["x-request-id"] == seen["x-request-id"] == "abc-1"
    assert seen["authorization"] == "Bearer engine-secret"
    assert seen["host"] == f"127.0.0.1:{engine.port}"
    assert seen["traceparent"] == "00-1-2-01"
    assert not {"x-hop", "cookie", "keep-alive", "connection", "accept-encoding", "x-forwarded-for"} & set(seen)


async def test_connections_to_the_engine_are_used_again(gateway: Running, engine: FakeEngine) -> None:
    wire = await connect(gateway.port)
    for _ in range(5):
        wire.send(chat())
        assert (await wire.reply()).status == 200
    await wire.close()
    assert len(engine.seen) == 5
    assert len({seen.raw_head for seen in engine.seen}) == 5  # a new request id each time
    assert len(gateway.gate.core.catalogue.models["one"].backends[0].pool.idle) == 1


async def test_an_engine_that_closes_after_each_reply(gateway: Running, engine: FakeEngine) -> None:
    engine.keep_alive = False
    for _ in range(3):
        assert (await ask(gateway.port, chat())).status == 200


@pytest.mark.parametrize("mode", ["close", "garbage", "die"])
async def test_an_engine_that_breaks_off_before_the_first_byte(gateway: Running, engine: FakeEngine, mode: str) -> None:
    engine.mode = mode
    wire = await connect(gateway.port)
    wire.send(chat())
    reply = await wire.reply()
    assert (reply.status, reply.error()) == (502, "upstream_failed")
    engine.mode = "ok"
    wire.send(chat())  # the client's connection goes on
    assert (await wire.reply()).status == 200
    await wire.close()


@pytest.mark.parametrize("mode", ["die", "die_event"])
async def test_a_stream_never_ends_silently(gateway: Running, engine: FakeEngine, mode: str) -> None:
    engine.mode = mode
    wire = await connect(gateway.port)
    wire.send(chat(stream=True))
    reply = await wire.reply()  # a proper end of the chunked body
    *events, last = reply.body.split(b"\n\n")[:-1]
    assert b"\n\n".join([*events, b""]) == stream_bytes(2, "one").removesuffix(b"data: [DONE]\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
    engine.mode = "ok"
    wire.send(chat())
    assert (await wire.reply()).status == 200
    await wire.close()
    await gateway.stop()
    line = gateway.site.log()[0]
    assert (line["status"], line["outcome"], line["stream"]) == (200, "upstream_error", True)
    assert gateway.worker.metrics.counters["llm_gateway_requests_total"]["one", "chat", "502"] == 1


async def test_a_dead_kept_connection_is_replaced(gateway: Running, engine: FakeEngine) -> None:
    assert (await ask(gateway.port, chat())).status == 200
    engine.mode = "close"  # the kept connection dies without a byte; the fresh one of the retry is answered

    async def recover() -> None:
        while len(engine.seen) < 2:  # noqa: ASYNC110  # at the next turn of the loop, not milliseconds later
            await asyncio.sleep(0)
        engine.mode = "ok"

    task = asyncio.create_task(recover())
    assert (await ask(gateway.port, chat())).status == 200
    await task
    assert len(engine.seen) == 3
    assert gateway.worker.metrics.counters["llm_gateway_retries_total"]["one", "stale_connection"] == 1


async def test_a_refused_engine_is_down_at_once_and_comes_back(gateway: Running, engine: FakeEngine) -> None:
    await engine.stop()
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.error()) == (503, "model_unavailable")
    assert int(reply.headers["retry-after"]) > 0
    assert gateway.gate.core.catalogue.models["one"].state() == "down"
    await engine.start()
    await until(lambda: gateway.gate.core.catalogue.models["one"].state() == "up")
    assert (await ask(gateway.port, chat())).status == 200


async def two(site: Site, engine: FakeEngine, second: FakeEngine) -> Running:
    site.model("one", engine.port, second.port)
    return await Running(site).start()


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_another_backend_answers_instead(site: Site, engine: FakeEngine, second: FakeEngine, how: str) -> None:
    gateway = await two(site, engine, second)
    if how == "stop":
        await engine.stop()
    else:
        engine.mode = "close"
    for _ in range(4):
        assert (await ask(gateway.port, chat(stream=True))).body == stream_bytes(5, "one")
    assert len(second.seen) >= 3
    await gateway.stop()
    gateway.quiet()


async def test_a_request_is_not_tried_for_ever(site: Site, engine: FakeEngine, second: FakeEngine) -> None:
    gateway = await two(site, engine, second)
    engine.mode = second.mode = "close"
    assert (await ask(gateway.port, chat())).status == 502
    assert len(engine.seen) + len(second.seen) == 2
    await gateway.stop()


@pytest.mark.alone
async def test_a_client_that_leaves_stops_the_engine(gateway: Running, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.02, 1000
    for stream in (True, False):
        engine.mode = "ok" if stream else "hang"
        wire = await connect(gateway.port)
        wire.send(chat(stream=stream))
        await until(lambda: len(engine.seen) > engine.cancelled)
        if stream:
            await wire.head()
        await wire.close()
        began = time.monotonic()
        await until(lambda: len(engine.seen) == engine.cancelled)
        assert time.monotonic() - began < 0.3
    await gateway.stop()
    assert [(line["status"], line["outcome"]) for line in gateway.site.log()] == [(499, "client_closed")] * 2


async def test_a_slow_reader_slows_the_engine_down(gateway: Running, engine: FakeEngine) -> None:
    engine.events = 200_000
    wire = await connect(gateway.port)
    wire.send(chat(stream=True))
    await until(lambda: (found := gateway.exchange()) and found.paused)
    exchange = gateway.exchange()
    assert exchange is not None
    sent = exchange.ticket.bytes_out
    await asyncio.sleep(0.3)
    assert exchange.ticket.bytes_out == sent < 8_000_000
    await wire.head()
    total = 0
    while total < sent + 1_000_000:
        total += len(await wire.chunk())
    await wire.close()


async def test_a_status_of_the_engine_is_passed_on(gateway: Running, engine: FakeEngine) -> None:
    engine.mode = "500"
    assert (await ask(gateway.port, chat())).status == 500
    engine.mode = "503"
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    engine.mode = "401"  # about the gateway's key: nothing the client could mend
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.error()) == (502, "upstream_refused")


@pytest.mark.parametrize("mode", ["big", "bigchunks"])
async def test_a_long_reply_is_not_held_back(gateway: Running, engine: FakeEngine, mode: str) -> None:
    engine.mode = mode
    reply = await ask(gateway.port, chat())
    assert reply.body == b"x" * 3_000_000
    assert reply.chunked == (mode == "bigchunks")


async def test_replies_that_are_framed_oddly(gateway: Running, engine: FakeEngine) -> None:
    engine.mode = "until_close"
    assert (await ask(gateway.port, chat())).body == b"until the end"
    engine.mode = "continue"
    assert (await ask(gateway.port, chat())).json()["choices"]
    engine.mode = "extra"
    reply = await ask(gateway.port, chat())
    assert reply.json()["choices"]
    assert not gateway.gate.core.catalogue.models["one"].backends[0].pool.idle


async def timed(site: Site, engine: FakeEngine, **limits: float) -> Running:
    site.config["timeouts"].update(limits)
    site.model("one", engine.port)
    return await Running(site).start()


async def test_an_engine_that_never_answers(site: Site, engine: FakeEngine) -> None:
    gateway = await timed(site, engine, first_byte=0.3)
    engine.mode = "hang"
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.error()) == (504, "timeout")
    await until(lambda: engine.cancelled)
    await gateway.stop()
    assert gateway.worker.metrics.counters["llm_gateway_requests_total"]["one", "chat", "timeout"] == 1


async def test_an_engine_that_stops_in_the_middle(site: Site, engine: FakeEngine) -> None:
    gateway = await timed(site, engine, between_bytes=0.3)
    engine.mode = "stall"
    reply = await ask(gateway.port, chat(stream=True))
    assert b'"code":"timeout"' in reply.body.split(b"\n\n")[-2]
    await gateway.stop()


async def test_a_request_that_takes_too_long_in_all(site: Site, engine: FakeEngine) -> None:
    gateway = await timed(site, engine, total=0.4)
    engine.delay, engine.events = 0.05, 1000
    reply = await ask(gateway.port, chat(stream=True))
    assert b'"code":"timeout"' in reply.body.split(b"\n\n")[-2]
    await gateway.stop()


async def test_a_client_that_does_not_read_is_cut(site: Site, engine: FakeEngine) -> None:
    gateway = await timed(site, engine, between_bytes=0.3)
    engine.events = 200_000
    wire = await connect(gateway.port)
    wire.send(chat(stream=True))
    await until(lambda: engine.cancelled)
    await wire.close()
    await gateway.stop()
    gateway.quiet()


async def test_a_backend_that_cannot_be_reached_in_time(site: Site, engine: FakeEngine) -> None:
    gateway = await timed(site, engine, connect=0.2)
    pool = gateway.gate.core.catalogue.models["one"].backends[0].pool

    async def never() -> None:
        await asyncio.sleep(60)

    pool.open = never
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.error()) == (503, "model_unavailable")
    assert gateway.worker.metrics.counters["llm_gateway_upstream_errors_total"]["one", "timeout"] == 1
    await gateway.stop()


async def test_a_client_that_leaves_while_we_connect(gateway: Running) -> None:
    pool = gateway.gate.core.catalogue.models["one"].backends[0].pool
    real, started = pool.open, asyncio.Event()

    async def slowly() -> object:
        started.set()
        await asyncio.sleep(0.1)
        return await real()

    pool.open = slowly
    wire = await connect(gateway.port)
    wire.send(chat())
    await started.wait()
    await wire.close()
    await asyncio.sleep(0.2)
    assert not pool.idle


async def test_http_1_0_gets_its_stream_until_the_end(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(chat(stream=True).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    reply = await wire.reply()
    assert "transfer-encoding" not in reply.headers
    assert reply.headers["connection"] == "close"
    assert reply.body == stream_bytes(5, "one")
    await wire.close()


async def test_requests_sent_ahead_are_answered_in_order(gateway: Running, engine: FakeEngine) -> None:
    wire: Wire = await connect(gateway.port)
    wire.send(b"".join(chat(headers={"X-Request-ID": f"n{number}"}, stream=number == 1) for number in range(4)))
    got = [(await wire.reply()).headers["x-request-id"] for _ in range(4)]
    assert got == ["n0", "n1", "n2", "n3"]
    assert len(engine.seen) == 4
    await wire.close()


@pytest.mark.parametrize("mode", ["die_early", "die_reply"])
async def test_another_backend_answers_while_nothing_was_sent(
    site: Site, engine: FakeEngine, second: FakeEngine, mode: str
) -> None:
    """The head of a stream is held until its first event, and a reply until it is whole."""
    gateway = await two(site, engine, second)
    engine.mode = "die" if mode == "die_reply" else mode
    for _ in range(3):
        reply = await ask(gateway.port, chat(stream=mode == "die_early"))
        assert reply.status == 200
        assert b"error" not in reply.body
    assert second.seen
    await gateway.stop()
    gateway.quiet()
    assert {line["outcome"] for line in site.log()} == {"ok"}
