"""Mounts, directories, rotation and retention work; what to expect comes from the role's own files."""

import re
from typing import Any

import pytest
from testinfra.host import Host

ROTATION = "/etc/logrotate.d/citadel-llm"
RETENTION = "/etc/tmpfiles.d/90-citadel-retention.conf"
UNITS = "/etc/systemd/system"


def mount_units(host: Host) -> list[str]:
    """The mount units that the role wrote."""
    found = host.run(f"grep --files-with-matches --no-messages 'role storage of Citadel' {UNITS}/*.mount").stdout
    return [path.rsplit("/", 1)[1] for path in found.splitlines()]


def test_volumes_are_mounted_and_stay_so(host: Host, unit: Any) -> None:
    """Every volume is mounted as its unit says, and will be at the next boot."""
    for name in mount_units(host):
        unit(name).assert_active()
        unit(name).assert_enabled()
        wanted = dict(
            re.findall(r"^(What|Where|Type|Options)=(.*)$", host.file(f"{UNITS}/{name}").content_string, re.MULTILINE)
        )
        listed = host.check_output("findmnt --noheadings --output SOURCE,FSTYPE,OPTIONS %s", wanted["Where"]).split()
        assert host.check_output("readlink -f %s", listed[0]) == host.check_output("readlink -f %s", wanted["What"])
        assert listed[1] == wanted["Type"]
        assert set(wanted["Options"].split(",")) - {"defaults"} <= set(listed[2].split(","))


@pytest.mark.parametrize("path", ["/opt/citadel", "/opt/models", "/var/log/citadel-llm", "/var/cache/citadel-llm"])
def test_the_areas_are_there_and_reachable_by_the_engines(host: Host, path: str) -> None:
    """The engines' user can enter the area, and nobody but root and that user can write to it."""
    area = host.file(path)
    assert area.is_directory
    assert not area.mode & 0o002
    host.check_output("setpriv --reuid=agent0 --regid=agent0 --clear-groups test -x %s", path)


def test_backups_are_for_root_alone(host: Host) -> None:
    """The backup area is root's."""
    area = host.file("/var/backups/citadel-llm")
    assert (area.user, area.group, area.mode) == ("root", "root", 0o700)
    assert host.run("setpriv --reuid=agent0 --regid=agent0 --clear-groups ls /var/backups/citadel-llm").rc != 0


def test_the_engines_can_write_where_they_must(host: Host) -> None:
    """The engines' user may write weights, logs and cache, and not into the application."""
    for path, allowed in {
        "/opt/models": True,
        "/var/log/citadel-llm": True,
        "/var/cache/citadel-llm": True,
        "/opt/citadel": False,
    }.items():
        answer = host.run("setpriv --reuid=agent0 --regid=agent0 --clear-groups test -w %s", path)
        assert (answer.rc == 0) is allowed, path


def test_rotation_is_accepted_and_runs(host: Host, unit: Any) -> None:
    """logrotate accepts its rules, together with everybody else's, and its timer is armed."""
    if not host.file(ROTATION).exists:
        pytest.skip("no rotation in this inventory")
    tried = host.run("logrotate --debug --state /dev/null /etc/logrotate.conf")
    assert tried.rc == 0, tried.stderr
    assert "error:" not in tried.stderr
    unit("logrotate.timer").assert_active()
    unit("logrotate.timer").assert_enabled()


def test_retention_is_accepted_and_runs(host: Host, unit: Any) -> None:
    """systemd-tmpfiles accepts the retention, and its timer is armed."""
    if not host.file(RETENTION).exists:
        pytest.skip("no retention in this inventory")
    tried = host.run("systemd-tmpfiles --create --prefix=/nonexistent %s", RETENTION)
    assert tried.rc == 0, tried.stderr
    assert RETENTION not in tried.stderr, tried.stderr
    unit("systemd-tmpfiles-clean.timer").assert_active()
    for line in host.file(RETENTION).content_string.splitlines():
        if line.startswith("e "):
            assert host.file(line.split('"')[1]).is_directory, "retention of a folder that is not there"


def test_there_is_room_for_the_models(host: Host) -> None:
    """The models' file system is not full: 5 % or 10 GB are free, whichever is less."""
    size, free = map(int, host.check_output("df --block-size=1 --output=size,avail /opt/models | tail -1").split())
    assert free >= min(size // 20, 10 * 10**9), f"{free / 1e9:.1f} GB of {size / 1e9:.1f} GB are free"
