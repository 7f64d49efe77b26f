"""What cannot work is refused and changes nothing, and the escalator goes again: the last file of the scenario."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PLAY = ("ansible-playbook", "-i", "molecule/inventory", "molecule/escalator/converge.yml")
CONFIG = "/etc/citadel-escalator/escalator.json"
PASSWORD = "/etc/citadel-escalator/alertmanager.password"


def play(*options: str, **variables: Any) -> str:
    """What Ansible says; its status is the last word."""
    command = [*PLAY, *options, "-e", json.dumps(variables)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    return f"{run.stdout}{run.stderr} status={run.returncode}"


def test_it_logs_in_where_alertmanager_wants_it(host: Host) -> None:
    secret = "open-sesame-4711"
    said = play("--diff", escalator_alertmanager_user="citadel", escalator_alertmanager_password=secret)
    assert said.endswith("status=0"), said
    assert secret not in said
    assert host.file(PASSWORD).content_string == f"{secret}\n"
    assert (host.file(PASSWORD).mode, host.file(PASSWORD).group) == (0o640, "citadel-escalator")
    assert secret not in host.file(CONFIG).content_string


BAD = {
    "escalator_alertmanager_url": "http://ann:sesame@127.0.0.1:9093",
    "escalator_alertmanager_user": "ann",
    "escalator_port": 9093,
    "escalator_interval": 90,
}
REFUSALS = [
    "escalator_alertmanager_url is http://***@127.0.0.1:9093: write http(s)://HOST:PORT",
    'escalator_alertmanager_user is "ann", and of user and password one is empty',
    "escalator_port is 9093, which something else listens on",
    "escalator_interval and escalator_timeout are 90 and 10: take more than 0 and up to 60 seconds",
]
LATE = [{"team": "*", "severity": "critical", "levels": {"2": 9, "3": 5}}]


@pytest.mark.parametrize(
    ("variables", "refusals"),
    [
        (BAD, REFUSALS),
        ({"escalator_listen": "192.0.2.5"}, ["escalator_allow is empty: name the addresses"]),
        ({"escalator_rules": LATE}, ["the third the later"]),
    ],
)
def test_what_cannot_work_is_refused(host: Host, variables: dict[str, Any], refusals: list[str]) -> None:
    before = host.check_output("md5sum %s %s", CONFIG, PASSWORD)
    said = " ".join(play(**variables).split())
    assert [line for line in refusals if line not in said] == [], said
    assert said.endswith("status=2")
    assert "sesame" not in said
    assert host.check_output("md5sum %s %s", CONFIG, PASSWORD) == before
    assert host.service("citadel-escalator").is_running


def test_removed_it_leaves_no_trace(host: Host) -> None:
    removal = {"escalator_state": "absent", "escalator_remove_data": True}
    assert (said := play(**removal)).endswith("status=0"), said
    assert not host.check_output("systemctl list-units --all --plain --no-legend 'citadel-escalator*'")
    assert not host.check_output(
        "find /etc /opt /var/lib -path /var/lib/prometheus -prune -o -name '*citadel-escalator*' -print"
    )
    assert not host.user("citadel-escalator").exists
    assert host.service("prometheus-alertmanager").is_running
    assert "changed=0" in (again := play(**removal)), again


def test_check_mode_changes_nothing_on_a_bare_host(host: Host) -> None:
    said = play("--check", escalator_alertmanager_user="citadel", escalator_alertmanager_password="x" * 20)
    assert said.endswith("status=0"), said
    assert not host.file("/etc/citadel-escalator").exists
