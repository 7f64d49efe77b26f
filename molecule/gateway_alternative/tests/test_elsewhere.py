"""Every variable has another value than its default: each is found again on the host, none of the defaults is."""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
URL = "http://10.77.0.110:9100"
BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def play(*extra: str) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/gateway_alternative/converge.yml", *extra]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def test_every_variable_is_another() -> None:
    defaults = yaml.safe_load((PROJECT / "roles/gateway/defaults/main.yml").read_text())
    changed = yaml.safe_load((PROJECT / "molecule/gateway_alternative/vars/main.yml").read_text())
    assert set(defaults) - set(changed) == {"gateway_state", "gateway_remove_data"}  # these two are the last test's
    assert {name for name, value in changed.items() if value == defaults[name]} == set()


def test_a_completion(fetch: Callable[..., Any]) -> None:
    answer = fetch(f"{URL}/v1/chat/completions", key_file="/root/keys/user", body=BODY)
    assert answer.status == 200, answer.body


def test_the_socket_is_where_it_was_told_to_be(host: Host) -> None:
    listening = host.check_output("ss --no-header --listening --tcp --numeric 'sport = :9100'")
    assert listening.split()[3] == "10.77.0.110:9100"
    assert listening.split()[2] == "64"
    assert not host.check_output("ss --no-header --listening --tcp 'sport = :8000'")


def test_a_third_request_to_a_model_waits_for_nothing(fetch: Callable[..., Any]) -> None:
    """Two requests in flight to one model in each of three workers are allowed; of ten at once some get 503."""
    body = {**BODY, "max_tokens": 40}

    def ask(_: int) -> Any:
        return fetch(f"{URL}/v1/chat/completions", key_file="/root/keys/user", body=body)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert {answer.status for answer in answers} == {200, 503}


def test_limits_are_those_of_the_variables(host: Host) -> None:
    properties = "MemoryMax,CPUWeight,LimitNOFILE,WatchdogUSec,TimeoutStopUSec"
    shown = host.check_output("systemctl show --property=%s citadel-gateway@3.service", properties)
    assert set(shown.splitlines()) == {
        "MemoryMax=209715200",
        "CPUWeight=500",
        "LimitNOFILE=1024",
        "WatchdogUSec=10s",
        "TimeoutStopUSec=23s",
    }


def test_nothing_is_where_the_defaults_are(host: Host) -> None:
    places = ("/etc/citadel-gateway", "/run/citadel-gateway", "/var/lib/citadel-gateway", "/var/log/citadel-gateway")
    assert [place for place in places if host.file(place).exists] == []


REFUSED = {
    "gateway_cors_origins": (["*"], "gateway_profile is production"),
    "gateway_keys": ([], "nobody could ask anything"),
    "gateway_workers": (1, "gateway_workers is 1"),
    "gateway_port": (22, "something else listens on"),
    "gateway_access_log": ("/tmp/access.jsonl", "below gateway_log_dir"),
    "gateway_run_dir": ("/srv/run", "below /run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_values_are_refused_with_the_remedy(name: str) -> None:
    value, words = REFUSED[name]
    run = play("--check", "-e", yaml.safe_dump({name: value}, default_flow_style=True))
    assert run.returncode != 0
    assert name in run.stdout
    assert words in run.stdout


BAD_KEYS = {
    "twice": ([{"id": "a", "sha256": "0" * 64}, {"id": "a", "sha256": "1" * 64}], 'has the id "a" more than once'),
    "same hash": ([{"id": "a", "sha256": "0" * 64}, {"id": "b", "sha256": "0" * 64}], "the hash of another entry"),
    "no hash": ([{"id": "a", "sha256": "the key itself"}], "is not 64 lower-case hexadecimal digits"),
    "model": ([{"id": "a", "sha256": "0" * 64, "models": ["gone"]}], "which is not in gateway_models"),
    "misspelt": ([{"id": "a", "sha256": "0" * 64, "scope": ["admin"]}], "Unsupported parameters"),
    "scope": ([{"id": "a", "sha256": "0" * 64, "scopes": ["root"]}], "must be one or more of"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys_are_refused_with_the_remedy(case: str) -> None:
    keys, words = BAD_KEYS[case]
    run = play("--check", "-e", yaml.safe_dump({"gateway_keys": keys}, default_flow_style=True))
    assert run.returncode != 0
    assert words in run.stdout, run.stdout


def test_fewer_workers_and_back(host: Host) -> None:
    """The surplus worker goes, the others go on; and it comes back."""
    running = "systemctl list-units --plain --no-legend --state=active 'citadel-gateway@*.service'"
    for count in (2, 3):
        run = play("-e", f'{{"gateway_workers": {count}}}')
        assert run.returncode == 0, run.stdout
        assert len(host.check_output(running).splitlines()) == count


def test_it_moves_to_another_port(host: Host, fetch: Callable[..., Any]) -> None:
    for port in (9101, 9100):
        run = play("-e", f'{{"gateway_port": {port}}}')
        assert run.returncode == 0, run.stdout
        assert fetch(f"http://10.77.0.110:{port}/healthz").status == 200
    assert host.run("systemctl is-failed 'citadel-gateway*'").rc != 0


def test_removed_it_leaves_no_trace(host: Host) -> None:
    try:
        run = play("-e", '{"gateway_state": "absent", "gateway_remove_data": true}')
        assert run.returncode == 0, run.stdout
        assert not host.check_output("systemctl list-units --all --plain --no-legend 'citadel-gateway*'")
        assert not host.check_output(
            "find /etc /run /srv/gw -name '*citadel-gateway*' -o -path '/srv/gw/*' -o -path /run/gw"
        )
        assert host.run("pgrep --full bin/citadel-gateway").rc == 1
        again = play("-e", '{"gateway_state": "absent", "gateway_remove_data": true}')
        assert "changed=0" in again.stdout, again.stdout
    finally:
        assert play().returncode == 0
