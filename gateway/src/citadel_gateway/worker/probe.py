"""Asking one backend whether it is well, on a connection of its own.

As long as nothing speaks against it, `GET /health` is enough. A suspect is asked for one token, because vLLM's
`/health` says yes while its worker hangs; when none comes, vLLM's own counters say whether it is busy with others. The
gateway of another host is asked for the state of the model there.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from citadel_gateway.core.catalogue import Backend
from citadel_gateway.records import SYSTEM_USER

Verdict = Literal["up", "down", "silent"]

LONGEST = 30.0  # seconds that a suspect may think about one token, however slow it usually is
SLOWER = 3.0  # times what its first byte usually takes
MOST = 4 * 1024 * 1024  # bytes of a reply that are read
BUSY = (429, 503)
USAGE = re.compile(rb'"(prompt|completion)_tokens"\s*:\s*(\d+)')
PROGRESS = re.compile(rb"^vllm:(?:generation|prompt)_tokens_total(?:\{[^}\n]*\})? ([0-9.eE+]+)", re.MULTILINE)
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
STATE = re.compile(rb'"state"\s*:\s*"up"')
encode = msgspec.json.Encoder().encode


class Examined(Struct):
    """How a probe has ended. `generated` ones have used tokens, which belong into the ledger."""

    verdict: Verdict
    changed: bool = False  # whether the backend is now believed to be something else
    generated: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


class Asking(Struct):
    """Where to ask and with which key."""

    host: str
    port: int
    key: str
    lines: str = ""

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        name = f"[{self.host}]" if ":" in self.host else self.host
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {name}:{self.port}\r\nauthorization: Bearer {self.key}\r\n"
            f"user-agent: citadel-gateway\r\nconnection: close\r\n{self.lines}{kind}\r\n"
        ).encode() + body

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body. Raises OSError or ValueError for what is no reply."""
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(request)
            line = await reader.readline()
            status = int(line.split(b" ", 2)[1]) if line.startswith(b"HTTP/1.") else 0
            if not status:
                raise ValueError("no HTTP")
            return status, await body_of(reader)
        except (IndexError, EOFError, asyncio.LimitOverrunError):
            raise ValueError("no HTTP") from None
        finally:
            if writer is not None:
                writer.close()


async def body_of(reader: asyncio.StreamReader) -> bytes:
    """What follows the headers, up to a bound; chunks as they are, they are only searched."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    if length is not None:
        return await reader.readexactly(min(int(length[1]), MOST))
    body = bytearray()
    while len(body) < MOST and not body.endswith(b"\r\n0\r\n\r\n") and (part := await reader.read(65536)):
        body += part
    return bytes(body)


async def probe(
    host: str, port: int, key: str, patience: float, path: str = "/health", lines: str = "", *, state: bool = False
) -> Verdict:
    """`up` for a 200, `down` for a refusal or another status, `silent` when no answer came in time. `state`: the answer
    has to say so in words.
    """
    asking = Asking(host, port, key, lines)
    try:
        async with asyncio.timeout(patience):
            status, body = await asking.ask(asking.request("GET", path))
    except TimeoutError:
        return "silent"
    except (OSError, ValueError):
        return "down"
    return "up" if status == 200 and (not state or STATE.search(body)) else "down"


async def examine(
    backend: Backend, engine_key: str, peer_key: str, patience: float, clock: Callable[[], float]
) -> Examined:
    """Ask in the way that this backend deserves now, and tell its health. After `health.begin` has said yes."""
    health = backend.health
    began = clock()
    peer = backend.gateway
    asking = Asking(backend.host, backend.port, peer_key if peer else engine_key, "x-citadel-peer: 1\r\n" * peer)
    if health.must_generate():
        found = await generate(asking, backend, min(max(patience, SLOWER * backend.first.value), LONGEST))
    else:
        # longer each time: a machine that has too much to do answers late, and is not to lose its engine for that
        found = Examined(await of_itself(asking, backend, patience * (1 + health.silent)))
    if found.verdict == "silent" and backend.last > began:
        found.verdict = "up"  # it sends to others
    now = clock()
    found.seconds = now - began
    if found.verdict == "up":
        if found.generated:
            backend.last = now
        found.changed = health.healthy(now)
    else:
        found.changed = health.failed(now) if found.verdict == "down" else health.unanswered(now)
    return found


async def of_itself(asking: Asking, backend: Backend, patience: float) -> Verdict:
    """What the backend says of itself, without doing anything."""
    path = f"/v1/models/{backend.model}" if backend.gateway else backend.path
    return await probe(asking.host, asking.port, asking.key, patience, path, asking.lines, state=backend.gateway)


def question(backend: Backend) -> tuple[str, bytes]:
    """The least that a backend can be asked to do."""
    more = {"model": backend.model, "user": SYSTEM_USER}
    if "completions" in backend.capabilities:
        return "/v1/completions", encode({**more, "prompt": "1", "max_tokens": 1, "temperature": 0})
    if "embeddings" in backend.capabilities and "chat" not in backend.capabilities:
        return "/v1/embeddings", encode({**more, "input": "1"})
    messages = [{"role": "user", "content": "1"}]
    return "/v1/chat/completions", encode({**more, "messages": messages, "max_tokens": 1, "temperature": 0})


async def generate(asking: Asking, backend: Backend, patience: float) -> Examined:
    """One token. A status that says no more than that it is busy is asked about again at `/health`; a request that it
    does not understand says at least that it answers.
    """
    path, body = question(backend)
    before = await progress(asking, min(patience, 1.0))
    try:
        async with asyncio.timeout(patience):
            status, reply = await asking.ask(asking.request("POST", path, body))
    except TimeoutError:
        after = await progress(asking, min(patience, 1.0)) if before >= 0 else -1.0
        return Examined("up" if after > before else "silent")
    except (OSError, ValueError):
        return Examined("down")
    if status == 200:
        used = {kind: int(number) for kind, number in USAGE.findall(reply)}
        return Examined("up", False, True, used.get(b"prompt", 0), used.get(b"completion", 0))
    if status in BUSY:
        return Examined(await of_itself(asking, backend, patience))
    return Examined("down" if status >= 500 else "up")


async def progress(asking: Asking, patience: float) -> float:
    """Tokens that vLLM has read and made in its life; -1 when it does not say."""
    try:
        async with asyncio.timeout(patience):
            status, page = await asking.ask(asking.request("GET", "/metrics"))
        return sum(map(float, PROGRESS.findall(page))) if status == 200 else -1.0
    except (OSError, ValueError):  # TimeoutError is an OSError
        return -1.0
