"""Exporters: up, behind a password, small, and what they say of units is what systemd knows.

The password is on no host, only its hash: what is behind it is read here where it lies (the text file, loopback).
"""

import base64
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

PARTS = {
    "node": ["citadel-unit-metrics.service", "prometheus-node-exporter.service"],
    "redis": ["prometheus-redis-exporter.service", "citadel-exporter-front.service"],
    "postgres": ["prometheus-postgres-exporter.service"],
}
FRONT = "citadel-exporter-front.service"
UNITS = [unit for units in PARTS.values() for unit in units]

# Sent to the host's own Python: CPU nanoseconds of each unit by all trees of control groups that there are.
_TRUTH = """
import json, pathlib, sys
told = {}
for name, group in json.loads(sys.argv[1]).items():
    for tree, file in (("", "cpu.stat"), ("unified", "cpu.stat"), ("cpuacct", "cpuacct.usage")):
        path = pathlib.Path("/sys/fs/cgroup", tree, group.lstrip("/"), file)
        if group and path.exists():
            words = path.read_text().split()
            told.setdefault(name, []).append(int(words[1]) / 1e6 if file == "cpu.stat" else int(words[0]) / 1e9)
print(json.dumps(told))
"""


@pytest.fixture
def deployed(host: Host) -> dict[str, str]:
    """Units of the exporters that are on this host -> what they execute."""
    found = {}
    for part, units in PARTS.items():
        if host.file(f"/etc/systemd/system/prometheus-{part}-exporter.service.d/citadel.conf").exists:
            for name in units:
                found[name] = host.check_output("systemctl show --property=ExecStart --value %s", name)
    if not found:
        pytest.skip("no exporter of ours is on this host")
    return found


def need(deployed: dict[str, str], name: str) -> str:
    if name not in deployed:
        pytest.skip(f"{name} is not on this host")
    return deployed[name]


def address_of(name: str, host: Host, deployed: dict[str, str]) -> str:
    """ADDRESS:PORT at which an exporter is to be read."""
    command = need(deployed, name)
    if name == FRONT:
        path = re.search(r"front.conf:(\S+)", host.file(f"/etc/systemd/system/{FRONT}").content_string)
        assert path
        found = re.search(r"listen (\S+);", host.file(path[1]).content_string)
    else:
        found = re.search(r"--web\.listen-address=(\S+)", command)
    assert found, command
    return found[1]


# Arguments and environment of every process, as text.
PROCESSES = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr --complement --delete '[:print:]'"
READABLE = ["prometheus-node-exporter.service", FRONT, "prometheus-postgres-exporter.service"]


@pytest.mark.parametrize("name", UNITS)
def test_it_is_up_and_comes_back(deployed: dict[str, str], unit: Callable[[str], Any], name: str) -> None:
    """The exporter is up, and started at boot."""
    need(deployed, name)
    unit(name).assert_active()
    unit(name).assert_enabled()


@pytest.mark.parametrize("name", READABLE)
def test_it_listens_where_it_should_and_nowhere_else(host: Host, deployed: dict[str, str], name: str) -> None:
    """The exporter listens at its address and at no other."""
    address, port = address_of(name, host, deployed).rsplit(":", 1)
    lines = host.check_output("ss --no-header --listening --tcp --numeric 'sport = :%s'", port).splitlines()
    assert {line.split()[3].rsplit(":", 1)[0] for line in lines} == {address}


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize(
    ("path", "who"),
    [("/metrics", ""), ("/metrics", "citadel:wrong"), ("/metrics", "nobody:"), ("/", ""), ("/scrape?target=x:1", "")],
)
def test_nothing_is_told_without_the_password(
    host: Host, deployed: dict[str, str], fetch: Callable[..., Any], name: str, path: str, who: str
) -> None:
    """Without the password, with a wrong one or as somebody else, the answer is 401 and no figure."""
    where = re.sub(r"^(0\.){3}0:", "127.0.0.1:", address_of(name, host, deployed))
    headers = {"Authorization": "Basic " + base64.b64encode(who.encode()).decode()} if who else {}
    answer = fetch(f"http://{where}{path}", headers=headers)
    assert answer.status == 401, answer
    assert not re.search(r"^\w+ [\d.]", answer.body, re.MULTILINE)


