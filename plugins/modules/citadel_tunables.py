#!/usr/bin/python
"""Apply and persist kernel settings, and say which of them this host does not let us set."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENTATION = r"""
module: citadel_tunables
short_description: Apply and persist sysctl, transparent huge pages, CPU governor and I/O scheduler
description:
  - Writes one file for each kind of setting, so that a reboot keeps it, and sets the running kernel to the same.
  - A setting that the host does not have, or does not let us change (a container, a virtual machine), is no failure.
    It is returned in C(not_settable) with the reason, and its file is written all the same.
  - An empty option removes the file that an earlier run wrote.
options:
  sysctl:
    description: Kernel parameters by name. A value is compared word by word, so blanks and tabs do not matter.
    type: dict
    default: {}
  transparent_hugepages:
    description: Files of /sys/kernel/mm/transparent_hugepage by name, and the word to select in each.
    type: dict
    default: {}
  cpu_governor:
    description: Frequency governor of every core, for instance C(performance). Empty leaves it alone.
    type: str
    default: ""
  io_scheduler:
    description: Scheduler by pattern of the disk's name, for instance C(nvme*). The first pattern that fits wins.
    type: dict
    default: {}
author: [Citadel LLM]
"""

EXAMPLES = r"""
- name: Tune the kernel
  citadel_tunables:
    sysctl: {vm.swappiness: "10"}
    transparent_hugepages: {enabled: madvise}
    cpu_governor: performance
    io_scheduler: {"nvme*": none}
"""

RETURN = r"""
not_settable:
  description: What this host does not let us set, a line each.
  type: list
  returned: always
overridden:
  description: Parameters that a later file of sysctl.d sets to something else at the next boot.
  type: list
  returned: always
released:
  description: Parameters that were ours before; they keep their value until the next boot.
  type: list
  returned: always
"""

SYSCTL_FILE = "etc/sysctl.d/90-citadel.conf"
TMPFILES_FILE = "etc/tmpfiles.d/90-citadel-tunables.conf"
UDEV_FILE = "etc/udev/rules.d/90-citadel-io-scheduler.rules"
HEADER = "# Written by the role base_system of Citadel LLM; a change here is lost at the next run.\n"
SYSCTL_DIRECTORIES = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")
NOT_A_DISK = ("loop*", "ram*", "zram*", "sr*", "fd*", "dm-*", "md*")


@dataclass
class Outcome:
    """What was changed, what could not be, and what ``--diff`` shows: each file, and the running kernel."""

    files: list[dict[str, str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    not_settable: list[str] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.files or self.before)

    @property
    def diff(self) -> list[dict[str, str]]:
        kernel = {"before": "\n".join([*self.before, ""]), "after": "\n".join([*self.after, ""])}
        where = "the running kernel"
        return [*self.files, *([{**kernel, "before_header": where, "after_header": where}] if self.before else [])]


def sysctl_path(name: str) -> str:
    """The file of a parameter. ``net/ipv4/conf/eth0.1/x`` may be written with slashes, as sysctl.d itself allows."""
    return "proc/sys/" + (name if "/" in name else name.replace(".", "/"))


def selected(text: str) -> str:
    """The chosen word of ``always [madvise] never``; a file without brackets holds just its value."""
    for word in text.split():
        if word.startswith("[") and word.endswith("]"):
            return word[1:-1]
    return " ".join(text.split())


def parse_sysctl(text: str) -> dict[str, str]:
    """A file of sysctl.d as names and values."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            found[name.strip().lstrip("-").replace("/", ".")] = " ".join(value.split())
    return found


