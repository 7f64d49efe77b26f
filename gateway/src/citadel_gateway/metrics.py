"""Counters and histograms of a worker, and the page that the control process makes of all of them.

A worker counts in plain dictionaries (a prometheus_client child costs ten times as much), writes them once a second to
`metrics-N.json` and reads them back when it starts, so that a counter never goes back. Labels come from closed sets
only: an unknown model is `other`. The control process adds the files up; a worker never renders a page.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from citadel_gateway import __version__
from citadel_gateway.core.tally import COST, DURATION, QUEUE, STORE, TTFT, Histogram, Series

Labels = tuple[str, ...]
FRESH = 5.0  # a worker whose file is older than this is gone: its gauges count no more


# name -> (type, labels, help)
FAMILIES: dict[str, tuple[str, Labels, str]] = {
    "llm_gateway_requests_total": (
        "counter", ("model", "endpoint", "code"), "Requests by outcome: an HTTP status, timeout or client_closed."),
    "llm_gateway_request_duration_seconds": (
        "histogram", ("model", "endpoint", "stream"), "From the complete request to the last byte of the reply."),
    "llm_gateway_time_to_first_token_seconds": (
        "histogram", ("model",), "From the complete request to the first event of a stream."),
    "llm_gateway_inflight_requests": ("gauge", ("model",), "Requests that a model is working on."),
    "llm_gateway_tokens_total": (
        "counter", ("model", "type"), "Tokens: input, output, and cached (which are some of the input)."),
    "llm_gateway_cost_usd_total": (
        "counter", ("model", "component"), "Cost of requests by component: hardware, energy, tokens."),
    "llm_gateway_request_cost_usd": ("histogram", ("model",), "Cost of a request that reached an engine."),
    "llm_gateway_requests_by_tier_total": ("counter", ("tier", "outcome"), "Requests of known users by their end."),
    "llm_gateway_ratelimited_total": ("counter", ("model", "reason"), "Refused by a limit of the user."),
    "llm_gateway_shed_total": (
        "counter", ("model", "reason"), "Refused by the queue: full, wait, deadline, evicted, expired, limit."),
    "llm_gateway_fallbacks_total": ("counter", ("model", "to_model"), "Handed on to another model."),
    "llm_gateway_queue_length": ("gauge", ("model",), "Requests that wait for a slot."),
    "llm_gateway_queue_seconds": ("histogram", ("model",), "Wait for a slot, of models that have slots."),
    "llm_gateway_limit_store_up": ("gauge", (), "1 when every worker reaches the store of limits."),
    "llm_gateway_limit_store_seconds": ("histogram", (), "Answers of the store of limits."),
    "llm_gateway_journal_lost_total": ("counter", (), "Records of the journal that found no space."),
    "llm_gateway_circuit_state": (
        "gauge", ("model", "backend"), "0 closed, 1 half open, 2 open; the worst view of all workers."),
    "llm_gateway_worker_stopping": ("gauge", (), "Workers that are draining."),
    "llm_gateway_metrics_dropped_labels_total": (
        "counter", ("metric",), "Labels that became 'other' because they are not in a closed set."),
    "llm_gateway_upstream_errors_total": (
        "counter", ("model", "reason"), "Failures of a backend: connect, reset, timeout, bad_reply, status."),
    "llm_gateway_retries_total": ("counter", ("model", "reason"), "Sent again: stale connection, other backend."),
    "llm_gateway_bytes_total": ("counter", ("model", "direction"), "Bytes of bodies, in from clients and out to them."),
    "llm_gateway_connections": ("gauge", (), "Open client connections."),
    "llm_gateway_access_log_lost_total": ("counter", (), "Lines of the access log that could not be written."),
    "llm_gateway_backend_up": ("gauge", ("model", "backend"), "1 when every worker believes the backend to be up."),
    "llm_gateway_draining": ("gauge", ("model",), "1 while a model takes no new requests."),
    "llm_gateway_workers": ("gauge", (), "Workers that have reported in the last five seconds."),
    "llm_gateway_build_info": ("gauge", ("version",), "Always 1."),
}  # fmt: skip
BUCKETS = {
    "llm_gateway_request_duration_seconds": DURATION,
    "llm_gateway_time_to_first_token_seconds": TTFT,
    "llm_gateway_request_cost_usd": COST,
    "llm_gateway_queue_seconds": QUEUE,
    "llm_gateway_limit_store_seconds": STORE,
}
# the gauges of which the worst view counts; the others are added up
WORST: dict[str, Callable[[float, float], float]] = {
    "llm_gateway_backend_up": min,
    "llm_gateway_limit_store_up": min,
    "llm_gateway_circuit_state": max,
}


class Counter(Struct):
    """One sample on disk."""

    labels: Labels
    value: float


class Distribution(Struct):
    labels: Labels
    counts: list[int]
    total: float


class Report(Struct):
    """`metrics-N.json`."""

    worker: int
    written: float
    counters: dict[str, list[Counter]] = {}
    histograms: dict[str, list[Distribution]] = {}
    gauges: dict[str, list[Counter]] = {}


class Metrics:
    """What one worker has counted: finished figures by name and labels, and the running ones of `series`."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str, bool], Series] = {}
        self.tiers: dict[Labels, int] = {}  # by tier and outcome
        self.counters: dict[str, dict[Labels, float]] = {}
        self.histograms: dict[str, dict[Labels, Histogram]] = {}
        for name, (kind, _, _) in FAMILIES.items():
            if kind == "counter":
                self.counters[name] = {}
            elif kind == "histogram":
                self.histograms[name] = {}

    def count(self, name: str, labels: Labels = (), amount: float = 1) -> None:
        series = self.counters[name]
        series[labels] = series.get(labels, 0) + amount

    def observe(self, name: str, value: float, labels: Labels = ()) -> None:
        """One value of a histogram that is not counted by series."""
        bounds = BUCKETS[name]
        series = self.histograms[name]
        found = series.get(labels)
        if found is None:
            found = series[labels] = Histogram([0] * (len(bounds) + 1))
        found.observe(value, bounds)

    def of(self, model: str, endpoint: str, stream: bool) -> Series:
        """The series a request belongs to, made when it is the first."""
        key = (model, endpoint, stream)
        found = self.series.get(key)
        if found is None:
            found = self.series[key] = Series()
        return found

    def collect(self) -> None:
        """Move what the series have counted to the figures by name."""
        for (model, endpoint, stream), series in self.series.items():
            for code, count in series.codes.items():
                self.count("llm_gateway_requests_total", (model, endpoint, code), count)
            self.count("llm_gateway_bytes_total", (model, "in"), series.bytes_in)
            self.count("llm_gateway_bytes_total", (model, "out"), series.bytes_out)
            for kind, tokens in (("input", series.input), ("output", series.output), ("cached", series.cached)):
                if tokens:
                    self.count("llm_gateway_tokens_total", (model, kind), tokens)
            for component, usd in (
                ("hardware", series.hardware), ("energy", series.energy), ("tokens", series.tokens),
            ):  # fmt: skip
                if usd:
                    self.count("llm_gateway_cost_usd_total", (model, component), usd)
            labels = (model, endpoint, "true" if stream else "false")
            self.merge("llm_gateway_request_duration_seconds", labels, series.duration)
            self.merge("llm_gateway_time_to_first_token_seconds", (model,), series.first_token)
            self.merge("llm_gateway_request_cost_usd", (model,), series.cost)
            self.merge("llm_gateway_queue_seconds", (model,), series.queue)
        self.series = {}
        for tier, count in self.tiers.items():
            self.count("llm_gateway_requests_by_tier_total", tier, count)
        self.tiers.clear()

    def merge(self, name: str, labels: Labels, more: Histogram) -> None:
        if any(more.counts):
            mine = self.histograms[name].setdefault(labels, Histogram([0] * len(more.counts)))
            mine.counts = [a + b for a, b in zip(mine.counts, more.counts, strict=True)]
            mine.total += more.total

    def report(self, worker: int, gauges: dict[str, dict[Labels, float]], wall: float) -> Report:
        self.collect()
        return Report(
            worker,
            wall,
            {name: [Counter(*sample) for sample in series.items()] for name, series in self.counters.items()},
            {
                name: [Distribution(labels, one.counts, one.total) for labels, one in series.items()]
                for name, series in self.histograms.items()
            },
            {name: [Counter(*sample) for sample in series.items()] for name, series in gauges.items()},
        )

    def add(self, report: Report) -> None:
        """Count on from what a former process of this worker has written."""
        for name, samples in report.counters.items():
            for sample in samples:
                if name in self.counters:
                    self.count(name, tuple(sample.labels), sample.value)
        for name, distributions in report.histograms.items():
            for one in distributions:
                if name in self.histograms and len(one.counts) == len(BUCKETS[name]) + 1:
                    self.merge(name, tuple(one.labels), Histogram(one.counts, one.total))


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Report).decode


