"""All of it elsewhere, under units of other names; the same prepared in a folder; dashboards as files; gone again."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PREPARED = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", "/tmp/monitoring-alternative")) / "prepared"
HOST = "mol-monitoring-alternative"


def play(**values: Any) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/monitoring_alternative/converge.yml"]
    extra = ["-e", json.dumps(values)] if values else []
    return subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_every_variable_is_another() -> None:
    defaults = yaml.safe_load((PROJECT / "roles/monitoring/defaults/main.yml").read_text())
    changed = yaml.safe_load((PROJECT / "molecule/monitoring_alternative/vars/main.yml").read_text())
    assert set(defaults) - set(changed) == {"monitoring_state", "monitoring_delivery", "monitoring_prepare_dir"}
    assert {name for name, value in changed.items() if value == defaults[name]} == set()


def test_other_units_have_loaded_it(fetch: Callable[..., Any]) -> None:
    groups = fetch("http://127.0.0.1:9490/api/v1/rules").json()["data"]["groups"]
    assert {group["name"] for group in groups} == {"own", "citadel-test", "citadel-gpu-test", "citadel-objectives"}
    loaded = yaml.safe_load(fetch("http://127.0.0.1:9490/api/v1/status/config").json()["data"]["yaml"])
    jobs = {job["job_name"]: job for job in loaded["scrape_configs"]}
    assert jobs["citadel-own"]["tls_config"] == {
        "ca_file": "/etc/ssl/certs/ca-certificates.crt",
        "insecure_skip_verify": False,
    }
    assert (jobs["citadel-own"]["label_limit"], jobs["citadel-node"]["label_limit"]) == (20, 30)
    assert jobs["citadel-node"]["basic_auth"]["username"] == "scraper"
    receivers = yaml.safe_load(fetch("http://127.0.0.1:9493/api/v2/status").json()["config"]["original"])["receivers"]
    assert "citadel-models-warning-1" in {receiver["name"] for receiver in receivers}


def test_alerts_link_to_the_operator_s_own_pages(host: Host, fetch: Callable[..., Any]) -> None:
    groups = fetch("http://127.0.0.1:9490/api/v1/rules").json()["data"]["groups"]
    alerts = [rule["annotations"] for group in groups for rule in group["rules"] if rule["type"] == "alerting"]
    assert [alert["runbook_url"] for alert in alerts] == ["https://git.example.org/runbooks/citadeltest.md"]
    assert [alert["dashboard"] for alert in alerts] == ["https://grafana.example.org/d/citadel-a"]
    assert not host.file("/srv/metrics/consoles/llm").exists


def test_pages_of_our_own_are_served_from_another_folder(fetch: Callable[..., Any]) -> None:
    try:
        assert (run := play(monitoring_runbook_base_url="")).returncode == 0, run.stdout
        assert fetch("http://127.0.0.1:9490/consoles/llm/citadeltest.html").status == 200
    finally:
        assert play().returncode == 0


def test_dashboards_are_provisioned_as_files(host: Host) -> None:
    provider = yaml.safe_load(host.file("/srv/grafana/provisioning/citadel.yaml").content_string)["providers"][0]
    assert provider["folder"] == "LLM: the platform"
    assert provider["options"]["path"] == "/srv/grafana/dashboards"
    assert json.loads(host.file("/srv/grafana/dashboards/a.json").content_string)["uid"] == "citadel-a"


def test_what_is_prepared_is_what_is_on_the_host(host: Host) -> None:
    root = PREPARED / HOST
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / "README.md":
            there = host.file(f"/{path.relative_to(root)}").content_string
            assert there == path.read_text(), path
    readme = (root / "README.md").read_text()
    for words in (
        "/srv/promtool check config",
        "systemctl reload metrics.service alerts.service",
        "group daemon, mode 0640",
    ):
        assert words in readme
    assert (root / "srv/metrics/llm/gateway.key").stat().st_mode & 0o777 == 0o600


def test_without_copies_the_parts_are_prepared_and_nobody_logs_in(tmp_path: Path) -> None:
    """The host is one that cannot be reached."""
    (tmp_path / "hosts").write_text("[monitoring_alternative]\nno-such-host ansible_host=192.0.2.1\n")
    values = {
        "monitoring_delivery": "prepare",
        "monitoring_prepare_dir": str(tmp_path / "out"),
        "monitoring_prepare_prometheus_config": "",
        "monitoring_prepare_alertmanager_config": "",
    }
    command = ["ansible-playbook", "-i", str(tmp_path / "hosts"), "molecule/monitoring_alternative/converge.yml"]
    run = subprocess.run([*command, "-e", json.dumps(values)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    parts = tmp_path / "out/no-such-host/parts"
    prometheus = yaml.safe_load((parts / "prometheus.yml").read_text())
    assert [job["job_name"] for job in prometheus["scrape_configs"]] == ["citadel-own", "citadel-node"]
    assert yaml.safe_load((parts / "alertmanager.yml").read_text())["route"]["receiver"] == "citadel-feed"
    assert "first entry of `route.routes`" in (tmp_path / "out/no-such-host/README.md").read_text()


def test_removed_it_leaves_no_trace(host: Host) -> None:
    assert (run := play(monitoring_state="absent")).returncode == 0, run.stdout
    assert host.check_output("diff --recursive /srv/before /srv/metrics && echo same") == "same"
    for path in ("/srv/grafana/dashboards", "/srv/grafana/provisioning/citadel.yaml", "/srv/metrics/llm"):
        assert not host.file(path).exists, path
    assert not (PREPARED / HOST).exists()
    assert "changed=0" in (run := play(monitoring_state="absent")).stdout, run.stdout
