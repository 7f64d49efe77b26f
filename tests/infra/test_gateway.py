"""The gateway of a host: its units, who they are, what they answer without a key, as its own files say."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import pytest
from testinfra.host import Host

Json = dict[str, Any]
SECURITY = 1.5  # exposure that systemd-analyze security may report at most


@dataclass(frozen=True)
class Answer:
    status: int
    body: str
    headers: dict[str, str]


@pytest.fixture
def settings_file(host: Host) -> str:
    """Where the control process has its settings from."""
    command = host.check_output("systemctl show --property=ExecStart --value citadel-gateway-control.service")
    found = re.search(r"--config (\S+)", command)
    assert found, f"citadel-gateway-control.service is not there, or has no --config: {command!r}"
    return found[1]


@pytest.fixture
def settings(read_json: Callable[[str], Json], settings_file: str) -> Json:
    return read_json(settings_file)


@pytest.fixture
def units(settings: Json) -> list[str]:
    """The services, workers first."""
    workers = [f"citadel-gateway@{number}.service" for number in range(1, settings["workers"] + 1)]
    return [*workers, "citadel-gateway-control.service"]


@pytest.fixture
def engine_key_file(host: Host) -> str:
    """Where systemd reads the engines' key (`systemctl show` of systemd 252 cannot print it)."""
    text = host.check_output("systemctl cat citadel-gateway-control.service")
    found = re.search(r"^LoadCredential=engine-key:(\S+)$", text, re.MULTILINE)
    assert found, "the control process gets no engine key"
    return found[1]


@pytest.fixture
def url(settings: Json) -> str:
    address = settings["listen"]["address"]
    return f"http://{'127.0.0.1' if ip_address(address).is_unspecified else address}:{settings['listen']['port']}"


@pytest.fixture
def control(host: Host, settings: Json) -> Callable[[str], Answer]:
    """What the control process answers over its own socket, to somebody who may read the gateway's state folder."""
    ask = (
        "import http.client, json, socket, sys\n"
        "way, key, path = sys.argv[1:]\n"
        "c = http.client.HTTPConnection('gateway', timeout=30)\n"
        "c.sock = socket.socket(socket.AF_UNIX); c.sock.settimeout(30); c.sock.connect(way)\n"
        "c.request('GET', path, headers={'Authorization': 'Bearer ' + open(key).read().strip()})\n"
        "r = c.getresponse()\n"
        "print(json.dumps({'status': r.status, 'body': r.read().decode(), 'headers': dict(r.headers)}))"
    )
    key = settings["state_dir"] + "/local-key"

    def get(path: str) -> Answer:
        return Answer(
            **json.loads(host.check_output("python3 -c %s %s %s %s", ask, settings["control_socket"], key, path))
        )

    return get


@pytest.fixture
def page(control: Callable[[str], Answer]) -> str:
    """The metrics of all workers of the host."""
    answer = control("/metrics")
    assert answer.status == 200, answer.body
    return answer.body


def test_every_unit_is_up(unit: Callable[[str], Any], units: list[str]) -> None:
    """Socket, workers and control process of the gateway are up."""
    for name in ["citadel-gateway.socket", *units]:
        unit(name).assert_active()


def test_it_comes_back_after_a_reboot(unit: Callable[[str], Any], units: list[str]) -> None:
    """The gateway is started at boot."""
    target = unit("citadel-gateway.target")
    target.assert_enabled()
    shown = target.show("ActiveState", "Wants")
    assert shown["ActiveState"] == "active"
    assert {"citadel-gateway.socket", *units} <= set(shown["Wants"].split())


def test_no_worker_is_left_over(host: Host, units: list[str]) -> None:
    """There are as many workers as the settings say."""
    listed = host.check_output("systemctl list-units --plain --no-legend --state=active 'citadel-gateway@*.service'")
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(units[:-1])


def test_every_process_is_the_gateway_s_own_user(host: Host, unit: Callable[[str], Any], units: list[str]) -> None:
    """No process of the gateway is root's, nor the engines'."""
    for name in units:
        shown = unit(name).show("User", "MainPID")
        assert shown["User"] not in {"", "root"}, name
        owner = host.check_output("stat --format=%%U /proc/%s", shown["MainPID"])
        assert owner == shown["User"], f"{name} runs as {owner}"


