"""The decision core alone: no socket, no loop, the clock passed in."""

from typing import Any

import pytest
from citadel_gateway.core.core import Core, digest_of, seconds
from citadel_gateway.core.health import BROKEN, SERVED
from citadel_gateway.core.limits import Denied, Limiter, Reservation
from citadel_gateway.core.limitstore import MemoryStore
from citadel_gateway.core.ticket import (
    ADMITTED,
    FIRST_BYTE,
    QUEUED,
    RECEIVED,
    ROUTED,
    SENT,
    SETTLED,
    Line,
    Ticket,
)
from citadel_gateway.errors import Refusal
from citadel_gateway.metrics import Metrics
from citadel_gateway.records import Opened, Progress, Record, Settled
from citadel_gateway.settings import (
    Address,
    Gateway,
    Hardware,
    Key,
    Limits,
    Listen,
    Model,
    Policies,
    Policy,
    Price,
    Tier,
    User,
)
from citadel_gateway.settings import Admission as AdmissionSettings
from citadel_gateway.snapshot import Snapshot
from citadel_gateway.worker.asking import NO_HINTS, Asking, Hints
from citadel_gateway.worker.usage import Meter

from gateway.tests.site import digest

BODY = b'{"model":"one","stream":true,"messages":[{"role":"user","content":"0123456789"}]}'
SETTINGS = Gateway(
    host="h",
    listen=Listen(),
    control_socket="/run/c",
    run_dir="/run",
    state_dir="/state",
    models_file="/m",
    keys_file="/k",
    limits=Limits(inflight_per_model=3, n=4, max_tokens=1000),
    admission=AdmissionSettings(queue=2, max_wait=10.0),
)
POLICIES = Policies(
    tiers=(
        Tier("free"),
        Tier("small", requests_per_minute=2),
        Tier("tokens", tokens_per_minute=2000, max_output_tokens=100),
        Tier("cheap", tokens_per_day=200, overage="degrade", degrade_to="other-one"),
        Tier("bill", tokens_per_day=200, overage="bill"),
        Tier("few-models", models=("other-one",)),
    ),
    policies=(Policy("auto", models=("one",)),),
    hardware=Hardware(usd=31_557_600 * 4, lifetime_years=4.0),  # one dollar a second
)


