"""How a panel, a variable, an annotation and a dashboard are written.

A panel is a dictionary as Grafana reads it, with its size in `gridPos`; `dashboard` gives it a place and an id. Numbers
that are absent are said to be so in words: a recorded ratio has no value while nothing is asked, which is no fault.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]

MODEL = 'model=~"$model"'
ANY_MODEL = 'model=~"$model|"'  # of what has the label only sometimes: alerts, forecasts
HOST = 'instance=~"$host"'
JOB = 'job=~"$job"'

GREEN, AMBER, RED, BLUE, GREY, VIOLET = "#56B37F", "#E9A23B", "#E5534B", "#5794F2", "#8E96A3", "#B48EDE"
MODEL_COLOURS = ("#4C9AFF", "#F2A93B", "#3FC1A5", "#C58AF9", "#FF7D6B", "#A3C644", "#7E8CE0", "#E06CA9")
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
BOARDS = {
    "operations": ("Operations", "Service levels, saturation, engines, hosts, stores, and the monitoring itself"),
    "business": ("Business", "Value, return, adoption, and what is coming"),
    "realtime": ("Real time", "The last fifteen minutes"),
    "quality": ("Quality", "Accuracy, satisfaction, conversations, anomalies, and the skill of the forecasts"),
    "cost": ("Cost", "What it costs, for what, and what to change"),
}

Steps = tuple[tuple[float, str], ...]  # from this value on, this colour; below the first one `base`


@dataclass(frozen=True)
class Query:
    """PromQL as Grafana stores it, and the name of what comes back: labels in {{braces}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Column:
    """A column of figures in a table: one query, joined with the others by the labels it keeps."""

    title: str
    expr: str
    unit: str
    steps: Steps = ()
    base: str = GREEN
    decimals: int | None = None
    words: tuple[tuple[float, str, str], ...] = ()  # value, what is shown in its place, colour


@dataclass(frozen=True)
class Row:
    """A heading and its panels, laid from left to right; `collapsed` for what not every site has."""

    title: str
    panels: Sequence[Json]
    collapsed: bool = False


@cache
def known_models() -> list[str]:
    """The models of the production inventory: they keep their colour everywhere, others get one by their name."""
    names: dict[str, None] = {}
    for path in sorted((ROOT / "inventory/production/group_vars/llm_servers").glob("models_*.yml")):
        for models in yaml.safe_load(path.read_text()).values():
            names |= dict.fromkeys(str(model["name"]) for model in models)
    return list(names)


def paint(pattern: str, colour: str, *, dashed: bool = False) -> Json:
    """The series whose name matches the regular expression are of this colour."""
    properties: list[Json] = [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]
    return override("byRegexp", f"/{pattern}/", [*properties, *(DASHED if dashed else [])])


def dash(pattern: str) -> Json:
    return override("byRegexp", f"/{pattern}/", DASHED)


def dot(pattern: str) -> Json:
    return override("byRegexp", f"/{pattern}/", DOTTED)


def override(matcher: str, options: str, properties: list[Json]) -> Json:
    return {"matcher": {"id": matcher, "options": options}, "properties": properties}


DASHED: list[Json] = [
    {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [6, 5]}},
    {"id": "custom.fillOpacity", "value": 0},
]


DOTTED: list[Json] = [
    {"id": "custom.lineStyle", "value": {"fill": "dot", "dash": [0, 6]}},
    {"id": "custom.fillOpacity", "value": 0},
]


def models_painted() -> list[Json]:
    colours = zip(known_models(), MODEL_COLOURS, strict=False)
    return [paint(rf"^{re.escape(name)}( .*)?$", colour) for name, colour in colours]


def thresholds(steps: Steps, base: str = GREEN) -> Json:
    first: Json = {"color": base, "value": None}
    return {"mode": "absolute", "steps": [first, *({"color": colour, "value": value} for value, colour in steps)]}


def words(absent: str, more: Sequence[tuple[float, str, str]] = ()) -> list[Json]:
    """Value mappings: what stands for a number that is none, and for the values that are words."""
    none = [
        {"type": "special", "options": {"match": m, "result": {"text": absent, "index": i}}} for i, m in enumerate(NONE)
    ]
    if not more:
        return none
    options = {f"{value:g}": {"text": text, "color": c, "index": i} for i, (value, text, c) in enumerate(more, 2)}
    return [*none, {"type": "value", "options": options}]


