"""The client's connection: uvicorn's protocol class, with our own way through it.

Requests are answered right here, without ASGI, tasks or coroutines: bytes come in, httptools (strict) finds the
requests, the gate decides, and an exchange writes the reply. Requests that a client sends ahead of an answer
(pipelining) wait in line. Time is watched by `tick`, which the worker calls ten times a second for every connection.
"""

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from citadel_gateway.errors import Refusal
from citadel_gateway.worker.heads import KnownHead, known_head
from citadel_gateway.worker.replying import LINGER, Replying
from citadel_gateway.worker.request import Request
from citadel_gateway.worker.tunnel import Tunnel

if TYPE_CHECKING:
    from citadel_gateway.worker.exchange import Exchange
    from citadel_gateway.worker.gate import Gate

SLOWEST: Final = 16 * 1024  # bytes a second that a body must come with, beyond the time that headers have
POLITE: Final = 256 * 1024  # a refused body up to this size is read to its end, and the connection kept
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Front(Replying):
    """One client connection; uvicorn makes the instances."""

    def __init__(
        self,
        gate: "Gate",
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(gate, config, server_state, app_state, _loop)
        self.parser = httptools.HttpRequestParser(self)  # without the leniency that uvicorn switches on
        self.exchange: Exchange | None = None
        self.tunnel: Tunnel | None = None
        self.garbage = False  # what follows cannot be understood
        self.peer = ""
        self.known: tuple[KnownHead, Request] | None = None  # the last request, if its head can be remembered

    # asyncio --------------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else ""
        gate = self.gate
        self.deadline = gate.clock() + gate.timeouts.headers
        if len(self.connections) > gate.limits.connections:
            self.refuse_connection(Refusal(503, "too_many_connections", "Too many connections", retry_after=1))

    def data_received(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.tunnel.from_client(data)
            return
        if self.lingering or self.garbage:
            return
        fresh = self.request is None and self.exchange is None and not self.ready
        if fresh:
            if self.known is not None and self.same_head(self.known, data):
                self.pump()
                return
            self.deadline = self.gate.clock() + self.gate.timeouts.headers
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.upgraded(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self.garbage = True
        request = self.request
        if request is not None and not request.head_done:
            self.count_head(request, len(data))
        elif len(data) > self.gate.limits.header_bytes:
            self.weigh_heads()
        if fresh and request is None and len(self.ready) == 1:
            self.remember(self.ready[0], data)
        if self.exchange is None:
            self.pump()
        elif self.ready:
            self.flow.pause_reading()

    def remember(self, request: Request, data: bytes) -> None:
        """After a request that came alone and in one piece: its head may come again."""
        known = known_head(data, request.size) if request.plain() and not self.garbage else None
        self.known = (known, request) if known is not None else None

    def same_head(self, known: tuple[KnownHead, Request], data: bytes) -> bool:
        """Whether this is the last request's head with another body; then it is ready, without the parser."""
        head, request = known
        body = head.body_of(data)
        if body is None or len(body) > self.gate.body_limit(request):
            return False
        request.again(body)
        self.ready.append(request)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.cancel()
        if self.tunnel is not None:
            self.tunnel.close()
        self.ready.clear()
        self.request = self.current = None
        self.lingering = True
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.client_writable(False)
        elif self.tunnel is not None:
            self.tunnel.client_writable(False)

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.client_writable(True)
        elif self.tunnel is not None:
            self.tunnel.client_writable(True)

    # httptools: only collect, decide in `pump` ----------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self.request = request = Request()
        self.headers = request.headers

    def on_url(self, url: bytes) -> None:
        if self.request is not None:
            self.request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self.request
        if request is None:
            return
        self.headers = []  # what still comes under this name are trailers, and nobody wants them
        parser = self.parser
        request.end_of_head(parser.get_method(), parser.get_http_version(), parser.should_keep_alive())
        if request.head_fed and request.head_size() > self.gate.limits.header_bytes:
            request.refusal = too_many_headers()

    def on_body(self, body: bytes) -> None:
        request = self.request
        if request is None:
            return
        request.size += len(body)
        if request.refusal is None:
            if request.size > self.gate.body_limit(request):
                request.refusal = self.gate.too_large(request)
                request.parts.clear()
            else:
                request.parts.append(body)

    def on_message_complete(self) -> None:
        request, self.request = self.request, None
        if request is not None:
            request.complete = True
            self.ready.append(request)

    # one request after the other ------------------------------------------------------------------------------------
    def count_head(self, request: Request, size: int) -> None:
        """Count the bytes of a head that has no end yet (an endless header never reaches `on_header`)."""
        request.head_fed += size
        if request.head_fed > self.gate.limits.header_bytes + 1024:
            request.refusal = too_many_headers()
            self.garbage = True

    def weigh_heads(self) -> None:
        """Only a read that is larger than the limit can have brought a whole head that is."""
        for request in (*self.ready, self.request):
            if request is not None and request.refusal is None and request.head_size() > self.gate.limits.header_bytes:
                request.refusal = too_many_headers()

    def pump(self) -> None:
        """Answer what can be answered now."""
        while self.exchange is None and not self.lingering:
            if self.ready:
                self.current = request = self.ready.popleft()
                self.chunks = not request.http10
                self.gate.handle(self, request)
                continue
            request_ahead = self.request
            if self.garbage:
                refusal = (request_ahead.refusal if request_ahead is not None else None) or not_understood()
                self.refuse_connection(refusal)
            elif request_ahead is not None and request_ahead.head_done:
                self.look_ahead(request_ahead)
            break
        if (self.exchange is None or not self.ready) and self.flow.read_paused:
            self.flow.resume_reading()

    def look_ahead(self, request: Request) -> None:
        """Refuse, if it must be, before the body has come: nobody without a key makes us hold one."""
        now = self.gate.clock()
        if not request.checked:
            request.checked = True
            self.deadline = now + self.gate.timeouts.headers
            if request.refusal is None:
                request.refusal = self.gate.look_ahead(request)
            if request.refusal is None and request.expect.lower() == b"100-continue":
                self.write(CONTINUE)
        if request.refusal is not None and (request.expect or not 0 <= request.declared() <= POLITE):
            self.current = request
            self.refuse(self.gate.receive(self, request), request.refusal, close=True)

    # ends -----------------------------------------------------------------------------------------------------------
    def exchange_done(self, keep_alive: bool) -> None:
        """Called by the exchange at its end, whatever it was."""
        self.exchange = None
        if self.current is not None and not keep_alive:
            self.current.keep_alive = False
        self.answered()
        if self.ready or self.request is not None or self.garbage:
            self.pump()
        elif self.flow.read_paused:
            self.flow.resume_reading()

    def refuse_connection(self, refusal: Refusal) -> None:
        """An answer to something that is no request (yet), and the end of the connection."""
        self.current = self.request or Request()
        self.request = None
        self.refuse(self.gate.receive(self, self.current), refusal, close=True)

    # upgrade --------------------------------------------------------------------------------------------------------
    def upgraded(self, rest: bytes) -> None:
        """The parser has met an Upgrade: a WebSocket becomes a tunnel, any other wish is passed over.

        The parser takes what follows an Upgrade for another protocol, also where it is the body of a request whose
        client only offers one (Java offers h2c with each); so the request is read again, without the offer.
        """
        request = self.ready.pop()
        if request.method == b"CONNECT":
            self.ready.append(request)
            request.keep_alive = False
            self.garbage = True
            self.pump()
            return
        if not request.wants_websocket() or self.gate.is_own(request.path):
            self.parser = httptools.HttpRequestParser(self)
            self.data_received(request.without_upgrade() + rest)
            return
        if self.exchange is not None or self.ready:  # sent ahead of an answer: nobody does that
            self.garbage = True
            self.pump()
            return
        self.current = request
        self.gate.outbox.flush()
        self.transport.pause_reading()
        self.tunnel = Tunnel(self.transport, self.gate.tunnel_head(self, request) + rest, self.tunnel_closed)
        self.deadline = self.gate.clock() + self.gate.timeouts.connect
        self.gate.open_tunnel(self.tunnel, self.tunnel_closed)

    def tunnel_closed(self) -> None:
        self.deadline = self.gate.clock() + LINGER
        if not self.transport.is_closing():
            self.transport.close()

    # time -----------------------------------------------------------------------------------------------------------
    def tick(self, now: float) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.check(now)
            return
        tunnel = self.tunnel
        if tunnel is not None and tunnel.moved:
            tunnel.moved = 0
            self.deadline = now + max(self.gate.timeouts.keepalive, self.gate.timeouts.between_bytes)
        if now < self.deadline:
            return
        request = self.request
        if request is not None and request.head_done and now < self.deadline + request.size / SLOWEST:
            return
        if tunnel is not None or self.lingering or self.transport.is_closing():
            if not self.transport.get_write_buffer_size() or now > self.deadline + self.gate.timeouts.between_bytes:
                self.transport.abort()
        elif request is not None:
            self.refuse_connection(
                Refusal(408, "request_timeout", "The request did not arrive in time", outcome="timeout")
            )
        else:
            self.lingering = True
            self.deadline = now + LINGER
            self.transport.close()

    def idle(self) -> bool:
        """Nothing is under way: this connection may be closed by a worker that stops."""
        return self.exchange is None and self.request is None and not self.ready and self.tunnel is None

    def cut(self) -> None:
        """The worker has waited long enough."""
        if self.exchange is not None:
            self.exchange.stop()
        elif not self.transport.is_closing():
            self.close()

    def shutdown(self) -> None:
        """uvicorn's wish to stop; the worker's own shutdown does not use it."""
        if self.idle():
            self.transport.close()


def too_many_headers() -> Refusal:
    return Refusal(431, "headers_too_large", "The headers of the request are too large", close=True)


def not_understood() -> Refusal:
    return Refusal(400, "bad_request", "The bytes that were sent are no valid HTTP/1.1 request", close=True)


def bound_to(gate: "Gate") -> type[Front]:
    """What makes the connections of one worker."""
    return cast("type[Front]", partial(Front, gate))  # uvicorn only calls it