class Tunables:
    """The settings of one host. ``root`` is ``/``, in a test a folder that looks like one."""

    def __init__(self, root: Path, *, check: bool) -> None:
        self.root = root
        self.check = check
        self.outcome = Outcome()

    def apply(
        self,
        sysctl: dict[str, str],
        transparent_hugepages: dict[str, str],
        cpu_governor: str,
        io_scheduler: dict[str, str],
    ) -> Outcome:
        self._sysctl(sysctl)
        self._boot_files(transparent_hugepages, cpu_governor, io_scheduler)
        for name, value in transparent_hugepages.items():
            self._set(f"transparent_hugepage/{name}", f"sys/kernel/mm/transparent_hugepage/{name}", value)
        if cpu_governor:
            self._governor(cpu_governor)
        for disk in sorted(p.name for p in self._folder("sys/block")):
            wanted = self._scheduler_of(disk, io_scheduler)
            if wanted:
                self._set(f"I/O scheduler of {disk}", f"sys/block/{disk}/queue/scheduler", wanted)
        return self.outcome

    def _sysctl(self, wanted: dict[str, str]) -> None:
        old = parse_sysctl(self._read(SYSCTL_FILE) or "")
        self._file(SYSCTL_FILE, "".join(f"{name} = {value}\n" for name, value in sorted(wanted.items())))
        for name, value in sorted(wanted.items()):
            self._set(f"sysctl {name}", sysctl_path(name), value)
        for name in sorted(old.keys() - wanted.keys()):
            now = selected(self._read(sysctl_path(name)) or "?")
            self.outcome.released.append(f"sysctl {name} is not managed any more; it stays {now} until the next boot")
        self._later_files(wanted)

    def _later_files(self, wanted: dict[str, str]) -> None:
        """systemd reads all folders as one, sorted by file name, one name once, from the first folder."""
        files: dict[str, Path] = {}
        for folder in SYSCTL_DIRECTORIES:
            for path in self._folder(folder):
                if path.name.endswith(".conf"):
                    files.setdefault(path.name, path)
        for name in sorted(n for n in files if n > Path(SYSCTL_FILE).name):
            try:
                values = parse_sysctl(files[name].read_text())
            except OSError:
                continue
            for key, value in values.items():
                ours = wanted.get(key)
                if ours is not None and " ".join(ours.split()) != value:
                    where = files[name].relative_to(self.root)
                    self.outcome.overridden.append(f"sysctl {key}: /{where} sets {value} after us, we want {ours}")

    def _boot_files(self, hugepages: dict[str, str], governor: str, schedulers: dict[str, str]) -> None:
        # "w-": a file that is not there, or read-only, does not make the boot "degraded".
        lines = [f"w- /sys/kernel/mm/transparent_hugepage/{n} - - - - {v}\n" for n, v in sorted(hugepages.items())]
        if governor:
            lines.append(f"w- /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor - - - - {governor}\n")
        self._file(TMPFILES_FILE, "".join(lines))
        disk = 'ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", '
        rule = disk + 'KERNEL=="%s", ATTR{queue/scheduler}="%s"\n'
        # udev applies every rule that fits, the last one wins: our first pattern has to come last.
        self._file(UDEV_FILE, "".join(rule % item for item in reversed(schedulers.items())))

    def _governor(self, wanted: str) -> None:
        files = sorted((self.root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
        if not files:
            self.outcome.not_settable.append(f"CPU governor {wanted}: this host has no cpufreq")
            return
        refused = {}
        for path in files:
            core = path.parts[-3]
            reason = self._set(f"CPU governor of {core}", str(path.relative_to(self.root)), wanted, report=False)
            if reason:
                refused[core] = reason
        if refused:
            reason = next(iter(refused.values()))
            self.outcome.not_settable.append(f"CPU governor {wanted}: {len(refused)} of {len(files)} cores: {reason}")

    def _scheduler_of(self, disk: str, schedulers: dict[str, str]) -> str:
        if any(fnmatch.fnmatch(disk, pattern) for pattern in NOT_A_DISK):
            return ""
        return next((value for pattern, value in schedulers.items() if fnmatch.fnmatch(disk, pattern)), "")

    def _set(self, title: str, path: str, wanted: str, *, report: bool = True) -> str:
        """Bring one file of the kernel to ``wanted``; the reason if that cannot be, else an empty string."""
        wanted = " ".join(str(wanted).split())
        reason = ""
        text = self._read(path)
        if text is None:
            reason = "this kernel does not have it"
        elif selected(text) != wanted:
            if "[" in text and wanted not in text.replace("[", "").replace("]", "").split():
                reason = f"this kernel offers {' '.join(text.split())}"
            else:
                reason = self._write(title, path, selected(text), wanted)
        if reason and report:
            self.outcome.not_settable.append(f"{title} = {wanted}: {reason}")
        return reason

    def _write(self, title: str, path: str, now: str, wanted: str) -> str:
        if not os.access(self.root / path, os.W_OK):
            return f"read-only here, stays {now}"
        if not self.check:
            try:
                (self.root / path).write_text(wanted + "\n")
            except OSError as error:
                return f"{error.strerror}, stays {now}"
            kept = selected(self._read(path) or "")
            if kept != wanted:
                return f"the kernel keeps {kept}"
        self.outcome.before.append(f"{title} = {now}")
        self.outcome.after.append(f"{title} = {wanted}")
        return ""

    def _file(self, path: str, body: str) -> None:
        """A file of ours with this body; no file if there is nothing to say."""
        target = self.root / path
        old = self._read(path)
        new = HEADER + body if body else None
        if old == new:
            return
        where = f"/{path}"
        change = {"before": old or "", "after": new or "", "before_header": where, "after_header": where}
        self.outcome.files.append(change)
        if self.check:
            return
        if new is None:
            target.unlink()
            return
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.new")
        beside.write_text(new)
        beside.chmod(0o644)
        beside.replace(target)

    def _read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text()
        except OSError:
            return None

    def _folder(self, path: str) -> list[Path]:
        try:
            return list((self.root / path).iterdir())
        except OSError:
            return []


def main() -> None:
    from ansible.module_utils.basic import AnsibleModule  # only Ansible has it; the classes above are tested without

    module = AnsibleModule(
        argument_spec={
            "sysctl": {"type": "dict", "default": {}},
            "transparent_hugepages": {"type": "dict", "default": {}},
            "cpu_governor": {"type": "str", "default": ""},
            "io_scheduler": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    values: dict[str, Any] = module.params
    outcome = Tunables(Path("/"), check=module.check_mode).apply(
        {name: str(value) for name, value in values["sysctl"].items()},
        {name: str(value) for name, value in values["transparent_hugepages"].items()},
        values["cpu_governor"],
        {name: str(value) for name, value in values["io_scheduler"].items()},
    )
    module.exit_json(
        changed=outcome.changed,
        not_settable=outcome.not_settable,
        overridden=outcome.overridden,
        released=outcome.released,
        diff=outcome.diff,
    )


if __name__ == "__main__":
    main()
