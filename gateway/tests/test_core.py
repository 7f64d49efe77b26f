"""The decision core alone: no socket, no loop, the clock passed in."""

import pytest
from citadel_gateway.core.core import ADMITTED, FIRST_BYTE, RECEIVED, ROUTED, SENT, SETTLED, Core, Ticket, with_model
from citadel_gateway.errors import Refusal
from citadel_gateway.metrics import Metrics
from citadel_gateway.settings import Address, Key, Model
from citadel_gateway.snapshot import Snapshot
from citadel_gateway.worker.accesslog import Line

from gateway.tests.site import digest

BODY = b'{"model":"one","stream":true}'


class Fixture:
    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.metrics = Metrics()
        self.core = Core(
            probe_interval=5.0,
            inflight_per_model=3,
            metrics=self.metrics,
            record=self.lines.append,
            wall=lambda: 1000.0,
        )
        self.apply()

    def apply(self, *ports: int, draining: bool = False) -> None:
        backends = tuple(Address("h", port) for port in ports or (1, 2))
        models = (Model("one", backends, aliases=("uno",)), Model("other-one", (Address("h", 9),)))
        keys = (Key("k", digest("sk")), Key("few", digest("sk-few"), models=("other-one",)))
        self.core.apply(Snapshot(7, models, keys, {"one": ["operator"]} if draining else {}), now=0.0)

    def admitted(self, body: bytes = BODY) -> Ticket:
        ticket = self.core.receive(b"", "chat", b"/v1/chat/completions", "10.0.0.1", 1.0, len(body))
        self.core.admit(ticket, self.core.authenticate(b"Bearer sk"), body)
        return ticket

    def requests(self) -> dict[tuple[str, ...], float]:
        self.metrics.collect()
        return self.metrics.counters["llm_gateway_requests_total"]


@pytest.fixture
def of() -> Fixture:
    return Fixture()


def test_the_states_of_a_request(of: Fixture) -> None:
    core = of.core
    ticket = core.receive(b"id-1", "chat", b"/p", "10.0.0.1", 1.0, len(BODY))
    assert (ticket.state, core.open) == (RECEIVED, 1)
    core.admit(ticket, core.authenticate(b"bearer sk"), BODY)
    assert ticket.state == ADMITTED
    backend = core.route(ticket)
    assert (ticket.state, backend.inflight) == (ROUTED, 1)
    core.sent(ticket, 1.5)
    assert ticket.state == SENT
    core.first_byte(ticket, 2.0)
    assert ticket.state == FIRST_BYTE
    assert core.settle(ticket, 3.0, 200, "ok")
    assert (ticket.state, core.open, backend.inflight) == (SETTLED, 0, 0)
    (line,) = of.lines
    assert line == Line(1000.0, "id-1", "k", "one", "/p", 200, True, 29, 0, 1000.0, 2000.0, "10.0.0.1", "ok")


def test_a_request_is_settled_once(of: Fixture) -> None:
    ticket = of.admitted()
    of.core.route(ticket)
    assert of.core.settle(ticket, 2.0, 200, "ok")
    assert not of.core.settle(ticket, 3.0, 499, "client_closed", "client_closed")
    assert len(of.lines) == 1
    assert of.requests() == {("one", "chat", "200"): 1}
    assert of.core.catalogue.models["one"].inflight == 0


def test_the_least_busy_backend_is_chosen(of: Fixture) -> None:
    ports = [of.core.route(of.admitted()).port for _ in range(3)]
    assert sorted(ports[:2]) == [1, 2]
    of.core.catalogue.models["one"].backends[0].health.up = False
    of.core.inflight_per_model = 10
    assert of.core.route(of.admitted()).port == 2


def test_a_second_try_goes_elsewhere_and_frees_the_first(of: Fixture) -> None:
    ticket = of.admitted()
    first = of.core.route(ticket)
    second = of.core.route(ticket)
    assert first is not second
    assert (first.inflight, second.inflight) == (0, 1)
    with pytest.raises(Refusal) as refused:
        of.core.route(ticket)
    assert (refused.value.status, refused.value.code) == (503, "model_unavailable")
    of.core.settle(ticket, 2.0, 503, "unavailable")
    assert second.inflight == 0


def test_a_limit_of_requests_in_flight(of: Fixture) -> None:
    tickets = [of.admitted() for _ in range(3)]
    with pytest.raises(Refusal, match="at its limit"):
        of.admitted()
    of.core.settle(tickets[0], 2.0, 200, "ok")
    of.admitted()


def test_a_refused_request_takes_no_place(of: Fixture) -> None:
    of.apply(draining=True)
    ticket = of.core.receive(b"", "chat", b"/p", "c", 1.0, 0)
    with pytest.raises(Refusal, match="being restarted"):
        of.core.admit(ticket, of.core.authenticate(b"Bearer sk"), BODY)
    of.core.settle(ticket, 1.1, 503, "refused")
    assert of.core.catalogue.models["one"].inflight == 0
    assert of.requests() == {("one", "chat", "503"): 1}


def test_what_is_under_way_survives_a_new_snapshot(of: Fixture) -> None:
    ticket = of.admitted()
    of.core.catalogue.models["one"].backends[1].inflight = 5
    backend = of.core.route(ticket)
    of.apply(1, 3)
    assert of.core.catalogue.models["one"].inflight == 1
    assert of.core.catalogue.models["one"].backends[0] is backend
    of.core.settle(ticket, 2.0, 200, "ok")
    assert backend.inflight == 0


def test_keys(of: Fixture) -> None:
    for bad in (b"", b"Bearer", b"Bearer nope", b"Basic sk", b"sk"):
        with pytest.raises(Refusal) as refused:
            of.core.authenticate(bad)
        assert refused.value.status == 401
    few = of.core.authenticate(b"Bearer sk-few")
    ticket = of.core.receive(b"", "chat", b"/p", "c", 1.0, 0)
    with pytest.raises(Refusal) as refused:
        of.core.admit(ticket, few, BODY)
    assert refused.value.status == 403


def test_ids(of: Fixture) -> None:
    made = [of.core.receive(offered, "chat", b"/", "c", 0.0, 0).request_id for offered in (b"", b"a b", b"x" * 129)]
    assert len(set(made)) == 3
    assert of.core.receive(b"good-1.2:3_4", "chat", b"/", "c", 0.0, 0).request_id == b"good-1.2:3_4"


def test_an_unknown_model_and_an_odd_status_stay_in_closed_sets(of: Fixture) -> None:
    ticket = of.core.receive(b"", "chat", b"/p", "c", 1.0, 0)
    with pytest.raises(Refusal):
        of.core.admit(ticket, of.core.authenticate(b"Bearer sk"), b'{"model":"x\\"}"}')
    of.core.settle(ticket, 1.0, 404, "refused")
    odd = of.admitted()
    of.core.settle(odd, 1.0, 777, "error")
    assert of.requests() == {("other", "chat", "404"): 1, ("one", "chat", "other"): 1}


def test_another_name_in_the_same_body() -> None:
    body = b'{ "a": [1, 2.50], "model" :"uno", "b": {"model": "uno"}, "c": "\xc3\xa4\\u0041" }'
    assert with_model(body, "one") == b'{"a":[1, 2.50],"model":"one","b":{"model": "uno"},"c":"\xc3\xa4\\u0041"}'
