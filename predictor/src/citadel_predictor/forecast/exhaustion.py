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


def reached(choice: Choice, now: float, limit: float, *, below: bool = False) -> dict[float, float]:
    """Days until it reaches ``limit``, by probability; ``below``: it comes down to it. ``now``: the last value."""
    sign = -1 if below else 1
    early, late = (0.1, 0.9) if below else (0.9, 0.1)
    ends = {0.1: choice.quantiles[early], 0.5: choice.quantiles[0.5], 0.9: choice.quantiles[late]}
    return {level: crossing(sign * path, sign * now, sign * limit) for level, path in ends.items()}


def exhaustion(daily: FloatArray, limit: float, *, days: int = 30, below: bool = False) -> Exhaustion:
    """When daily values of shape (n,), NaN where missing, reach ``limit``, looking ``days`` ahead.

    Raises ValueError if there are fewer than 21 days of them.
    """
    known = daily[np.isfinite(daily)]
    if known.size < LEAST_DAYS:
        raise ValueError(f"{known.size} days of history are fewer than {LEAST_DAYS}")
    choice = choose(daily, WEEK, days)
    return Exhaustion(reached(choice, float(known[-1]), limit, below=below), choice)
