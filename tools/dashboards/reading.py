"""A dashboard as Grafana reads it: variables filled in, queries asked of a Prometheus. For drawings and tests."""

import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
SCRAPE_INTERVAL = 15
POINTS = 400  # of a curve: about what a panel has pixels for


@dataclass(frozen=True)
class Series:
    """What came back: labels, and (seconds, value) in order; of an instant query one value."""

    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def last(self) -> float | None:
        return next((value for _, value in reversed(self.points) if not math.isnan(value)), None)


@dataclass(frozen=True)
class Span:
    """The time range of a dashboard and the step of its curves."""

    start: float
    end: float
    points: int = POINTS

    @classmethod
    def of(cls, board: Json, end: float, points: int = POINTS) -> "Span":
        """The range that the dashboard opens with, up to `end`."""
        found = re.fullmatch(r"now-(\d+)([smhdw])", board["time"]["from"])
        if found is None or board["time"]["to"] != "now":
            raise ValueError(f"{board['uid']}: time is {board['time']}, not now-<number><unit> to now")
        return cls(end - int(found[1]) * SECONDS[found[2]], end, points)

    @property
    def step(self) -> int:
        return max(15, round((self.end - self.start) / self.points / 15) * 15)


def panels(board: Json) -> Iterator[Json]:
    """Every panel but the headings, those of collapsed rows too."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def filled(text: str, choices: Mapping[str, str], span: Span) -> str:
    """The text with Grafana's own variables and the chosen ones. Raises KeyError for one that is not known."""
    own = {
        "__interval": f"{span.step}s",
        "__rate_interval": f"{max(span.step + SCRAPE_INTERVAL, 4 * SCRAPE_INTERVAL)}s",
        "__range": f"{span.end - span.start:.0f}s",
    }
    known = {**own, **choices}
    return re.sub(r"\$\{?([a-zA-Z_]+)\}?", lambda found: known[found[1]], text)


def legend(target: Json, labels: Mapping[str, str]) -> str:
    """The name of a series; a label that it lacks is empty, as in Grafana."""
    if target["legendFormat"] == "__auto":
        return ", ".join(f"{name}={value}" for name, value in labels.items() if name != "__name__") or target["expr"]
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"]).strip()


class Prometheus:
    """The three questions that a dashboard asks. Raises urllib.error.HTTPError when the answer is not 200."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, **parameters: str | float) -> Any:
        query = urllib.parse.urlencode(parameters)
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url} is no address of a Prometheus: write http://HOST:PORT")
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as reply:  # noqa: S310 - checked above
            return json.load(reply)["data"]

    def instant(self, expr: str, at: float) -> list[Series]:
        found = self.ask("query", query=expr, time=at)["result"]
        return [Series(one["metric"], [(float(one["value"][0]), float(one["value"][1]))]) for one in found]

    def curve(self, expr: str, span: Span) -> list[Series]:
        found = self.ask("query_range", query=expr, start=span.start, end=span.end, step=span.step)["result"]
        return [Series(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]

    def target(self, target: Json, choices: Mapping[str, str], span: Span) -> list[Series]:
        """What a panel's query brings."""
        expr = filled(target["expr"], choices, span)
        return self.instant(expr, span.end) if target["instant"] else self.curve(expr, span)

    def values(self, query: str, at: float) -> list[str]:
        """`label_values(selector, label)` of a variable: what exists at that moment, in order."""
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        if found is None:
            raise ValueError(f"{query} is not label_values(selector, label)")
        return sorted({one.labels[found[2]] for one in self.instant(found[1], at) if found[2] in one.labels})

    def choices(self, board: Json, at: float) -> dict[str, str]:
        """Every variable as the dashboard opens with it: all of them, or the first."""
        chosen: dict[str, str] = {}
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                values = [] if variable["includeAll"] else self.values(variable["query"]["query"], at)
                chosen[variable["name"]] = variable["allValue"] if variable["includeAll"] else (values or [""])[0]
        return chosen
