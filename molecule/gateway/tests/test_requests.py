"""What a client gets, with fake engines behind the gateway; what needs no restart, and what a restart spares."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

URL = "http://127.0.0.1:8000"
KEYS = "/root/keys"
MODEL = "fake-model"
HELLO = [{"role": "user", "content": "a prompt that nobody may find in a log"}]
WORKERS = ("citadel-gateway@1.service", "citadel-gateway@2.service")
UNITS = (*WORKERS, "citadel-gateway-control.service")
PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])

Fetch = Callable[..., Any]


@pytest.fixture
def chat(fetch: Fetch) -> Fetch:
    def ask(model: str = MODEL, key: str = "user", **more: Any) -> Any:
        body = {"model": model, "messages": HELLO, "max_tokens": 3, **more}
        return fetch(f"{URL}/v1/chat/completions", key_file=f"{KEYS}/{key}", body=body)

    return ask


@pytest.fixture
def pids(host: Host) -> Callable[[], list[str]]:
    return lambda: [host.check_output("systemctl show --property=MainPID --value %s", name) for name in UNITS]


def play(*arguments: str) -> str:
    """ansible-playbook on this scenario's host, from this scenario's folder."""
    command = ["ansible-playbook", "-i", "molecule/inventory", "-e", "molecule_scenario=gateway", *arguments]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (true := what()) and time.monotonic() < end:
        time.sleep(0.2)
    return true


def test_models_are_listed(fetch: Fetch) -> None:
    answer = fetch(f"{URL}/v1/models", key_file=f"{KEYS}/user")
    assert answer.status == 200, answer.body
    assert {"fake-model", "nobody-there"} <= {model["id"] for model in answer.json()["data"]}


def test_a_completion(chat: Fetch) -> None:
    answer = chat()
    assert answer.status == 200, answer.body
    assert answer.json()["choices"][0]["message"]["content"] == "word word word"


def test_an_alias_is_the_model(chat: Fetch) -> None:
    assert chat("fake").status == 200


def test_a_stream(chat: Fetch) -> None:
    answer = chat(stream=True)
    assert answer.status == 200, answer.body
    assert answer.body.count('"content"') == 3
    assert answer.body.endswith("data: [DONE]\n\n")


def test_a_model_without_engine_is_503(chat: Fetch) -> None:
    answer = chat("nobody-there")
    assert answer.status == 503, answer.body
    assert "Retry-After" in {name.title() for name in answer.headers}


def test_an_unknown_model_is_404(chat: Fetch) -> None:
    assert chat("no-such-model").status == 404


def test_a_key_reaches_its_own_models_only(chat: Fetch) -> None:
    assert chat(key="narrow").status in {403, 404}


@pytest.mark.parametrize("key", ["metrics", "admin"])
def test_a_key_without_the_scope_generates_nothing(chat: Fetch, key: str) -> None:
    assert chat(key=key).status == 403


def test_a_tier_s_limit_holds_over_all_workers(chat: Fetch) -> None:
    """Three requests a minute, wherever they arrive; then when to come back, and nobody else is in the way."""
    answers = [chat(key="tiny") for _ in range(6)]
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 3, [answer.body for answer in answers]
    told = {name.lower(): value for name, value in answers[-1].headers.items()}
    assert 0 < int(told["retry-after"]) <= 60
    assert answers[-1].json()["error"]["code"]
    assert chat().status == 200


def test_the_first_administrator_makes_and_revokes_a_key(host: Host, fetch: Fetch, chat: Fetch) -> None:
    command = "/opt/citadel/gateway-env/bin/citadel-gateway keys"
    made = "create --user somebody --new-user --id made-by-the-test --key-file /etc/citadel-gateway/admin.key"
    host.check_output(f"umask 077; {command} {made} > /root/keys/made")
    assert eventually(lambda: chat(key="made").status == 200, 2)
    host.check_output(f"{command} revoke made-by-the-test")
    assert eventually(lambda: chat(key="made").status == 401, 2)


def test_each_request_is_in_the_ledger_once(host: Host, chat: Fetch) -> None:
    ledger = "/opt/citadel/gateway-env/bin/citadel-gateway ledger check"
    assert chat().status == 200
    assert eventually(lambda: host.run(ledger).rc == 0, 10), host.run(ledger).stdout


def test_a_body_above_the_limit_is_413(chat: Fetch) -> None:
    assert chat(padding="x" * 100_000).status == 413


def test_metrics_are_for_the_scrape_key(fetch: Fetch) -> None:
    assert fetch(f"{URL}/metrics", key_file=f"{KEYS}/user").status == 403
    answer = fetch(f"{URL}/metrics", key_file=f"{KEYS}/metrics")
    assert answer.status == 200, answer.body
    assert "llm_gateway_requests_total" in answer.body


def test_a_page_of_an_allowed_origin_may_ask(fetch: Fetch) -> None:
    for origin, allowed in (("http://localhost:3000", True), ("https://elsewhere.example.org", False)):
        answer = fetch(f"{URL}/v1/models", key_file=f"{KEYS}/user", headers={"Origin": origin})
        headers = {name.lower(): value for name, value in answer.headers.items()}
        assert (headers.get("access-control-allow-origin") in {origin, "*"}) == allowed


def test_no_prompt_is_in_a_log(host: Host) -> None:
    time.sleep(1.5)
    assert host.run("grep --quiet fake-model /var/log/citadel-gateway/access.jsonl").rc == 0
    assert host.run("grep --recursive 'nobody may find' /var/log/citadel-gateway").rc == 1
    assert "nobody may find" not in host.check_output("journalctl --no-pager --unit='citadel-gateway*'")


def test_a_rotated_log_is_written_anew(host: Host, chat: Fetch) -> None:
    log = "/var/log/citadel-gateway/access.jsonl"
    before = [host.check_output("systemctl show --property=MainPID --value %s", name) for name in UNITS]
    host.check_output("logrotate --force /etc/logrotate.d/citadel-gateway")
    assert chat().status == 200
    assert eventually(lambda: bool(host.file(log).size))
    assert [host.check_output("systemctl show --property=MainPID --value %s", name) for name in UNITS] == before


def test_an_engine_drains_and_resumes_its_model(host: Host, chat: Fetch) -> None:
    def say(word: str) -> str:
        ask = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect('/run/citadel-gateway/control.sock')\n"
            "key = open('/etc/citadel-llm/keys/engine').read().strip()\n"
            "s.sendall(f'POST /internal/models/fake-model/{sys.argv[1]} HTTP/1.1\\r\\nHost: g\\r\\n"
            "Content-Length: 0\\r\\nAuthorization: Bearer {key}\\r\\nConnection: close\\r\\n\\r\\n'.encode())\n"
            "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
        )
        return str(host.check_output("python3 -c %s %s", ask, word))

    assert " 200 " in say("drain").splitlines()[0]
    try:
        assert eventually(lambda: chat().status == 503)
    finally:
        assert " 200 " in say("resume").splitlines()[0]
    assert eventually(lambda: chat().status == 200)


def test_an_operator_drains_and_resumes_a_model(chat: Fetch) -> None:
    play("playbooks/ops/drain_model.yml", "-e", "target_hosts=gateway", "-e", "model=fake-model")
    try:
        assert eventually(lambda: chat().status == 503)
    finally:
        play("playbooks/ops/resume_model.yml", "-e", "target_hosts=gateway", "-e", "model=fake-model")
    assert eventually(lambda: chat().status == 200)


def test_another_model_restarts_nothing(chat: Fetch, pids: Callable[[], list[str]], host: Host) -> None:
    before = pids()
    deployed = host.file("/etc/citadel-gateway/models.json").content_string
    try:
        play("molecule/gateway/add_model.yml")
        assert chat("later-model").status == 200
    finally:
        write(host, "/etc/citadel-gateway/models.json", deployed)
    assert eventually(lambda: chat("later-model").status == 404)
    assert pids() == before


def test_another_key_restarts_nothing(chat: Fetch, pids: Callable[[], list[str]], host: Host) -> None:
    before = pids()
    path = "/etc/citadel-gateway/keys.json"
    deployed = host.file(path).content_string
    keys = json.loads(deployed)
    hashed = host.check_output('printf %s "$(cat /root/keys/later)" | sha256sum').split()[0]
    keys["keys"].append({"id": "later", "sha256": hashed})
    assert chat(key="later").status == 401
    try:
        write(host, path, json.dumps(keys))
        assert eventually(lambda: chat(key="later").status == 200)
    finally:
        write(host, path, deployed)
    assert eventually(lambda: chat(key="later").status == 401)
    assert pids() == before


def write(host: Host, path: str, text: str) -> None:
    """Replace a file's content as Ansible does: a new file, renamed over the old one."""
    host.check_output(
        "cp --preserve=all %s %s.new && printf %%s %s > %s.new && mv %s.new %s", path, path, text, *[path] * 3
    )


