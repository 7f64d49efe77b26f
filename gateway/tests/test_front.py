"""The client's connection: bad input, slow clients, framing, the rules of closing."""

import asyncio

import pytest
from citadel_gateway.worker import front, replying

from gateway.tests.client import KEY, Reply, Wire, ask, chat, connect, head_of, post, until
from gateway.tests.fake_engine import FakeEngine
from gateway.tests.site import Running, Site

HOST = "Host: gateway\r\n"
AUTH = f"Authorization: Bearer {KEY}\r\n"


async def refused(gateway: Running, data: bytes) -> Reply:
    """The answer to bytes after which the connection must be closed."""
    wire = await connect(gateway.port)
    wire.send(data)
    reply = await wire.reply()
    assert reply.headers["connection"] == "close"
    assert await wire.at_end()
    await wire.close()
    return reply


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"NOSUCHMETHOD / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded: yes\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Name: 1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked, x\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_the_connection_closed(gateway: Running, data: bytes) -> None:
    reply = await refused(gateway, data)
    assert (reply.status, reply.error()) == (400, "bad_request")


async def test_bad_chunks_are_refused(gateway: Running, engine: FakeEngine) -> None:
    start = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: chunked\r\n\r\n".encode()
    for bad in (b"zz\r\nhello\r\n0\r\n\r\n", b"3\r\nhello\r\n0\r\n\r\n", b"-1\r\n\r\n"):
        assert (await refused(gateway, start + bad)).status == 400
    assert not engine.seen


