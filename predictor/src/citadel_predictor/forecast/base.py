"""What a forecaster is, and how a series is made whole before one sees it."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Fitted(Protocol):
    """A model that has seen a series."""

    def predict(self, horizon: int) -> FloatArray:
        """The next ``horizon`` values, shape (horizon,), in the unit of the series."""
        ...


class Forecaster(Protocol):
    """A way to forecast; stateless, so that one serves many series."""

    @property
    def name(self) -> str:
        """As it stands in reports and metrics."""
        ...

    def least(self, season: int) -> int:
        """How many values it needs for this season (in steps)."""
        ...

    def fit(self, values: FloatArray, season: int) -> Fitted:
        """Learn from ``values``, shape (n,), finite, regular in time, oldest first.

        Raises ValueError if the series cannot be learnt from, such as one that is too short.
        """
        ...


def filled(values: FloatArray, season: int) -> tuple[FloatArray, list[str]]:
    """The series without gaps, from its first to its last measured value, and what was done to it in words.

    A missing value becomes that of a season before or after, if there is one, else it lies on the line between its
    neighbours. Raises ValueError for another shape than (n,), for a season below 1, or if nothing was measured.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1:
        raise ValueError(f"a series has one dimension, this one has {series.ndim}")
    if season < 1:
        raise ValueError(f"season is {season}: give the steps of one season, 1 for none")
    known = np.flatnonzero(np.isfinite(series))
    if not known.size:
        raise ValueError("the series has no value: is its target scraped, and its rule loaded?")
    series = series[known[0] : known[-1] + 1].copy()
    series[~np.isfinite(series)] = np.nan
    missing = np.flatnonzero(np.isnan(series))
    if not missing.size:
        return series, []
    said = [f"{missing.size} of {series.size} values were missing and are filled in"]
    line = np.interp(np.arange(series.size), np.flatnonzero(~np.isnan(series)), series[~np.isnan(series)])
    whole = series.copy()
    for at in missing:
        beside = [other for other in (at - season, at + season) if season > 1 and 0 <= other < series.size]
        found = [series[other] for other in beside if not np.isnan(series[other])]
        whole[at] = np.mean(found) if found else line[at]
    return whole, said
