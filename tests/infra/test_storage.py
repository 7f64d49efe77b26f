"""Mounts, directories, rotation and retention work; what to expect comes from the role's own files."""

import re
import shlex
from collections.abc import Callable
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


@pytest.fixture
def layout(read_json: Callable[[str], Any]) -> dict[str, Any]:
    """What the role was asked for, as it says itself."""
    found: dict[str, Any] = read_json("/etc/citadel-llm/storage.json")
    return found


@pytest.fixture
def directories(layout: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in layout["directories"] if entry.get("state") != "absent"]


def test_directories_have_their_owners_and_modes(host: Host, directories: list[dict[str, Any]]) -> None:
    """Every directory is there, with the owner, group and mode of the inventory."""
    names = " ".join(shlex.quote(entry["path"]) for entry in directories)
    found = host.check_output(f"stat --format='%n %U %G %a' -- {names}").splitlines()
    wanted = []
    for entry in directories:
        owner = entry.get("owner", "root")
        wanted.append(f"{entry['path']} {owner} {entry.get('group', owner)} {entry.get('mode', '0755').lstrip('0')}")
    assert found == wanted


def test_owners_can_write_and_strangers_cannot(host: Host, directories: list[dict[str, Any]]) -> None:
    """The owner of a directory reaches it and may write there; nobody else may, through all the folders above it."""
    for entry in directories:
        owner, path = entry.get("owner", "root"), entry["path"]
        ours = f"setpriv --reuid={owner} --regid={entry.get('group', owner)} --init-groups"
        mine = host.run(f"{ours} test -w %s -a -x %s", path, path)
        assert mine.rc == 0, f"{owner} cannot write to {path}"
        others = host.run("setpriv --reuid=nobody --regid=nogroup --clear-groups test -w %s", path)
        assert others.rc != 0, f"everybody can write to {path}"


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


def test_there_is_room(host: Host, layout: dict[str, Any]) -> None:
    """There is as much room as the inventory asks for, above all for the models."""
    short = []
    for entry in layout["space"]:
        answer = host.check_output("df --block-size=1 --output=size,avail %s", entry["path"]).splitlines()[-1]
        for key, has in zip(("size_gb", "free_gb"), map(int, answer.split()), strict=True):
            if has < float(entry.get(key, 0)) * 1e9:
                short.append(f"{entry['path']}: {key} {has / 1e9:.1f}, asked for {entry[key]}")
    assert short == []
