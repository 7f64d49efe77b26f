"""The lab's own network namespace and the way into it."""

import ctypes
import os
import signal
import time
from pathlib import Path

from common import NETWORK, run

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def setns(path: Path) -> None:
    """Move this process into the network namespace at ``path``. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _checked(_LIBC.setns(descriptor, CLONE_NEWNET))
    finally:
        os.close(descriptor)


def unshare_mounts() -> None:
    """Give this process a mount namespace of its own. Raises OSError."""
    _checked(_LIBC.unshare(CLONE_NEWNS))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (PR_SET_PDEATHSIG)."""
    _checked(_LIBC.prctl(1, signal.SIGKILL))


def exists() -> bool:
    return NETWORK.path.exists()


def create() -> None:
    """Make the namespace with its bridge, unless it is there."""
    if exists():
        return
    name, bridge = NETWORK.namespace, NETWORK.bridge
    run(["ip", "netns", "add", name])
    for words in (
        ["link", "set", "lo", "up"],
        ["link", "add", bridge, "type", "bridge"],
        ["address", "add", f"{NETWORK.gateway}/{NETWORK.prefix}", "dev", bridge],
        ["link", "set", bridge, "up"],
    ):
        run(["ip", "-n", name, *words])


def enter() -> None:
    """Move this process into the lab's network."""
    setns(NETWORK.path)


def inside() -> bool:
    """Whether this process already is in the lab's network."""
    return exists() and NETWORK.path.stat().st_ino == Path("/proc/self/ns/net").stat().st_ino


def _ancestors() -> set[int]:
    found, pid = set(), os.getpid()
    while pid > 1:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def remove() -> None:
    """End what still runs in the namespace (SSH masters, commands of `lab exec`), then remove it."""
    if not exists():
        return
    keep = _ancestors()
    for attempt in range(40):
        left = [
            pid for pid in map(int, run(["ip", "netns", "pids", NETWORK.namespace]).stdout.split()) if pid not in keep
        ]
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGTERM if attempt < 20 else signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    run(["ip", "netns", "delete", NETWORK.namespace])
