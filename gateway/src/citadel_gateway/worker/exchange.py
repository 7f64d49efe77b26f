"""One request on its way: to a backend, and the reply back to the client, byte for byte.

Drives the ticket of the decision core with what happens on two connections, from the reservation of limits to the last
byte. It owns the rules of failure: before the first byte went to the client another backend may answer, after it a
stream ends with an error event, and nothing ever ends silently.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from citadel_gateway.core.core import Core
from citadel_gateway.core.health import BROKEN, NEUTRAL, SERVED, UNREACHABLE
from citadel_gateway.core.limits import Denied, Reservation
from citadel_gateway.core.ticket import FIRST_BYTE, SENT, Ticket
from citadel_gateway.errors import Refusal, stream_error
from citadel_gateway.settings import Timeouts
from citadel_gateway.worker.asking import Asking
from citadel_gateway.worker.headers import DROP_FROM_ENGINE, DROP_TO_CLIENT, passed_on, status_line
from citadel_gateway.worker.outbox import Outbox
from citadel_gateway.worker.sse import end_of_events
from citadel_gateway.worker.upstream import Connection, Pool

STALE: Final = 1.0  # a kept-alive connection that dies sooner than this after the request cannot have executed it
WHOLE: Final = (
    1024 * 1024
)  # replies up to this size are sent when they are complete, so that a broken one is an honest 502
END: Final = b"0\r\n\r\n"
MOST_TRIES: Final = 3  # of requests that a backend took and did not answer: one of them may be what kills it
BUSY: Final = frozenset((429, 503))


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
        "asking", "body", "clock", "connecting", "connection", "control", "core", "head_sent", "last", "length",
        "limits", "lines", "outbox", "paused", "pool", "reused", "sse", "stale_retried", "start_line", "tail", "ticket",
        "to",
    )  # fmt: skip

    def __init__(
        self,
        core: Core,
        clock: Callable[[], float],
        limits: Timeouts,
        outbox: Outbox,
        ticket: Ticket,
        to: Client,
        start_line: bytes,
        lines: bytes,
        *,
        asking: Asking | None = None,
        control: Pool | None = None,
        body: bytes = b"",
    ) -> None:
        self.core = core
        self.clock = clock
        self.limits = limits
        self.outbox = outbox
        self.ticket = ticket
        self.to = to
        self.start_line = start_line
        self.lines = lines  # all headers but those that the pool adds, and the length
        self.asking = asking  # of a model; else the request is the control process'
        self.control = control
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

    # what must be had before it is sent -----------------------------------------------------------------------------
    def begin(self) -> None:
        """As far as it goes without waiting; all the way, as a rule. Raises Refusal when there is no way."""
        now = self.ticket.started
        if self.asking is None:
            self.start(now)
            return
        found = self.core.reserve(self.ticket, now, self.reserved)
        if found is not None:
            self.core.reserved(self.ticket, found, now)
            self.enter(now)

    def reserved(self, found: Reservation | Denied) -> None:
        """The limiter calls back."""
        now = self.clock()
        try:
            self.core.reserved(self.ticket, found, now)
            self.enter(now)
        except Refusal as refusal:
            self.refuse(refusal)

    def enter(self, now: float) -> None:
        if self.core.enter(self.ticket, self, now):
            self.start(now)

    def go(self) -> None:
        """The gatekeeper calls back: there is a slot."""
        now = self.clock()
        self.core.admitted(self.ticket, now)
        try:
            self.start(now)
        except Refusal as refusal:
            self.refuse(refusal)

    def refused(self, refusal: Refusal) -> None:
        """The gatekeeper calls back: there will be none."""
        self.core.shed(self.ticket, refusal)
        self.refuse(refusal)

    # towards the backend --------------------------------------------------------------------------------------------
    def start(self, now: float) -> None:
        """Send the request. Raises Refusal when no backend can take it."""
        pool = self.next_pool(now)
        if pool is None:
            return  # waits for a slot of another model
        self.pool = pool
        connection = pool.take()
        if connection is not None:
            self.reused = True
            self.send(connection, pool, now)
        else:
            self.connect(pool)

    def next_pool(self, now: float) -> Pool | None:
        """Of the next backend to try, of whichever model. Raises Refusal when there is none."""
        core, ticket = self.core, self.ticket
        if self.asking is None:
            if ticket.tries or self.control is None:
                message = "This part of the gateway is not available at the moment"
                raise Refusal(503, "control_unavailable", message, retry_after=2, outcome="unavailable")
            ticket.tries = 1
            return self.control
        while True:
            backend = core.route(ticket, now)
            if backend is not None:
                assert ticket.model is not None
                self.body = self.asking.body_for(ticket.model)
                pool: Pool = backend.pool
                return pool
            if not core.fall_back(ticket, now):
                raise core.unavailable(ticket)
            if not core.enter(ticket, self, now):
                return None

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
            self.send(connection, self.pool, self.clock())

    def send(self, connection: Connection, pool: Pool, now: float) -> None:
        self.connection = connection
        self.last = now
        self.core.sent(self.ticket, now)
        connection.owner = self
        assert connection.transport is not None
        if self.asking is not None:
            self.ticket.meter = self.asking.meter()
        length = b"content-length: %d\r\n\r\n" % len(self.body)
        request = b"".join((self.start_line, pool.preamble, self.lines, length, self.body))
        self.outbox.put(connection.transport, request, self.core.open)

    def not_connected(self, reason: str) -> None:
        """Nothing was sent: the backend is down, another one may do it."""
        self.core.failed(self.ticket, reason)
        self.core.leave(self.ticket, self.clock(), UNREACHABLE)
        self.elsewhere(None)

    def elsewhere(self, instead: Refusal | None) -> None:
        """Try the next backend; without one, refuse: with `instead`, or as the routing says. To ask again what may be
        worked on already is more load for those that are left, and has a budget.
        """
        ticket = self.ticket
        self.sse, self.length, self.tail = False, -1, b""
        now = self.clock()
        try:
            if instead is not None and not self.core.router.may_retry(now):
                raise instead
            self.start(now)
            self.core.retried(ticket, "other_backend")
        except Refusal as refusal:
            self.refuse(instead or refusal)

    # from the backend -----------------------------------------------------------------------------------------------
    def reply_progress(self, connection: Connection) -> None:
        self.last = self.clock()
        backend = self.ticket.backend
        if backend is not None and connection.status < 400 and (connection.parts or connection.complete):
            backend.last = self.last  # a head alone says nothing: it is sent while the engine hangs, too
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
        passed = self.passed(connection)
        if status == 503 and b"retry-after: " not in passed:
            framing += b"retry-after: 1\r\n"
        if self.asking is not None:
            framing += self.core.decision_lines(self.ticket)
        return b"".join((status_line(status), passed, framing, self.to.common_headers(self.ticket), b"\r\n"))

    def passed(self, connection: Connection) -> bytes:
        """The header lines of the reply that go to the client."""
        known = connection.known
        drop = DROP_TO_CLIENT if self.asking is None else DROP_FROM_ENGINE
        if known is None:
            return passed_on(connection.headers, drop)
        if not known.passed:
            known.passed = passed_on(known.headers, drop)
        return known.passed

    def whole(self, connection: Connection) -> None:
        """A complete reply in one write."""
        ticket = self.ticket
        status = connection.status
        parts = connection.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if ticket.model is not None:
            if status >= 400:
                if self.not_passed_on(connection):
                    return
            elif ticket.meter is not None:
                ticket.meter.reply(body)
        ticket.bytes_out = len(body)
        self.core.first_byte(ticket, self.last, served=status < 400)
        framing = b"" if status in (204, 304) else b"content-length: %d\r\n" % len(body)
        self.to.write(self.head(connection, framing) + body)
        self.finish(connection, keep_alive=True)

    def not_passed_on(self, connection: Connection) -> bool:
        """Whether an engine's error is no answer for the client: it is not his to mend, or another engine may do it."""
        ticket, status = self.ticket, connection.status
        if status in (401, 403):  # about the gateway's key
            self.core.failed(ticket, "status")
            self.release(connection)
            self.core.leave(ticket, self.last, BROKEN)
            message = "The engine refused the gateway's key"
            self.refuse(Refusal(502, "upstream_refused", message, outcome="upstream_error"))
            return True
        if status < 500:
            return False
        self.core.failed(ticket, "status")
        if ticket.tries < MOST_TRIES and self.core.alternative(ticket, self.last):
            self.release(connection)
            self.core.leave(ticket, self.last, verdict_of(status))
            message = "The engine could not answer"
            self.elsewhere(Refusal(503, "upstream_failed", message, retry_after=1, outcome="upstream_error"))
            return True
        return False

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
            rest = self.rest()
            if rest:
                out += self.framed(rest)
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
        if end != len(data):
            self.tail = data[end:]
            data = data[:end]
        meter = self.ticket.meter
        return meter.stream(data) if meter is not None and data else data

    def rest(self) -> bytes:
        """What was held back of a stream that has ended."""
        meter = self.ticket.meter
        tail, self.tail = self.tail, b""
        return meter.rest() + tail if meter is not None else tail

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
        """The reply is complete; its last bytes have just come."""
        status = connection.status
        self.release(connection)
        verdict = verdict_of(status)
        if self.core.settle(self.ticket, self.last, status, "ok" if status < 400 else "error", verdict=verdict):
            self.to.exchange_done(keep_alive)

    def release(self, connection: Connection) -> None:
        self.connection = None
        if self.paused:
            connection.resume_reading()
        assert self.pool is not None
        self.pool.give_back(connection, self.last)

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
        broken = Refusal(
            502, "upstream_failed", "The engine broke off before its answer was complete", outcome="upstream_error"
        )
        if not self.head_sent and self.asking is not None and self.ticket.tries < MOST_TRIES:
            self.core.leave(self.ticket, now, BROKEN)
            self.elsewhere(broken)
        else:
            self.broken(broken, verdict=BROKEN)

    def broken(self, refusal: Refusal, code: str = "", verdict: int = NEUTRAL) -> None:
        """The reply will not be complete: an error if nothing went out, an error event in a stream, else the
        connection is cut.
        """
        if not self.head_sent:
            if verdict != NEUTRAL:
                self.core.leave(self.ticket, self.clock(), verdict)
            self.refuse(refusal)
            return
        self.drop()
        keep_alive = self.sse and self.to.chunks
        if self.sse:
            self.tail = b""
            event = self.rest() + stream_error(refusal.status, refusal.code, refusal.message)
            self.to.write(self.framed(event) + self.end_of_body())
        else:
            self.to.abort()
        code = code or str(refusal.status)
        if self.core.settle(self.ticket, self.clock(), 200, refusal.outcome, code, verdict):
            self.to.exchange_done(keep_alive)

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
        limits, ticket = self.limits, self.ticket
        if self.paused:
            if now - self.paused > limits.between_bytes:  # nobody reads
                self.to.abort()
                self.cancel()
        elif ticket.deadline and now > ticket.deadline:
            self.too_late("The request took longer than its client allows", NEUTRAL)
        elif self.connecting is not None:
            if now - self.last > limits.connect:
                task, self.connecting = self.connecting, None
                task.cancel()
                self.not_connected("timeout")
        elif ticket.state == SENT:
            self.check_silence(now)
        elif ticket.state == FIRST_BYTE and now - self.last > limits.between_bytes:
            self.too_late("The engine has stopped answering", BROKEN)
        elif now - ticket.started > limits.total:
            self.too_late("The request took longer than is allowed", NEUTRAL)

    def check_silence(self, now: float) -> None:
        """Before the first byte."""
        ticket, backend = self.ticket, self.ticket.backend
        if now - self.last > self.limits.first_byte:
            self.too_late("The engine has not begun to answer in time", BROKEN)
        elif (
            backend is not None
            and backend.health.ejected
            and ticket.tries < MOST_TRIES
            and self.core.alternative(ticket, now)
        ):  # it accepts requests and answers none
            self.drop()
            self.core.failed(ticket, "timeout")
            self.core.leave(ticket, now, BROKEN)
            self.elsewhere(None)

    def too_late(self, message: str, verdict: int) -> None:
        self.core.failed(self.ticket, "timeout")
        self.broken(Refusal(504, "timeout", message, outcome="timeout"), "timeout", verdict)


def verdict_of(status: int) -> int:
    """What a reply's status says about the engine."""
    if status < 400:
        return SERVED
    return BROKEN if (status >= 500 and status not in BUSY) or status in (401, 403) else NEUTRAL
