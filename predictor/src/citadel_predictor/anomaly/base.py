"""What a detector is: values in, one by one, and after each a score in which 1 is the threshold."""

import math
from typing import Any, Protocol


class Detector(Protocol):
    """Watches one series; keeps what it needs of the past itself, and no more than a bounded part of it."""

    @property
    def name(self) -> str:
        """As it stands in reports and metrics."""
        ...

    def update(self, value: float) -> float:
        """How unusual the next value is: 1 or more is an anomaly, 0 for NaN and while there is too little to go by."""
        ...

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can have it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises KeyError, TypeError or ValueError for what state() did not give."""
        ...


LARGEST = 1e100  # a value beyond is taken for this: its square has to be a number
STILL = 1e-9  # spread beside the size of the values: less is the arithmetic's, and the values are one constant
MOVED = 1e-6  # distance from a constant, beside its size, that is a change


def bounded(value: float) -> float:
    """The value, as far as its square can be had."""
    return max(-LARGEST, min(LARGEST, float(value)))


def size_of(value: float) -> float:
    """What STILL and MOVED are shares of."""
    return max(1.0, abs(value))


def tail(deviations: float) -> float:
    """-log10 of how probable so many standard deviations or more are, of a normal distribution; 30 at most."""
    return -math.log10(max(0.5 * math.erfc(deviations / math.sqrt(2)), 1e-30))
