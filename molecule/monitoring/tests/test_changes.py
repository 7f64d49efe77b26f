"""What is somebody else's stays; what fails is taken back; and all of it goes again without a trace."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
GRAFANA = "http://127.0.0.1:3000"
TREE = "find /etc/prometheus -type f -printf '%p %m %u %g ' -exec sha256sum '{}' ';' | sort"


def play(**values: Any) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/monitoring/converge.yml", "--diff"]
    extra = ["-e", json.dumps(values)] if values else []
    return subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True, check=False)


def recap(run: subprocess.CompletedProcess[str]) -> str:
    return run.stdout[run.stdout.rfind("PLAY RECAP") :]


@pytest.fixture
def grafana(fetch: Callable[..., Any]) -> Callable[..., Any]:
    token = {"Authorization": "Bearer glsa_stand_in_of_the_lab"}
    return lambda path, **more: fetch(f"{GRAFANA}{path}", headers=token, **more)


def value(fetch: Callable[..., Any], query: str, wanted: str = "") -> str:
    """Of a recorded series, as soon as it is the one that is wanted."""
    for _ in range(180):  # rules are evaluated each minute
        found = fetch(f"http://127.0.0.1:9090/api/v1/query?query={query}").json()["data"]["result"]
        if found and (not wanted or found[0]["value"][1] == wanted):
            return str(found[0]["value"][1])
        time.sleep(0.5)
    return str(found)


def test_the_operator_s_lines_are_all_there_and_in_order(host: Host) -> None:
    for name in ("prometheus.yml", "alertmanager.yml"):
        before = host.file(f"/srv/before/{name}").content_string
        lines, inside = [], False
        for line in host.file(f"/etc/prometheus/{name}").content_string.splitlines():
            inside = inside or "# BEGIN CITADEL" in line
            if not inside:
                lines.append(line)
            inside = inside and "# END CITADEL" not in line
        assert lines == before.splitlines(), name
        assert (host.file(f"/etc/prometheus/{name}").mode, host.file(f"/etc/prometheus/{name}").group) == (
            0o640,
            "prometheus",
        )
    assert host.check_output("sha256sum < /etc/prometheus/own_rules.yml") == host.check_output(
        "sha256sum < /srv/before/own_rules.yml"
    )


def test_their_rules_and_ours_are_evaluated(fetch: Callable[..., Any]) -> None:
    assert value(fetch, "own:answer:sum") == "42"
    assert value(fetch, "citadel:test:sum") == "7"
    assert value(fetch, "model:llm_objective_latency_seconds:target") == "0.5"
    assert fetch("http://127.0.0.1:9090/api/v1/query?query=citadel:gpu:sum").json()["data"]["result"] == []


def test_targets_are_scraped_with_the_password(fetch: Callable[..., Any]) -> None:
    assert value(fetch, 'up{job="citadel-node"}', "1") == "1"
    assert value(fetch, 'up{job="citadel-gateway"}', "1") == "1"


def test_an_alert_is_told_to_us_and_not_to_the_catch_all(fetch: Callable[..., Any]) -> None:
    """Ours stands before the operator's route that catches everything."""
    for suite in ("citadel", "theirs"):
        labels = {"alertname": "A", "suite": suite, "severity": "critical", "team": "platform"}
        body = [{"labels": labels, "annotations": {"summary": "s", "runbook_url": "http://x"}}]
        assert fetch("http://127.0.0.1:9093/api/v2/alerts", body=body).status == 200
    groups = fetch("http://127.0.0.1:9093/api/v2/alerts/groups").json()
    told = {
        alert["labels"]["suite"]: {receiver["name"] for receiver in alert["receivers"]}
        for group in groups
        for alert in group["alerts"]
    }
    assert told["theirs"] == {"own-mail"}
    assert "own-mail" not in told["citadel"]
    assert all(name.startswith("citadel-") for name in told["citadel"])


def test_the_runbook_opens_at_the_link_of_the_alert(fetch: Callable[..., Any]) -> None:
    groups = fetch("http://127.0.0.1:9090/api/v1/rules").json()["data"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if rule["name"] == "CitadelTest"]
    annotations = alerts[0]["annotations"]
    assert annotations["summary"] == "The value is {{ $value }}"
    assert annotations["runbook_url"] == "http://10.77.0.115:9090/consoles/citadel/citadeltest.html"
    page = fetch(annotations["runbook_url"])
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert "Its value is <code>{{ $value }}</code>" in page.body


def test_dashboards_are_in_grafana_once(grafana: Callable[..., Any]) -> None:
    found = {entry["uid"] for entry in grafana("/api/search?folderUIDs=citadel").json()}
    assert found == {"citadel-a", "citadel-b"}
    assert grafana("/api/dashboards/uid/citadel-a").json()["dashboard"]["version"] == 1
    assert len(grafana("/api/annotations").json()) == 1


def test_the_diff_of_a_change_shows_no_secret_of_theirs_or_ours(host: Host) -> None:
    run = play(monitoring_exporters_password="another-password-of-the-test", monitoring_sample_limit=40000)
    assert run.returncode == 0, run.stdout
    assert "sample_limit: 40000" in run.stdout
    for secret in ("their-secret", "another-password-of-the-test", "a-gateway-key-of-the-test-only", "glsa_stand_in"):
        assert secret not in run.stdout + run.stderr
    assert host.file("/etc/prometheus/citadel/exporters.password").content_string == "another-password-of-the-test"
    assert play().returncode == 0


