"""Faults that are put into a generated load: which detector notices them, and how soon."""

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from citadel_predictor.anomaly import DETECTORS, build
from citadel_predictor.forecast import FloatArray

DAY = 288  # values by the five minutes
BEFORE = 12 * DAY  # that a detector has seen when the fault begins
WATCHED = DAY  # after that the fault is missed
LEARNING = 3 * DAY  # alarms of the first days are not counted
SERIES = 10


def load(seed: int) -> FloatArray:
    """Thirteen days: a wave of a day from 70 to 130, and noise of which two thirds last from one value to the next."""
    random = np.random.default_rng(seed)
    steps = np.arange(BEFORE + WATCHED)
    noise = random.normal(0, 3, steps.size)
    for at in range(1, steps.size):
        noise[at] += 0.67 * noise[at - 1]
    return np.asarray(100 + 30 * np.sin(2 * np.pi * (steps / DAY + random.uniform())) + noise, dtype=np.float64)


def spike(values: FloatArray, _: np.random.Generator) -> None:
    values[:3] += 60


def drop(values: FloatArray, _: np.random.Generator) -> None:
    values[:12] *= 0.1


def level_shift(values: FloatArray, _: np.random.Generator) -> None:
    values += 40


def drift(values: FloatArray, _: np.random.Generator) -> None:
    values += np.linspace(0, 80, values.size)


def variance(values: FloatArray, random: np.random.Generator) -> None:
    values[:48] += random.normal(0, 15, 48)


def season_break(values: FloatArray, _: np.random.Generator) -> None:
    values[:] = 200 - values


def missing(values: FloatArray, _: np.random.Generator) -> None:
    values[:24] = np.nan


# The last is none: that values are missing is for a rule on absent metrics to say, and a detector has to keep quiet.
FAULTS = {
    "spike": spike,
    "drop": drop,
    "level_shift": level_shift,
    "drift": drift,
    "variance": variance,
    "season_break": season_break,
    "missing": missing,
}


def watch(job: tuple[str, int]) -> tuple[int, dict[str, float]]:
    """Alarms of one detector before the fault, and values until each fault's alarm (NaN: none)."""
    name, seed = job
    values = load(seed)
    seasoned = build(name)
    scores = [seasoned.update(float(value)) for value in values[:BEFORE]]
    alarms = sum(score >= 1 for score in scores[LEARNING:])
    until = {}
    for fault, inject in FAULTS.items():
        detector, after = copy.deepcopy(seasoned), values[BEFORE:].copy()
        inject(after, np.random.default_rng(seed))
        found = np.flatnonzero(np.array([detector.update(float(value)) for value in after]) >= 1)
        until[fault] = float(found[0]) if found.size else float("nan")
    return alarms, until


def score(jobs: int, count: int = SERIES, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, object]]:
    """A row for each detector: share of faults noticed, and the median minutes until then."""
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(jobs) as pool:
        for name in DETECTORS:
            tell(f"{name}: {count} series")
            found = list(pool.map(watch, [(name, seed) for seed in range(count)]))
            row: dict[str, object] = {"row": "citadel" if name == "ensemble" else name}
            for fault in FAULTS:
                delays = np.array([until[fault] for _, until in found])
                seen = delays[np.isfinite(delays)]
                row[fault] = f"{seen.size}/{count}" + (f" {5 * float(np.median(seen)):.0f} min" if seen.size else "")
            days = count * (BEFORE - LEARNING) / DAY
            row["false_per_day"] = round(sum(alarms for alarms, _ in found) / days, 3)
            rows.append(row)
    return rows
