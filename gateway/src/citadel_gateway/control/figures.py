"""The state of the gateway in numbers, once a second, for people: made from what the workers report.

Rates are those of the last ten seconds, quantiles of times those of the last minute. What is not known is left out.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from citadel_gateway.metrics import BUCKETS, Labels, Report, fresh, label_text, merged_gauges, number
from citadel_gateway.snapshot import Snapshot

Figures = dict[str, Any]
RATE_SECONDS = 10
QUANTILE_SECONDS = 60
POINT_SECONDS = 2
POINTS = 150  # five minutes
SHOWN = ("inflight", "queue", "output_tokens_per_second", "requests_per_second")

REQUESTS = "llm_gateway_requests_total"
TOKENS = "llm_gateway_tokens_total"
DURATION = "llm_gateway_request_duration_seconds"
FIRST = "llm_gateway_time_to_first_token_seconds"
INFLIGHT = "llm_gateway_inflight_requests"
QUEUE = "llm_gateway_queue_length"
UP = "llm_gateway_backend_up"
STOPPING = "llm_gateway_worker_stopping"


class Sums:
    """Counters and histograms of all workers at one moment, by name and model."""

    def __init__(self, reports: Iterable[Report], at: float) -> None:
        self.at = at
        self.counters: dict[tuple[str, Labels], float] = {}
        self.histograms: dict[tuple[str, str], list[int]] = {}
        for report in reports:
            for name in (REQUESTS, TOKENS):
                for sample in report.counters.get(name, ()):
                    key = (name, tuple(sample.labels))
                    self.counters[key] = self.counters.get(key, 0) + sample.value
            for name in (DURATION, FIRST):
                for one in report.histograms.get(name, ()):
                    self.add(name, one.labels[0], one.counts)

    def add(self, name: str, model: str, counts: list[int]) -> None:
        if len(counts) == len(BUCKETS[name]) + 1:
            mine = self.histograms.get((name, model), [0] * len(counts))
            self.histograms[name, model] = [a + b for a, b in zip(mine, counts, strict=True)]

    def tokens(self, model: str, kind: str) -> float:
        return self.counters.get((TOKENS, (model, kind)), 0)

    def requests(self, model: str) -> dict[str, float]:
        """By code. Questions for the list of models are no requests of a model."""
        found: dict[str, float] = {}
        for (name, labels), value in self.counters.items():
            if name == REQUESTS and labels[0] == model:
                found[labels[2]] = found.get(labels[2], 0) + value
        return found


class Past:
    """The sums of the last minute."""

    def __init__(self) -> None:
        self.sums: deque[Sums] = deque()

    def add(self, now: Sums) -> None:
        self.sums.append(now)
        while len(self.sums) > 1 and self.sums[1].at <= now.at - QUANTILE_SECONDS:
            self.sums.popleft()

    def before(self, seconds: float) -> Sums:
        """The youngest that is at least that old, else the oldest."""
        now = self.sums[-1].at
        return next((one for one in reversed(self.sums) if now - one.at >= seconds), self.sums[0])


class Maker:
    """Makes figures of reports, and remembers what it needs for rates and for the curves of a page."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.past = Past()
        self.points: dict[str, deque[tuple[float, ...]]] = {}
        self.next_point = 0.0

    def make(
        self, snapshot: Snapshot | None, reports: Sequence[Report], wall: float, cost: Mapping[str, float] | None = None
    ) -> Figures:
        """`cost`: what each model has cost today in USD, if that is known."""
        self.past.add(Sums(reports, wall))
        alive = fresh(reports, wall)
        gauges = merged_gauges(alive)
        draining = snapshot.draining if snapshot is not None else {}
        models = {
            model.name: self.model(model.name, draining.get(model.name, []), gauges, alive=bool(alive))
            for model in (snapshot.models if snapshot is not None else ())
        }
        if cost is not None:
            for name, one in models.items():
                one["cost_today_usd"] = rounded(cost.get(name, 0.0))
        self.remember(models, wall)
        total = {
            name: rounded(sum(one.get(name, 0) for one in models.values()))
            for name in ("inflight", "queue", "requests_per_second", "output_tokens_per_second", "errors_per_minute")
        }
        total["connections"] = gauges.get("llm_gateway_connections", {}).get((), 0)
        if cost is not None:
            total["cost_today_usd"] = rounded(sum(cost.values()))
        return {"at": round(wall, 1), "host": self.host, "workers": len(alive), "models": models, "total": total}

    def model(
        self, name: str, draining: Sequence[str], gauges: Mapping[str, Mapping[Labels, float]], *, alive: bool
    ) -> Figures:
        ups = {labels[1]: bool(value) for labels, value in gauges.get(UP, {}).items() if labels[0] == name}
        state = "draining" if draining else "up" if any(ups.values()) else "down" if alive else "unknown"
        found: Figures = {
            "state": state,
            "draining": list(draining),
            "backends": ups,
            "inflight": gauges.get(INFLIGHT, {}).get((name,), 0),
            "queue": gauges.get(QUEUE, {}).get((name,), 0),
        }
        now, lately, minute = self.past.sums[-1], self.past.before(RATE_SECONDS), self.past.before(QUANTILE_SECONDS)
        for kind in ("input", "output"):
            found[f"{kind}_tokens_per_second"] = rate(now.tokens(name, kind), lately.tokens(name, kind), now, lately)
        found |= self.traffic(name, now, lately, minute)
        for field, metric in (("first_token_seconds", FIRST), ("duration_seconds", DURATION)):
            counts = since(now.histograms.get((metric, name)), minute.histograms.get((metric, name)))
            if sum(counts):
                found[field] = {f"p{share}": rounded(quantile(BUCKETS[metric], counts, share / 100))
                                for share in (50, 95)}  # fmt: skip
        return found

    def traffic(self, name: str, now: Sums, lately: Sums, minute: Sums) -> Figures:
        codes, before, earlier = now.requests(name), lately.requests(name), minute.requests(name)
        recent = {code: max(0.0, value - earlier.get(code, 0)) for code, value in codes.items()}
        return {
            "requests_per_second": rate(sum(codes.values()), sum(before.values()), now, lately),
            "errors_per_minute": sum(count for code, count in recent.items() if code >= "500" or code == "timeout"),
            "limited_per_minute": recent.get("429", 0.0),
        }

    def remember(self, models: Mapping[str, Figures], wall: float) -> None:
        """A point of each curve, every other second."""
        if wall < self.next_point:
            return
        self.next_point = wall + POINT_SECONDS - 0.5
        for name in set(self.points) - set(models):
            del self.points[name]
        for name, one in models.items():
            line = self.points.setdefault(name, deque(maxlen=POINTS))
            line.append((*(one[field] for field in SHOWN), one.get("first_token_seconds", {}).get("p95", 0)))

    def history(self) -> Figures:
        """The curves, oldest first, as lists of points."""
        return {
            "seconds": POINT_SECONDS,
            "points": POINTS,
            "fields": [*SHOWN, "first_token_p95"],
            "models": {name: list(points) for name, points in self.points.items()},
        }


