"""The past of one series: values at regular times, of which the newest are kept."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .forecast import FloatArray

DAY = 86_400
KNOWN = 0.5  # of the steps of a day that have to have a value, for the day to have one
DAILY: dict[str, Callable[..., Any]] = {"mean": np.nanmean, "max": np.nanmax, "min": np.nanmin}


class Track:
    """``values[-1]`` belongs to the ``step`` seconds that end at ``end`` (seconds since the epoch, a multiple of
    ``step``); NaN where nothing was measured. No more than ``most`` values.
    """

    def __init__(self, step: int, most: int) -> None:
        self.step, self.most = step, most
        self.end = 0
        self.values: FloatArray = np.empty(0)

    def put(self, points: Iterable[tuple[float, float]]) -> None:
        """Take (time, value) in; what was there at that time is replaced, what is between becomes NaN."""
        found = {round(at / self.step) * self.step: value for at, value in points}
        if not found:
            return
        newest = max(found)
        if not self.values.size:
            self.end = min(found) - self.step
        ahead = min((newest - self.end) // self.step, self.most)
        if ahead > 0:
            self.values = np.concatenate([self.values, np.full(ahead, np.nan)])[-self.most :]
            self.end = newest
        for at, value in found.items():
            place = self.values.size - 1 - (self.end - at) // self.step
            if place >= 0:
                self.values[place] = value if np.isfinite(value) else np.nan

    def cut(self, now: float) -> bool:
        """Forget what lies ahead of ``now``, which a clock that was wrong has put there; whether there was any."""
        over = max(0, -int((now - self.end) // self.step)) if self.values.size else 0
        if not over:
            return False
        self.values = self.values[: max(0, self.values.size - over)].copy()
        self.end = self.end - over * self.step if self.values.size else 0
        return True

    def last(self) -> tuple[int, float] | None:
        """Time and value of the newest that was measured; None if nothing was."""
        known = np.flatnonzero(np.isfinite(self.values))
        if not known.size:
            return None
        back = self.values.size - 1 - int(known[-1])
        return self.end - back * self.step, float(self.values[known[-1]])

    def days(self, aggregate: str) -> "Track":
        """One value for each whole day (UTC), by the name of an aggregation in DAILY."""
        track = Track(DAY, self.most)
        if not self.values.size:
            return track
        steps = DAY // self.step
        over = self.end % DAY // self.step  # steps of a day that is not over
        whole = self.values[: self.values.size - over]
        count = whole.size // steps
        blocks = whole[whole.size - count * steps :].reshape(count, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of days without a value
            track.values = np.asarray(DAILY[aggregate](blocks, axis=1), dtype=np.float64) if count else np.empty(0)
        track.values[np.isfinite(blocks).mean(axis=1) < KNOWN] = np.nan
        track.end = self.end - over * self.step
        return track

    def known_days(self) -> float:
        """Days from the first to the last value that was measured."""
        known = np.flatnonzero(np.isfinite(self.values))
        return float((known[-1] - known[0] + 1) * self.step / DAY) if known.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"end": self.end, "values": self.values.tolist()}  # NaN becomes null

    def restore(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for what to_dict() did not give."""
        values = np.array([np.nan if value is None else float(value) for value in state["values"]], dtype=np.float64)
        end = int(state["end"])
        if end % self.step:
            raise ValueError(f"the last value is of {end}, which is no multiple of {self.step} seconds")
        self.values, self.end = values[-self.most :], end
