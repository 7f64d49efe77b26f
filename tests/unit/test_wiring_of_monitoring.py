"""What a site's variables become for hosts that are more than one thing, and for those that nobody may log in to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = "hx-llm-server-01"
METRICS = "192.168.10.37"


def ansible(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(program)), *options]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def allowed(folder: Path, *groups: str) -> dict[str, tuple[int, list[str]]]:
    """Name -> port and networks of what the firewall of the model server lets in, if it is in these groups too."""
    more = folder / "more.yml"
    more.write_text(yaml.safe_dump({"all": {"children": {group: {"hosts": {HOST: None}} for group in groups}}}))
    ran = ansible("ansible", HOST, "-i", "inventory/production", "-i", str(more), "--playbook-dir", "playbooks",
                  "-m", "debug", "-a", "var=network_checks_firewall_allow",
                  "-e", '{"platform_network_admin_networks": ["192.0.2.0/24"]}')  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    entries = json.loads(ran.stdout[ran.stdout.index("{") :])["network_checks_firewall_allow"]
    return {entry["name"]: (entry["port"], entry["networks"]) for entry in entries}


def test_a_model_server_lets_in_who_scrapes_it(tmp_path: Path) -> None:
    found = allowed(tmp_path)
    assert found["node-exporter"] == (9100, [METRICS])
    assert found["redis-exporter"] == (9121, [METRICS])
    assert found["metrics"] == (8000, [METRICS])
    assert {"postgres-exporter", "predictor", "prometheus", "alertmanager", "grafana"} & set(found) == set()


def test_a_model_server_that_is_everything_keeps_what_it_has_open(tmp_path: Path) -> None:
    found = allowed(tmp_path, "sql_servers", "metrics_servers")
    assert found["postgres-exporter"] == (9187, [METRICS])
    for name, port in {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}.items():
        assert found[name] == (port, ["192.0.2.0/24", METRICS]), "administrators, and the predictor, which is elsewhere"


@pytest.mark.parametrize("delivery", ["prepare", "host"])
def test_nothing_is_installed_where_files_are_only_prepared(delivery: str) -> None:
    """Nobody listens where the host is said to be; and for the role the secrets of production are missing."""
    ran = ansible("ansible-playbook", "playbooks/escalator.yml", "-i", "inventory/production",
                  "-e", f"platform_monitoring_delivery={delivery}",
                  "-e", "ansible_host=127.0.0.1", "-e", "ansible_port=9")  # fmt: skip
    assert ("TASK [escalator :" in ran.stdout) == (delivery == "host"), ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (delivery == "prepare")