NONE = ("null+nan", "empty")


def targets(queries: Sequence[Query], *, instant: bool = False, table: bool = False) -> list[Json]:
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "format": "table" if table else "time_series",
            "instant": instant,
            "range": not instant,
        }
        for number, query in enumerate(queries)
    ]


def panel(kind: str, title: str, description: str, size: tuple[int, int], queries: list[Json], **more: Any) -> Json:
    place = {"x": 0, "y": 0, "w": size[0], "h": size[1]}
    head: Json = {
        "id": 0,
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": place,
    }
    return {**head, "targets": queries, **more}


def defaults(unit: str, absent: str, steps: Steps, base: str, **more: Any) -> Json:
    """What holds for every field of a panel. `absent`: the words for no value."""
    return {
        "unit": unit,
        "noValue": absent,
        "mappings": words(absent, more.pop("words", ())),
        "thresholds": thresholds(steps, base),
        **{key: value for key, value in more.items() if value is not None},
    }


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    size: tuple[int, int] = (8, 8),
    low: float | None = 0,
    high: float | None = None,
    stack: bool = False,
    steps: Steps = (),
    paints: Sequence[Json] = (),
    absent: str = "no traffic",
    bars: bool = False,
    decimals: int | None = None,
) -> Json:
    """Curves over time. `steps` are drawn as lines across; `low` and `high` bound the axis softly."""
    custom: Json = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 1 if stack or bars else 2,
        "fillOpacity": 70 if bars else 45 if stack else 6,
        "gradientMode": "none",
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if steps else "off"},
    }
    custom |= {key: value for key, value in (("axisSoftMin", low), ("axisSoftMax", high)) if value is not None}
    by_model = any("{{model}}" in query.legend for query in queries)
    return panel(
        "timeseries",
        title,
        description,
        size,
        targets(queries),
        fieldConfig={
            "defaults": {
                **defaults(unit, absent, steps, GREEN, decimals=decimals),
                "color": {"mode": "palette-classic-by-name"},
                "custom": custom,
            },
            "overrides": [*(models_painted() if by_model else []), *paints],
        },
        options={
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    )


REDUCE: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}


def tile(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    size: tuple[int, int] = (4, 4),
    steps: Steps = (),
    base: str = GREEN,
    absent: str = "no traffic",
    decimals: int | None = None,
    curve: bool = True,
    said: tuple[tuple[float, str, str], ...] = (),
) -> Json:
    """One figure, or one for each series, in the colour of its threshold; behind it its course, unless `curve` is off.

    Without thresholds the figure is neither good nor bad, and blue.
    """
    base = base if steps or said else BLUE
    return panel(
        "stat",
        title,
        description,
        size,
        targets(queries),
        fieldConfig={
            "defaults": {
                **defaults(unit, absent, steps, base, decimals=decimals, words=said),
                "color": {"mode": "thresholds"},
            },
            "overrides": [],
        },
        options={
            "colorMode": "value",
            "graphMode": "area" if curve else "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": REDUCE,
            "textMode": "auto",
            "wideLayout": True,
        },
    )


def bars(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    size: tuple[int, int] = (8, 8),
    low: float = 0,
    high: float | None = None,
    steps: Steps = (),
    base: str = GREEN,
    absent: str = "no traffic",
) -> Json:
    """The present value of each series as a horizontal bar."""
    return panel(
        "bargauge",
        title,
        description,
        size,
        targets(queries, instant=True),
        fieldConfig={
            "defaults": {
                **defaults(unit, absent, steps, base if steps else BLUE, min=low, max=high),
                "color": {"mode": "thresholds"},
            },
            "overrides": [],
        },
        options={
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": REDUCE,
            "showUnfilled": True,
            "valueMode": "color",
            "namePlacement": "auto",
            "sizing": "auto",
            "minVizHeight": 12,
            "minVizWidth": 0,
        },
    )


