"""Forecasts in the layout of the M4 competition: a row a series in train.csv, its continuation in test.csv."""

import csv
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from citadel_predictor.forecast import NAIVE, FloatArray, choose
from citadel_predictor.forecast.choose import scale

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


def measure(job: tuple[str, Series]) -> tuple[float, float, float, float, float]:
    """MASE, sMAPE in per cent, coverage, CPU milliseconds and peak megabytes of one series."""
    method, series = job
    began = time.process_time()
    ahead, low, high = METHODS[method](series.before, series.after.size)
    spent = (time.process_time() - began) * 1000
    miss = np.abs(series.after - ahead)
    size = np.abs(series.after) + np.abs(ahead)
    smape = 200 * float(np.mean(np.divide(miss, size, out=np.zeros_like(miss), where=size > 0)))
    held = float(np.mean((low <= series.after) & (series.after <= high))) if np.isfinite(low).all() else float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return float(miss.mean()) / scale(series.before, SEASON), smape, held, spent, peak


def score(folder: Path, jobs: int, tell: Callable[[str], None]) -> list[dict[str, object]]:
    """A row of figures for each method, then those that were published."""
    everything = load(folder)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(jobs) as pool:
        for method in METHODS:
            tell(f"{method}: {len(everything)} series")
            figures = np.array(list(pool.map(measure, [(method, one) for one in everything], chunksize=8)))
            mase, smape, coverage, spent, _ = figures.mean(axis=0)
            rows.append(
                {
                    "row": method,
                    "mase": round(mase, 3),
                    "smape": round(smape, 3),
                    "coverage": None if np.isnan(coverage) else round(coverage, 3),
                    "ms_per_series": round(spent, 1),
                    "mb_of_process": round(float(figures[:, 4].max()), 1),
                    "series": len(everything),
                }
            )
    return [*rows, *PUBLISHED]
