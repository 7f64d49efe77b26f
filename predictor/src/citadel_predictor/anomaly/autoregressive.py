"""How badly the next value was foretold, beside how badly values have been foretold so far.

Residuals of an autoregression by recursive least squares, and the tail of a normal distribution of their recent mean:
Lavin and Ahmad, "Evaluating real-time anomaly detection algorithms" (2015).
"""

import math
from typing import Any

import numpy as np

from ..forecast import FloatArray
from .base import STILL, bounded, size_of, tail
from .windows import MOST

TAIL = 5.0  # powers of ten: one in a hundred thousand would be the threshold
SHARE = 0.6  # of that, as measured: residuals have heavier tails than a normal distribution
LARGEST = 1e9  # of the inverse's trace: with nothing new for long it grows without bound


class AutoRegressive:
    """Score from the likelihood of the last residuals."""

    def __init__(self, order: int = 3, *, recent: int = 8, history: int = 2000, forgetting: float = 0.999) -> None:
        """``order`` values foretell the next; the last ``recent`` misses are compared with ``history`` of them."""
        self.name = "ar"
        self.order, self.recent, self.history, self.forgetting = order, recent, history, forgetting
        self.values: list[float] = []
        self.misses: list[float] = []
        self.weights = np.zeros(order + 1)
        self.inverse = np.eye(order + 1)
        self.centre = self.spread = 0.0
        self.seen = 0

    def update(self, value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        value = bounded(value)
        self.seen += 1
        rate = max(1 / self.seen, 1 / self.history)
        away = value - self.centre
        self.centre += rate * away
        self.spread += rate * (away * away - self.spread)
        size = max(math.sqrt(self.spread), STILL * size_of(self.centre))
        score = 0.0
        if len(self.values) == self.order:
            row = np.append((np.array(self.values) - self.centre) / size, 1.0)
            score = self._learn(row, max(-50.0, min(50.0, (value - self.centre) / size)))
        self.values = [*self.values[-self.order + 1 :], float(value)]
        return score

    def _learn(self, row: FloatArray, target: float) -> float:
        miss = target - float(row @ self.weights)
        gain = self.inverse @ row / (self.forgetting + float(row @ self.inverse @ row))
        self.weights = self.weights + gain * miss
        self.inverse = (self.inverse - np.outer(gain, row @ self.inverse)) / self.forgetting
        if not np.isfinite(self.inverse).all() or np.trace(self.inverse) > LARGEST:
            self.inverse = np.eye(self.order + 1)
        return self._judge(abs(miss))

    def _judge(self, miss: float) -> float:
        self.misses.append(miss)
        if len(self.misses) > self.history:
            del self.misses[: len(self.misses) - self.history]
        if len(self.misses) < 10 * self.recent:
            return 0.0
        past = np.array(self.misses[: -self.recent])
        newest = float(np.mean(self.misses[-self.recent :]))
        return min(MOST, tail((newest - past.mean()) / (past.std() / math.sqrt(2) + 1e-6)) / TAIL / SHARE)

    def state(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "misses": self.misses,
            "weights": self.weights.tolist(),
            "inverse": self.inverse.tolist(),
            "centre": self.centre,
            "spread": self.spread,
            "seen": self.seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        weights = np.array(state["weights"], dtype=np.float64)
        inverse = np.array(state["inverse"], dtype=np.float64)
        if inverse.shape != (self.order + 1, self.order + 1) or weights.shape != (self.order + 1,):
            raise ValueError(f"this state is not of an autoregression of order {self.order}")
        self.values = [float(value) for value in state["values"]]
        self.misses = [float(value) for value in state["misses"]]
        self.weights, self.inverse = weights, inverse
        self.centre, self.spread, self.seen = float(state["centre"]), float(state["spread"]), int(state["seen"])
