"""Forecasts: several methods, judged on what they have not seen, and never one that loses to the seasonal naive."""

from .base import Fitted, FloatArray, Forecaster, filled
from .choose import COMBINED, DEFAULT, METHODS, NAIVE, Choice, choose, refreshed
from .exhaustion import DAILY, Exhaustion, exhaustion, reached

__all__ = [
    "COMBINED",
    "DAILY",
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
    "reached",
    "refreshed",
]
