"""One request on its way: to a backend, and the reply back to the client, byte for byte.

Drives the ticket of the decision core with what happens on two connections. It owns the rules of failure: before the
first byte went to the client another backend may answer, after it a stream ends with an error event, and nothing ever
ends silently.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from citadel_gateway.core.core import FIRST_BYTE, SENT, Core, Ticket
from citadel_gateway.errors import Refusal, stream_error
from citadel_gateway.settings import Timeouts
from citadel_gateway.worker.headers import DROP_TO_CLIENT, passed_on, status_line
from citadel_gateway.worker.outbox import Outbox
from citadel_gateway.worker.sse import end_of_events
from citadel_gateway.worker.upstream import Connection, Pool

STALE = 1.0  # a kept-alive connection that dies sooner than this after the request cannot have executed it
WHOLE = 1024 * 1024  # replies up to this size are sent when they are complete, so that a broken one is an honest 502
END = b"0\r\n\r\n"


class Client(Protocol):
    """The client's side, as an exchange sees it."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def common_headers(self, ticket: Ticket) -> bytes: ...
    def refuse(self, ticket: Ticket, refusal: Refusal) -> None: ...
    def exchange_done(self, keep_alive: bool) -> None: ...

    chunks: bool  # false for a client of HTTP/1.0, which gets its body until the end of the connection


