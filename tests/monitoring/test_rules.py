"""The rules: promtool takes them, their cases hold, breaking a rule breaks a case, and every alert says what to do."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from citadel_gateway import metrics as worker_metrics
from citadel_gateway.control import gauges, ledger
from citadel_predictor import exposition

from tests.monitoring import mutants, servers
from tests.monitoring.mutants import CASES, ROOT, RULES, Case, Rule

ALERTS = mutants.rules("alert")
RECORDINGS = mutants.rules("record")
GIVEN = mutants.cases()
RUNBOOKS = ROOT / "docs/runbooks"
SECTIONS = ["What it means", "How to see it", "What to do", "How to know that it is over"]
DASHBOARDS = {f"citadel-{name}" for name in ("operations", "business", "realtime", "quality", "cost")}
# An alert that always fires has no case in which it does not.
ALWAYS = {"CitadelWatchdog"}
# What 2.42 or 3.x does not have, or only behind a flag.
FORBIDDEN = (
    "holt_winters|double_exponential_smoothing|mad_over_time|sort_by_label|limitk|limit_ratio|info\\(|histogram_avg|"
    "histogram_quantiles|ts_of_\\w+|first_over_time|\\banchored\\b|\\bsmoothed\\b|\\{\\s*[\"']|\\[\\d+\\]|\\[[^\\]]*[*/+][^\\]]*\\]"
)
# Rendered by the role from the inventory (objectives.yml).
OBJECTIVES = {
    "model:llm_objective_latency_seconds:target",
    "model:llm_objective_requests_per_minute:target",
    "model:llm_given_cores:sum",
    "model:llm_given_memory_bytes:sum",
}
OTHERS = {
    "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "vllm:num_requests_running",
    "vllm:num_requests_waiting", "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds", "vllm:time_to_first_token_seconds",
    "vllm:request_queue_time_seconds", "up", "scrape_samples_post_metric_relabeling", "scrape_duration_seconds",
    "prometheus_rule_evaluation_failures_total", "prometheus_notifications_dropped_total",
    "prometheus_notifications_errors_total", "alertmanager_notifications_failed_total",
    "prometheus_target_scrapes_exceeded_sample_limit_total", "node_cpu_seconds_total", "node_load1",
    "node_memory_MemAvailable_bytes", "node_memory_MemTotal_bytes", "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes", "node_network_receive_bytes_total", "node_network_transmit_bytes_total",
    "node_disk_io_time_seconds_total", "node_vmstat_oom_kill", "redis_up", "redis_memory_used_bytes",
    "redis_memory_max_bytes", "redis_commands_processed_total", "pg_up", "pg_stat_activity_count",
    "pg_settings_max_connections", "pg_database_size_bytes", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
    "DCGM_FI_DEV_XID_ERRORS",
}  # fmt: skip
WORDS = {"and", "or", "unless", "bool", "by", "on", "ignoring", "without", "group_left", "group_right", "offset"}

each_alert = pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.key.replace(" ", "-"))


def exported() -> set[str]:
    """The metrics that the platform's own programs have, by their own lists."""
    names = {*worker_metrics.FAMILIES, *gauges.FAMILIES, *ledger.FAMILIES, *exposition.FAMILIES}
    for source in (
        "gateway/src/citadel_gateway/control/ledger.py",
        "roles/exporters/files/citadel-unit-metrics",
        "roles/escalator/files/citadel-escalator",
        "roles/vllm/files/citadel-engine",
    ):
        path = ROOT / source
        text = path.read_text()
        names |= set(re.findall(r"\b(?:citadel|llm)_[a-z_0-9]+", text))
        # a name that is put together: f"{name}_errors_total" with name = "citadel_escalator"
        names |= {f"citadel_escalator_{end}" for end in re.findall(r'f"\{name\}_(\w+)"', text)}
        names |= {
            f"citadel_unit_{end}" for end in re.findall(r'\("(oom_kills_total|cpu_seconds_total|memory_bytes)"', text)
        }
    return names


def read(expr: str) -> set[str]:
    """The names of series in an expression."""
    text = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", expr)
    text = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\boffset\s+\w+", " ", text)
    found = re.findall(r"(?<![\w:.])([a-zA-Z_][\w:]*)(?!\s*\(|[\w:])", text)
    return set(found) - WORDS


