"""The dashboards as files: what Grafana would swallow silently, and the rules of its linter, none left out."""

import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from tests.monitoring.boards import BOARDS, NAMES, RENDERED, expressions, nodes, parsed, read, rules, selectors, targets
from tools.dashboards import FOLDER
from tools.dashboards.panels import BOARDS as TITLES
from tools.dashboards.panels import known_models
from tools.dashboards.reading import panels
from tools.dashboards.units import UNITS

Json = dict[str, Any]

# Where Grafana 10.4 to 13 looks for an option. It ignores what lies elsewhere (spanNulls in `options`) without a word.
PANEL = {"id", "type", "title", "description", "datasource", "gridPos", "targets", "fieldConfig", "options"}
TARGET = {"refId", "datasource", "editorMode", "expr", "legendFormat", "format", "instant", "range"}
DEFAULTS = {"unit", "noValue", "mappings", "thresholds", "color"}
CURVE = {"drawStyle", "lineWidth", "fillOpacity", "showPoints", "thresholdsStyle", "axisSoftMin", "axisSoftMax"}
KINDS: dict[str, dict[str, set[str]]] = {
    "timeseries": {
        "panel": PANEL,
        "defaults": DEFAULTS | {"decimals", "custom"},
        "custom": CURVE | {"gradientMode", "spanNulls", "stacking"},
        "options": {"legend", "tooltip"},
    },
    "trend": {
        "panel": PANEL | {"transformations"},
        "defaults": DEFAULTS | {"custom"},
        "custom": CURVE,
        "options": {"legend", "tooltip", "xField"},
    },
    "stat": {
        "panel": PANEL,
        "defaults": DEFAULTS | {"decimals"},
        "custom": set(),
        "options": {"colorMode", "graphMode", "justifyMode", "orientation", "reduceOptions", "textMode", "wideLayout"},
    },
    "bargauge": {
        "panel": PANEL,
        "defaults": DEFAULTS | {"min", "max"},
        "custom": set(),
        "options": {"displayMode", "orientation", "reduceOptions", "showUnfilled", "valueMode", "namePlacement",
                    "sizing", "minVizHeight", "minVizWidth"},
    },
    "table": {
        "panel": PANEL | {"transformations"},
        "defaults": DEFAULTS | {"custom"},
        "custom": {"align", "cellOptions", "filterable"},
        "options": {"cellHeight", "showHeader", "footer", "sortBy"},
    },
    "alertlist": {
        "panel": PANEL - {"fieldConfig"},
        "defaults": set(),
        "custom": set(),
        "options": {"viewMode", "groupMode", "groupBy", "maxItems", "sortOrder", "dashboardAlerts", "alertName",
                    "alertInstanceLabelFilter", "stateFilter", "showInstances"},
    },
}  # fmt: skip
PROPERTIES = {
    "color": set(),
    "unit": set(),
    "decimals": set(),
    "links": set(),
    "mappings": set(),
    "thresholds": {"mode", "steps"},
    "custom.lineStyle": {"fill", "dash"},
    "custom.fillOpacity": set(),
    "custom.cellOptions": {"type"},
}
BOARD = {
    "id", "uid", "title", "description", "tags", "schemaVersion", "version", "editable", "graphTooltip", "timezone",
    "time", "timepicker", "refresh", "links", "annotations", "templating", "panels",
}  # fmt: skip
# The label that a series has by its level, and the matcher by which a dashboard's choice reaches it.
CHOICES = {"instance": {"$host"}, "job": {"$job"}, "model": {"$model", "$model|"}}
each = pytest.mark.parametrize("board", BOARDS.values(), ids=NAMES)


def levels(name: str) -> set[str]:
    """The labels that a recorded series has by its name, level:metric:operation."""
    level = name.split(":")[0]
    found = set(level.split("_"))
    return {"model"} if level == "slo" and "objective" not in name else found - {"le"}


def test_all_five_are_there() -> None:
    assert set(NAMES) == set(TITLES)


