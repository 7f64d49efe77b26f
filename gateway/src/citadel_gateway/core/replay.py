"""Yesterday's requests under another policy: who would have answered them, at what cost and under what load.

Each settled request is decided again by the same router, in the order in which they came, with the load that the
requests decided before it would make at that moment. It is no second yesterday: every replica is taken as up, nobody
waits or is shed, prompts are not known (so only sessions have affinity), and where another model answers, its answer is
taken to be as long, and to take as long as that model's answers did on the average. The same files and policies give
the same result.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

import msgspec
from msgspec import Struct

from citadel_gateway.core.catalogue import Backend, Catalogue, Key, Model
from citadel_gateway.core.health import SERVED
from citadel_gateway.core.routing import Query, Router
from citadel_gateway.errors import Refusal
from citadel_gateway.records import Settled, decode
from citadel_gateway.settings import Capability, Policies
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.settings import Model as ModelEntry
from citadel_gateway.snapshot import Snapshot

ANYONE = Key(KeyEntry("anyone", "0" * 64))
ENDPOINTS = frozenset(get_args(Capability))
decode_settled = msgspec.json.Decoder(Settled).decode


class Change(Struct):
    """Requests that one model has answered and another one would."""

    before: str
    after: str  # empty: it would be refused
    requests: int = 0
    cost_before: float = 0.0
    cost_after: float = 0.0


class Load(Struct):
    """What a model had and would have to do. Tokens are those of requests under way at the same time."""

    model: str
    requests_before: int = 0
    requests_after: int = 0
    mean_before: float = 0.0
    mean_after: float = 0.0
    peak_before: int = 0
    peak_after: int = 0
    cost_before: float = 0.0
    cost_after: float = 0.0


class Outcome(Struct):
    """`cost_before` prices what has happened with the prices of now, `cost_recorded` with those of then."""

    requests: int = 0
    unchanged: int = 0
    passed_over: int = 0  # records of requests that never got as far as a model
    damaged: int = 0  # lines that are no records
    seconds: float = 0.0
    cost_recorded: float = 0.0
    cost_before: float = 0.0
    cost_after: float = 0.0
    changes: list[Change] = []
    models: list[Load] = []
    rules: dict[str, int] = {}  # policy/rule -> requests
    refused: dict[str, int] = {}  # code -> requests


class Pace:
    """How fast a model was, on the average of all that it has answered."""

    def __init__(self) -> None:
        self.requests = 0
        self.first = 0.0
        self.rest = 0.0
        self.engine = 0.0
        self.output = 0

    def add(self, record: Settled) -> None:
        self.requests += 1
        self.first += record.first_byte_seconds
        self.rest += max(record.total_seconds - record.queue_seconds - record.first_byte_seconds, 0.0)
        self.engine += record.engine_seconds
        self.output += record.output_tokens

    def of(self, record: Settled) -> tuple[float, float, float]:
        """Seconds to the first byte, to the end, and of the engine, for an answer as long as this one's."""
        if not self.output:
            return record.first_byte_seconds, record.total_seconds - record.queue_seconds, record.engine_seconds
        share = record.output_tokens / self.output
        first = self.first / self.requests
        return first, first + self.rest * share, self.engine * share


class Gauge:
    """Tokens under way over time."""

    def __init__(self) -> None:
        self.tokens = self.peak = 0
        self.area = self.stamp = 0.0

    def move(self, tokens: int, now: float) -> None:
        self.area += self.tokens * max(now - self.stamp, 0.0)
        self.stamp = max(now, self.stamp)
        self.tokens += tokens
        self.peak = max(self.peak, self.tokens)


