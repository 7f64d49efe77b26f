"""The alerting rules, broken one at a time: each way to break one must break a case of its tests.

All mutants of an alert are evaluated at once, as alerts of their own beside the one that is whole, on the recording
rules that they need and no others. So one run of promtool judges them all.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "files/monitoring/rules"
CASES = Path(__file__).resolve().parent / "rules"
RECORDED = re.compile(r"\b(?!vllm:)[a-z_0-9]+:[a-zA-Z0-9_:]+")
COMPARISON = re.compile(r"(==|!=|<=|>=|<|>)(?!\s*bool)(?:\s*(-?\d+(?:\.\d+)?))?")
NOT = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
NAME = re.compile(r'alertname="(\w+)"')


@dataclass(frozen=True)
class Rule:
    """One rule as it is in its file; `name` is that of the alert or of the recorded series."""

    file: str
    group: str
    name: str
    expr: str
    body: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """An alert whose windows differ is one for each of them."""
        labels = self.body.get("labels", {})
        return " ".join([self.name, *(labels[one] for one in ("window", "within") if one in labels)])


def rules(kind: str) -> list[Rule]:
    """Those of all files; `kind` is `alert` or `record`."""
    found = []
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += [
                Rule(path.name, group["name"], one[kind], one["expr"], one) for one in group["rules"] if kind in one
            ]
    return found


@dataclass(frozen=True)
class Case:
    """One case of a test file: `alert` as a rule's key, `kind` is fires, quiet or thin."""

    file: str
    alert: str
    kind: str
    body: dict[str, Any] = field(hash=False)
    interval: str = "1m"


def cases() -> list[Case]:
    found = []
    for path in sorted(CASES.glob("*.yml")):
        page = yaml.safe_load(path.read_text())
        for one in page["tests"]:
            alert, kind, _ = one["name"].split(": ", 2)
            which = re.search(r'(?:window|within)="(\w+)"', one["promql_expr_test"][0]["expr"])
            key = f"{alert} {which[1]}" if which else alert
            found.append(Case(path.name, key, kind, one, page["evaluation_interval"]))
    return found


def masked(expr: str) -> str:
    """The expression with what is in braces, brackets and quotes blanked, at the same length."""
    return re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', lambda found: "_" * len(found[0]), expr)


def operands(expr: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, depth) of each `and` or `unless` together with its right side."""
    text = masked(expr)
    depths, depth = [], 0
    for letter in text:
        depth += letter == "("
        depths.append(depth)
        depth -= letter == ")"
    for found in re.finditer(r"\b(and|unless)\b", text):
        here = depths[found.start()]
        end = found.end()
        while end < len(text) and depths[end] >= here and not (here and depths[end] == here and text[end] == ")"):
            if depths[end] == here and re.match(r"\b(?:and|unless|or)\b", text[end:]) and text[end - 1].isspace():
                break
            end += 1
        yield found.start(), end, here


def broken_expressions(expr: str) -> Iterator[tuple[str, str]]:
    """(how, expression): comparisons turned round, thresholds doubled and halved, conditions left out."""
    yield "never", f"({expr}) unless ({expr})"
    text = masked(expr)
    for found in COMPARISON.finditer(text):
        operator, number = found[1], found[2]
        start, end = found.span(1)
        yield f"{operator} turned round at {start}", expr[:start] + NOT[operator] + expr[end:]
        if number and float(number) and operator not in {"==", "!="}:
            start, end = found.span(2)
            for factor in (2, 0.5):
                yield f"{number} times {factor}", expr[:start] + f"{float(number) * factor:.9f}" + expr[end:]
    right = list(operands(expr))
    for start, end, _ in right:
        yield f"without {' '.join(expr[start:end].split())}", expr[:start] + expr[end:]
    first = next((one for one in right if one[2] == 0), None)
    if first and text[first[0] :].startswith("and"):
        rest = re.sub(r"^and\s+(?:(?:on|ignoring)\s*\([^)]*\)\s*)?", "", expr[first[0] :])
        yield "without its first condition", rest


def mutants(rule: Rule) -> list[tuple[str, dict[str, Any]]]:
    """(how, body of the rule). The first one is whole."""
    body = {name: value for name, value in rule.body.items() if name != "annotations"}
    found = [("whole", dict(rule.body))]
    found += [(how, body | {"expr": expr}) for how, expr in broken_expressions(rule.expr)]
    if wait := rule.body.get("for"):
        hundredfold = f"{int(wait[:-1]) * 100}{wait[-1]}"
        found += [(f"for {time}", body | {"for": time}) for time in ("0s", hundredfold)]
    return found


def needed(expr: str, recordings: list[Rule]) -> list[Rule]:
    """The recording rules behind an expression, each after those that it reads."""
    found: list[Rule] = []

    def visit(text: str) -> None:
        for name in RECORDED.findall(text):
            for rule in recordings:
                if rule.name == name and rule not in found:
                    visit(rule.expr)
                    if rule not in found:
                        found.append(rule)

    visit(expr)
    return found


@dataclass(frozen=True)
class Trial:
    """Test files for promtool; `mutants` says by alert name what it is a mutant of, and how."""

    files: tuple[Path, ...]
    mutants: dict[str, tuple[str, str]]


def trial(folder: Path, alerts: Iterable[Rule], recordings: list[Rule], given: list[Case]) -> Trial:
    """Write the files. The whole alert is also asked for with its annotations, so that what it says is printed."""
    names: dict[str, tuple[str, str]] = {}
    files = []
    for number, rule in enumerate(alerts):
        mine = [case for case in given if case.alert == rule.key]
        bodies = {}
        for index, (how, body) in enumerate(mutants(rule)):
            name = f"A{number}_{index}"
            names[name] = (rule.key, how)
            bodies[name] = body | {"alert": name}
        recorded = [one.body for one in needed(rule.expr, recordings)]
        group = {"name": "all", "rules": [*recorded, *bodies.values()]}
        path = folder / f"{number}.yml"
        path.write_text(yaml.safe_dump({"groups": [group]}))
        for interval in sorted({case.interval for case in mine}):
            page = {
                "rule_files": [path.name],
                "evaluation_interval": interval,
                "tests": [tried(case, list(bodies)) for case in mine if case.interval == interval],
            }
            files.append(folder / f"{number}_{interval}_test.yml")
            files[-1].write_text(yaml.safe_dump(page))
    return Trial(tuple(files), names)


def tried(case: Case, names: list[str]) -> dict[str, Any]:
    """The case, with each of its questions put for each mutant."""
    body = dict(case.body)
    asked = body["promql_expr_test"]
    body["promql_expr_test"] = [
        one | {"expr": NAME.sub(f'alertname="{name}"', one["expr"])} for name in names for one in asked
    ]
    if case.kind == "fires":
        body["alert_rule_test"] = [{"eval_time": asked[-1]["eval_time"], "alertname": names[0], "exp_alerts": []}]
    return body


def failed(said: str) -> set[str]:
    """The alert names whose questions were answered otherwise, from what promtool said."""
    return set(re.findall(r'expr: .*alertname=\\"(A\d+_\d+)\\"', said))


def annotations(said: str) -> dict[str, list[dict[str, str]]]:
    """By alert name: the annotations with which it fired."""
    found: dict[str, list[dict[str, str]]] = {}
    for block in re.split(r"\n(?=\s+alertname: )", said):
        name = re.match(r"\s*alertname: (A\d+_\d+)", block)
        if name:
            texts = re.findall(r"Annotations:\{(.*)\}", block)
            found.setdefault(name[1], []).extend(dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', text)) for text in texts)
    return found
