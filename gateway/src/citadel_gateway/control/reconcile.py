"""The ledger against the engines' own counters: `vllm:prompt_tokens_total` and `vllm:generation_tokens_total`.

Counters begin anew with each start of an engine, so both sides are compared since a baseline (the counters as they were
at a moment, kept in a file), or since the engine was started where there is none or where it is older. What the
engine's own canary has used is no request's and is taken off.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

SAMPLE = re.compile(
    r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?:\s+\d+)?\s*"
)
BACKEND = re.compile(r'(?:^|,)backend="([^"]*)"')
MODEL = re.compile(r'(?:^|,)model="([^"]*)"')
INPUT, OUTPUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
STARTED = ("process_start_time_seconds", "vllm:prompt_tokens_created", "vllm:generation_tokens_created")
CANARY_INPUT = "citadel_engine_canary_prompt_tokens_total"
CANARY_OUTPUT = "citadel_engine_canary_generation_tokens_total"
SLACK = 2.0  # seconds; the start of an engine is told by rounded clocks


class Counters(Struct):
    """Of one engine. `started`: seconds since the epoch, 0 when the engine does not say."""

    input_tokens: int = 0
    output_tokens: int = 0
    started: float = 0.0

    def less(self, other: "Counters") -> "Counters":
        return Counters(self.input_tokens - other.input_tokens, self.output_tokens - other.output_tokens, self.started)


class Reading(Struct):
    """All counters at a moment: what a baseline file holds. Canaries are those of a model, on this host."""

    at: float
    engines: dict[str, dict[str, Counters]] = {}  # model -> backend -> counters
    canaries: dict[str, Counters] = {}


class Share(Struct):
    """What the ledger has for one backend: the form of /admin/ledger/tokens."""

    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    inexact: int = 0


class Sample(NamedTuple):
    name: str
    labels: str
    value: float


def samples(page: str) -> list[Sample]:
    found = []
    for line in page.splitlines():
        match = SAMPLE.fullmatch(line) if line and not line.startswith("#") else None
        if match is not None:
            found.append(Sample(match["name"], match["labels"] or "", float(match["value"])))
    return found


def engines(page: str, backend: str) -> dict[str, Counters]:
    """The counters of a page of vLLM; `backend`: whose it is, when the page does not say."""
    found: dict[str, Counters] = {}
    starts: dict[str, float] = {}
    for name, labels, value in samples(page):
        match = BACKEND.search(labels)
        whose = match[1] if match else backend
        if name == INPUT:
            found.setdefault(whose, Counters()).input_tokens += int(value)
        elif name == OUTPUT:
            found.setdefault(whose, Counters()).output_tokens += int(value)
        elif name in STARTED:
            starts[whose] = min(starts.get(whose, value), value)
    for whose, counters in found.items():
        counters.started = starts.get(whose, 0.0)
    return found


def canaries(folder: Path) -> dict[str, Counters]:
    """What the engines' own probes have used, by model, from the files that the engines of this host write."""
    found: dict[str, Counters] = {}
    for path in sorted(folder.glob("*/metrics.prom")):
        try:
            page = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for name, labels, value in samples(page):
            match = MODEL.search(labels)
            if match is None:
                continue
            if name == CANARY_INPUT:
                found.setdefault(match[1], Counters()).input_tokens += int(value)
            elif name == CANARY_OUTPUT:
                found.setdefault(match[1], Counters()).output_tokens += int(value)
    return found


class Span(NamedTuple):
    """Since when an engine is compared, and what it has counted since."""

    since: float
    counters: Counters
    restarted: bool


def span(now: Counters, before: Counters | None, at: float) -> Span | None:
    """`at`: when `before` was read. None: the engine does not say when it was started, and there is no baseline."""
    if before is not None:
        same = not now.started or not before.started or abs(now.started - before.started) < SLACK
        delta = now.less(before)
        if same and delta.input_tokens >= 0 and delta.output_tokens >= 0:
            return Span(at, delta, False)
    if not now.started:
        return None
    return Span(now.started, now, before is not None)


class Line(Struct):
    """One model, one kind of token."""

    model: str
    kind: str  # input, output
    engine: int
    canary: int
    ledger: int
    inexact: int  # requests of which the engine gave no final figures
    since: float
    restarted: bool

    @property
    def difference(self) -> int:
        return self.ledger + self.canary - self.engine

    @property
    def relative(self) -> float:
        return abs(self.difference) / max(1, self.engine)


def lines(model: str, spans: Mapping[str, Span], shares: Mapping[str, Share], canary: Counters) -> list[Line]:
    """`shares`: what the ledger has, by backend, each since its engine's span began."""
    since = min(one.since for one in spans.values())
    restarted = any(one.restarted for one in spans.values())
    inexact = sum(one.inexact for one in shares.values())
    return [
        Line(
            model, kind, sum(getattr(one.counters, field) for one in spans.values()), getattr(canary, field),
            sum(getattr(one, field) for one in shares.values()), inexact, since, restarted,
        )
        for kind, field in (("input", "input_tokens"), ("output", "output_tokens"))
    ]  # fmt: skip


def load(path: Path) -> Reading:
    """A baseline. Raises `OSError` or `msgspec.DecodeError`."""
    return msgspec.json.decode(path.read_bytes(), type=Reading)
