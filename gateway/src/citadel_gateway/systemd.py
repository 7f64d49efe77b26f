"""The two words of systemd's protocols that we speak: passed sockets and notifications."""

import os
import socket
from contextlib import suppress

FIRST_FD = 3


def passed_sockets() -> list[socket.socket]:
    """The listening sockets that systemd (or whoever plays its part) has handed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return [adopted(fd) for fd in range(FIRST_FD, FIRST_FD + count)]


def adopted(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    found = socket.socket(fileno=fd)
    found.setblocking(False)
    return found


def notify(*words: str) -> None:
    """Tell the service manager; silently nothing when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto("\n".join(words).encode(), address)


def watchdog_interval() -> float:
    """Seconds between two signs of life, or 0 when nobody watches."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
