"""The store of limits: who gets in, what they may do there, and that nothing is forgotten or evicted."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "redis-server.service"


@pytest.fixture
def settings_file(host: Host) -> str:
    """Where redis has its settings from."""
    command = host.check_output("systemctl show --property=ExecStart --value %s", UNIT)
    found = re.search(r"redis-server (\S+/redis\.conf)", command)
    if not found or found[1].startswith("/etc/redis/"):
        pytest.skip("the store of limits is on another host")
    return str(found[1])


@pytest.fixture
def settings(host: Host, settings_file: str) -> dict[str, str]:
    lines = host.file(settings_file).content_string.splitlines()
    return dict(line.split(None, 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture
def user(host: Host, settings: dict[str, str]) -> str:
    """The gateways' user, as the access rules name it."""
    rules = host.file(settings["aclfile"]).content_string
    names: list[str] = re.findall(r"^user (\S+)", rules, re.MULTILINE)
    return next(name for name in names if name not in {"default", "operator"})


@pytest.fixture
def monitor(host: Host, settings: dict[str, str]) -> str:
    """The exporter's user: the last of the access rules."""
    rules = host.file(settings["aclfile"]).content_string
    return str(re.findall(r"^user (\S+)", rules, re.MULTILINE)[-1])


@pytest.fixture
def ask(host: Host, settings: dict[str, str], settings_file: str) -> Callable[..., str]:
    """``ask("CONFIG", "GET", "dir", user="operator")``: what redis says; the password is read on the host."""

    def command(*words: str, user: str = "", password_of: str = "") -> str:
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        secret = f"{PurePosixPath(settings_file).parent}/{password_of or user}.password"
        auth = f"REDISCLI_AUTH=$(cat {secret}) " if user else ""
        who = f"--user {user} --no-auth-warning" if user else ""
        out = host.run(f"{auth}redis-cli -s {settings['unixsocket']} {who} {quoted}")
        return str(out.stdout + out.stderr).strip()

    return command


def test_it_is_up_and_comes_back(unit: Callable[[str], Any], settings_file: str) -> None:
    """The store of limits is up, and started at boot."""
    assert settings_file
    unit(UNIT).assert_active()
    unit(UNIT).assert_enabled()


def test_the_gateways_user_gets_in(ask: Callable[..., str], user: str) -> None:
    """The gateways' user gets in with its password."""
    assert ask("PING", user=user) == "PONG"
    assert "NOPERM" in ask("ACL", "WHOAMI", user=user)


def test_a_wrong_password_is_refused(ask: Callable[..., str], user: str) -> None:
    """Another user's password is refused."""
    assert "WRONGPASS" in ask("PING", user=user, password_of="operator")


def test_nobody_gets_in_without_a_password(ask: Callable[..., str]) -> None:
    """The default user is off."""
    assert "NOAUTH" in ask("PING")
    assert "off" in ask("ACL", "GETUSER", "default", user="operator").split()


@pytest.mark.parametrize(
    "words", [("CONFIG", "GET", "dir"), ("FLUSHALL",), ("KEYS", "*"), ("ACL", "LIST"), ("GET", "somebody-else")]
)
def test_the_gateways_user_may_do_nothing_else(ask: Callable[..., str], user: str, words: tuple[str, ...]) -> None:
    """The gateways' user can neither administrate nor read what is not its own."""
    assert "NOPERM" in ask(*words, user=user)


def test_the_exporters_user_gets_figures(ask: Callable[..., str], monitor: str) -> None:
    """The exporter's user is told how the store is."""
    assert "redis_version:" in ask("INFO", "ALL", user=monitor)


@pytest.mark.parametrize(
    "words",
    [
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("GET", "citadel:x"),
        ("SLOWLOG", "RESET"),
        ("CLIENT", "LIST"),
        ("FLUSHALL",),
    ],
)
def test_the_exporters_user_may_do_nothing_else(ask: Callable[..., str], monitor: str, words: tuple[str, ...]) -> None:
    """The exporter's user sees no value, no setting and no client, and changes nothing."""
    assert "NOPERM" in ask(*words, user=monitor)


def test_a_script_may_read_the_clock_and_its_own_keys(ask: Callable[..., str], user: str, host: Host) -> None:
    """A script, which is how limits are counted, runs as the gateways' user."""
    prefix = re.search(r"~(\S+?)\* ", ask("ACL", "LIST", user="operator").split(f"user {user}")[1])
    assert prefix
    script = "redis.call('TIME'); return redis.call('EXISTS', KEYS[1])"
    assert ask("EVAL", script, "1", f"{prefix[1]}:no-such-key", user=user) in {"0", "(integer) 0"}
    assert "ermission" in ask("EVAL", script, "1", "other:key", user=user)


@pytest.mark.parametrize(("name", "value"), [("appendonly", "yes"), ("maxmemory-policy", "noeviction")])
def test_nothing_is_forgotten(ask: Callable[..., str], name: str, value: str) -> None:
    """Every write is kept, and nothing is evicted."""
    assert ask("CONFIG", "GET", name, user="operator").split()[-1] == value


def test_memory_is_bounded_and_not_exhausted(ask: Callable[..., str]) -> None:
    """Memory has a bound, and there is room below it."""
    figures = dict(
        line.strip().split(":", 1) for line in ask("INFO", "memory", user="operator").splitlines() if ":" in line
    )
    assert 0 < int(figures["used_memory"]) < 0.9 * int(figures["maxmemory"])


def test_the_append_only_file_is_well(ask: Callable[..., str]) -> None:
    """The last write to the append-only file succeeded."""
    figures = ask("INFO", "persistence", user="operator")
    assert "aof_enabled:1" in figures
    assert "aof_last_write_status:ok" in figures


def test_the_port_is_on_its_addresses_only(host: Host, settings: dict[str, str]) -> None:
    """The port is open on loopback and on the addresses of the settings, and nowhere else."""
    port = settings.get("tls-port", settings["port"])
    bound = {address.lstrip("-") for address in settings["bind"].split()}
    lines = host.check_output("ss --no-header --listening --tcp --numeric 'sport = :%s'", port).splitlines()
    assert {line.split()[3].rsplit(":", 1)[0].strip("[]") for line in lines} <= bound


def test_secrets_are_closed(host: Host, settings: dict[str, str], settings_file: str, user: str, monitor: str) -> None:
    """The operator's and the exporter's password are root's, the gateways' for their group alone."""
    folder = str(PurePosixPath(settings_file).parent)
    for name in ("operator", monitor):
        theirs = host.file(f"{folder}/{name}.password")
        assert (theirs.user, theirs.mode) == ("root", 0o600), name
    assert host.file(settings["aclfile"]).mode & 0o007 == 0
    mine = host.file(f"{folder}/{user}.password")
    assert (mine.user, mine.mode) == ("root", 0o640)
    assert host.file(settings["unixsocket"]).group == mine.group
    assert host.file(settings["unixsocket"]).mode & 0o007 == 0


def test_no_password_is_on_a_command_line(
    host: Host, unit: Callable[[str], Any], settings_file: str, user: str, monitor: str
) -> None:
    """No password is in the arguments of redis, its environment, its settings or its journal."""
    pid = unit(UNIT).show("MainPID")["MainPID"]
    for name in (user, "operator", monitor):
        secret = host.file(f"{PurePosixPath(settings_file).parent}/{name}.password").content_string.strip()
        for path in (f"/proc/{pid}/cmdline", f"/proc/{pid}/environ", settings_file):
            assert secret not in host.file(path).content_string, path
        assert secret not in unit(UNIT).journal(200)
