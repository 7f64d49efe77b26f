"""When something will be used up: the first day on which a daily value is at the limit.

Two things about it are unknown. Where the growth will be is one error for all days: what the forecast's interval has
beyond the sway. How a day's value sways about that is an error of each day's own, and it brings the first day forward:
one high value is enough. With m the forecast of day j, u and s the standard deviations of both, z normal, Phi the
normal distribution:  P(not yet on day k) = E_z [ product over j <= k of Phi((limit - m_j - z u_j) / s) ].
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .base import FloatArray
from .choose import DEFAULT, Choice, choose
from .growth import COMPOUND, STRAIGHT

WEEK = 7
LEAST_DAYS = 21  # of history: with fewer, a forecast of a month is a guess
DAILY = (*DEFAULT, STRAIGHT, COMPOUND)
LEVELS = (0.1, 0.5, 0.9)
RECENT = 8 * WEEK  # days from which the sway is taken
NORMAL = NormalDist()
GRID = np.array([NORMAL.inv_cdf((at + 0.5) / 25) for at in range(25)])  # z, in parts of the same probability
REACH = NORMAL.inv_cdf(0.9)
MAD = NORMAL.inv_cdf(0.75)  # median absolute deviation of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Exhaustion:
    """Days until the limit is reached, by probability (0.1: the early end of the interval); infinite for "not soon"."""

    eta_days: dict[float, float]
    choice: Choice


def sway(daily: FloatArray) -> float:
    """Standard deviation of a day's value about its growth and its week; 0 where too little is known.

    Of e_t - e_(t-7) - e_(t-1) + e_(t-8), from which level, growth and week are gone, and which has twice that of e.
    """
    weekly = daily[WEEK:] - daily[:-WEEK]
    changes = np.diff(weekly)[-RECENT:]
    known = changes[np.isfinite(changes)]
    return float(np.median(np.abs(known - np.median(known)))) / MAD / 2 if known.size else 0.0


def reached_by(middle: FloatArray, apart: FloatArray, swaying: FloatArray | float, limit: float) -> FloatArray:
    """Probability that a value has been at the limit by day 1, 2, ..., from below; arguments as in the formula above:
    m and u of shape (days,), s one or as many.
    """
    room = (limit - middle - GRID[:, None] * apart) / np.maximum(swaying, 1e-9 * max(1e-300, abs(limit)))
    below = 0.5 * (1 + np.vectorize(math.erf)(np.clip(room, -40, 40) / math.sqrt(2)))
    return np.asarray(1 - np.cumprod(below, axis=1).mean(axis=0), dtype=np.float64)


def day_of(probability: FloatArray, level: float) -> float:
    """The day by which it has been reached with this probability, which each day spreads over the hours around it."""
    over = np.flatnonzero(probability >= level)
    if not over.size:
        return float("inf")
    day = int(over[0])
    before = float(probability[day - 1]) if day else 0.0
    return day + 0.5 + (level - before) / (float(probability[day]) - before)


def reached(choice: Choice, daily: FloatArray, limit: float, *, below: bool = False) -> dict[float, float]:
    """Days after the last known one until ``limit`` is reached, by probability, with a forecast for ``daily``, shape
    (n,), NaN where missing; ``below``: it comes down to the limit. All are 0 if it is there.
    """
    sign = -1 if below else 1
    if sign * daily[np.isfinite(daily)][-1] >= sign * limit:
        return dict.fromkeys(LEVELS, 0.0)
    swaying = sway(daily)
    whole = (choice.quantiles[0.9] - choice.quantiles[0.1]) / 2 / REACH
    apart = np.sqrt(np.maximum(whole**2 - swaying**2, 0))
    probability = reached_by(sign * choice.forecast, apart, swaying, sign * limit)
    return {level: day_of(probability, level) for level in LEVELS}


def exhaustion(daily: FloatArray, limit: float, *, days: int = 30, below: bool = False) -> Exhaustion:
    """When daily values of shape (n,), NaN where missing, reach ``limit``, looking ``days`` ahead.

    Raises ValueError if there are fewer than 21 days of them.
    """
    known = np.isfinite(daily).sum()
    if known < LEAST_DAYS:
        raise ValueError(f"{known} days of history are fewer than {LEAST_DAYS}")
    choice = choose(daily, WEEK, days, methods=DAILY)
    return Exhaustion(reached(choice, daily, limit, below=below), choice)
