"""What a worker does with each request: its own answers, a model, or the control process.

Everything of a worker hangs here: settings, decision core, connection pools, probes. No module has state of its own.
"""

import asyncio
import logging
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

import msgspec

from citadel_gateway.core.catalogue import Backend, Key
from citadel_gateway.core.core import Core, Ticket
from citadel_gateway.core.health import Health
from citadel_gateway.errors import Refusal, method_not_allowed
from citadel_gateway.metrics import Metrics
from citadel_gateway.settings import Gateway
from citadel_gateway.snapshot import Snapshot
from citadel_gateway.worker.accesslog import Line
from citadel_gateway.worker.exchange import Exchange
from citadel_gateway.worker.headers import DROP_TO_CONTROL, DROP_TO_ENGINE, passed_on
from citadel_gateway.worker.outbox import Outbox
from citadel_gateway.worker.probe import probe
from citadel_gateway.worker.request import Request
from citadel_gateway.worker.tunnel import Tunnel
from citadel_gateway.worker.upstream import Pool

if TYPE_CHECKING:
    from citadel_gateway.worker.front import Front

log = logging.getLogger("citadel_gateway")
encode = msgspec.json.Encoder().encode

MODEL_PATHS = {b"/v1/chat/completions": "chat", b"/v1/completions": "completions"}
LISTING, ONE_MODEL = b"/v1/models", b"/v1/models/"
HEALTHZ, READYZ = b"/healthz", b"/readyz"
HEALTH_PATHS = frozenset((HEALTHZ, READYZ))
METHODS = frozenset((b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
RELAY_BODY = 1024 * 1024  # the control process asks for a key itself, so that little is held for it before it has
JSON = b"content-type: application/json\r\n"
ALLOW_HEADERS = b"authorization, content-type, x-request-id"
EXPOSE_HEADERS = b"x-request-id, retry-after"


class Gate:
    """The context of all connections of one worker. `clock` is monotonic and passed in, as is the time of day."""

    def __init__(
        self,
        settings: Gateway,
        engine_key: str,
        metrics: Metrics,
        record: Callable[[Line], None],
        clock: Callable[[], float],
        wall: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.timeouts = settings.timeouts
        self.clock = clock
        self.loop = loop
        self.engine_key = engine_key
        self.core = Core(
            probe_interval=settings.timeouts.probe_interval,
            inflight_per_model=settings.limits.inflight_per_model,
            metrics=metrics,
            record=record,
            wall=wall,
        )
        self.outbox = Outbox(loop)
        self.stopping = False
        self.date_line = b""
        self.any_origin = "*" in settings.cors.allow_origins
        self.origins = frozenset(origin.encode() for origin in settings.cors.allow_origins)
        self.control = Backend("control", 0, Health(settings.timeouts.probe_interval, 0.0))
        self.control.pool = Pool(loop, "", 0, b"x-citadel-worker: 1\r\n", settings.control_socket)
        self.probes: set[asyncio.Task[None]] = set()

    def set_date(self, wall: float) -> None:
        self.date_line = b"date: %b\r\n" % formatdate(wall, usegmt=True).encode()

    def apply(self, snapshot: Snapshot) -> None:
        """New models, keys and drain states."""
        for backend in self.core.apply(snapshot, self.clock()):
            backend.pool.close()
        for backend in self.core.catalogue.backends.values():
            if backend.pool is None:
                host = f"[{backend.host}]" if ":" in backend.host else backend.host
                preamble = f"host: {host}:{backend.port}\r\nauthorization: Bearer {self.engine_key}\r\n".encode()
                backend.pool = Pool(self.loop, backend.host, backend.port, preamble)

    # before the body has come ---------------------------------------------------------------------------------------
    def body_limit(self, request: Request) -> int:
        return self.limits.body_bytes if request.path in MODEL_PATHS else min(RELAY_BODY, self.limits.body_bytes)

    def too_large(self, request: Request) -> Refusal:
        limit = self.body_limit(request)
        return Refusal(413, "body_too_large", f"The body is larger than the {limit} bytes that are allowed here")

    def is_own(self, path: bytes) -> bool:
        """Answered by the worker; every other path is the control's."""
        return path in MODEL_PATHS or path in (LISTING, HEALTHZ, READYZ) or path.startswith(ONE_MODEL)

    def look_ahead(self, request: Request) -> Refusal | None:
        """What can be refused by the head alone. `handle` decides the same again when the request is complete."""
        try:
            self.check_head(request)
            if request.path in MODEL_PATHS and request.method == b"POST":
                self.core.authenticate(request.authorization)
        except Refusal as refusal:
            return refusal
        return self.too_large(request) if request.declared() > self.body_limit(request) else None

    def check_head(self, request: Request) -> None:
        if request.hosts != 1 and not (request.http10 and not request.hosts):
            raise Refusal(400, "bad_host", "A request must have one Host header", close=True)
        if request.http10 and request.coding:
            raise Refusal(400, "bad_request", "HTTP/1.0 has no Transfer-Encoding", close=True)
        if request.expect and request.expect.lower() != b"100-continue":
            raise Refusal(417, "expectation_failed", "The only expectation that is met is 100-continue")
        if request.query and b"key=" in request.query.lower() and self.is_own(request.path):
            raise Refusal(400, "key_in_url", "A key in the URL ends up in logs: send it as Authorization: Bearer KEY")

    # the complete request -------------------------------------------------------------------------------------------
    def receive(self, front: "Front", request: Request) -> Ticket:
        path = request.path
        endpoint = MODEL_PATHS.get(path) or ("models" if path.startswith(LISTING) else "other")
        return self.core.receive(request.request_id, endpoint, path, front.peer, self.clock(), request.size)

    def handle(self, front: "Front", request: Request) -> None:
        """Answer the request, or set `front.exchange` to what will."""
        path = request.path
        if path in HEALTH_PATHS and request.method in (b"GET", b"HEAD") and request.refusal is None:
            self.answer_health(front, path)
            return
        ticket = self.receive(front, request)
        try:
            if request.refusal is not None:
                raise request.refusal
            self.check_head(request)
            if request.method == b"OPTIONS" and request.origin:
                self.preflight(front, ticket, request)
            elif path in MODEL_PATHS:
                self.generate(front, ticket, request)
                return
            elif self.is_own(path):
                self.list_models(front, ticket, request)
            else:
                self.relay(front, ticket, request)
                return
        except Refusal as refusal:
            front.exchange = None
            front.refuse(ticket, refusal)
        front.answered()

    def generate(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method != b"POST":
            raise method_not_allowed(request.method.decode(), "POST")
        key = self.core.authenticate(request.authorization)
        ticket.key = key
        kind = request.content_type
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(415, "unsupported_media_type", "The body must be JSON: send Content-Type: application/json")
        body = self.core.admit(ticket, key, request.body())
        lines = b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            passed_on(request.headers, DROP_TO_ENGINE), ticket.request_id, len(body),
        )  # fmt: skip
        start_line = b"POST %b HTTP/1.1\r\n" % request.path
        self.begin(front, ticket, self.route_to_model, start_line, lines, body)

    def relay(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method not in METHODS:
            raise method_not_allowed(request.method.decode(), "GET, POST, PUT, PATCH, DELETE, OPTIONS")
        body = request.body()
        lines = b"%bcontent-length: %d\r\n\r\n" % (self.control_lines(front, ticket.request_id, request), len(body))
        start_line = b"%b %b HTTP/1.1\r\n" % (request.method, request.target)
        self.begin(front, ticket, self.route_to_control, start_line, lines, body)

    def begin(
        self,
        front: "Front",
        ticket: Ticket,
        route: Callable[[Ticket], Pool],
        start_line: bytes,
        lines: bytes,
        body: bytes,
    ) -> None:
        exchange = Exchange(
            self.core, self.clock, self.timeouts, self.outbox, ticket, front, route, start_line, lines, body
        )
        front.exchange = exchange
        exchange.start()

    def route_to_model(self, ticket: Ticket) -> Pool:
        pool: Pool = self.core.route(ticket).pool
        return pool

    def route_to_control(self, ticket: Ticket) -> Pool:
        if ticket.tried:
            raise Refusal(
                503,
                "control_unavailable",
                "This part of the gateway is not available at the moment",
                retry_after=2,
                outcome="unavailable",
            )
        ticket.tried = (self.control,)
        pool: Pool = self.control.pool
        return pool

    def control_lines(self, front: "Front", request_id: bytes, request: Request) -> bytes:
        return b"%bx-forwarded-for: %b\r\nx-request-id: %b\r\n" % (
            passed_on(request.headers, DROP_TO_CONTROL), front.peer.encode(), request_id,
        )  # fmt: skip

    # upgrades -------------------------------------------------------------------------------------------------------
    def tunnel_head(self, front: "Front", request: Request) -> bytes:
        """The request as the control process gets it, Upgrade and all."""
        ticket = self.receive(front, request)
        self.core.settle(ticket, self.clock(), 101, "tunnel")
        return b"%b %b HTTP/1.1\r\nconnection: upgrade\r\nupgrade: %b\r\nx-citadel-worker: 1\r\n%b\r\n" % (
            request.method, request.target, request.upgrade, self.control_lines(front, ticket.request_id, request),
        )  # fmt: skip

    def open_tunnel(self, tunnel: Tunnel, failed: Callable[[], None]) -> None:
        def opened(task: "asyncio.Task[None]") -> None:
            self.probes.discard(task)
            if not task.cancelled() and task.exception() is not None:
                failed()

        task = self.loop.create_task(self.connect_tunnel(tunnel))
        self.probes.add(task)
        task.add_done_callback(opened)

    async def connect_tunnel(self, tunnel: Tunnel) -> None:
        await self.loop.create_unix_connection(lambda: tunnel, self.settings.control_socket)
        if tunnel.client.is_closing():
            tunnel.close()

    # the worker's own answers ---------------------------------------------------------------------------------------
    def answer_health(self, front: "Front", path: bytes) -> None:
        """Neither counted nor logged: balancers ask every second."""
        ticket = Ticket(b"", "other", path, front.peer, 0.0, 0)
        states = [model.state() for model in self.core.catalogue.models.values()]
        counts = {state: states.count(state) for state in ("up", "down", "draining")}
        ready = path == HEALTHZ or (bool(counts["up"]) and not self.stopping)
        body = encode({"status": "ok" if path == HEALTHZ else "ready" if ready else "unavailable", "models": counts})
        front.answer_uncounted(ticket, 200 if ready else 503, JSON + b"cache-control: no-store\r\n", body)
        front.answered()

    def list_models(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method != b"GET":
            raise method_not_allowed(request.method.decode(), "GET")
        key = ticket.key = self.core.authenticate(request.authorization)
        catalogue = self.core.catalogue
        if request.path in (LISTING, ONE_MODEL):
            visible = [self.describe(name) for name, model in catalogue.models.items() if key.may_use(model)]
            front.answer(ticket, 200, JSON, encode({"object": "list", "data": visible}))
            return
        name = request.path[len(ONE_MODEL) :].decode("latin-1")
        found = catalogue.by_name.get(name)
        if found is None or not self.visible(key, name):
            raise Refusal(404, "model_not_found", f"The model {name[:128]!r} does not exist", param="model")
        front.answer(ticket, 200, JSON, encode(self.describe(found.name)))

    def visible(self, key: Key, name: str) -> bool:
        return key.may_use(self.core.catalogue.by_name[name])

    def describe(self, name: str) -> dict[str, object]:
        model = self.core.catalogue.models[name]
        return {
            "id": model.name,
            "object": "model",
            "created": self.core.catalogue.created,
            "owned_by": "citadel",
            "max_model_len": model.context,
            "aliases": model.aliases,
            "description": model.description,
            "state": model.state(),
        }

    # browsers -------------------------------------------------------------------------------------------------------
    def allowed_origin(self, origin: bytes) -> bool:
        return self.any_origin or origin in self.origins

    def cors_lines(self, origin: bytes) -> bytes:
        if not self.allowed_origin(origin):
            return b"vary: origin\r\n"
        return b"access-control-allow-origin: %b\r\naccess-control-expose-headers: %b\r\nvary: origin\r\n" % (
            origin, EXPOSE_HEADERS,
        )  # fmt: skip

    def preflight(self, front: "Front", ticket: Ticket, request: Request) -> None:
        """A browser's question whether a page may call us; it comes without a key."""
        if not self.allowed_origin(request.origin):
            raise Refusal(403, "origin_not_allowed", "Pages of this origin may not use the gateway")
        asked = b""
        for name, value in request.headers:
            if name == b"access-control-request-headers":
                asked = value
        lines = (
            b"access-control-allow-methods: GET, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
            b"access-control-allow-headers: %b\r\naccess-control-max-age: 600\r\n" % (asked or ALLOW_HEADERS)
        )
        front.answer(ticket, 204, lines, b"")

    # probes ---------------------------------------------------------------------------------------------------------
    def start_probes(self, now: float) -> None:
        """Ask the backends that are due. Called ten times a second."""
        for backend in self.core.catalogue.backends.values():
            if backend.health.begin(now):
                task = self.loop.create_task(self.probe(backend))
                self.probes.add(task)
                task.add_done_callback(self.probes.discard)

    async def probe(self, backend: Backend) -> None:
        verdict = await probe(backend.host, backend.port, self.engine_key, self.timeouts.probe)
        health = backend.health
        change = {"up": health.healthy, "down": health.failed, "silent": health.unanswered}[verdict](self.clock())
        if change:
            log.warning("backend %s is %s", backend.label, "up" if health.up else "down")

    def prune(self, now: float) -> None:
        """Close the upstream connections that nobody used for a while. Once a second."""
        for backend in (self.control, *self.core.catalogue.backends.values()):
            backend.pool.prune(now)
