"""ARIMA on what is left when the mean of each hour of the season is taken away."""

import warnings
from dataclasses import dataclass

import numpy as np

from .base import FloatArray

LONGEST = 1000  # values that it learns from: its cost grows with them, its forecast does not improve


@dataclass(frozen=True)
class Seasonal:
    """The forecast of the rest, and the season that is put back on it."""

    rest: object
    cycle: FloatArray

    def predict(self, horizon: int) -> FloatArray:
        ahead = np.asarray(self.rest.forecast(horizon), dtype=np.float64)  # type: ignore[attr-defined]  # statsmodels has no types
        return ahead + np.resize(self.cycle, horizon)


@dataclass(frozen=True)
class Arima:
    """Order (p, d, q), fitted as Hannan and Rissanen do: milliseconds where the likelihood takes seconds."""

    name: str = "arima"
    order: tuple[int, int, int] = (3, 0, 2)

    def least(self, season: int) -> int:
        return max(30, 2 * season)

    def fit(self, values: FloatArray, season: int) -> Seasonal:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        from statsmodels.tsa.arima.model import ARIMA  # 80 MB and seconds, which only those pay who ask for it

        count = min(values.size, LONGEST) // season
        recent = values[-count * season :]
        cycle = recent.reshape(count, season).mean(axis=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about starting values: the holdout judges the result
            try:
                model = ARIMA(recent - np.tile(cycle, count), order=self.order, enforce_stationarity=False)
                return Seasonal(model.fit(method="hannan_rissanen"), cycle)
            except (np.linalg.LinAlgError, IndexError) as error:
                raise ValueError(f"this series has no ARIMA{self.order}: {error}") from error
