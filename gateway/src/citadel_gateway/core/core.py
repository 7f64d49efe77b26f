"""The decisions of a worker: who may ask, which model is meant, which backend gets it, and what is counted.

Plain objects: no web framework, no sockets, the clock passed in. Each request is one `Ticket`, a small state machine;
it is settled exactly once, whatever happens, and only there are limits settled, counters moved, the log line and the
record of the journal written. Where something must wait (for the store of limits, for a slot of a model), whoever
drives the ticket is called back; where nothing must, everything is done in the same call.
"""

import hashlib
import os
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from msgspec.structs import replace

from citadel_gateway.core.admission import ADMITTED as SLOT
from citadel_gateway.core.admission import Gatekeeper, Shed, Waiter
from citadel_gateway.core.board import Board
from citadel_gateway.core.catalogue import Backend, Catalogue, Model
from citadel_gateway.core.health import CLOSED, HALF_OPEN, NEUTRAL, SERVED
from citadel_gateway.core.keyring import FOREVER, Caller, KeyRing, Person
from citadel_gateway.core.limits import Denied, Limiter, Reservation
from citadel_gateway.core.routing import Query, Router, unavailable
from citadel_gateway.core.tally import COST, DURATION, QUEUE, TTFT
from citadel_gateway.core.ticket import (
    ADMITTED,
    FIRST_BYTE,
    QUEUED,
    RECEIVED,
    RESERVING,
    ROUTED,
    SENT,
    SETTLED,
    Line,
    Ticket,
    Used,
)
from citadel_gateway.errors import Refusal
from citadel_gateway.metrics import Labels, Metrics
from citadel_gateway.records import SYSTEM_USER, Opened, Progress, Record, Running, Settled, Why
from citadel_gateway.settings import Gateway
from citadel_gateway.snapshot import Snapshot

CODES: Final = {status.value: str(status.value) for status in HTTPStatus}
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
LONG: Final = 1.0  # seconds after which an open request is worth a note in the journal
NOTHING: Final = Used()
CIRCUITS: Final = {CLOSED: 0.0, HALF_OPEN: 1.0}  # an open one is 2
QUOTAS: Final = frozenset(("tokens_per_day", "tokens_per_month"))


