#!/usr/bin/python
"""Partitions, LVM, file systems and mounts from data; never over something that is there already."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENTATION = r"""
module: citadel_volumes
short_description: Bring disks, volume groups, file systems and mounts to a state
description:
  - Every device is probed directly before it would be written to. A device that carries a signature (a file system, a
    partition table, a member of LVM, RAID or LUKS) which is not the one asked for is refused, unless C(allow_format)
    names that very device.
  - A file system is taken for ours if type and label are those asked for, or if it is mounted where it should be.
  - Nothing is ever shrunk, and a volume, group or partition that is no longer asked for is left as it is.
  - With C(apply=false), and in check mode, only the steps are returned that would be taken.
options:
  disks:
    description: Disks whose partitions are ours. Keys are C(device), C(label) (gpt) and C(partitions).
    type: list
    elements: dict
    default: []
  volume_groups:
    description: LVM volume groups. Keys are C(name) and C(devices).
    type: list
    elements: dict
    default: []
  volumes:
    description:
      - File systems. Keys are C(name), C(state), C(device) or C(volume_group) and C(size), C(filesystem), C(label),
        C(mkfs_options), C(mount), C(options).
    type: list
    elements: dict
    default: []
  allow_format:
    description: Devices whose present content may be destroyed, by the name used in the other options.
    type: list
    elements: str
    default: []
  space:
    description: Room that must be there. Keys are C(path), C(size_gb) and C(free_gb), in GB of 10^9 bytes.
    type: list
    elements: dict
    default: []
  apply:
    description: Take the steps; without it they are only returned.
    type: bool
    default: true
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Make the models' volume
  citadel_volumes:
    volumes:
      - {name: models, device: /dev/disk/by-id/nvme-example-part4, filesystem: xfs, mount: /opt/models}
"""

RETURN = r"""
steps:
  description: What was done, or would be done, a line each.
  type: list
  returned: always
refusals:
  description: What is not done and why, with the remedy; a run that applies fails with the first of them.
  type: list
  returned: always
notes:
  description: What differs from the data and is left as it is.
  type: list
  returned: always
space:
  description: Room found for each entry of C(space), and C(shortfall), empty if it is enough.
  type: list
  returned: always
"""

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
TABLES = {"gpt", "dos", "PMBR"}
MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
LABEL_LENGTH = {"ext4": 16, "xfs": 12}
UNIT_FOLDER = "etc/systemd/system"

Runner = Callable[[list[str], str], tuple[int, str, str]]


class RefusalError(Exception):
    """Something that is not done, said so that the operator knows what to do."""


def size_bytes(text: str) -> int:
    """``100G`` and ``100GiB`` count by 1024, ``100GB`` by 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B)?\s*", text)
    if not match:
        raise RefusalError(f"{text!r} is not a size; write a number and a unit, as in 200GiB")
    number, unit, suffix = match.groups()
    if suffix == "B" and unit:
        return int(float(number) * 1000 ** "KMGT".index(unit) * 1000)
    return int(float(number) * UNITS[unit])


def is_rest(size: str) -> bool:
    return size in {"", "rest", "100%FREE"}


