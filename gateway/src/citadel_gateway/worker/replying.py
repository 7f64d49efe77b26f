"""The half of a client's connection that writes: answers of the gateway's own, and the rules of closing."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from citadel_gateway.core.ticket import Ticket
from citadel_gateway.errors import Refusal
from citadel_gateway.worker.headers import status_line
from citadel_gateway.worker.request import Request

if TYPE_CHECKING:
    from citadel_gateway.worker.gate import Gate

FOREVER: Final = float("inf")
LINGER: Final = 2.0  # seconds that a connection stays half open after an early answer, so that the client can read it


class Replying(HttpToolsProtocol):
    """What the reading half (`Front`) and the exchanges write through."""

    def __init__(
        self,
        gate: "Gate",
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.gate = gate
        self.request: Request | None = None  # the one that is being read
        self.current: Request | None = None  # the one that is being answered
        self.ready: deque[Request] = deque()  # those that wait for their turn
        self.lingering = False  # nothing more will be read
        self.deadline = FOREVER
        self.chunks = True  # the client knows chunked bodies

    def write(self, data: bytes) -> None:
        self.gate.outbox.put(self.transport, data, self.gate.core.open)

    def abort(self) -> None:
        self.gate.outbox.flush()
        self.transport.abort()

    def close(self) -> None:
        """Close when everything has been sent."""
        self.gate.outbox.flush()
        self.transport.close()

    def common_headers(self, ticket: Ticket) -> bytes:
        """The lines that every answer has, up to the blank one."""
        gate = self.gate
        request = self.current
        lines = gate.date_line
        if ticket.request_id:  # a health answer has none
            lines += b"x-request-id: %b\r\n" % ticket.request_id
        if ticket.lines:
            lines += ticket.lines
        if request is not None and request.origin:
            lines += gate.cors_lines(request.origin)
        if gate.stopping or request is None or not request.keep_alive:
            lines += b"connection: close\r\n"
        elif request.http10:
            lines += b"connection: keep-alive\r\n"
        return lines

    def answer(
        self, ticket: Ticket, status: int, lines: bytes, body: bytes, outcome: str = "ok", code: str = ""
    ) -> None:
        """An answer of the gateway's own, complete."""
        self.answer_uncounted(ticket, status, lines, body)
        self.gate.core.settle(ticket, self.gate.clock(), status, outcome, code)

    def answer_uncounted(self, ticket: Ticket, status: int, lines: bytes, body: bytes) -> None:
        request = self.current
        ticket.bytes_out = len(body)
        if status != 204:
            lines += b"content-length: %d\r\n" % len(body)
        if request is not None and request.method == b"HEAD":
            body = b""
        self.write(b"".join((status_line(status), lines, self.common_headers(ticket), b"\r\n", body)))

    def refuse(self, ticket: Ticket, refusal: Refusal, *, close: bool = False) -> None:
        """An error of the gateway's own; `close` when the rest of the request will not be read."""
        request = self.current
        if request is not None and (close or refusal.close):
            request.keep_alive = False
        lines = b"content-type: application/json\r\n" + refusal.headers()
        code = "timeout" if refusal.status in (408, 504) else ""
        self.answer(ticket, refusal.status, lines, refusal.body(), refusal.outcome, code)
        if close:
            self.linger()

    def answered(self) -> None:
        """The current request has its whole answer."""
        if self.lingering:
            return
        request, self.current = self.current, None
        if request is not None:
            request.parts = []  # a request that is kept for its head keeps no body
        if self.gate.stopping:  # the next request may be on its way already
            self.linger()
        elif request is None or not request.keep_alive:
            self.lingering = True
            self.deadline = self.gate.clock() + LINGER
            self.close()
        else:
            self.deadline = self.gate.clock() + self.gate.timeouts.keepalive

    def linger(self) -> None:
        """Close, but let the client read what was sent: closing on unread bytes would reset the connection under the
        answer.
        """
        self.lingering = True
        self.ready.clear()
        self.request = None
        self.deadline = self.gate.clock() + LINGER
        self.gate.outbox.flush()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()
