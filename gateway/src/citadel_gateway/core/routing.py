"""Which model answers, and which of its replicas: policies as data, decided in less than a microsecond where there is
nothing to choose.

`resolve` turns the name that a client asked for into models in the order in which they should be tried. `pick` takes
one replica of one of them. Both leave in the query what spoke for and against each candidate, as plain tuples; only a
settled request pays for the record of it (`why`).
"""

import zlib
from math import exp, log
from typing import Final

from citadel_gateway.core.catalogue import Backend, Catalogue, Key, Model
from citadel_gateway.core.pricing import Prices
from citadel_gateway.errors import Refusal
from citadel_gateway.records import Candidate, Why
from citadel_gateway.settings import Policy, Rule, Tier, When
from citadel_gateway.snapshot import Snapshot

RETRY_DRAINING: Final = 5
RETRY_DOWN: Final = 2
FEW: Final = 2  # requests in flight that are never too many for a replica that has the prompt in its cache
UNMEASURED: Final = 1.0  # seconds that are believed of a replica that has work and has not answered yet
MASK: Final = 0xFFFFFFFFFFFFFFFF

Trail = list[tuple[str, str, float, str]]  # model, backend, score, note


class Query:
    """What is asked, as far as it decides.

    `prompt_tokens`: likely, a quarter of the bytes. `output_tokens`: what it may generate. `prompt_hash`: `stable_hash`
    of the beginning of the prompt, 0 when it is not known. `language`: de, en-GB. `capability`: which endpoint it
    needs. What follows is written by the router.
    """

    model: Model | None = None  # what `resolve` has put first
    policy: str = ""
    rule: str = ""
    choose: str = ""
    preferred: str = ""  # the model that would have answered if all were well
    trail: Trail | None = None

    def __init__(
        self,
        asked: str,
        key: Key,
        now: float,
        tier: str = "",
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        prompt_hash: int = 0,
        session: str = "",
        tools: bool = False,
        stream: bool = False,
        language: str = "",
        tag: str = "",
        priority: int = 0,
        budget_usd: float = 0.0,
        deadline: float = 0.0,
        capability: str = "",
    ) -> None:
        self.asked = asked
        self.key = key
        self.now = now
        self.tier = tier
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.prompt_hash = prompt_hash
        self.session = session
        self.tools = tools
        self.stream = stream
        self.language = language
        self.tag = tag
        self.priority = priority
        self.budget_usd = budget_usd
        self.deadline = deadline
        self.capability = capability

    def plain(self) -> bool:
        """Nothing was decided and nothing about the request could have decided: the one replica was taken."""
        return self.trail is None and not (
            self.policy or self.preferred or self.language or self.tag or self.tools or self.budget_usd
        )

    def note(self, model: str, backend: str, score: float, note: str) -> None:
        if self.trail is None:
            self.trail = []
        self.trail.append((model, backend, score, note))


def stable_hash(data: bytes) -> int:
    """Of a session or of the beginning of a prompt: the same number in all workers and on all hosts."""
    return zlib.crc32(data)


def mixed(number: int, seed: int) -> float:
    """Between 0 and 1, both excluded: even if numbers and seeds differ in a few bits only."""
    x = (number * 0x9E3779B97F4A7C15 ^ seed) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) + 1) / 18446744073709551618.0


class RetryBudget:
    """A bounded share of the traffic may be retries, so that an outage is not answered with twice the load.

    Every request earns `ratio` of a retry, which is forgotten within about `WINDOW` seconds. One retry a second is
    allowed besides (ten at once), so that a quiet service can retry too.
    """

    WINDOW = 10.0
    RESERVE = 1.0  # retries a second

    def __init__(self) -> None:
        self.ratio = 0.0
        self.earned = 0.0
        self.spare = self.RESERVE * self.WINDOW
        self.stamp = 0.0

    def refresh(self, now: float) -> None:
        """Called several times a second, so that nothing need be decayed at each request."""
        passed = max(now - self.stamp, 0.0)
        self.stamp = now
        self.earned *= exp(-passed / self.WINDOW)
        self.spare = min(self.spare + passed * self.RESERVE, self.RESERVE * self.WINDOW)

    def spend(self, now: float) -> bool:
        """Take one retry; false when there is none."""
        self.refresh(now)
        if self.earned >= 1.0:
            self.earned -= 1.0
        elif self.spare >= 1.0:
            self.spare -= 1.0
        else:
            return False
        return True


