"""The firewall as somebody outside sees it, and rules that lock everybody out. These tests change their own host."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
ADDRESS = "10.77.0.106"


def reachable(port: int, patience: float = 1.5) -> bool:
    try:
        with socket.create_connection((ADDRESS, port), timeout=patience):
            return True
    except TimeoutError:
        return False


def test_only_what_is_allowed_is_reachable() -> None:
    """All of them listen; 6333 is open to everybody, SSH to the lab's network, 9090 to somebody else."""
    assert {port: reachable(port) for port in (22, 2222, 6333, 9090, 3000, 5433)} == {
        22: True,
        2222: True,
        6333: True,
        9090: False,
        3000: False,
        5433: False,
    }


def test_what_others_put_there_is_left_alone(host: Host) -> None:
    assert "table inet foreign" in host.check_output("nft list tables")


def test_the_resolver_uses_the_name_servers(host: Host) -> None:
    assert "192.0.2.53 192.0.2.54" in host.check_output("resolvectl dns")
    assert "example.org" in host.check_output("resolvectl domain")


def test_the_default_route_stays(host: Host) -> None:
    assert "via 10.77.0.1 dev host0" in host.check_output("ip route show default")


@pytest.fixture
def play() -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    def run(playbook: str) -> "subprocess.CompletedProcess[str]":
        inventory = ROOT / "molecule/inventory"
        path = ROOT / "molecule/network_checks_alternative" / playbook
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_TIMEOUT": "5"}
        return subprocess.run(
            ["ansible-playbook", "-i", str(inventory), str(path)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_rules_that_lock_everybody_out_are_taken_back(
    host: Host, play: Callable[[str], "subprocess.CompletedProcess[str]"]
) -> None:
    locked = play("lock_out.yml")
    assert locked.returncode != 0
    assert "Load the rules" in locked.stdout
    deadline = time.monotonic() + 30
    while not reachable(22) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert reachable(22), "the roll-back let nobody in again"
    assert not host.run("systemctl is-active --quiet citadel-firewall.service").succeeded
    repaired = play("converge.yml")
    assert repaired.returncode == 0, repaired.stdout
    test_only_what_is_allowed_is_reachable()
