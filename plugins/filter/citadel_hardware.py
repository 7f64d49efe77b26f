"""Hardware facts against what the platform asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NOT_A_DISK = ("loop", "ram", "zram", "sr", "fd", "dm-", "md")
# A part sold as 128 GB shows a little less: firmware, graphics and the kernel keep some for themselves.
RESERVED_SHARE = 0.06


def memory_gb(facts: dict[str, Any]) -> float:
    """Installed memory in GB of 1024 MiB, as memory is sold."""
    return float(facts.get("memtotal_mb", 0)) / 1024


def cores(facts: dict[str, Any]) -> int:
    """Physical cores; a hyper-thread is not a core."""
    physical = int(facts.get("processor_count") or 0) * int(facts.get("processor_cores") or 0)
    return physical or int(facts.get("processor_vcpus") or 0)


def disk_gb(facts: dict[str, Any]) -> float:
    """All fixed disks together in GB of 10^9 bytes, as disks are sold."""
    total = 0
    for name, disk in (facts.get("devices") or {}).items():
        if not name.startswith(NOT_A_DISK) and str(disk.get("removable", "0")) == "0":
            total += int(disk.get("sectors") or 0) * 512  # the kernel counts in sectors of 512 whatever the disk says
    return total / 1e9


def hardware_shortfalls(facts: dict[str, Any], requirements: dict[str, Any]) -> list[str]:
    """One line for each requirement that the host does not meet; an empty list if it meets all.

    ``facts`` are Ansible's; a requirement of 0, "" or [] asks for nothing.
    """
    found: list[str] = []

    def least(key: str, what: str, has: float, unit: str = "", allowance: float = 0) -> None:
        wanted = float(requirements.get(key) or 0)
        if has < wanted * (1 - allowance):
            found.append(f"{what}: {wanted:g}{unit} required, {has:.1f}{unit} found".replace(".0 ", " "))

    least("memory_gb", "memory", memory_gb(facts), " GB", allowance=RESERVED_SHARE)
    least("cores", "physical cores", cores(facts))
    least("disk_gb", "disks", disk_gb(facts), " GB", allowance=0.005)

    architecture = requirements.get("architecture") or ""
    if architecture and facts.get("architecture") != architecture:
        found.append(f"architecture: {architecture} required, {facts.get('architecture', 'nothing')} found")

    have = set(facts.get("flags") or [])
    lacking = [flag for flag in requirements.get("cpu_flags") or [] if flag not in have]
    if lacking:
        found.append(f"processor: lacks {', '.join(lacking)} (/proc/cpuinfo)")

    systems = requirements.get("systems") or []
    system = f"{facts.get('distribution', '?')} {facts.get('distribution_version', '?')}"
    if systems and not any(f"{system}.".startswith(f"{one}.") or f"{system} ".startswith(f"{one} ") for one in systems):
        found.append(f"system: {' or '.join(systems)} required, {system} found")
    return found


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"hardware_shortfalls": hardware_shortfalls}
