"""A Prometheus without a process, two clocks that are set by hand, and series that look like those of a service."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from citadel_predictor.cycle import Clock, Cycle
from citadel_predictor.exposition import Metrics
from citadel_predictor.prometheus import MOST_POINTS, Client, Found, QueryError
from citadel_predictor.settings import DAY, Prometheus, Settings, Target
from citadel_predictor.state import Store

HOUR = 3600
NOW = 1_795_000_000 // DAY * DAY + 10 * HOUR + 120  # a morning, two minutes past the hour
QUERY = re.compile(r"(?:(?P<fold>\w+)_over_time\()?(?P<name>[\w:]+)(?:\{(?P<inside>.*)\})?(?:\[\d+s\]\))?")
Values = Callable[[float], float]


def traffic(seed: int = 0, level: float = 100.0, noise: float = 0.03) -> Values:
    """Requests a second: days and weeks, and noise that is the same whenever one asks."""

    def at(time: float) -> float:
        hour = time / HOUR
        week = 0.6 if int(hour / 24) % 7 in {2, 3} else 1.0
        jitter = (
            noise * sum(math.sin((time // 300 + seed) * 12.9898 + at) * 43758.5453 % 1 - 0.5 for at in range(4)) * 1.7
        )
        return float(level * week * (1.3 + math.sin(2 * math.pi * hour / 24)) * (1 + jitter))

    return at


@dataclass
class FakePrometheus(Client):
    """Answers from functions of time. ``asked`` has all questions, ``fails`` is raised in place of an answer."""

    rules: dict[str, dict[tuple[tuple[str, str], ...], Values]] = field(default_factory=dict)
    asked: list[tuple[str, int, int, int]] = field(default_factory=list)
    fails: QueryError | None = None
    fails_for: str = ""

    def __hash__(self) -> int:
        return id(self)

    def add(self, name: str, values: Values, **labels: str) -> None:
        self.rules.setdefault(name, {})[tuple(sorted(labels.items()))] = values

    def range(self, query: str, start: int, end: int, step: int) -> list[Found]:
        self.asked.append((query, start, end, step))
        if self.fails is not None and self.fails_for in query:
            raise self.fails
        assert step >= 300
        assert 1 <= (end - start) // step + 1 <= MOST_POINTS
        parts = QUERY.fullmatch(query)
        assert parts is not None, query
        matchers = re.findall(r'(\w+)(=~|=)"((?:[^"\\]|\\.)*)"', parts["inside"] or "")
        found = []
        for labels, values in self.rules.get(parts["name"], {}).items():
            known = dict(labels)
            if all(self._fits(known.get(name, ""), how, text) for name, how, text in matchers):
                middle = step / 2 if parts["fold"] else 0
                points = [(at, values(at - middle)) for at in range(start, end + 1, step)]
                kept = [(float(at), repr(value)) for at, value in points if not math.isnan(value)]
                if kept:
                    found.append(Found({"__name__": parts["name"], **known}, kept))
        return found

    @staticmethod
    def _fits(value: str, how: str, text: str) -> bool:
        plain = text.replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")
        return bool(re.fullmatch(plain, value)) if how == "=~" else plain == value


@dataclass
class Bench:
    """A cycle on a fake Prometheus; ``step`` lets time pass and runs it."""

    settings: Settings
    client: FakePrometheus
    folder: Path
    wall: float = NOW
    monotonic: float = 1000.0
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """As a new process does."""
        self.metrics = Metrics()
        store = Store(
            self.folder, self.report, lambda reason: self.metrics.add("llm_predictor_errors_total", reason=reason)
        )
        clock = Clock(lambda: self.wall, lambda: self.monotonic)
        self.cycle = Cycle(self.settings, self.client, store, self.metrics, self.report, clock=clock)

    def report(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def said(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.lines if name == event]

    def step(self, seconds: float = 300.0, jump: float = 0.0) -> bool:
        self.wall += seconds + jump
        self.monotonic += seconds
        return self.cycle.run()

    def text(self) -> str:
        return self.metrics.text(up_to_date=True)

    def values(self, name: str, **labels: str) -> list[float]:
        """Of all samples with these labels among theirs."""
        lines = (line for line in self.text().splitlines() if re.match(rf"{name}[ {{]", line))
        return [
            float(line.rpartition(" ")[2])
            for line in lines
            if all(f'{label}="{value}"' in line for label, value in labels.items())
        ]

    def reasons(self) -> set[str]:
        return set(re.findall(r'llm_predictor_degraded\{.*reason="(\w+)"', self.text()))


def settings(*targets: Target, **more: Any) -> Settings:
    return Settings(Prometheus("http://127.0.0.1:1"), targets, **more)


def requests(**more: Any) -> Target:
    """The usual target, with the least that a test waits for."""
    fields: dict[str, Any] = {"labels": ("model",), "history_days": 30, "horizons": ("1d",), "detectors": ("robust",)}
    return Target("requests", "model:requests:rate5m", **{**fields, **more})


def bench(folder: Path, *targets: Target, **more: Any) -> Bench:
    """Two models with traffic, for the targets given."""
    client = FakePrometheus()
    client.add("model:requests:rate5m", traffic(1), model="small")
    client.add("model:requests:rate5m", traffic(2, 40), model="large")
    return Bench(settings(*(targets or (requests(),)), **more), client, folder)
