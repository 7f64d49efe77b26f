"""The gateway's own HTTP/1.1 client: kept-alive connections to one backend, driven by callbacks.

No task, no future and no coroutine for a request on a connection that is open already. A connection collects what one
read brought (head, pieces of the body, the end) and then tells its owner once. Replies are parsed by httptools,
strictly.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from citadel_gateway.worker.heads import KnownHead, known_head

IDLE_SECONDS: Final = (
    4.0  # vLLM's server closes an idle connection after 5 s: be earlier, so that few requests meet a dying one
)
MAX_IDLE: Final = 512
MAX_HEAD: Final = 64 * 1024
FRAMING: Final = (b"content-length", b"transfer-encoding")


class Owner(Protocol):
    """Who waits for a reply."""

    def reply_progress(self, connection: "Connection") -> None:
        """Something of the reply came: `head_done`, `parts` and `complete` say what."""

    def reply_lost(self, connection: "Connection", reason: str) -> None:
        """The connection ended before the reply was complete, or the reply could not be understood."""

    def upstream_writable(self, writable: bool) -> None:
        """The connection takes more bytes, or no more for now."""


class KnownReply:
    """A reply's head that may come again; `passed` is what of it goes to the client, made when first needed."""

    __slots__ = ("head", "headers", "passed", "status")

    def __init__(self, head: KnownHead, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.head = head
        self.status = status
        self.headers = headers  # without Content-Length
        self.passed = b""


class Connection(asyncio.Protocol):
    """One connection to a backend; it serves one request at a time."""

    __slots__ = (
        "complete", "head_done", "head_size", "headers", "keep_alive", "known", "owner", "parser", "parts", "pool",
        "received", "since", "status", "surplus", "transport", "until_close", "used",
    )  # fmt: skip

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.owner: Owner | None = None
        self.used = 0  # requests before this one
        self.since = 0.0  # when it became idle
        self.reset()

    def reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.head_done = False
        self.head_size = 0
        self.complete = False
        self.received = False
        self.keep_alive = True
        self.until_close = False
        self.surplus = False
        self.known: KnownReply | None = None

    # asyncio --------------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one without being of the class

    def data_received(self, data: bytes) -> None:
        owner = self.owner
        if owner is None:  # nobody asked: whatever it is, this connection is of no use any more
            self.abort()
            return
        first = not self.received
        self.received = True
        if first and self.same_head(data):
            owner.reply_progress(self)
            return
        if not self.head_done:
            self.head_size += len(data)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.lose("bad_reply")
            return
        if not self.head_done and self.head_size > MAX_HEAD:
            self.lose("bad_reply")
            return
        if first and self.complete and len(self.parts) == 1 and self.keep_alive:
            self.remember(data)
        owner.reply_progress(self)

    def same_head(self, data: bytes) -> bool:
        """Whether this is a whole reply with the head of an earlier one; then it is complete, without the parser."""
        known = self.pool.known
        body = known.head.body_of(data) if known is not None else None
        if known is None or body is None:
            return False
        self.known = known
        self.status = known.status
        self.headers = known.headers
        self.parts.append(body)
        self.head_done = self.complete = True
        return True

    def remember(self, data: bytes) -> None:
        head = known_head(data, len(self.parts[0]))
        if head is not None:
            lines = [(name, value) for name, value in self.headers if name != b"content-length"]
            self.pool.known = self.known = KnownReply(head, self.status, lines)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        owner = self.owner
        if owner is not None:
            if self.until_close and exc is None and not self.complete:
                self.complete = True
                owner.reply_progress(self)
            else:
                self.owner = None
                owner.reply_lost(self, "reset")

    def pause_writing(self) -> None:
        if self.owner is not None:
            self.owner.upstream_writable(False)

    def resume_writing(self) -> None:
        if self.owner is not None:
            self.owner.upstream_writable(True)

    # httptools ------------------------------------------------------------------------------------------------------
    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_done:  # else a trailer, which we do not pass on
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.complete:  # a second reply to one request: never pass it on, never use this connection again
            self.keep_alive = False
            self.surplus = True
            return
        self.status = self.parser.get_status_code()
        if self.status < 200:
            return
        self.keep_alive = self.parser.should_keep_alive()
        self.until_close = not self.keep_alive and not self.has_length()
        self.head_done = True

    def on_body(self, body: bytes) -> None:
        if not self.surplus:
            self.parts.append(body)

    def on_message_complete(self) -> None:
        if self.status < 200:  # 100 Continue and its like: the real reply follows
            self.headers.clear()
            return
        self.complete = True

    # its owner ------------------------------------------------------------------------------------------------------
    def has_length(self) -> bool:
        """False for a reply that ends with the connection; then the end of the connection is no failure."""
        return self.status in (204, 304) or any(name in FRAMING for name, _ in self.headers)

    def abort(self) -> None:
        """Close at once: the backend must notice now that nobody wants its answer any more."""
        self.owner = None
        if self.transport is not None:
            self.transport.abort()

    def lose(self, reason: str) -> None:
        owner = self.owner
        self.abort()
        if owner is not None:
            owner.reply_lost(self, reason)

    def pause_reading(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()


class Pool:
    """The connections to one address: idle ones, bounded, the latest used first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, host: str, port: int, preamble: bytes, path: str = "") -> None:
        self.loop = loop
        self.host = host
        self.port = port
        self.preamble = preamble  # the header lines of every request: Host, and the key if there is one
        self.path = path  # of a Unix socket, instead of host and port
        self.idle: list[Connection] = []
        self.known: KnownReply | None = None
        self.closed = False

    def take(self) -> Connection | None:
        """An idle connection that is still open."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    def connect(self, done: Callable[["asyncio.Task[Connection]"], None]) -> "asyncio.Task[Connection]":
        """Open a new one; `done` gets the finished task."""
        task = self.loop.create_task(self.open())
        task.add_done_callback(done)
        return task

    async def open(self) -> Connection:
        if self.path:
            _, connection = await self.loop.create_unix_connection(lambda: Connection(self), self.path)
        else:
            _, connection = await self.loop.create_connection(lambda: Connection(self), self.host, self.port)
        return connection

    def give_back(self, connection: Connection, now: float) -> None:
        """After a complete reply."""
        connection.owner = None
        if not connection.keep_alive or self.closed or len(self.idle) >= MAX_IDLE:
            if connection.transport is not None:
                connection.transport.close()
            return
        connection.reset()
        connection.used += 1
        connection.since = now
        self.idle.append(connection)

    def prune(self, now: float) -> None:
        """Close what has been idle for too long. The oldest are at the front."""
        idle = self.idle
        while idle and now - idle[0].since > IDLE_SECONDS:
            connection = idle.pop(0)
            if connection.transport is not None:
                connection.transport.close()

    def close(self) -> None:
        self.closed = True
        for connection in self.idle:
            if connection.transport is not None:
                connection.transport.close()
        self.idle.clear()
