"""The system below the models: what the role wrote is in effect, or not settable on this host.

What to expect comes from the role's own files.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

SYSCTL = "/etc/sysctl.d/90-citadel.conf"
SSHD = "/etc/ssh/sshd_config.d/00-citadel.conf"
LIMITS = "/etc/security/limits.d/90-citadel.conf"
MODULES = "/etc/modprobe.d/90-citadel.conf"
TUNABLES = "/etc/tmpfiles.d/90-citadel-tunables.conf"


@pytest.fixture
def contained(host: Host) -> bool:
    """A container has the kernel, and so most of the settings, of its host."""
    return bool(host.run("systemd-detect-virt --quiet --container").rc == 0)


def lines(host: Host, path: str) -> list[str]:
    """The lines of a file that say something; none if there is no such file."""
    text = host.file(path).content_string if host.file(path).exists else ""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def settings(host: Host, path: str, separator: str | None) -> dict[str, str]:
    """A file of ``name = value`` or ``Name value`` lines."""
    found = dict(line.split(separator, 1) for line in lines(host, path))
    if not found:
        pytest.skip(f"{path} is not there: this inventory asks for none of it")
    return {name.strip(): value.strip() for name, value in found.items()}


def test_what_the_engines_need_is_installed(host: Host) -> None:
    """A C++ compiler, libnuma and Python's venv are there, and they work."""
    host.check_output("echo 'int main() { return 0; }' | g++ -x c++ -fsyntax-only -")
    host.check_output("python3 -c 'import ctypes, ensurepip, venv; ctypes.CDLL(\"libnuma.so.1\")'")
    assert "libtcmalloc_minimal.so.4" in host.check_output("/sbin/ldconfig -p")


def test_no_package_is_half_installed(host: Host) -> None:
    """dpkg has nothing to complain of."""
    assert host.check_output("dpkg --audit") == ""


def test_service_users_cannot_log_in(host: Host) -> None:
    """The service users are system users without a password or a shell."""
    users = [line.split(":") for line in host.check_output("getent passwd").splitlines() if ":Citadel LLM" in line]
    assert users, "no user whose full name begins with Citadel LLM"
    for name, _, number, _, _, _, shell in users:
        assert host.check_output("getent shadow %s", name).split(":")[1].startswith(("!", "*")), (
            f"{name} has a password"
        )
        assert int(number) < 1000, f"{name} is not a system user"
        assert shell.endswith(("nologin", "false")), f"{name} has the shell {shell}"


def test_kernel_parameters_are_in_effect(host: Host, contained: bool) -> None:
    """The kernel has the parameters of sysctl.d, as far as this host lets them be set."""
    wanted = settings(host, SYSCTL, "=")
    paths = {name: "/proc/sys/" + name.replace(".", "/") for name in wanted}
    shell = "for p in %s; do if test -e $p; then echo $p $(test -w $p && echo w || echo r) $(cat $p); fi; done"
    answers = (line.split(maxsplit=2) for line in host.check_output(shell % " ".join(paths.values())).splitlines())
    found = {path: (access, " ".join(value.split())) for path, access, value in answers}
    wrong = {}
    for name, value in wanted.items():
        access, has = found.get(paths[name], ("r", ""))
        if has != " ".join(value.split()) and not (contained and access == "r"):
            wrong[name] = f"{has or 'unknown to this kernel'}, wanted {value}"
    assert wrong == {}


def test_nothing_undoes_the_parameters_at_boot(host: Host) -> None:
    """No later file of sysctl.d sets one of our parameters to something else."""
    wanted = settings(host, SYSCTL, "=")
    last: dict[str, str] = {}
    for line in host.check_output("/usr/lib/systemd/systemd-sysctl --cat-config").splitlines():
        if match := re.match(r"\s*-?([a-z0-9_./*-]+)\s*=\s*(.*)", line):
            last[match[1].replace("/", ".")] = " ".join(match[2].split())
    assert {name: last.get(name) for name in wanted} == wanted


def test_sshd_follows_the_baseline(host: Host) -> None:
    """sshd runs, accepts its configuration, and follows ours."""
    wanted = settings(host, SSHD, None)
    effective = host.check_output("/usr/sbin/sshd -T").lower().splitlines()
    expected = {f"{name} {value}".lower() for name, value in wanted.items()}
    assert {line.replace("prohibit-password", "without-password") for line in expected} - set(effective) == set()


def test_sshd_runs_with_its_present_configuration(host: Host) -> None:
    """sshd was started or reloaded after the last change of our settings."""
    if not host.file(SSHD).exists:
        pytest.skip("sshd is not managed in this inventory")
    listening = "journalctl --unit=ssh.service --output=short-unix --no-pager --grep='Server listening'"
    last = host.run(listening).stdout.splitlines()[-1:]
    if not last:
        pytest.skip("the journal does not go back to the start of sshd, or sshd is started for each connection")
    assert float(last[0].split()[0]) >= host.file(SSHD).mtime.timestamp() - 1


def test_limits_are_part_of_a_login(host: Host) -> None:
    """An SSH login goes through pam_limits, and the limits are in its language."""
    for name in settings(host, LIMITS, None):
        assert re.fullmatch(r"[*%@]?[\w.:-]*", name)
    host.check_output("grep --quiet --extended-regexp '^session.*pam_limits' /etc/pam.d/sshd")


def test_blocked_modules_are_not_loaded(host: Host) -> None:
    """Modules that are blocked are not loaded either."""
    blocked = {line.split()[1].replace("-", "_") for line in lines(host, MODULES)}
    loaded = {line.split()[0] for line in lines(host, "/proc/modules")}
    assert blocked & loaded == set()


def test_huge_pages_and_governor(host: Host, contained: bool) -> None:
    """Transparent huge pages and CPU governor are what the boot file says, where the host has them."""
    if not host.file(TUNABLES).exists:
        pytest.skip("neither is set in this inventory")
    wrong = []
    for line in host.file(TUNABLES).content_string.splitlines():
        if not line.startswith("w"):
            continue
        pattern, value = line.split()[1], line.split()[-1]
        for found in host.run(f"grep --with-filename --no-messages . {pattern}").stdout.splitlines():
            path, has = found.split(":", 1)
            chosen = re.sub(r".*\[(.*)\].*", r"\1", has)
            if chosen != value and not contained:
                wrong.append(f"{path} is {has}, wanted {value}")
    assert wrong == []


def test_the_clock_is_kept(host: Host, contained: bool) -> None:
    """The clock is synchronised (a container has the clock of its host)."""
    if contained:
        pytest.skip("a container has the clock of its host")
    assert host.check_output("timedatectl show --property=NTPSynchronized --value") == "yes"


def test_security_updates_are_on_if_asked_for(host: Host) -> None:
    """The nightly security updates are configured so that apt understands them."""
    if not host.file("/etc/apt/apt.conf.d/90citadel-unattended-upgrades").exists:
        pytest.skip("not asked for in this inventory")
    config = host.check_output("apt-config dump")
    assert 'APT::Periodic::Unattended-Upgrade "1";' in config
    origins = re.findall(r"Unattended-Upgrade::(?:Origins-Pattern|Allowed-Origins):: \"(.*)\"", config)
    assert origins
    assert all("security" in origin.lower() for origin in origins), origins


def test_nothing_failed_at_boot(host: Host, unit: Callable[[str], Any]) -> None:
    """The units that apply our settings at boot succeed."""
    for name in ("systemd-sysctl.service", "systemd-tmpfiles-setup.service", "ssh.service"):
        assert unit(name).show("ActiveState")["ActiveState"] != "failed"
