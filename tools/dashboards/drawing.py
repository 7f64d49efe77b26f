"""One dashboard as a picture: every panel at its place, from what its queries bring. Not Grafana, but its layout."""

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from tools.dashboards.reading import Prometheus, Span, filled, legend
from tools.dashboards.units import shown

Json = dict[str, Any]
WIDE, EDGE, GAP, CELL, HEAD, FOOT = 1680, 14, 8, 34, 78, 38  # pixels
DPI = 100
BACK, PANEL, BORDER, GRID, TEXT, DIM, FAINT = (
    "#0f1116",
    "#171a20",
    "#262a33",
    "#262b34",
    "#d7dae2",
    "#9aa1ae",
    "#5c6370",
)
PALETTE = ("#5794F2", "#E9A23B", "#3FC1A5", "#C58AF9", "#FF7D6B", "#A3C644", "#58C7E0", "#E06CA9", "#D6C04F", "#8E96A3")
FOOTER = "drawn by tools/draw_dashboards.py from Prometheus; not Grafana"
STYLES: dict[str, Any] = {"": "-", "dash": (0, (4, 3)), "dot": (0, (1, 2))}
PIECES = {"": ((0, 13),), "dash": ((0, 5), (8, 5)), "dot": ((0, 2), (4, 2), (8, 2), (12, 2))}  # the same in a legend
TICKS = (60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 345_600, 604_800)
SEVERITIES = {"critical": "#E5534B", "warning": "#E9A23B", "info": "#5794F2"}


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    style: str  # empty, dash or dot

    @property
    def last(self) -> float | None:
        return next((value for _, value in reversed(self.points) if not math.isnan(value)), None)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels from the upper left corner."""

    x: float
    y: float
    w: float
    h: float

    def inside(self, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> "Box":
        return Box(self.x + left, self.y + top, self.w - left - right, self.h - top - bottom)


class Sheet:
    """A figure that is measured in pixels from the top."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDE / DPI, height / DPI), dpi=DPI, facecolor=BACK)

    def text(self, x: float, y: float, text: str, size: float = 8.5, colour: str = TEXT, **more: Any) -> None:
        given: dict[str, Any] = {"ha": "left", "va": "center", "parse_math": False, "zorder": 4, **more}
        self.figure.text(x / WIDE, 1 - y / self.height, text, fontsize=size, color=colour, **given)

    def frame(self, box: Box, face: str = PANEL, edge: str = BORDER, radius: float = 4) -> None:
        low = (box.x / WIDE, 1 - (box.y + box.h) / self.height)
        style = f"round,pad=0,rounding_size={radius / WIDE}"
        aspect = WIDE / self.height
        patch = FancyBboxPatch(
            low,
            box.w / WIDE,
            box.h / self.height,
            boxstyle=style,
            mutation_aspect=aspect,
            facecolor=face,
            edgecolor=edge,
            linewidth=0.8,
            transform=self.figure.transFigure,
            zorder=0,
        )
        self.figure.add_artist(patch)

    def fill(self, box: Box, colour: str) -> None:
        low = (box.x / WIDE, 1 - (box.y + box.h) / self.height)
        wide, tall = box.w / WIDE, box.h / self.height
        self.figure.add_artist(
            Rectangle(low, wide, tall, color=colour, lw=0, transform=self.figure.transFigure, zorder=1)
        )

    def axes(self, box: Box) -> Axes:
        place = (box.x / WIDE, 1 - (box.y + box.h) / self.height, box.w / WIDE, box.h / self.height)
        found = self.figure.add_axes(place, facecolor="none", zorder=2)
        for side in found.spines.values():
            side.set_visible(False)
        return found

    def save(self, path: Path) -> None:
        """As a picture of 160 colours, a third of the size."""
        raw = io.BytesIO()
        self.figure.savefig(raw, format="png", dpi=DPI, facecolor=BACK)
        image = Image.open(raw).convert("RGB").quantize(160, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        image.save(path, optimize=True)


def width(text: str, size: float) -> float:
    """About as many pixels as the text is wide."""
    return len(text) * size * DPI / 72 * 0.58


def short(text: str, room: float, size: float) -> str:
    most = max(3, int(room / (size * DPI / 72 * 0.56)))
    return text if len(text) <= most else text[: most - 1] + "…"


def steps_colour(value: float, rule: Json) -> str:
    """The colour of the last threshold that the value reaches."""
    colour = TEXT
    for step in rule["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return str(colour)


def words_for(value: float, mappings: Sequence[Json]) -> tuple[str, str] | None:
    """What a value mapping says in the place of the value, and in which colour."""
    for mapping in mappings:
        if mapping["type"] == "value" and f"{value:g}" in mapping["options"]:
            found = mapping["options"][f"{value:g}"]
            return found["text"], found["color"]
    return None


def properties(panel: Json, name: str) -> Json:
    """The overrides of the panel for a field of this name."""
    found: Json = {}
    for override in panel["fieldConfig"]["overrides"]:
        matcher = override["matcher"]
        by_name = matcher["id"] == "byName" and matcher["options"] == name
        if by_name or (matcher["id"] == "byRegexp" and re.search(matcher["options"].strip("/"), name)):
            found |= {one["id"]: one["value"] for one in override["properties"]}
    return found


def curve(panel: Json, name: str, points: list[tuple[float, float]]) -> Curve:
    given = properties(panel, name)
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    colour = given.get("color", {}).get("fixedColor", PALETTE[number % len(PALETTE)])
    return Curve(name, points, colour, given.get("custom.lineStyle", {}).get("fill", ""))


def apart(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of which a colour was chosen by the name, none of them like another as long as there are enough."""
    taken: set[str] = set()
    found = []
    for one in curves:
        colour = one.colour
        if colour in taken and not one.style and colour in PALETTE:
            colour = next((free for free in PALETTE if free not in taken), colour)
        taken.add(colour)
        found.append(Curve(one.name, one.points, colour, one.style))
    return found


class Board:
    """Draws the panels of one dashboard."""

    def __init__(self, board: Json, url: str, end: float) -> None:
        self.board = board
        self.prometheus = Prometheus(url)
        self.span = Span.of(board, end)
        self.choices = self.prometheus.choices(board, end)
        self.events = list(self.annotations())
        bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
        self.sheet = Sheet(HEAD + bottom * CELL + FOOT)
        self.kinds: dict[str, Callable[[Json, Box], None]] = {
            "timeseries": self.lines,
            "trend": self.ahead,
            "stat": self.tile,
            "bargauge": self.bars,
            "table": self.table,
            "alertlist": self.alerts,
        }

    def annotations(self) -> list[tuple[float, float, str]]:
        """(start, end, colour) of what the annotations mark."""
        step = max(60, int((self.span.end - self.span.start) / 10_000))
        found = []
        for one in self.board["annotations"]["list"]:
            expr = filled(one["expr"], self.choices, self.span)
            answer = self.prometheus.ask("query_range", query=expr, start=self.span.start, end=self.span.end, step=step)
            for series in answer["result"]:
                times = [float(at) for at, _ in series["values"]]
                starts = [times[0], *(later for sooner, later in pairwise(times) if later - sooner > 1.5 * step)]
                ends = [*(sooner for sooner, later in pairwise(times) if later - sooner > 1.5 * step), times[-1]]
                found += [(start, end, one["iconColor"]) for start, end in zip(starts, ends, strict=True)]
        return found

    def draw(self, path: Path) -> None:
        self.head()
        unit = (WIDE - 2 * EDGE) / 24
        for panel in self.board["panels"]:
            place = panel["gridPos"]
            box = Box(EDGE + place["x"] * unit, HEAD + place["y"] * CELL, place["w"] * unit, place["h"] * CELL)
            if panel["type"] == "row":
                self.row(panel, box)
                continue
            box = box.inside(GAP / 2, 0, GAP / 2, GAP)
            self.sheet.frame(box)
            title = short(panel["title"], box.w - 24, 9.5)
            self.sheet.text(box.x + 12, box.y + 16, title, 9.5, TEXT, weight="bold")
            self.kinds[panel["type"]](panel, box.inside(12, 30, 12, 10))
        self.sheet.text(EDGE + 4, self.sheet.height - FOOT / 2, FOOTER, 8, FAINT)
        end = datetime.fromtimestamp(self.span.end, UTC)
        said = f"{self.board['uid']} · until {end:%Y-%m-%d %H:%M} UTC"
        self.sheet.text(WIDE - EDGE - 4, self.sheet.height - FOOT / 2, said, 8, FAINT, ha="right")
        self.sheet.save(path)

    def head(self) -> None:
        self.sheet.text(EDGE + 4, 24, self.board["title"], 15, TEXT, weight="bold")
        self.sheet.text(EDGE + 4, 49, self.board["description"], 9, DIM)
        said = f"last {self.board['time']['from'].removeprefix('now-')} · every {self.board['refresh']}"
        x = WIDE - EDGE - 4.0
        for text in (said, *reversed(self.chips())):
            wide = width(text, 8.5) + 18
            x -= wide
            self.sheet.frame(Box(x, 14, wide, 24), PANEL, BORDER)
            self.sheet.text(x + wide / 2, 26, text, 8.5, DIM, ha="center")
            x -= 6
        others = "     ".join(f"↗ {link['title']}" for link in self.board["links"])
        self.sheet.text(WIDE - EDGE - 4, 53, others, 8.5, "#7EA6E8", ha="right")

    def chips(self) -> list[str]:
        listed = [one for one in self.board["templating"]["list"] if one["type"] == "query"]
        return [f"{one['label']}: {'All' if one['includeAll'] else self.choices[one['name']]}" for one in listed]

    def row(self, panel: Json, box: Box) -> None:
        self.sheet.text(box.x + 6, box.y + box.h / 2 + 2, "▸" if panel["collapsed"] else "▾", 10, DIM)
        hidden = f"   ({len(panel['panels'])} panels, closed)" if panel["collapsed"] else ""
        self.sheet.text(box.x + 24, box.y + box.h / 2 + 2, panel["title"] + hidden, 11, TEXT, weight="bold")

    def asked(self, panel: Json) -> list[Curve]:
        return [
            curve(panel, legend(target, series.labels), series.points)
            for target in panel["targets"]
            for series in self.prometheus.target(target, self.choices, self.span)
        ]

    def nothing(self, panel: Json, box: Box) -> None:
        said = panel["fieldConfig"]["defaults"]["noValue"]
        self.sheet.text(box.x + box.w / 2, box.y + box.h / 2, said, 11, FAINT, ha="center")

    # the kinds of panels

    def lines(self, panel: Json, box: Box) -> None:
        curves = apart(self.asked(panel))
        if not curves:
            return self.nothing(panel, box)
        rows = self.legend(curves, box)
        axes = self.sheet.axes(box.inside(52, 4, 4, 24 + rows * 17))
        given = panel["fieldConfig"]["defaults"]
        custom = given["custom"]
        if custom["drawStyle"] == "bars":
            self.piles(axes, curves, self.span.step)
        elif custom["stacking"]["mode"] == "normal":
            self.stack(axes, curves)
        else:
            for one in curves:
                xs, ys = broken(one.points, self.span.step)
                axes.plot(xs, ys, color=one.colour, lw=1.1 if one.style else 1.5, ls=STYLES[one.style])
                if not one.style and len(curves) <= 4 and custom.get("axisSoftMin") == 0:
                    axes.fill_between(xs, ys, 0, color=one.colour, alpha=custom["fillOpacity"] / 100, lw=0)
        self.scale(axes, panel, curves)
        for start, end, colour in self.events:
            if start > self.span.start + self.span.step:
                axes.axvspan(start, end, 0, 0.018, color=colour, alpha=0.7, lw=0)
                axes.axvline(start, color=colour, lw=0.8, ls=(0, (2, 2)), alpha=0.8)
        axes.set_xlim(self.span.start, self.span.end)
        stamps, names = ticks(self.span, int(box.w / 90))
        axes.set_xticks(stamps, names)
        return None

    def scale(self, axes: Axes, panel: Json, curves: Sequence[Curve]) -> None:
        """The value axis: soft bounds, unit, threshold lines."""
        given = panel["fieldConfig"]["defaults"]
        custom = given["custom"]
        low, high = axes.get_ylim()
        low, high = min(low, custom.get("axisSoftMin", low)), max(high, custom.get("axisSoftMax", high))
        if custom.get("axisSoftMin") == 0 and all(value >= 0 for one in curves for _, value in one.points):
            low = 0
        if high <= low or high == 0:
            high = low + 1
        if custom.get("axisSoftMax") == 1 and given["unit"] == "percentunit" and high <= 1.1:
            high = max(1.0, max(value for one in curves for _, value in one.points) * 1.02)
        if custom["thresholdsStyle"]["mode"] != "off":
            for step in given["thresholds"]["steps"][1:]:
                if low <= step["value"] <= high * 1.6:
                    axes.axhline(step["value"], color=step["color"], lw=1, ls=(0, (5, 4)), alpha=0.8)
                    high = max(high, step["value"] * 1.05)
        axes.set_ylim(low, high)
        if given["unit"] == "bytes":
            axes.set_yticks(powers(low, high))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(round(value, 12), bare(given["unit"]))))
        axes.tick_params(colors=DIM, labelsize=7.5, length=0, pad=4)
        axes.grid(color=GRID, lw=0.7)
        axes.set_axisbelow(True)

    def stack(self, axes: Axes, curves: Sequence[Curve]) -> None:
        stamps = sorted({at for one in curves for at, _ in one.points})
        base = [0.0] * len(stamps)
        most = max(sum(value for at, value in one.points) for one in curves)
        for one in curves:
            known = dict(one.points)
            top = [low + known.get(at, 0.0) for low, at in zip(base, stamps, strict=True)]
            axes.fill_between(stamps, base, top, color=one.colour, alpha=0.42, lw=0)
            if sum(known.values()) > 0.02 * most:  # a line around next to nothing would hide what is below
                axes.plot(stamps, top, color=one.colour, lw=1)
            base = top

    def piles(self, axes: Axes, curves: Sequence[Curve], step: int) -> None:
        for one in curves:
            axes.bar(
                [at for at, _ in one.points],
                [v for _, v in one.points],
                step,
                color=one.colour,
                alpha=0.75,
            )

    def legend(self, curves: Sequence[Curve], box: Box, most: int = 2) -> int:
        """The names of the curves below the axes; how many rows they take."""
        size, gap = 8.0, 30.0
        rows: list[list[Curve]] = [[]]
        x = 0.0
        for one in curves:
            wide = width(one.name, size) + gap
            if x + wide > box.w and rows[-1]:
                if len(rows) == most:
                    break
                rows.append([])
                x = 0.0
            rows[-1].append(one)
            x += wide
        left_out = len(curves) - sum(map(len, rows))
        for number, row in enumerate(rows):
            y = box.y + box.h - 5 - (len(rows) - 1 - number) * 17
            x = box.x
            for one in row:
                for piece in PIECES[one.style]:
                    self.sheet.fill(Box(x + piece[0], y - 1.5, piece[1], 3), one.colour)
                self.sheet.text(x + 18, y, short(one.name, box.w, size), size, DIM)
                x += width(one.name, size) + gap
            if left_out and number == len(rows) - 1:
                self.sheet.text(box.x + box.w, y, f"+{left_out}", size, FAINT, ha="right")
        return len(rows)

    def tile(self, panel: Json, box: Box) -> None:
        curves = self.asked(panel)
        given = panel["fieldConfig"]["defaults"]
        if not curves:
            return self.nothing(panel, box)
        wide = box.w / len(curves)
        for number, one in enumerate(curves):
            place = Box(box.x + number * wide, box.y, wide, box.h)
            value = one.last
            if value is None:
                self.nothing(panel, place)
                continue
            said = words_for(value, given["mappings"])
            text, colour = said or (
                shown(value, given["unit"], given.get("decimals")),
                steps_colour(value, given["thresholds"]),
            )
            if panel["options"]["graphMode"] == "area" and len(one.points) > 2:
                self.spark(one, colour, place)
            named = len(curves) > 1
            size = max(10.0, min(24.0, (place.w - 8) / max(4, len(text)) * 1.22))
            self.sheet.text(
                place.x + place.w / 2,
                place.y + place.h * (0.36 if named else 0.42),
                text,
                size,
                colour,
                ha="center",
                weight="bold",
            )
            if named:
                self.sheet.text(
                    place.x + place.w / 2, place.y + place.h * 0.8, short(one.name, place.w, 8.5), 8.5, DIM, ha="center"
                )
        return None

    def spark(self, one: Curve, colour: str, box: Box) -> None:
        axes = self.sheet.axes(Box(box.x, box.y + box.h * 0.68, box.w, box.h * 0.36))
        axes.set_axis_off()
        xs, ys = broken(one.points, self.span.step)
        known = [value for value in ys if not math.isnan(value)]
        low, high = min(known), max(known)
        space = (high - low) or max(abs(high), 1.0)
        axes.plot(xs, ys, color=colour, lw=1.1, alpha=0.9)
        axes.fill_between(xs, ys, low - 0.15 * space, color=colour, alpha=0.16, lw=0)
        axes.set_ylim(low - 0.15 * space, low + 1.1 * space)
        axes.set_xlim(xs[0], xs[-1])

    def bars(self, panel: Json, box: Box) -> None:
        curves = self.asked(panel)
        given = panel["fieldConfig"]["defaults"]
        if not curves:
            return self.nothing(panel, box)
        low = given["min"]
        high = given.get("max", max(max(one.last or 0 for one in curves), low + 1e-9))
        tall = min(46.0, box.h / len(curves))
        label = min(box.w * 0.45, max(width(one.name, 8.5) for one in curves) + 12)
        room = box.w - label - 74
        for number, one in enumerate(curves):
            value = one.last if one.last is not None else math.nan
            y = box.y + number * tall + tall / 2
            colour = steps_colour(value, given["thresholds"])
            share = min(1.0, max(0.0, (value - low) / (high - low)))
            thick = min(20.0, tall * 0.6)
            self.sheet.text(box.x + label - 10, y, short(one.name, label, 8.5), 8.5, TEXT, ha="right")
            self.sheet.fill(Box(box.x + label, y - thick / 2, room, thick), "#22262f")
            self.sheet.fill(Box(box.x + label, y - thick / 2, max(1.5, room * share), thick), colour)
            self.sheet.text(
                box.x + box.w,
                y,
                shown(value, given["unit"], given.get("decimals")),
                9.5,
                colour,
                ha="right",
                weight="bold",
            )
        return None

    def table(self, panel: Json, box: Box) -> None:
        heads, rows = self.merged(panel)
        if not rows:
            return self.nothing(panel, box)
        weights = [
            max([len(head), *(len(self.cell(panel, head, row.get(head))[0]) for row in rows)]) + 3 for head in heads
        ]
        edges = [box.x]
        for weight in weights:
            edges.append(edges[-1] + box.w * weight / sum(weights))
        tall = min(28.0, (box.h - 24) / len(rows))
        fits = int((box.h - 22) / max(tall, 17.0))
        tall = max(tall, 17.0)
        for number, head in enumerate(heads):
            right = number >= len(rows[0]["labels"])
            x = edges[number + 1] - 14 if right else edges[number] + 4
            self.sheet.text(
                x, box.y + 8, short(head, edges[number + 1] - edges[number], 8), 8, DIM, ha="right" if right else "left"
            )
        for line, row in enumerate(rows[:fits]):
            y = box.y + 22 + line * tall + tall / 2
            if line % 2 == 0:
                self.sheet.fill(Box(box.x, y - tall / 2, box.w, tall), "#1c2027")
            for number, head in enumerate(heads):
                text, colour = self.cell(panel, head, row.get(head))
                right = number >= len(row["labels"])
                x = edges[number + 1] - 14 if right else edges[number] + 4
                self.sheet.text(x, y, text, 8.8, colour, ha="right" if right else "left")
        if len(rows) > fits:
            self.sheet.text(box.x + box.w, box.y - 14, f"{fits} of {len(rows)} rows", 8, FAINT, ha="right")
        return None

    def merged(self, panel: Json) -> tuple[list[str], list[Json]]:
        """The titles of the columns, and the rows: what the transformations merge and organize make of the answers."""
        renamed: Mapping[str, str] = panel["transformations"][1]["options"]["renameByName"]
        values = [name for name in renamed if name.startswith("Value")]
        labels = {label: title for label, title in renamed.items() if label not in values}
        rows: dict[tuple[str, ...], Json] = {}
        for target, name in zip(panel["targets"], values, strict=True):
            for series in self.prometheus.target(target, self.choices, self.span):
                key = tuple(series.labels.get(label, "") for label in labels)
                row = rows.setdefault(key, {"labels": key, **dict(zip(labels.values(), key, strict=True))})
                row[renamed[name]] = series.last
        found = list(rows.values())
        for order in panel["options"]["sortBy"]:
            missing = math.inf if not order["desc"] else -math.inf
            name = order["displayName"]
            found.sort(key=lambda row, name=name, missing=missing: row.get(name, missing), reverse=order["desc"])  # type: ignore[misc]  # no type for bound names
        return list(renamed.values()), found

    def cell(self, panel: Json, head: str, value: str | float | None) -> tuple[str, str]:
        given = panel["fieldConfig"]["defaults"] | properties(panel, head)
        if isinstance(value, str):
            return (value or "-"), "#7EA6E8" if "links" in given else TEXT
        if value is None or math.isnan(value):
            return given["noValue"], FAINT
        said = words_for(value, given["mappings"])
        if said is not None:
            return said
        colour = steps_colour(value, given["thresholds"]) if "custom.cellOptions" in given else TEXT
        return shown(value, given["unit"], given.get("decimals")), colour

    def ahead(self, panel: Json, box: Box) -> None:
        curves = []
        for target in panel["targets"]:
            found = self.prometheus.target(target, self.choices, self.span)
            points = sorted((float(one.labels["horizon_days"]), one.points[0][1]) for one in found)
            if points:
                curves.append(curve(panel, target["legendFormat"], points))
        if not curves:
            return self.nothing(panel, box)
        rows = self.legend(curves, box)
        axes = self.sheet.axes(box.inside(52, 4, 8, 42 + rows * 17))
        for one in curves:
            xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
            axes.plot(xs, ys, color=one.colour, lw=1.2 if one.style else 2, ls=STYLES[one.style])
        named = {one.name: [y for _, y in one.points] for one in curves}
        if {"low", "high"} <= named.keys():
            axes.fill_between(
                [x for x, _ in curves[0].points], named["low"], named["high"], color=curves[0].colour, alpha=0.12, lw=0
            )
        self.scale(axes, panel, curves)
        axes.set_xlim(1, max(x for one in curves for x, _ in one.points))
        self.sheet.text(
            box.x + box.w / 2, box.y + box.h - 6 - rows * 17 - 4, panel["options"]["xField"], 8, DIM, ha="center"
        )
        return None

    def alerts(self, panel: Json, box: Box) -> None:
        matchers = panel["options"]["alertInstanceLabelFilter"].strip("{}")
        found = self.prometheus.instant(f"ALERTS{{{matchers}}}", self.span.end)
        if not found:
            self.sheet.text(box.x + box.w / 2, box.y + box.h / 2, "no alerts", 11, "#56B37F", ha="center")
            return
        order = list(SEVERITIES)
        found.sort(key=lambda one: (order.index(one.labels["severity"]), one.labels["alertname"]))
        for number, one in enumerate(found[: int(box.h / 40)]):
            y = box.y + number * 40 + 14
            labels = one.labels
            colour = SEVERITIES[labels["severity"]]
            self.sheet.fill(Box(box.x, y - 14, 3, 32), colour)
            self.sheet.text(box.x + 12, y - 5, labels["alertname"], 9.5, TEXT, weight="bold")
            told = [labels[name] for name in ("model", "slo", "instance", "target") if name in labels]
            self.sheet.text(box.x + 12, y + 11, " · ".join([labels["severity"], labels.get("team", ""), *told]), 8, DIM)
            self.sheet.text(box.x + box.w, y - 5, labels["alertstate"], 8.5, colour, ha="right")


def bare(unit: str) -> str:
    """The unit of an axis: what a title says already is not repeated at each line."""
    return "none" if unit in {"reqps", "ops"} else unit


def ticks(span: Span, most: int) -> tuple[list[float], list[str]]:
    """Where the time axis is marked, and with what: at most so many round times (UTC), days by their date."""
    length = span.end - span.start
    step = next((step for step in TICKS if length / step <= most), TICKS[-1])
    stamps = [float(at) for at in range(math.ceil(span.start / step) * step, int(span.end) + 1, step)]
    times = [datetime.fromtimestamp(at, UTC) for at in stamps]
    return stamps, [f"{at:%d %b}" if (at.hour, at.minute) == (0, 0) else f"{at:%H:%M}" for at in times]


def powers(low: float, high: float) -> list[float]:
    """Marks for bytes: five at most, a power of two apart."""
    step = 2.0 ** math.ceil(math.log2((high - low) / 5))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def broken(points: Sequence[tuple[float, float]], step: float) -> tuple[list[float], list[float]]:
    """The points with a break where values are missing: an interval without traffic is not bridged."""
    xs, ys = [], []
    last = None
    for at, value in points:
        if last is not None and at - last > 1.5 * step:
            xs.append(last + step)
            ys.append(math.nan)
        xs.append(at)
        ys.append(value)
        last = at
    return xs, ys


def draw(board: Json, url: str, end: float, path: Path) -> None:
    """Write the picture of a dashboard, as it would open at the moment `end`."""
    Board(board, url, end).draw(path)
