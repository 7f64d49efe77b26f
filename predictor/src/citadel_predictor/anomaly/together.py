"""Two views of one series that have to agree, and one alarm for one event."""

from typing import Any

from .autoregressive import SHARE, AutoRegressive
from .windows import Level

MOST = 1.5  # of either: both have to see something
THRESHOLD = 0.9


class Together:
    """The mean of how unlikely the value is and how unlikely the last misses are; quiet for a while after an alarm."""

    def __init__(self, quiet: int = 120) -> None:
        """``quiet`` values after an alarm have a score below 1: nobody is told twice of one event."""
        if quiet < 0:
            raise ValueError(f"quiet is {quiet}: take 0 or more values")
        self.name = "ensemble"
        self.quiet, self.left = quiet, 0
        self.level, self.residual = Level(), AutoRegressive()

    def update(self, value: float) -> float:
        level, residual = self.level.update(value), self.residual.update(value) * SHARE
        score = (min(level, MOST) + min(residual, MOST)) / 2 / THRESHOLD
        if self.left:
            self.left -= 1
            return min(score, 0.5)
        if score >= 1:
            self.left = self.quiet
        return score

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "level": self.level.state(), "residual": self.residual.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.level.restore(state["level"])
        self.residual.restore(state["residual"])
        self.left = int(state["left"])