def gauge(name: str, text: str, samples: Mapping[Labels, float], names: Labels = ()) -> str:
    """A gauge of the control process, for the page of metrics."""
    lines = [f"{name}{label_text(names, labels)} {number(value)}\n" for labels, value in samples.items()]
    return f"# HELP {name} {text}\n# TYPE {name} gauge\n" + "".join(lines)


def rate(now: float, then: float, late: Sums, early: Sums) -> float:
    """A second. A counter that went back (the files were removed) counts as one that stands still."""
    seconds = late.at - early.at
    return rounded(max(0.0, now - then) / seconds) if seconds > 0 else 0.0


def since(now: list[int] | None, then: list[int] | None) -> list[int]:
    if now is None:
        return []
    return now if then is None else [max(0, a - b) for a, b in zip(now, then, strict=True)]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Inside the bucket in a straight line, as Prometheus' histogram_quantile has it."""
    wanted, running, lower = share * sum(counts), 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and running + count >= wanted:
            return lower + (bound - lower) * (wanted - running) / count
        running += count
        lower = bound
    return bounds[-1]


def rounded(value: float) -> float:
    """Three digits are enough to look at, and a number that only trembles is no news."""
    return float(f"{value:.3g}") if abs(value) < 1000 else float(round(value))


def patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> Figures:
    """What makes `new` of `old`: a JSON merge patch (RFC 7396), empty when they are equal."""
    found: Figures = {}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := patch(before, value):
                found[name] = inner
        elif value != before or name not in old:
            found[name] = value
    found |= {name: None for name in old if name not in new}
    return found


def states(figures: Figures) -> Figures:
    """The part that says whether models can be used."""
    return {
        name: {field: one[field] for field in ("state", "draining", "backends")}
        for name, one in figures.get("models", {}).items()
    }


def stopping(reports: Iterable[Report]) -> frozenset[int]:
    """The workers that are about to stop."""
    return frozenset(report.worker for report in reports if any(one.value for one in report.gauges.get(STOPPING, ())))
