"""Anomalies in the layout of the Numenta Anomaly Benchmark: */*.csv with timestamp and value, windows.json with labels.

The score is NAB's (Lavin and Ahmad, 2015): a detection in a window earns the more the earlier it is, one outside costs
the more the farther it is behind a window, a window without one costs; 0 is to say nothing, 100 to be perfect.
"""

import csv
import json
import math
import pickle
import resource
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from citadel_predictor.anomaly import Detector, build
from citadel_predictor.forecast import FloatArray
from numpy.typing import NDArray

PROBATION, PROBATION_MOST = 0.15, 5000
STEPS = 400  # thresholds that are tried
DAY = 86400.0
FAR = 3.0  # widths behind a window a false alarm costs all that it can
WINDOW, STEP = 6400, 100  # of NAB's windowed Gaussian
# The row citadel is what the predictor uses; the windowed Gaussian is NAB's own baseline, built anew.
ROWS = {
    "citadel": "ensemble",
    "ar": "ar",
    "level": "level",
    "robust": "robust",
    "iforest": "iforest",
    "windowed Gaussian": "",
}
# Of all 58 files, from NAB's scoreboard (standard, low_fp, low_fn).
PUBLISHED = [
    {"row": "published: ARTime", "nab_standard": 74.9, "nab_low_fp": 65.1, "nab_low_fn": 80.4},
    {"row": "published: Numenta HTM", "nab_standard": 70.1},
    {"row": "published: KNN CAD", "nab_standard": 58.0},
    {"row": "published: random cut forest", "nab_standard": 51.7},
    {"row": "published: windowed Gaussian", "nab_standard": 39.6},
]


@dataclass(frozen=True)
class Profile:
    """What a false alarm and a missed window cost; a detection is worth 1."""

    name: str
    alarm: float
    missed: float


PROFILES = (Profile("nab_standard", 0.11, 1), Profile("nab_low_fp", 0.22, 1), Profile("nab_low_fn", 0.11, 2))


@dataclass(frozen=True)
class Labelled:
    """A series, its times in seconds, and the first and last index of each window."""

    name: str
    times: FloatArray
    values: FloatArray
    windows: list[tuple[int, int]]

    @property
    def probation(self) -> int:
        """How many values at the beginning nobody is judged by."""
        return int(PROBATION * min(self.values.size, PROBATION_MOST))

    @cached_property
    def worth(self) -> tuple[FloatArray, NDArray[np.int64]]:
        """What a detection at each index earns (in a window) or costs (a share of a false alarm); its window, or -1."""
        size = self.values.size
        gain, inside = np.full(size, -1.0), np.full(size, -1)
        for number, (first, last) in enumerate(self.windows):
            until = self.windows[number + 1][0] if number + 1 < len(self.windows) else size
            behind = (np.arange(last + 1, until) - last) / max(1, last - first)
            gain[last + 1 : until] = np.where(behind > FAR, -1.0, sigmoid(np.minimum(behind, FAR)))
        for number, (first, last) in enumerate(self.windows):
            span = np.arange(first, last + 1)
            gain[first : last + 1] = sigmoid(-(last - span + 1) / (last - first + 1)) / sigmoid(np.array([-1.0]))[0]
            inside[first : last + 1] = number
        return gain, inside


def load(folder: Path) -> list[Labelled]:
    """Every series that windows.json names. Raises ValueError that names file and line of what is wrong."""
    found = []
    for name, spans in sorted(json.loads((folder / "windows.json").read_text()).items()):
        times, values = [], []
        with (folder / name).open(newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines), 2):
                try:
                    times.append(datetime.fromisoformat(row["timestamp"]).timestamp())
                    values.append(float(row["value"]))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{name} line {number}: {error}") from error
        at = np.array(times)
        windows = []
        for begin, end in spans:
            first = int(np.searchsorted(at, datetime.fromisoformat(begin).timestamp(), side="left"))
            last = int(np.searchsorted(at, datetime.fromisoformat(end).timestamp(), side="right")) - 1
            windows.append((first, last))
        found.append(Labelled(name, at, np.array(values), windows))
    return found


def sigmoid(position: FloatArray) -> FloatArray:
    """1 well before, 0 at, -1 well after a window's end."""
    return np.asarray(2 / (1 + np.exp(5 * position)) - 1, dtype=np.float64)


def raw(scores: FloatArray, series: Labelled, threshold: float, profile: Profile) -> float:
    """NAB's sum for one series: detections are scores of ``threshold`` or more."""
    gain, inside = series.worth
    detected = scores >= threshold
    detected[: series.probation] = False
    total = profile.alarm * float(gain[detected & (inside < 0)].sum())
    for number in range(len(series.windows)):
        hits = np.flatnonzero(detected & (inside == number))
        total += float(gain[hits[0]]) if hits.size else -profile.missed
    return total


