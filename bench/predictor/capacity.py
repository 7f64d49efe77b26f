"""The day on which a limit is reached, on generated growth whose day is known."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from citadel_predictor.forecast import FloatArray, exhaustion
from citadel_predictor.forecast.exhaustion import day_of, reached_by

NOTICES = (30, 14, 7)  # days before the limit is reached
CROSSING = 150  # day on which the growth itself, without season and noise, is at the limit
LENGTH = 220
AHEAD = 60  # days that are looked ahead, so that a date beyond 30 days is a date too
SERIES = 200  # of each kind
FIRST = 1000  # seed of the first one; methods were chosen by looking at seeds 0 to 59


@dataclass(frozen=True)
class Grown:
    """Daily values, what they were drawn from, a limit, and the first day of values at it."""

    values: FloatArray
    mean: FloatArray
    deviation: FloatArray
    limit: float
    day: int


def growth(kind: str, seed: int) -> Grown:
    """Straight growth of 0.3 to 1.2 % of the beginning a day, or compound growth of 0.2 to 0.6 %; weekends 2 to 10 %
    lower than the growth and working days higher; noise of 0.5 to 2 %.
    """
    random = np.random.default_rng(seed)
    days = np.arange(LENGTH)
    path = (
        100 + random.uniform(0.3, 1.2) * days
        if kind == "straight"
        else 100 * (1 + random.uniform(0.002, 0.006)) ** days
    )
    mean = path * (1 + random.uniform(0.02, 0.1) * np.where((days + random.integers(7)) % 7 < 5, 0.4, -1))
    noise = random.uniform(0.005, 0.02)
    values = mean * (1 + random.normal(0, noise, LENGTH))
    limit = float(path[CROSSING])
    return Grown(values, mean, mean * noise, limit, int(np.flatnonzero(values >= limit)[0]))


def miss(job: tuple[str, int, int]) -> tuple[float, float, float]:
    """How many days the date is wrong by, positive for late; whether the interval of 80 % holds the right one; and how
    many days it is wrong by for somebody who knows growth, week and noise, and only not what will be drawn.
    """
    kind, seed, notice = job
    grown = growth(kind, seed)
    now = grown.day - notice + 1
    found = exhaustion(grown.values[:now], grown.limit, days=AHEAD).eta_days
    mean, deviation = grown.mean[now : now + AHEAD], grown.deviation[now : now + AHEAD]
    known = day_of(reached_by(mean, np.zeros_like(mean), deviation, grown.limit), 0.5)
    return min(found[0.5], float(AHEAD)) - notice, float(found[0.1] <= notice <= found[0.9]), known - notice


def score(jobs: int, count: int = SERIES, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for each kind of growth and each notice."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs) as pool:
        for kind in ("straight", "compound"):
            for notice in NOTICES:
                tell(f"{kind} growth, {notice} days before: {count} series")
                found = np.array(
                    list(pool.map(miss, [(kind, seed, notice) for seed in range(FIRST, FIRST + count)], chunksize=4))
                )
                errors, least = np.abs(found[:, 0]), np.abs(found[:, 2])
                rows.append(
                    {
                        "row": f"{kind} growth, {notice} days before",
                        "median_error_days": round(float(np.median(errors)), 1),
                        "p90_error_days": round(float(np.quantile(errors, 0.9)), 1),
                        "least_median": round(float(np.median(least)), 1),
                        "least_p90": round(float(np.quantile(least, 0.9)), 1),
                        "late_days": round(float(np.median(found[:, 0])), 1),
                        "coverage": round(float(found[:, 1].mean()), 2),
                        "series": count,
                    }
                )
    return rows