async def test_a_good_request_before_garbage_is_answered(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(chat() + b"\x00\x00\x00")
    assert (await wire.reply()).status == 200
    assert (await wire.reply()).status == 400
    assert await wire.at_end()
    await wire.close()


async def test_a_request_needs_one_host(gateway: Running) -> None:
    assert (await refused(gateway, b"GET /v1/models HTTP/1.1\r\n\r\n")).error() == "bad_host"
    assert (await refused(gateway, b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")).error() == "bad_host"
    assert (await ask(gateway.port, b"GET /healthz HTTP/1.0\r\n\r\n")).status == 200


async def test_a_chunked_body_with_trailers(gateway: Running, engine: FakeEngine) -> None:
    body = b'{"model":"one","messages":[]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Type: application/json\r\n"
    data = b"%x\r\n%b\r\n0\r\nX-Trailer: smuggled\r\n\r\n" % (len(body), body)
    reply = await ask(gateway.port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + data)
    assert reply.status == 200
    assert engine.seen[0].body == body
    assert "x-trailer" not in engine.seen[0].headers
    assert engine.seen[0].headers["content-length"] == str(len(body))


async def test_many_headers(gateway: Running) -> None:
    many = {f"X-{number}": "v" for number in range(10_000)}
    reply = await refused(gateway, head_of("GET", "/v1/models", many))
    assert (reply.status, reply.error()) == (431, "headers_too_large")


async def test_one_endless_header(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(b"GET /v1/models HTTP/1.1\r\nX: ")
    for _ in range(40):
        wire.send(b"x" * 1024)
        await asyncio.sleep(0)
    assert (await wire.reply()).status == 431
    await wire.close()


async def test_a_large_head_in_two_pieces(gateway: Running) -> None:
    wire = await connect(gateway.port)
    data = head_of("GET", "/v1/models", {f"X-{number}": "v" * 1000 for number in range(33)})
    wire.send(data[:20_000])
    await asyncio.sleep(0.1)
    wire.send(data[20_000:])
    assert (await wire.reply()).status == 431
    await wire.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused_before_it_has_come(
    gateway: Running, engine: FakeEngine, chunked: bool
) -> None:
    wire = await connect(gateway.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Type: application/json\r\n"
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {60_000_000}"
    wire.send(f"{head}{framing}\r\n\r\n".encode())
    piece = b"x" * 65536
    sent = 0
    # the only way to see an answer without waiting for one
    unread = wire.reader._buffer  # type: ignore[attr-defined]  # a private name of asyncio
    while sent < 30_000_000 and not gateway.site.log() and unread == b"":
        wire.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await wire.writer.drain()
        await asyncio.sleep(0)
        sent += len(piece)
    reply = await wire.reply()
    assert (reply.status, reply.error()) == (413, "body_too_large")
    assert sent < 25_000_000
    assert not engine.seen
    await wire.close()


async def test_nobody_without_a_key_makes_us_hold_a_body(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}Content-Length: 5000000\r\n\r\n".encode())
    reply = await wire.reply()
    assert (reply.status, reply.error(), reply.headers["connection"]) == (401, "missing_api_key", "close")
    await wire.close()


async def test_a_small_refused_body_keeps_the_connection(gateway: Running) -> None:
    wire = await connect(gateway.port)
    data = post("/v1/chat/completions", b"x" * 1000, key="wrong")
    for piece in (data[:-500], data[-500:]):
        wire.send(piece)
        await asyncio.sleep(0.05)
    assert (await wire.reply()).status == 401
    wire.send(chat())
    assert (await wire.reply()).status == 200
    await wire.close()


async def test_100_continue(gateway: Running) -> None:
    wire = await connect(gateway.port)
    head, _, body = chat(headers={"Expect": "100-continue"}).partition(b"\r\n\r\n")
    wire.send(head + b"\r\n\r\n")
    assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.send(body)
    assert (await wire.reply()).status == 200
    await wire.close()
    assert (await refused(gateway, head.replace(b"sk-test", b"wrong") + b"\r\n\r\n")).status == 401
    assert (await ask(gateway.port, chat(headers={"Expect": "a miracle"}))).status == 417


async def slow(site: Site, engine: FakeEngine, **limits: float) -> Running:
    site.config["timeouts"].update(limits)
    site.model("one", engine.port)
    return await Running(site).start()


async def test_slow_headers_and_a_slow_body(site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "SLOWEST", 1_000_000)
    gateway = await slow(site, engine, headers=0.3)
    for start in (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: ", chat()[:-10]):
        wire = await connect(gateway.port)
        wire.send(start)
        for _ in range(4):  # a byte now and then does not help
            await asyncio.sleep(0.08)
            wire.send(b"a")
        reply = await wire.reply()
        assert (reply.status, reply.error()) == (408, "request_timeout")
        await wire.close()
    await gateway.stop()
    assert gateway.worker.metrics.counters["llm_gateway_requests_total"]["other", "other", "timeout"] == 1


async def test_idle_and_silent_connections_are_closed(site: Site, engine: FakeEngine) -> None:
    gateway = await slow(site, engine, headers=0.3, keepalive=0.3)
    silent, kept = await connect(gateway.port), await connect(gateway.port)
    kept.send(chat())
    assert (await kept.reply()).status == 200
    assert await silent.at_end(2)
    assert await kept.at_end(2)
    await silent.close()
    await kept.close()
    await gateway.stop()


async def test_hundreds_of_idle_connections(gateway: Running) -> None:
    wires: list[Wire] = []
    for _ in range(10):
        wires += await asyncio.gather(*(connect(gateway.port) for _ in range(50)))
    assert (await ask(gateway.port, chat())).status == 200
    for wire in wires:
        await wire.close()


async def test_too_many_connections(site: Site, engine: FakeEngine) -> None:
    site.config["limits"]["connections"] = 2
    site.model("one", engine.port)
    gateway = await Running(site).start()
    wires = [await connect(gateway.port) for _ in range(2)]
    wires[1].send(chat())
    assert (await wires[1].reply()).status == 200
    third = await connect(gateway.port)
    reply = await third.reply()
    assert (reply.status, reply.error()) == (503, "too_many_connections")
    assert await third.at_end()
    for wire in (*wires, third):
        await wire.close()
    await gateway.stop()


async def test_the_rules_of_closing(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(chat(headers={"Connection": "close"}))
    assert (await wire.reply()).headers["connection"] == "close"
    assert await wire.at_end()
    await wire.close()
    wire = await connect(gateway.port)
    wire.send(chat(headers={"Connection": "keep-alive"}).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert (await wire.reply()).headers["connection"] == "keep-alive"
    await wire.close()


async def test_a_client_that_never_takes_its_answer_is_let_go(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replying, "LINGER", 0.1)
    wire = await connect(gateway.port)
    wire.send(b"no http at all\r\n\r\n")
    await wire.reply()
    assert gateway.server is not None
    connections = gateway.server.server_state.connections
    await until(lambda: not connections)
    await wire.close()


async def test_an_upgrade_that_is_not_granted_is_answered_as_a_request(gateway: Running, engine: FakeEngine) -> None:
    wire = await connect(gateway.port)
    for _ in range(2):  # Java and curl offer h2c with every request
        wire.send(
            chat(headers={"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"})
        )
        assert (await wire.reply()).status == 200
    wire.send(head_of("GET", "/v1/chat/completions", {"Connection": "Upgrade", "Upgrade": "websocket"}) + chat())
    assert (await wire.reply()).status == 405
    assert (await wire.reply()).status == 200
    await wire.close()


async def test_methods_that_nobody_may_use(gateway: Running) -> None:
    for method, path in (("TRACE", "/v1/models"), ("TRACE", "/x"), ("CONNECT", "example.org:443"), ("HEAD", "/admin")):
        wire = await connect(gateway.port)
        wire.send(head_of(method, path))
        reply = await wire.reply(method)
        assert reply.status == 405
        assert reply.headers["allow"]
        await wire.close()
