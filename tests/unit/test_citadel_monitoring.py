"""Scrape jobs and files of targets from data; promtool reads the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from filter.citadel_monitoring import (
    citadel_below,
    citadel_monitoring_problems,
    citadel_read_folder,
    citadel_rule_groups,
    citadel_scrape_configs,
    citadel_target_files,
)

from tests.monitoring import servers

LIMITS = {"sample_limit": 1000, "label_limit": 20, "label_value_length_limit": 200}
JOBS: list[dict[str, Any]] = [
    {"name": "citadel-gateway", "auth": "gateway", "scheme": "https", "ca_file": "", "interval": "5s", "timeout": "4s"},
    {"name": "citadel-node", "auth": "exporters", "sample_limit": 9},
    {"name": "citadel-idle"},
]
TARGETS: list[dict[str, Any]] = [
    {"job": "citadel-gateway", "targets": ["10.0.0.1:8000"], "labels": {"instance": "h1"}},
    {"job": "citadel-node", "targets": ["10.0.0.1:9100"], "labels": {"instance": "h1", "rank": 1}},
    {"job": "citadel-node", "targets": ["[fd00::1]:9100"], "labels": {"instance": "h2"}},
]


def test_promtool_takes_the_jobs_and_finds_the_targets(tmp_path: Path) -> None:
    jobs = citadel_scrape_configs(JOBS, TARGETS, str(tmp_path), "citadel", LIMITS)
    assert [job["job_name"] for job in jobs] == ["citadel-gateway", "citadel-node"], "a job without targets is none"
    assert jobs[0]["authorization"]["credentials_file"] == f"{tmp_path}/gateway.key"
    assert jobs[1]["basic_auth"] == {"username": "citadel", "password_file": f"{tmp_path}/exporters.password"}
    assert [job["sample_limit"] for job in jobs] == [1000, 9]
    (tmp_path / "targets").mkdir()
    for name, text in citadel_target_files(TARGETS).items():
        (tmp_path / f"targets/{name}").write_text(text)
    for name in ("gateway.key", "exporters.password"):
        (tmp_path / name).write_text("x")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": jobs}))
    done = servers.check(servers.promtool(), "check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_labels_are_text_and_groups_stay_apart() -> None:
    node = json.loads(citadel_target_files(TARGETS)["citadel-node.json"])
    assert [group["labels"] for group in node] == [{"instance": "h1", "rank": "1"}, {"instance": "h2"}]


def test_group_names_are_read_from_the_files() -> None:
    texts = {"a.yml": "groups: [{name: x}, {name: y}]\n", "b.yml": "# nothing\n", "c.yml": "groups: []\n"}
    assert citadel_rule_groups(texts) == ["x", "y"]


def test_files_of_a_folder_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text("b\n")
    (tmp_path / "a.yml").write_text("a\n")
    (tmp_path / "a.md").write_text("m\n")
    found = citadel_read_folder(str(tmp_path), ".yml")
    assert list(found.items()) == [("a.yml", "a\n"), ("b.yml", "b\n")]
    assert citadel_below(found, "/x") == {"/x/a.yml": "a\n", "/x/b.yml": "b\n"}
    assert citadel_read_folder("", ".yml") == {}


def test_nothing_is_wrong_with_what_is_right() -> None:
    assert citadel_monitoring_problems(JOBS, TARGETS, {"gateway": True, "exporters": True}) == []


@pytest.mark.parametrize(
    ("jobs", "targets", "words"),
    [
        ([{"name": "node"}], [], "monitoring_jobs has node: a job of ours begins with citadel-"),
        ([*JOBS, JOBS[2]], [], "citadel-idle 2 times: keep one"),
        (JOBS, [{**TARGETS[0], "job": "citadel-x"}], "job citadel-x, which is not in monitoring_jobs: add it"),
        (JOBS, [{**TARGETS[0], "targets": ["10.0.0.1"]}], "has 10.0.0.1: write HOST:PORT"),
        (JOBS, [{**TARGETS[0], "labels": {"instance": "a", "b-c": "d"}}], "the label b-c: letters"),
        (JOBS, [{**TARGETS[0], "labels": {}}], "no label instance: give the name"),
        (JOBS, TARGETS, "monitoring_exporters_password is empty, and the job citadel-node shows it: set it"),
    ],
)
def test_what_cannot_be_scraped_is_said_with_the_remedy(
    jobs: list[dict[str, Any]], targets: list[dict[str, Any]], words: str
) -> None:
    assert words in "\n".join(citadel_monitoring_problems(jobs, targets, {"gateway": True}))
