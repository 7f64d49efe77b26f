"""Which method forecasts a series: the one that did so best on the end of the series that it had not seen."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from .arima import Arima
from .base import FloatArray, Forecaster, filled
from .growth import COMPOUND, STRAIGHT
from .linear import Linear
from .lstm import Lstm
from .naive import Profile, Repeated, SeasonalNaive
from .ridge import VARIANTS

NAIVE = SeasonalNaive()
DEFAULT: tuple[Forecaster, ...] = (*VARIANTS, SeasonalNaive("naive-week", 7), Profile(), Linear())
METHODS: dict[str, Forecaster] = {each.name: each for each in (NAIVE, *DEFAULT, STRAIGHT, COMPOUND, Arima(), Lstm())}
COMBINED = "combined"
ORIGINS = (0, 1, 2, 4, 7)  # seasons between the last origin and each of those that are held out
SHARPNESS = 4  # weight = error^-SHARPNESS; measured, bench/predictor/README.md
THREADS = ThreadpoolController()  # of numpy: a matrix of 130 columns is no work for two, and a second one spins
LEAD = 0.7  # one method alone is believed where its error is below this share of all of them together


@dataclass
class Choice:
    """A forecast, who made it, and how good that one has been.

    ``forecast`` has shape (horizon,), as has each of ``quantiles`` (by probability); ``mase`` is by method: the mean
    absolute error over the holdouts, in units of the seasonal naive's mean absolute error one season ahead within the
    series (Hyndman and Koehler, 2006). ``coverage`` is the share of held out values between the outermost quantiles,
    NaN where nothing could be held out.
    """

    method: str
    forecast: FloatArray
    quantiles: dict[float, FloatArray]
    mase: dict[str, float] = field(default_factory=dict)
    coverage: float = float("nan")
    fit_seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def skill(self) -> float:
        """How much smaller the error is than the seasonal naive's, 0 if it is that one, NaN if nothing was held out."""
        if NAIVE.name not in self.mase:
            return float("nan")
        return 1 - self.mase[self.method] / self.mase[NAIVE.name] if self.mase[NAIVE.name] else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON has no NaN and no arrays: they become null and lists."""
        plain = asdict(self)
        plain["forecast"] = self.forecast.tolist()
        plain["quantiles"] = {str(level): values.tolist() for level, values in self.quantiles.items()}
        plain["coverage"] = None if np.isnan(self.coverage) else self.coverage
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Choice":
        """Raises KeyError, TypeError or ValueError for what to_dict() did not write."""
        rest = dict(plain)
        rest["forecast"] = np.asarray(rest["forecast"], dtype=np.float64)
        rest["quantiles"] = {float(level): np.asarray(values, float) for level, values in rest["quantiles"].items()}
        rest["coverage"] = float("nan") if rest["coverage"] is None else rest["coverage"]
        return cls(**rest)


def scale(series: FloatArray, season: int) -> float:
    """Mean absolute change over a season; over a step where that is nothing, as in a series that repeats itself."""
    for lag in (season, 1):
        if series.size > lag and (change := float(np.abs(series[lag:] - series[:-lag]).mean())) > 0:
            return change
    return 1.0


def cuts(size: int, season: int, horizon: int) -> list[tuple[int, int]]:
    """(end of what is learnt, end of what is held out) of each holdout, the latest first; none for a short series."""
    ahead = min(horizon, max(0, size - 3 * season - 6) or max(0, size - 2 * season))
    ends = [size - ahead - season * back for back in ORIGINS]
    return [(end, end + ahead) for end in ends if ahead > 0 and end >= max(2 * season, 4) and end >= size // 3]


def attempt(method: Forecaster, series: FloatArray, season: int, horizon: int) -> FloatArray:
    """A forecast of finite values; ValueError if this method has none."""
    try:
        ahead = method.fit(series, season).predict(horizon)
    except np.linalg.LinAlgError as error:
        raise ValueError(str(error)) from error
    if not np.isfinite(ahead).all():
        raise ValueError("its forecast is not finite")
    return ahead


def combine(forecasts: Mapping[str, FloatArray], errors: Mapping[str, float]) -> FloatArray:
    """The mean of all, each with the weight that its error leaves it."""
    least = max(min(errors.values()), 1e-300)
    weights = {name: (least / max(error, least)) ** SHARPNESS for name, error in errors.items()}
    total = sum(weights.values())
    return np.asarray(sum(forecasts[name] * (weight / total) for name, weight in weights.items()), dtype=np.float64)


def intervals(misses: FloatArray, horizon: int, levels: Sequence[float]) -> tuple[dict[float, FloatArray], float]:
    """Half widths by level for each step, and how often the widest held where it was made without the holdout at hand.

    ``misses`` has shape (holdouts, steps). Split conformal prediction on misses in units of their running size.
    """

    def width(known: FloatArray, level: float) -> FloatArray:
        steps = known.shape[1]
        near = max(1, steps // 4)
        squares = np.pad((known**2).mean(axis=0), near, mode="edge")
        size = np.sqrt(np.convolve(squares, np.full(2 * near + 1, 1 / (2 * near + 1)), mode="valid")) + 1e-300
        count = known.size
        rank = min(1.0, np.ceil((count + 1) * level) / count)
        return np.asarray(size * np.quantile(np.abs(known) / size, rank), dtype=np.float64)

    widths = {}
    for level in levels:
        each = width(misses, level)
        grow = np.sqrt(np.arange(1, max(0, horizon - each.size) + 1) / each.size + 1)  # beyond what could be held out
        widths[level] = np.concatenate([each[:horizon], each[-1] * grow])
    apart = range(len(misses)) if len(misses) > 1 else ()
    held = [np.abs(misses[at]) <= width(np.delete(misses, at, axis=0), max(levels)) for at in apart]
    return widths, float(np.mean(held)) if held else float("nan")


def bands(middle: FloatArray, widths: Mapping[float, FloatArray], floor: float) -> dict[float, FloatArray]:
    """Quantiles by probability: the middle, and two for each level; not below what the series never was below."""
    found = {0.5: middle}
    for level, width in widths.items():
        found[round((1 - level) / 2, 4)] = np.maximum(middle - width, floor)
        found[round((1 + level) / 2, 4)] = np.maximum(middle + width, floor)
    return dict(sorted(found.items()))


def simple(series: FloatArray, season: int, horizon: int, levels: Sequence[float], reasons: list[str]) -> Choice:
    """What is said of a series that is constant, or too short to hold anything back."""
    floor = 0.0 if series.min() >= 0 else -np.inf
    long = series.size >= 2 * season and np.ptp(series) > 0
    cycle, lag = (series[-season:], season) if long else (series[-1:], 1)
    ahead = Repeated(cycle).predict(horizon)
    change = float(np.sqrt(np.mean((series[lag:] - series[:-lag]) ** 2))) if series.size > lag else 0.0
    size = change * np.sqrt(1 + np.arange(horizon) // lag)
    # a normal distribution's reach, for want of holdouts
    reach = {level: size * _reach(level) for level in levels}
    name = "constant" if np.ptp(series) == 0 else NAIVE.name if long else "last"
    return Choice(name, ahead, bands(ahead, reach, floor), reasons=reasons)


def _reach(level: float) -> float:
    """Standard deviations on each side of a normal distribution's mean that hold this share of it."""
    return NormalDist().inv_cdf((1 + level) / 2)


