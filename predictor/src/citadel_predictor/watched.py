"""One series that is watched: its past, its detectors, and what was chosen for it."""

import math
from dataclasses import dataclass, field
from typing import Any

from .anomaly import Detector, build
from .anomaly.base import bounded
from .anomaly.windows import Limits
from .forecast import Choice
from .reading import Key, Points
from .settings import DAY, THRESHOLD, Target
from .track import Track

NEVER = -math.inf


@dataclass
class Watched:
    """``asked``: until when its history was asked for; ``seen``: until when its detectors saw it; ``trained``: when
    its methods were judged (seconds since the epoch, all three). ``absent``: for how many seconds it has been away.
    ``made``: by plan when its forecast was made, and the time of the newest value then. ``limit``: the last that was
    read of a rule.
    """

    target: Target
    key: Key
    asked: int = 0
    seen: int = 0
    trained: float = NEVER
    absent: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    made: dict[str, tuple[float, int]] = field(default_factory=dict)
    limit: float | None = None

    def __post_init__(self) -> None:
        self.track = Track(self.target.step, self.target.history_days * DAY // self.target.step)
        self.detectors: dict[str, Detector] = {name: build(name) for name in self.target.detectors if name != THRESHOLD}

    @property
    def labels(self) -> dict[str, str]:
        """As metrics have them: a scrape sets `instance` itself, so ours is `host`."""
        names = ("host" if name == "instance" else name for name in self.target.labels)
        return {"target": self.target.name, **dict(zip(names, self.key, strict=True))}

    def warm(self, points: Points) -> None:
        """Show detectors the past that nobody is told of."""
        known = [(at, value) for at, value in points if at > self.seen and math.isfinite(value)]
        for detector in self.detectors.values():
            if not refilled(detector, [value for _, value in known]):
                for _, value in known:
                    detector.update(value)
        if points:
            self.seen = max(self.seen, round(points[-1][0]))

    def feed(self, points: Points) -> None:
        """Show detectors what is new; the scores are those of the last value."""
        for at, value in points:
            if at > self.seen:
                self.scores |= {name: detector.update(value) for name, detector in self.detectors.items()}
                self.seen = round(at)

    def judge(self, limit: float | None, points: Points) -> None:
        """The score of the threshold, which learns nothing."""
        if THRESHOLD in self.target.detectors:
            self.scores.pop(THRESHOLD, None)
            if limit is not None and math.isfinite(limit) and points:
                self.scores[THRESHOLD] = Limits(limit, self.target.direction).update(points[-1][1])

    def clamp(self, now: float) -> bool:
        """Undo what a clock that ran ahead has done; whether there was anything."""
        wrong = self.track.cut(now)
        if self.asked > now:
            newest = self.track.last()
            self.asked, wrong = (newest[0] if newest else 0), True
        if self.seen > now:
            self.seen, wrong = int(now), True
        if self.trained > now:
            self.trained, wrong = NEVER, True
        return wrong

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": list(self.key),
            "asked": self.asked,
            "seen": self.seen,
            "trained": None if self.trained == NEVER else self.trained,
            "absent": self.absent,
            "track": self.track.to_dict(),
            "scores": self.scores,
            "choices": {name: choice.to_dict() for name, choice in self.choices.items()},
            "made": self.made,
            "limit": None if self.limit is None else {"rule": self.target.limit, "value": self.limit},
            "detectors": {name: detector.state() for name, detector in self.detectors.items()},
        }

    @classmethod
    def from_dict(cls, target: Target, state: dict[str, Any]) -> "Watched":
        """Raises KeyError, TypeError or ValueError for what to_dict() did not give. A detector that cannot use its
        state, because it is of another version, begins anew.
        """
        key = tuple(str(value) for value in state["key"])
        if len(key) != len(target.labels):
            raise ValueError(f"a series has {len(key)} labels, the target keeps {len(target.labels)}")
        watched = cls(target, key, int(state["asked"]), int(state["seen"]))
        watched.trained = NEVER if state["trained"] is None else float(state["trained"])
        watched.absent = float(state["absent"])
        watched.track.restore(state["track"])
        watched.choices = {str(name): Choice.from_dict(plain) for name, plain in state["choices"].items()}
        # A state from before these were kept has none of them: then nothing is shown until Prometheus has answered.
        scores = state.get("scores", {})
        watched.scores = {name: float(scores[name]) for name in target.detectors if name in scores}
        watched.made = {str(name): (float(at), int(end)) for name, (at, end) in state.get("made", {}).items()}
        limit = state.get("limit")
        if limit is not None and limit["rule"] == target.limit:
            watched.limit = float(limit["value"])
        for name in watched.detectors:
            try:
                watched.detectors[name].restore(state["detectors"][name])
            except (KeyError, TypeError, ValueError):
                watched.detectors[name] = build(name)
                watched.seen = 0  # all are warmed again: they saw the same
        if watched.seen == 0:
            watched.detectors = {name: build(name) for name in watched.detectors}
        return watched


def refilled(detector: Detector, values: list[float]) -> bool:
    """Whether a detector whose state is nothing but a window of values has been given these at once: nobody is
    told the scores of past values, so none of hundreds of them is judged.
    """
    state = detector.state()
    if set(state) != {"values"}:
        return False
    if values:
        detector.restore({"values": [*state["values"], *(bounded(value) for value in values)]})
    return True