def normalised(scored: list[tuple[FloatArray, Labelled]], threshold: float, profile: Profile) -> float:
    """From 0 (says nothing) to 100 (perfect)."""
    count = sum(len(series.windows) for _, series in scored)
    found = sum(raw(scores, series, threshold, profile) for scores, series in scored)
    return 100 * (found + profile.missed * count) / (count * (1 + profile.missed))


def best(scored: list[tuple[FloatArray, Labelled]], profile: Profile) -> tuple[float, float]:
    """The score at the one threshold for all series that makes it highest, as NAB takes it; and that threshold."""
    every = np.concatenate([scores[series.probation :] for scores, series in scored])
    tried = np.unique(np.quantile(every, 1 - np.geomspace(1e-5, 0.1, STEPS), method="higher"))
    tried = np.append(tried, [1.0, np.inf])
    return max((normalised(scored, float(threshold), profile), float(threshold)) for threshold in tried)


def gaussian(values: FloatArray) -> FloatArray:
    """NAB's baseline: how improbable a value is in a normal distribution of a window that moves on in steps."""
    scores = np.zeros(values.size)
    mean, spread = 0.0, 1.0
    for at, value in enumerate(values):
        if at:
            scores[at] = 1 - 0.5 * math.erfc(abs(value - mean) / spread / math.sqrt(2))
        if at < WINDOW or (at + 1 - WINDOW) % STEP == 0:
            window = values[max(0, at + 1 - WINDOW) : at + 1]
            mean, spread = float(window.mean()), float(window.std()) or 1e-6
    return scores


@dataclass(frozen=True)
class Found:
    """Scores of one series, CPU milliseconds, megabytes that the detector holds in the end, peak MB of the process."""

    scores: FloatArray
    ms: float
    held: float | None
    peak: float


def detect(job: tuple[str, Labelled]) -> Found:
    name, series = job
    detector = build(name) if name else None
    began = time.process_time()
    if detector:
        scores = np.array([detector.update(float(value)) for value in series.values])
    else:
        scores = gaussian(series.values)
    spent = (time.process_time() - began) * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Found(scores, spent, held(detector) if detector else None, peak)


def held(detector: Detector) -> float:
    """Megabytes of what a detector keeps: those that a copy takes which shares nothing with it, not even numbers."""
    plain = pickle.dumps(detector)
    tracemalloc.start()
    try:
        copied = pickle.loads(plain)  # noqa: S301  what was dumped two lines above
        size = tracemalloc.get_traced_memory()[0] / 1e6
        del copied
        return size
    finally:
        tracemalloc.stop()


def events(scored: list[tuple[FloatArray, Labelled]], threshold: float) -> dict[str, object]:
    """Precision, recall, F1 by windows and alarms outside them; seconds to the alarm; false ones a series and day."""
    caught = alarms = windows = 0
    delays: list[float] = []
    days = 0.0
    for scores, series in scored:
        detected = np.flatnonzero(scores >= threshold)
        detected = detected[detected >= series.probation]
        days += (series.times[-1] - series.times[series.probation]) / DAY
        windows += len(series.windows)
        outside = detected
        for first, last in series.windows:
            hits = detected[(detected >= first) & (detected <= last)]
            outside = outside[(outside < first) | (outside > last)]
            if hits.size:
                caught += 1
                delays.append(series.times[hits[0]] - series.times[first])
        alarms += outside.size
    precision = caught / (caught + alarms) if caught + alarms else 0.0
    recall = caught / windows if windows else 0.0
    return {
        "precision": round(precision, 3),
        "recall": round(recall, 3),
        "f1": round(2 * precision * recall / (precision + recall), 3) if precision + recall else 0.0,
        "delay_s": round(float(np.median(delays))) if delays else None,
        "false_per_day": round(float(alarms / days), 3),
    }


def score(folder: Path, jobs: int, tell: Callable[[str], None]) -> list[dict[str, object]]:
    """A row of figures for each detector, then those that were published."""
    everything = load(folder)
    rows: list[dict[str, object]] = []
    for row, name in ROWS.items():
        tell(f"{row}: {len(everything)} series")
        with ProcessPoolExecutor(jobs) as pool:  # of its own, for the peak of memory to be its own
            found = list(pool.map(detect, [(name, one) for one in everything]))
        scored = [(one.scores, series) for one, series in zip(found, everything, strict=True)]
        figures: dict[str, object] = {"row": row}
        for profile in PROFILES:
            figures[profile.name] = round(best(scored, profile)[0], 1)
        threshold = best(scored, PROFILES[0])[1] if not name else 1.0
        figures["at_1.0"] = round(normalised(scored, 1.0, PROFILES[0]), 1) if name else None
        rows.append(
            figures
            | events(scored, threshold)
            | {
                "ms_per_series": round(float(np.mean([one.ms for one in found])), 1),
                "mb_per_series": round(max(one.held or 0.0 for one in found), 2) if name else None,
                "mb_of_process": round(max(one.peak for one in found), 1),
                "series": len(everything),
            }
        )
    return [*rows, *PUBLISHED]
