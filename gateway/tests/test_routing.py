"""Which model and which replica, and what is kept about it."""

from collections import Counter
from typing import Any

import pytest
from citadel_gateway.core.catalogue import Backend, Catalogue, Key, Model
from citadel_gateway.core.health import BROKEN, SERVED
from citadel_gateway.core.routing import Query, RetryBudget, Router, mixed, stable_hash
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Address, Hardware, Policies, Policy, Price, Routing, Rule, Tier, When
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.settings import Model as ModelEntry
from citadel_gateway.snapshot import Snapshot
from hypothesis import given
from hypothesis import strategies as st

ALL = Key(KeyEntry("k", "0" * 64))


def entry(name: str, *ports: int, **more: Any) -> ModelEntry:
    return ModelEntry(name, tuple(Address("h", port) for port in ports), **more)


class Site:
    """A router with models. `ask` and `pick` are one request each, which is not begun."""

    def __init__(self, *models: ModelEntry, draining: tuple[str, ...] = (), **policies: Any) -> None:
        self.models = models
        self.catalogue = Catalogue(5.0)
        self.router = Router(self.catalogue)
        self.apply(draining, **policies)

    def apply(self, draining: tuple[str, ...] = (), **policies: Any) -> None:
        marks = {name: ["operator"] for name in draining}
        snapshot = Snapshot(0, self.models, (), marks, (), Policies(**policies))
        self.catalogue.apply(snapshot, 0.0)
        self.router.apply(snapshot, 0.0)

    def model(self, name: str) -> Model:
        return self.catalogue.models[name]

    def backend(self, port: int) -> Backend:
        return self.catalogue.backends[f"h:{port}"]

    def query(self, asked: str, **more: Any) -> Query:
        more.setdefault("key", ALL)
        return Query(asked, now=1.0, **more)

    def ask(self, asked: str, **more: Any) -> list[str]:
        return [model.name for model in self.router.resolve(self.query(asked, **more), 1.0)]

    def refusal(self, asked: str, **more: Any) -> tuple[int, str]:
        with pytest.raises(Refusal) as refused:
            self.ask(asked, **more)
        return refused.value.status, refused.value.code

    def pick(self, name: str, now: float = 1.0, **more: Any) -> int:
        query = self.query(name, **more)
        found = self.router.pick(self.router.resolve(query, now)[0], query, (), now)
        assert found is not None
        return found.port

    def picks(self, name: str, number: int = 300, **more: Any) -> Counter[int]:
        return Counter(self.pick(name, **more) for _ in range(number))


# names ---------------------------------------------------------------------------------------------------------------
def test_a_name_an_alias_and_no_name() -> None:
    site = Site(entry("a", 1, aliases=("x",)))
    assert site.ask("a") == site.ask("x") == ["a"]
    assert site.refusal("b") == (404, "model_not_found")


def test_what_a_key_and_a_tier_may_use() -> None:
    few = Key(KeyEntry("few", "0" * 64, models=("a",)))
    tiers = (Tier("small", models=("bee", "auto-is-no-model")), Tier("big"))
    site = Site(entry("a", 1), entry("b", 2, aliases=("bee",)), tiers=tiers)
    assert site.ask("a", key=few) == ["a"]
    assert site.refusal("b", key=few) == (403, "model_not_allowed")
    assert site.ask("b", tier="small") == ["b"]
    assert site.refusal("a", tier="small") == (403, "model_not_allowed")
    assert site.refusal("auto", key=few, tier="small") == (403, "model_not_allowed")
    assert site.ask("auto", key=few, tier="big") == ["a"]


def test_a_model_that_cannot_do_it() -> None:
    site = Site(entry("a", 1, capabilities=("chat",)), entry("e", 2, capabilities=("embeddings",)))
    assert site.ask("a", capability="chat") == ["a"]
    assert site.refusal("a", capability="embeddings") == (400, "endpoint_not_supported")
    assert site.ask("auto", capability="embeddings") == ["e"]
    assert site.refusal("auto", capability="responses") == (400, "endpoint_not_supported")
    assert site.refusal("auto", tools=True) == (400, "endpoint_not_supported")


