"""Another address, a Prometheus that asks for a password, and what is refused before anything is changed."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
ADDRESS = "10.77.0.118"
SETTINGS = "/etc/citadel-predictor/predictor.json"


def play(**variables: object) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/predictor/converge.yml"]
    return subprocess.run(
        [*command, "-e", json.dumps(variables)], cwd=PROJECT, capture_output=True, text=True, check=False
    )


def test_what_cannot_work_is_refused(host: Host) -> None:
    before = host.file(SETTINGS).content_string
    run = play(
        predictor_listen="0.0.0.0",  # noqa: S104  refused without networks
        predictor_port=9090,
        predictor_prometheus_url="http://somebody:s3cret-word@127.0.0.1:9090",
        predictor_prometheus_bearer_file="/root/no-such-token",
        predictor_state_dir="/srv/predictor",
        predictor_cpu_quota="lots",
    )
    assert run.returncode == 2
    for words in (
        "predictor_listen is 0.0.0.0 and predictor_networks is empty",
        "predictor_port is 9090, which something else listens on",
        "without a password (predictor_prometheus_password_file)",
        "The secret /root/no-such-token",
        "predictor_state_dir is /srv/predictor",
        "predictor_cpu_quota is lots",
    ):
        assert words in run.stdout, run.stdout
    assert host.file(SETTINGS).content_string == before


def test_a_root_only_password_reaches_it_by_systemd_alone(host: Host, fetch: Callable[..., Any]) -> None:
    """What Prometheus is told is not checked there; that the file can be read is, or there would be no answer."""
    host.check_output("umask 077; echo s3cret-word > /root/password")
    run = play(
        predictor_listen=ADDRESS,
        predictor_networks=["10.77.0.0/24"],
        predictor_prometheus_username="citadel",
        predictor_prometheus_password_file="/root/password",
        predictor_target_defaults={"step": 300, "season": 3600, "history_days": 2},
    )
    assert run.returncode == 0, run.stdout
    targets = json.loads(host.file(SETTINGS).content_string)["targets"]
    assert {(target["step"], target["season"], target["history_days"]) for target in targets} == {(300, 3600, 2)}
    assert "s3cret-word" not in run.stdout + host.file(SETTINGS).content_string
    assert fetch(f"http://{ADDRESS}:9110/healthz").status == 200
    assert fetch("http://127.0.0.1:9110/healthz").status == 0
    for _ in range(30):
        shown = fetch(f"http://{ADDRESS}:9110/metrics").body
        if "llm_predictor_cycles_total" in shown:
            break
        host.check_output("sleep 1")
    assert 'llm_predictor_cycles_total{outcome="complete"}' in shown
    assert ADDRESS.rsplit(".", 1)[0] in host.check_output(
        "systemctl show --value --property=IPAddressAllow citadel-predictor.service"
    )