def table(
    title: str,
    description: str,
    labels: dict[str, str],
    *columns: Column,
    size: tuple[int, int] = (24, 8),
    absent: str = "no traffic",
    sort: tuple[str, bool] | None = None,
) -> Json:
    """`labels` (label: title of its column) and the figures of each combination of them, as they are now.

    `sort`: the title of a column, and whether downwards. The name of a model leads to its last fifteen minutes.
    """
    queries = targets([Query(column.expr) for column in columns], instant=True, table=True)
    renamed = dict(labels)
    overrides: list[Json] = []
    if "model" in labels:
        link = {"title": "Its last fifteen minutes", "url": "/d/citadel-realtime?var-model=${__value.text}"}
        overrides.append(override("byName", labels["model"], [{"id": "links", "value": [link]}]))
    for query, column in zip(queries, columns, strict=True):
        renamed[f"Value #{query['refId']}" if len(columns) > 1 else "Value"] = column.title
        properties: list[Json] = [{"id": "unit", "value": column.unit}]
        if column.decimals is not None:
            properties.append({"id": "decimals", "value": column.decimals})
        if column.words:
            properties.append({"id": "mappings", "value": words(absent, column.words)})
        if column.steps or column.words:
            properties.append({"id": "thresholds", "value": thresholds(column.steps, column.base)})
            properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
        overrides.append(override("byName", column.title, properties))
    order = {name: number for number, name in enumerate(renamed)}
    organise = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": renamed}
    return panel(
        "table",
        title,
        description,
        size,
        queries,
        transformations=[{"id": "merge", "options": {}}, {"id": "organize", "options": organise}],
        fieldConfig={
            "defaults": {
                **defaults("short", absent, (), GREY),
                "color": {"mode": "thresholds"},
                "custom": {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": False},
            },
            "overrides": overrides,
        },
        options={
            "cellHeight": "sm",
            "showHeader": True,
            "footer": {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""},
            "sortBy": [{"displayName": sort[0], "desc": sort[1]}] if sort else [],
        },
    )


def ahead(title: str, description: str, unit: str, *queries: Query, steps: Steps = (), size: tuple[int, int]) -> Json:
    """Curves over the days to come: what instant queries give by the label horizon_days. Each query is one curve."""
    named = {f"Value #{chr(ord('A') + number)}": query.legend for number, query in enumerate(queries)}
    hidden = {f"Time {number}": True for number in range(1, len(queries) + 1)} | {"Time": True}
    organise = {"excludeByName": hidden, "indexByName": {}, "renameByName": {**named, "horizon_days": "days ahead"}}
    custom: Json = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 0,
        "showPoints": "never",
        "axisSoftMin": 0,
        "thresholdsStyle": {"mode": "dashed"},
    }
    number = [{"targetField": "horizon_days", "destinationType": "number"}]
    return panel(
        "trend",
        title,
        description,
        size,
        targets(queries, instant=True, table=True),
        transformations=[
            {"id": "joinByField", "options": {"byField": "horizon_days", "mode": "outer"}},
            {"id": "convertFieldType", "options": {"conversions": number, "fields": {}}},
            {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": "horizon_days", "desc": False}]}},
            {"id": "organize", "options": organise},
        ],
        fieldConfig={
            "defaults": {
                **defaults(unit, "no forecast", steps, GREEN),
                "color": {"mode": "palette-classic-by-name"},
                "custom": custom,
            },
            "overrides": [
                override("byName", "days ahead", [{"id": "unit", "value": "none"}]),
                paint("^expected$", BLUE),
                paint("^(low|high)", GREY, dashed=True),
            ],
        },
        options={
            "xField": "days ahead",
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    )


def alerts(title: str, description: str, matchers: str, *, size: tuple[int, int] = (8, 8)) -> Json:
    """Grafana's own list of alerts, those with these labels; from there one goes to the runbook and to a silence."""
    return panel(
        "alertlist",
        title,
        description,
        size,
        [],
        options={
            "viewMode": "list",
            "groupMode": "default",
            "groupBy": [],
            "maxItems": 20,
            "sortOrder": 3,
            "dashboardAlerts": False,
            "alertName": "",
            "alertInstanceLabelFilter": f"{{{matchers}}}",
            "stateFilter": {"firing": True, "pending": True, "noData": False, "normal": False, "error": True},
            "showInstances": True,
        },
    )


def variable(name: str, label: str, query: str, *, many: bool = True, regex: str = "") -> Json:
    """A choice among the values of a label, read anew when the time range changes. `many`: several, or all."""
    everything = {"text": ["All"], "value": ["$__all"]} if many else {}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery", "qryType": 1},
        "regex": regex,
        "refresh": 2,
        "sort": 1,
        "multi": many,
        "includeAll": many,
        **({"allValue": ".+"} if many else {}),
        "current": everything,
        "options": [],
        "hide": 0,
        "skipUrlSync": False,
    }


def common_variables() -> list[Json]:
    """Every dashboard has these, so that a link to another one takes the choice along."""
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "regex": "",
        "refresh": 1,
        "multi": False,
        "includeAll": False,
        "current": {},
        "options": [],
        "hide": 0,
        "skipUrlSync": False,
    }
    return [
        source,
        variable("host", "Host", "label_values(instance:node_load1_per_core:ratio, instance)"),
        variable("model", "Model", "label_values(model:llm_gateway_backend_up:min, model)"),
    ]