class Core:
    """All decisions of one worker. `record` takes each finished line of the access log, `journal` each record; `wall`
    is the time of day.
    """

    def __init__(
        self,
        settings: Gateway,
        number: int,
        *,
        metrics: Metrics,
        record: Callable[[Line], None],
        journal: Callable[[Record], None],
        limiter: Limiter,
        wall: Callable[[], float],
        board: Board | None = None,
    ) -> None:
        self.host = settings.host
        self.number = number
        self.catalogue = Catalogue(settings.timeouts.probe_interval, board)
        self.router = Router(self.catalogue, number)
        self.gatekeeper = Gatekeeper(settings.admission, settings.limits.inflight_per_model, number)
        self.limiter = limiter
        self.keys = KeyRing()
        self.metrics = metrics
        self.tiers: dict[Labels, int] = metrics.tiers
        self.record = record
        self.journal = journal
        self.wall = wall
        self.prefix = os.urandom(6).hex()
        self.serial = 0
        self.open = 0  # tickets that are not settled yet
        self.running: dict[str, Ticket] = {}  # those that the journal knows as open

    def apply(self, snapshot: Snapshot, now: float) -> list[Backend]:
        """New models, keys, policies and drain states; the backends that are gone."""
        self.keys = KeyRing(snapshot)
        gone = self.catalogue.apply(snapshot, now)
        for model in self.catalogue.models.values():
            model.wire_name = b"x-citadel-model: %b\r\n" % model.name.encode()
        self.router.apply(snapshot, now)
        self.gatekeeper.apply(self.catalogue, now)
        return gone

    def tick(self, now: float) -> None:
        """Ten times a second."""
        self.router.tick(now)
        self.gatekeeper.tick(now)
        self.limiter.tick(now)

    # who asks -------------------------------------------------------------------------------------------------------
    def receive(self, offered_id: bytes, endpoint: str, path: bytes, client: str, now: float, bytes_in: int) -> Ticket:
        """A ticket for a request; the id that is shown is the client's if that is a harmless one, else ours."""
        self.serial += 1
        own = name = f"{self.prefix}-{self.serial}"
        if offered_id and REQUEST_ID.fullmatch(offered_id) is not None:
            name = offered_id.decode()
        else:
            offered_id = own.encode()
        self.open += 1
        return Ticket(own, name, offered_id, endpoint, path, client, now, self.wall(), bytes_in)

    def authenticate(self, authorization: bytes) -> Caller:
        """The key of an `Authorization` header. Raises 401, or 403 for a key that may not generate."""
        return self.known(digest_of(authorization))

    def known(self, digest: bytes) -> Caller:
        """The key with this SHA-256. Raises 401, or 403 for a key that may not generate."""
        key = self.keys.by_digest.get(digest)
        if key is None or (key.expires < FOREVER and key.expires <= self.wall()):
            raise Refusal(401, "invalid_api_key", "The key that was given is not known here")
        if not key.inference:
            raise Refusal(403, "insufficient_scope", "This key may not use models: it lacks the scope 'inference'")
        return key

    def visible(self, key: Caller, model: Model) -> bool:
        """Whether the key and the tier of its user may use the model."""
        allowed = self.router.allowed.get(key.person.tier.name)
        return (allowed is None or model.name in allowed) and key.may_use(model)

    def policies(self, key: Caller) -> dict[str, tuple[Model, ...]]:
        """The policies of which this key may use a model, with those models."""
        found = {}
        for name, plan in self.router.plans.items():
            if plan.policy is not None:
                models = [*plan.chain, *(model for _, _, models in plan.rules for model in models)]
                models = [model for model in dict.fromkeys(models) if self.visible(key, model)]
                if models:
                    found[name] = tuple(models)
        return found

    # limits ---------------------------------------------------------------------------------------------------------
    def resolve(self, ticket: Ticket, now: float) -> None:
        """Which models may answer. Raises Refusal."""
        query = ticket.query
        assert query is not None
        ticket.model = self.catalogue.by_name.get(query.asked)
        ticket.models = self.router.resolve(query, now)
        ticket.model = chosen = ticket.models[0]
        if query.preferred and query.preferred != chosen.name:
            ticket.fallback_from = query.preferred
            self.metrics.count("llm_gateway_fallbacks_total", (query.preferred, chosen.name))

    def reserve(
        self, ticket: Ticket, now: float, done: Callable[[Reservation | Denied], None]
    ) -> Reservation | Denied | None:
        """What the request may use at most, or None: then `done` is called later."""
        key = ticket.key
        assert key is not None
        if not ticket.metered or not key.person.limited:
            return UNLIMITED
        found = self.limiter.reserve(key.person, ticket.tokens, now, done)
        if found is None:
            ticket.state = RESERVING
            ticket.waiter = done
        return found

    def reserved(self, ticket: Ticket, found: Reservation | Denied, now: float) -> None:
        """The limiter has answered. Raises 429."""
        ticket.state = RECEIVED
        if found is UNLIMITED:
            return
        key = ticket.key
        assert key is not None
        if isinstance(found, Denied):
            key.person.shown_until = 0.0
            self.show_limits(ticket, key.person, now)
            ticket.remaining = self.limiter.remaining(key.person)
            raise self.denied(ticket, found)
        ticket.reservation = found
        ticket.overage = found.overage
        self.show_limits(ticket, key.person, now)
        if found.degrade and key.person.tier.degrade_to:
            query = ticket.query
            assert query is not None
            ticket.degraded_from = query.asked
            query.asked = key.person.tier.degrade_to
            self.resolve(ticket, now)

    def show_limits(self, ticket: Ticket, person: Person, now: float) -> None:
        """The header lines of the limits; of one that is great they may be a moment old."""
        if now >= person.shown_until:
            person.shown = b"".join([b"%b: %b\r\n" % line for line in self.limiter.headers(person)])
            person.shown_until = now + person.shown_for
        ticket.lines += person.shown

    def denied(self, ticket: Ticket, found: Denied) -> Refusal:
        model = ticket.model.name if ticket.model is not None else "other"
        self.metrics.count("llm_gateway_ratelimited_total", (model, found.kind))
        ticket.limit = found.kind
        if found.kind == "limits_unavailable":
            message = "Limits cannot be checked at the moment"
            return Refusal(503, found.kind, message, retry_after=seconds(found.retry_after), outcome="limited")
        what = found.kind.replace("_", " ")
        if not found.possible:
            message = (
                f"The request asks for {ticket.tokens} tokens at most, more than the whole limit: {what}: {found.limit}"
            )
            return Refusal(429, "request_too_large", message, outcome="limited")
        ticket.retry_after = found.retry_after
        code = "insufficient_quota" if found.kind in QUOTAS else "rate_limit_exceeded"
        message = f"The limit is reached: {what}: {found.limit}. Try again in {found.retry_after:.1f} s"
        return Refusal(429, code, message, retry_after=seconds(found.retry_after), outcome="limited")

    # slots ----------------------------------------------------------------------------------------------------------
    def enter(self, ticket: Ticket, waiter: Waiter, now: float) -> bool:
        """A slot of the model. False: it has to wait, and `waiter` will be called. Raises 429 or 503."""
        ticket.model = model = ticket.models[0]
        if not ticket.metered:
            ticket.state = ADMITTED
            return True
        key = ticket.key
        assert key is not None
        person = key.person
        found = self.gatekeeper.enter(waiter, model, person.priority, person.id, ticket.deadline, now, ticket.load)
        if found is SLOT:
            ticket.state = ADMITTED
            ticket.admitted = now
            return True
        if found is None:
            ticket.state = QUEUED
            ticket.waiter = waiter
            ticket.queued = now
            ticket.ahead = self.gatekeeper.queued(model)
            return False
        assert isinstance(found, Refusal)
        self.shed(ticket, found)
        if self.fall_back(ticket, now):  # another model may have room
            return self.enter(ticket, waiter, now)
        raise found

    def admitted(self, ticket: Ticket, now: float) -> None:
        """The wait for a slot is over."""
        ticket.state = ADMITTED
        ticket.waiter = None
        ticket.admitted = now
        ticket.waited += now - ticket.queued
        ticket.queued = 0.0

    def shed(self, ticket: Ticket, refusal: Refusal) -> None:
        """The gatekeeper has refused, at once or after a wait."""
        ticket.state = RECEIVED
        ticket.waiter = None
        model = ticket.model.name if ticket.model is not None else "other"
        ticket.retry_after = float(refusal.retry_after)
        if isinstance(refusal, Shed):
            ticket.ahead = refusal.ahead
            ticket.limit = f"queue_{refusal.reason}"
            self.metrics.count("llm_gateway_shed_total", (model, refusal.reason))

    def give_back(self, ticket: Ticket, now: float) -> None:
        """The slot is free for another request."""
        if ticket.admitted:
            assert ticket.model is not None
            self.gatekeeper.leave(ticket.model, now, now - ticket.admitted)
            ticket.admitted = 0.0

    # backends -------------------------------------------------------------------------------------------------------
    def route(self, ticket: Ticket, now: float) -> Backend | None:
        """A backend of the present model that was not tried; it counts as busy from now on."""
        model, query = ticket.model, ticket.query
        assert model is not None
        assert query is not None
        backend = self.router.pick(model, query, self.passed_over(ticket, model), now)
        if backend is None:
            return None
        ticket.backend = backend
        ticket.tried = (*ticket.tried, backend)
        ticket.tries += 1
        ticket.state = ROUTED
        ticket.begun = now
        ticket.engine = backend.begin(ticket.load, now)
        if ticket.metered and not ticket.opened:
            self.note_opened(ticket)
        return backend

    def fall_back(self, ticket: Ticket, now: float) -> bool:
        """The present model has nobody: on to the next one that may answer instead, if there is one."""
        self.give_back(ticket, now)
        gone, *rest = ticket.models
        if not rest:
            return False
        ticket.models = tuple(rest)
        ticket.fallback_from = ticket.fallback_from or gone.name
        self.metrics.count("llm_gateway_fallbacks_total", (gone.name, rest[0].name))
        ticket.state = RECEIVED
        return True

    def unavailable(self, ticket: Ticket) -> Refusal:
        assert ticket.query is not None
        return unavailable(ticket.query.asked)

    def alternative(self, ticket: Ticket, now: float) -> bool:
        """Whether anybody else could be asked."""
        model, query = ticket.model, ticket.query
        if model is None or query is None:
            return False
        trail = query.trail
        query.trail = []  # a look is no decision
        found = (
            len(ticket.models) > 1 or self.router.pick(model, query, self.passed_over(ticket, model), now) is not None
        )
        query.trail = trail
        return found

    def passed_over(self, ticket: Ticket, model: Model) -> tuple[Backend, ...]:
        """Backends that are not to be asked: those that were, and for another host's gateway, which has chosen this
        host, those of other hosts.
        """
        if ticket.metered:
            return ticket.tried
        return ticket.tried + tuple(backend for backend in model.backends if backend.gateway)

    def leave(self, ticket: Ticket, now: float, verdict: int, output: int = 0) -> None:
        """The backend has done with the request, or we with the backend."""
        backend = ticket.backend
        if backend is None:
            return
        ticket.backend = None
        taken = now - ticket.begun if verdict == SERVED else 0.0
        clock = backend.end(ticket.load, now, ticket.begun, verdict, taken, output)
        ticket.engine_seconds += clock - ticket.engine

    def sent(self, ticket: Ticket, now: float) -> None:
        ticket.sent = now
        ticket.state = SENT

    def first_byte(self, ticket: Ticket, now: float, *, served: bool = True) -> None:
        """Of a stream, or a whole reply. An error came quickly, which says nothing about the engine's speed."""
        ticket.first = now
        ticket.state = FIRST_BYTE
        if ticket.backend is not None and served:
            ticket.backend.first_byte(now - ticket.sent, now)

    def failed(self, ticket: Ticket, reason: str) -> None:
        """A backend broke its promise; counted also when a retry saves the request."""
        model = ticket.model.name if ticket.model is not None else "other"
        self.metrics.count("llm_gateway_upstream_errors_total", (model, reason))

    def retried(self, ticket: Ticket, reason: str) -> None:
        model = ticket.model.name if ticket.model is not None else "other"
        self.metrics.count("llm_gateway_retries_total", (model, reason))

    def decision_lines(self, ticket: Ticket) -> bytes:
        """The header lines that say who answers, and by which policy."""
        model, query = ticket.model, ticket.query
        assert model is not None
        assert query is not None
        if query.policy:
            return b"%bx-citadel-policy: %b\r\n" % (model.wire_name, query.policy.encode())
        return model.wire_name

    # the end --------------------------------------------------------------------------------------------------------
    def settle(
        self, ticket: Ticket, now: float, status: int, outcome: str, code: str = "", verdict: int = NEUTRAL
    ) -> bool:
        """The one end of a request: everything given back, everything counted and written down. False when that was
        done before.

        `status` is what the client saw, `code` what is counted if that differs (a stream that broke after its 200).
        """
        if ticket.state == SETTLED:
            return False
        if ticket.waiter is not None:
            self.stop_waiting(ticket)
        used = self.used(ticket, now, outcome) if ticket.query is not None else NOTHING
        backend = ticket.backend
        if backend is not None:
            self.leave(ticket, now, verdict, used.output)
        self.give_back(ticket, now)
        if ticket.reservation is not None:
            self.limiter.settle(ticket.reservation, used.input + used.output, now)
        ticket.state = SETTLED
        self.open -= 1
        taken = now - ticket.started
        code = code or CODES.get(status, "other")
        if ticket.query is not None and ticket.metered:
            cost, parts = self.price(ticket, used)
            self.count(ticket, taken, code, used, cost, parts)
            self.write_down(ticket, now, status, outcome, code, used, cost, parts, backend)
        elif ticket.metered:
            self.count(ticket, taken, code, used, 0.0, {})
            if ticket.asks:
                self.write_down(ticket, now, status, outcome, code, used, 0.0, {}, None)
        self.log_line(ticket, status, outcome, taken)
        return True

    def stop_waiting(self, ticket: Ticket) -> None:
        waiter, ticket.waiter = ticket.waiter, None
        if ticket.state == RESERVING:
            self.limiter.cancel(waiter)
        elif ticket.state == QUEUED:
            self.gatekeeper.cancel(waiter)

    def used(self, ticket: Ticket, now: float, outcome: str) -> Used:
        """Tokens: as the engine has said; as far as it had come when it was cut; guessed from the time that it worked
        on an answer of which nothing was seen.
        """
        query, meter = ticket.query, ticket.meter
        assert query is not None
        if ticket.first:
            found: Used = meter.used(query.prompt_tokens) if meter is not None and outcome != "error" else NOTHING
            return found
        backend = ticket.backend
        if not ticket.sent or backend is None or outcome not in ("client_closed", "timeout", "cut"):
            return NOTHING
        working = now - ticket.sent - (backend.first.value if ticket.stream else 0.0)
        speed = backend.per_token.value
        if working <= 0 or not speed:
            return NOTHING
        return Used(query.prompt_tokens, min(int(working / speed) * ticket.texts, ticket.output))

    def price(self, ticket: Ticket, used: Used) -> tuple[float, dict[str, float]]:
        model = ticket.model
        if model is None or not ticket.tries:
            return 0.0, {}
        return self.router.prices.cost(model.name, used.input, used.output, used.cached, ticket.engine_seconds)

    def count(self, ticket: Ticket, taken: float, code: str, used: Used, cost: float, parts: dict[str, float]) -> None:
        model = ticket.model
        name = model.name if model is not None else "other"
        series = self.metrics.of(name, ticket.endpoint, ticket.stream)
        codes = series.codes
        codes[code] = codes.get(code, 0) + 1
        series.bytes_in += ticket.bytes_in
        series.bytes_out += ticket.bytes_out
        if ticket.sent:
            series.duration.observe(taken, DURATION)
            series.input += used.input
            series.output += used.output
            series.cached += used.cached
            if cost:
                series.cost.observe(cost, COST)
                series.hardware += parts.get("hardware", 0.0)
                series.energy += parts.get("energy", 0.0)
                series.tokens += parts.get("tokens", 0.0)
            if model is not None and model.slots:
                series.queue.observe(ticket.waited, QUEUE)
        if ticket.first and ticket.stream:
            series.first_token.observe(ticket.first - ticket.started, TTFT)
        if name == "other" and ticket.query is not None:
            self.metrics.count("llm_gateway_metrics_dropped_labels_total", ("model",))

    def write_down(
        self,
        ticket: Ticket,
        now: float,
        status: int,
        outcome: str,
        code: str,
        used: Used,
        cost: float,
        parts: dict[str, float],
        backend: Backend | None,
    ) -> None:
        """The journal's record, and the tier's count."""
        key, query, model = ticket.key, ticket.query, ticket.model
        assert key is not None
        tier = key.person.tier.name
        tiers, labels = self.tiers, (tier, outcome)
        tiers[labels] = tiers.get(labels, 0) + 1
        if ticket.opened:
            del self.running[ticket.id]
        first = ticket.first - ticket.started if ticket.first else 0.0
        self.journal(
            Settled(
                ticket.id,
                ticket.name,
                ticket.at,
                self.host,
                self.number,
                key.person.id,
                key.id,
                tier,
                model.name if model is not None else "",
                ticket.endpoint,
                status,
                outcome,
                code,
                ticket.stream,
                ticket.session,
                ticket.use_case,
                query.asked if query is not None else "",
                ticket.tried[-1].label if ticket.tried else "",
                ticket.tokens if ticket.reservation is not None else 0,
                used.input,
                used.output,
                used.cached,
                used.exact,
                ticket.overage,
                ticket.waited,
                first,
                now - ticket.started,
                ticket.engine_seconds,
                cost,
                parts,
                ticket.tries,
                ticket.bytes_in,
                ticket.bytes_out,
                ticket.client,
                ticket.traceparent,
                self.why(ticket, query) if query is not None else Why(),
            )
        )

    def why(self, ticket: Ticket, query: Query) -> Why:
        backend = ticket.tried[-1] if ticket.tried else None
        if backend is not None and query.plain() and not (ticket.limit or ticket.ahead or ticket.degraded_from):
            return backend.plain
        found = self.router.why(query, ticket.model, backend)
        more: dict[str, object] = {}
        if ticket.limit:
            more["limit"] = ticket.limit
        if ticket.remaining:
            more["remaining"] = ticket.remaining
        if ticket.retry_after:
            more["retry_after"] = ticket.retry_after
        if ticket.ahead:
            more["queue_length"] = ticket.ahead
        if ticket.degraded_from:
            more["degraded_from"] = ticket.degraded_from
        if ticket.fallback_from:
            more["fallback_from"] = ticket.fallback_from
        return replace(found, **more) if more else found

    def log_line(self, ticket: Ticket, status: int, outcome: str, taken: float) -> None:
        key, model = ticket.key, ticket.model
        self.record(
            Line(
                ticket.at + taken,
                ticket.name,
                key.id if key is not None else "",
                model.name if model is not None else "",
                ticket.path.decode("latin-1"),
                status,
                ticket.stream,
                ticket.bytes_in,
                ticket.bytes_out,
                int((ticket.first - ticket.started) * 1e5) / 100 if ticket.first else None,
                int(taken * 1e5) / 100,
                ticket.client,
                outcome,
            )
        )

    # the journal of what is open ------------------------------------------------------------------------------------
    def note_opened(self, ticket: Ticket) -> None:
        key, query, model = ticket.key, ticket.query, ticket.model
        assert key is not None
        assert query is not None
        assert model is not None
        ticket.opened = True
        self.running[ticket.id] = ticket
        self.journal(
            Opened(
                ticket.id,
                ticket.name,
                ticket.at,
                self.host,
                self.number,
                key.person.id,
                key.id,
                key.person.tier.name,
                model.name,
                ticket.endpoint,
                ticket.stream,
                ticket.session,
                ticket.use_case,
                ticket.tokens if ticket.reservation is not None else 0,
                query.asked,
                ticket.tried[-1].label,
            )
        )

    def note_progress(self, now: float) -> None:
        """Once a second: what the open requests have used so far."""
        rows = []
        for ticket in self.running.values():
            if now - ticket.started >= LONG:
                query, meter, backend = ticket.query, ticket.meter, ticket.backend
                assert query is not None
                used = meter.used(query.prompt_tokens) if ticket.first and meter is not None else NOTHING
                seconds_so_far = ticket.engine_seconds
                if backend is not None:
                    backend.advance(now)
                    seconds_so_far += backend.spent - ticket.engine
                rows.append(Running(ticket.id, used.input, used.output, seconds_so_far))
        if rows:
            self.journal(Progress(self.wall(), tuple(rows)))

    def note_probe(self, backend: Backend, input_tokens: int, output_tokens: int, taken: float) -> None:
        """A probe that generated is a request of the gateway's own."""
        self.serial += 1
        name = f"{self.prefix}-{self.serial}"
        cost, parts = self.router.prices.cost(backend.model, input_tokens, output_tokens, 0, taken)
        self.journal(
            Settled(
                name, name, self.wall(), self.host, self.number, SYSTEM_USER, SYSTEM_USER, "", backend.model, "probe",
                200, "ok", "200", backend=backend.label, input_tokens=input_tokens, output_tokens=output_tokens,
                exact=True, total_seconds=taken, engine_seconds=taken, cost_usd=cost, cost=parts, tries=1,
            )
        )  # fmt: skip

    # what the worker reports ----------------------------------------------------------------------------------------
    def gauges(self, connections: int) -> dict[str, dict[Labels, float]]:
        models = self.catalogue.models.values()
        pairs = [(model, backend) for model in models for backend in model.backends]
        return {
            "llm_gateway_inflight_requests": {(model.name,): float(model.inflight) for model in models},
            "llm_gateway_queue_length": {(model.name,): float(self.gatekeeper.queued(model)) for model in models},
            "llm_gateway_connections": {(): float(connections)},
            "llm_gateway_backend_up": {
                (model.name, backend.label): float(backend.health.up) for model, backend in pairs
            },
            "llm_gateway_circuit_state": {
                (model.name, backend.label): CIRCUITS.get(backend.health.circuit, 2.0) for model, backend in pairs
            },
        }


UNLIMITED: Final = Reservation("", 0, None, 0.0)


def digest_of(authorization: bytes) -> bytes:
    """The SHA-256 of the key in an `Authorization` header. Raises 401 when there is none."""
    if authorization[:7].lower() != b"bearer ":
        raise Refusal(401, "missing_api_key", "You must give a key: Authorization: Bearer KEY")
    return hashlib.sha256(authorization[7:].strip()).digest()


def seconds(value: float) -> int:
    """A Retry-After: whole seconds, and not so few that the next try comes too early."""
    return max(1, -int(-value // 1))
