"""Forecasts: several methods, judged on what they have not seen, and never one that loses to the seasonal naive."""

from .base import Fitted, FloatArray, Forecaster, filled
from .choose import COMBINED, DEFAULT, METHODS, NAIVE, Choice, choose
from .exhaustion import Exhaustion, exhaustion

__all__ = [
    "COMBINED",
    "DEFAULT",
    "METHODS",
    "NAIVE",
    "Choice",
    "Exhaustion",
    "Fitted",
    "FloatArray",
    "Forecaster",
    "choose",
    "exhaustion",
    "filled",
]