def annotation(name: str, colour: str, expr: str, title: str, text: str) -> Json:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expr,
        "step": "60s",
        "titleFormat": title,
        "textFormat": text,
        "tagKeys": "",
        "useValueForTime": False,
    }


VERSION = f"instance_version:llm_gateway_build_info:max{{{HOST}}}"
FIRING = f'suite="citadel", alertstate="firing", severity=~"critical|warning", {ANY_MODEL}'
ANNOTATIONS = [
    # A version that the host did not have within the day before. The value is always 1, so changes() would see nothing.
    annotation(
        "Deployments",
        BLUE,
        f"{VERSION} unless on (instance, version) last_over_time({VERSION}[1d] offset 5m)"
        f" and on (instance) last_over_time({VERSION}[1d] offset 5m)",
        "Gateway {{version}}",
        "on {{instance}}",
    ),
    annotation(
        "Alerts",
        RED,
        f"max by (alertname, severity, model) (ALERTS{{{FIRING}}})",
        "{{alertname}}",
        "{{severity}} {{model}}",
    ),
]


def links(own: str) -> list[Json]:
    return [
        {
            "type": "link",
            "title": title,
            "tooltip": tooltip,
            "url": f"/d/citadel-{name}",
            "icon": "dashboard",
            "tags": [],
            "asDropdown": False,
            "targetBlank": False,
            "includeVars": True,
            "keepTime": False,  # a month and fifteen minutes are different questions
        }
        for name, (title, tooltip) in BOARDS.items()
        if name != own
    ]


def laid(rows: Sequence[Row]) -> list[Json]:
    """The panels with ids and places. Raises ValueError if panels of one line differ in height or leave a gap."""
    found: list[Json] = []
    ids = iter(range(1, 1000))
    top = 0
    for row in rows:
        head: Json = {"id": next(ids), "type": "row", "title": row.title, "collapsed": row.collapsed, "panels": []}
        found.append(head | {"gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}})
        top += 1
        below, left, height = top, 0, 0
        for one in row.panels:
            width = one["gridPos"]["w"]
            if left and one["gridPos"]["h"] != height:
                raise ValueError(f"{row.title}, {one['title']}: {one['gridPos']['h']} high in a line of {height}")
            height = one["gridPos"]["h"]
            if left + width > WIDTH:
                raise ValueError(f"{row.title}, {one['title']}: the line is {left + width} wide, not {WIDTH}")
            placed = one | {"id": next(ids), "gridPos": {"x": left, "y": below, "w": width, "h": height}}
            (found[-1]["panels"] if row.collapsed else found).append(placed)
            left += width
            if left == WIDTH:
                below, left = below + height, 0
        if left:
            raise ValueError(f"{row.title}: the last line is {left} wide, not {WIDTH}")
        top = top if row.collapsed else below
    return found


def dashboard(name: str, rows: Sequence[Row], *, last: str, refresh: str, variables: Sequence[Json] = ()) -> Json:
    """`last`: the time range it opens with, such as 6h."""
    title, description = BOARDS[name]
    return {
        "id": None,
        "uid": f"citadel-{name}",
        "title": f"Citadel / {title}",
        "description": description,
        "tags": ["citadel"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": f"now-{last}", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "30s", "1m", "5m", "1h"]},
        "refresh": refresh,
        "links": links(name),
        "annotations": {"list": ANNOTATIONS},
        "templating": {"list": [*common_variables(), *variables]},
        "panels": laid(rows),
    }
