"""Linear regression on a damped trend and on waves of the season."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import FloatArray

DAMPING = 0.98  # of the trend per step beyond the end: a straight line to next month is a promise nobody can keep
WAVES = 4  # of one season, and as many of seven


def waves(at: NDArray[np.int64], season: int, size: int) -> FloatArray:
    """Columns of sine and cosine at the steps ``at``, only of periods that the series has seen twice."""
    found = [np.ones(at.size)]
    for period in (season, 7 * season):
        for wave in range(1, WAVES + 1):
            if 2 * wave < period and 2 * period <= size:
                angle = 2 * np.pi * wave * at / period
                found += [np.sin(angle), np.cos(angle)]
    return np.stack(found, axis=1)


@dataclass(frozen=True)
class Line:
    """Weights of the waves, and the trend per step."""

    weights: FloatArray
    trend: float
    size: int
    season: int

    def predict(self, horizon: int) -> FloatArray:
        ahead = np.arange(self.size, self.size + horizon)
        growth = self.trend * (self.size - 1 + np.cumsum(DAMPING ** np.arange(1, horizon + 1)))
        return np.asarray(waves(ahead, self.season, self.size) @ self.weights + growth, dtype=np.float64)


@dataclass(frozen=True)
class Linear:
    """Least squares."""

    name: str = "linear"

    def least(self, season: int) -> int:
        return max(10, 2 * season)

    def fit(self, values: FloatArray, season: int) -> Line:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        steps = np.arange(values.size)
        rows = np.column_stack([steps, waves(steps, season, values.size)])
        weights = np.asarray(np.linalg.lstsq(rows, values, rcond=None)[0], dtype=np.float64)
        return Line(weights[1:], float(weights[0]), values.size, season)