def streams(host: Host, count: int, words: int, seconds: float) -> dict[str, Any]:
    told = host.check_output(f"streams.py {URL} {KEYS}/user {MODEL} {count} {words} {seconds}")
    return dict(json.loads(told))


def test_a_rolling_restart_cuts_no_stream_and_refuses_nobody(host: Host, pids: Callable[[], list[str]]) -> None:
    """Fifty streams of eight seconds are open while both workers and the control process restart, one after another."""
    before = pids()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(streams, host, 50, 160, 20)
        time.sleep(3)
        play("playbooks/ops/gateway_restart.yml", "-e", "target_hosts=gateway")
        took = asked.result()
    assert (took["whole"], took["cut"], took["refused"]) == (50, 0, 0), took
    assert took["answered"] > 100
    assert not set(before) & set(pids())


def test_a_killed_worker_comes_back_and_the_others_serve(host: Host, chat: Fetch) -> None:
    old = host.check_output("systemctl show --property=MainPID --value citadel-gateway@1.service")
    host.check_output("kill -KILL %s", old)
    assert all(chat().status == 200 for _ in range(5))
    active = "systemctl is-active citadel-gateway@1.service"
    assert eventually(lambda: host.run(active).stdout.strip() == "active", 15)
    assert host.check_output("systemctl is-active citadel-gateway.socket") == "active"


def test_workers_serve_without_the_control_process(host: Host, chat: Fetch) -> None:
    host.check_output("systemctl stop citadel-gateway-control.service")
    try:
        assert chat().status == 200
    finally:
        host.check_output("systemctl start citadel-gateway-control.service")


def test_a_frozen_worker_is_noticed(host: Host) -> None:
    old = host.check_output("systemctl show --property=MainPID --value citadel-gateway@2.service")
    host.check_output("kill -STOP %s", old)

    def back() -> bool:
        shown = host.check_output("systemctl show --property=MainPID,ActiveState citadel-gateway@2.service")
        return "ActiveState=active" in shown and f"MainPID={old}" not in shown.splitlines()

    assert eventually(back, 60), host.run("systemctl status citadel-gateway@2.service").stdout