def test_units_are_hardened(host: Host, units: list[str]) -> None:
    """systemd-analyze security gives each unit of the gateway 1.5 or better."""
    for name in units:
        told = host.run("systemd-analyze security --no-pager %s", name).stdout
        found = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
        assert found, told
        assert float(found[1]) <= SECURITY, f"{name}: {found[1]}"


def test_limits_are_in_effect(unit: Callable[[str], Any], units: list[str], settings: Json) -> None:
    """Workers have a memory limit, and time to end their streams when they stop."""
    for name in units:
        assert unit(name).show("MemoryMax")["MemoryMax"] != "infinity", name
    for name in units[:-1]:
        stop = unit(name).show("TimeoutStopUSec")["TimeoutStopUSec"]
        amounts = re.findall(r"([\d.]+)(h|min|s)\b", stop)
        seconds = sum(float(amount) * {"h": 3600, "min": 60, "s": 1}[measure] for amount, measure in amounts)
        assert seconds > settings["timeouts"]["drain"], f"{name} is killed after {stop}"


def test_it_outweighs_the_models(unit: Callable[[str], Any], units: list[str]) -> None:
    """All processes are in a slice beside that of the engines, which has systemd's weight of 100."""
    assert {name: unit(name).show("Slice")["Slice"] for name in units} == dict.fromkeys(units, "citadel-gateway.slice")
    assert int(unit("citadel-gateway.slice").show("CPUWeight")["CPUWeight"]) > 100


def test_it_runs_from_a_release(host: Host, unit: Callable[[str], Any], units: list[str]) -> None:
    """All processes of the gateway run from one release, not from a link that may be switched below them."""
    releases = set()
    for name in units:
        found = re.search(r"path=(\S+)/bin/citadel-gateway", unit(name).show("ExecStart")["ExecStart"])
        assert found, name
        releases.add(found[1])
    assert len(releases) == 1, releases
    release = releases.pop()
    assert host.check_output("readlink --canonicalize %s", release) == release


def test_the_settings_are_good(host: Host, unit: Callable[[str], Any], settings_file: str) -> None:
    """The gateway's own check of its three files finds nothing."""
    found = re.search(r"path=(\S+)", unit("citadel-gateway-control.service").show("ExecStart")["ExecStart"])
    assert found
    checked = host.run("%s check-config --config %s", found[1], settings_file)
    assert checked.rc == 0, checked.stdout + checked.stderr


def test_healthz_answers_without_a_key(fetch: Callable[..., Any], url: str) -> None:
    """The gateway says that it lives, to anybody."""
    answer = fetch(f"{url}/healthz")
    assert answer.status == 200, answer.body


@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_nothing_is_told_without_a_key(fetch: Callable[..., Any], url: str, path: str) -> None:
    """Without a key the gateway answers 401."""
    answer = fetch(url + path)
    assert answer.status == 401, answer.body


def test_a_wrong_key_is_refused_in_openai_s_words(fetch: Callable[..., Any], url: str) -> None:
    """A wrong key gets 401 and an error as OpenAI's clients expect it."""
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
    answer = fetch(f"{url}/v1/chat/completions", body=body, headers={"Authorization": "Bearer wrong"})
    assert answer.status == 401, answer.body
    assert answer.json()["error"]["message"]
    assert "type" in answer.json()["error"]


def test_every_model_and_key_is_in_use(read_json: Callable[[str], Json], settings: Json) -> None:
    """The workers serve from the models and keys that were deployed."""
    served = read_json(f"{settings['run_dir']}/snapshot.json")

    def backends(models: list[Json]) -> dict[str, set[tuple[str, int]]]:
        return {model["name"]: {(one["host"], one["port"]) for one in model["backends"]} for model in models}

    assert backends(served["models"]) == backends(read_json(settings["models_file"])["models"])
    assert {key["id"] for key in read_json(settings["keys_file"])["keys"]} <= {key["id"] for key in served["keys"]}


def test_limits_are_counted_in_the_store(page: str, settings: Json) -> None:
    """Every worker reaches the store of limits."""
    if not settings["redis"]["url"]:
        pytest.skip("limits are counted in memory")
    up = re.findall(r"^llm_gateway_limit_store_up(?:\{[^}]*\})? (\S+)$", page, re.MULTILINE)
    assert up, "no worker says whether it reaches the store"
    assert {float(value) for value in up} == {1.0}


