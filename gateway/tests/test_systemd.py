"""Passed sockets and notifications."""

import os
import socket
from pathlib import Path

import pytest
from citadel_gateway import systemd


def test_sockets_are_taken_only_by_whom_they_were_given_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert systemd.passed_sockets() == []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = os.dup(listener.fileno())
        monkeypatch.setattr(systemd, "FIRST_FD", fd)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        (found,) = systemd.passed_sockets()
        assert found.getsockname() == listener.getsockname()
        assert not found.get_inheritable()
        found.close()
    assert "LISTEN_FDS" not in os.environ


def test_notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    for address in (str(tmp_path / "n"), f"@citadel-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            systemd.notify("READY=1", "STATUS=fine")
            assert manager.recv(100) == b"READY=1\nSTATUS=fine"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.notify("READY=1")


def test_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert systemd.watchdog_interval() == 0
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    assert systemd.watchdog_interval() == 5
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval() == 0
