"""The hardware requirements of task 0.1: every shortfall in one list."""

from typing import Any

import pytest
from filter.citadel_hardware import FilterModule, hardware_shortfalls

GIVEN = {
    "memory_gb": 128,
    "cores": 16,
    "disk_gb": 6000,
    "architecture": "x86_64",
    "cpu_flags": ["avx512f"],
    "systems": ["Ubuntu 24.04", "Debian 12"],
}


def server(**other: Any) -> dict[str, Any]:
    return {
        "memtotal_mb": 128 * 1024 - 3500,
        "processor_count": 1,
        "processor_cores": 16,
        "processor_vcpus": 32,
        "architecture": "x86_64",
        "flags": ["avx2", "avx512f"],
        "distribution": "Ubuntu",
        "distribution_version": "24.04",
        "devices": {
            "nvme0n1": {"sectors": "11721045168", "sectorsize": "4096", "removable": "0"},
            "loop0": {"sectors": "99999999999", "removable": "0"},
        },
        **other,
    }


def test_the_given_server_is_enough() -> None:
    assert hardware_shortfalls(server(), GIVEN) == []


def test_nothing_asked_for_is_always_met() -> None:
    assert hardware_shortfalls({}, {}) == []


def test_every_shortfall_is_named_at_once() -> None:
    small = server(
        memtotal_mb=24000,
        processor_cores=1,
        processor_count=2,
        architecture="aarch64",
        flags=[],
        distribution_version="22.04",
        devices={"vda": {"sectors": "1000000000", "removable": "0"}, "sdz": {"sectors": "1", "removable": "1"}},
    )
    assert hardware_shortfalls(small, GIVEN) == [
        "memory: 128 GB required, 23.4 GB found",
        "physical cores: 16 required, 2 found",
        "disks: 6000 GB required, 512 GB found",
        "architecture: x86_64 required, aarch64 found",
        "processor: lacks avx512f (/proc/cpuinfo)",
        "system: Ubuntu 24.04 or Debian 12 required, Ubuntu 22.04 found",
    ]


def test_hyper_threads_are_not_cores() -> None:
    assert hardware_shortfalls(server(processor_cores=8), GIVEN) == ["physical cores: 16 required, 8 found"]


def test_host_that_tells_threads_only() -> None:
    assert hardware_shortfalls(server(processor_cores=0, processor_vcpus=16), GIVEN) == []


@pytest.mark.parametrize(
    ("version", "fits"), [("12", True), ("12.11", True), ("13", False), ("1", False), ("120", False)]
)
def test_a_point_release_is_the_same_system(version: str, fits: bool) -> None:
    facts = server(distribution="Debian", distribution_version=version)
    assert (hardware_shortfalls(facts, GIVEN) == []) is fits


def test_filter_is_known_to_ansible() -> None:
    assert FilterModule().filters()["hardware_shortfalls"] is hardware_shortfalls
