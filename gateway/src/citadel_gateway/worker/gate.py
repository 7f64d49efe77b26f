"""What a worker does with each request: its own answers, a model, or the control process.

Everything of a worker hangs here: settings, decision core, connection pools, probes. No module has state of its own.
"""

import asyncio
import logging
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

import msgspec

from citadel_gateway.core.board import Board
from citadel_gateway.core.catalogue import Backend, Model
from citadel_gateway.core.core import Core, digest_of
from citadel_gateway.core.keyring import Caller
from citadel_gateway.core.limits import Limiter
from citadel_gateway.core.ticket import Line, Ticket
from citadel_gateway.errors import Refusal, method_not_allowed
from citadel_gateway.keys import key_in_url
from citadel_gateway.metrics import Metrics
from citadel_gateway.records import Record
from citadel_gateway.settings import Gateway
from citadel_gateway.snapshot import Snapshot
from citadel_gateway.worker.asking import CAPABILITIES, Asking, hints_of
from citadel_gateway.worker.exchange import Exchange
from citadel_gateway.worker.headers import DROP_TO_CONTROL, DROP_TO_ENGINE, passed_on
from citadel_gateway.worker.outbox import Outbox
from citadel_gateway.worker.probe import examine
from citadel_gateway.worker.request import Request
from citadel_gateway.worker.tunnel import Tunnel
from citadel_gateway.worker.upstream import Pool

if TYPE_CHECKING:
    from citadel_gateway.worker.front import Front

log = logging.getLogger("citadel_gateway")
encode = msgspec.json.Encoder().encode

