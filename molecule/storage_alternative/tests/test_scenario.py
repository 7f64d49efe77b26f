"""What this scenario asked for, on its two loop devices."""

import json

import pytest
from testinfra.host import Host


@pytest.fixture
def disks(host: Host) -> tuple[str, str]:
    loops = sorted(host.check_output("ls -d /dev/loop[0-9] /dev/loop[0-9][0-9] 2>/dev/null || true").split())
    return loops[0], loops[-1]


def signature(host: Host, device: str) -> tuple[str, str]:
    found = json.loads(host.check_output("wipefs --json %s", device))["signatures"]
    return found[0]["type"], found[0]["label"] or ""


def test_partitions_are_named(host: Host, disks: tuple[str, str]) -> None:
    listed = host.check_output("partx --raw --noheadings --output NR,NAME %s", disks[0])
    assert listed.split() == ["1", "group", "2", "models"]


def test_volume_group_is_real(host: Host, disks: tuple[str, str]) -> None:
    assert host.check_output("pvs --noheadings -o pv_name,vg_name").split() == [f"{disks[0]}p1", "citadel"]


def test_logical_volume_would_be_made(host: Host) -> None:
    """The command of citadel_volumes is accepted by lvcreate; this kernel cannot run it in earnest."""
    tried = host.run("lvcreate --test --quiet --yes --wipesignatures y --name models --size 16777216b citadel")
    assert tried.rc == 0 or "device-mapper" in tried.stderr, tried.stderr


def test_blank_partition_was_formatted_and_mounted(host: Host, disks: tuple[str, str]) -> None:
    assert signature(host, f"{disks[0]}p2") == ("xfs", "models")
    assert host.mount_point("/data/models").filesystem == "xfs"
    assert {"noatime", "nodev"} <= set(host.mount_point("/data/models").options)


def test_named_device_was_formatted_and_the_photos_are_gone(host: Host, disks: tuple[str, str]) -> None:
    assert signature(host, disks[1]) == ("ext4", "application-logs")
    assert "nosuid" in host.mount_point("/data/app-logs").options
    assert not host.file("/data/app-logs/photo").exists


def test_directories_lie_on_the_volumes(host: Host) -> None:
    assert host.file("/data/models").user == "agent0"
    assert host.file("/data/app-logs").mode == 0o2755
    assert host.file("/data/app-logs/archive").group == "agent0"
    assert not host.file("/data/former").exists


def test_rotation_as_asked_for(host: Host) -> None:
    host.check_output("echo line > /data/app-logs/engine.log && chown agent0:agent0 /data/app-logs/engine.log")
    host.check_output("logrotate --force --state /tmp/rotation /etc/logrotate.d/citadel-llm")
    assert "engine.log-" in host.check_output("ls /data/app-logs")
    assert host.file("/data/app-logs/archive/rotated").exists


def test_retention_as_asked_for(host: Host) -> None:
    folder = "/data/app-logs/archive"
    host.check_output(
        f"mkdir -p {folder}/empty && touch -d '11 days ago' {folder}/old {folder}/old.keep {folder}/empty"
    )
    host.check_output(f"touch -d '9 days ago' {folder}/young")
    host.check_output("systemd-tmpfiles --clean /etc/tmpfiles.d/90-citadel-retention.conf")
    left = set(host.check_output(f"ls {folder}").split()) - {"rotated"}
    assert left == {"empty", "old.keep", "young"}


def test_mounts_come_back(host: Host) -> None:
    """The units mount again what was unmounted, as at a boot."""
    for name in ("data-models.mount", "data-app\\x2dlogs.mount"):
        host.check_output("systemctl stop %s", name)
    host.check_output("systemctl start local-fs.target")
    for path in ("/data/models", "/data/app-logs"):
        assert host.mount_point(path).exists