def test_a_stale_file_fails(tmp_path: Path) -> None:
    """What the generator would not write is found: a file that was edited, one too many, and one that is missing."""
    command = [sys.executable, "-m", "tools.dashboards", "--check", "--folder"]

    def check(folder: Path) -> tuple[int, str]:
        done = subprocess.run(
            [*command, str(folder)], cwd=FOLDER.parents[2], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    assert check(FOLDER) == (0, "")
    folder = tmp_path / "dashboards"
    shutil.copytree(FOLDER, folder)
    (folder / "cost.json").write_text((folder / "cost.json").read_text().replace("Cost an hour", "Cost", 1))
    (folder / "mine.json").write_text("{}")
    (folder / "quality.json").unlink()
    status, said = check(folder)
    assert status == 1
    assert [line.split()[0].rsplit("/")[-1] for line in said.splitlines()] == ["cost.json", "mine.json", "quality.json"]


@each
def test_every_key_is_where_grafana_looks_for_it(board: Json) -> None:
    assert board.keys() == BOARD
    assert board["schemaVersion"] == 39
    for panel in panels(board):
        known = KINDS[panel["type"]]
        title = panel["title"]
        assert panel.keys() <= known["panel"], title
        assert panel["options"].keys() == known["options"], title
        config = panel.get("fieldConfig", {"defaults": {}, "overrides": []})
        assert config["defaults"].keys() <= known["defaults"], title
        assert config["defaults"].get("custom", {}).keys() <= known["custom"], title
        for override in config["overrides"]:
            assert override["matcher"]["id"] in {"byName", "byRegexp"}, title
            for one in override["properties"]:
                assert one["id"] in PROPERTIES, title
                assert not PROPERTIES[one["id"]] or one["value"].keys() == PROPERTIES[one["id"]], title
        for target in panel["targets"]:
            assert target.keys() == TARGET, title
            assert target["instant"] is not target["range"], title


@each
def test_no_panel_lies_on_another(board: Json) -> None:
    open_ones = list(board["panels"])
    groups = [
        open_ones,
        *(panel["panels"] for panel in board["panels"] if panel["type"] == "row" and panel["collapsed"]),
    ]
    for group in groups:
        for panel in group:
            place = panel["gridPos"]
            assert place["x"] >= 0
            assert place["w"] > 0
            assert place["x"] + place["w"] <= 24, panel["title"]
        for one, other in combinations(group, 2):
            a, b = one["gridPos"], other["gridPos"]
            beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
            assert beside or above, f"{one['title']} lies on {other['title']}"


def test_ids_uids_and_titles_are_given_once() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)
    for name, board in BOARDS.items():
        assert board["uid"] == f"citadel-{name}"
        assert board["tags"] == ["citadel"]
        everything = [*board["panels"], *(inner for panel in board["panels"] for inner in panel.get("panels", []))]
        ids = [panel["id"] for panel in everything]
        assert len(set(ids)) == len(ids)
        titles = [panel["title"] for panel in everything]
        assert sorted(set(titles)) == sorted(titles), name
        references = [[target["refId"] for target in panel["targets"]] for panel in panels(board)]
        assert all(len(set(one)) == len(one) for one in references)


@each
def test_links_lead_to_the_other_dashboards(board: Json) -> None:
    uids = {other["uid"]: {one["name"] for one in other["templating"]["list"]} for other in BOARDS.values()}
    assert {link["url"].removeprefix("/d/") for link in board["links"]} == uids.keys() - {board["uid"]}
    links = [value for panel in panels(board) for value in links_of(panel)]
    for link in links:
        found = re.fullmatch(r"/d/([a-z-]+)\?var-([a-z]+)=\$\{__value\.text\}", link["url"])
        assert found is not None, link
        assert found[2] in uids[found[1]], link


def links_of(panel: Json) -> list[Json]:
    overrides = panel.get("fieldConfig", {"overrides": []})["overrides"]
    return [
        link for one in overrides for given in one["properties"] if given["id"] == "links" for link in given["value"]
    ]


def test_a_model_has_one_colour_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for board in BOARDS.values():
        for panel, target in targets(board):
            if "{{model}}" not in target["legendFormat"] or panel["type"] not in {"timeseries", "trend"}:
                continue
            painted = {
                one["matcher"]["options"]: one["properties"][0]["value"]["fixedColor"]
                for one in panel["fieldConfig"]["overrides"]
                if one["properties"][0]["id"] == "color"
            }
            for model in known_models():
                found.setdefault(model, set()).add(painted[f"/^{re.escape(model)}( .*)?$/"])
    assert len(found) >= 4
    assert all(len(colours) == 1 for colours in found.values())
    assert len(set.union(*found.values())) == len(found)


@each
def test_what_is_read_is_recorded(board: Json) -> None:
    """Nothing but recorded series, each made by a rule file or rendered by the role; and the alerts of this suite."""
    recorded = {rule["record"] for rule in rules() if "record" in rule} | RENDERED
    for where, expr in expressions(board):
        assert read(board, expr) <= recorded | {"ALERTS"}, where
        for one in selectors(parsed(board, expr)):
            if one.name == "ALERTS":
                assert ("suite", "citadel") in {(each.name, each.value) for each in one.matchers.matchers}, where


