"""The gateway goes again: the last file of the scenario, because nothing is left afterwards."""

import os
import subprocess
from pathlib import Path

from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
REMOVE = (
    "ansible-playbook",
    "-i",
    "molecule/inventory",
    "molecule/gateway_alternative/converge.yml",
    "-e",
    '{"gateway_state": "absent", "gateway_remove_data": true}',
)


def test_removed_it_leaves_no_trace(host: Host) -> None:
    run = subprocess.run(REMOVE, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert not host.check_output("systemctl list-units --all --plain --no-legend 'citadel-gateway*'")
    assert not host.check_output("find /etc /run -name '*citadel-gateway*' -o -path /run/gw")
    for folder in ("etc", "state", "log"):
        assert not host.file(f"/srv/gw/{folder}").exists
    assert host.run("pgrep --full bin/citadel-gateway").rc == 1
    again = subprocess.run(REMOVE, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "changed=0" in again.stdout, again.stdout
