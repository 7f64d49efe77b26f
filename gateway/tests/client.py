"""A small HTTP client for the tests: it shows what is on the wire, also what a real client would hide."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

KEY = "sk-test"
ADMIN = "sk-admin"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    chunked: bool

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> str:
        """The code of an error, after a check of its shape."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        assert self.headers["content-type"] == "application/json"
        return str(error["code"])


class Wire:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        line, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        headers = {}
        for one in lines:
            name, _, value = one.partition(": ")
            assert name == name.lower()
            assert name not in headers, f"{name} stands twice"
            headers[name] = value
        return int(line.split(" ")[1]), headers

    async def chunk(self) -> bytes:
        """One chunk of a chunked body; empty at the end."""
        size = int(await asyncio.wait_for(self.reader.readline(), 10), 16)
        data = await asyncio.wait_for(self.reader.readexactly(size + 2), 10)
        assert data[-2:] == b"\r\n"
        return data[:-2]

    async def reply(self, method: str = "POST") -> Reply:
        status, headers = await self.head()
        chunked = headers.get("transfer-encoding") == "chunked"
        if chunked:
            parts = []
            while part := await self.chunk():
                parts.append(part)
            body = b"".join(parts)
        elif method == "HEAD" or status in (204, 304):
            body = b""
        elif "content-length" in headers:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 10)
        else:
            body = await asyncio.wait_for(self.reader.read(), 10)
        return Reply(status, headers, body, chunked)

    async def at_end(self, seconds: float = 5.0) -> bool:
        """Whether the server has closed its side."""
        return await asyncio.wait_for(self.reader.read(1), seconds) == b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


async def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110  # the things we wait for have no event
            await asyncio.sleep(0.005)


async def connect(port: int) -> Wire:
    return Wire(*await asyncio.open_connection("127.0.0.1", port))


def head_of(method: str, path: str, headers: dict[str, str] | None = None) -> bytes:
    lines = {"Host": "gateway", **(headers or {})}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")


def chat(
    *,
    model: str = "one",
    stream: bool = False,
    key: str = KEY,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    **more: Any,
) -> bytes:
    """A whole chat request."""
    wanted = {"model": model, "messages": [{"role": "user", "content": "Say a word"}], **more}
    if stream:
        wanted["stream"] = True
    return post(path, json.dumps(wanted).encode(), key=key, headers=headers)


def post(path: str, body: bytes, *, key: str = KEY, headers: dict[str, str] | None = None) -> bytes:
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    if key:
        lines["Authorization"] = f"Bearer {key}"
    return head_of("POST", path, lines) + body


async def ask(port: int, request: bytes) -> Reply:
    """One request on a connection of its own."""
    wire = await connect(port)
    wire.send(request)
    try:
        return await wire.reply(request.split(b" ", 1)[0].decode())
    finally:
        await wire.close()


async def get(port: int, path: str, key: str = KEY, headers: dict[str, str] | None = None) -> Reply:
    lines = {"Authorization": f"Bearer {key}"} if key else {}
    return await ask(port, head_of("GET", path, {**lines, **(headers or {})}))