def test_nothing_of_the_journal_was_lost(page: str) -> None:
    """No request is missing in the journal from which the ledger is written."""
    lost = re.findall(r"^llm_gateway_journal_lost_total(?:\{[^}]*\})? (\S+)$", page, re.MULTILINE)
    assert sum(map(float, lost)) == 0


def test_the_database_answers(control: Callable[[str], Answer]) -> None:
    """Users, keys and ledger are in a database that answers."""
    assert control("/admin/users").status == 200
    ledger = control("/admin/ledger")
    assert ledger.status == 200, ledger.body


def test_the_first_administrator_s_key_is_root_s(host: Host, settings_file: str) -> None:
    """The first key of an administrator is in a file of root's alone."""
    path = settings_file.rsplit("/", 1)[0] + "/admin.key"
    if not host.file(path).exists:
        pytest.skip("none is kept beside the settings")
    assert (host.file(path).user, host.file(path).mode) == ("root", 0o600)


def test_secrets_are_closed(host: Host, unit: Callable[[str], Any], settings: Json, engine_key_file: str) -> None:
    """Hashes, snapshot and the engines' key can be read by nobody else."""
    group = unit("citadel-gateway-control.service").show("Group")["Group"]
    secret = [settings["keys_file"], f"{settings['run_dir']}/snapshot.json", settings["state_dir"] + "/local-key"]
    secret += [path for path in (settings["redis"]["password_file"], settings["database"]["password_file"]) if path]
    for path in secret:
        file = host.file(path)
        assert file.mode & 0o007 == 0, f"{path} is {oct(file.mode)}"
        assert file.group == group, path
    key = host.file(engine_key_file)
    assert (key.user, key.mode) == ("root", 0o600), key.path


def test_no_key_is_on_a_command_line(
    host: Host, unit: Callable[[str], Any], units: list[str], engine_key_file: str
) -> None:
    """The engines' key is in no process' arguments or environment."""
    secret = host.file(engine_key_file).content_string.strip()
    for name in units:
        pid = unit(name).show("MainPID")["MainPID"]
        for what in ("cmdline", "environ"):
            assert secret not in host.file(f"/proc/{pid}/{what}").content_string, f"{name}: {what}"


def test_drain_is_refused_without_the_engines_key(host: Host, settings: Json) -> None:
    """Anybody may connect to the control socket, and is refused there without a key."""
    path = settings["control_socket"]
    assert host.file(path).mode == 0o666
    ask = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "s.sendall(b'POST /internal/models/any/drain HTTP/1.1\\r\\nHost: gateway\\r\\nContent-Length: 0\\r\\n"
        "Authorization: Bearer wrong\\r\\nConnection: close\\r\\n\\r\\n')\n"
        "print(s.recv(65536).split(b' ')[1].decode())"
    )
    assert host.check_output("runuser --user nobody -- python3 -c %s %s", ask, path) == "401"


def test_the_access_log_says_who_and_what_but_not_the_prompt(host: Host, settings: Json) -> None:
    """Each line of the access log is JSON without any prompt."""
    path = settings["access_log"]
    if path == "-":
        pytest.skip("the access log goes to the journal")
    if not host.file(path).exists or not host.file(path).size:
        pytest.skip("no request has been logged yet")
    lines = host.check_output("tail --lines=50 %s", path).splitlines()
    for line in lines:
        entry = json.loads(line)
        assert {"ts", "request_id", "key", "model", "path", "status", "outcome"} <= set(entry)
        assert not {"messages", "prompt", "content", "authorization"} & set(entry)


def test_the_access_log_is_rotated(host: Host, settings: Json) -> None:
    """logrotate knows the access log and has nothing to complain of."""
    if settings["access_log"] == "-":
        pytest.skip("the access log goes to the journal")
    checked = host.run("logrotate --debug /etc/logrotate.d/citadel-gateway")
    assert checked.rc == 0, checked.stderr
    assert settings["access_log"].rsplit("/", 1)[0] in host.file("/etc/logrotate.d/citadel-gateway").content_string
