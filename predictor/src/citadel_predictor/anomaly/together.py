"""Several views of one series that have to agree, and one alarm for one event."""

import math
from typing import Any

from .base import bounded
from .shapes import HISTORY, Past, Shape

# Of the last 4, 16 and 48 values; the mean of the three counts.
SHORT, SHORT_THRESHOLD = (4, 16, 48), 1.6
# And of the last 288, a day by the five minutes, in 16 means: a noon like midnight is only odd beside its day.
LONG, LONG_THRESHOLD = (16, 18), 3.2
MUTED = 0.5


class Together:
    """How rare the last values are in their short shapes taken together, or in their long one alone.

    Thresholds are -log10 of a rank, so the long one needs 1,600 values before it can speak.
    """

    def __init__(self, quiet: int = 120) -> None:
        """``quiet`` values after an alarm have a score below 1: nobody is told twice of one event."""
        if quiet < 0:
            raise ValueError(f"quiet is {quiet}: take 0 or more values")
        self.name = "ensemble"
        self.quiet, self.left = quiet, 0
        self.past = Past()
        self.short, self.long = [Shape(points) for points in SHORT], Shape(*LONG)

    def update(self, value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        self.past.append(bounded(value))
        values = self.past.last()
        together = sum(shape.judge(values) for shape in self.short) / len(self.short)
        score = max(together / SHORT_THRESHOLD, self.long.judge(values) / LONG_THRESHOLD)
        if self.left:
            self.left -= 1
            return min(score, MUTED)
        if score >= 1:
            self.left = self.quiet
        return score

    def state(self) -> dict[str, Any]:
        shapes = [shape.state() for shape in (*self.short, self.long)]
        return {"left": self.left, "values": self.past.last().tolist(), "shapes": shapes}

    def restore(self, state: dict[str, Any]) -> None:
        past = Past()
        for value in state["values"][-HISTORY:]:
            past.append(float(value))
        for shape, saved in zip((*self.short, self.long), state["shapes"], strict=True):
            shape.restore(saved)
        self.past, self.left = past, int(state["left"])
