"""The host is rebooted and everything comes back. Then the lab is taken down and nothing is left."""

import os
import re
import subprocess
from pathlib import Path

from .conftest import MODELS, Lab, engine

BOOT_SECONDS = 900


def test_reboot_brings_everything_back_in_order(lab: Lab) -> None:
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = lab.ssh(boot_id)
    lab.ssh("systemctl reboot", check=False)
    lab.wait_until(
        "the host is up again",
        lambda: (now := lab.ssh(boot_id, check=False)) != before and re.fullmatch(r"[0-9a-f-]{36}", now) is not None,
        120,
    )
    most = 0

    def all_active() -> bool:
        nonlocal most
        states = [lab.show(engine(model), "ActiveState") for model in MODELS]
        most = max(most, states.count("activating"))
        return states == ["active"] * len(MODELS)

    lab.wait_until("every engine is active", all_active, BOOT_SECONDS, pause=3)
    assert 0 < most <= 4
    lab.wait_until("every model generates", lambda: all(lab.generates(model) for model in MODELS), 60)


def leftovers() -> str:
    """What belongs to the lab and is on this machine."""
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if "citadel-lab" in line]
    groups = [str(path) for path in Path("/sys/fs/cgroup").rglob("lab-*") if path.is_dir()]
    loops = subprocess.run(["losetup", "-a"], text=True, capture_output=True, check=False).stdout.splitlines()
    spaces = subprocess.run(["ip", "netns", "list"], text=True, capture_output=True, check=False).stdout.splitlines()
    processes = [
        path.name
        for path in Path("/proc").glob("[0-9]*")
        if path.joinpath("cmdline").exists() and b"systemd-nspawn" in path.joinpath("cmdline").read_bytes()
    ]
    return "\n".join([*mounts, *groups, *loops, *(s for s in spaces if "citadel-lab" in s), *processes])


def test_down_leaves_nothing(lab: Lab) -> None:
    """Only where this run may take the lab down: CI says so with CI=true."""
    if os.environ.get("CI") != "true":
        return
    assert leftovers(), "nothing to see before either: the test looks in the wrong places"
    lab.run("lab/lab", "down")
    assert leftovers() == ""
