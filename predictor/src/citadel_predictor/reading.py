"""Values of a target's series: which there are now, and what they were."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .prometheus import MOST_POINTS, Client, Found
from .settings import DETECTION_STEP, Target

Key = tuple[str, ...]  # values of the labels that a target keeps, in their order
Points = list[tuple[float, float]]

SAMPLES = 50_000  # in one answer, of all series together
LOOK_BACK = 2 * DETECTION_STEP
OVER_TIME = {"mean": "avg_over_time", "max": "max_over_time", "min": "min_over_time"}


@dataclass(frozen=True)
class Present:
    """The series that a target has now, with their last values; ``raw``: how many there were before labels were left
    out, of which those that then looked like another were dropped.
    """

    series: dict[Key, Points]
    raw: int

    @property
    def ambiguous(self) -> bool:
        return self.raw > len(self.series)


def key_of(target: Target, labels: dict[str, str]) -> Key:
    return tuple(labels.get(name, "") for name in target.labels)


def keyed(target: Target, found: Iterable[Found]) -> dict[Key, Points]:
    """By key; of several series with one key that which comes first by all its labels."""
    series: dict[Key, Points] = {}
    for each in sorted(found, key=lambda one: sorted(one.metric.items())):
        series.setdefault(key_of(target, each.metric), each.points())
    return series


def quoted(value: str) -> str:
    """As a literal in a regular expression in a PromQL string."""
    special = "".join(f"\\{letter}" if letter in r".+*?()|[]{}^$\\" else letter for letter in value)
    return special.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def restricted(target: Target, keys: Sequence[Key]) -> str:
    """The target's selector for these series (and others with the same first label)."""
    if not target.labels:
        return target.query
    values = "|".join(sorted({quoted(key[0]) for key in keys}))
    name, _, rest = target.query.partition("{")
    inside = rest.rpartition("}")[0].strip().rstrip(",")
    return f'{name}{{{inside + "," if inside else ""}{target.labels[0]}=~"{values}"}}'


def present(client: Client, target: Target, now: int) -> Present:
    """What the last ten minutes have. ``now`` is a multiple of DETECTION_STEP."""
    found = client.range(target.query, now - LOOK_BACK, now, DETECTION_STEP)
    return Present(keyed(target, found), len(found))


def chunks(start: int, end: int, step: int, series: int) -> Iterator[tuple[int, int]]:
    """(start, end) of questions which together cover the time, each within the budget."""
    points = max(1, min(MOST_POINTS, SAMPLES // max(1, series)))
    for first in range(start, end + 1, points * step):
        yield first, min(end, first + (points - 1) * step)


def values(
    client: Client, target: Target, keys: Sequence[Key], start: int, end: int, here: Present
) -> Iterator[dict[Key, Points]]:
    """The rule's own values in steps of DETECTION_STEP, piece by piece."""
    selector = target.query if len(keys) == len(here.series) else restricted(target, keys)
    for first, last in chunks(start, end, DETECTION_STEP, spread(keys, here)):
        yield keyed(target, client.range(selector, first, last, DETECTION_STEP))


def history(
    client: Client, target: Target, keys: Sequence[Key], start: int, end: int, here: Present
) -> Iterator[dict[Key, Points]]:
    """Values of whole steps, each at the end of its step, piece by piece."""
    selector = target.query if len(keys) == len(here.series) else restricted(target, keys)
    for first, last in chunks(start, end, target.step, spread(keys, here)):
        query = f"{OVER_TIME[target.aggregate]}({selector}[{target.step}s])"
        yield keyed(target, client.range(query, first, last, target.step))


def spread(keys: Sequence[Key], here: Present) -> int:
    """How many raw series a question for these will be answered with, about."""
    return math.ceil(len(keys) * here.raw / max(1, len(here.series)))


def limits(client: Client, target: Target, now: int) -> dict[Key, float]:
    """The limit by key; for all series under () if it has none of their labels."""
    if target.limit is None:
        return {}
    if not isinstance(target.limit, str):
        return {(): target.limit}
    found: dict[Key, float] = {}
    for each in client.range(target.limit, now - LOOK_BACK, now, DETECTION_STEP):
        value = each.points()[-1][1]
        if math.isfinite(value):
            found[key_of(target, each.metric) if any(name in each.metric for name in target.labels) else ()] = value
    return found