def choose(
    values: FloatArray,
    season: int,
    horizon: int,
    *,
    methods: Sequence[Forecaster] = DEFAULT,
    levels: Sequence[float] = (0.8,),
) -> Choice:
    """Forecast ``horizon`` steps of a regular series of shape (n,), NaN where nothing was measured.

    Each method forecasts the ends of the series from what was before them; then all of them are combined, each by its
    error there. Where one alone did clearly better it is taken, and where nothing beats the seasonal naive, that.
    Raises ValueError for a horizon or level that is none, and what filled() raises.
    """
    if horizon < 1 or not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"horizon is {horizon}, levels are {list(levels)}: take 1 or more, and shares between 0 and 1")
    began = time.perf_counter()
    series, reasons = filled(values, season)
    if np.ptp(series) == 0:
        return simple(series, season, horizon, levels, [*reasons, "the series is constant"])
    holdouts = cuts(series.size, season, horizon)
    if not holdouts:
        said = f"{series.size} values are too few to hold any back for a season of {season}"
        return simple(series, season, horizon, levels, [*reasons, said])

    with THREADS.limit(limits=1, user_api="blas"):
        ahead, misses = _attempts((NAIVE, *methods), series, season, horizon, holdouts, reasons)
    chosen, missed, errors = _judge(ahead, misses, reasons)
    if chosen == COMBINED:
        ahead[COMBINED] = combine(ahead, {name: errors[name] for name in ahead})
    widths, coverage = intervals(missed, horizon, levels)
    unit = scale(series, season)
    return Choice(
        method=chosen,
        forecast=ahead[chosen],
        quantiles=bands(ahead[chosen], widths, 0.0 if series.min() >= 0 else -np.inf),
        mase={name: error / unit for name, error in errors.items()},
        coverage=coverage,
        fit_seconds=time.perf_counter() - began,
        reasons=reasons,
    )


