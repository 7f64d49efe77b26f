"""citadel_volumes against a host of folders: what it would do and refuses, and that it never formats by mistake."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from modules.citadel_volumes import Layout, Machine, RefusalError, Result, partition_node, size_bytes, unit_name

GB = 10**9


class FakeHost:
    """Devices with sizes and signatures, answered for by the commands the module calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.devices: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, int] = {}
        self.volumes: dict[str, dict[str, int]] = {}
        self.ran: list[str] = []
        self.fails = ""
        for folder in ("proc/self", "etc/systemd/system", "dev"):
            (root / folder).mkdir(parents=True)
        (root / "proc/misc").write_text("235 device-mapper\n")

    def device(self, path: str, size: int = 10 * GB, *, signature: str = "", label: str = "", group: str = "") -> None:
        name = path.rsplit("/", 1)[1]
        self.devices[path] = {"signature": signature, "label": label, "group": group}
        (self.root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path.lstrip("/")).write_text("")
        folder = self.root / "sys/class/block" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size // 512}\n")
        (folder / "dev").write_text(f"259:{len(self.devices)}\n")

    def partition(self, device: str, number: int, name: str) -> None:
        kernel = device.rsplit("/", 1)[1]
        folder = self.root / "sys/class/block" / kernel / partition_node(kernel, number)
        folder.mkdir()
        (folder / "partition").write_text(f"{number}\n")
        (folder / "dev").write_text(f"260:{number}\n")
        self.devices[device].setdefault("partitions", {})[number] = name

    def mounted(self, device: str, path: str) -> None:
        number = (self.root / "sys/class/block" / device.rsplit("/", 1)[1] / "dev").read_text().strip()
        with (self.root / "proc/self/mountinfo").open("a") as file:
            file.write(f"36 35 {number} / {path.replace(' ', chr(92) + '040')} rw - xfs {device} rw\n")

    def run(self, command: list[str], stdin: str) -> tuple[int, str, str]:
        name, last = command[0], command[-1]
        if name == "wipefs" and "--json" in command:
            device = self.devices[last]
            if device["signature"] == "unreadable":
                return 1, "", "Input/output error"
            signature = [{"type": device["signature"], "label": device["label"]}] if device["signature"] else []
            return 0, json.dumps({"signatures": signature}), ""
        if name == "pvs":
            return 0, f"  {self.devices[last]['group']}\n", ""
        if name == "vgs":
            return 0, "".join(f"  {group} {free}\n" for group, free in self.groups.items()), ""
        if name == "lvs":
            return 0, "".join(f"  {lv} {size}\n" for lv, size in self.volumes.get(last, {}).items()), ""
        if name == "partx" and "--pairs" in command:
            there = self.devices[last].get("partitions", {}).items()
            return 0, "".join(f'NR="{number}" NAME="{title}"\n' for number, title in there), ""
        if name == "modprobe":
            return 1, "", ""
        self.ran.append(" ".join(command))
        if self.fails and self.fails in command:
            return 5, "", "it did not work"
        if name == "wipefs":
            self.devices[last]["signature"] = ""
        if name == "sfdisk" and "--append" in command:
            self.ran[-1] += f" <<< {stdin.strip()}"
            self.device(stdin.split(" : ")[0])
        if name == "vgcreate":
            self.groups[command[2]] = 10 * GB
        if name == "lvcreate":
            self.device(f"/dev/{last}/{command[command.index('--name') + 1]}")
        return 0, "", ""


class FakeMachine(Machine):
    def is_block(self, device: str) -> bool:
        return self.at(device).is_file()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def plan(host: FakeHost, *, apply: bool = False, allow: list[str] | None = None, **data: Any) -> Result:
    layout = Layout(FakeMachine(host.root, host.run), allow or [], apply=apply)
    return layout.bring_about(
        data.get("disks", []), data.get("volume_groups", []), data.get("volumes", []), data.get("space", [])
    )


def models(**other: Any) -> dict[str, Any]:
    return {"name": "models", "device": "/dev/vdb", "filesystem": "xfs", "mount": "/opt/models", **other}