MODEL_PATHS: Final = CAPABILITIES
RESUMABLE: Final = frozenset((b"/v1/chat/completions", b"/v1/completions"))
LISTING, ONE_MODEL = b"/v1/models", b"/v1/models/"
HEALTHZ, READYZ = b"/healthz", b"/readyz"
HEALTH_PATHS: Final = frozenset((HEALTHZ, READYZ))
METHODS: Final = frozenset((b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
PUMP: Final = 0.02
RELAY_BODY: Final = (
    1024 * 1024
)  # the control process asks for a key itself, so that little is held for it before it has
JSON: Final = b"content-type: application/json\r\n"
START_LINES: Final = {path: b"POST %b HTTP/1.1\r\n" % path for path in MODEL_PATHS}
ALLOW_HEADERS: Final = b"authorization, content-type, x-request-id, x-session-id, x-citadel-resumable, last-event-id"
EXPOSE_HEADERS: Final = (
    b"x-request-id, retry-after, x-citadel-model, x-citadel-policy, x-citadel-resumable, last-event-id,"
    b" x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests,"
    b" x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Gate:
    """The context of all connections of one worker. `clock` is monotonic and passed in, as is the time of day."""

    def __init__(
        self,
        settings: Gateway,
        number: int,
        engine_key: str,
        *,
        metrics: Metrics,
        record: Callable[[Line], None],
        journal: Callable[[Record], None],
        limiter: Limiter,
        clock: Callable[[], float],
        wall: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        board: Board | None = None,
        peer_key: str = "",
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.timeouts = settings.timeouts
        self.clock = clock
        self.loop = loop
        self.engine_key = engine_key
        self.peer_key = peer_key
        self.core = Core(
            settings,
            number,
            metrics=metrics,
            record=record,
            journal=journal,
            limiter=limiter,
            wall=wall,
            board=board,
        )
        self.outbox = Outbox(loop)
        self.stopping = False
        self.date_line = b""
        self.any_origin = "*" in settings.cors.allow_origins
        self.origins = frozenset(origin.encode() for origin in settings.cors.allow_origins)
        self.worker_line = b"x-citadel-worker: %d\r\n" % number
        self.control = Pool(loop, "", 0, self.worker_line, settings.control_socket)
        self.probes: set[asyncio.Task[None]] = set()
        self.pumping = False

    def set_date(self, wall: float) -> None:
        self.date_line = b"date: %b\r\n" % formatdate(wall, usegmt=True).encode()

    def apply(self, snapshot: Snapshot) -> None:
        """New models, keys and drain states."""
        for backend in self.core.apply(snapshot, self.clock()):
            backend.pool.close()
        for backend in self.core.catalogue.backends.values():
            if backend.pool is None:
                backend.pool = Pool(self.loop, backend.host, backend.port, self.preamble(backend))

    def preamble(self, backend: Backend) -> bytes:
        """What every request to a backend begins with: an engine knows our key, another host's gateway our peer key."""
        host = f"[{backend.host}]" if ":" in backend.host else backend.host
        key, more = (self.peer_key, "x-citadel-peer: 1\r\n") if backend.gateway else (self.engine_key, "")
        return f"host: {host}:{backend.port}\r\nauthorization: Bearer {key}\r\n{more}".encode()

    def tick(self, now: float) -> None:
        """Ten times a second."""
        self.core.tick(now)
        self.start_probes(now)
        if self.core.gatekeeper.waiting and not self.pumping:
            self.pump()

    def pump(self) -> None:
        """Fifty times a second as long as somebody waits: another worker may have given a slot back."""
        keeper = self.core.gatekeeper
        keeper.pump(self.clock())
        self.pumping = keeper.waiting > 0
        if self.pumping:
            self.loop.call_later(PUMP, self.pump)

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
                self.caller(request)
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
        if (request.query or request.path not in MODEL_PATHS) and key_in_url(request.target):
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

    def caller(self, request: Request) -> Caller:
        """Whose key it is. Raises 401 or 403. What is made of the header is kept with the head."""
        if not request.digest:
            authorization = request.authorization
            if not authorization:  # Anthropic's clients
                authorization = b"bearer " + dict(request.headers).get(b"x-api-key", b"")
            request.digest = digest_of(authorization if authorization != b"bearer " else b"")
        return self.core.known(request.digest)

    def generate(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method != b"POST":
            raise method_not_allowed(request.method.decode(), "POST")
        ticket.key = key = self.caller(request)
        ticket.asks = True
        kind = request.content_type
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(415, "unsupported_media_type", "The body must be JSON: send Content-Type: application/json")
        hints = hints_of(request)
        if hints.resumable and request.path in RESUMABLE:  # kept by the control process, which asks a worker itself
            ticket.asks = False
            ticket.endpoint = "other"
            self.relay(front, ticket, request)
            return
        ticket.metered = not key.peer
        core, now = self.core, ticket.started
        asking = Asking(request.body(), ticket.endpoint)
        replicated = not hints.session and core.router.replicated(asking.wanted.model)
        asking.describe(ticket, hints, self.limits, core.router.routing.prefix_bytes if replicated else 0)
        core.resolve(ticket, now)
        if key.person.tokens_limited and ticket.metered:
            assert ticket.model is not None
            ticket.tokens = asking.reservation(ticket, ticket.model)
        if not request.passed:
            request.passed = passed_on(request.headers, DROP_TO_ENGINE)
        lines = b"%bx-request-id: %b\r\n" % (request.passed, ticket.request_id)
        front.exchange = exchange = Exchange(
            core, self.clock, self.timeouts, self.outbox, ticket, front, START_LINES[request.path], lines, asking=asking
        )
        exchange.begin()

    def relay(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method not in METHODS:
            raise method_not_allowed(request.method.decode(), "GET, POST, PUT, PATCH, DELETE, OPTIONS")
        lines = self.control_lines(front, ticket.request_id, request)
        start_line = b"%b %b HTTP/1.1\r\n" % (request.method, request.target)
        front.exchange = exchange = Exchange(
            self.core, self.clock, self.timeouts, self.outbox, ticket, front, start_line, lines,
            control=self.control, body=request.body(),
        )  # fmt: skip
        exchange.begin()

    def control_lines(self, front: "Front", request_id: bytes, request: Request) -> bytes:
        return b"%bx-forwarded-for: %b\r\nx-request-id: %b\r\n" % (
            passed_on(request.headers, DROP_TO_CONTROL), front.peer.encode(), request_id,
        )  # fmt: skip

    # upgrades -------------------------------------------------------------------------------------------------------
    def tunnel_head(self, front: "Front", request: Request) -> bytes:
        """The request as the control process gets it, Upgrade and all."""
        ticket = self.receive(front, request)
        self.core.settle(ticket, self.clock(), 101, "tunnel")
        return b"%b %b HTTP/1.1\r\nconnection: upgrade\r\nupgrade: %b\r\n%b%b\r\n" % (
            request.method, request.target, request.upgrade, self.worker_line,
            self.control_lines(front, ticket.request_id, request),
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
        ticket = Ticket("", "", b"", "other", path, front.peer, 0.0, 0.0, 0)
        states = [model.state() for model in self.core.catalogue.models.values()]
        counts = {state: states.count(state) for state in ("up", "down", "draining")}
        ready = path == HEALTHZ or (bool(counts["up"]) and not self.stopping)
        body = encode({"status": "ok" if path == HEALTHZ else "ready" if ready else "unavailable", "models": counts})
        front.answer_uncounted(ticket, 200 if ready else 503, JSON + b"cache-control: no-store\r\n", body)
        front.answered()

    def list_models(self, front: "Front", ticket: Ticket, request: Request) -> None:
        if request.method != b"GET":
            raise method_not_allowed(request.method.decode(), "GET")
        key = ticket.key = self.caller(request)
        core, catalogue = self.core, self.core.catalogue
        policies = core.policies(key)
        if request.path in (LISTING, ONE_MODEL):
            visible = [self.describe(model) for model in catalogue.models.values() if core.visible(key, model)]
            visible += [self.describe_policy(name, models) for name, models in policies.items()]
            front.answer(ticket, 200, JSON, encode({"object": "list", "data": visible}))
            return
        name = request.path[len(ONE_MODEL) :].decode("latin-1")
        found = catalogue.by_name.get(name)
        if found is not None and core.visible(key, found):
            described = self.describe(found)
            if key.peer:  # what our own engines can do: else two hosts would believe each other for ever
                described["state"] = found.local_state()
            front.answer(ticket, 200, JSON, encode(described))
            return
        if name not in policies:
            raise Refusal(404, "model_not_found", f"The model {name[:128]!r} does not exist", param="model")
        front.answer(ticket, 200, JSON, encode(self.describe_policy(name, policies[name])))

    def describe(self, model: Model) -> dict[str, object]:
        rate = self.core.router.prices.rate(model.name)
        return {
            "id": model.name,
            "object": "model",
            "created": self.core.catalogue.created,
            "owned_by": "citadel",
            "max_model_len": model.context,
            "aliases": model.aliases,
            "description": model.description,
            "state": model.state(),
            "capabilities": model.capabilities,
            "fallback": model.fallback,
            "price": {
                "currency": "USD",
                "input_mtoken": rate.input_token * 1e6,
                "output_mtoken": rate.output_token * 1e6,
                "cached_mtoken": rate.cached_token * 1e6,
                "engine_second": rate.second,
            },
        }

    def describe_policy(self, name: str, models: tuple[Model, ...]) -> dict[str, object]:
        """A policy is asked like a model; what answers is one of its models."""
        states = {model.state() for model in models}
        return {
            "id": name,
            "object": "model",
            "created": self.core.catalogue.created,
            "owned_by": "citadel",
            "max_model_len": max((model.context for model in models), default=0),
            "models": [model.name for model in models],
            "state": next((state for state in ("up", "draining") if state in states), "down"),
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
        found = await examine(backend, self.engine_key, self.peer_key, self.timeouts.probe, self.clock)
        if found.changed:
            log.warning("backend %s is %s", backend.label, "up" if backend.health.up else "down")
        if found.generated and not backend.gateway:
            self.core.note_probe(backend, found.input_tokens, found.output_tokens, found.seconds)

    def prune(self, now: float) -> None:
        """Close the upstream connections that nobody used for a while. Once a second."""
        self.control.prune(now)
        for backend in self.core.catalogue.backends.values():
            backend.pool.prune(now)