class Fixture:
    """A core and a clock; `Waits` stands for an exchange."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.records: list[Record] = []
        self.metrics = Metrics()
        self.now = 1.0
        self.limiter = Limiter(MemoryStore(lambda: 1000.0), "w", lambda: self.now, lambda: 1000.0)
        self.core = Core(
            SETTINGS,
            7,
            metrics=self.metrics,
            record=self.lines.append,
            journal=self.records.append,
            limiter=self.limiter,
            wall=lambda: 1000.0,
        )
        self.apply()

    def apply(self, *ports: int, draining: bool = False, slots: int = 0, **more: Any) -> None:
        backends = tuple(Address("h", port) for port in ports or (1, 2))
        one = Model("one", backends, aliases=("uno",), slots=slots, price=Price(share=1.0), **more)
        models = (one, Model("other-one", (Address("h", 9),)))
        tiers = [tier.name for tier in POLICIES.tiers]
        keys = [Key(f"k-{name}", digest(f"sk-{name}"), user=name, use_case="support") for name in tiers]
        keys += [Key("few", digest("sk-few"), models=("other-one",)), Key("old", digest("sk-old"), expires=999.0)]
        keys += [Key("peer", digest("sk-peer"), scopes=("peer",)), Key("look", digest("sk-look"), scopes=("read",))]
        users = tuple(User(name, name) for name in tiers)
        drained = {"one": ["operator"]} if draining else {}
        self.core.apply(Snapshot(7, models, tuple(keys), drained, users, POLICIES), now=0.0)

    def asked(self, body: bytes = BODY, tier: str = "free", hints: Hints = NO_HINTS, endpoint: str = "chat") -> Ticket:
        """As the gate does it."""
        ticket = self.core.receive(b"", endpoint, b"/v1/chat/completions", "10.0.0.1", self.now, len(body))
        ticket.key = key = self.core.authenticate(f"Bearer sk-{tier}".encode())
        ticket.asks, ticket.metered = True, not key.peer
        asking = Asking(body, endpoint)
        asking.describe(ticket, hints, SETTINGS.limits, 0)
        self.core.resolve(ticket, self.now)
        assert ticket.model is not None
        ticket.tokens = asking.reservation(ticket, ticket.model) if key.person.tokens_limited else 0
        ticket.meter = asking.meter()
        return ticket

    def reserve(self, ticket: Ticket) -> None:
        def later(found: Reservation | Denied) -> None:
            raise AssertionError("memory answers at once")

        found = self.core.reserve(ticket, self.now, later)
        assert found is not None
        self.core.reserved(ticket, found, self.now)

    def admitted(self, body: bytes = BODY, tier: str = "free", **more: Any) -> Ticket:
        ticket = self.asked(body, tier, **more)
        self.reserve(ticket)
        assert self.core.enter(ticket, Waits(), self.now)
        return ticket

    def route(self, ticket: Ticket) -> int:
        backend = self.core.route(ticket, self.now)
        assert backend is not None
        return backend.port

    def settled(self) -> list[Settled]:
        return [record for record in self.records if isinstance(record, Settled)]

    def requests(self) -> dict[tuple[str, ...], float]:
        return self.counter("llm_gateway_requests_total")

    def counter(self, name: str) -> dict[tuple[str, ...], float]:
        self.metrics.collect()
        return self.metrics.counters[name]


class Waits:
    def __init__(self) -> None:
        self.calls: list[Refusal | None] = []

    def go(self) -> None:
        self.calls.append(None)

    def refused(self, refusal: Refusal) -> None:
        self.calls.append(refusal)


@pytest.fixture
def of() -> Fixture:
    return Fixture()


def test_the_states_of_a_request(of: Fixture) -> None:
    core = of.core
    ticket = of.asked()
    assert (ticket.state, core.open) == (RECEIVED, 1)
    of.reserve(ticket)
    assert core.enter(ticket, Waits(), 1.0)
    assert ticket.state == ADMITTED
    backend = core.route(ticket, 1.0)
    assert backend is not None
    assert (ticket.state, backend.inflight) == (ROUTED, 1)
    core.sent(ticket, 1.5)
    assert ticket.state == SENT
    core.first_byte(ticket, 2.0)
    assert ticket.state == FIRST_BYTE
    assert core.settle(ticket, 3.0, 200, "ok", verdict=SERVED)
    assert (ticket.state, core.open, backend.inflight) == (SETTLED, 0, 0)
    (line,) = of.lines
    path, size = "/v1/chat/completions", len(BODY)
    assert line == Line(1002.0, ticket.id, "k-free", "one", path, 200, True, size, 0, 1000.0, 2000.0, "10.0.0.1", "ok")


def test_a_request_is_settled_once(of: Fixture) -> None:
    ticket = of.admitted()
    of.route(ticket)
    assert of.core.settle(ticket, 2.0, 200, "ok")
    assert not of.core.settle(ticket, 3.0, 499, "client_closed", "client_closed")
    assert len(of.lines) == len(of.settled()) == 1
    assert of.requests() == {("one", "chat", "200"): 1}
    assert of.core.catalogue.models["one"].inflight == 0
    assert not of.core.running


def test_what_the_journal_is_told(of: Fixture) -> None:
    hints = Hints(session="s", tag="t", traceparent="00-x", use_case="")
    ticket = of.admitted(b'{"model":"uno","messages":[{"role":"user","content":"hello"}]}', hints=hints)
    port = of.route(ticket)
    of.core.sent(ticket, 1.0)
    opened = of.records[0]
    assert isinstance(opened, Opened)
    assert (opened.user, opened.key, opened.tier, opened.model, opened.asked) == (
        "free",
        "k-free",
        "free",
        "one",
        "uno",
    )
    of.core.note_progress(1.5)
    assert len(of.records) == 1
    of.core.note_progress(3.0)
    progress = of.records[1]
    assert isinstance(progress, Progress)
    (row,) = progress.requests
    assert (row.id, row.input_tokens, row.output_tokens, row.engine_seconds) == (opened.id, 0, 0, 2.0)
    ticket.meter.reply(b'{"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}')
    of.core.first_byte(ticket, 3.0)
    of.core.settle(ticket, 3.0, 200, "ok", verdict=SERVED)
    (found,) = of.settled()
    assert (found.id, found.host, found.worker, found.at) == (opened.id, "h", 7, 1000.0)
    assert (found.input_tokens, found.output_tokens, found.exact) == (5, 3, True)
    assert (found.session, found.use_case, found.why.tag, found.traceparent) == ("s", "support", "t", "00-x")
    assert (found.backend, found.tries, found.engine_seconds) == (f"h:{port}", 1, 2.0)
    assert found.cost_usd == pytest.approx(2.0)
    assert found.cost == {"hardware": pytest.approx(2.0)}
    assert of.counter("llm_gateway_tokens_total") == {("one", "input"): 5, ("one", "output"): 3}
    assert of.counter("llm_gateway_cost_usd_total")["one", "hardware"] == pytest.approx(2.0)
    assert of.counter("llm_gateway_requests_by_tier_total") == {("free", "ok"): 1}


def test_two_requests_share_the_time_of_their_engine(of: Fixture) -> None:
    of.apply(1)
    first, second = of.admitted(), of.admitted()
    of.route(first)
    of.now = 3.0
    of.route(second)
    for ticket in (first, second):
        of.core.sent(ticket, 3.0)
        of.core.settle(ticket, 5.0, 200, "ok", verdict=SERVED)
    assert [found.engine_seconds for found in of.settled()] == [3.0, 1.0]


def test_a_stream_that_was_left_is_counted_so_far(of: Fixture) -> None:
    ticket = of.admitted()
    of.route(ticket)
    of.core.sent(ticket, 1.0)
    ticket.meter.stream(b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":4,"completion_tokens":2}}\n\n')
    of.core.first_byte(ticket, 2.0)
    of.core.settle(ticket, 3.0, 499, "client_closed", "client_closed")
    (found,) = of.settled()
    assert (found.input_tokens, found.output_tokens, found.exact) == (4, 2, False)


def test_an_answer_of_which_nothing_was_seen_is_guessed(of: Fixture) -> None:
    for began, ended, outcome in ((1.0, 3.0, "ok"), (3.0, 5.0, "client_closed"), (5.0, 7.0, "upstream_error")):
        of.now = began
        ticket = of.admitted(b'{"model":"other-one","prompt":"12345678"}')
        of.route(ticket)
        of.core.sent(ticket, began)
        if outcome == "ok":
            ticket.meter.reply(b'{"usage":{"prompt_tokens":5,"completion_tokens":20}}')
            of.core.first_byte(ticket, ended)
        of.core.settle(ticket, ended, 200 if outcome == "ok" else 499, outcome, verdict=SERVED * (outcome == "ok"))
    assert [(found.input_tokens, found.output_tokens, found.exact) for found in of.settled()] == [
        (5, 20, True),
        (2, 20, False),
        (0, 0, False),
    ]


def test_a_second_try_goes_elsewhere_and_frees_the_first(of: Fixture) -> None:
    ticket = of.admitted()
    first = of.core.route(ticket, 1.0)
    assert of.core.alternative(ticket, 1.0)
    of.core.leave(ticket, 1.0, BROKEN)
    second = of.core.route(ticket, 1.0)
    assert first is not None
    assert second is not None
    assert first is not second
    assert (first.inflight, second.inflight) == (0, 1)
    assert not of.core.alternative(ticket, 1.0)
    of.core.leave(ticket, 1.0, BROKEN)
    assert of.core.route(ticket, 1.0) is None
    assert not of.core.fall_back(ticket, 1.0)
    assert (of.core.unavailable(ticket).status, of.core.unavailable(ticket).code) == (503, "model_unavailable")
    of.core.settle(ticket, 2.0, 503, "unavailable")
    assert second.inflight == 0
    assert sum(isinstance(record, Opened) for record in of.records) == 1


def test_another_model_takes_over(of: Fixture) -> None:
    of.apply(1, fallback=("other-one",))
    ticket = of.admitted()
    of.route(ticket)
    of.core.leave(ticket, 1.0, BROKEN)
    assert of.core.alternative(ticket, 1.0)
    assert of.core.route(ticket, 1.0) is None
    assert of.core.fall_back(ticket, 1.0)
    assert of.core.catalogue.models["one"].inflight == 0
    assert of.core.enter(ticket, Waits(), 1.0)
    assert of.route(ticket) == 9
    of.core.settle(ticket, 2.0, 200, "ok")
    (found,) = of.settled()
    assert (found.model, found.asked, found.why.fallback_from, found.tries) == ("other-one", "one", "one", 2)
    assert of.counter("llm_gateway_fallbacks_total") == {("one", "other-one"): 1}


def test_a_limit_of_requests_in_flight(of: Fixture) -> None:
    tickets = [of.admitted() for _ in range(3)]
    with pytest.raises(Refusal) as refused:
        of.admitted()
    assert refused.value.status == 503
    of.core.settle(tickets[0], 2.0, 200, "ok")
    of.admitted()
    assert of.counter("llm_gateway_shed_total") == {("one", "limit"): 1}


def test_a_wait_for_a_slot(of: Fixture) -> None:
    of.apply(1, slots=1)
    first = of.admitted()
    waiters = [Waits(), Waits()]
    tickets = [of.asked(), of.asked()]
    for ticket, waiter in zip(tickets, waiters, strict=True):
        of.reserve(ticket)
        assert not of.core.enter(ticket, waiter, 1.0)
        assert ticket.state == QUEUED
    assert of.core.gauges(0)["llm_gateway_queue_length"]["one",] == 2
    of.core.settle(tickets[1], 1.5, 499, "client_closed")  # leaves while it waits
    of.core.settle(first, 2.0, 200, "ok")
    of.core.gatekeeper.tick(2.0)
    assert (len(waiters[0].calls), len(waiters[1].calls)) == (1, 0)
    of.core.admitted(tickets[0], 2.0)
    of.core.settle(tickets[0], 3.0, 200, "ok")
    assert [found.queue_seconds for found in of.settled()] == [0.0, 0.0, 1.0]
    assert of.core.catalogue.models["one"].inflight == 0


def test_a_full_queue(of: Fixture) -> None:
    of.apply(1, slots=1)
    of.admitted()
    for _ in range(2):
        ticket = of.asked()
        of.reserve(ticket)
        of.core.enter(ticket, Waits(), 1.0)
    late = of.asked()
    of.reserve(late)
    with pytest.raises(Refusal) as refused:
        of.core.enter(late, Waits(), 1.0)
    assert refused.value.retry_after >= 1
    of.core.settle(late, 1.0, refused.value.status, refused.value.outcome)
    (found,) = of.settled()
    assert found.why.limit.startswith("queue_")
    assert found.why.retry_after >= 1


def test_another_model_takes_what_a_full_queue_does_not(of: Fixture) -> None:
    of.apply(1, slots=1, fallback=("other-one",))
    of.admitted()
    for _ in range(2):
        ticket = of.asked()
        of.reserve(ticket)
        assert not of.core.enter(ticket, Waits(), 1.0)
    late = of.admitted()
    assert of.route(late) == 9
    of.core.settle(late, 2.0, 200, "ok")
    (found,) = of.settled()
    assert (found.model, found.why.fallback_from) == ("other-one", "one")
    assert found.why.limit.startswith("queue_")


def test_limits_of_requests(of: Fixture) -> None:
    tickets = [of.admitted(tier="small") for _ in range(2)]
    assert b"x-ratelimit-remaining-requests: 0\r\n" in tickets[1].lines
    ticket = of.asked(tier="small")
    with pytest.raises(Refusal) as refused:
        of.reserve(ticket)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert 55 <= refused.value.retry_after <= 61
    of.core.settle(ticket, 1.0, 429, refused.value.outcome)
    (found,) = of.settled()
    assert (found.outcome, found.why.limit, found.why.remaining) == (
        "limited",
        "requests_per_minute",
        {"requests_per_minute": 0},
    )
    assert of.counter("llm_gateway_ratelimited_total") == {("one", "requests_per_minute"): 1}


def test_limits_of_tokens_are_reserved_and_settled(of: Fixture) -> None:
    ticket = of.admitted(tier="tokens")
    assert ticket.reservation.tokens == ticket.tokens == len(BODY) + 100
    of.route(ticket)
    of.core.sent(ticket, 1.0)
    ticket.meter.stream(b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":6}}\n\n')
    of.core.first_byte(ticket, 1.0)
    of.core.settle(ticket, 1.1, 200, "ok")
    person = of.core.authenticate(b"Bearer sk-tokens").person
    assert of.limiter.remaining(person)["tokens_per_minute"] == 1990
    refused = of.admitted(tier="tokens")
    of.core.settle(refused, 1.2, 503, "unavailable")  # nothing was generated
    assert of.limiter.remaining(person)["tokens_per_minute"] == 1990
    large = of.asked(b'{"model":"one","max_tokens":900,"n":4,"messages":[]}', tier="tokens")
    with pytest.raises(Refusal, match="more than the whole limit") as denied:
        of.reserve(large)
    assert (denied.value.status, denied.value.code, denied.value.retry_after) == (429, "request_too_large", 0)


@pytest.mark.parametrize("tier", ["cheap", "bill"])
def test_a_spent_quota(of: Fixture, tier: str) -> None:
    spent = of.admitted(b'{"model":"one","max_tokens":100}', tier=tier)
    of.route(spent)
    of.core.sent(spent, 1.0)
    spent.meter = Meter("nothing")
    spent.meter.stream(b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":100}}\n\n')
    of.core.first_byte(spent, 1.0)
    of.core.settle(spent, 1.0, 200, "ok")
    ticket = of.admitted(b'{"model":"one","max_tokens":50}', tier=tier)
    of.route(ticket)
    of.core.settle(ticket, 1.0, 200, "ok")
    found = of.settled()[-1]
    if tier == "bill":
        assert (found.model, found.overage) == ("one", True)
    else:
        assert (found.model, found.why.degraded_from) == ("other-one", "one")


def test_a_refused_request_takes_no_place(of: Fixture) -> None:
    of.apply(draining=True)
    with pytest.raises(Refusal, match="being restarted"):
        of.asked()
    assert of.core.catalogue.models["one"].inflight == 0


def test_what_is_under_way_survives_a_new_snapshot(of: Fixture) -> None:
    of.apply(1, 3)
    of.core.catalogue.models["one"].backends[1].health.up = False
    ticket = of.admitted()
    backend = of.core.route(ticket, 1.0)
    assert backend is not None
    of.apply(1, 4)
    assert of.core.catalogue.models["one"].inflight == 1
    assert of.core.catalogue.models["one"].backends[0] is backend
    of.core.settle(ticket, 2.0, 200, "ok")
    assert backend.inflight == 0
    assert of.core.catalogue.models["one"].inflight == 0


def test_keys(of: Fixture) -> None:
    for bad in (b"", b"Bearer", b"Bearer nope", b"Basic sk-free", b"sk-free", b"Bearer sk-old"):
        with pytest.raises(Refusal) as refused:
            of.core.authenticate(bad)
        assert refused.value.status == 401
    assert of.core.known(digest_of(b"bearer sk-free ")).id == "k-free"
    with pytest.raises(Refusal) as scope:
        of.core.authenticate(b"Bearer sk-look")
    assert scope.value.status == 403
    for tier in ("few", "few-models"):
        with pytest.raises(Refusal) as refused:
            of.asked(tier=tier)
        assert refused.value.status == 403
    few = of.core.authenticate(b"Bearer sk-few")
    assert [name for name, model in of.core.catalogue.models.items() if of.core.visible(few, model)] == ["other-one"]
    assert not of.core.policies(few)
    assert list(of.core.policies(of.core.authenticate(b"Bearer sk-free"))) == ["auto"]


def test_another_hosts_gateway_is_not_metered(of: Fixture) -> None:
    of.apply(1, 2, slots=1)
    address = of.core.catalogue.models["one"].backends
    address[0].gateway = True
    for _ in range(3):
        ticket = of.admitted(tier="peer")
        assert of.route(ticket) == 2
        of.core.settle(ticket, 2.0, 200, "ok")
    assert not of.records
    assert not of.requests()
    assert len(of.lines) == 3


def test_a_body_that_is_no_request_is_in_the_ledger_of_who_sent_it(of: Fixture) -> None:
    ticket = of.core.receive(b"", "chat", b"/v1/chat/completions", "c", 1.0, 3)
    ticket.key, ticket.asks = of.core.authenticate(b"Bearer sk-free"), True
    of.core.settle(ticket, 1.0, 400, "refused")
    (found,) = of.settled()
    assert (found.user, found.status, found.model, found.outcome) == ("free", 400, "", "refused")
    stranger = of.core.receive(b"", "chat", b"/v1/chat/completions", "c", 1.0, 3)
    of.core.settle(stranger, 1.0, 401, "refused")
    assert len(of.settled()) == 1


def test_a_probe_is_a_request_of_the_gateways_own(of: Fixture) -> None:
    of.core.note_probe(of.core.catalogue.models["one"].backends[0], 3, 1, 0.5)
    (found,) = of.settled()
    assert (found.user, found.input_tokens, found.output_tokens) == ("system", 3, 1)
    assert found.cost_usd == pytest.approx(0.5)


def test_a_clock_that_is_set_back_changes_no_duration(of: Fixture) -> None:
    ticket = of.admitted()
    of.core.wall = lambda: 1000.0 - 3600.0
    of.route(ticket)
    of.core.sent(ticket, 1.0)
    of.core.settle(ticket, 4.0, 499, "client_closed")
    (found,) = of.settled()
    assert (found.at, found.total_seconds, found.engine_seconds) == (1000.0, 3.0, 3.0)


def test_ids(of: Fixture) -> None:
    tickets = [of.core.receive(offered, "chat", b"/", "c", 0.0, 0) for offered in (b"", b"a b", b"x" * 129)]
    assert len({ticket.request_id for ticket in tickets}) == 3
    good = of.core.receive(b"good-1.2:3_4", "chat", b"/", "c", 0.0, 0)
    assert good.request_id == b"good-1.2:3_4"
    again = of.core.receive(b"good-1.2:3_4", "chat", b"/", "c", 0.0, 0)
    assert again.id != good.id


def test_an_unknown_model_and_an_odd_status_stay_in_closed_sets(of: Fixture) -> None:
    with pytest.raises(Refusal, match="does not exist"):
        of.asked(b'{"model":"x\\"}"}')
    ticket = of.core.receive(b"", "chat", b"/p", "c", 1.0, 0)
    of.core.settle(ticket, 1.0, 404, "refused")
    odd = of.admitted()
    of.core.settle(odd, 1.0, 777, "error")
    assert of.requests() == {("other", "chat", "404"): 1, ("one", "chat", "other"): 1}


def test_retry_after_is_never_too_early() -> None:
    assert [seconds(value) for value in (0.01, 1.0, 1.01, 59.2)] == [1, 1, 2, 60]
