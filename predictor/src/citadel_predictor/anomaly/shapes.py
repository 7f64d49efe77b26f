"""Has anything like the last values been seen before?

The nearest neighbours of the last few values among all earlier stretches of that length, and the rank of their distance
among the distances so far: conformal nearest neighbours, after Laxhammar and Falkman (2014). A rank needs no
distribution, so one threshold serves a smooth series and a wild one.
"""

import math
from typing import Any

import numpy as np

from ..forecast import FloatArray
from .base import STILL, size_of

HISTORY = 4000  # values that are searched, and distances that are ranked: a fortnight by the five minutes
NEIGHBOURS = 20  # their mean distance counts, so that what has happened once or twice is still unusual
LEAST = 100  # distances before anything is said: with fewer no rank is rare


class Past:
    """The last ``HISTORY`` values as one array, in room for twice as many, so that each is copied once."""

    def __init__(self) -> None:
        self.room = np.zeros(2 * HISTORY)
        self.end = 0

    def append(self, value: float) -> None:
        if self.end == self.room.size:
            self.room[:HISTORY] = self.room[HISTORY:]
            self.end = HISTORY
        self.room[self.end] = value
        self.end += 1

    def last(self) -> FloatArray:
        """Oldest first; a view, good until the next append."""
        return self.room[max(0, self.end - HISTORY) : self.end]


def sums(values: FloatArray, width: int) -> FloatArray:
    """Of every ``width`` neighbours, shape (n - width + 1,).

    From sums of 1, 2, 4 and so on: differences of a running total would lose what is small behind what is large.
    """
    size = values.size - width + 1
    total, begin, block = np.zeros(size), 0, 1
    while width:
        if width & 1:
            total += values[begin : begin + size]
            begin += block
        width >>= 1
        if width:
            values = values[:-block] + values[block:]
            block *= 2
    return total


class Shape:
    """How rare the last ``points`` means of ``step`` values are, as -log10 of the share that was as far from others."""

    def __init__(self, points: int, step: int = 1) -> None:
        self.points, self.step = points, step
        self.distances = np.zeros(HISTORY)
        self.seen = 0

    def judge(self, values: FloatArray) -> float:
        """``values`` end with the newest; 0 while there is too little to go by."""
        near = self.nearest(values)
        if near is None:
            return 0.0
        known = self.distances[: min(self.seen, HISTORY)]
        rank = (int(np.count_nonzero(known >= near)) + 1) / (known.size + 1)
        self.distances[self.seen % HISTORY] = near
        self.seen += 1
        return -math.log10(rank) if known.size >= LEAST else 0.0

    def nearest(self, values: FloatArray) -> float | None:
        """Distance to the nearest neighbours that share no value with the newest stretch; None if they are too few."""
        span = self.points * self.step
        count = values.size - 2 * span + 1
        if count < NEIGHBOURS:
            return None
        # From the newest value on: then no digits are lost to an offset, nor to a wild value elsewhere.
        centred = values - values[-1]
        means = sums(centred, self.step) / self.step if self.step > 1 else centred
        newest = means[means.size - (self.points - 1) * self.step - 1 :: self.step]
        if self.step == 1:
            earlier = means[: count + self.points - 1]
            product = np.correlate(earlier, newest, "valid")
            apart = sums(earlier * earlier, self.points) + float(newest @ newest) - 2 * product
        else:
            apart = np.zeros(count)
            for point, value in enumerate(newest):
                away = means[point * self.step :][:count] - value
                apart += away * away
        nearest = float(np.partition(apart, NEIGHBOURS - 1)[:NEIGHBOURS].mean())
        found = math.sqrt(max(0.0, nearest))
        return found if found > STILL * size_of(float(np.abs(values[-span:]).max())) else 0.0

    def state(self) -> dict[str, Any]:
        """Six digits of each distance: they are only ranked."""
        return {"seen": self.seen, "distances": [float(f"{near:.6g}") for near in self.distances[: self.seen]]}

    def restore(self, state: dict[str, Any]) -> None:
        distances = np.array(state["distances"], dtype=np.float64)
        seen = int(state["seen"])
        if distances.shape != (min(seen, HISTORY),):
            raise ValueError(f"{distances.size} distances are not what {seen} values leave")
        self.distances[: distances.size], self.seen = distances, seen
