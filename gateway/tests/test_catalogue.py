"""Models, backends and keys by name."""

from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.core.board import Board
from citadel_gateway.core.catalogue import Backend, Catalogue, Key, PeakEwma
from citadel_gateway.core.health import NEUTRAL, SERVED, Health
from citadel_gateway.settings import Address, Model, Policies, Routing
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.snapshot import Snapshot


def snapshot(*models: Model, draining: dict[str, list[str]] | None = None) -> Snapshot:
    return Snapshot(5, models, (), draining or {})


def test_a_model_is_found_by_name_and_alias() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1),), aliases=("x", "y"), context=10, description="d")), 0.0)
    assert found.by_name["x"] is found.by_name["a"]
    model = found.models["a"]
    assert (model.context, model.description, model.state(), found.created) == (10, "d", "up", 5)


def test_the_state_of_a_model() -> None:
    found = Catalogue(5.0)
    entry = Model("a", (Address("h", 1), Address("h", 2)))
    found.apply(snapshot(entry), 0.0)
    model = found.models["a"]
    model.backends[0].health.failed(0.0)
    assert model.state() == "up"
    model.backends[1].health.failed(0.0)
    assert model.state() == "down"
    found.apply(snapshot(entry, draining={"a": ["engine"]}), 1.0)
    assert model.state() == "draining"
    assert not model.backends[0].health.up  # what was known is still known


def test_backends_that_are_gone_are_named() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1), Address("h", 2)))), 0.0)
    gone = found.apply(snapshot(Model("b", (Address("h", 2), Address("h", 3)))), 1.0)
    assert [backend.port for backend in gone] == [1]
    assert list(found.models) == ["b"]


def test_a_key_may_use_what_it_names() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1),), aliases=("x",)), Model("b", (Address("h", 2),))), 0.0)
    key = Key(KeyEntry("k", "0" * 64, models=("x",)))
    everything = Key(KeyEntry("all", "0" * 64, scopes=("metrics",)))
    assert key.may_use(found.models["a"])
    assert not key.may_use(found.models["b"])
    assert everything.may_use(found.models["b"])
    assert (key.inference, everything.inference) == (True, False)


def test_a_replica_keeps_its_state_when_its_weight_changes() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1),))), 0.0)
    backend = found.models["a"].backends[0]
    assert found.models["a"].single is backend
    entry = Model("a", (Address("h", 1, 2.5), Address("h", 2)), slots=4, fallback=("b",), capabilities=("chat",))
    policies = Policies(routing=Routing(slow_start=7.0))
    assert found.apply(Snapshot(0, (entry,), (), {}, (), policies), 50.0) == []
    model = found.models["a"]
    assert (model.backends[0], model.single, model.slots, model.fallback) == (backend, None, 4, ("b",))
    assert (backend.weight, backend.health.routing.slow_start, backend.capabilities) == (2.5, 7.0, ("chat",))
    assert (backend.health.ramp(50.0), model.backends[1].health.ramp(50.0)) == (1.0, 0.1)  # who joins starts slowly


def test_another_hosts_gateway_is_a_backend_of_each_model() -> None:
    found = Catalogue(5.0)
    there = Address("h2", 8000, gateway=True)
    found.apply(snapshot(Model("a", (Address("h", 1), there)), Model("b", (Address("h", 2), there))), 0.0)
    one, two = found.models["a"].backends[1], found.models["b"].backends[1]
    assert one is not two
    assert (one.gateway, one.model, two.model, one.label) == (True, "a", "b", "h2:8000")
    one.health.failed(1.0)
    assert two.health.up
    assert one.row is not two.row


def test_a_server_of_several_models_is_a_backend_of_each() -> None:
    found = Catalogue(5.0)
    there = Address("h", 11434, shared=True, health="/v1/models")
    found.apply(snapshot(Model("a", (there,)), Model("b", (there,))), 0.0)
    one, two = found.models["a"].backends[0], found.models["b"].backends[0]
    assert (one.model, two.model, one.path, one.label) == ("a", "b", "/v1/models", "h:11434")
    assert found.apply(snapshot(Model("a", (there,))), 1.0) == [two]


