"""The models: each generates, within its limits and behind its walls, as the files deployed on the host say."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

KEY = "/etc/citadel-llm/keys/engine"


def engine(host: Host) -> str:
    """Where citadel-engine is: what the unit starts."""
    started = str(host.check_output("systemctl cat citadel-llm@.service | grep ^ExecStart=")).removeprefix("ExecStart=")
    return started.split()[0]


@pytest.fixture
def models(host: Host) -> dict[str, dict[str, Any]]:
    """vLLM's settings by model; a host without models is not asked."""
    names = host.run("cd /etc/citadel-llm/models 2>/dev/null && ls *.yaml").stdout.split()
    if not names:
        pytest.skip("no models on this host")
    found = {}
    for name in names:
        lines = host.file(f"/etc/citadel-llm/models/{name}").content_string.splitlines()
        pairs = (line.split(": ", 1) for line in lines if not line.startswith("#"))
        found[name.removesuffix(".yaml")] = {key: json.loads(value) for key, value in pairs}
    return found


@pytest.fixture
def running(host: Host, models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Only where models are started at all: the target says so."""
    if host.run("systemctl is-active --quiet citadel-llm.target").rc:
        pytest.skip("the models of this host are not started")
    return models


@pytest.fixture
def own_user(host: Host, models: dict[str, dict[str, Any]]) -> str:
    return str(host.check_output("systemctl show --value --property=User citadel-llm@%s.service", next(iter(models))))


def test_every_model_is_enabled(models: dict[str, Any], unit: Callable[[str], Any]) -> None:
    for name in ("citadel-llm.target", "citadel-llm-access.service", *(f"citadel-llm@{n}.service" for n in models)):
        unit(name).assert_enabled()


def test_every_model_runs(running: dict[str, Any], unit: Callable[[str], Any]) -> None:
    for name in running:
        unit(f"citadel-llm@{name}.service").assert_active()


def test_every_model_generates_a_token(host: Host, running: dict[str, Any], own_user: str) -> None:
    answers = json.loads(host.run(f"{engine(host)} ask --as {own_user} {' '.join(running)}").stdout)
    assert {name: answer["text"] for name, answer in answers.items() if answer["status"] != 200} == {}


def test_every_model_runs_what_its_files_say(host: Host, running: dict[str, Any]) -> None:
    state = json.loads(host.check_output(f"{engine(host)} state"))
    assert [name for name in running if not state["models"][name]["current"]] == []
    assert (state["access_current"], state["daemon_reload"]) == (True, False)


def test_a_model_answers_to_its_name_and_aliases(
    running: dict[str, Any], own_user: str, fetch: Callable[..., Any]
) -> None:
    for settings in running.values():
        listed = fetch(f"http://127.0.0.1:{settings['port']}/v1/models", user=own_user, key_file=KEY).json()["data"]
        assert [entry["id"] for entry in listed] == settings["served-model-name"]


def test_without_a_key_there_is_no_answer(running: dict[str, Any], own_user: str, fetch: Callable[..., Any]) -> None:
    for settings in running.values():
        assert fetch(f"http://127.0.0.1:{settings['port']}/v1/models", user=own_user).status == 401


@pytest.mark.parametrize("stranger", ["nobody", "root"])
def test_another_local_user_is_refused_at_the_port(
    running: dict[str, Any], fetch: Callable[..., Any], stranger: str
) -> None:
    for settings in running.values():
        answer = fetch(f"http://127.0.0.1:{settings['port']}/health", user=stranger, timeout=5)
        assert (answer.status, "refused" in answer.body or "reset" in answer.body) == (0, True), answer.body


def test_engines_listen_on_loopback_only(host: Host, running: dict[str, Any], own_user: str) -> None:
    uid = host.user(own_user).uid
    sockets = [line.split() for line in host.check_output("ss -Hltne").splitlines() if f"uid:{uid} " in f"{line} "]
    assert {fields[3].rsplit(":", 1)[0] for fields in sockets} <= {"127.0.0.1", "[::1]"}
    assert {settings["port"] for settings in running.values()} <= {int(f[3].rsplit(":", 1)[1]) for f in sockets}


def test_the_rules_for_the_ports_are_loaded(host: Host, models: dict[str, Any]) -> None:
    table = host.run("nft list table inet citadel_engines")
    assert table.rc == 0, table.stderr
    assert [s["port"] for s in models.values() if str(s["port"]) not in table.stdout] == []
    assert "skuid" in table.stdout


def test_the_sandbox_is_tight(host: Host, models: dict[str, Any]) -> None:
    for name in models:
        result = host.run("systemd-analyze security --no-pager --threshold=15 citadel-llm@%s.service", name)
        assert result.rc == 0, result.stdout[-400:]


def test_units_are_what_systemd_understands(host: Host, models: dict[str, Any]) -> None:
    for name in models:
        result = host.run("systemd-analyze verify citadel-llm@%s.service", name)
        assert (result.rc, [line for line in result.stderr.splitlines() if "citadel-llm" in line]) == (0, [])


def test_limits_are_those_of_the_plan(
    models: dict[str, Any], unit: Callable[[str], Any], read_json: Callable[[str], Any], host: Host
) -> None:
    plan = read_json("/etc/citadel-llm/plan.json")
    for name, settings in models.items():
        shown = unit(f"citadel-llm@{name}.service").show(
            "MemoryMax",
            "MemorySwapMax",
            "AllowedCPUs",
            "Slice",
            "TimeoutStopUSec",
            "KillMode",
            "RestartPreventExitStatus",
        )
        assert int(shown["MemoryMax"]) == plan[name]["memory_max"]
        assert (shown["MemorySwapMax"], shown["Slice"], shown["KillMode"]) == ("0", "citadel-llm.slice", "mixed")
        assert shown["RestartPreventExitStatus"] == "78"
        limits = host.file(f"/etc/systemd/system/citadel-llm@{name}.service.d/limits.conf").content_string
        if "AllowedCPUs=" in limits:
            assert shown["AllowedCPUs"].replace(" ", ",") == plan[name]["cpus"]
        assert settings["kv-cache-memory-bytes"] == plan[name]["kv_cache_bytes"]


def test_a_model_has_time_to_drain(host: Host, models: dict[str, Any]) -> None:
    for name, settings in models.items():
        limits = host.file(f"/etc/systemd/system/citadel-llm@{name}.service.d/limits.conf").content_string
        stop = next(line for line in limits.splitlines() if line.startswith("TimeoutStopSec="))
        assert int(stop.split("=")[1]) >= settings["shutdown-timeout"] + 15


def test_the_files_of_every_model_are_whole_and_readable(host: Host, models: dict[str, Any], own_user: str) -> None:
    for name in models:
        result = host.run("%s check --running --as %s %s", engine(host), own_user, name)
        assert result.rc == 0, result.stderr


def test_only_root_can_change_what_runs(host: Host, models: dict[str, Any]) -> None:
    places = f"/etc/citadel-llm {engine(host)} /etc/systemd/system/citadel-llm*"
    assert host.check_output(f"find {places} ! -type l '(' ! -user root -o -perm /022 ')' -print") == ""


def test_the_key_is_a_file_of_root_and_nowhere_else(host: Host, models: dict[str, Any]) -> None:
    file = host.file(KEY)
    assert (file.user, file.mode, len(file.content_string.strip())) == ("root", 0o600, 64)
    key = file.content_string.strip()
    assert key not in host.check_output("ps -eww -o args")
    for name in models:
        assert key not in host.check_output("systemctl show citadel-llm@%s.service", name)
    assert host.run("grep -rqF -e %s /etc/citadel-llm/models /etc/systemd/system", key).rc == 1


def test_logs_are_in_the_journal_and_in_a_file_that_rotates(host: Host, running: dict[str, Any]) -> None:
    result = host.run("logrotate --debug --state /dev/null /etc/logrotate.d/citadel-llm-engines")
    assert result.rc == 0, result.stderr
    for name in running:
        environment = host.file(f"/etc/citadel-llm/models/{name}.env").content_string
        log = next(line for line in environment.splitlines() if line.startswith("CITADEL_LOG=")).split("=", 1)[1]
        assert host.file(log).size > 0
        assert log in result.stdout + result.stderr, "not among the files that logrotate looks at"
        assert "is ready on port" in host.check_output("journalctl --unit=citadel-llm@%s.service --no-pager", name)


def test_a_model_says_what_its_whole_unit_uses(host: Host, running: dict[str, Any]) -> None:
    for name in running:
        text = host.file(f"/run/citadel-llm/{name}/metrics.prom").content_string
        figures = {line.split("{")[0]: float(line.split()[1]) for line in text.splitlines()}
        assert figures["citadel_unit_memory_bytes"] > 100e6
        assert figures["citadel_unit_cpu_seconds_total"] > 1
