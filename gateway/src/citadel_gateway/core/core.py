"""The decisions of a worker: who may ask, which model is meant, which backend gets it, and what is counted.

Plain objects: no web framework, no sockets, the clock passed in. Each request is one `Ticket`, a small state machine
admitted → routed → sent → first byte → settled; it is settled exactly once, whatever happens, and only there are the
counters moved and the log line written. Limits, prices and the journal of later work have their places in `admit` and
`settle`.
"""

import os
import re
from collections.abc import Callable
from http import HTTPStatus

import msgspec
from msgspec import Struct

from citadel_gateway.core.catalogue import Backend, Catalogue, Key, KeyRing, Model
from citadel_gateway.errors import Refusal
from citadel_gateway.metrics import DURATION, TTFT, Labels, Metrics
from citadel_gateway.snapshot import Snapshot
from citadel_gateway.worker.accesslog import Line

RECEIVED, ADMITTED, ROUTED, SENT, FIRST_BYTE, SETTLED = range(6)
CODES = {status.value: str(status.value) for status in HTTPStatus}
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
RETRY_DRAINING = 5
RETRY_DOWN = 2
RETRY_BUSY = 1
INFERENCE = frozenset(("chat", "completions"))


class Wanted(Struct, gc=False):
    """What routing needs of a body; all the rest is passed over and passed on."""

    model: str
    stream: bool | None = None


decode_wanted = msgspec.json.Decoder(Wanted).decode
decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
encode = msgspec.json.Encoder().encode


class Ticket:
    """One request, from its complete arrival to its one settlement."""

    __slots__ = (
        "backend", "bytes_in", "bytes_out", "client", "endpoint", "first", "key", "model", "path", "request_id",
        "sent", "started", "state", "stream", "tried",
    )  # fmt: skip

    def __init__(
        self, request_id: bytes, endpoint: str, path: bytes, client: str, started: float, bytes_in: int
    ) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.path = path
        self.client = client
        self.started = started
        self.bytes_in = bytes_in
        self.bytes_out = 0
        self.state = RECEIVED
        self.key: Key | None = None
        self.model: Model | None = None
        self.backend: Backend | None = None
        self.tried: tuple[Backend, ...] = ()
        self.stream = False
        self.sent = 0.0
        self.first = 0.0