def test_the_exporter_without_a_password_is_on_loopback(
    host: Host, deployed: dict[str, str], fetch: Callable[..., Any]
) -> None:
    """The exporter of Redis listens on loopback alone, and reads the store."""
    found = re.search(r"-web\.listen-address=(\S+)", need(deployed, "prometheus-redis-exporter.service"))
    assert found
    address, port = found[1].rsplit(":", 1)
    lines = host.check_output("ss --no-header --listening --tcp --numeric 'sport = :%s'", port).splitlines()
    assert {line.split()[3].rsplit(":", 1)[0] for line in lines} == {address} == {"127.0.0.1"}
    assert "\nredis_up 1\n" in fetch(f"http://{found[1]}/metrics").body


def test_secrets_are_closed(host: Host, deployed: dict[str, str]) -> None:
    """The hash of the password is bcrypt, root's to read, and on no command line."""
    text = host.check_output("systemctl cat %s", next(name for name in READABLE if name in deployed))
    path = re.search(r"LoadCredential=(?:web.yml|htpasswd):(\S+)", text)
    assert path
    folder = path[1].rsplit("/", 1)[0]
    assert (host.file(folder).user, host.file(folder).mode) == ("root", 0o700)
    hashes = set()
    for name in ("web.yml", "htpasswd"):
        file = host.file(f"{folder}/{name}")
        assert (file.user, file.mode) == ("root", 0o600)
        hashes |= set(re.findall(r"\$2[aby]\$1\d\$[./A-Za-z0-9]{53}", file.content_string))
    assert len(hashes) == 1
    assert hashes.pop() not in host.check_output(PROCESSES)


@pytest.mark.parametrize("name", UNITS)
def test_it_may_do_little(host: Host, deployed: dict[str, str], unit: Callable[[str], Any], name: str) -> None:
    """The unit is hardened, bounded in memory, and systemd took every line of it."""
    need(deployed, name)
    told = host.check_output("systemd-analyze security --no-pager %s", name)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert found, told
    assert float(found[1]) <= 2, told
    state = unit(name).show("MemoryMax", "NoNewPrivileges", "ProtectSystem", "SystemCallErrorNumber", "User")
    assert state["MemoryMax"].isdigit()
    assert (state["NoNewPrivileges"], state["ProtectSystem"]) == ("yes", "strict")
    assert state["User"] not in {"", "root"}
    assert host.run("systemd-analyze verify /etc/systemd/system/%s", name).stderr.count("Failed to parse") == 0


def samples(host: Host, deployed: dict[str, str]) -> dict[tuple[str, str], float]:
    """(metric, unit) -> value, of the text file that node exporter serves."""
    command = need(deployed, "citadel-unit-metrics.service")
    found = re.search(r"citadel-unit-metrics (\S+\.prom)", command)
    assert found, command
    text = host.file(found[1]).content_string
    lines = re.findall(r'^(citadel_unit_\w+)(?:\{unit="([^"]+)".*\})? (\S+)$', text, re.MULTILINE)
    return {(name, name_of): float(value) for name, name_of, value in lines}


def test_units_are_measured(host: Host, deployed: dict[str, str]) -> None:
    """systemd answers the collector, and node exporter's folder has its file."""
    told = samples(host, deployed)
    assert told["citadel_unit_collector_success", ""] == 1
    assert told["citadel_unit_collector_left_out", ""] == 0
    found = re.search(r"--collector\.textfile\.directory=(\S+)", deployed["prometheus-node-exporter.service"])
    assert found
    file = host.file(f"{found[1]}/citadel-units.prom")
    assert host.file(file.linked_to).exists
    age = int(host.check_output("date +%s")) - int(host.check_output("stat --dereference --format=%%Y %s", file.path))
    assert age < 90, f"{file.linked_to} is {age} s old"


def test_what_is_said_of_units_is_so(host: Host, deployed: dict[str, str]) -> None:
    """CPU of a unit is not more than its control group says a moment later; one that is up has memory and tasks."""
    told = samples(host, deployed)
    names = sorted(name for metric, name in told if metric == "citadel_unit_active")
    if not names:
        pytest.skip("none of the units is loaded on this host")
    shown = host.check_output(f"systemctl show --property=Id,ControlGroup,ActiveState {shlex.join(names)}")
    units = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.split("\n\n")]
    groups = {unit["Id"]: unit["ControlGroup"] for unit in units}
    now: dict[str, list[float]] = json.loads(host.check_output("/usr/bin/python3 -c %s %s", _TRUTH, json.dumps(groups)))
    for unit in units:
        if unit["ActiveState"] != "active" or unit["Id"] not in now:
            continue
        assert told["citadel_unit_cpu_seconds_total", unit["Id"]] <= max(now[unit["Id"]]) + 0.01, unit["Id"]
        assert told["citadel_unit_memory_bytes", unit["Id"]] > 0
        assert told["citadel_unit_tasks", unit["Id"]] >= 1