def test_blank_device_is_formatted_and_mounted(host: FakeHost) -> None:
    host.device("/dev/vdb")
    result = plan(host, volumes=[models(options="noatime", mkfs_options="-m reflink=1")])
    assert host.ran == []
    assert result.refusals == []
    assert result.steps == [
        "xfs on /dev/vdb: mkfs.xfs -q -L models -m reflink=1 /dev/vdb",
        "write /etc/systemd/system/opt-models.mount",
        "reread the units: systemctl daemon-reload",
        "mount /opt/models, now and at every boot: systemctl enable --quiet --now opt-models.mount",
    ]
    plan(host, apply=True, volumes=[models(options="noatime", mkfs_options="-m reflink=1")])
    assert host.ran[0] == "mkfs.xfs -q -L models -m reflink=1 /dev/vdb"
    unit = (host.root / "etc/systemd/system/opt-models.mount").read_text()
    assert "What=/dev/vdb\nWhere=/opt/models\nType=xfs\nOptions=noatime\n" in unit


def mount_for_good(host: FakeHost, volume: dict[str, Any]) -> None:
    plan(host, apply=True, volumes=[volume])
    wants = host.root / "etc/systemd/system/local-fs.target.wants"
    wants.mkdir()
    (wants / "opt-models.mount").symlink_to("../opt-models.mount")
    host.devices["/dev/vdb"].update(signature="xfs", label="models")
    host.mounted("/dev/vdb", "/opt/models")
    host.ran.clear()


def test_second_run_does_nothing(host: FakeHost) -> None:
    host.device("/dev/vdb")
    mount_for_good(host, models())
    assert plan(host, apply=True, volumes=[models()]).steps == []


def test_changed_options_are_a_remount(host: FakeHost) -> None:
    host.device("/dev/vdb")
    mount_for_good(host, models())
    plan(host, apply=True, volumes=[models(options="noatime")])
    assert host.ran == ["systemctl daemon-reload", "systemctl reload opt-models.mount"]


def test_absent_volume_is_unmounted_and_kept(host: FakeHost) -> None:
    host.device("/dev/vdb")
    mount_for_good(host, models())
    plan(host, apply=True, volumes=[models(state="absent")])
    assert host.ran == ["systemctl disable --quiet --now opt-models.mount", "systemctl daemon-reload"]
    assert not (host.root / "etc/systemd/system/opt-models.mount").exists()
    assert plan(host, apply=True, volumes=[models(state="absent")]).steps == []


@pytest.mark.parametrize(
    ("signature", "label"),
    [("ext4", "photos"), ("xfs", "photos"), ("crypto_LUKS", ""), ("LVM2_member", ""), ("gpt", "")],
)
def test_foreign_signature_is_refused_with_device_signature_and_remedy(
    host: FakeHost, signature: str, label: str
) -> None:
    host.device("/dev/vdb", signature=signature, label=label)
    refusal = plan(host, volumes=[models()]).refusals[0]
    assert "/dev/vdb" in refusal
    assert signature in refusal
    assert "add /dev/vdb to storage_allow_format" in refusal
    with pytest.raises(RefusalError, match="storage_allow_format"):
        plan(host, apply=True, volumes=[models()])
    assert host.ran == []


def test_permission_is_for_the_device_that_is_named(host: FakeHost) -> None:
    host.device("/dev/vdb", signature="ext4")
    assert plan(host, allow=["/dev/vdc"], volumes=[models()]).refusals
    plan(host, apply=True, allow=["/dev/vdb"], volumes=[models()])
    assert host.ran[:2] == ["wipefs --all --quiet /dev/vdb", "mkfs.xfs -q -L models /dev/vdb"]


