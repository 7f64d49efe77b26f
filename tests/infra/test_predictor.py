"""The predictor: who it is, how little it may do, and that each target has a forecast or says why not."""

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "citadel-predictor.service"
SECURITY = 1.5  # exposure that systemd-analyze security may report at most
MEMORY = 300e6  # bytes that it may have in use
PATIENCE = 90  # seconds for the first cycle of one that has just been started
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)

Sample = tuple[str, dict[str, str], float]


@pytest.fixture
def command(host: Host) -> list[str]:
    """What systemd starts. A host whose predictor is elsewhere has none."""
    found = re.search(
        r"argv\[\]=(\S+/citadel-predictor serve [^;]+)", host.run(f"systemctl show --property=ExecStart {UNIT}").stdout
    )
    if not found:
        pytest.skip("the predictor is on another host")
    return found[1].split()


@pytest.fixture
def settings(read_json: Callable[[str], Any], command: list[str]) -> dict[str, Any]:
    return dict(read_json(command[command.index("--config") + 1]))


@pytest.fixture
def url(settings: dict[str, Any]) -> str:
    listen = settings["listen"]
    return f"http://{'127.0.0.1' if listen['host'] == '0.0.0.0' else listen['host']}:{listen['port']}"  # noqa: S104  compared, not bound


def samples(text: str) -> list[Sample]:
    return [
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        for name, labels, value in SAMPLE.findall(text)
    ]


@pytest.fixture
def metrics(fetch: Callable[..., Any], url: str) -> list[Sample]:
    """What it shows, once a cycle is over."""
    end = time.monotonic() + PATIENCE
    while True:
        found = samples(fetch(f"{url}/metrics").body)
        if any(name == "llm_predictor_cycles_total" for name, _, _ in found) or time.monotonic() > end:
            return found
        time.sleep(2)


def test_it_is_up_and_comes_back(
    unit: Callable[[str], Any], command: list[str], fetch: Callable[..., Any], url: str
) -> None:
    """The predictor is up, well, and started at boot."""
    assert command
    unit(UNIT).assert_active()
    unit(UNIT).assert_enabled()
    assert fetch(f"{url}/healthz").status == 200


def test_it_runs_the_release_in_use(host: Host, command: list[str], unit: Callable[[str], Any]) -> None:
    """It runs from the release that the environment's link names, on the settings that are there."""
    release = command[0].removesuffix("/bin/citadel-predictor")
    described = json.loads(host.file(f"{release}/citadel-release.json").content_string)
    links = host.check_output("find %s -maxdepth 1 -type l", release.rsplit("/envs/", 1)[0]).split()
    assert release in [host.check_output("readlink --canonicalize %s", link) for link in links], described["name"]
    file = command[command.index("--config") + 1]
    started = unit(UNIT).show("ExecMainStartTimestamp")["ExecMainStartTimestamp"]
    since = int(host.check_output("date --date=%s +%%s", started))
    assert since >= int(host.file(file).mtime.timestamp())


def test_it_is_hardened(host: Host, command: list[str]) -> None:
    """systemd-analyze security gives the unit 1.5 or better."""
    told = host.run("systemd-analyze security --no-pager %s", UNIT).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert found, told
    assert command
    assert float(found[1]) <= SECURITY, told


def test_it_yields_to_everybody(unit: Callable[[str], Any], command: list[str]) -> None:
    """Memory and CPU have a bound, and others come first."""
    assert command
    limits = unit(UNIT).show("MemoryMax", "CPUWeight", "CPUQuotaPerSecUSec", "Nice", "OOMScoreAdjust")
    assert limits["MemoryMax"] != "infinity"
    assert limits["CPUQuotaPerSecUSec"] != "infinity"
    assert int(limits["CPUWeight"]) < 100
    assert int(limits["Nice"]) > 0
    assert int(limits["OOMScoreAdjust"]) > 0


def test_it_reaches_only_whom_it_must(unit: Callable[[str], Any], command: list[str]) -> None:
    """Every address is refused that is not loopback or named in its settings."""
    assert command
    reach = unit(UNIT).show("IPAddressDeny", "IPAddressAllow", "RestrictAddressFamilies")
    assert {"0.0.0.0/0", "::/0"} <= set(reach["IPAddressDeny"].split())
    assert not {"0.0.0.0/0", "::/0"} & set(reach["IPAddressAllow"].split())


def test_it_is_a_user_of_its_own(host: Host, unit: Callable[[str], Any], settings: dict[str, Any]) -> None:
    """It runs as a user who cannot log in, and what it has learnt is nobody else's to read."""
    name = unit(UNIT).show("User")["User"]
    user = host.user(name)
    assert user.uid not in {0, 65534}
    assert user.shell.endswith(("nologin", "false"))
    assert host.file(settings["state_dir"]).user == name
    assert not host.check_output("find %s -perm /o+rwx", settings["state_dir"])


def test_it_listens_where_it_is_to(host: Host, settings: dict[str, Any]) -> None:
    """The port is open on the address of the settings, and nowhere else."""
    listen = settings["listen"]
    lines = host.check_output(
        "ss --no-header --listening --tcp --numeric 'sport = :%s'", str(listen["port"])
    ).splitlines()
    assert [line.split()[3].rsplit(":", 1)[0] for line in lines] == [listen["host"]]


def test_the_settings_are_good(host: Host, command: list[str]) -> None:
    """The predictor's own check accepts the settings."""
    config = command[command.index("--config") + 1]
    checked = host.run("%s check --config %s", command[0], config)
    assert checked.rc == 0, checked.stdout + checked.stderr


def test_it_is_up_to_date(metrics: list[Sample], settings: dict[str, Any]) -> None:
    """The last cycles have read all targets from Prometheus."""
    values = {name: value for name, labels, value in metrics if not labels}
    assert values["llm_predictor_up_to_date"] == 1, f"{settings['prometheus']['url']} does not answer"


def test_each_target_has_a_forecast_or_a_reason(metrics: list[Sample], settings: dict[str, Any]) -> None:
    """Each target is forecast with finite values, or says in its metrics what is missing."""
    forecast = {
        labels["target"] for name, labels, value in metrics if name == "llm_forecast_value" and math.isfinite(value)
    }
    degraded = {labels["target"] for name, labels, value in metrics if name == "llm_predictor_degraded" and value}
    assert {target["name"] for target in settings["targets"]} - forecast - degraded == set()


def test_quantiles_are_in_order(metrics: list[Sample]) -> None:
    """No forecast is outside its own interval."""
    curves: dict[tuple[tuple[str, str], ...], dict[float, float]] = {}
    for name, labels, value in metrics:
        if name == "llm_forecast_value":
            level = float(labels.pop("quantile"))
            curves.setdefault(tuple(sorted(labels.items())), {})[level] = value
    assert [
        curve
        for curve, values in curves.items()
        if [values[level] for level in sorted(values)] != sorted(values.values())
    ] == []


def test_it_is_small(metrics: list[Sample]) -> None:
    """It needs no more than 300 MB of memory."""
    values = {name: value for name, labels, value in metrics if not labels}
    assert values["process_resident_memory_bytes"] <= MEMORY
