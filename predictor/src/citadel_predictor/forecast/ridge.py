"""Autoregression: the next value as a weighted sum of earlier ones, fitted by ridge regression.

b = (X'X + aI)^-1 X'y on the standardised series (Hoerl and Kennard, 1970); several steps ahead by feeding back.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .base import FloatArray

MARGIN = 0.5  # forecasts stay within the range of the series and half of it beyond: a recursion may run away
LONG = 48  # a season of more steps than this has too many lags to take them all
SHARE = 3  # lags reach back over a third of the series at most, so that twice as many rows remain


def lags(season: int, size: int, dense: bool) -> NDArray[np.int64]:
    """Which earlier values count: those of a season, of these hours on days before, and (dense) all of days 3 to 7."""
    near = [*range(1, min(season, LONG) + 2)]
    days = [day * season + off for day in range(1, 8) for off in (-1, 0, 1)]
    chosen = near + ([*days[:6], *range(3 * season, 7 * season + 2)] if dense and season <= LONG else days)
    found = np.unique(np.array(chosen, dtype=np.int64))
    return found[(found > 0) & (found <= max(1, size // SHARE))]


def autoregression(series: FloatArray, horizon: int, back: NDArray[np.int64], strength: float) -> FloatArray:
    """Forecast of shape (horizon,) for a series of shape (n,) with n greater than every lag in ``back``."""
    middle, spread = float(series.mean()), float(series.std())
    if spread <= 1e-12 * max(1.0, abs(middle)):
        return np.full(horizon, series[-1])
    scaled = (series - middle) / spread
    size, reach = scaled.size, int(back.max())
    rows = np.lib.stride_tricks.sliding_window_view(scaled[:-1], reach)[:, reach - back]
    target = scaled[reach:]
    row_mean, target_mean = rows.mean(axis=0), target.mean()
    rows = rows - row_mean
    weights = np.linalg.solve(rows.T @ rows + strength * np.eye(back.size), rows.T @ (target - target_mean))
    constant = target_mean - row_mean @ weights
    low, high = scaled.min(), scaled.max()
    slack = MARGIN * (high - low)
    whole = np.concatenate([scaled, np.empty(horizon)])
    for step in range(size, size + horizon):
        whole[step] = min(max(whole[step - back] @ weights + constant, low - slack), high + slack)
    return np.asarray(whole[size:] * spread + middle, dtype=np.float64)


@dataclass(frozen=True)
class Ready:
    """A fitted autoregression: the series as it was transformed, and how to come back from that."""

    model: "Ridge"
    values: FloatArray
    season: int

    def predict(self, horizon: int) -> FloatArray:
        return self.model.back(self.model.forward(self.values), horizon, self.season)


@dataclass(frozen=True)
class Ridge:
    """One autoregression, on the series itself or on what a transformation and a difference make of it."""

    name: str = "ridge"
    dense: bool = True
    transform: Literal["none", "log", "root"] = "none"
    difference: Literal["none", "step", "season"] = "none"
    strength: float = 1.0

    def least(self, season: int) -> int:
        return 3 * season + 6

    def fit(self, values: FloatArray, season: int) -> Ready:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        if self.transform == "log" and values.min() <= 0:
            raise ValueError("a logarithm needs values above 0")
        if self.transform == "root" and values.min() < 0:
            raise ValueError("a square root needs values of 0 or more")
        return Ready(self, values, season)

    def forward(self, values: FloatArray) -> FloatArray:
        """The series as the regression sees it, before any difference."""
        if self.transform == "log":
            return np.log(values)
        return np.sqrt(values) if self.transform == "root" else values

    def back(self, series: FloatArray, horizon: int, season: int) -> FloatArray:
        """Forecast in the unit of the series that came in."""
        step = {"none": 0, "step": 1, "season": season}[self.difference]
        changes = series[step:] - series[:-step] if step else series
        ahead = autoregression(changes, horizon, lags(season, changes.size, self.dense), self.strength)
        if step:
            whole = np.concatenate([series, ahead])
            for at in range(series.size, whole.size):
                whole[at] += whole[at - step]
            ahead = whole[series.size :]
        if self.transform == "log":
            return np.asarray(np.exp(ahead), dtype=np.float64)
        return np.maximum(ahead, 0.0) ** 2 if self.transform == "root" else ahead


# Those that choose() combines: measured on M4's hourly series, bench/predictor/README.md.
VARIANTS = (
    Ridge("ridge"),
    Ridge("ridge-log", transform="log"),
    Ridge("ridge-root", transform="root"),
    Ridge("ridge-sparse", dense=False),
    Ridge("ridge-sparse-log", dense=False, transform="log"),
    Ridge("ridge-season", difference="season"),
    Ridge("ridge-sparse-season", dense=False, difference="season"),
    Ridge("ridge-step", difference="step"),
    Ridge("ridge-sparse-step", dense=False, difference="step"),
)
