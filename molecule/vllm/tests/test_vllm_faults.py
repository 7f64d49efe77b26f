"""What a model survives, and what it refuses. These tests disturb the host of this scenario; tests/infra only looks."""

import json
import time
from collections.abc import Callable, Iterator

import pytest
from testinfra.host import Host

NAME = "hermes-2"
UNIT = f"citadel-llm@{NAME}.service"
URL = "http://127.0.0.1:11401"
KEY = "/etc/citadel-llm/keys/engine"


def processes(host: Host) -> dict[int, str]:
    """The processes of the unit's user that belong to vLLM or its engine, by pid."""
    lines = host.run("ps -u agent0 -o pid=,args=").stdout.splitlines()
    return {int(line.split()[0]): line.split(maxsplit=1)[1] for line in lines}


def pid_of(host: Host, words: str) -> int:
    return next(pid for pid, command in processes(host).items() if words in command)


def show(host: Host, name: str, unit: str = UNIT) -> str:
    return str(host.check_output("systemctl show --value --property=%s %s", name, unit))


def wait_until_back(host: Host, old: int, patience: float = 240) -> None:
    """Until another main process is ready."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        state = host.check_output("systemctl show --value --property=ActiveState --property=MainPID %s", UNIT).split()
        if "active" in state and not {"0", str(old)} & set(state):
            return
        time.sleep(1)
    pytest.fail(f"{UNIT} did not come back:\n{host.run('journalctl --no-pager -n 40 -u ' + UNIT).stdout}")


def generates(host: Host) -> bool:
    answer = json.loads(host.run(f"/opt/citadel/bin/citadel-engine ask --as citadel-gateway {NAME}").stdout)
    return bool(answer[NAME]["status"] == 200)


# On the host, as the gateway's user: 32 long answers at once. Prints the statuses.
FLOOD = """
import http.client, json, os, pwd, sys
from concurrent.futures import ThreadPoolExecutor
key = open(sys.argv[2]).read().strip()
who = pwd.getpwnam("citadel-gateway"); os.setgid(who.pw_gid); os.setuid(who.pw_uid)
body = json.dumps({"model": sys.argv[1], "prompt": "tell me", "max_tokens": 1500, "ignore_eos": True})
def ask(_):
    c = http.client.HTTPConnection("127.0.0.1", 11401, timeout=300)
    c.request("POST", "/v1/completions", body, {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
    response = c.getresponse()
    response.read()
    return response.status
with ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(ask, range(32)))))
"""


def test_a_full_engine_is_not_restarted(host: Host) -> None:
    main = show(host, "MainPID")
    # Four are computed, eight may wait, the others are sent away: among them, at times, the canary.
    statuses = json.loads(host.check_output("python3 -c %s %s %s", FLOOD, NAME, KEY))
    assert set(statuses) == {200, 503}, "a full queue says 503"
    assert (show(host, "MainPID"), show(host, "ActiveState")) == (main, "active")


def test_a_killed_server_brings_the_unit_back_without_the_old_processes(host: Host) -> None:
    """vLLM's engine and worker survive their server and hold all memory; the other victims are killed in tests/e2e."""
    main, before = int(show(host, "MainPID")), set(processes(host))
    host.check_output("kill -9 %s", str(pid_of(host, "api_server")))
    wait_until_back(host, main)
    assert set(processes(host)) & before == set()
    assert generates(host)


def test_a_frozen_worker_is_found_and_restarted(host: Host) -> None:
    main, before = int(show(host, "MainPID")), set(processes(host))
    begin = time.monotonic()
    host.check_output("kill -STOP %s", str(pid_of(host, "VLLM::Worker")))
    while show(host, "MainPID") == str(main):
        assert time.monotonic() - begin < 60, "nobody noticed"
        time.sleep(0.5)
    wait_until_back(host, main)
    assert set(processes(host)) & before == set()
    assert "nothing moved" in host.check_output("journalctl --no-pager --unit=%s", UNIT)


# --- refusals: an instance of its own with the files of the real one, broken in one place ---


@pytest.fixture
def broken(host: Host) -> Iterator[Callable[[str], str]]:
    """Run a command, start the instance, get the line with which it refused; it must not have been tried again."""
    models, folders = "/etc/citadel-llm/models", "/var/log/citadel-llm/engines/broken /var/cache/citadel-llm/broken"
    weights = host.check_output(f"sed -n 's/^model: \"\\(.*\\)\"/\\1/p' {models}/{NAME}.yaml")
    host.check_output(
        f"install -d -o agent0 -g agent0 {folders} && cp -a {weights} /opt/models/broken && "
        f"sed 's#{weights}#/opt/models/broken#; s/11401/11499/' {models}/{NAME}.yaml > {models}/broken.yaml && "
        f"sed 's#{weights}#/opt/models/broken#' {models}/{NAME}.env > {models}/broken.env"
    )

    def start(command: str) -> str:
        host.check_output(command)
        assert host.run("systemctl start citadel-llm@broken.service").rc != 0
        unit = "citadel-llm@broken.service"
        shown = [show(host, name, unit) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]
        assert shown == ["failed", "78", "0"]
        return show(host, "StatusText", unit)

    yield start
    host.check_output(
        f"systemctl reset-failed citadel-llm@broken.service; rm -rf {folders} {models}/broken.* /opt/models/broken"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("truncate -s -1 /opt/models/broken/model.safetensors", "its manifest says"),
        ("rm /opt/models/broken/tokenizer.json", "tokenizer.json of the manifest is not there"),
        ("chown root /opt/models/broken/config.json; chmod 0600 /opt/models/broken/config.json", "cannot read"),
        (
            "sed -i 's/^port: .*/port: 11401/' /etc/citadel-llm/models/broken.yaml",
            "port 11401 is taken by a process of user agent0",
        ),
        ("echo 'max-num-sequences: 4' >> /etc/citadel-llm/models/broken.yaml", "has no setting max-num-sequences"),
        ("sed -i 's/bf16/fp8-block/' /etc/citadel-llm/models/broken.env", "fp8-block need a processor with"),
        ("sed -i 's#^CITADEL_ENV=.*#CITADEL_ENV=/opt/none#' /etc/citadel-llm/models/broken.env", "no vLLM environment"),
    ],
    ids=["truncated", "missing", "unreadable", "port", "setting", "processor", "environment"],
)
def test_a_start_that_cannot_end_well_is_refused(broken: Callable[[str], str], command: str, words: str) -> None:
    said = broken(command)
    assert said.startswith("refused: ")
    assert words in said


def test_a_flipped_bit_is_found_on_demand(host: Host, broken: Callable[[str], str]) -> None:
    host.check_output("printf '\\377' | dd of=/opt/models/broken/model.safetensors bs=1 seek=70000 conv=notrunc")
    same_size = host.run("/opt/citadel/bin/citadel-engine check broken --as agent0")
    flipped = host.run("/opt/citadel/bin/citadel-engine check broken --as agent0 --hashes")
    assert (same_size.rc, flipped.rc) == (0, 78)
    assert "sha256" in flipped.stderr


def test_stopping_says_so_and_leaves_nothing_behind(host: Host) -> None:
    """Last, because it ends the model."""
    host.check_output("systemctl stop %s", UNIT)
    assert show(host, "Result") == "success"
    assert [command for command in processes(host).values() if "vllm" in command.lower()] == []