@pytest.mark.parametrize("holder", ["mount", "partition", "swap", "raid"])
def test_what_is_in_use_is_never_formatted(host: FakeHost, holder: str) -> None:
    host.device("/dev/vdb", signature="ext4")
    if holder == "mount":
        host.mounted("/dev/vdb", "/srv/my data")
    elif holder == "partition":
        host.partition("/dev/vdb", 1, "")
        (host.root / "proc/self/mountinfo").write_text("36 35 260:1 / /home rw - xfs /dev/vdb1 rw\n")
    elif holder == "swap":
        (host.root / "proc/swaps").write_text("Filename Type Size\n/dev/vdb partition 1\n")
    else:
        (host.root / "sys/class/block/vdb/holders/md0").mkdir(parents=True)
    refusal = plan(host, allow=["/dev/vdb"], volumes=[models()]).refusals[0]
    assert "Nothing in use is ever formatted" in refusal
    assert {"mount": "/srv/my data", "partition": "/home", "swap": "swap", "raid": "md0"}[holder] in refusal


def test_what_is_mounted_at_its_place_is_ours_whatever_the_label(host: FakeHost) -> None:
    """The installer made it, from the same data."""
    host.device("/dev/vdb", signature="xfs", label="")
    host.mounted("/dev/vdb", "/opt/models")
    (host.root / "etc/fstab").write_text("# a comment\nUUID=1 /opt/models xfs defaults 0 0\n")
    assert plan(host, volumes=[models()]).steps == []


def test_entry_of_fstab_that_is_not_mounted(host: FakeHost) -> None:
    host.device("/dev/vdb", signature="xfs", label="models")
    (host.root / "etc/fstab").write_text("UUID=1 /opt/models xfs defaults 0 0\n")
    assert plan(host, volumes=[models()]).steps == ["mount /opt/models (from /etc/fstab): mount /opt/models"]


def test_mount_would_hide_something(host: FakeHost) -> None:
    host.device("/dev/vdb")
    (host.root / "opt/models/mixtral").mkdir(parents=True)
    assert "move the content away" in plan(host, volumes=[models()]).refusals[0]


def test_something_else_is_mounted_there(host: FakeHost) -> None:
    host.device("/dev/vdb")
    host.device("/dev/vdc")
    host.mounted("/dev/vdc", "/opt/models")
    assert "something else is mounted there" in plan(host, volumes=[models()]).refusals[0]


def test_every_refusal_is_found_in_one_go(host: FakeHost) -> None:
    host.device("/dev/vdb", signature="unreadable")
    refusals = plan(host, volumes=[models(), models(device="/dev/vdz"), models(label="much-too-long-a-label")]).refusals
    assert "cannot be probed" in refusals[0]
    assert "not a device of this host" in refusals[1]
    assert "longer than xfs takes" in refusals[2]


def test_partitions_group_and_volumes_on_a_blank_disk(host: FakeHost) -> None:
    host.device("/dev/nvme0n1", size=6000 * GB)
    data: dict[str, Any] = {
        "disks": [
            {
                "device": "/dev/nvme0n1",
                "partitions": [
                    {"number": 1, "name": "boot", "size": "2GiB"},
                    {"number": 2, "name": "lvm", "size": "rest", "type": "lvm"},
                ],
            }
        ],
        "volume_groups": [{"name": "citadel", "devices": ["/dev/nvme0n1p2"]}],
        "volumes": [
            {"name": "models", "volume_group": "citadel", "size": "4GiB", "filesystem": "xfs", "mount": "/opt/models"},
            {"name": "logs", "volume_group": "citadel", "size": "rest", "filesystem": "ext4", "mount": ""},
        ],
    }
    result = plan(host, **data)
    assert result.refusals == []
    assert result.steps[0] == "partition table of /dev/nvme0n1: sfdisk --quiet /dev/nvme0n1 <<< label: gpt"
    assert result.steps[3:5] == [
        "physical volume on /dev/nvme0n1p2: pvcreate --quiet /dev/nvme0n1p2",
        "volume group citadel: vgcreate --quiet citadel /dev/nvme0n1p2",
    ]
    plan(host, apply=True, **data)
    text = "\n".join(host.ran)
    assert '<<< /dev/nvme0n1p1 : size=4194304, type=linux, name="boot"' in text
    assert '<<< /dev/nvme0n1p2 : size=+, type=lvm, name="lvm"' in text
    assert f"--name models --size {4 * 1024**3}b citadel" in text
    assert "--name logs --extents 100%FREE citadel" in text
    assert "mkfs.ext4 -q -L logs /dev/citadel/logs" in text


