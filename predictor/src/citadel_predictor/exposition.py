"""Metrics, in the text format that Prometheus scrapes."""

import math
import os
import resource
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import __version__

Labels = tuple[tuple[str, str], ...]
BUCKETS = {
    "llm_forecast_fit_seconds": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    "llm_predictor_query_seconds": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
}
FAMILIES = {
    "llm_forecast_value": (
        "gauge",
        "Forecast of the target, in its unit; horizon_days for the days of a capacity target.",
    ),
    "llm_forecast_limit": ("gauge", "What the target may reach, in its unit."),
    "llm_forecast_limit_eta_seconds": ("gauge", "Time until the limit is reached; +Inf: not within 30 days."),
    "llm_forecast_mase": ("gauge", "Error on held out ends, in units of the seasonal naive's there; 1: it is in use."),
    "llm_forecast_coverage_ratio": ("gauge", "Share of held out values within the interval of this level."),
    "llm_forecast_history_days": ("gauge", "Days from the first to the last value that is known."),
    "llm_forecast_last_success_timestamp_seconds": ("gauge", "When the target was last read and forecast."),
    "llm_forecast_fit_seconds": (
        "histogram",
        "Time to judge all methods for one series and horizon, by the one taken.",
    ),
    "llm_anomaly_score": ("gauge", "How unusual the last value is; 1 is the detector's threshold."),
    "llm_predictor_build_info": ("gauge", "1, with the version."),
    "llm_predictor_cycle_seconds": ("gauge", "Duration of the last cycle."),
    "llm_predictor_cycles_total": ("counter", "Cycles, by whether all targets were read."),
    "llm_predictor_degraded": ("gauge", "1 for each reason why a target has less than it should."),
    "llm_predictor_errors_total": ("counter", "What went wrong, by reason."),
    "llm_predictor_query_seconds": ("histogram", "Duration of the questions to Prometheus."),
    "llm_predictor_series": ("gauge", "Series of the target that are watched."),
    "llm_predictor_series_limited_total": (
        "counter",
        "Series left out because there are too many, counted each cycle.",
    ),
    "llm_predictor_up_to_date": (
        "gauge",
        "1 if the last three cycles' time has seen one in which all targets were read.",
    ),
    "process_cpu_seconds_total": ("counter", "CPU time used."),
    "process_resident_memory_bytes": ("gauge", "Memory in use."),
    "process_start_time_seconds": ("gauge", "When the process started."),
}
STARTED = time.time()


def number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def line(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    inside = ",".join(f'{label}="{escaped(text)}"' for label, text in labels)
    return f"{name}{{{inside}}} {number(value)}" if inside else f"{name} {number(value)}"


class Histogram:
    """Counts by bucket; see the format for what `le` means."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: Labels) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            total += count
            found.append(line(f"{name}_bucket", (*labels, ("le", number(bound))), total))
        return [*found, line(f"{name}_sum", labels, self.sum), line(f"{name}_count", labels, total)]


class Sheet:
    """Lines of one target by family, put together once and scraped often."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def add(self, name: str, labels: Mapping[str, str], value: float) -> None:
        self.lines.setdefault(name, []).append(line(name, labels.items(), value))


class Metrics:
    """All there is to be scraped. Written by the cycle, read by scrapes, which wait for nothing but each other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[tuple[str, Labels], float] = {}
        self.histograms: dict[tuple[str, Labels], Histogram] = {}
        self.sheets: dict[str, Sheet] = {}
        self.set("llm_predictor_build_info", 1, version=__version__)

    def add(self, name: str, by: float = 1, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        with self.lock:
            self.values[key] = self.values.get(key, 0.0) + by

    def set(self, name: str, value: float, **labels: str) -> None:
        with self.lock:
            self.values[name, tuple(labels.items())] = value

    def get(self, name: str, **labels: str) -> float:
        """0 for what was never counted."""
        with self.lock:
            return self.values.get((name, tuple(labels.items())), 0.0)

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        with self.lock:
            self.histograms.setdefault(key, Histogram(BUCKETS[name])).observe(value)

    def publish(self, target: str, sheet: Sheet) -> None:
        with self.lock:
            self.sheets[target] = sheet

    def text(self, up_to_date: bool) -> str:
        self.set("llm_predictor_up_to_date", float(up_to_date))
        self._process()
        with self.lock:
            lines: dict[str, list[str]] = {}
            for (name, labels), value in self.values.items():
                lines.setdefault(name, []).append(line(name, labels, value))
            for (name, labels), histogram in self.histograms.items():
                lines.setdefault(name, []).extend(histogram.lines(name, labels))
            for sheet in self.sheets.values():
                for name, found in sheet.lines.items():
                    lines.setdefault(name, []).extend(found)
        text = []
        for name, (kind, said) in FAMILIES.items():
            if name in lines:
                text += [f"# HELP {name} {said}", f"# TYPE {name} {kind}", *lines[name]]
        return "\n".join(text) + "\n"

    def _process(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.set("process_cpu_seconds_total", used.ru_utime + used.ru_stime)
        self.set("process_start_time_seconds", STARTED)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.set("process_resident_memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
