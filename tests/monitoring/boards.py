"""What the tests of the dashboards share: the files, their queries, and PromQL taken apart."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import promql_parser as promql
import yaml

from tools.dashboards import FOLDER
from tools.dashboards.reading import Span, filled, panels

Json = dict[str, Any]
RULES = FOLDER.parent / "rules"
BOARDS: dict[str, Json] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
NAMES = sorted(BOARDS)
# What the role renders from the inventory (roles/monitoring, objectives.yml) in the place of a rule file.
RENDERED = {
    "model:llm_objective_latency_seconds:target",
    "model:llm_objective_requests_per_minute:target",
    "model:llm_given_cores:sum",
    "model:llm_given_memory_bytes:sum",
}


def targets(board: Json) -> Iterator[tuple[Json, Json]]:
    """Every query with its panel."""
    for panel in panels(board):
        for target in panel.get("targets", []):
            yield panel, target


def expressions(board: Json) -> Iterator[tuple[str, str]]:
    """(where, PromQL) of panels, annotations, variables and lists of alerts, as they are stored."""
    for panel, target in targets(board):
        yield f"{panel['title']} {target['refId']}", target["expr"]
    for one in board["annotations"]["list"]:
        yield f"annotation {one['name']}", one["expr"]
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            yield f"variable {one['name']}", one["query"]["query"].removeprefix("label_values(").rsplit(",", 1)[0]
    for panel in panels(board):
        if panel["type"] == "alertlist":
            yield panel["title"], "ALERTS" + panel["options"]["alertInstanceLabelFilter"]


def parsed(board: Json, expr: str) -> promql.Expr:
    """As a tree, each chosen variable filled with a word. Raises ValueError for what is no PromQL."""
    choices = {one["name"]: "chosen" for one in board["templating"]["list"]}
    return promql.parse(filled(expr, choices, Span.of(board, 1e9)))


def nodes(tree: promql.Expr) -> list[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(tree, lambda node: found.append(node))
    return found


def selectors(tree: promql.Expr) -> list[promql.VectorSelector]:
    """Each selector once; that of a range is within its own node."""
    found = []
    for node in nodes(tree):
        if isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql.VectorSelector):
            found.append(node)
    return found


def read(board: Json, expr: str) -> set[str]:
    """The names of the series that an expression reads."""
    return {str(one.name) for one in selectors(parsed(board, expr))}


@cache
def rules() -> list[Json]:
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]
