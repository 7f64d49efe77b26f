"""Detectors that compare a value with those of a window behind it."""

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..forecast import FloatArray
from .base import bounded, tail

if TYPE_CHECKING:
    from sklearn.ensemble import IsolationForest

LEAST = 30  # values before anything is said
MOST = 3.0  # no score is higher: one absurd value must not hide the next
LEVEL_TAIL = 4.0  # powers of ten: one value in ten thousand is at the threshold
ROBUST_DEVIATIONS = 6.0
SPREAD = 1.4826  # of a normal distribution, standard deviation / median absolute deviation


class Window:
    """The last values, and what to make of the next one."""

    def __init__(self, name: str, history: int) -> None:
        if history < LEAST:
            raise ValueError(f"history is {history}: take {LEAST} values or more")
        self.name, self.history = name, history
        self.values: list[float] = []

    def update(self, value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        value = bounded(value)
        score = min(MOST, self.judge(np.array(self.values), value)) if len(self.values) >= LEAST else 0.0
        self.values.append(value)
        if len(self.values) > self.history:
            del self.values[: len(self.values) - self.history]
        return score

    def judge(self, past: FloatArray, value: float) -> float:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    def restore(self, state: dict[str, Any]) -> None:
        self.values = [float(value) for value in state["values"]][-self.history :]


class Level(Window):
    """The tail of a normal distribution of past values."""

    def __init__(self, history: int = 6400) -> None:
        super().__init__("level", history)

    def judge(self, past: FloatArray, value: float) -> float:
        middle, spread = float(past.mean()), float(past.std())
        away = abs(value - middle)
        if spread <= 1e-9 * max(1.0, abs(middle)):
            return MOST if away > 1e-6 * max(1.0, abs(middle)) else 0.0
        return tail(away / spread) / LEVEL_TAIL


class Robust(Window):
    """Deviation from the median in units of the median absolute deviation: single wild values do not move either."""

    def __init__(self, history: int = 300) -> None:
        super().__init__("robust", history)

    def judge(self, past: FloatArray, value: float) -> float:
        middle = float(np.median(past))
        spread = SPREAD * float(np.median(np.abs(past - middle)))
        if spread <= 1e-9 * max(1.0, abs(middle)):  # more than half of the values are the same
            spread = float(past.std()) or 1e-6 * max(1.0, abs(middle))
        return abs(value - middle) / spread / ROBUST_DEVIATIONS


class Forest(Window):
    """Isolation forest (Liu, Ting and Zhou, 2008) over a value, its changes, and mean and spread of the last ones."""

    def __init__(self, history: int = 1000, *, refit: int = 250, trees: int = 50) -> None:
        """Fitted anew every ``refit`` values, on all of the window."""
        super().__init__("iforest", history)
        self.refit, self.trees = refit, trees
        self.since = 0
        self.forest: IsolationForest | None = None
        self.edge = 1.0

    @staticmethod
    def features(values: FloatArray, width: int = 10) -> FloatArray:
        """Shape (n - width, 5) for n values."""
        pieces = np.lib.stride_tricks.sliding_window_view(values, width + 1)
        now, before = pieces[:, -1], pieces[:, -2]
        return np.column_stack([now, now - before, now - pieces[:, 0], pieces.mean(axis=1), pieces.std(axis=1)])

    def judge(self, past: FloatArray, value: float) -> float:
        self.since += 1
        if self.forest is None or self.since >= self.refit:
            from sklearn.ensemble import IsolationForest  # here: seconds and 60 MB that the other detectors do without

            known = self.features(past)
            self.forest = IsolationForest(n_estimators=self.trees, random_state=0).fit(known)
            self.edge = float(-self.forest.score_samples(known).min())
            self.since = 0
        newest = -float(self.forest.score_samples(self.features(np.append(past[-10:], value)))[0])
        return newest / self.edge

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.forest = None  # grown again from the same values


class Limits:
    """A bound that somebody has set; nothing is learnt."""

    def __init__(self, limit: float, side: Literal["above", "below"] = "above") -> None:
        if not math.isfinite(limit) or side not in {"above", "below"}:
            raise ValueError(f"limit is {limit} and side is {side}: take a number, and above or below")
        self.name, self.limit, self.side = "threshold", limit, side

    def update(self, value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        return float(value >= self.limit if self.side == "above" else value <= self.limit)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass
