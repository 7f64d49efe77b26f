"""How a command asks the control process of this host: HTTP over its Unix socket.

The key is the one that is given (`--key-file`, $CITADEL_GATEWAY_KEY), else the local key, which the control process
keeps in its state folder: whoever may read that file (root, the gateway's own user) administers this host anyway.
"""

import argparse
import getpass
import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

from citadel_gateway.settings import ConfigError, Gateway, local_key_path


class Failed(Exception):  # noqa: N818  # an outcome of the command, not an error of the program
    """The command cannot do what it was asked to; the message is for the operator. `main` prints it and ends with 1."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status  # of the answer; 0 when there was none


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Client:
    """One question, one connection."""

    def __init__(self, settings: Gateway, key: str, timeout: float = 30.0) -> None:
        self.socket = settings.control_socket
        self.key = key
        self.timeout = timeout

    def raw(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> bytes:
        """The answer's body as it came; `Failed` for any other status than 2xx."""
        connection = UnixConnection(self.socket, self.timeout)
        lines = {"Authorization": f"Bearer {self.key}", "X-Citadel-Actor": operator(), **(headers or {})}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            lines["Content-Type"] = "application/json"
        try:
            connection.request(method, path, data, lines)
            reply = connection.getresponse()
            answer = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{self.socket}: the control process does not answer: {error}") from None
        finally:
            connection.close()
        if not 200 <= reply.status < 300:
            raise Failed(message_of(answer), reply.status)
        return answer

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The answer as an object (None when there is nothing in it)."""
        answer = self.raw(method, path, body)
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            raise Failed(f"{self.socket}: the control process answers {path} with something else than JSON") from None


def message_of(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode("utf-8", "replace") or "refused without a reason"


def operator() -> str:
    """Who sits at the terminal, for the audit log; believed only together with the local key."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return str(os.getuid())


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """For every command that asks the control process."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="file with a key of the needed scope (default: $CITADEL_GATEWAY_KEY, else the local key of this host)",
    )


def given_key(options: argparse.Namespace) -> str:
    """The key that the operator names; empty: none."""
    return read_key(options.key_file) if options.key_file else os.environ.get("CITADEL_GATEWAY_KEY", "")


def client_of(settings: Gateway, options: argparse.Namespace) -> Client:
    """The client of a command with `add_key_options`."""
    return Client(settings, given_key(options) or local_key(settings))


def local_key(settings: Gateway) -> str:
    path = local_key_path(settings)
    if not path.exists() and os.access(path.parent, os.X_OK):
        raise ConfigError(f"{path}: not there: the control process makes it when it starts")
    return read_key(path)


def read_key(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
