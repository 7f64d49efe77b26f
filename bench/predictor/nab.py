"""Anomalies in the layout of the Numenta Anomaly Benchmark: */*.csv with timestamp and value, windows.json with labels.

The score is NAB's (Lavin and Ahmad, 2015): a detection in a window earns the more the earlier it is, one outside costs
the more the farther it is behind a window, a window without one costs; 0 is to say nothing, 100 to be perfect.
"""

import csv
import json
import math
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from citadel_predictor.anomaly import build
from citadel_predictor.forecast import FloatArray
from numpy.typing import NDArray

PROBATION, PROBATION_MOST = 0.15, 5000
STEPS = 400  # thresholds that are tried
DAY = 86400.0
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


def worth(series: Labelled) -> tuple[FloatArray, NDArray[np.int64]]:
    """What a detection at each index earns (in a window) or costs (a share of a false alarm); its window, or -1."""
    size = series.values.size
    gain, inside = np.full(size, -1.0), np.full(size, -1)
    for number, (first, last) in enumerate(series.windows):
        until = series.windows[number + 1][0] if number + 1 < len(series.windows) else size
        width = max(1, last - first)
        after = np.arange(last + 1, until)
        gain[last + 1 : until] = sigmoid(np.minimum((after - last) / width, 3.0))
        gain[last + 1 : until][(after - last) / width > 3.0] = -1.0
    for number, (first, last) in enumerate(series.windows):
        span = np.arange(first, last + 1)
        gain[first : last + 1] = sigmoid(-(last - span + 1) / (last - first + 1)) / sigmoid(np.array([-1.0]))[0]
        inside[first : last + 1] = number
    return gain, inside


def raw(scores: FloatArray, series: Labelled, threshold: float, profile: Profile) -> float:
    """NAB's sum for one series: detections are scores of ``threshold`` or more."""
    gain, inside = worth(series)
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
    """NAB's baseline: how improbable a value is in a normal distribution of the last 6,400."""
    scores = np.zeros(values.size)
    for at in range(1, values.size):
        past = values[max(0, at - 6400) : at]
        spread = float(past.std()) or 1e-6
        scores[at] = 1 - 0.5 * math.erfc(abs(values[at] - past.mean()) / spread / math.sqrt(2))
    return scores


def detect(job: tuple[str, Labelled]) -> tuple[FloatArray, float, float]:
    """Scores of one series, CPU milliseconds and peak megabytes."""
    name, series = job
    began = time.process_time()
    if name:
        detector = build(name)
        scores = np.array([detector.update(float(value)) for value in series.values])
    else:
        scores = gaussian(series.values)
    return scores, (time.process_time() - began) * 1000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
        "false_per_day": round(alarms / days, 3),
    }


def score(folder: Path, jobs: int, tell: Callable[[str], None]) -> list[dict[str, object]]:
    """A row of figures for each detector, then those that were published."""
    everything = load(folder)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(jobs) as pool:
        for row, name in ROWS.items():
            tell(f"{row}: {len(everything)} series")
            found = list(pool.map(detect, [(name, one) for one in everything]))
            scored = [(scores, series) for (scores, _, _), series in zip(found, everything, strict=True)]
            figures: dict[str, object] = {"row": row}
            for profile in PROFILES:
                figures[profile.name] = round(best(scored, profile)[0], 1)
            threshold = best(scored, PROFILES[0])[1] if not name else 1.0
            figures["at_1.0"] = round(normalised(scored, 1.0, PROFILES[0]), 1) if name else None
            rows.append(
                figures
                | events(scored, threshold)
                | {
                    "ms_per_series": round(float(np.mean([spent for _, spent, _ in found])), 1),
                    "mb_of_process": round(max(peak for _, _, peak in found), 1),
                    "series": len(everything),
                }
            )
    return [*rows, *PUBLISHED]
