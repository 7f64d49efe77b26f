"""What is foretold of one series: which questions there are, and how each is answered between two trainings."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .forecast import DAILY, DEFAULT, METHODS, NAIVE, Choice, FloatArray, Forecaster, choose, reached, refreshed
from .forecast.exhaustion import LEAST_DAYS, WEEK
from .settings import DAY, HORIZONS, LONG, Target
from .track import Track

HELD = 6  # steps that are held out at least: of one alone the error is chance
MOST_LAG = 24  # steps without a value, after which nothing is foretold
LONGEST = 1344  # values of a fit, or eight seasons where those are more: what is older has little to say
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Plan:
    """One forecast that answers for several horizons: by name how many steps ahead each is."""

    daily: bool
    steps: int
    horizons: dict[str, int] = field(hash=False, compare=False)

    @property
    def name(self) -> str:
        return f"{'day' if self.daily else 'step'}:{self.steps}"


def plans(target: Target) -> list[Plan]:
    """Horizons of few steps share one; each of the others is judged over its own length."""
    found: dict[tuple[bool, int], dict[str, int]] = {}
    for name in target.horizons:
        daily = name in LONG
        ahead = HORIZONS[name] // (DAY if daily else target.step)
        found.setdefault((daily, max(ahead, HELD)), {})[name] = ahead
    return [Plan(daily, steps, horizons) for (daily, steps), horizons in found.items()]


def chosen_methods(names: Sequence[str], plan: Plan) -> tuple[Forecaster, ...]:
    """Those of the settings; the seasonal naive is with them anyway."""
    if not names:
        return DAILY if plan.daily else DEFAULT
    return tuple(METHODS[name] for name in names if name != NAIVE.name)


@dataclass
class Answer:
    """``points``: quantiles by horizon, counted from ``at`` (seconds since the epoch), when it was made. ``reasons``:
    words of a closed set, for metrics; ``said``: in full.
    """

    at: float = 0.0
    choice: Choice | None = None
    trained: bool = False
    points: dict[str, dict[float, float]] = field(default_factory=dict)
    curve: dict[float, FloatArray] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)

    def holds(self, plan: Plan, ahead: int, step: int, now: float) -> bool:
        """Whether a forecast of so many seconds ahead is one still; in the ``step`` that follows its time the next is
        waited for.
        """
        return self.choice is not None and now - self.at <= ahead + (DAY if plan.daily else step)


def answer(
    plan: Plan, target: Target, track: Track, now: float, methods: Sequence[Forecaster], before: Choice | None
) -> Answer:
    """Forecast a track of the plan's own step. ``before``: what was chosen at the last training, None: train."""
    found = Answer(now)
    newest = track.last()
    if newest is None:
        found.reasons.add("short_history" if plan.daily else "no_history")  # of a day that is not over there is some
        return found
    lag = behind(track, newest[0], now)
    if lag > MOST_LAG:
        found.reasons.add("stale")
        found.said.append(f"{plan.name}: the last value is {lag} steps old")
        return found
    if plan.daily and track.known_days() < LEAST_DAYS:
        found.reasons.add("short_history")
        found.said.append(
            f"{track.known_days():.0f} days of history are fewer than the {LEAST_DAYS} that days ahead need"
        )
        return found
    values, season = seen(plan, target, track)
    choice, found.trained = fitted(values, season, plan.steps + lag, methods, before)
    tell(found, plan, values, choice, lag)
    return found


def recalled(plan: Plan, target: Target, track: Track, at: float, choice: Choice) -> Answer:
    """What answer() said at that time, from the choice that it made of the same track. Raises ValueError for a choice
    that was made of another.
    """
    newest = track.last()
    lag = behind(track, newest[0], at) if newest else 0
    if newest is None or choice.forecast.size < lag + plan.steps:
        raise ValueError(f"{choice.forecast.size} steps are not what was forecast of this series")
    found = Answer(at)
    tell(found, plan, seen(plan, target, track)[0], choice, lag)
    return found


def behind(track: Track, newest: int, now: float) -> int:
    """Whole steps from the newest value to now."""
    return max(0, int((now - track.end) // track.step)) + (track.end - newest) // track.step


def seen(plan: Plan, target: Target, track: Track) -> tuple[FloatArray, int]:
    """The values of a track that are learnt from, and the steps of their season."""
    season = WEEK if plan.daily else target.season // target.step
    return track.values[-max(LONGEST, 8 * season) :], season


def tell(found: Answer, plan: Plan, values: FloatArray, choice: Choice, lag: int) -> None:
    """Write into an answer what a choice for ``values`` says, whose first ``lag`` steps have gone by."""
    found.choice = choice
    found.points = {
        name: {level: float(path[lag + ahead - 1]) for level, path in choice.quantiles.items()}
        for name, ahead in plan.horizons.items()
    }
    found.curve = {level: path[lag:] for level, path in choice.quantiles.items()}
    found.said += [f"{plan.name}: {reason}" for reason in choice.reasons]
    if not np.isfinite(values[np.flatnonzero(np.isfinite(values))[0] :]).all():
        found.reasons.add("gaps")
    if choice.method == "constant":
        found.reasons.add("constant")
    elif not choice.mase:
        found.reasons.add("short_history")


def fitted(
    values: FloatArray, season: int, horizon: int, methods: Sequence[Forecaster], before: Choice | None
) -> tuple[Choice, bool]:
    """A choice, and whether methods were judged anew for it."""
    if before is not None:
        try:
            return refreshed(before, values, season, horizon), False
        except ValueError:
            pass  # it was made of too little, or its method cannot be had any more
    choice = choose(values, season, horizon, methods=methods)
    return choice, bool(choice.mase)


def until(choice: Choice, days: Track, target: Target, limit: float, now: float) -> dict[float, float]:
    """Seconds until the limit is reached, by probability; infinite for not within the forecast."""
    newest = days.last()
    if newest is None:
        return {}
    found = reached(choice, days.values, limit, below=target.direction == "below")
    return {level: max(0.0, each * DAY - (now - newest[0])) for level, each in found.items()}
