"""Growth that goes on as it was: so much, or such a share, with each step, about a level for each step of the season.

Made for capacity, where `Linear` is too careful: its trend fades.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import FloatArray


def columns(at: NDArray[np.int64], season: int) -> FloatArray:
    """The step itself, and one column for each step of the season: shape (n, 1 + season)."""
    found = np.zeros((at.size, 1 + season))
    found[:, 0] = at
    found[np.arange(at.size), 1 + at % season] = 1
    return found


@dataclass(frozen=True)
class Grown:
    """Weights of the columns."""

    weights: FloatArray
    size: int
    season: int
    compound: bool

    def predict(self, horizon: int) -> FloatArray:
        ahead = columns(np.arange(self.size, self.size + horizon), self.season) @ self.weights
        with np.errstate(over="ignore"):  # what is not finite is no forecast: choose.attempt() says so
            return np.asarray(np.exp(ahead) if self.compound else ahead, dtype=np.float64)


@dataclass(frozen=True)
class Growth:
    """Least squares, for compound growth of the logarithm."""

    name: str = "growth"
    compound: bool = False

    def least(self, season: int) -> int:
        return 3 * season

    def fit(self, values: FloatArray, season: int) -> Grown:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        if self.compound and values.min() <= 0:
            raise ValueError("a logarithm needs values above 0")
        target = np.log(values) if self.compound else values
        rows = columns(np.arange(values.size), season)
        weights = np.asarray(np.linalg.lstsq(rows, target, rcond=None)[0], dtype=np.float64)
        return Grown(weights, values.size, season, self.compound)


STRAIGHT, COMPOUND = Growth(), Growth("growth-compound", compound=True)