def plain(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


# --- rules and what they read ----------------------------------------------------------------------------------------


def test_promtool_takes_them() -> None:
    done = servers.check(servers.promtool(), "check", "rules", "--lint=all", *sorted(RULES.glob("*.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_used_that_one_of_the_versions_lacks() -> None:
    used = [(rule.key, found[0]) for rule in ALERTS + RECORDINGS if (found := re.search(FORBIDDEN, rule.expr))]
    assert used == []
    keys = {key for rule in ALERTS + RECORDINGS for key in rule.body}
    assert keys <= {"alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"}
    groups = [group for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    assert {key for group in groups for key in group} <= {"name", "interval", "rules"}
    assert [name for name, count in Counter(group["name"] for group in groups).items() if count > 1] == []


@each_alert
def test_an_alert_reads_recording_rules_alone(rule: Rule) -> None:
    recorded = {one.name for one in RECORDINGS} | OBJECTIVES
    assert read(rule.expr) - recorded == set()
    foretold = "predict_linear" in rule.expr
    assert not foretold or ("deriv" in rule.expr and rule.expr.count(" and ") + rule.expr.count("\nand ") >= 2)


def test_what_is_recorded_exists() -> None:
    known = {*exported(), *OTHERS}
    recorded = {one.name for one in RECORDINGS} | OBJECTIVES
    unknown = {
        (rule.name, name)
        for rule in RECORDINGS
        for name in read(rule.expr)
        if name not in recorded and name not in known and plain(name) not in known
    }
    assert unknown == set()


def test_gpu_rules_are_apart() -> None:
    of_gpus = {rule.file for rule in ALERTS + RECORDINGS if re.search(r"DCGM|instance_gpu", rule.expr)}
    assert of_gpus == {"gpu_alerts.yml", "gpu_recording.yml"}


@each_alert
def test_an_alert_has_what_its_readers_need(rule: Rule) -> None:
    labels, said = rule.body["labels"], rule.body["annotations"]
    assert labels["suite"] == "citadel"
    assert labels["severity"] in {"critical", "warning", "info"}
    assert labels["team"] in {"platform", "models", "business", "quality"}
    assert set(said) == {"summary", "description", "runbook_url", "dashboard"}
    assert re.search(r"\$value", said["summary"])
    assert said["runbook_url"] == f"docs/runbooks/{rule.name.lower()}.md"
    assert said["dashboard"] in DASHBOARDS
    assert rule.file == "gpu_alerts.yml" or rule.file.startswith("alerts_")
    assert rule.name.startswith(("LLM", "Citadel"))


# --- their cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda path: path.stem)
def test_the_cases_hold(path: Path) -> None:
    done = servers.check(servers.promtool(), "test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@each_alert
def test_an_alert_has_three_kinds_of_cases(rule: Rule) -> None:
    kinds = Counter(case.kind for case in GIVEN if case.alert == rule.key)
    assert sum(kinds.values()) >= 3
    assert set(kinds) >= ({"fires", "thin"} if rule.name in ALWAYS else {"fires", "quiet", "thin"})


def test_every_case_is_of_an_alert_and_asks_what_its_kind_says() -> None:
    assert {case.alert for case in GIVEN} == {rule.key for rule in ALERTS}
    for case in GIVEN:
        asked = case.body["promql_expr_test"]
        name = case.alert.split()[0]
        assert all(f'alertname="{name}"' in one["expr"] for one in asked), case.body["name"]
        fires = any(one.get("exp_samples") for one in asked)
        assert fires == (case.kind == "fires" or name in ALWAYS), case.body["name"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[mutants.Trial, str]:
    """What promtool says about all mutants of all alerts."""
    trial = mutants.trial(tmp_path_factory.mktemp("mutants"), ALERTS, RECORDINGS, GIVEN)
    said = ""
    for first in range(0, len(trial.files), 10):  # a busy machine needs a minute for a few of them
        done = servers.check(servers.promtool(), "test", "rules", *trial.files[first : first + 10])
        said += done.stdout + done.stderr
    assert not re.search(r"parse error|yaml:|no such file|invalid", said), said[-4000:]
    return trial, said


def test_breaking_a_rule_breaks_a_case(tried: tuple[mutants.Trial, str]) -> None:
    trial, said = tried
    failed = mutants.failed(said)
    whole = {name for name, (_, how) in trial.mutants.items() if how == "whole"}
    assert failed & whole == set()
    survivors = [f"{key}: {how}" for name, (key, how) in trial.mutants.items() if name not in failed | whole]
    assert survivors == []
    assert len(trial.mutants) > 6 * len(ALERTS)


def test_an_alert_says_its_value(tried: tuple[mutants.Trial, str]) -> None:
    trial, said = tried
    fired = mutants.annotations(said)
    for name, (key, how) in trial.mutants.items():
        if how != "whole":
            continue
        assert fired.get(name), key
        for texts in fired[name]:
            assert re.search(r"\d", texts["summary"]), texts
            assert not re.search(r"<no value>|error calling|template|\{\{|NaN", " ".join(texts.values())), texts


def test_there_are_no_two_cases_of_one_name() -> None:
    names = Counter((case.body["name"], case.body["promql_expr_test"][0]["expr"]) for case in GIVEN)
    assert [name for name, count in names.items() if count > 1] == []


# --- their pages -----------------------------------------------------------------------------------------------------


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {rule.name.lower() for rule in ALERTS}


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("[!R]*.md")), ids=lambda path: path.stem)
def test_a_page_says_what_to_do(path: Path) -> None:
    text = path.read_text()
    rules = [rule for rule in ALERTS if rule.name.lower() == path.stem]
    assert text.startswith(f"# {rules[0].name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        assert len(section.split()) > 2
    assert f"`files/monitoring/rules/{rules[0].file}`" in text
    assert f"team {rules[0].body['labels']['team']}" in text
    for rule in rules:
        assert rule.body["labels"]["severity"] in text.splitlines()[2]
    assert len(text.splitlines()) < 50


def test_pages_name_series_that_exist() -> None:
    recorded = {rule.name for rule in RECORDINGS} | OBJECTIVES
    for path in RUNBOOKS.glob("*.md"):
        named = set(
            mutants.RECORDED.findall(" ".join(re.findall(r"`[^`]+`|^promtool.*$", path.read_text(), re.MULTILINE)))
        )
        assert {name for name in named if name.count(":") == 2} - recorded == set(), path.name


def test_the_index_has_every_alert_by_its_severity() -> None:
    parts = re.split(r"^## (\w+)$", (RUNBOOKS / "README.md").read_text(), flags=re.MULTILINE)
    listed = {
        (heading.lower(), *row)
        for heading, part in zip(parts[1::2], parts[2::2], strict=True)
        for row in re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|", part, re.MULTILINE)
    }
    labels = [(rule.body["labels"], rule.name) for rule in ALERTS]
    assert listed == {(one["severity"], name, name.lower(), one["team"]) for one, name in labels}


def test_a_broken_rule_is_noticed() -> None:
    """The mutants are what they should be: a small rule, by hand."""
    rule = Rule("x", "x", "X", 'a:b:c{d=">1"} > 4\nand on (m) (e:f:g < 2 unless h:i:j)', {"for": "5m"})
    expected = {
        "> turned round at 14",
        "4 times 2",
        "4 times 0.5",
        "< turned round at 36",
        "2 times 2",
        "2 times 0.5",
        "without and on (m) (e:f:g < 2 unless h:i:j)",
        "without unless h:i:j",
        "without its first condition",
        "never",
        "whole",
        "for 0s",
        "for 500m",
    }
    found = dict(mutants.mutants(rule))
    assert set(found) == expected
    assert found["without unless h:i:j"]["expr"] == 'a:b:c{d=">1"} > 4\nand on (m) (e:f:g < 2 )'
    assert found["without its first condition"]["expr"] == "(e:f:g < 2 unless h:i:j)"
    assert found["4 times 0.5"]["expr"].startswith('a:b:c{d=">1"} > 2.0')
    assert [case for case in GIVEN if not isinstance(case, Case)] == []
