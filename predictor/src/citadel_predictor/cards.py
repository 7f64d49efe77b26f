"""The model card: what was chosen for a series, out of what, and how good it has been where nobody had told it."""

from typing import Any

from .forecast import NAIVE, Choice
from .outlook import Plan
from .watched import Watched


def card(watched: Watched, plan: Plan, choice: Choice) -> dict[str, Any]:
    """Fields of one log line. ``skill``: how much smaller the error is than the seasonal naive's."""
    days = watched.track.days(watched.target.aggregate) if plan.daily else watched.track
    return {
        **watched.labels,
        "query": watched.target.query,
        "horizons": list(plan.horizons),
        "values": "day" if plan.daily else f"{watched.target.step} s",
        "method": choice.method,
        "mase": choice.mase.get(choice.method),
        "mase_naive": choice.mase.get(NAIVE.name),
        "skill": choice.skill,
        "coverage_80": choice.coverage,
        "mase_by_method": dict(sorted(choice.mase.items(), key=lambda pair: pair[1])),
        "history_days": days.known_days(),
        "fit_seconds": choice.fit_seconds,
        "reasons": choice.reasons,
    }