def test_fallbacks_take_over_for_what_is_drained_or_down() -> None:
    site = Site(entry("a", 1, fallback=("b", "gone", "c")), entry("b", 2), entry("c", 3))
    assert site.ask("a") == ["a", "b", "c"]
    site.backend(1).health.failed(1.0)
    assert site.ask("a") == ["b", "c"]
    site.apply(draining=("b",))
    assert site.ask("a") == ["c"]
    site.backend(3).health.failed(1.0)
    assert site.refusal("a") == (503, "model_unavailable")
    assert site.refusal("b") == (503, "model_draining")
    few = Key(KeyEntry("few", "0" * 64, models=("a",)))
    assert site.refusal("a", key=few) == (503, "model_unavailable")  # a fallback is no way around a key


def test_what_is_kept_about_a_fallback() -> None:
    site = Site(entry("a", 1, fallback=("b",)), entry("b", 2))
    site.backend(1).health.failed(1.0)
    query = site.query("a", prompt_tokens=5, language="de", tag="t", tools=True, budget_usd=1.0)
    (model,) = site.router.resolve(query, 1.0)
    backend = site.router.pick(model, query, (), 1.0)
    why = site.router.why(query, model, backend)
    assert (why.fallback_from, why.prompt_tokens, why.language, why.tag, why.tools) == ("a", 5, "de", "t", True)
    assert [(one.model, one.backend, one.note) for one in why.candidates] == [("a", "", "down"), ("b", "h:2", "only")]


# policies ------------------------------------------------------------------------------------------------------------
def test_rules_in_their_order() -> None:
    rules = (
        Rule("long", ("big",), When(min_tokens=1000)),
        Rule("german", ("de",), When(languages=("DE",))),
        Rule("code", ("coder", "big"), When(tags=("code",), tools=True)),
        Rule("poor", ("small",), When(tiers=("basic",), max_tokens=100, stream=False)),
    )
    models = [entry(name, port) for port, name in enumerate(("big", "de", "coder", "small", "other"), 1)]
    policy = Policy("auto", ("best",), rules, ("other",), "first")
    site = Site(*models, policies=(policy,))
    assert site.ask("auto", prompt_tokens=1000, language="de") == ["big"]
    assert site.ask("best", language="de-AT") == ["de"]
    assert site.ask("auto", tag="code", tools=True) == ["coder", "big"]
    assert site.ask("auto", tag="code") == ["other"]
    assert site.ask("auto", tier="basic", prompt_tokens=100) == ["small"]
    assert site.ask("auto", tier="basic", prompt_tokens=101) == ["other"]
    assert site.ask("auto", tier="basic", stream=True) == ["other"]
    query = site.query("best", language="de")
    models_found = site.router.resolve(query, 1.0)
    why = site.router.why(query, models_found[0], site.backend(2))
    assert (why.policy, why.rule, why.choose) == ("auto", "german", "first")


def test_every_model_where_a_policy_names_none() -> None:
    site = Site(entry("a", 1), entry("b", 2))
    assert sorted(site.ask("auto")) == ["a", "b"]


def test_the_least_loaded_model() -> None:
    site = Site(
        entry("a", 1, fallback=("c",)), entry("b", 2), entry("c", 3), policies=(Policy("auto", models=("a", "b")),)
    )
    site.backend(1).begin(500, 1.0)
    assert site.ask("auto") == ["b", "a", "c"]
    site.backend(2).begin(900, 1.0)
    assert site.ask("auto") == ["a", "b", "c"]
    query = site.query("auto")
    site.router.resolve(query, 1.0)
    assert query.trail == [("a", "", 500.0, "best"), ("b", "", 900.0, "second_choice")]


def test_load_is_measured_by_places() -> None:
    site = Site(entry("a", 1, slots=4), entry("b", 2, slots=16))
    site.backend(1).begin(500, 1.0)
    site.backend(2).begin(900, 1.0)
    assert site.ask("auto") == ["b", "a"]


def test_the_fastest_model() -> None:
    site = Site(entry("a", 1), entry("b", 2), policies=(Policy("auto", choose="latency"),))
    for port, seconds in ((1, 0.5), (2, 0.2)):
        site.backend(port).first_byte(seconds, 1.0)
        site.backend(port).per_token.observe(seconds / 100, 1.0)
    assert site.ask("auto", stream=True) == ["b", "a"]
    for _ in range(4):
        site.backend(2).begin(1, 1.0)
    assert site.ask("auto") == ["a", "b"]


