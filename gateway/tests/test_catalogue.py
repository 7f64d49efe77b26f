"""Models, backends and keys by name."""

from citadel_gateway.core.catalogue import Catalogue, KeyRing
from citadel_gateway.settings import Address, Key, Model
from citadel_gateway.snapshot import Snapshot

from gateway.tests.site import digest


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
    ring = KeyRing((Key("k", digest("s"), models=("x",)), Key("all", digest("t"), scopes=("metrics",))))
    found = Catalogue(5.0)
    found.apply(snapshot(Model("a", (Address("h", 1),), aliases=("x",)), Model("b", (Address("h", 2),))), 0.0)
    key, everything = ring.find(b"s"), ring.find(b"t")
    assert key is not None
    assert everything is not None
    assert key.may_use(found.models["a"])
    assert not key.may_use(found.models["b"])
    assert everything.may_use(found.models["b"])
    assert (key.inference, everything.inference) == (True, False)
    assert ring.find(b"u") is None