def refreshed(choice: Choice, values: FloatArray, season: int, horizon: int) -> Choice:
    """The same choice for a series that has grown: what was chosen is fitted anew, what was measured of it stays.

    A sixth of choose()'s work, because nothing is held out. Raises ValueError if the method cannot be had any more, or
    if the choice was made without a holdout: then choose() again.
    """
    if choice.method not in choice.mase:
        raise ValueError(f"{choice.method} was not judged on a holdout")
    series, reasons = filled(values, season)
    names = [name for name in choice.mase if name != COMBINED] if choice.method == COMBINED else [choice.method]
    ahead = {}
    with THREADS.limit(limits=1, user_api="blas"):
        for name in names:
            try:
                ahead[name] = attempt(METHODS[name], series, season, horizon)
            except (KeyError, ValueError) as error:
                reasons.append(f"{name}: {error}")
    if not ahead:
        raise ValueError(f"{choice.method} cannot be fitted anew: {'; '.join(reasons)}")
    middle = combine(ahead, {name: choice.mase[name] for name in ahead})
    widths = {}
    for level in (at for at in choice.quantiles if at > 0.5):
        each = choice.quantiles[level] - choice.forecast
        widths[2 * level - 1] = np.pad(each[:horizon], (0, max(0, horizon - each.size)), mode="edge")
    floor = 0.0 if series.min() >= 0 else -np.inf
    return replace(choice, forecast=middle, quantiles=bands(middle, widths, floor), reasons=reasons)


def _attempts(
    methods: Sequence[Forecaster],
    series: FloatArray,
    season: int,
    horizon: int,
    holdouts: Sequence[tuple[int, int]],
    reasons: list[str],
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Forecast, and misses of shape (holdouts, steps), of each method that can learn from this series."""
    ahead: dict[str, FloatArray] = {}
    misses: dict[str, FloatArray] = {}
    for method in methods:
        try:
            forecast = attempt(method, series, season, horizon)
            missed = [series[end:until] - attempt(method, series[:end], season, until - end) for end, until in holdouts]
        except ValueError as error:
            reasons.append(f"{method.name}: {error}")
        else:
            ahead[method.name], misses[method.name] = forecast, np.stack(missed)
    return ahead, misses


def _judge(
    ahead: Mapping[str, FloatArray], misses: dict[str, FloatArray], reasons: list[str]
) -> tuple[str, FloatArray, dict[str, float]]:
    """The method to use, its misses, and the mean absolute error of each."""
    errors = {name: float(np.abs(missed).mean()) for name, missed in misses.items()}
    count = len(misses[NAIVE.name])
    if count > 1 and len(ahead) > 1:
        # The weights for one holdout come from the others, so that the combination is not praised for what it has seen.
        together = []
        for at in range(count):
            others = {name: float(np.abs(np.delete(missed, at, axis=0)).mean()) for name, missed in misses.items()}
            together.append(combine({name: missed[at] for name, missed in misses.items()}, others))
        misses[COMBINED] = np.stack(together)
        errors[COMBINED] = float(np.abs(misses[COMBINED]).mean())
    best = min((name for name in errors if name != COMBINED), key=errors.__getitem__)
    if COMBINED in errors and errors[best] >= LEAD * errors[COMBINED]:
        best = COMBINED
    if errors[best] >= errors[NAIVE.name]:
        if best != NAIVE.name:
            reasons.append(f"{best} loses to the seasonal naive on what was held out")
        best = NAIVE.name
    return best, misses[best], errors