class Exchange:
    """Between `start` and its one end it is the owner of at most one upstream connection."""

    __slots__ = (
        "body", "clock", "connecting", "connection", "core", "head_sent", "last", "length", "limits", "lines",
        "outbox", "paused", "pool", "reused", "route", "sse", "stale_retried", "start_line", "tail", "ticket", "to",
    )  # fmt: skip

    def __init__(
        self,
        core: Core,
        clock: Callable[[], float],
        limits: Timeouts,
        outbox: Outbox,
        ticket: Ticket,
        to: Client,
        route: Callable[[Ticket], Pool],
        start_line: bytes,
        lines: bytes,
        body: bytes,
    ) -> None:
        self.core = core
        self.clock = clock
        self.limits = limits
        self.outbox = outbox
        self.ticket = ticket
        self.to = to
        self.route = route  # the pool of the next backend to try; raises Refusal when there is none
        self.start_line = start_line
        self.lines = lines  # all headers but those that the pool adds
        self.body = body
        self.connection: Connection | None = None
        self.connecting: asyncio.Task[Connection] | None = None
        self.pool: Pool | None = None
        self.reused = False
        self.stale_retried = False
        self.head_sent = False
        self.sse = False
        self.length = -1  # bytes of the body that are still to come to a reply sent with Content-Length
        self.tail = b""
        self.last = 0.0
        self.paused = 0.0

    # towards the backend --------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Send the request. Raises Refusal when no backend can take it."""
        self.pool = pool = self.route(self.ticket)
        connection = pool.take()
        if connection is not None:
            self.reused = True
            self.send(connection, pool)
        else:
            self.connect(pool)

    def connect(self, pool: Pool) -> None:
        self.reused = False
        self.last = self.clock()
        self.connecting = pool.connect(self.connected)

    def connected(self, task: "asyncio.Task[Connection]") -> None:
        if task is not self.connecting:  # the request is over, or it was too late
            if not task.cancelled() and task.exception() is None:
                task.result().abort()
            return
        self.connecting = None
        if task.cancelled() or task.exception() is not None:
            self.not_connected("connect")
            return
        connection = task.result()
        if connection.transport is None or self.pool is None:
            self.not_connected("connect")
        else:
            self.send(connection, self.pool)

    def send(self, connection: Connection, pool: Pool) -> None:
        self.connection = connection
        now = self.last = self.clock()
        self.core.sent(self.ticket, now)
        connection.owner = self
        assert connection.transport is not None
        request = b"".join((self.start_line, pool.preamble, self.lines, self.body))
        self.outbox.put(connection.transport, request, self.core.open)

    def not_connected(self, reason: str) -> None:
        """Nothing was sent: the backend is down, another one may do it."""
        self.core.failed(self.ticket, reason)
        backend = self.ticket.backend
        if backend is not None:
            backend.health.failed(self.clock())
        self.elsewhere(None)

    def elsewhere(self, instead: Refusal | None) -> None:
        """Try the next backend; without one, refuse: with `instead`, or as the routing says."""
        try:
            self.start()
            self.core.retried(self.ticket, "other_backend")
        except Refusal as refusal:
            self.refuse(instead or refusal)

    # from the backend -----------------------------------------------------------------------------------------------
    def reply_progress(self, connection: Connection) -> None:
        self.last = self.clock()
        if self.head_sent:
            self.forward(connection)
            return
        if not connection.head_done:
            return
        for name, value in connection.headers:
            if name == b"content-type":
                self.sse = connection.status == 200 and value.startswith(b"text/event-stream")
            elif name == b"content-length":
                self.length = int(value)
        if self.sse:
            self.length = -1
            self.forward(connection)
        elif connection.complete:
            self.whole(connection)
        elif self.length > WHOLE or sum(map(len, connection.parts)) > WHOLE:
            self.forward(connection)

    def head(self, connection: Connection, framing: bytes) -> bytes:
        self.head_sent = True
        status = connection.status
        passed = passed_on(connection.headers, DROP_TO_CLIENT)
        if status == 503 and b"retry-after: " not in passed:
            framing += b"retry-after: 1\r\n"
        return b"".join((status_line(status), passed, framing, self.to.common_headers(self.ticket), b"\r\n"))

    def whole(self, connection: Connection) -> None:
        """A complete reply in one write."""
        ticket = self.ticket
        status = connection.status
        if status >= 400 and ticket.model is not None:
            if status in (401, 403):  # about the gateway's key, which the client cannot mend
                self.core.failed(ticket, "status")
                self.release(connection)
                message = "The engine refused the gateway's key"
                self.refuse(Refusal(502, "upstream_refused", message, outcome="upstream_error"))
                return
            if status >= 500:
                self.core.failed(ticket, "status")
        parts = connection.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        ticket.bytes_out = len(body)
        self.core.first_byte(ticket, self.last)
        framing = b"" if status in (204, 304) else b"content-length: %d\r\n" % len(body)
        self.to.write(self.head(connection, framing) + body)
        self.finish(connection, keep_alive=True)

    def forward(self, connection: Connection) -> None:
        """What one read brought of a stream or a long reply, framed anew, in one write; of a stream only whole events.

        The head goes out with the first of them: until then another backend could answer.
        """
        parts = connection.parts
        complete = connection.complete
        out = b""
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            if self.sse:
                data = self.whole_events(data)
            if data:
                out = self.framed(data)
        if complete:
            if self.tail:
                out += self.framed(self.tail)
                self.tail = b""
            out += self.end_of_body()
        if not self.head_sent and (out or complete):
            if self.length >= 0:
                framing = b"content-length: %d\r\n" % self.length
            else:
                framing = b"transfer-encoding: chunked\r\n" if self.to.chunks else b""
            out = self.head(connection, framing) + out
        if out:
            self.to.write(out)
        if complete:
            self.finish(connection, keep_alive=self.length >= 0 or self.to.chunks)

    def whole_events(self, data: bytes) -> bytes:
        """All up to the last complete event; the rest waits, so that an error event can always be told apart."""
        if self.tail:
            data = self.tail + data
            self.tail = b""
        end = end_of_events(data)
        if end == len(data):
            return data
        self.tail = data[end:]
        return data[:end]

    def framed(self, data: bytes) -> bytes:
        """A piece of the body as it goes to the client."""
        ticket = self.ticket
        if ticket.state == SENT:
            self.core.first_byte(ticket, self.last)
        ticket.bytes_out += len(data)
        return b"%x\r\n%b\r\n" % (len(data), data) if self.length < 0 and self.to.chunks else data

    def end_of_body(self) -> bytes:
        return END if self.length < 0 and self.to.chunks else b""

    def finish(self, connection: Connection, *, keep_alive: bool) -> None:
        """The reply is complete."""
        status = connection.status
        self.release(connection)
        self.end(status, "ok" if status < 400 else "error", keep_alive=keep_alive)

    def release(self, connection: Connection) -> None:
        self.connection = None
        if self.paused:
            connection.resume_reading()
        assert self.pool is not None
        self.pool.give_back(connection, self.last)

    def end(self, status: int, outcome: str, *, keep_alive: bool, code: str = "") -> None:
        if self.core.settle(self.ticket, self.clock(), status, outcome, code):
            self.to.exchange_done(keep_alive)

    # failures -------------------------------------------------------------------------------------------------------
    def reply_lost(self, connection: Connection, reason: str) -> None:
        now = self.clock()
        self.connection = None
        pool = self.pool
        unheard = not connection.received and not self.head_sent
        if unheard and self.reused and not self.stale_retried and now - self.ticket.sent < STALE and pool is not None:
            self.stale_retried = True
            self.core.retried(self.ticket, "stale_connection")
            self.connect(pool)
            return
        self.core.failed(self.ticket, reason)
        if self.ticket.backend is not None:
            self.ticket.backend.health.suspect(now)
        broken = Refusal(
            502, "upstream_failed", "The engine broke off before its answer was complete", outcome="upstream_error"
        )
        if not self.head_sent and reason == "reset" and self.ticket.model is not None and len(self.ticket.tried) < 2:
            self.sse, self.length, self.tail = False, -1, b""
            self.elsewhere(broken)
        else:
            self.broken(broken)

    def broken(self, refusal: Refusal, code: str = "") -> None:
        """The reply will not be complete: an error if nothing went out, an error event in a stream, else the
        connection is cut.
        """
        if not self.head_sent:
            self.refuse(refusal)
            return
        self.drop()
        if self.sse:
            self.tail = b""
            event = stream_error(refusal.status, refusal.code, refusal.message)
            self.to.write(self.framed(event) + self.end_of_body())
            self.end(200, refusal.outcome, keep_alive=self.to.chunks, code=code or str(refusal.status))
        else:
            self.to.abort()
            self.end(200, refusal.outcome, keep_alive=False, code=code or str(refusal.status))

    def refuse(self, refusal: Refusal) -> None:
        self.drop()
        self.to.refuse(self.ticket, refusal)
        self.to.exchange_done(not refusal.close)

    def drop(self) -> None:
        """Let go of the backend at once."""
        task, self.connecting = self.connecting, None
        if task is not None:
            task.cancel()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()

    def cancel(self) -> None:
        """The client went away: stop the generation now."""
        self.drop()
        if self.core.settle(self.ticket, self.clock(), 499, "client_closed", "client_closed"):
            self.to.exchange_done(False)

    def stop(self) -> None:
        """The worker has to go and this request is still not done."""
        self.broken(
            Refusal(
                503, "gateway_restarting", "The gateway is being restarted", retry_after=1, outcome="cut", close=True
            )
        )

    # pace and time --------------------------------------------------------------------------------------------------
    def client_writable(self, writable: bool) -> None:
        """Backpressure: a slow reader slows the engine's stream down, it does not fill our memory."""
        connection = self.connection
        if writable:
            self.paused = 0.0
            self.last = self.clock()
            if connection is not None:
                connection.resume_reading()
        else:
            self.paused = self.clock()
            if connection is not None:
                connection.pause_reading()

    def upstream_writable(self, writable: bool) -> None:
        """A body is held as a whole already; there is nothing to slow down."""

    def check(self, now: float) -> None:
        """Called several times a second: ends what takes too long."""
        limits = self.limits
        if self.paused:
            if now - self.paused > limits.between_bytes:  # nobody reads
                self.to.abort()
                self.cancel()
        elif self.connecting is not None:
            if now - self.last > limits.connect:
                task, self.connecting = self.connecting, None
                task.cancel()
                self.not_connected("timeout")
        elif self.ticket.state == SENT and now - self.last > limits.first_byte:
            self.too_late("The engine has not begun to answer in time")
        elif self.ticket.state == FIRST_BYTE and now - self.last > limits.between_bytes:
            self.too_late("The engine has stopped answering")
        elif now - self.ticket.started > limits.total:
            self.too_late("The request took longer than is allowed")

    def too_late(self, message: str) -> None:
        self.core.failed(self.ticket, "timeout")
        if self.ticket.backend is not None:
            self.ticket.backend.health.suspect(self.clock())
        self.broken(Refusal(504, "timeout", message, outcome="timeout"), "timeout")