def human(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def partition_node(device: str, number: int) -> str:
    """The name of a partition: ``/dev/sda1``, ``/dev/nvme0n1p1``, ``/dev/disk/by-id/x-part1``."""
    if device.startswith("/dev/disk/"):
        return f"{device}-part{number}"
    return f"{device}{'p' if device[-1].isdigit() else ''}{number}"


def unit_name(mount: str) -> str:
    """The name systemd wants for the unit of a mount point (``systemd-escape --path``)."""
    escaped = []
    for index, character in enumerate(mount.strip("/")):
        if character == "/":
            escaped.append("-")
        elif (character.isascii() and character.isalnum()) or character in ":_" or (character == "." and index):
            escaped.append(character)
        else:
            escaped += [f"\\x{byte:02x}" for byte in character.encode()]
    return "".join(escaped) + ".mount"


@dataclass(frozen=True)
class Signature:
    type: str
    label: str

    def __str__(self) -> str:
        return f"{self.type} labelled {self.label}" if self.label else self.type


@dataclass(frozen=True)
class Mount:
    number: str  # major:minor
    path: str


class Machine:
    """What the host says about its devices. ``root`` is ``/``, in a test a folder that looks like one."""

    def __init__(self, root: Path, run: Runner) -> None:
        self.root = root
        self.run = run

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str:
        try:
            return self.at(path).read_text()
        except OSError:
            return ""

    def answer(self, *command: str) -> str:
        """A command's output; nothing if it fails or is not installed."""
        code, out, _ = self.run(list(command), "")
        return out if code == 0 else ""

    def is_block(self, device: str) -> bool:
        try:
            return stat.S_ISBLK(self.at(device).stat().st_mode)
        except OSError:
            return False

    def kernel_name(self, device: str) -> str:
        return self.at(device).resolve().name

    def number(self, device: str) -> str:
        return self.text(f"/sys/class/block/{self.kernel_name(device)}/dev").strip()

    def size(self, device: str) -> int:
        return int(self.text(f"/sys/class/block/{self.kernel_name(device)}/size").strip() or 0) * 512

    def signatures(self, device: str) -> list[Signature]:
        code, out, err = self.run(["wipefs", "--json", "--no-act", device], "")
        if code != 0:
            raise RefusalError(f"{device} cannot be probed ({err.strip()}); nothing is written to what cannot be read")
        found = json.loads(out or "{}").get("signatures") or []
        return [Signature(one.get("type") or "?", one.get("label") or "") for one in found]

    def partitions(self, device: str) -> dict[int, str]:
        """Number and name of each partition, from the table itself: the kernel does not always tell the names."""
        out = self.answer("partx", "--pairs", "--output", "NR,NAME", device)
        named = {int(number): name for number, name in re.findall(r'^NR="(\d+)" NAME="(.*)"$', out, re.MULTILINE)}
        known = self.at(f"/sys/class/block/{self.kernel_name(device)}").glob("*/partition")
        return {int(path.read_text()): "" for path in known} | named

    def mounts(self) -> list[Mount]:
        found = []
        for line in self.text("/proc/self/mountinfo").splitlines():
            fields = line.split()
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found.append(Mount(fields[2], path))
        return found

    def used_by(self, device: str) -> str:
        """Who holds a device or one of its partitions; empty if nobody does."""
        name = self.kernel_name(device)
        folder = self.at(f"/sys/class/block/{name}")
        family = [folder, *(path.parent for path in folder.glob("*/partition"))]
        numbers = {(one / "dev").read_text().strip() for one in family if (one / "dev").exists()}
        mounted = [mount.path for mount in self.mounts() if mount.number in numbers]
        if mounted:
            return f"it is mounted at {', '.join(mounted)}"
        holders = [holder.name for one in family for holder in one.glob("holders/*")]
        if holders:
            return f"it is held by {', '.join(holders)}"
        swaps = {line.split()[0] for line in self.text("/proc/swaps").splitlines()[1:]}
        return "it is swap space in use" if {f"/dev/{one.name}" for one in family} & swaps else ""

    def group_of(self, device: str) -> str:
        return self.answer("pvs", "--noheadings", "-o", "vg_name", device).strip()

    def groups(self) -> dict[str, int]:
        """Free bytes of each volume group."""
        out = self.answer("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_name,vg_free")
        return {name: int(free) for name, free in (line.split() for line in out.splitlines() if line.strip())}

    def logical_volumes(self, group: str) -> dict[str, int]:
        out = self.answer("lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_name,lv_size", group)
        return {name: int(size) for name, size in (line.split() for line in out.splitlines() if line.strip())}

    def has_device_mapper(self) -> bool:
        """In the kernel, or a module that it would load."""
        if "device-mapper" in self.text("/proc/misc"):
            return True
        return self.run(["modprobe", "--dry-run", "--quiet", "dm-mod"], "")[0] == 0

    def fstab(self) -> set[str]:
        lines = (line.split() for line in self.text("/etc/fstab").splitlines() if not line.lstrip().startswith("#"))
        return {fields[1].rstrip("/") or "/" for fields in lines if len(fields) > 2}


@dataclass
class Result:
    steps: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    space: list[dict[str, Any]] = field(default_factory=list)


class Layout:
    """Goes through the data in order; each step is taken when it is come to, or only noted."""

    def __init__(self, machine: Machine, allow_format: list[str], *, apply: bool) -> None:
        self.machine = machine
        self.allow_format = allow_format
        self.apply = apply
        self.result = Result()
        self.coming: dict[str, int] = {}  # devices that an earlier step makes, and their size
        self.room: dict[str, int] = {}  # free bytes of each volume group after the steps so far
        self.pending: dict[str, int] = {}  # mount points that a step mounts, and the size of their file systems

    def bring_about(
        self,
        disks: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        volumes: list[dict[str, Any]],
        space: list[dict[str, Any]],
    ) -> Result:
        self.room = self.machine.groups()
        for work, items in ((self._disk, disks), (self._group, groups), (self._volume, volumes)):
            for item in items:
                try:
                    work(item)
                except RefusalError as error:
                    if self.apply:
                        raise
                    self.result.refusals.append(str(error))
        self.result.space = [self._space(entry) for entry in space]
        return self.result

    # -- steps

    def _step(self, what: str, command: list[str], stdin: str = "") -> None:
        self.result.steps.append(f"{what}: {' '.join(command)}" + (f" <<< {stdin.strip()}" if stdin else ""))
        if self.apply:
            code, out, err = self.machine.run(command, stdin)
            if code != 0:
                raise RefusalError(f"{what} failed: `{' '.join(command)}` said: {(err or out).strip()}")

    def _clear(self, device: str, purpose: str, found: list[Signature]) -> None:
        """A foreign signature: an error, or a step if the operator named this very device."""
        words = ", ".join(sorted({str(one) for one in found}))
        user = self.machine.used_by(device)
        if user:
            raise RefusalError(
                f"{device} is to become {purpose}, but {user} (it carries {words}). "
                "Nothing in use is ever formatted: choose another device, or free this one by hand first"
            )
        if device not in self.allow_format:
            raise RefusalError(
                f"{device} is to become {purpose}, but it carries a signature: {words}. Choose another device; or, if "
                f"what is on it may be destroyed, add {device} to storage_allow_format"
            )
        self._step(f"destroy {words} on {device}", ["wipefs", "--all", "--quiet", device])

    def _present(self, device: str, purpose: str) -> bool:
        """Whether the device is there to be probed; ``False`` if an earlier step makes it."""
        if self.machine.is_block(device):
            return True
        if device in self.coming:
            return False
        raise RefusalError(
            f"{device}, which is to become {purpose}, is not a device of this host; "
            "`lsblk -o NAME,SIZE,MODEL,SERIAL` lists them"
        )

    # -- partitions

    def _disk(self, disk: dict[str, Any]) -> None:
        device, table = disk["device"], disk.get("label", "gpt")
        purpose = f"a disk with a partition table ({table})"
        self._present(device, purpose)
        found = self.machine.signatures(device)
        types = {one.type for one in found}
        if found and (types - TABLES or table not in types):
            self._clear(device, purpose, found)
            found = []
        if not found:
            self._step(f"partition table of {device}", ["sfdisk", "--quiet", device], f"label: {table}\n")
        there = self.machine.partitions(device) if found else {}
        for part in disk.get("partitions", []):
            number, name = part["number"], part.get("name", "")
            if number not in there:
                self._partition(device, part)
            elif name and not there[number]:
                self.result.notes.append(f"partition {number} of {device} has no name and is taken for {name}")
            elif name and there[number] != name:
                raise RefusalError(
                    f"partition {number} of {device} is there and is named {there[number]!r}, not {name!r}. Give "
                    "another number, or that name if it is the same partition; an existing partition is never changed"
                )

    def _partition(self, device: str, part: dict[str, Any]) -> None:
        number, size = part["number"], part.get("size", "rest")
        node = partition_node(device, number)
        length = 0 if is_rest(size) else size_bytes(size)
        words = [f"size={length // 512}" if length else "size=+", f"type={part.get('type', 'linux')}"]
        if part.get("name"):
            words.append(f'name="{part["name"]}"')
        line = f"{node} : {', '.join(words)}\n"
        command = ["sfdisk", "--quiet", "--append", "--no-reread", "--no-tell-kernel", device]
        self._step(f"partition {number} of {device} ({size})", command, line)
        self.coming[node] = length or self.machine.size(device)
        if self.apply:
            self.machine.run(["partx", "--add", "--nr", str(number), device], "")
            self._wait_for(device, node, number)

    def _wait_for(self, device: str, node: str, number: int) -> None:
        self.machine.run(["udevadm", "settle", "--timeout=10"], "")
        kernel = self.machine.kernel_name(device)
        folder = f"/sys/class/block/{partition_node(kernel, number)}"
        for _ in range(20):
            if self.machine.is_block(node):
                return
            numbers = self.machine.text(f"{folder}/dev").strip()
            if numbers and not device.startswith("/dev/disk/"):  # nobody makes device nodes in a container
                major, minor = numbers.split(":")
                os.mknod(self.machine.at(node), stat.S_IFBLK | 0o660, os.makedev(int(major), int(minor)))
                return
            time.sleep(0.25)
        raise RefusalError(f"{node} was made but did not appear; `partx --update {device}` and run again")

    # -- LVM

    def _group(self, group: dict[str, Any]) -> None:
        name, devices = group["name"], group["devices"]
        there = name in self.room
        purpose = f"a member of volume group {name}"
        new = []
        for device in devices:
            found = self.machine.signatures(device) if self._present(device, purpose) else []
            owner = self.machine.group_of(device) if {one.type for one in found} == {"LVM2_member"} else None
            if owner == name:
                continue
            if found and owner != "":  # a member without a group is what a run that was killed here leaves
                self._clear(device, purpose, found)
                found = []
            if not found:
                self._step(f"physical volume on {device}", ["pvcreate", "--quiet", device])
            new.append(device)
        if not new:
            return
        if there and len(new) == len(devices):
            raise RefusalError(
                f"volume group {name} is there, and none of {', '.join(devices)} belongs to it. Give another name in "
                "storage_volume_groups, or list the devices that it has (`pvs`)"
            )
        size = sum(self.coming.get(device) or self.machine.size(device) for device in new)
        self._step(f"volume group {name}", ["vgextend" if there else "vgcreate", "--quiet", name, *new])
        self.room[name] = self.machine.groups().get(name, 0) if self.apply else self.room.get(name, 0) + size

    def _logical_volume(self, volume: dict[str, Any]) -> str:
        group, name, size = volume["volume_group"], volume["name"], volume.get("size", "rest")
        device = f"/dev/{group}/{name}"
        if group not in self.room:
            raise RefusalError(
                f"volume {name} is to be in volume group {group}, which this host does not have; "
                "add it to storage_volume_groups"
            )
        has = self.machine.logical_volumes(group).get(name)
        wanted = self.room[group] if is_rest(size) else size_bytes(size)
        more = wanted - (has or 0)
        if has is not None and (is_rest(size) or more <= 0):
            if more < -(64 * UNITS["M"]) and not is_rest(size):
                self.result.notes.append(f"volume {name} has {human(has)}, more than {size}; nothing is shrunk")
            return device
        if not self.machine.has_device_mapper():
            raise RefusalError(
                f"volume {name} needs LVM's logical volumes, and this kernel has no device-mapper. "
                "Name a partition as its `device` instead of a volume_group"
            )
        if more > self.room[group]:
            raise RefusalError(
                f"volume {name} needs {human(more)} in volume group {group}, which has {human(self.room[group])} free. "
                "Lower its size, or add a device to the group"
            )
        self.room[group] -= more
        if has is None:
            amount = ["--extents", "100%FREE"] if is_rest(size) else ["--size", f"{wanted}b"]
            make = ["lvcreate", "--quiet", "--yes", "--wipesignatures", "y", "--name", name, *amount, group]
            self._step(f"logical volume {device} ({size})", make)
            self.coming[device] = wanted
        else:
            grow = ["lvextend", "--quiet", "--resizefs", "--size", f"{wanted}b", device]
            self._step(f"grow {device} from {human(has)} to {size}", grow)
        return device

    # -- file systems and mounts

    def _volume(self, volume: dict[str, Any]) -> None:
        if volume.get("state", "present") == "absent":
            self._unmount(volume)
            return
        device = self._logical_volume(volume) if volume.get("volume_group") else volume["device"]
        kind, mount = volume.get("filesystem", "xfs"), volume.get("mount", "")
        label = volume.get("label") or volume["name"]
        purpose = f"volume {volume['name']} ({kind} labelled {label})"
        if len(label) > LABEL_LENGTH[kind]:
            raise RefusalError(
                f"label {label} of volume {volume['name']} is longer than {kind} takes ({LABEL_LENGTH[kind]})"
            )
        found = self.machine.signatures(device) if self._present(device, purpose) else []
        if found and not self._is_ours(device, found, kind, label, mount):
            self._clear(device, purpose, found)
            found = []
        if not found:
            options = volume.get("mkfs_options", "").split()
            self._step(f"{kind} on {device}", [*MKFS[kind], "-L", label, *options, device])
        if mount:
            self._mount(volume, device, kind, mount)

    def _is_ours(self, device: str, found: list[Signature], kind: str, label: str, mount: str) -> bool:
        if [one.type for one in found] != [kind]:
            return False
        number = self.machine.number(device)
        return found[0].label == label or (bool(number) and Mount(number, mount) in self.machine.mounts())

    def _mount(self, volume: dict[str, Any], device: str, kind: str, mount: str) -> None:
        here = [one for one in self.machine.mounts() if one.path == mount]
        number = self.machine.number(device) if self.machine.is_block(device) else ""
        if here and here[-1].number != number:
            raise RefusalError(
                f"{mount} is to hold volume {volume['name']}, but something else is mounted there (`findmnt {mount}`)"
            )
        if mount in self.machine.fstab():  # the installer's entry: it serves
            if not here:
                self._step(f"mount {mount} (from /etc/fstab)", ["mount", mount])
            return
        if not here and self.machine.at(mount).is_dir() and any(self.machine.at(mount).iterdir()):
            raise RefusalError(
                f"{mount} is to hold volume {volume['name']}, but the folder is not empty and the mount would hide its "
                "content; move the content away"
            )
        if not here:
            self.pending[mount] = self.coming.get(device) or self.machine.size(device)
        unit = unit_name(mount)
        text = (
            "# Written by the role storage of Citadel LLM from storage_volumes.\n"
            f"[Unit]\nDescription=Citadel LLM volume {volume['name']}\n\n"
            f"[Mount]\nWhat={device}\nWhere={mount}\nType={kind}\nOptions={volume.get('options') or 'defaults'}\n\n"
            "[Install]\nWantedBy=local-fs.target\n"
        )
        if self.machine.text(f"{UNIT_FOLDER}/{unit}") != text:
            self._write_unit(unit, text)
            if here:
                self._step(f"remount {mount}", ["systemctl", "reload", unit])
        if not here or not self.machine.at(f"{UNIT_FOLDER}/local-fs.target.wants/{unit}").is_symlink():
            self._step(f"mount {mount}, now and at every boot", ["systemctl", "enable", "--quiet", "--now", unit])

    def _write_unit(self, unit: str, text: str) -> None:
        self.result.steps.append(f"write /{UNIT_FOLDER}/{unit}")
        if self.apply:
            path = self.machine.at(f"{UNIT_FOLDER}/{unit}")
            path.write_text(text)
            path.chmod(0o644)
        self._step("reread the units", ["systemctl", "daemon-reload"])

    def _unmount(self, volume: dict[str, Any]) -> None:
        unit = unit_name(volume.get("mount") or "/")
        path = self.machine.at(f"{UNIT_FOLDER}/{unit}")
        if not path.exists():
            return
        command = ["systemctl", "disable", "--quiet", "--now", unit]
        self._step(f"unmount {volume['mount']}, its content stays on the device", command)
        self.result.steps.append(f"remove /{UNIT_FOLDER}/{unit}")
        if self.apply:
            path.unlink()
        self._step("reread the units", ["systemctl", "daemon-reload"])

    # -- room

    def _space(self, entry: dict[str, Any]) -> dict[str, Any]:
        path = entry["path"]
        above = [mount for mount in self.pending if path == mount or path.startswith(f"{mount}/")]
        if above and not self.apply:
            size = free = float(self.pending[max(above, key=len)])
        else:
            there = self.machine.at(path)
            while not there.exists():
                there = there.parent
            figures = os.statvfs(there)
            size, free = float(figures.f_blocks * figures.f_frsize), float(figures.f_bavail * figures.f_frsize)
        short = []
        for key, has, what in (("size_gb", size, "in all"), ("free_gb", free, "free")):
            wanted = float(entry.get(key) or 0)
            if has < wanted * 1e9:
                short.append(f"{wanted:g} GB {what} asked for, {human(has)} there")
        return {
            "path": path,
            "size_gb": round(size / 1e9, 1),
            "free_gb": round(free / 1e9, 1),
            "shortfall": f"{path}: {' and '.join(short)}" if short else "",
        }


def main() -> None:
    from ansible.module_utils.basic import AnsibleModule  # only Ansible has it; the classes above are tested without

    lists = {"type": "list", "elements": "dict", "default": []}
    module = AnsibleModule(
        argument_spec={
            "disks": lists,
            "volume_groups": lists,
            "volumes": lists,
            "space": lists,
            "allow_format": {"type": "list", "elements": "str", "default": []},
            "apply": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )

    def run(command: list[str], stdin: str) -> tuple[int, str, str]:
        if module.get_bin_path(command[0]) is None:
            return 127, "", f"{command[0]} is not installed"
        answer: tuple[int, str, str] = module.run_command(command, data=stdin or None)
        return answer

    given: dict[str, Any] = module.params
    layout = Layout(Machine(Path("/"), run), given["allow_format"], apply=given["apply"] and not module.check_mode)
    try:
        result = layout.bring_about(given["disks"], given["volume_groups"], given["volumes"], given["space"])
    except (RefusalError, OSError) as error:
        module.fail_json(msg=str(error), steps=layout.result.steps)
    steps = "".join(f"{step}\n" for step in result.steps)
    module.exit_json(
        changed=bool(result.steps) and given["apply"],
        steps=result.steps,
        refusals=result.refusals,
        notes=result.notes,
        space=result.space,
        diff={"before": "", "after": steps, "before_header": "steps", "after_header": "steps"},
    )


if __name__ == "__main__":
    main()
