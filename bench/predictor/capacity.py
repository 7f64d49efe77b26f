"""The day on which a limit is reached, on generated growth whose day is known."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from citadel_predictor.forecast import FloatArray, exhaustion

NOTICES = (30, 14, 7)  # days before the limit is reached
CROSSING = 150  # day on which the growth itself, without season and noise, is at the limit
LENGTH = 220
AHEAD = 60  # days that are looked ahead, so that a date beyond 30 days is a date too
SERIES = 60  # of each kind


def growth(kind: str, seed: int) -> tuple[FloatArray, float, int]:
    """Daily values, a limit, and the first day on which the values are at it.

    Straight growth of 0.3 to 1.2 % of the beginning a day, or compound growth of 0.2 to 0.6 %; weekends 2 to 10 % lower
    than the growth and working days higher; noise of 0.5 to 2 %.
    """
    random = np.random.default_rng(seed)
    days = np.arange(LENGTH)
    path = (
        100 + random.uniform(0.3, 1.2) * days
        if kind == "straight"
        else 100 * (1 + random.uniform(0.002, 0.006)) ** days
    )
    week = 1 + random.uniform(0.02, 0.1) * np.where((days + random.integers(7)) % 7 < 5, 0.4, -1)
    values = path * week * (1 + random.normal(0, random.uniform(0.005, 0.02), LENGTH))
    limit = float(path[CROSSING])
    return values, limit, int(np.flatnonzero(values >= limit)[0])


def miss(job: tuple[str, int, int]) -> tuple[float, float]:
    """How many days the date is wrong by, positive for late, and whether the interval of 80 % holds the right one."""
    kind, seed, notice = job
    values, limit, day = growth(kind, seed)
    found = exhaustion(values[: day - notice + 1], limit, days=AHEAD).eta_days
    return min(found[0.5], float(AHEAD)) - notice, float(found[0.1] <= notice <= found[0.9])


def score(jobs: int, count: int = SERIES, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for each kind of growth and each notice."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs) as pool:
        for kind in ("straight", "compound"):
            for notice in NOTICES:
                tell(f"{kind} growth, {notice} days before: {count} series")
                found = np.array(list(pool.map(miss, [(kind, seed, notice) for seed in range(count)], chunksize=4)))
                errors = np.abs(found[:, 0])
                rows.append(
                    {
                        "row": f"{kind} growth, {notice} days before",
                        "median_error_days": round(float(np.median(errors)), 1),
                        "p90_error_days": round(float(np.quantile(errors, 0.9)), 1),
                        "late_days": round(float(np.median(found[:, 0])), 1),
                        "coverage": round(float(found[:, 1].mean()), 2),
                        "series": count,
                    }
                )
    return rows