def test_the_cheapest_model_that_keeps_the_budget() -> None:
    dear, cheap = Price(output_mtoken=20.0, input_mtoken=2.0), Price(output_mtoken=1.0)
    site = Site(entry("dear", 1, price=dear), entry("cheap", 2, price=cheap), policies=(Policy("auto", choose="cost"),))
    assert site.ask("auto", output_tokens=1000) == ["cheap", "dear"]
    assert site.ask("auto", output_tokens=1000, budget_usd=0.002) == ["cheap"]
    assert site.refusal("auto", output_tokens=1000, budget_usd=0.0005) == (402, "budget_exceeded")
    assert site.ask("dear", output_tokens=1000, prompt_tokens=1000, budget_usd=0.0221) == ["dear"]
    assert site.refusal("dear", output_tokens=1000, prompt_tokens=1000, budget_usd=0.0219) == (402, "budget_exceeded")


def test_time_on_the_hardware_costs_too() -> None:
    hardware = Hardware(usd=4 * 365.25 * 86400, lifetime_years=4)  # a dollar a second
    site = Site(entry("a", 1, price=Price(share=1.0)), hardware=hardware)
    backend = site.backend(1)
    backend.begin(10, 0.0)
    backend.end(10, 10.0, 0.0, SERVED, 10.0, 100)  # ten tokens a second
    assert site.ask("a", output_tokens=50, budget_usd=5.1) == ["a"]
    assert site.refusal("a", output_tokens=50, budget_usd=4.9) == (402, "budget_exceeded")


def test_a_prompt_goes_where_it_fits() -> None:
    site = Site(entry("short", 1, context=1000), entry("long", 2, context=8000))
    assert site.ask("auto", prompt_tokens=2000) == ["long"]
    assert sorted(site.ask("auto", prompt_tokens=9000)) == ["long", "short"]  # the engine says how much it is


def test_a_policy_whose_models_are_all_away() -> None:
    policy = Policy("auto", models=("a", "b"))
    site = Site(entry("a", 1, fallback=("c",)), entry("b", 2), entry("c", 3), policies=(policy,), draining=("a",))
    site.backend(2).health.failed(1.0)
    assert site.ask("auto") == ["c"]
    site.backend(3).health.failed(1.0)
    assert site.refusal("auto") == (503, "model_draining")


# replicas ------------------------------------------------------------------------------------------------------------
def test_only_what_is_up_and_was_not_tried() -> None:
    site = Site(entry("a", 1, 2, 3))
    site.backend(1).health.failed(1.0)
    query = site.query("a")
    (model,) = site.router.resolve(query, 1.0)
    first = site.router.pick(model, query, (), 1.0)
    assert first is not None
    second = site.router.pick(model, query, (first,), 1.0)
    assert second is not None
    assert {first.port, second.port} == {2, 3}
    assert site.router.pick(model, query, (first, second), 1.0) is None
    notes = {one.note for one in site.router.why(query, model, second).candidates}
    assert notes >= {"down", "tried", "best"}


def test_one_replica_that_was_tried_or_is_away() -> None:
    site = Site(entry("a", 1))
    query, model, backend = site.query("a"), site.model("a"), site.backend(1)
    assert site.router.pick(model, query, (backend,), 1.0) is None
    backend.health.failed(1.0)
    assert site.router.pick(model, query, (), 1.0) is None
    assert [row[3] for row in query.trail or ()] == ["tried", "down"]


def test_idle_replicas_share_by_weight() -> None:
    model = ModelEntry("a", (Address("h", 1, 3.0), Address("h", 2), Address("h", 3, 0.0)))
    found = Site(model).picks("a", 2000)
    assert 0.7 < found[1] / 2000 < 0.8
    assert found[3] == 0


def test_a_replica_without_weight_serves_when_nobody_else_does() -> None:
    site = Site(ModelEntry("a", (Address("h", 1, 0.0), Address("h", 2))))
    site.backend(2).health.failed(1.0)
    assert site.pick("a") == 1


def test_the_less_loaded_of_two() -> None:
    site = Site(entry("a", 1, 2))
    site.backend(1).begin(1000, 1.0)
    assert site.picks("a", 50) == {2: 50}
    site.backend(2).begin(1001, 1.0)
    assert site.picks("a", 50) == {1: 50}


def test_two_of_many_spread_what_comes_at_once() -> None:
    site = Site(entry("a", *range(1, 9)))
    for _ in range(400):
        site.backend(site.pick("a")).begin(10, 1.0)
    loads = [site.backend(port).inflight for port in range(1, 9)]
    assert min(loads) >= 45
    assert max(loads) <= 55