def write_atomically(path: Path, data: bytes, mode: int = 0o640) -> None:
    """A reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    temporary.replace(path)


def read_report(path: Path) -> Report | None:
    """A file that is missing or damaged is no reason not to start."""
    try:
        return decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def read_reports(folder: Path) -> list[Report]:
    reports = (read_report(path) for path in sorted(folder.glob("metrics-*.json")))
    return [report for report in reports if report is not None]


def fresh(reports: Iterable[Report], wall: float) -> list[Report]:
    return [report for report in reports if wall - report.written < FRESH]


def merged_gauges(reports: Iterable[Report]) -> dict[str, dict[Labels, float]]:
    """The gauges of the workers that are alive, added up, or the worst of them."""
    gauges: dict[str, dict[Labels, float]] = {}
    for report in reports:
        for name, samples in report.gauges.items():
            series = gauges.setdefault(name, {})
            for sample in samples:
                labels = tuple(sample.labels)
                worst = WORST.get(name)
                if worst is not None:
                    series[labels] = worst(series.get(labels, sample.value), sample.value)
                else:
                    series[labels] = series.get(labels, 0) + sample.value
    return gauges


def render(reports: list[Report], draining: dict[str, bool], wall: float | None = None) -> str:
    """The Prometheus text page of all workers of this host."""
    total = Metrics()
    for report in reports:
        total.add(report)
    alive = fresh(reports, time.time() if wall is None else wall)
    gauges = merged_gauges(alive)
    gauges["llm_gateway_draining"] = {(model,): float(state) for model, state in draining.items()}
    gauges["llm_gateway_workers"] = {(): float(len(alive))}
    gauges["llm_gateway_build_info"] = {(__version__,): 1.0}
    lines: list[str] = []
    for name, (kind, names, text) in FAMILIES.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        if kind == "histogram":
            for labels, one in sorted(total.histograms[name].items()):
                lines += histogram_lines(name, names, labels, one)
        else:
            for labels, value in sorted((total.counters[name] if kind == "counter" else gauges.get(name, {})).items()):
                lines.append(f"{name}{label_text(names, labels)} {number(value)}")
    return "\n".join(lines) + "\n"


def histogram_lines(name: str, names: Labels, labels: Labels, one: Histogram) -> list[str]:
    lines, running = [], 0
    for bound, count in zip((*BUCKETS[name], "+Inf"), one.counts, strict=True):
        running += count
        lines.append(f"{name}_bucket{label_text((*names, 'le'), (*labels, str(bound)))} {running}")
    tail = label_text(names, labels)
    return [*lines, f"{name}_sum{tail} {number(one.total)}", f"{name}_count{tail} {running}"]


def label_text(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in pairs) + "}"


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
