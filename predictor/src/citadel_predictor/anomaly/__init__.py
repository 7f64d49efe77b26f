"""Anomalies: each value gets a score in which 1 is the threshold, whoever gives it."""

from collections.abc import Callable

from .autoregressive import AutoRegressive
from .base import Detector
from .together import Together
from .windows import Forest, Level, Limits, Robust

DETECTORS: dict[str, Callable[[], Detector]] = {
    "ensemble": Together,
    "ar": AutoRegressive,
    "level": Level,
    "robust": Robust,
    "iforest": Forest,
}


def build(name: str) -> Detector:
    """A detector by its name. Raises ValueError for one that is not there."""
    if name not in DETECTORS:
        raise ValueError(f"there is no detector {name}: take one of {', '.join(DETECTORS)}")
    return DETECTORS[name]()


__all__ = ["DETECTORS", "AutoRegressive", "Detector", "Forest", "Level", "Limits", "Robust", "Together", "build"]
