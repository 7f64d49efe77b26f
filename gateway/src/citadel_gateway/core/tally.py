"""What each request counts: plain numbers, which `metrics` makes series of."""

from bisect import bisect_left
from typing import Final

DURATION: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
TTFT: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
QUEUE: Final = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COST: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
STORE: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Histogram:
    """How many values fell into each bucket, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self, counts: list[int], total: float = 0.0) -> None:
        self.counts = counts
        self.total = total

    def observe(self, value: float, bounds: tuple[float, ...]) -> None:
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value


class Series:
    """All that is counted for one (model, endpoint, stream): a request looks it up once."""

    __slots__ = (
        "bytes_in", "bytes_out", "cached", "codes", "cost", "duration", "energy", "first_token", "hardware", "input",
        "output", "queue", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.duration = Histogram([0] * (len(DURATION) + 1))
        self.first_token = Histogram([0] * (len(TTFT) + 1))
        self.cost = Histogram([0] * (len(COST) + 1))
        self.queue = Histogram([0] * (len(QUEUE) + 1))
        self.bytes_in = 0
        self.bytes_out = 0
        self.input = 0
        self.output = 0
        self.cached = 0
        self.hardware = 0.0  # USD
        self.energy = 0.0
        self.tokens = 0.0