def test_a_rule_that_is_wrong_changes_nothing(host: Host, tmp_path: Path) -> None:
    before = host.check_output(TREE)
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "bad.yml").write_text("groups: [{name: citadel-bad, rules: [{record: a:b:c, expr: 'sum('}]}]\n")
    run = play(monitoring_rules_dir=str(rules))
    assert run.returncode != 0
    said = " ".join(run.stdout.split())
    assert "promtool does not accept /etc/prometheus/prometheus.yml with our part. Nothing was changed" in said
    assert "parse error" in said
    assert host.check_output(TREE) == before


def test_a_reload_that_is_refused_is_taken_back(host: Host, tmp_path: Path, fetch: Callable[..., Any]) -> None:
    """The checker is blind here, so that the server itself refuses: the old state serves on, files are as before."""
    before = host.check_output(TREE)
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "bad.yml").write_text("groups: [{name: citadel-bad, rules: [{record: a:b:c, expr: 'sum('}]}]\n")
    run = play(monitoring_rules_dir=str(rules), monitoring_promtool="/bin/true")
    assert run.returncode != 0
    said = " ".join(run.stdout.split())
    assert "prometheus.service does not load its files" in said
    assert "parse error" in said
    assert "The old files are back and loaded" in said
    assert host.check_output(TREE) == before
    assert value(fetch, "citadel:test:sum") == "7"
    assert value(fetch, "own:answer:sum") == "42"
    assert "prometheus_config_last_reload_successful 1" in fetch("http://127.0.0.1:9090/metrics").body
    run = play()
    assert run.returncode == 0, run.stdout
    assert "changed=0" in recap(run)


def test_a_run_that_was_killed_before_the_reload_is_finished_by_the_next(host: Host, fetch: Callable[..., Any]) -> None:
    host.check_output("sed -i 's/vector(7)/vector(6)/' /etc/prometheus/citadel/rules/recording_test.yml")
    host.check_output("systemctl reload prometheus")
    assert value(fetch, "citadel:test:sum", "6") == "6"
    host.check_output("sed -i 's/vector(6)/vector(7)/' /etc/prometheus/citadel/rules/recording_test.yml")
    run = play()
    assert run.returncode == 0, run.stdout
    assert "changed=2" in recap(run), "the reload, and a word on the time line"
    assert value(fetch, "citadel:test:sum", "7") == "7"


def test_somebody_else_s_job_of_our_name_is_refused_with_the_remedy(host: Host) -> None:
    kept = host.file("/etc/prometheus/prometheus.yml").content_string
    path = "/etc/prometheus/prometheus.yml"
    try:
        host.check_output("sed -i 's/job_name: own-node/job_name: citadel-node/' %s", path)
        run = play()
        assert run.returncode != 0
        said = " ".join(run.stdout.split())
        assert "with job_name citadel-node, which is not ours: rename or delete it" in said
    finally:
        host.check_output("printf %%s %s > %s", kept, path)


def test_bad_values_are_refused_all_at_once_with_the_remedies() -> None:
    run = play(
        monitoring_gateway_key="",
        monitoring_grafana_token="",
        monitoring_prometheus_group="nobody-here",
        monitoring_amtool="/srv/amtool",
        monitoring_rules_dir="/srv/no-such-folder",
        monitoring_dir="/etc/prometheus",
        monitoring_targets=[{"job": "citadel-x", "targets": ["here"], "labels": {}}],
    )
    assert run.returncode != 0
    said = " ".join(run.stdout.split())
    for words in (
        "job citadel-x, which is not in monitoring_jobs: add it there",
        "has here: write HOST:PORT",
        "no label instance: give the name of the host",
        "monitoring_gateway_key is empty, and monitoring_alerting_gateways are told",
        "neither monitoring_grafana_token nor monitoring_grafana_token_file is given",
        "monitoring_prometheus_group is nobody-here",
        "monitoring_amtool is /srv/amtool, which is not on this host",
        "monitoring_rules_dir is /srv/no-such-folder, which is no folder",
        "monitoring_dir is /etc/prometheus: take a folder that is ours alone",
    ):
        assert words in said, f"{words!r} is not in\n{run.stdout}"
    assert "changed=0" in recap(run)


def test_removed_it_leaves_no_trace(host: Host, fetch: Callable[..., Any], grafana: Callable[..., Any]) -> None:
    assert grafana("/api/dashboards/db", body={"dashboard": {"uid": "own", "title": "Own"}}).status == 200
    run = play(monitoring_state="absent")
    assert run.returncode == 0, run.stdout
    assert host.check_output("diff --recursive --no-dereference /srv/before /etc/prometheus && echo same") == "same"
    for name in ("prometheus.yml", "alertmanager.yml"):
        assert host.check_output(f"stat --format='%a %U %G' /etc/prometheus/{name}") == "640 root prometheus"
    groups = fetch("http://127.0.0.1:9090/api/v1/rules").json()["data"]["groups"]
    assert [group["name"] for group in groups] == ["own"]
    loaded = fetch("http://127.0.0.1:9093/api/v2/status").json()["config"]["original"]
    assert [receiver["name"] for receiver in yaml.safe_load(loaded)["receivers"]] == ["own-mail"]
    assert {entry["uid"] for entry in grafana("/api/search").json()} == {"own"}
    again = play(monitoring_state="absent")
    assert again.returncode == 0, again.stdout
    assert "changed=0" in recap(again)