def test_the_faster_of_two() -> None:
    site = Site(entry("a", 1, 2), routing=Routing(choose="latency"))
    site.backend(1).first_byte(0.1, 1.0)
    site.backend(2).first_byte(0.4, 1.0)
    assert site.picks("a", 50, stream=True) == {1: 50}
    for _ in range(4):
        site.backend(1).begin(1, 1.0)
    assert site.picks("a", 50, stream=True) == {2: 50}


def test_one_that_comes_back_starts_slowly() -> None:
    site = Site(entry("a", 1, 2), routing=Routing(slow_start=10.0))
    site.backend(1).health.failed(0.0)
    site.backend(1).health.healthy(1.0)
    early = Counter(site.pick("a", 1.5) for _ in range(500))
    late = Counter(site.pick("a", 11.5) for _ in range(500))
    assert early[1] < 80
    assert 200 < late[1] < 300


def test_suspects_and_full_ones_serve_last() -> None:
    site = Site(entry("a", 1, 2, slots=2))
    site.backend(1).health.doubt(1.0)
    assert site.picks("a", 30) == {2: 30}
    site.backend(1).health.heard()
    for _ in range(2):
        site.backend(1).begin(1, 1.0)
    site.backend(2).begin(1000, 1.0)
    assert site.picks("a", 30) == {2: 30}


def test_an_open_circuit_gets_one_trial() -> None:
    site = Site(entry("a", 1, 2), routing=Routing(failures=1, open_seconds=5.0, slow_start=0.0))
    broken = site.backend(1)
    broken.begin(1, 1.0)
    broken.end(1, 1.1, 1.0, BROKEN)
    assert not broken.health.usable(1.2)
    assert site.picks("a", 30) == {2: 30}
    site.backend(2).begin(1000, 6.2)
    assert site.pick("a", 6.2) == 1
    broken.begin(1, 6.2)
    assert site.pick("a", 6.2) == 2
    broken.end(1, 6.3, 6.2, SERVED)
    assert broken.health.circuit == "closed"
    assert site.pick("a", 6.4) == 1


# affinity ------------------------------------------------------------------------------------------------------------
def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    one, two = (Site(entry("a", 1, 2, 3, 4)) for _ in range(2))  # two workers
    homes = {number: one.pick("a", prompt_hash=number) for number in range(1, 400)}
    assert {number: two.pick("a", prompt_hash=number) for number in homes} == homes
    spread = Counter(homes.values())
    assert min(spread.values()) > 60
    one.backend(2).health.failed(1.0)
    moved = {number for number, port in homes.items() if one.pick("a", prompt_hash=number) != port}
    assert moved == {number for number, port in homes.items() if port == 2}


def test_a_session_stays_where_it_is() -> None:
    site = Site(entry("a", 1, 2, 3))
    home = site.pick("a", session="s-1")
    assert {site.pick("a", session="s-1", prompt_hash=number) for number in range(50)} == {home}
    query = site.query("a", session="s-1")
    site.router.pick(site.model("a"), query, (), 1.0)
    assert (query.trail or [])[-1][3] == "session"


def test_affinity_ends_where_the_load_is_too_much() -> None:
    site = Site(entry("a", 1, 2, 3))
    home = site.pick("a", prompt_hash=77)
    tokens = 0
    while site.pick("a", prompt_hash=77, prompt_tokens=100) == home:
        site.backend(home).begin(100, 1.0)
        tokens += 100
    assert tokens == 200  # two are never too many
    for port in {1, 2, 3} - {home}:
        for _ in range(5):
            site.backend(port).begin(100, 1.0)
    while site.pick("a", prompt_hash=77, prompt_tokens=100) == home:
        site.backend(home).begin(100, 1.0)
        tokens += 100
    assert 600 <= tokens <= 900  # 1.25 times the mean, which grows with it
    query = site.query("a", prompt_hash=77, prompt_tokens=100)
    site.router.pick(site.model("a"), query, (), 1.0)
    assert [row[3] for row in query.trail or ()] == ["too_loaded", "affinity"]


