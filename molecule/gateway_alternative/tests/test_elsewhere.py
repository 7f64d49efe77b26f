"""Every variable has another value than its default: each is found again on the host, none of the defaults is."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    assert not host.check_output("ss --no-header --listening --tcp 'sport = :8000'")


def test_a_third_request_to_a_model_does_not_wait(host: Host) -> None:
    """Two requests in flight to a model are allowed in each of three workers; of twelve at once the others get 503."""
    took = json.loads(host.check_output(f"streams.py {URL} /root/keys/user fake-model 12 40 0"))
    assert 0 < took["whole"] <= 6, took
    assert all(why.startswith("HTTP/1.1 503") for why in took["why"]), took


def test_limits_are_those_of_the_variables(host: Host) -> None:
    properties = "MemoryMax,LimitNOFILE,WatchdogUSec,TimeoutStopUSec"
    shown = host.check_output("systemctl show --property=%s citadel-gateway@3.service", properties)
    assert set(shown.splitlines()) == {
        "MemoryMax=209715200",
        "LimitNOFILE=1024",
        "WatchdogUSec=10s",
        "TimeoutStopUSec=23s",
    }
    assert host.check_output("systemctl show --property=CPUWeight citadel-gateway.slice") == "CPUWeight=500"


def test_nothing_is_where_the_defaults_are(host: Host) -> None:
    places = ("/etc/citadel-gateway", "/run/citadel-gateway", "/var/lib/citadel-gateway", "/var/log/citadel-gateway")
    assert [place for place in places if host.file(place).exists] == []


def refused(**values: Any) -> str:
    """What the play says of values that cannot work; it changes nothing."""
    run = play("--check", "-e", json.dumps(values))
    assert run.returncode != 0, run.stdout
    assert "changed=0" in run.stdout
    return run.stdout


def test_bad_values_are_refused_all_at_once_with_the_remedies() -> None:
    """Variable, value and remedy of each, in one list."""
    key = {"id": "a", "sha256": "0" * 64}
    said = refused(
        gateway_cors_origins=["*", "chat.example.org"],
        gateway_workers=1,
        gateway_port=22,
        gateway_access_log="/var/log/access.jsonl",
        gateway_run_dir="/srv/run",
        gateway_models=[
            {"name": "twice", "context": 1, "backends": [{"host": "127.0.0.1", "port": 22}]},
            {"name": "other", "context": 1, "aliases": ["twice"], "backends": []},
            {"name": "a b", "context": 1, "backends": [{"host": "10.0.0.1", "port": 22}]},
        ],
        gateway_default_tier="bronze",
        gateway_users=[{"id": "user", "tier": "silver"}],
        gateway_redis_url="redis://10.0.0.1",
        gateway_database_url="mysql://10.0.0.1/x",
        gateway_keys=[
            key,
            {**key, "models": ["gone"]},
            {"id": "c d", "sha256": "the key itself"},
        ],
    )
    for words in (
        'gateway_cors_origins has "*" and gateway_profile is production: name the origins',
        'gateway_cors_origins has "chat.example.org": an origin is scheme://host[:port]',
        "gateway_workers is 1: take 2 to 64",
        "gateway_port is 22, which something else listens on",
        "gateway_access_log is /var/log/access.jsonl: it must be below gateway_log_dir",
        "gateway_run_dir is /srv/run: it must be below /run",
        'gateway_models names "twice" more than once',
        'gateway_models: "other" has no backends',
        'gateway_models has the name "a b"',
        "gateway_models has a backend on port 22, which is gateway_port",
        'gateway_default_tier is "bronze", and gateway_tiers has none, gold: take one of them',
        'gateway_users: "user" has the tier "silver", which is not in gateway_tiers',
        "gateway_redis_url is redis://10.0.0.1: write redis://USER@HOST:PORT/0",
        "gateway_database_url is mysql://10.0.0.1/x: write postgresql+psycopg://USER@HOST:PORT/NAME",
        'gateway_keys has the id "a" more than once',
        'gateway_keys: "a" has the hash of another entry',
        'gateway_keys: "a" may ask "gone", which is not in gateway_models',
        'gateway_keys has the id "c d"',
        'sha256 of "c d" is not 64 lower-case hexadecimal digits',
    ):
        assert words in " ".join(said.split()), f"{words!r} is not in\n{said}"


def test_production_without_a_key_is_refused() -> None:
    assert "gateway_keys is empty and gateway_profile is production" in refused(gateway_keys=[])


def test_misspelt_and_unknown_words_of_a_key_are_refused() -> None:
    key = {"id": "a", "sha256": "0" * 64}
    assert "gateway_keys.scope" in refused(gateway_keys=[{**key, "scope": ["admin"]}])
    assert "must be one or more of" in refused(gateway_keys=[{**key, "scopes": ["root"]}])


def test_fewer_workers_on_another_port_and_back(host: Host, fetch: Callable[..., Any]) -> None:
    """The surplus worker goes and comes back; the socket moves with all workers."""
    running = "systemctl list-units --plain --no-legend --state=active 'citadel-gateway@*.service'"
    for count, port in ((2, 9101), (3, 9100)):
        run = play("-e", json.dumps({"gateway_workers": count, "gateway_port": port}))
        assert run.returncode == 0, run.stdout
        assert len(host.check_output(running).splitlines()) == count
        assert fetch(f"http://10.77.0.110:{port}/healthz").status == 200
    assert host.run("systemctl is-failed 'citadel-gateway*'").rc != 0


def test_a_release_that_does_not_start_stops_at_the_first_worker(host: Host, fetch: Callable[..., Any]) -> None:
    """The play fails, the other workers serve on as they are, and the next good play puts everything right."""
    broken = "/srv/broken/bin/citadel-gateway"
    script = '#!/bin/sh\ncase "$1" in check-config | migrate) ;; *) exit 1 ;; esac\n'
    host.check_output(
        "mkdir --parents /srv/broken/bin && printf %s %s > %s && chmod 755 %s", "%s", script, broken, broken
    )
    running = "systemctl show --property=MainPID --value citadel-gateway@2.service citadel-gateway@3.service"
    before = host.check_output(running)
    try:
        run = play("-e", "gateway_environment=/srv/broken")
        assert run.returncode != 0
        assert "citadel-gateway@1.service" in run.stdout
        assert host.check_output(running) == before
        assert all(fetch(f"{URL}/healthz").status == 200 for _ in range(5))
    finally:
        assert play().returncode == 0
    assert host.check_output("systemctl is-active 'citadel-gateway@*.service'").split() == ["active"] * 3
