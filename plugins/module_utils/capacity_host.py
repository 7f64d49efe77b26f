"""Facts of the host it runs on, as the capacity plan takes them: from /proc, /sys and the units of the models."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .capacity_model import format_cpus, parse_cpus


def read_facts(models_dir: str, root: Path = Path("/"), allowed: frozenset[int] | None = None) -> dict[str, Any]:
    """Memory (bytes), physical cores with their CPUs, flags, memory nodes, and free disk for the models.

    `allowed`: CPUs that may be used at all (in a container fewer than the machine has); default those of process 1.
    """
    if allowed is None:
        allowed = frozenset(os.sched_getaffinity(1))
    cpus = root / "sys/devices/system/cpu"
    online = set(parse_cpus((cpus / "online").read_text())) & allowed
    cores = dict.fromkeys(_siblings(cpus / f"cpu{n}", n, online) for n in sorted(online))
    return {
        "memory_bytes": _meminfo(root / "proc/meminfo", r"MemTotal:\s+(\d+) kB"),
        "cores": len(cores),
        "threads_per_core": max(len(core) for core in cores),
        "topology": [format_cpus(core) for core in cores],
        "numa": [
            {
                "cpus": (node / "cpulist").read_text().strip(),
                "memory_bytes": _meminfo(node / "meminfo", r"Node \d+ MemTotal:\s+(\d+) kB"),
            }
            for node in sorted(
                (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])
            )
        ],
        "cpu_flags": _flags(root / "proc/cpuinfo"),
        "models_disk_free_bytes": _free_bytes(root / models_dir.lstrip("/")),
    }


def read_allocated(root: Path = Path("/")) -> dict[str, str]:
    """CPU lists that models have on this host: AllowedCPUs= in the drop-ins of citadel-llm@<model>.service."""
    found: dict[str, str] = {}
    for file in sorted((root / "etc/systemd/system").glob("citadel-llm@?*.service.d/*.conf")):
        lists = re.findall(r"^AllowedCPUs=([0-9, -]+)$", file.read_text(), re.MULTILINE)
        if lists:
            name = file.parent.name.removeprefix("citadel-llm@").removesuffix(".service.d")
            found[name] = format_cpus(parse_cpus(lists[-1].replace(" ", ",")))
    return found


def _siblings(cpu: Path, number: int, online: set[int]) -> tuple[int, ...]:
    """The usable CPUs of this CPU's core; a machine that does not say (some virtual ones) has one a core."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        file = cpu / "topology" / name
        if file.is_file():
            return tuple(n for n in parse_cpus(file.read_text()) if n in online)
    return (number,)


def _meminfo(file: Path, pattern: str) -> int:
    match = re.search(pattern, file.read_text()) if file.is_file() else None
    return int(match[1]) * 1024 if match else 0


def _flags(file: Path) -> list[str]:
    match = re.search(r"^flags\s*:(.*)$", file.read_text(), re.MULTILINE)
    return match[1].split() if match else []


def _free_bytes(folder: Path) -> int:
    """Free bytes for an unprivileged user where the folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