def test_one_huge_request_goes_to_the_least_loaded() -> None:
    site = Site(entry("a", 1, 2))
    for port, number in ((1, 3), (2, 4)):
        for _ in range(number):
            site.backend(port).begin(10, 1.0)
    assert {site.pick("a", prompt_hash=number, prompt_tokens=100_000) for number in range(1, 20)} == {1}


def test_affinity_follows_weights() -> None:
    site = Site(ModelEntry("a", (Address("h", 1, 3.0), Address("h", 2, 1.0))))
    found = Counter(site.pick("a", prompt_hash=stable_hash(b"%d" % number)) for number in range(2000))
    assert 0.7 < found[1] / 2000 < 0.8


def test_who_needs_a_hash() -> None:
    site = Site(entry("a", 1), entry("b", 2, 3), policies=(Policy("auto"), Policy("small", models=("a",))))
    assert [site.router.replicated(name) for name in ("a", "b", "auto", "small", "none")] == [
        False, True, True, False, False,
    ]  # fmt: skip
    site.apply(routing=Routing(prefix_bytes=0))
    assert not site.router.replicated("b")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_mixed_number_lies_between(number: int, seed: int) -> None:
    assert 0.0 < mixed(number, seed) < 1.0


# whatever the states are ---------------------------------------------------------------------------------------------
STATES = ("up", "down", "open", "trial", "doubted", "tried", "full")


@given(
    st.lists(st.tuples(st.sampled_from(STATES), st.sampled_from([0.0, 1.0, 2.5]), st.integers(0, 5000)), max_size=6),
    st.sampled_from(["load", "latency"]),
    st.sampled_from(["", "s"]),
    st.integers(0, 3),
    st.booleans(),
)
def test_never_a_replica_that_cannot(
    states: list[tuple[str, float, int]], choose: str, session: str, hashed: int, draining: bool
) -> None:
    addresses = tuple(Address("h", port, weight) for port, (_, weight, _) in enumerate(states, 1)) or (Address("h", 1),)
    model = ModelEntry("a", addresses, slots=4)
    site = Site(model, routing=Routing(choose=choose), draining=("a",) if draining else ())  # type: ignore[arg-type]  # one of the two
    tried = []
    good = 0
    for port, (state, _, tokens) in enumerate(states, 1):
        backend = site.backend(port)
        backend.begin(tokens, 1.0)
        if state == "down":
            backend.health.failed(1.0)
        elif state in ("open", "trial"):
            backend.health.open(1.0)
            if state == "trial":
                backend.health.until = 0.5
                backend.health.chosen()
        elif state == "doubted":
            backend.health.doubt(1.0)
        elif state == "tried":
            tried.append(backend)
        elif state == "full":
            for _ in range(4):
                backend.begin(1, 1.0)
        good += state in ("up", "doubted", "full")
    query = site.query("a", session=session, prompt_hash=hashed, stream=True)
    if draining:
        with pytest.raises(Refusal):
            site.router.resolve(query, 1.5)
        return
    found = site.router.pick(site.model("a"), query, tuple(tried), 1.5)
    if states:
        assert (found is not None) == (good > 0)
    if found is not None:
        assert found not in tried
        assert found.health.usable(1.5)
    site.router.why(query, site.model("a"), found)


# retries -------------------------------------------------------------------------------------------------------------
def test_retries_are_a_share_of_the_traffic() -> None:
    budget = RetryBudget()
    budget.ratio = 0.25
    budget.refresh(0.0)
    assert sum(budget.spend(0.0) for _ in range(50)) == 10  # the reserve
    for _ in range(100):
        budget.earned += budget.ratio
    assert sum(budget.spend(0.0) for _ in range(50)) == 25
    assert sum(budget.spend(3.0) for _ in range(50)) == 3  # one a second
    for _ in range(100):
        budget.earned += budget.ratio
    budget.refresh(43.0)
    assert budget.earned < 1.0  # forgotten


def test_every_request_earns_and_each_retry_spends() -> None:
    site = Site(entry("a", 1), routing=Routing(retry_budget=0.5))
    while site.router.may_retry(0.0):
        pass
    for _ in range(4):
        site.ask("a")
    assert [site.router.may_retry(0.0) for _ in range(3)] == [True, True, False]


def test_a_tick_reaches_every_backend() -> None:
    site = Site(entry("a", 1))
    backend = site.backend(1)
    backend.begin(10, 1.0)
    site.router.tick(7.0)
    assert backend.health.must_generate()
    assert backend.spent == 6.0
