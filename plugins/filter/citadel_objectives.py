"""Rules from data: each model's objectives as recording rules, and where an alert's runbook and dashboard are found."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

# Bounds of llm_gateway_request_duration_seconds in seconds, as the gateway has and writes them.
BOUNDS: tuple[float, ...] = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
DURATION = "llm_gateway_request_duration_seconds"
ENDPOINT = "chat"  # /v1/chat/completions, as its metrics name it
RUNBOOK = re.compile(
    r"^(?P<key>\s+runbook_url: )['\"]?docs/runbooks/(?P<page>[A-Za-z0-9_-]+)\.md['\"]?[ ]*$", re.MULTILINE
)

DASHBOARD = re.compile(r"^(?P<key>\s+dashboard: )(?P<uid>citadel-[a-z0-9-]+)[ ]*$", re.MULTILINE)


class RefusalError(ValueError):
    """An objective that cannot be measured; the message says what to change."""


def citadel_objectives(objectives: Sequence[Mapping[str, Any]], variable: str = "monitoring_objectives") -> str:
    """A rule file: each model's targets as constants, and the share of its requests that took longer than its target.

    An objective is ``model``, ``latency_ms``, ``requests_per_minute``, ``ratio`` (share of requests that must keep the
    latency), and what the model was given on all hosts: ``cores``, ``memory_bytes``. 0 is no target. A latency between
    two bounds of the histogram is measured at the one above it, and that is the target that is recorded beside the one
    given. Raises RefusalError.
    """
    rules: list[dict[str, Any]] = []
    seen: set[str] = set()
    for objective in objectives:
        model = str(objective["model"])
        if model in seen:
            raise RefusalError(f"{variable} has {model} twice: keep one entry")
        seen.add(model)
        latency, rate = float(objective.get("latency_ms", 0)), float(objective.get("requests_per_minute", 0))
        ratio = float(objective.get("ratio", 0.95))
        if latency < 0 or rate < 0:
            raise RefusalError(f"{variable}: a target of {model} is below 0; write 0 for none")
        if latency:
            if not 0 < ratio < 1:
                raise RefusalError(
                    f"{variable}: ratio of {model} is {ratio}; take a share between 0 and 1, such as 0.95"
                )
            rules += latency_rules(model, latency / 1000, ratio, variable)
        if rate:
            rules.append(constant("model:llm_objective_requests_per_minute:target", rate, {"model": model}))
        for name in ("cores", "memory_bytes"):
            if given := float(objective.get(name, 0)):
                rules.append(constant(f"model:llm_given_{name}:sum", given, {"model": model}))
    groups = [{"name": "citadel-objectives", "rules": rules}] if rules else []
    head = (
        "# Written by Ansible (role monitoring) from the models' targets; a change made here is lost at the next run.\n"
    )
    return head + yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000)


def latency_rules(model: str, seconds: float, ratio: float, variable: str) -> list[dict[str, Any]]:
    bound = next((bound for bound in BOUNDS if bound >= seconds), None)
    if bound is None:
        raise RefusalError(
            f"{variable}: latency_ms of {model} is {seconds * 1000:g}, and the gateway measures up to "
            f"{BOUNDS[-1] * 1000:g}; lower it, or write 0 for none"
        )
    labels = {"model": model}
    slow = {"slo": "latency", "model": model}
    selector = f'model="{quoted(model)}", endpoint="{ENDPOINT}"'
    rules = [
        constant("model:llm_objective_latency_seconds:target", seconds, labels),
        constant("slo:objective:ratio", ratio, slow),
    ]
    for window in WINDOWS:
        kept = f"sum by (model) (rate({DURATION}_bucket{{{selector}, {le(bound)}}}[{window}]))"
        every = f"sum by (model) (rate({DURATION}_count{{{selector}}}[{window}]))"
        rules.append(
            {"record": f"slo:sli_error:ratio_rate{window}", "expr": f"1 - {kept} / ({every} > 0)", "labels": dict(slow)}
        )
    return rules


def le(bound: float) -> str:
    """Whole bounds are written "1" by the gateway and kept as "1.0" by Prometheus 3."""
    if bound == int(bound):
        return rf'le=~"{int(bound)}|{int(bound)}\\.0"'
    return f'le="{bound}"'


def constant(name: str, value: float, labels: Mapping[str, str]) -> dict[str, Any]:
    return {"record": name, "expr": f"vector({value:.12g})", "labels": dict(labels)}


def quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def citadel_alert_links(
    rules: Mapping[str, str], base: str, suffix: str = ".html", grafana: str = ""
) -> dict[str, str]:
    """Rule files by name, the links in them made whole: ``docs/runbooks/NAME.md`` becomes ``BASE/NAME`` and the suffix,
    ``dashboard: UID`` its address in this Grafana, if there is one.
    """

    def runbook(found: re.Match[str]) -> str:
        return f"{found['key']}{base.rstrip('/')}/{found['page']}{suffix}"

    def dashboard(found: re.Match[str]) -> str:
        return f"{found['key']}{grafana.rstrip('/')}/d/{found['uid']}"

    linked = {name: RUNBOOK.sub(runbook, text) for name, text in rules.items()}
    return {name: DASHBOARD.sub(dashboard, text) for name, text in linked.items()} if grafana else linked


STYLE = (
    "body{max-width:46em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222;background:#fff}"
    "pre{background:#f3f3f3;padding:.7em;overflow:auto}code{font-size:.95em}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}"
)


def citadel_runbook_pages(texts: Mapping[str, str]) -> dict[str, str]:
    """Pages by name from texts in Markdown by name."""
    return {f"{name.removesuffix('.md').lower()}.html": runbook_page(text) for name, text in texts.items()}


def runbook_page(markdown: str) -> str:
    """A page for Prometheus' /consoles, which are templates: what looks like an action of theirs is shown as text."""
    # Only what renders pages needs the package, which the controller has and a managed host has not.
    from markdown_it import MarkdownIt

    title = next((line.lstrip("# ") for line in markdown.splitlines() if line.startswith("#")), "Runbook")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'href="(?!https?:|#|/)([^"/]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    )
    return page.replace("{{", '{{"{{"}}')


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "citadel_objectives": citadel_objectives,
            "citadel_alert_links": citadel_alert_links,
            "citadel_runbook_pages": citadel_runbook_pages,
        }
