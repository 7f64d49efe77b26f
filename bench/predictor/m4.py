"""Forecasts in the layout of the M4 competition: a row a series in train.csv, its continuation in test.csv."""

import csv
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from citadel_predictor.forecast import NAIVE, FloatArray, choose
from citadel_predictor.forecast.choose import scale

from . import peers

SEASON = 24
HORIZON = 48
# Hourly part of the competition, from its published table of results.
PUBLISHED = [
    {"row": "published: best of the competition (Doornik)", "mase": 0.801, "smape": 8.913},
    {"row": "published: Smyl, winner overall", "mase": 0.893, "smape": 9.328},
    {"row": "published: ARIMA", "msis": 7.538},
    {"row": "published: Theta", "mase": 2.455, "smape": 18.138},
    {"row": "published: seasonal naive", "mase": 1.193, "smape": 13.912},
]


@dataclass(frozen=True)
class Series:
    """One series, and what came after."""

    name: str
    before: FloatArray
    after: FloatArray


def read(file: Path) -> Iterator[tuple[str, FloatArray]]:
    """Name and values of each row; raises ValueError that names the row and column of what is no number."""
    with file.open(newline="") as lines:
        rows = csv.reader(lines)
        next(rows, None)
        for number, row in enumerate(rows, 2):
            cells = [cell for cell in row[1:] if cell not in {"", "NA"}]
            try:
                yield row[0], np.array([float(cell) for cell in cells])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{file.name} line {number}: {error}") from error


def load(folder: Path) -> list[Series]:
    """All series; without test.csv the last 48 values of each are held out."""
    train = dict(read(folder / "train.csv"))
    if (folder / "test.csv").exists():
        test = dict(read(folder / "test.csv"))
        if missing := sorted(set(train) - set(test)):
            raise ValueError(f"test.csv has no row {missing[0]}, which train.csv has")
        return [Series(name, values, test[name]) for name, values in train.items()]
    return [Series(name, values[:-HORIZON], values[-HORIZON:]) for name, values in train.items()]


def citadel(before: FloatArray, horizon: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What the predictor would say: the forecast, and the ends of its interval of 80 %."""
    choice = choose(before, SEASON, horizon)
    return choice.forecast, choice.quantiles[0.1], choice.quantiles[0.9]


def naive(before: FloatArray, horizon: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    ahead = NAIVE.fit(before, SEASON).predict(horizon)
    return ahead, np.full(horizon, np.nan), np.full(horizon, np.nan)


METHODS: dict[str, Callable[[FloatArray, int], tuple[FloatArray, FloatArray, FloatArray]]] = {
    "citadel": citadel,
    "seasonal naive": naive,
}


@dataclass(frozen=True)
class Figures:
    """Of one series: MASE, sMAPE in per cent, coverage (NaN: no interval), CPU milliseconds, peak MB of the process."""

    mase: float
    smape: float
    coverage: float
    ms: float
    mb: float


def judge(series: Series, ahead: FloatArray, low: FloatArray, high: FloatArray, ms: float, mb: float) -> Figures:
    miss = np.abs(series.after - ahead)
    size = np.abs(series.after) + np.abs(ahead)
    smape = 200 * float(np.mean(np.divide(miss, size, out=np.zeros_like(miss), where=size > 0)))
    held = float(np.mean((low <= series.after) & (series.after <= high))) if np.isfinite(low).all() else float("nan")
    return Figures(float(miss.mean()) / scale(series.before, SEASON), smape, held, ms, mb)


def measure(job: tuple[str, Series]) -> Figures:
    """Of one of METHODS."""
    method, series = job
    began = time.process_time()
    ahead, low, high = METHODS[method](series.before, series.after.size)
    spent = (time.process_time() - began) * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return judge(series, ahead, low, high, spent, peak)


def needed(job: tuple[str, Series]) -> float:
    """Megabytes that one of METHODS has at once while it forecasts."""
    method, series = job
    tracemalloc.start()
    try:
        METHODS[method](series.before, series.after.size)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def summary(row: str, figures: list[Figures], megabytes: float | None) -> dict[str, object]:
    covered = [one.coverage for one in figures if not np.isnan(one.coverage)]
    return {
        "row": row,
        "mase": round(float(np.mean([one.mase for one in figures])), 3),
        "smape": round(float(np.mean([one.smape for one in figures])), 3),
        "coverage": round(float(np.mean(covered)), 3) if covered else None,
        "ms_per_series": round(float(np.mean([one.ms for one in figures])), 1),
        "mb_per_series": None if megabytes is None else round(megabytes, 2),
        "mb_of_process": round(max(one.mb for one in figures), 1),
        "series": len(figures),
    }


def others(
    everything: list[Series], own: list[Figures], jobs: int, tell: Callable[[str], None]
) -> Iterator[dict[str, object]]:
    """A row for each peer, on a sample of the series where it is slow, with the product's error on the same series."""
    if not peers.installed():
        tell(f"{' and '.join(peers.PEERS)} are left out: statsforecast is not installed. {peers.INSTALL} does it")
        return
    for method, every in peers.PEERS.items():
        sample = everything[::every]
        tell(f"{method}: {len(sample)} series")
        horizon = max(one.after.size for one in sample)
        found = peers.forecast(method, [one.before for one in sample], SEASON, horizon, jobs)
        figures = []
        for one, said in zip(sample, found, strict=True):
            paths = [np.array(said[name])[: one.after.size] for name in ("mean", "low", "high")]
            figures.append(judge(one, paths[0], paths[1], paths[2], said["ms"], said["mb"]))
        name = f"{method} (statsforecast)" + (f", every {every}th series" if every > 1 else "")
        there = round(float(np.mean([one.mase for one in own[::every]])), 3)
        yield summary(name, figures, None) | {"citadel_mase_there": there}


def score(folder: Path, jobs: int, tell: Callable[[str], None]) -> list[dict[str, object]]:
    """A row of figures for each method, then those that were published."""
    everything = load(folder)
    rows: list[dict[str, object]] = []
    own: list[Figures] = []
    for method in METHODS:
        tell(f"{method}: {len(everything)} series")
        with ProcessPoolExecutor(jobs) as pool:  # of its own, for the peak of memory to be its own
            found = list(pool.map(measure, [(method, one) for one in everything], chunksize=8))
            longest = max(everything, key=lambda one: one.before.size)
            rows.append(summary(method, found, pool.submit(needed, (method, longest)).result()))
        own = own or found
    return [*rows, *others(everything, own, jobs, tell), *PUBLISHED]
