"""What costs nothing, and what every other method has to beat."""

from dataclasses import dataclass

import numpy as np

from .base import FloatArray


@dataclass(frozen=True)
class Repeated:
    """The same values over and over."""

    cycle: FloatArray

    def predict(self, horizon: int) -> FloatArray:
        return np.resize(self.cycle, horizon)


@dataclass(frozen=True)
class SeasonalNaive:
    """What was ``seasons`` seasons ago comes again; with season 1, the last value."""

    name: str = "naive"
    seasons: int = 1

    def least(self, season: int) -> int:
        return season * self.seasons * (1 if self.seasons == 1 else 2)

    def fit(self, values: FloatArray, season: int) -> Repeated:
        if values.size < self.least(season):
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        return Repeated(values[-season * self.seasons :])


@dataclass(frozen=True)
class Profile:
    """The mean of the last four long seasons (weeks of days), hour by hour."""

    name: str = "profile"
    seasons: int = 7
    most: int = 4

    def least(self, season: int) -> int:
        return 2 * season * self.seasons

    def fit(self, values: FloatArray, season: int) -> Repeated:
        long = season * self.seasons
        count = min(self.most, values.size // long)
        if count < 2:
            raise ValueError(f"{values.size} values are fewer than {self.least(season)}")
        return Repeated(values[-count * long :].reshape(count, long).mean(axis=0))
