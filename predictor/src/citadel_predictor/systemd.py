"""What is said to the service manager."""

import os
import socket
from contextlib import suppress


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
