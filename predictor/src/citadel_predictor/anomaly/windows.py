"""Detectors that compare a value with those of a window behind it."""

import math
from typing import Any, Literal

import numpy as np

from ..forecast import FloatArray
from .base import MOVED, STILL, bounded, size_of, tail
from .trees import Trees

LEAST = 30  # values before anything is said
MOST = 3.0  # no score is higher: one absurd value must not hide the next
LEVEL_TAIL = 4.0  # powers of ten: one value in ten thousand is at the threshold
ROBUST_DEVIATIONS = 6.0
FOREST_LEAST = 250  # values that a forest is grown from: one in n is odder than the n before it by chance alone
AS_ODD = 0.99  # the highest score of what is as odd as something that was there before
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


def out_of_constant(past: FloatArray, value: float) -> float | None:
    """The score of a value after a constant, MOST or 0; None if the past is no constant."""
    middle = float(past.mean())
    if float(past.std()) > STILL * size_of(middle):
        return None
    return MOST if abs(value - middle) > MOVED * size_of(middle) else 0.0


class Level(Window):
    """The tail of a normal distribution of past values."""

    def __init__(self, history: int = 6400) -> None:
        super().__init__("level", history)

    def judge(self, past: FloatArray, value: float) -> float:
        change = out_of_constant(past, value)
        if change is not None:
            return change
        return tail(abs(value - float(past.mean())) / float(past.std())) / LEVEL_TAIL


class Robust(Window):
    """Deviation from the median in units of the median absolute deviation: single wild values do not move either."""

    def __init__(self, history: int = 300) -> None:
        super().__init__("robust", history)

    def judge(self, past: FloatArray, value: float) -> float:
        middle = float(np.median(past))
        spread = SPREAD * float(np.median(np.abs(past - middle)))
        if spread <= STILL * size_of(middle):  # more than half of the values are the same
            spread = float(past.std())
            if spread <= STILL * size_of(middle):  # and all of the others
                spread = MOVED * size_of(middle)
        return abs(value - middle) / spread / ROBUST_DEVIATIONS


class Forest(Window):
    """Isolation forest over a value, its changes, and mean and spread of the last ones.

    At the threshold is what takes as few cuts to set apart as the oddest row that it was grown from, if it also lies
    outside of the box of all of them: trees cannot tell how far outside, and what was there before is no anomaly,
    however rare.
    """

    def __init__(self, history: int = 1000, *, refit: int = 250, trees: int = 50) -> None:
        """Fitted anew every ``refit`` values, on all of the window. Raises ValueError if that is too short."""
        if history < FOREST_LEAST:
            raise ValueError(f"history is {history}: take {FOREST_LEAST} values or more")
        super().__init__("iforest", history)
        self.refit, self.trees = refit, trees
        self.since = 0
        self.forest: Trees | None = None
        self.edge = 1.0
        self.box = (np.empty(0), np.empty(0))

    @staticmethod
    def features(values: FloatArray, width: int = 10) -> FloatArray:
        """Shape (n - width, 5) for n values."""
        pieces = np.lib.stride_tricks.sliding_window_view(values, width + 1)
        now, before = pieces[:, -1], pieces[:, -2]
        return np.column_stack([now, now - before, now - pieces[:, 0], pieces.mean(axis=1), pieces.std(axis=1)])

    def judge(self, past: FloatArray, value: float) -> float:
        change = out_of_constant(past, value)
        if change is not None:
            self.forest = None  # what varied has left the window: to be grown from what comes
            return change
        if past.size < FOREST_LEAST:
            return 0.0
        self.since += 1
        if self.forest is None or self.since >= self.refit:
            known = self.features(past)
            self.forest = Trees(known, self.trees)
            self.edge = float(self.forest.score(known).max())
            self.box = (known.min(axis=0), known.max(axis=0))
            self.since = 0
        row = self.features(np.append(past[-10:], value))
        score = float(self.forest.score(row)[0]) / self.edge
        if score > AS_ODD and self.outside(row[0]):
            return max(score, 1.0)
        return score if score > 1 + STILL else min(score, AS_ODD)

    def outside(self, row: FloatArray) -> bool:
        low, high = self.box
        margin = STILL * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
        return bool(((row < low - margin) | (row > high + margin)).any())

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
