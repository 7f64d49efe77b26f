"""Asking an engine whether it is well."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from citadel_gateway.core.catalogue import Backend
from citadel_gateway.core.health import Health
from citadel_gateway.worker import probe as module
from citadel_gateway.worker.probe import Examined, examine, probe

from gateway.tests.fake_engine import KEY, FakeEngine
from gateway.tests.site import free_port


async def test_verdicts(engine: FakeEngine) -> None:
    assert await probe("127.0.0.1", engine.port, "k", 1.0) == "up"
    engine.health = 503
    assert await probe("127.0.0.1", engine.port, "k", 1.0) == "down"
    assert await probe("127.0.0.1", free_port(), "k", 1.0) == "down"


async def test_an_engine_that_accepts_and_says_nothing() -> None:
    async def client(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(client) as port:
        assert await probe("127.0.0.1", port, "k", 0.1) == "silent"


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server whose handlers have all ended when it ends; its port."""
    tasks = set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        if tasks:
            await asyncio.wait(tasks, timeout=10)


class FakePages:
    """Answers each path with what was set for it, or not at all; counts what its pages are asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, bytes]] = {}
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.tokens = 0.0
        self.pace = 0.0
        self.port = 0

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        length = [line.split(": ")[1] for line in head.split("\r\n") if line.startswith("content-length")]
        self.bodies.append(await reader.readexactly(int(length[0])) if length else b"")
        path = head.split(" ")[1]
        status, body = self.pages.get(path, (0, b""))
        if path == "/metrics" and status:
            self.tokens += self.pace
            body = (
                b'vllm:prompt_tokens_total{engine="0"} 7.0\n# vllm:generation_tokens_total 9\n'
                b"vllm:generation_tokens_total{} %f\nother_total 1\n" % self.tokens
            )
        if status:
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        else:
            await reader.read()  # until the other side has had enough


@pytest.fixture
async def pages() -> AsyncIterator[FakePages]:
    found = FakePages()
    async with serving(found.client) as found.port:
        yield found


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def backend_of(port: int, *, gateway: bool = False, doubted: bool = True) -> Backend:
    health = Health(5.0, 0.0)
    health.begin(1.0)
    backend = Backend("127.0.0.1", port, health, model="one", gateway=gateway)
    backend.capabilities = ("chat", "completions")
    if doubted:
        health.doubt(1.0)
    return backend


async def ask(backend: Backend, patience: float = 0.2) -> Examined:
    return await examine(backend, KEY, "peer-secret", patience, Clock())


async def test_a_suspect_has_to_generate(pages: FakePages) -> None:
    pages.pages["/v1/completions"] = (200, b'{"usage": {"prompt_tokens":3, "completion_tokens": 4}}')
    pages.pages["/metrics"] = (200, b"")
    backend = backend_of(pages.port)
    found = await ask(backend, 5.0)
    assert (found.verdict, found.generated, found.input_tokens, found.output_tokens) == ("up", True, 3, 4)
    assert not backend.health.must_generate()
    assert backend.last == 100.0
    wanted = {"model": "one", "user": "system", "prompt": "1", "max_tokens": 1, "temperature": 0}
    assert json.loads(pages.bodies[-1]) == wanted
    assert f"authorization: Bearer {KEY}\r\n" in pages.heads[-1]
    assert "x-citadel-peer" not in pages.heads[-1]


async def test_a_reply_in_chunks() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"usage":{"prompt_tokens":5,"completion_tokens":1}}'
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        await reader.read()  # keeps the connection open

    async with serving(client) as port:
        found = await ask(backend_of(port), 5.0)
    assert (found.verdict, found.input_tokens) == ("up", 5)


async def test_what_nobody_doubts_is_asked_for_its_health_only(engine: FakeEngine) -> None:
    found = await ask(backend_of(engine.port, doubted=False), 5.0)
    assert (found.verdict, found.generated, found.changed) == ("up", False, False)
    assert [seen for seen in engine.seen if seen.method == "POST"] == []


async def test_a_hanging_engine_is_ejected_until_it_generates(pages: FakePages) -> None:
    pages.pages["/health"] = (200, b"")
    pages.pages["/metrics"] = (200, b"")
    backend = backend_of(pages.port)
    health = backend.health
    assert (await ask(backend)).changed is False  # silent once
    health.begin(health.due)
    assert (await ask(backend)).changed is True
    assert (health.up, health.ejected) == (False, True)
    health.begin(health.due)
    assert (await ask(backend)).verdict == "silent"  # although /health says yes
    pages.pages["/v1/completions"] = (200, b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}')
    health.begin(health.due)
    found = await ask(backend, 5.0)
    assert (found.verdict, found.changed, health.up, health.ejected) == ("up", True, True, False)


async def test_a_busy_engine_is_known_by_its_counters(pages: FakePages) -> None:
    pages.pages["/metrics"] = (200, b"")
    pages.pace = 3.0
    backend = backend_of(pages.port)
    found = await ask(backend)
    assert (found.verdict, found.generated) == ("up", False)
    assert backend.last == 0.0  # its silence is not forgotten


@pytest.mark.parametrize("doubted", [True, False])
async def test_an_engine_that_sends_to_others_is_well(pages: FakePages, doubted: bool) -> None:
    backend = backend_of(pages.port, doubted=doubted)
    backend.last = 100.5
    assert (await ask(backend)).verdict == "up"


async def test_who_did_not_answer_has_longer_the_next_time(pages: FakePages, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    async def probe(host: str, port: int, key: str, patience: float, *_: str, **__: bool) -> str:
        given.append(patience)
        return "silent"

    monkeypatch.setattr(module, "probe", probe)
    backend = backend_of(pages.port, doubted=False)
    health = backend.health
    await ask(backend, 2.0)
    for _ in range(2):
        health.begin(health.due)
        await ask(backend, 2.0)
    assert (given, health.up) == ([2.0, 4.0, 6.0], False)


async def test_a_slow_engine_has_longer_to_answer(pages: FakePages, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    async def generate(asking: object, backend: Backend, patience: float) -> Examined:
        given.append(patience)
        return Examined("silent")

    monkeypatch.setattr(module, "generate", generate)
    for usual in (0.0, 4.0, 400.0):
        backend = backend_of(pages.port)
        if usual:
            backend.first.observe(usual, 1.0)
        await ask(backend, 3.0)
    assert given == [3.0, 12.0, 30.0]


@pytest.mark.parametrize(
    ("status", "health", "verdict"),
    [(500, 200, "down"), (503, 200, "up"), (503, 503, "down"), (429, 200, "up"), (404, 200, "up")],
)
async def test_what_an_answer_without_a_token_says(pages: FakePages, status: int, health: int, verdict: str) -> None:
    pages.pages |= {"/v1/completions": (status, b"{}"), "/health": (health, b""), "/metrics": (404, b"")}
    assert (await ask(backend_of(pages.port), 5.0)).verdict == verdict


async def test_nobody_there_and_no_http() -> None:
    backend = backend_of(free_port())
    assert (await ask(backend, 5.0)).verdict == "down"
    assert not backend.health.up

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1\r\n")

    async with serving(garbage) as port:
        assert (await ask(backend_of(port), 5.0)).verdict == "down"


@pytest.mark.parametrize(("state", "verdict"), [("up", "up"), ("draining", "down"), ("down", "down")])
async def test_another_hosts_gateway_is_asked_for_the_model(pages: FakePages, state: str, verdict: str) -> None:
    pages.pages["/v1/models/one"] = (200, json.dumps({"id": "one", "state": state}).encode())
    assert (await ask(backend_of(pages.port, gateway=True, doubted=False), 5.0)).verdict == verdict
    assert "authorization: Bearer peer-secret" in pages.heads[0]
    assert "x-citadel-peer: 1" in pages.heads[0]


async def test_each_model_is_asked_what_it_can_do(pages: FakePages) -> None:
    reply = (200, b'{"usage":{"prompt_tokens":1,"total_tokens":1}}')
    pages.pages |= {"/v1/embeddings": reply, "/v1/chat/completions": reply, "/metrics": (404, b"")}
    for capabilities in (("embeddings",), ("chat", "tools")):
        backend = backend_of(pages.port)
        backend.capabilities = capabilities
        found = await ask(backend, 5.0)
        assert (found.verdict, found.input_tokens, found.output_tokens) == ("up", 1, 0)