def test_an_engine_that_stops_leaves_the_model_to_other_hosts() -> None:
    found = Catalogue(5.0)
    entry = Model("a", (Address("h", 1), Address("h2", 8000, gateway=True)))
    found.apply(snapshot(entry, draining={"a": ["engine"]}), 0.0)
    model = found.models["a"]
    here, there = model.backends
    assert (model.state(), model.local_state()) == ("up", "draining")
    assert (here.health.usable(1.0), there.health.usable(1.0), model.usable(1.0)) == (False, True, True)
    found.apply(snapshot(entry, draining={"a": ["engine", "operator"]}), 0.0)
    assert (model.state(), model.local_state(), here.health.usable(1.0)) == ("draining", "draining", True)
    found.apply(snapshot(entry), 0.0)
    assert (model.local_state(), here.health.usable(1.0)) == ("up", True)
    here.health.failed(1.0)
    assert (model.state(), model.local_state()) == ("up", "down")


# what is measured -----------------------------------------------------------------------------------------------------
def backend(board: Board | None = None, **more: Any) -> Backend:
    return Backend("h", 1, Health(5.0, 0.0), board=board, **more)


def test_bad_news_at_once_and_good_news_slowly() -> None:
    average = PeakEwma()
    assert average.read(5.0) == 0.0
    average.observe(1.0, 10.0)
    average.observe(4.0, 10.1)
    assert average.value == 4.0
    average.observe(1.0, 10.2)
    assert 3.9 < average.value < 4.0
    average.observe(1.0, 60.0)
    assert 1.0 < average.value < 1.1
    assert average.read(60.0) == average.value
    assert average.read(200.0) < 0.2


def test_the_engines_clock_is_shared_by_its_requests() -> None:
    one = backend()
    first = one.begin(10, 100.0)
    second = one.begin(10, 104.0)  # the first had it alone for four seconds
    assert one.end(10, 106.0, 104.0, SERVED) - second == 1.0
    assert one.end(10, 109.0, 100.0, SERVED) - first == 8.0  # 4 + 2/2 + 3
    one.begin(10, 200.0)
    assert one.spent == 8.0  # an idle engine's clock stands still
    assert one.inflight == 1
    assert one.tokens == 10


def test_shares_add_up_over_workers(tmp_path: Path) -> None:
    boards = [Board(tmp_path, number, 2) for number in (1, 2)]
    one, two = (backend(board) for board in boards)

    def tick(now: float) -> None:
        for board, each in zip(boards, (one, two), strict=True):
            board.tick(now)
            each.tick(now)

    tick(10.0)
    tick(10.0)
    first = one.begin(5, 10.0)
    second = two.begin(7, 10.0)
    assert (one.load(), two.load(), one.requests()) == (12, 12, 2)
    for step in range(1, 41):
        tick(10.0 + step / 10)
    shares = one.end(5, 14.0, 10.0, SERVED) - first, two.end(7, 14.0, 10.0, SERVED) - second
    assert shares == pytest.approx((2.0, 2.0), abs=0.2)
    assert (one.load(), two.requests()) == (0, 0)


def test_the_speed_of_a_model() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1),))), 0.0)
    model = found.models["a"]
    assert (model.speed(), model.load()) == (0.0, 0.0)
    one = model.backends[0]
    one.begin(100, 0.0)
    one.begin(50, 0.0)
    assert model.load() == 150.0
    one.end(100, 10.0, 0.0, SERVED, 10.0, 300)
    one.end(50, 10.0, 0.0, SERVED, 10.0, 200)
    assert model.speed() == 50.0
    assert one.per_token.value == 0.05
    one.made *= 1000
    one.tick(11.0)
    assert model.speed() == pytest.approx(50_000, rel=0.1)
    assert one.made == 250_000
    one.health.failed(11.0)
    assert model.load() == 0.0


def test_an_engine_that_accepts_and_says_nothing_is_doubted() -> None:
    one = backend()
    one.tick(100.0)
    one.begin(10, 100.0)
    one.tick(104.9)
    assert not one.health.must_generate()
    one.tick(105.1)
    assert one.health.must_generate()
    one.heard(105.2)
    one.tick(105.3)
    assert not one.health.must_generate()
    one.tick(110.3)
    assert one.health.must_generate()


def test_one_that_usually_takes_long_is_doubted_later() -> None:
    one = backend()
    began = 100.0
    one.begin(10, began)
    one.first_byte(2.0, 102.0)
    one.end(10, 102.0, began, NEUTRAL)
    one.begin(10, 200.0)
    one.tick(219.0)
    assert not one.health.must_generate()
    one.tick(221.0)
    assert one.health.must_generate()


def test_a_model_is_usable_while_one_of_its_replicas_is() -> None:
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1), Address("h", 2)))), 0.0)
    model = found.models["a"]
    model.backends[0].health.failed(1.0)
    assert model.usable(1.0)
    model.backends[1].health.open(1.0)
    assert not model.usable(1.0)
    assert model.usable(7.0)
