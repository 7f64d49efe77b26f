"""Every query and every variable of every dashboard, executed by a real Prometheus on a month of generated series.

One Prometheus serves all of them; only the test that takes series away has its own, on links to the same blocks.
"""

import math
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from tests.monitoring import series
from tests.monitoring.boards import BOARDS, NAMES, RENDERED, nodes, parsed, read, rules, targets
from tests.monitoring.servers import run_prometheus
from tools.dashboards.drawing import draw
from tools.dashboards.reading import Prometheus, Series, Span, filled, legend, panels

Json = dict[str, Any]
POINTS = 60  # of a curve: fewer than a panel draws, the same queries
# What a value may be: the least and the largest of each unit.
BOUNDS = {
    "percentunit": (0.0, 3.0),
    "s": (0.0, 400 * 86_400.0),
    "bytes": (0.0, 1e13),
    "Bps": (0.0, 1e11),
    "reqps": (0.0, 1e6),
    "ops": (0.0, 1e6),
    "currencyUSD": (-1e6, 1e6),
    "d": (0.0, 1000.0),
    "celsius": (0.0, 120.0),
    "watt": (0.0, 2000.0),
    "short": (0.0, 1e12),
    "none": (-100.0, 1e7),
}
BELOW_ZERO = {"Memory spare": "bytes", "Error budget left": "percentunit"}  # short, and overdrawn
MISSED = ("model:llm_gateway_request_duration_seconds:quantile_rate5m", "model:llm_feedback_satisfaction:mean1d",
          "instance:redis_up:min", "target:llm_forecast_mase:max")  # fmt: skip
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="session")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the generated series as blocks of a Prometheus."""
    folder = tmp_path_factory.mktemp("series")
    series.build(folder)
    return folder


@pytest.fixture(scope="session")
def live(month: Path) -> Iterator[Prometheus]:
    with run_prometheus(series.configuration(month), month / "data", *series.OPTIONS) as url:
        yield Prometheus(url)


def answers(live: Prometheus, board: Json, target: Json, choices: dict[str, str]) -> list[Series]:
    return live.target(target, choices, Span.of(board, series.END, POINTS))


def known(found: list[Series]) -> list[float]:
    return [value for one in found for _, value in one.points if math.isfinite(value)]


def is_empty(live: Prometheus, board: Json, panel: Json, choices: dict[str, str]) -> bool:
    """Whether a query of the panel brings no figure."""
    return any(not known(answers(live, board, target, choices)) for target in panel["targets"])


def unit_of(panel: Json, target: Json) -> tuple[str, str]:
    """The title under which a figure is shown, and its unit: in a table those of its column."""
    if panel["type"] != "table":
        return panel["title"], panel["fieldConfig"]["defaults"]["unit"]
    renamed = panel["transformations"][1]["options"]["renameByName"]
    title = renamed.get(f"Value #{target['refId']}", renamed.get("Value"))
    overrides = {one["matcher"]["options"]: one["properties"] for one in panel["fieldConfig"]["overrides"]}
    return title, next(one["value"] for one in overrides[title] if one["id"] == "unit")


@each
def test_every_panel_has_figures(live: Prometheus, name: str) -> None:
    """Each query: status 200, a series, a figure, the labels of its legend, and values that the unit can have."""
    board = BOARDS[name]
    choices = live.choices(board, series.END)
    wrong: list[str] = []
    executed: dict[int, int] = {}
    for panel, target in targets(board):
        where = f"{panel['title']} {target['refId']}"
        found = answers(live, board, target, choices)
        executed[panel["id"]] = executed.get(panel["id"], 0) + 1
        values = known(found)
        if not values:
            wrong.append(f"{where}: nothing but {len(found)} empty series")
            continue
        title, unit = unit_of(panel, target)
        low, high = BOUNDS[unit]
        low = -high if BELOW_ZERO.get(title) == unit else low
        if min(values) < low or max(values) > high:
            wrong.append(f"{where}: {min(values):g} to {max(values):g} is nothing in {unit}")
        wrong += [f"{where}: {one.labels} has no {label}" for one in found for label in missing(panel, target, one)]
        if panel["type"] not in {"table", "trend"} and len({legend(target, one.labels) for one in found}) < len(found):
            wrong.append(f"{where}: two series of one name")
    for panel in panels(board):
        if panel["type"] == "alertlist":
            executed[panel["id"]] = 1
            if not live.instant("ALERTS" + panel["options"]["alertInstanceLabelFilter"], series.END):
                wrong.append(f"{panel['title']}: no alert")
    total = len(list(panels(board)))
    print(f"{name}: {len(executed)} of {total} panels executed, {sum(executed.values())} queries")
    assert not wrong, "\n".join(wrong)
    assert len(executed) == total


def missing(panel: Json, target: Json, one: Series) -> set[str]:
    """Labels that a legend or a column names and a series lacks. An alert, a forecast need not be of a model."""
    if panel["type"] == "table":
        renamed = panel["transformations"][1]["options"]["renameByName"]
        wanted = {label for label in renamed if not label.startswith("Value")}
    else:
        wanted = {part.split("}}")[0].strip() for part in target["legendFormat"].split("{{")[1:]}
    optional = {"model"} if "target:" in target["expr"] else set()
    return wanted - one.labels.keys() - optional


@each
def test_every_variable_has_values(live: Prometheus, name: str) -> None:
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            assert live.values(variable["query"]["query"], series.END), variable["name"]


@each
def test_every_annotation_marks_something(live: Prometheus, name: str) -> None:
    board = BOARDS[name]
    choices = live.choices(board, series.END)
    day = Span(series.END - 86_400, series.END, 1440)
    found = {one["name"]: live.curve(filled(one["expr"], choices, day), day) for one in board["annotations"]["list"]}
    assert [one.labels["version"] for one in found["Deployments"]] == ["0.4.2"]
    marked = [at for at, _ in found["Deployments"][0].points]
    assert 0 <= marked[-1] - marked[0] <= 300, "a deployment is marked for five minutes"
    assert {"LLMErrorBudgetBurn", "LLMSatisfactionDrop"} <= {one.labels["alertname"] for one in found["Alerts"]}


@each
def test_a_chosen_model_is_the_only_one(live: Prometheus, name: str) -> None:
    """What has the label shows the model that is chosen, and figures all the same."""
    board = BOARDS[name]
    choices = live.choices(board, series.END) | {"model": "hermes-2", "host": series.SERVER}
    for panel, target in targets(board):
        found = live.instant(filled(target["expr"], choices, Span.of(board, series.END)), series.END)
        assert {one.labels.get("model", "hermes-2") for one in found} <= {"hermes-2"}, panel["title"]
        assert {one.labels.get("instance", series.SERVER) for one in found} <= {series.SERVER}, panel["title"]


def test_a_metric_that_is_renamed_fails_its_panels_and_no_other(month: Path, tmp_path: Path) -> None:
    """Its old name is taken out of a Prometheus of our own: exactly the panels that ask for it have nothing left."""
    data = tmp_path / "data"
    blocks = [path for path in (month / "data").iterdir() if (path / "meta.json").exists()]
    for block in blocks:
        shutil.copytree(block, data / block.name, copy_function=os.link)
    gone: set[str] = set()
    expected: set[tuple[str, str]] = set()
    with run_prometheus(series.configuration(tmp_path), data, *series.OPTIONS, "--web.enable-admin-api") as url:
        live = Prometheus(url)
        for metric in MISSED:
            matcher = urllib.parse.urlencode({"match[]": f'{{__name__="{metric}"}}'})
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/api/v1/admin/tsdb/delete_series?{matcher}", method="POST"), timeout=30
            ) as reply:
                assert reply.status == 204
            gone.add(metric)
        empty = set()
        for name, board in BOARDS.items():
            choices = live.choices(board, series.END)
            for panel in panels(board):
                names = {one for target in panel["targets"] for one in read(board, target["expr"])}
                if names & gone:
                    expected.add((name, panel["title"]))
                if is_empty(live, board, panel, choices):
                    empty.add((name, panel["title"]))
    assert len(expected) > len(MISSED)
    assert empty == expected


# The labels of recorded series whose level does not name them one by one.
LABELS: dict[str, set[str]] = {
    "platform": set(),
    "platform:citadel_escalations:increase1d": {"level"},
    "rule_group": {"rule_group"},
    "use_case": {"use_case"},
    "model_to": {"model", "to_model"},
    "model_reason:llm_engine_finished_requests:rate5m": {"model", "finished_reason"},
    "slo": {"slo", "model"},
}


def test_generated_series_have_the_labels_of_the_rules() -> None:
    """What stands in for Prometheus must look like what Prometheus would record: names, and the labels they tell."""
    static: dict[str, set[str]] = {}
    for rule in rules():
        if "record" in rule:
            static.setdefault(rule["record"], set()).update(rule.get("labels", {}))
    static |= {name: set() for name in RENDERED}
    for name, labels, _ in series.generate().found:
        level = name.split(":")[0]
        if name in {"ALERTS", "slo:objective:ratio"} or level.startswith("target"):
            continue  # these have what their source has
        expected = LABELS.get(name, LABELS.get(level, set(level.split("_"))))
        assert labels.keys() == expected | static[name], name


def test_a_dashboard_can_be_drawn(live: Prometheus, tmp_path: Path) -> None:
    """The one that has every kind of panel."""
    path = tmp_path / "business.png"
    assert {panel["type"] for panel in panels(BOARDS["business"])} >= {
        "timeseries",
        "trend",
        "stat",
        "bargauge",
        "table",
        "alertlist",
    }
    draw(BOARDS["business"], live.url, series.END, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 50_000 < path.stat().st_size < 400_000


def test_no_query_is_unreadable() -> None:
    """What Prometheus 2.42 and 3.x do not both understand is not used."""
    common = {"avg_over_time", "last_over_time", "max_over_time", "vector", "clamp_min", "clamp_max"}
    for board in BOARDS.values():
        for _, target in targets(board):
            tree = parsed(board, target["expr"])
            calls = {node.func.name for node in nodes(tree) if isinstance(node, promql.Call)}
            assert calls <= common, target["expr"]