class Core:
    """All decisions of one worker. `record` takes each finished line of the access log; `wall` is the time of day."""

    def __init__(
        self,
        *,
        probe_interval: float,
        inflight_per_model: int,
        metrics: Metrics,
        record: Callable[[Line], None],
        wall: Callable[[], float],
    ) -> None:
        self.catalogue = Catalogue(probe_interval)
        self.keys = KeyRing()
        self.metrics = metrics
        self.record = record
        self.wall = wall
        self.inflight_per_model = inflight_per_model
        self.prefix = os.urandom(6).hex().encode()
        self.serial = 0
        self.open = 0  # tickets that are not settled yet

    def apply(self, snapshot: Snapshot, now: float) -> list[Backend]:
        """New models, keys and drain states; the backends that are gone."""
        self.keys = KeyRing(snapshot.keys)
        return self.catalogue.apply(snapshot, now)

    # one request ----------------------------------------------------------------------------------------------------
    def receive(self, offered_id: bytes, endpoint: str, path: bytes, client: str, now: float, bytes_in: int) -> Ticket:
        """A ticket for a request; its id is the client's if that is a harmless one, else ours."""
        if not offered_id or REQUEST_ID.fullmatch(offered_id) is None:
            self.serial += 1
            offered_id = b"%b-%x" % (self.prefix, self.serial)
        self.open += 1
        return Ticket(offered_id, endpoint, path, client, now, bytes_in)

    def authenticate(self, authorization: bytes) -> Key:
        """The key of an `Authorization` header. Raises 401, or 403 for a key that may not generate."""
        if authorization[:7].lower() != b"bearer ":
            raise Refusal(401, "missing_api_key", "You must give a key: Authorization: Bearer KEY")
        key = self.keys.find(authorization[7:].strip())
        if key is None:
            raise Refusal(401, "invalid_api_key", "The key that was given is not known here")
        if not key.inference:
            raise Refusal(403, "insufficient_scope", "This key may not use models: it lacks the scope 'inference'")
        return key

    def admit(self, ticket: Ticket, key: Key, body: bytes) -> bytes:
        """Which model, and whether this key may use it now; the body to send on."""
        ticket.key = key
        try:
            wanted = decode_wanted(body)
        except msgspec.ValidationError as error:
            raise Refusal(400, "invalid_request", f"The request is not valid: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}") from None
        model = self.catalogue.by_name.get(wanted.model)
        if model is None:
            raise Refusal(404, "model_not_found", f"The model {wanted.model[:128]!r} does not exist", param="model")
        ticket.model = model
        if not key.may_use(model):
            raise Refusal(403, "model_not_allowed", f"This key may not use the model {model.name!r}", param="model")
        if model.draining:
            raise Refusal(
                503, "model_draining", f"The model {model.name!r} is being restarted", retry_after=RETRY_DRAINING
            )
        if model.inflight >= self.inflight_per_model:
            raise Refusal(503, "overloaded", f"The model {model.name!r} is at its limit", retry_after=RETRY_BUSY)
        ticket.stream = bool(wanted.stream)
        ticket.state = ADMITTED
        model.inflight += 1
        return body if wanted.model == model.name else with_model(body, model.name)

    def route(self, ticket: Ticket) -> Backend:
        """The backend with the fewest requests in flight of those that are up and were not tried. Raises 503."""
        model = ticket.model
        assert model is not None
        if ticket.backend is not None:
            self.leave(ticket)
        best = None
        for backend in model.backends:
            if backend.health.up and (best is None or backend.inflight < best.inflight) and backend not in ticket.tried:
                best = backend
        if best is None:
            raise Refusal(
                503,
                "model_unavailable",
                f"The model {model.name!r} is not available at the moment",
                retry_after=RETRY_DOWN,
                outcome="unavailable",
            )
        ticket.backend = best
        ticket.tried = (*ticket.tried, best)
        ticket.state = ROUTED
        best.inflight += 1
        return best

    def sent(self, ticket: Ticket, now: float) -> None:
        ticket.sent = now
        ticket.state = SENT

    def first_byte(self, ticket: Ticket, now: float) -> None:
        ticket.first = now
        ticket.state = FIRST_BYTE

    def failed(self, ticket: Ticket, reason: str) -> None:
        """A backend broke its promise; counted also when a retry saves the request."""
        model = ticket.model.name if ticket.model is not None else "other"
        self.metrics.count("llm_gateway_upstream_errors_total", (model, reason))

    def retried(self, ticket: Ticket, reason: str) -> None:
        model = ticket.model.name if ticket.model is not None else "other"
        self.metrics.count("llm_gateway_retries_total", (model, reason))

    def leave(self, ticket: Ticket) -> None:
        backend = ticket.backend
        if backend is not None:
            backend.inflight -= 1
            ticket.backend = None

    def settle(self, ticket: Ticket, now: float, status: int, outcome: str, code: str = "") -> bool:
        """The one end of a request: gauges back, counters on, one line for the log. False when that was done before.

        `status` is what the client saw, `code` what is counted if that differs (a stream that broke after its 200).
        """
        if ticket.state == SETTLED:
            return False
        model = ticket.model
        if model is not None and ticket.state != RECEIVED:
            model.inflight -= 1
        if ticket.backend is not None:
            ticket.backend.inflight -= 1
        ticket.state = SETTLED
        self.open -= 1
        name = model.name if model is not None else "other"
        stream = ticket.stream
        series = self.metrics.of(name, ticket.endpoint, stream)
        code = code or CODES.get(status, "other")
        codes = series.codes
        codes[code] = codes.get(code, 0) + 1
        series.bytes_in += ticket.bytes_in
        series.bytes_out += ticket.bytes_out
        started = ticket.started
        taken = now - started
        ttft = None
        if ticket.sent:
            series.duration.observe(taken, DURATION)
        if ticket.first:
            first = ticket.first - started
            ttft = int(first * 1e5) / 100
            if stream:
                series.first_token.observe(first, TTFT)
        self.record(
            Line(
                self.wall(),
                ticket.request_id.decode(),
                ticket.key.id if ticket.key is not None else "",
                name if model is not None else "",
                ticket.path.decode("latin-1"),
                status,
                stream,
                ticket.bytes_in,
                ticket.bytes_out,
                ttft,
                int(taken * 1e5) / 100,
                ticket.client,
                outcome,
            )
        )
        return True

    # what the worker reports ----------------------------------------------------------------------------------------
    def gauges(self, connections: int) -> dict[str, dict[Labels, float]]:
        models = self.catalogue.models.values()
        return {
            "llm_gateway_inflight_requests": {(model.name,): float(model.inflight) for model in models},
            "llm_gateway_connections": {(): float(connections)},
            "llm_gateway_backend_up": {
                (model.name, backend.label): float(backend.health.up) for model in models for backend in model.backends
            },
        }


def with_model(body: bytes, name: str) -> bytes:
    """The same body asking for `name`: an alias is ours, the engine knows only its own name. All other values keep
    their bytes.
    """
    members = decode_members(body)
    members["model"] = msgspec.Raw(encode(name))
    return encode(members)
