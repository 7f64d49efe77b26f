"""The predictor goes again: the last file of the scenario, because nothing is left afterwards."""

import json
import os
import subprocess
from pathlib import Path

from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
STATE = "/var/lib/citadel-predictor"
PASSED_OVER = "-path /var/lib/dpkg -prune -o -path /var/lib/prometheus -prune"  # Prometheus removes files as we look
LEFT = f"find /etc /run /var/lib {PASSED_OVER} -o -name '*citadel-predictor*' -print"


def play(*options: str, **variables: object) -> str:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/predictor/converge.yml", *options]
    command += ["-e", json.dumps(variables)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_removed_it_leaves_what_it_learnt(host: Host) -> None:
    play(predictor_state="absent")
    assert host.check_output(LEFT).split() == [STATE]
    assert host.user("citadel-predictor").exists
    assert host.run("pgrep --full bin/citadel-predictor").rc == 1


def test_removed_with_its_data_it_leaves_no_trace(host: Host) -> None:
    play(predictor_state="absent", predictor_remove_data=True)
    assert not host.check_output(LEFT)
    assert not host.user("citadel-predictor").exists
    assert not host.check_output("systemctl list-units --all --plain --no-legend 'citadel-predictor*'")
    assert "changed=0" in play(predictor_state="absent", predictor_remove_data=True)


def test_check_mode_tells_what_would_be_done_where_there_is_nothing(host: Host) -> None:
    """Neither environment nor user, and a Prometheus that does not answer: said, and no reason to stop."""
    said = play(
        "--check", predictor_environment="/opt/nowhere/predictor-env", predictor_prometheus_url="http://127.0.0.1:9"
    )
    assert "changed=3" in said, said
    assert "does not answer from mol-predictor" in said
    assert not host.check_output(LEFT)