class Plan:
    """What a name means, looked up once a request: a model with those that take over for it, or a policy."""

    __slots__ = ("alone", "chain", "model", "policy", "replicated", "rules")

    def __init__(self, model: Model | None, chain: tuple[Model, ...], policy: Policy | None = None) -> None:
        self.model = model
        self.chain = chain  # of a policy: the models when no rule holds
        self.alone = len(chain) == 1 and model is not None
        self.policy = policy
        self.rules: tuple[tuple[Rule, frozenset[str], tuple[Model, ...]], ...] = ()
        self.replicated = any(one.single is None for one in chain)


class Router:
    """All routing of one worker. Its plans are made from each snapshot; what is measured belongs to the backends."""

    def __init__(self, catalogue: Catalogue, seed: int = 1) -> None:
        self.catalogue = catalogue
        self.plans: dict[str, Plan] = {}
        self.allowed: dict[str, frozenset[str]] = {}  # tier -> its models; a tier that may use all is not in it
        self.retries = RetryBudget()
        self.routing = catalogue.routing
        self.prices = Prices(Snapshot(0, (), ()).policies.hardware, ())
        self.state = seed * 2654435761 & 0x7FFFFFFF

    def apply(self, snapshot: Snapshot, now: float) -> None:
        """After the catalogue has taken over the same snapshot."""
        policies = snapshot.policies
        self.routing = policies.routing
        self.retries.ratio = policies.routing.retry_budget
        self.retries.refresh(now)
        self.prices = Prices(policies.hardware, snapshot.models)
        self.allowed = {tier.name: self.models_of(tier) for tier in policies.tiers if "*" not in tier.models}
        plans: dict[str, Plan] = {}
        for policy in policies.policies:
            plan = self.policy_plan(policy)
            plans.update(dict.fromkeys((policy.name, *policy.aliases), plan))
        for model in self.catalogue.models.values():
            chain = (model, *(one for one in self.named(model.fallback) if one is not model))
            plans.update(dict.fromkeys((model.name, *model.aliases), Plan(model, chain)))
        self.plans = plans

    def models_of(self, tier: Tier) -> frozenset[str]:
        return frozenset(model.name for model in self.named(tier.models))

    def named(self, names: tuple[str, ...]) -> tuple[Model, ...]:
        """The models of these names or aliases, each once. Names that are not known any more are passed over."""
        found = self.catalogue.models.values() if "*" in names else map(self.catalogue.by_name.get, names)
        return tuple(dict.fromkeys(model for model in found if model is not None))

    def policy_plan(self, policy: Policy) -> Plan:
        plan = Plan(None, self.named(policy.models or ("*",)), policy)
        plan.rules = tuple(
            (rule, frozenset(language.lower() for language in rule.when.languages), self.named(rule.models))
            for rule in policy.rules
        )
        plan.replicated = plan.replicated or any(one.single is None for _, _, models in plan.rules for one in models)
        return plan

    def tick(self, now: float) -> None:
        """Ten times a second."""
        self.catalogue.board.tick(now)
        self.retries.refresh(now)
        for backend in self.catalogue.backends.values():
            backend.tick(now)

    # which model ----------------------------------------------------------------------------------------------------
    def replicated(self, asked: str) -> bool:
        """Whether a replica will have to be chosen; if not, nobody need hash the prompt."""
        plan = self.plans.get(asked)
        return plan is not None and plan.replicated and self.routing.prefix_bytes > 0

    def resolve(self, query: Query, now: float) -> tuple[Model, ...]:
        """The models to try in this order. Raises 404, 403, 400, 402 or 503."""
        retries = self.retries
        retries.earned += retries.ratio
        plan = self.plans.get(query.asked)
        if plan is None:
            raise Refusal(404, "model_not_found", f"The model {query.asked[:128]!r} does not exist", param="model")
        model = plan.model
        if (
            model is not None
            and plan.alone
            and not model.draining
            and model.usable(now)
            and not query.budget_usd
            and (not query.capability or query.capability in model.capabilities)
            and self.may_use(query, model)
        ):
            query.model = model
            return plan.chain
        chain = self.of_model(plan, query, now) if model is not None else self.of_policy(plan, query, now)
        query.model = chain[0]
        return chain

    def may_use(self, query: Query, model: Model) -> bool:
        allowed = self.allowed.get(query.tier)
        return (allowed is None or model.name in allowed) and (query.key.everything or query.key.may_use(model))

    def of_model(self, plan: Plan, query: Query, now: float) -> tuple[Model, ...]:
        """A model by name: it, or those that take over."""
        model = plan.chain[0]
        if not self.may_use(query, model):
            raise Refusal(403, "model_not_allowed", f"This key may not use the model {model.name!r}", param="model")
        if query.capability and query.capability not in model.capabilities:
            message = f"The model {model.name!r} has no endpoint for {query.capability}"
            raise Refusal(400, "endpoint_not_supported", message, param="model")
        query.preferred = model.name
        others = [one for one in plan.chain[1:] if self.may_use(query, one) and capable(one, query)]
        return self.ready(self.within_budget([model, *others], query), query, now)

    def of_policy(self, plan: Plan, query: Query, now: float) -> tuple[Model, ...]:
        """A policy: the models of the first rule that holds, in the order of its measure."""
        policy = plan.policy
        assert policy is not None
        query.policy, query.choose = policy.name, policy.choose
        wanted = plan.chain
        for rule, languages, models in plan.rules:
            if holds(rule.when, languages, query):
                query.rule, wanted = rule.name, models
                break
        allowed = [model for model in wanted if self.may_use(query, model)]
        if not allowed:
            message = f"This key may use none of the models of {query.asked!r}"
            raise Refusal(403, "model_not_allowed", message, param="model")
        able = [model for model in allowed if capable(model, query)]
        if not able:
            message = f"None of the models of {query.asked!r} can do this"
            raise Refusal(400, "endpoint_not_supported", message, param="model")
        able = [model for model in able if model.context > query.prompt_tokens] or able
        able = self.within_budget(able, query)
        well = [model for model in able if not model.draining and model.usable(now)]
        order = self.ordered(well, query, now)
        query.preferred = (order or able)[0].name
        rest = [one for model in able for one in self.named(model.fallback) if self.may_use(query, one)]
        rest = [
            one
            for one in dict.fromkeys(rest)
            if one not in able and capable(one, query) and self.affordable(one, query)
        ]
        return self.ready(order + [one for one in able if one not in well] + rest, query, now)

    def within_budget(self, models: list[Model], query: Query) -> list[Model]:
        """Those that the client would pay for."""
        if not query.budget_usd:
            return models
        kept = [model for model in models if self.affordable(model, query)]
        if not kept:
            least = min(self.estimate(model, query) for model in models)
            message = f"The request may cost {least:.6f} USD, more than the {query.budget_usd:.6f} USD of its budget"
            raise Refusal(402, "budget_exceeded", message)
        return kept

    def affordable(self, model: Model, query: Query) -> bool:
        return not query.budget_usd or self.estimate(model, query) <= query.budget_usd

    def estimate(self, model: Model, query: Query) -> float:
        """USD, if everything is generated that may be."""
        return self.prices.estimate(model.name, query.prompt_tokens, query.output_tokens, model.speed())

    def ready(self, models: list[Model], query: Query, now: float) -> tuple[Model, ...]:
        """Those that can take a request now."""
        found = []
        for model in models:
            if model.draining:
                query.note(model.name, "", 0.0, "draining")
            elif not model.usable(now):
                query.note(model.name, "", 0.0, "down")
            else:
                found.append(model)
        if found:
            return tuple(found)
        name = query.asked
        if models and models[0].draining:
            raise Refusal(503, "model_draining", f"The model {name!r} is being restarted", retry_after=RETRY_DRAINING)
        raise unavailable(name)

    def ordered(self, models: list[Model], query: Query, now: float) -> list[Model]:
        """The best first."""
        if query.choose == "first" or len(models) < 2:
            return models
        if query.choose == "cost":
            scores = [self.estimate(model, query) for model in models]
        elif query.choose == "latency":
            scores = [self.latency(model, query, now) for model in models]
        else:
            places = (
                [model.slots or 1 for model in models] if all(model.slots for model in models) else [1] * len(models)
            )
            scores = [outstanding(model) / number for model, number in zip(models, places, strict=True)]
        order = sorted(range(len(models)), key=scores.__getitem__)
        for index in order:
            query.note(models[index].name, "", scores[index], "best" if index == order[0] else "second_choice")
        return [models[index] for index in order]

    def latency(self, model: Model, query: Query, now: float) -> float:
        """Of its fastest replica, and the wait before it."""
        usable = [backend for backend in model.backends if backend.health.usable(now)]
        wait: float = model.lane.wait(now) if model.lane is not None else 0.0
        return wait + min(delay(backend, query.stream, now) for backend in usable)

    # which replica --------------------------------------------------------------------------------------------------
    def pick(self, model: Model, query: Query, tried: tuple[Backend, ...], now: float) -> Backend | None:
        """The replica to ask, or nothing when none can be. It is not counted before its `begin`."""
        single = model.single
        if single is None:
            return self.among(model, query, tried, now)
        if single in tried:
            query.note(model.name, single.label, 0.0, "tried")
        elif single.health.usable(now):
            return single
        else:
            query.note(model.name, single.label, 0.0, state(single))
        return None

    def among(self, model: Model, query: Query, tried: tuple[Backend, ...], now: float) -> Backend | None:
        """One of several."""
        usable = []
        for backend in model.backends:
            if backend in tried:
                query.note(model.name, backend.label, 0.0, "tried")
            elif backend.health.usable(now):
                usable.append(backend)
            else:
                query.note(model.name, backend.label, 0.0, state(backend))
        if len(usable) > 1:
            usable = self.better(model, usable, query)
        if len(usable) < 2:
            if usable:
                query.note(model.name, usable[0].label, 0.0, "best")
            return usable[0] if usable else None
        weights = [backend.weight * backend.health.ramp(now) for backend in usable]
        hashed = stable_hash(query.session.encode()) if query.session else query.prompt_hash
        if hashed:
            return self.affine(model, usable, weights, hashed, query)
        return self.of_two(model, usable, weights, query, now)

    def better(self, model: Model, usable: list[Backend], query: Query) -> list[Backend]:
        """Without those that only serve when nobody else does: suspects, weight 0, all slots taken."""
        for note, bad in (
            ("suspect", [backend for backend in usable if backend.health.doubted]),
            ("weight_0", [backend for backend in usable if backend.weight <= 0]),
            ("full", [one for one in usable if model.slots and one.requests() >= model.slots]),
        ):
            if bad and len(bad) < len(usable):
                for backend in bad:
                    query.note(model.name, backend.label, 0.0, note)
                usable = [backend for backend in usable if backend not in bad]
        return usable

    def affine(
        self, model: Model, usable: list[Backend], weights: list[float], hashed: int, query: Query
    ) -> Backend | None:
        """The replica that this session or prompt belongs to (rendezvous hashing: when one goes, only what was its own
        moves), unless it has `affinity_load` times its share of the load; then the next one it would belong to.
        """
        places = [
            -(weight or 1e-9) / log(mixed(hashed, backend.seed))
            for backend, weight in zip(usable, weights, strict=True)
        ]
        order = sorted(range(len(usable)), key=places.__getitem__, reverse=True)
        mine = query.prompt_tokens + query.output_tokens
        total = sum(backend.load() for backend in usable) + mine
        bound = self.routing.affinity_load * total / (sum(weights) or 1.0)
        chosen = min(order, key=lambda index: usable[index].load())  # when none of them is below the bound
        for index in order:
            backend = usable[index]
            if backend.requests() < FEW or backend.load() + mine <= bound * weights[index]:
                chosen = index
                break
            query.note(model.name, backend.label, float(backend.load()), "too_loaded")
        backend = usable[chosen]
        query.note(model.name, backend.label, float(backend.load()), "session" if query.session else "affinity")
        return backend

    def of_two(
        self, model: Model, usable: list[Backend], weights: list[float], query: Query, now: float
    ) -> Backend | None:
        """Two by chance, each as likely as its weight says, and the better one of them. Always to take the best of all
        would send all workers to the same replica at once.
        """
        first = self.draw(weights, -1)
        second = self.draw(weights, first)
        one, two = usable[first], usable[second]
        if self.routing.choose == "latency":
            a, b = delay(one, query.stream, now), delay(two, query.stream, now)
        else:
            a, b = float(one.load()), float(two.load())
        a, b = a / (weights[first] or 1e-9), b / (weights[second] or 1e-9)
        if b < a:
            one, two, a, b = two, one, b, a
        slow = one.health.ramp(now) < 1
        query.note(model.name, one.label, a, "slow_start" if slow else "best")
        query.note(model.name, two.label, b, "second_choice")
        return one

    def draw(self, weights: list[float], without: int) -> int:
        """An index by chance, as often as its weight says."""
        self.state = (self.state * 1103515245 + 12345) & 0x7FFFFFFF
        total = sum(weights) - (weights[without] if without >= 0 else 0.0)
        point = self.state / 0x80000000 * total
        last = 0
        for index, weight in enumerate(weights):
            if index != without:
                last = index
                point -= weight
                if point < 0:
                    break
        return last

    # retries, and the record ----------------------------------------------------------------------------------------
    def may_retry(self, now: float) -> bool:
        """Take one retry from the budget, when there is one."""
        return self.retries.spend(now)

    def why(self, query: Query, model: Model | None = None, backend: Backend | None = None) -> Why:
        """The decision as it is kept. The parts about limits and queues are filled in by those who know them."""
        rows = query.trail or ()
        candidates = tuple(Candidate(*row) for row in rows)
        if backend is not None and not any(row[1] == backend.label for row in rows):
            candidates += (Candidate(backend.model, backend.label, 0.0, "only"),)
        preferred = query.preferred
        return Why(
            policy=query.policy,
            rule=query.rule,
            choose=query.choose or (self.routing.choose if model is not None and model.single is None else ""),
            candidates=candidates,
            fallback_from=preferred if model is not None and preferred and preferred != model.name else "",
            prompt_tokens=query.prompt_tokens,
            language=query.language,
            tag=query.tag,
            tools=query.tools,
            budget_usd=query.budget_usd,
        )


