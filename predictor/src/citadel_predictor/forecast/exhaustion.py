"""When something will be used up."""

from dataclasses import dataclass

import numpy as np

from .base import FloatArray
from .choose import Choice, choose

WEEK = 7
LEAST_DAYS = 21  # of history: with fewer, a forecast of a month is a guess


@dataclass(frozen=True)
class Exhaustion:
    """Days until the limit is reached, by probability (0.1: the early end of the interval); infinite for "not soon"."""

    eta_days: dict[float, float]
    choice: Choice


def crossing(path: FloatArray, now: float, limit: float) -> float:
    """Days until a path of daily values, which begins at ``now``, is at the limit; on a line between two days."""
    if now >= limit:
        return 0.0
    over = np.flatnonzero(path >= limit)
    if not over.size:
        return float("inf")
    day = int(over[0])
    before = now if day == 0 else float(path[day - 1])
    return day + (limit - before) / (float(path[day]) - before)


def exhaustion(daily: FloatArray, limit: float, *, days: int = 30) -> Exhaustion:
    """When daily values of shape (n,), NaN where missing, reach ``limit``, looking ``days`` ahead.

    Raises ValueError if there are fewer than 21 days of them.
    """
    known = daily[np.isfinite(daily)]
    if known.size < LEAST_DAYS:
        raise ValueError(f"{known.size} days of history are fewer than {LEAST_DAYS}")
    choice = choose(daily, WEEK, days)
    now = float(known[-1])
    paths = {0.1: choice.quantiles[0.9], 0.5: choice.quantiles[0.5], 0.9: choice.quantiles[0.1]}  # early is high
    return Exhaustion({level: crossing(path, now, limit) for level, path in paths.items()}, choice)
