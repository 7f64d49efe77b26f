"""All of it elsewhere, encrypted by a certificate of the operator's or of the host's own; and gone again."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
ADDRESS = "10.77.0.113"


def play(**values: Any) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/redis_alternative/converge.yml"]
    extra = ["-e", json.dumps(values)] if values else []
    return subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True, check=False)


def ping(host: Host, authority: str, *more: str) -> str:
    password = "REDISCLI_AUTH=$(cat /srv/limits/etc/counters.password)"
    tls = f"--tls --cacert {authority}" if authority else ""
    done = host.run(
        f"{password} redis-cli -h {ADDRESS} -p 6400 {tls} --user counters --no-auth-warning {' '.join(more) or 'PING'}"
    )
    return str(done.stdout + done.stderr).strip()


def test_every_variable_is_another() -> None:
    defaults = yaml.safe_load((PROJECT / "roles/redis/defaults/main.yml").read_text())
    changed = yaml.safe_load((PROJECT / "molecule/redis_alternative/vars/main.yml").read_text())
    assert set(defaults) - set(changed) == {"redis_state", "redis_remove_data"}
    assert {name for name, value in changed.items() if value == defaults[name]} == set()


def test_the_network_is_encrypted(host: Host) -> None:
    assert ping(host, "/srv/tls/crt.pem") == "PONG"
    assert ping(host, "") != "PONG"


def test_the_given_password_is_the_one(host: Host) -> None:
    assert host.file("/srv/limits/etc/counters.password").content_string == "a-password-of-the-test-only\n"
    assert ping(host, "/srv/tls/crt.pem", "SET", "other:key", "1") == "OK"
    assert "NOPERM" in ping(host, "/srv/tls/crt.pem", "SET", "citadel:key", "1")


def test_the_host_s_own_authority(host: Host) -> None:
    """Made once; a further address makes a new certificate of the same authority."""
    own = {"redis_tls_certificate": "", "redis_tls_key": "", "redis_tls_authority": ""}
    try:
        assert (run := play(**own)).returncode == 0, run.stdout
        assert ping(host, "/srv/limits/etc/tls/ca.crt") == "PONG"
        assert "changed=0" in (run := play(**own)).stdout, run.stdout
        authority = host.file("/srv/limits/etc/tls/ca.crt").content_string
        assert (run := play(**own, redis_listen=[ADDRESS, "127.0.0.2"])).returncode == 0, run.stdout
        assert host.file("/srv/limits/etc/tls/ca.crt").content_string == authority
        assert ping(host, "/srv/limits/etc/tls/ca.crt") == "PONG"
        assert host.file("/srv/limits/etc/tls/server.key").mode & 0o007 == 0
        assert host.file("/srv/limits/etc/tls/ca.key").mode == 0o600
    finally:
        assert play().returncode == 0


def test_bad_values_are_refused_all_at_once_with_the_remedies() -> None:
    run = play(
        redis_tls=False,
        redis_tls_key="",
        redis_socket="/srv/x.sock",
        redis_password="short",
        redis_memory="lots",
        redis_user="operator",
        redis_monitor_user="operator",
        redis_port=22,
        redis_listen=["limits.example.org"],
    )
    assert run.returncode != 0
    for words in (
        "redis_profile is production, but redis_tls is false",
        "2 of the three are given; give all, or none",
        "redis_socket is /srv/x.sock: it must be in a folder directly below /run",
        "redis_password has 5 characters: take 16 or more",
        "redis_memory is lots: write a number and kb, mb or gb",
        "redis_user and redis_prefix are operator and other",
        "redis_monitor_user is operator: letters, digits, _ and -, and not default, operator",
        "redis_port is 22, which something else listens on",
        "redis_listen has limits.example.org: give addresses, not names",
    ):
        assert words in " ".join(run.stdout.split()), f"{words!r} is not in\n{run.stdout}"
    assert "changed=0" in run.stdout


def test_removed_it_leaves_no_trace(host: Host) -> None:
    away = {"redis_state": "absent", "redis_remove_data": True}
    assert (run := play(**away)).returncode == 0, run.stdout
    assert host.run("systemctl is-active redis-server").stdout.strip() != "active"
    for path in ("/srv/limits/etc", "/srv/limits/data", "/etc/systemd/system/redis-server.service.d/citadel.conf"):
        assert not host.file(path).exists, path
    assert "changed=0" in (run := play(**away)).stdout, run.stdout
