"""The advice of the cost dashboard, by promtool: the cases in recommendations.yml, and that each of them matters."""

import re
from pathlib import Path

import pytest

from tests.monitoring.series import RECOMMENDATIONS, ROOT
from tests.monitoring.servers import check, promtool

CASES = Path(__file__).with_name("recommendations.yml")


def test_the_rules_are_well_formed() -> None:
    done = check(promtool(), "check", "rules", "--lint=all", "--lint-fatal", RECOMMENDATIONS)
    assert done.returncode == 0, done.stderr


def test_the_advice_is_right() -> None:
    done = check(promtool(), "test", "rules", CASES)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(1 - model:llm_feedback_satisfaction_low:ratio_rate1d > 0)", "1"),
        (">= 20", ">= 0"),
        ("== bool", "!= bool"),
        ("86400 *", "3600 *"),
        ("(1 - model:llm_engine_busy:ratio_avg1d)", "model:llm_engine_busy:ratio_avg1d"),
        ("1.25 * quantile", "quantile"),
        ("ceil(", "("),
        ("model:llm_given_cores:sum - on", "model:llm_given_cores:sum + on"),
        ("max_over_time(model:citadel_unit_memory", "avg_over_time(model:citadel_unit_memory"),
        ("model:llm_given_memory_bytes:sum - on", "model:llm_given_memory_bytes:sum + on"),
    ],
)
def test_a_rule_that_is_broken_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    text = RECOMMENDATIONS.read_text()
    assert right in text
    broken = tmp_path / "rules.yml"
    broken.write_text(text.replace(right, wrong, 1))
    cases = tmp_path / "cases.yml"
    cases.write_text(re.sub(r"rule_files: .*", "rule_files: [rules.yml]", CASES.read_text()))
    assert check(promtool(), "test", "rules", cases).returncode != 0


def test_the_file_is_where_the_role_takes_rules_from() -> None:
    assert RECOMMENDATIONS.parent == ROOT / "files/monitoring/rules"