def read(lines: Iterable[bytes], outcome: Outcome) -> Iterator[Settled]:
    """The settled requests of a journal's segment or of an export; what is unwritten at a segment's end is no line."""
    for line in lines:
        text = line.strip(b"\0 \t\r\n")
        if not text:
            continue
        try:
            record = decode(text) if b'"kind"' in text else decode_settled(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            outcome.damaged += 1
            continue
        if not isinstance(record, Settled):
            continue
        if record.backend and record.model and record.user != "system":
            yield record
        else:
            outcome.passed_over += 1


class Replay:
    """One run. `policy`: decides instead of the one that was asked, where one was."""

    def __init__(
        self,
        models: tuple[ModelEntry, ...],
        policies: Policies,
        keys: tuple[KeyEntry, ...] = (),
        policy: str = "",
    ) -> None:
        snapshot = Snapshot(0, models, keys, {}, (), policies)
        self.catalogue = Catalogue(5.0)
        self.router = Router(self.catalogue)
        self.catalogue.apply(snapshot, 0.0)
        self.router.apply(snapshot, 0.0)
        self.keys = {entry.id: Key(entry) for entry in keys}
        self.policy = policy
        self.paces: dict[str, Pace] = {}
        self.running: list[tuple[float, int, Backend, int, float, float, int]] = []
        self.before: dict[str, Gauge] = {}
        self.after: dict[str, Gauge] = {}
        self.loads: dict[str, Load] = {}
        self.changes: dict[tuple[str, str], Change] = {}
        self.rules: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def run(self, records: Iterable[Settled], outcome: Outcome) -> Outcome:
        """Decide all of them again, and add up."""
        found = sorted(records, key=lambda record: (record.at, record.id))
        for record in found:
            self.paces.setdefault(record.model, Pace()).add(record)
        for number, record in enumerate(found):
            self.one(record, number, outcome)
        while self.running:
            self.finish()
        self.happened(found)
        outcome.requests = len(found)
        if found:
            outcome.seconds = found[-1].at - found[0].at
        outcome.changes = sorted(self.changes.values(), key=lambda change: (-change.requests, change.before))
        outcome.models = [self.loads[name] for name in sorted(self.loads)]
        for gauges, field in ((self.before, "before"), (self.after, "after")):
            for name, gauge in gauges.items():
                span = gauge.stamp - found[0].at
                setattr(self.load(name), f"mean_{field}", gauge.area / span if span > 0 else 0.0)
                setattr(self.load(name), f"peak_{field}", gauge.peak)
        outcome.rules = dict(sorted(self.rules.items()))
        outcome.refused = dict(sorted(self.refused.items()))
        return outcome

    def load(self, model: str) -> Load:
        return self.loads.setdefault(model, Load(model))

    def one(self, record: Settled, number: int, outcome: Outcome) -> None:
        """Decide one request, and let it run."""
        now = record.at + record.queue_seconds
        while self.running and self.running[0][0] <= now:
            self.finish()
        prices, tokens = self.router.prices, record.input_tokens + record.output_tokens
        was = self.load(record.model)
        before, _ = prices.cost(
            record.model, record.input_tokens, record.output_tokens, record.cached_tokens, record.engine_seconds
        )
        outcome.cost_recorded += record.cost_usd
        outcome.cost_before += before
        was.requests_before += 1
        was.cost_before += before
        model, backend = self.decide(record, now)
        if model is None or backend is None:
            change = self.changed(record.model, "")
            change.requests += 1
            change.cost_before += before
            return
        same = model.name == record.model
        if same:
            first, total, engine = record.first_byte_seconds, record.total_seconds - record.queue_seconds, 0.0
            engine = record.engine_seconds
        else:
            first, total, engine = self.paces.get(model.name, Pace()).of(record)
        after, _ = prices.cost(model.name, record.input_tokens, record.output_tokens, record.cached_tokens, engine)
        outcome.cost_after += after
        now_is = self.load(model.name)
        now_is.requests_after += 1
        now_is.cost_after += after
        if same:
            outcome.unchanged += 1
        else:
            change = self.changed(record.model, model.name)
            change.requests += 1
            change.cost_before += before
            change.cost_after += after
        backend.begin(tokens, now)
        self.gauge(self.after, model.name, now).move(tokens, now)
        end = now + max(total, 0.0)
        heapq.heappush(self.running, (end, number, backend, tokens, now, first, record.output_tokens))

    def changed(self, before: str, after: str) -> Change:
        return self.changes.setdefault((before, after), Change(before, after))

    def gauge(self, gauges: dict[str, Gauge], model: str, now: float) -> Gauge:
        found = gauges.get(model)
        if found is None:
            found = gauges[model] = Gauge()
            found.stamp = now
        return found

    def finish(self) -> None:
        """The request that ends first."""
        end, _, backend, tokens, began, first, output = heapq.heappop(self.running)
        backend.first_byte(first, end)
        backend.end(tokens, end, began, SERVED, end - began, output)
        self.after[backend.model].move(-tokens, end)

    def decide(self, record: Settled, now: float) -> tuple[Model | None, Backend | None]:
        """What the router says today."""
        why = record.why
        asked = record.asked or record.model
        if self.policy and why.policy:
            asked = self.policy
        query = Query(
            asked,
            self.keys.get(record.key, ANYONE),
            now,
            tier=record.tier,
            prompt_tokens=why.prompt_tokens or record.input_tokens,
            output_tokens=record.output_tokens,
            session=record.session,
            tools=why.tools,
            stream=record.stream,
            language=why.language,
            tag=why.tag,
            budget_usd=why.budget_usd,
            capability=record.endpoint if record.endpoint in ENDPOINTS else "",
        )
        try:
            model = self.router.resolve(query, now)[0]
        except Refusal as refusal:
            self.refused[refusal.code] += 1
            return None, None
        if query.policy:
            self.rules[f"{query.policy}/{query.rule or '-'}"] += 1
        return model, self.router.pick(model, query, (), now)

    def happened(self, records: list[Settled]) -> None:
        """The load as it was."""
        events = []
        for record in records:
            tokens = record.input_tokens + record.output_tokens
            began = record.at + record.queue_seconds
            events.append((began, tokens, record.model))
            events.append((max(record.at + record.total_seconds, began), -tokens, record.model))
        for now, tokens, model in sorted(events):
            self.gauge(self.before, model, now).move(tokens, now)