@each
def test_lists_of_alerts_are_of_teams_that_exist(board: Json) -> None:
    teams = {rule["labels"]["team"] for rule in rules() if "alert" in rule}
    found = [panel for panel in panels(board) if panel["type"] == "alertlist"]
    assert found
    for panel in found:
        named = re.findall(r'team="([a-z]+)"', panel["options"]["alertInstanceLabelFilter"])
        assert set(named) <= teams, panel["title"]


# Grafana's dashboard-linter, its rules by their names, as far as they concern Prometheus. Its target-job,
# target-instance, template-job and template-instance ask for labels of raw series; here for those that the recorded
# series do have.


@each
def test_lint_template_datasource(board: Json) -> None:
    first = board["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"], first["label"]) == (
        "datasource",
        "datasource",
        "prometheus",
        "Data source",
    )


@each
def test_lint_template_job_instance_model(board: Json) -> None:
    queries = {one["name"]: one for one in board["templating"]["list"] if one["type"] == "query"}
    assert {"host", "model"} <= queries.keys()
    for one in queries.values():
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        if one["name"] in {"host", "model", "job"}:
            assert (one["multi"], one["includeAll"], one["allValue"]) == (True, True, ".+")
            assert one["current"] == {"text": ["All"], "value": ["$__all"]}
    used = set(re.findall(r"\$\{?([a-z]+)", " ".join(expr for _, expr in expressions(board))))
    assert queries.keys() == used - {"datasource"}, "a variable that no query uses, or the other way round"


@each
def test_lint_template_label_promql(board: Json) -> None:
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), [a-z]+\)", one["query"]["query"])
            assert found is not None
            promql.parse(found[1])
            assert one["definition"] == one["query"]["query"]


@each
def test_lint_template_on_time_change_reload(board: Json) -> None:
    assert all(one["refresh"] == 2 for one in board["templating"]["list"] if one["type"] == "query")


@each
def test_lint_panel_datasource(board: Json) -> None:
    for panel in panels(board):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"]), panel["title"]


@each
def test_lint_panel_title_description(board: Json) -> None:
    for panel in panels(board):
        assert panel["title"], panel
        assert re.search(r"[.:?!]$", panel["description"]), panel["title"]
        assert len(panel["description"]) > 8, panel["title"]


@each
def test_lint_panel_units(board: Json) -> None:
    for panel in panels(board):
        if panel["type"] == "alertlist":
            continue
        defaults = panel["fieldConfig"]["defaults"]
        overrides = panel["fieldConfig"]["overrides"]
        units = [one["value"] for override in overrides for one in override["properties"] if one["id"] == "unit"]
        assert {defaults["unit"], *units} <= UNITS.keys(), panel["title"]
        absent = {mapping["options"].get("match") for mapping in defaults["mappings"]}
        assert "null+nan" in absent, panel["title"]
        assert defaults["noValue"], panel["title"]


@each
def test_lint_panel_no_targets(board: Json) -> None:
    for panel in panels(board):
        assert bool(panel["targets"]) is (panel["type"] != "alertlist"), panel["title"]


@each
def test_lint_target_promql(board: Json) -> None:
    for _, expr in expressions(board):
        parsed(board, expr)


@each
def test_lint_target_rate_interval(board: Json) -> None:
    for where, expr in expressions(board):
        for node in nodes(parsed(board, expr)):
            if isinstance(node, promql.Call) and node.func.name in {"rate", "irate"}:
                assert "[$__rate_interval]" in expr, where


@each
def test_lint_target_counter_agg(board: Json) -> None:
    for where, expr in expressions(board):
        assert not any(name.endswith("_total") for name in read(board, expr)), where


@each
def test_lint_target_job_instance_model(board: Json) -> None:
    """A series that has the label of a choice follows the choice."""
    for panel, target in targets(board):
        tree = promql.parse(target["expr"])
        for one in selectors(tree):
            matchers = {each.name: each for each in one.matchers.matchers}
            for label in levels(str(one.name)) & CHOICES.keys():
                found = matchers.get(label)
                where = f"{panel['title']}: {one.name} does not follow {CHOICES[label]}"
                assert found is not None, where
                assert found.op == promql.MatchOp.Re, where
                assert found.value in CHOICES[label], where


@each
def test_lint_uneditable_dashboard(board: Json) -> None:
    assert board["editable"] is False