def unavailable(name: str) -> Refusal:
    message = f"The model {name!r} is not available at the moment"
    return Refusal(503, "model_unavailable", message, retry_after=RETRY_DOWN, outcome="unavailable")


def state(backend: Backend) -> str:
    """Why it cannot be asked."""
    health = backend.health
    return "draining" if health.resting else "open" if health.up else "down"


def capable(model: Model, query: Query) -> bool:
    able = model.capabilities
    return (not query.capability or query.capability in able) and (not query.tools or "tools" in able)


def holds(when: When, languages: frozenset[str], query: Query) -> bool:
    """Whether everything that a rule asks for is true."""
    language = query.language.lower()
    return (
        query.prompt_tokens >= when.min_tokens
        and (not when.max_tokens or query.prompt_tokens <= when.max_tokens)
        and (when.tools is None or when.tools == query.tools)
        and (when.stream is None or when.stream == query.stream)
        and (not languages or language in languages or language.partition("-")[0] in languages)
        and (not when.tags or query.tag in when.tags)
        and (not when.tiers or query.tier in when.tiers)
    )


def delay(backend: Backend, stream: bool, now: float) -> float:
    """What a request would wait there: to its first byte, or for each token, times those that are there already."""
    measured = (backend.first if stream else backend.per_token).read(now)
    requests = backend.requests()
    return measured * (requests + 1) if measured else UNMEASURED * requests


def outstanding(model: Model) -> float:
    """Tokens in flight and queued before a model, for each unit of weight."""
    queued: int = model.lane.waiting_tokens() if model.lane is not None else 0
    weight = sum(backend.weight for backend in model.backends if backend.health.up)
    return model.load() + (queued / weight if weight else 0.0)