def test_stale_signature_in_a_new_partition_is_refused_before_it_is_formatted(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.device("/dev/vdb")
    disks = [{"device": "/dev/vdb", "partitions": [{"number": 1, "name": "models"}]}]
    assert plan(host, disks=disks, volumes=[models(device="/dev/vdb1")]).refusals == []
    real = host.device
    monkeypatch.setattr(host, "device", lambda path: real(path, signature="ext4"))
    with pytest.raises(RefusalError, match=r"/dev/vdb1 .* ext4"):
        plan(host, apply=True, disks=disks, volumes=[models(device="/dev/vdb1")])
    assert not any("mkfs" in command for command in host.ran)


def test_partition_that_is_there_is_never_changed(host: FakeHost) -> None:
    host.device("/dev/vdb", signature="gpt")
    host.partition("/dev/vdb", 1, "models")
    host.partition("/dev/vdb", 2, "")
    host.partition("/dev/vdb", 3, "photos")
    wanted = [{"number": number, "name": name} for number, name in ((1, "models"), (2, "cache"), (3, "logs"))]
    result = plan(host, disks=[{"device": "/dev/vdb", "partitions": wanted}])
    assert result.steps == []
    assert result.notes == ["partition 2 of /dev/vdb has no name and is taken for cache"]
    assert "partition 3 of /dev/vdb is there and is named 'photos'" in result.refusals[0]


@pytest.mark.parametrize("signature", ["dos", "ext4"])
def test_disk_with_something_else_on_it(host: FakeHost, signature: str) -> None:
    host.device("/dev/vdb", signature=signature)
    assert "storage_allow_format" in plan(host, disks=[{"device": "/dev/vdb"}]).refusals[0]
    result = plan(host, allow=["/dev/vdb"], disks=[{"device": "/dev/vdb"}])
    assert result.steps[0].startswith(f"destroy {signature} on /dev/vdb")


def test_disk_without_a_node_for_its_partition(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.device("/dev/vdb")
    made: list[str] = []
    monkeypatch.setattr(FakeHost, "device", lambda self, path: None)
    monkeypatch.setattr(os, "mknod", lambda path, mode, number: made.append(str(path)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    disks = [{"device": "/dev/vdb", "partitions": [{"number": 1}]}]
    with pytest.raises(RefusalError, match="did not appear"):
        plan(host, apply=True, disks=disks)
    folder = host.root / "sys/class/block/vdb1"
    folder.mkdir()
    (folder / "dev").write_text("259:9\n")
    plan(host, apply=True, disks=disks)
    assert made == [str(host.root / "dev/vdb1")]


def test_group_grows_and_takes_an_orphan_member(host: FakeHost) -> None:
    host.groups["citadel"] = 0
    host.device("/dev/vdb", signature="LVM2_member", group="citadel")
    host.device("/dev/vdc", signature="LVM2_member")
    result = plan(host, volume_groups=[{"name": "citadel", "devices": ["/dev/vdb", "/dev/vdc"]}])
    assert result.steps == ["volume group citadel: vgextend --quiet citadel /dev/vdc"]
    result = plan(host, volume_groups=[{"name": "citadel", "devices": ["/dev/vdb"]}])
    assert result.steps == []


def test_member_of_another_group_and_group_of_others(host: FakeHost) -> None:
    host.groups["citadel"] = 0
    host.device("/dev/vdb", signature="LVM2_member", group="old")
    host.device("/dev/vdc")
    groups = [{"name": "new", "devices": ["/dev/vdb"]}, {"name": "citadel", "devices": ["/dev/vdc"]}]
    refusals = plan(host, volume_groups=groups).refusals
    assert "LVM2_member" in refusals[0]
    assert "none of /dev/vdc belongs to it" in refusals[1]


def lv(size: str, **other: Any) -> dict[str, Any]:
    return {"name": "models", "volume_group": "citadel", "size": size, "filesystem": "xfs", "mount": "", **other}


def test_volume_grows_and_never_shrinks(host: FakeHost) -> None:
    host.groups["citadel"] = 5 * 1024**3
    host.volumes["citadel"] = {"models": 4 * 1024**3}
    host.device("/dev/citadel/models", signature="xfs", label="models")
    grown = plan(host, volumes=[lv("6GiB")])
    assert grown.steps[0].startswith("grow /dev/citadel/models from 4.3 GB to 6GiB: lvextend --quiet --resizefs")
    shrunk = plan(host, volumes=[lv("1GiB")])
    assert shrunk.steps == []
    assert "nothing is shrunk" in shrunk.notes[0]
    assert plan(host, volumes=[lv("rest")]).steps == []


def test_volume_that_does_not_fit_its_group(host: FakeHost) -> None:
    host.groups["citadel"] = 5 * GB
    assert "needs 8.6 GB in volume group citadel, which has 5.0 GB" in plan(host, volumes=[lv("8GiB")]).refusals[0]


def test_volume_in_no_group_and_kernel_without_device_mapper(host: FakeHost) -> None:
    assert "add it to storage_volume_groups" in plan(host, volumes=[lv("1GiB")]).refusals[0]
    host.groups["citadel"] = 5 * GB
    (host.root / "proc/misc").unlink()
    assert "no device-mapper" in plan(host, volumes=[lv("1GiB")]).refusals[0]


def test_step_that_fails_says_which_and_why(host: FakeHost) -> None:
    host.device("/dev/vdb")
    host.fails = "mkfs.xfs"
    with pytest.raises(RefusalError, match=r"xfs on /dev/vdb failed: `mkfs.xfs .*` said: it did not work"):
        plan(host, apply=True, volumes=[models()])


def test_room_is_measured_where_it_will_be(host: FakeHost) -> None:
    host.device("/dev/vdb", size=100 * GB)
    asked = [
        {"path": "/opt/models/mixtral", "size_gb": 90, "free_gb": 90},
        {"path": "/opt/models", "free_gb": 120},
        {"path": "/var/log/not/there", "size_gb": 10**9},
    ]
    space = plan(host, volumes=[models()], space=asked).space
    assert space[0] == {"path": "/opt/models/mixtral", "size_gb": 100.0, "free_gb": 100.0, "shortfall": ""}
    assert space[1]["shortfall"] == "/opt/models: 120 GB free asked for, 100.0 GB there"
    assert re.match(r"/var/log/not/there: 1e\+09 GB in all asked for, [\d.]+ GB there", space[2]["shortfall"])


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("1K", 1024), ("1.5GiB", 3 * 2**29), ("4TB", 4 * 10**12), (" 2 M ", 2**21)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


def test_sizes_that_are_none() -> None:
    with pytest.raises(RefusalError, match="200GiB"):
        size_bytes("plenty")


@pytest.mark.parametrize("path", ["/opt/models", "/var/log/citadel-llm", "/srv/a b/.c/d.e_f:g", "/data/größe"])
def test_unit_names_are_those_of_systemd(path: str) -> None:
    asked = subprocess.run(
        ["systemd-escape", "--path", "--suffix=mount", path], capture_output=True, text=True, check=True
    )
    assert unit_name(path) == asked.stdout.strip()


def test_partition_nodes() -> None:
    nodes = [partition_node(disk, 4) for disk in ("/dev/sda", "/dev/nvme0n1", "/dev/disk/by-id/x")]
    assert nodes == ["/dev/sda4", "/dev/nvme0n1p4", "/dev/disk/by-id/x-part4"]


def test_real_machine_knows_a_device_from_a_file(tmp_path: Path) -> None:
    machine = Machine(tmp_path, lambda command, stdin: (127, "", "not installed"))
    (tmp_path / "file").write_text("")
    assert not machine.is_block("/file")
    assert not machine.is_block("/nothing")
    assert machine.groups() == {}
