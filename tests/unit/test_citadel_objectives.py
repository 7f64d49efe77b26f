"""Objectives as rules that a real promtool accepts and computes, links to runbooks, and the pages behind them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from citadel_gateway.core.tally import DURATION
from citadel_gateway.worker.asking import CAPABILITIES
from filter.citadel_objectives import (
    BOUNDS,
    ENDPOINT,
    WINDOWS,
    RefusalError,
    citadel_alert_links,
    citadel_objectives,
    citadel_runbook_pages,
)

from tests.monitoring import servers

ROOT = Path(__file__).resolve().parents[2]


def rules_of(*objectives: dict[str, Any]) -> list[dict[str, Any]]:
    groups = yaml.safe_load(citadel_objectives(list(objectives)))["groups"]
    return groups[0]["rules"] if groups else []


def test_bounds_and_endpoint_are_those_of_the_gateway() -> None:
    assert BOUNDS == DURATION
    assert CAPABILITIES[b"/v1/chat/completions"] == ENDPOINT


def test_a_target_of_0_is_no_objective() -> None:
    assert rules_of({"model": "x", "latency_ms": 0, "requests_per_minute": 0}) == []
    names = [rule["record"] for rule in rules_of({"model": "x", "latency_ms": 0, "requests_per_minute": 5})]
    assert names == ["model:llm_objective_requests_per_minute:target"]


def test_what_a_model_was_given_is_recorded_in_full() -> None:
    rules = rules_of({"model": "x", "cores": 14, "memory_bytes": 99857989632})
    given = {rule["record"]: rule["expr"] for rule in rules}
    assert given == {
        "model:llm_given_cores:sum": "vector(14)",
        "model:llm_given_memory_bytes:sum": "vector(99857989632)",
    }


def test_each_latency_target_has_its_windows_and_its_objective() -> None:
    rules = rules_of({"model": "x", "latency_ms": 2000, "ratio": 0.9})
    constants = {rule["record"]: (rule["expr"], rule["labels"]) for rule in rules[:2]}
    assert constants == {
        "model:llm_objective_latency_seconds:target": ("vector(2)", {"model": "x"}),
        "slo:objective:ratio": ("vector(0.9)", {"slo": "latency", "model": "x"}),
    }
    assert [rule["record"] for rule in rules[2:]] == [f"slo:sli_error:ratio_rate{window}" for window in WINDOWS]
    assert all(rule["labels"] == {"slo": "latency", "model": "x"} for rule in rules[2:])


@pytest.mark.parametrize(
    ("milliseconds", "selector"),
    [
        (100, 'le="0.1"'),
        (101, 'le="0.25"'),
        (1000, r'le=~"1|1\\.0"'),
        (2000, 'le="2.5"'),
        (320000, r'le=~"320|320\\.0"'),
    ],
)
def test_the_bound_is_the_smallest_that_is_not_below_the_target(milliseconds: int, selector: str) -> None:
    assert selector in rules_of({"model": "x", "latency_ms": milliseconds})[2]["expr"]


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        (
            [{"model": "x", "latency_ms": 320001}],
            "latency_ms of x is 320001, and the gateway measures up to 320000; lower it",
        ),
        ([{"model": "x", "latency_ms": -1}], "below 0; write 0 for none"),
        ([{"model": "x", "latency_ms": 5, "ratio": 1}], "ratio of x is 1.0; take a share"),
        ([{"model": "x"}, {"model": "x"}], "has x twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(objectives: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RefusalError, match=words):
        citadel_objectives(objectives)


@pytest.mark.parametrize("written", ["1", "1.0"])
def test_promtool_computes_the_share_that_was_too_slow(tmp_path: Path, written: str) -> None:
    """Three of four requests within a second, on Prometheus 2's and on 3's way to write the bound."""
    (tmp_path / "rules.yml").write_text(
        citadel_objectives([{"model": 'a"b', "latency_ms": 900, "requests_per_minute": 9}])
    )
    series = 'llm_gateway_request_duration_seconds_{}{{model="a\\"b",endpoint="{}",stream="{}"{}}}'
    test = {
        "rule_files": ["rules.yml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {
                        "series": series.format("bucket", ENDPOINT, "true", f',le="{written}"'),
                        "values": "0+2x10",
                    },
                    {
                        "series": series.format("bucket", ENDPOINT, "false", f',le="{written}"'),
                        "values": "0+1x10",
                    },
                    {"series": series.format("bucket", ENDPOINT, "false", ',le="10"'), "values": "0+2x10"},
                    {"series": series.format("count", ENDPOINT, "true", ""), "values": "0+2x10"},
                    {"series": series.format("count", ENDPOINT, "false", ""), "values": "0+2x10"},
                    {"series": series.format("count", "completions", "false", ""), "values": "0+9x10"},
                ],
                "promql_expr_test": [
                    {
                        "expr": "slo:sli_error:ratio_rate5m",
                        "eval_time": "10m",
                        "exp_samples": [
                            {"labels": 'slo:sli_error:ratio_rate5m{model="a\\"b",slo="latency"}', "value": 0.25}
                        ],
                    },
                    {
                        "expr": "model:llm_objective_latency_seconds:target",
                        "eval_time": "10m",
                        "exp_samples": [
                            {"labels": 'model:llm_objective_latency_seconds:target{model="a\\"b"}', "value": 0.9}
                        ],
                    },
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = servers.check(servers.promtool(), "test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    lint: subprocess.CompletedProcess[str] = servers.check(
        servers.promtool(), "check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml"
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_runbook_links_lead_to_the_site() -> None:
    rules = (
        '    annotations:\n      runbook_url: docs/runbooks/enginedown.md\n      summary: "see docs/runbooks/a.md"\n'
    )
    linked = citadel_alert_links({"a.yml": rules}, "http://m:9090/consoles/citadel/")["a.yml"]
    assert linked.splitlines()[1] == "      runbook_url: http://m:9090/consoles/citadel/enginedown.html"
    assert linked.splitlines()[2] == rules.splitlines()[2]
    quoted = citadel_alert_links({"b": '  runbook_url: "docs/runbooks/x_1.md"\n'}, "https://git.example/r", ".md")
    assert quoted["b"] == "  runbook_url: https://git.example/r/x_1.md\n"


def test_dashboards_are_linked_where_there_is_a_grafana() -> None:
    rules = {"a.yml": "          dashboard: citadel-operations\n          summary: dashboard: citadel-x y\n"}
    assert citadel_alert_links(rules, "b") == rules
    linked = citadel_alert_links(rules, "b", grafana="http://g:3000/")["a.yml"].splitlines()
    assert linked[0] == "          dashboard: http://g:3000/d/citadel-operations"
    assert linked[1] == rules["a.yml"].splitlines()[1]


def test_every_alert_of_the_repository_links_to_a_page_that_is_made() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "files/monitoring/rules").glob("*.yml")}
    pages = citadel_runbook_pages({path.name: path.read_text() for path in (ROOT / "docs/runbooks").glob("*.md")})
    linked = citadel_alert_links(texts, "http://m/consoles/citadel", grafana="http://g")
    links: set[str] = set()
    for text in linked.values():
        for group in yaml.safe_load(text)["groups"]:
            links |= {rule["annotations"]["runbook_url"] for rule in group["rules"] if "alert" in rule}
            boards = {rule["annotations"]["dashboard"] for rule in group["rules"] if "alert" in rule}
            assert [board for board in boards if not board.startswith("http://g/d/citadel-")] == []
    assert links
    assert [link for link in links if link.removeprefix("http://m/consoles/citadel/") not in pages] == []


def test_a_page_is_html_that_no_template_engine_touches() -> None:
    text = "# Engine `down` & out\n\nSee [other](other.md#top), [site](https://x/y.md) and `{{ $value }}`.\n\n"
    pages = citadel_runbook_pages({"EngineDown.md": text + "| a | b |\n|---|---|\n| 1 | <script> |\n"})
    page = pages["enginedown.html"]
    assert "<title>Engine `down` &amp; out</title>" in page
    assert 'href="other.html#top"' in page
    assert 'href="https://x/y.md"' in page
    assert '{{"{{"}} $value }}' in page
    assert "<table>" in page
    assert "<script>" not in page
