"""The `citadel-gateway` command."""

import argparse
import hashlib
import http.client
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from citadel_gateway import __version__
from citadel_gateway.settings import ConfigError, Gateway, engine_key, gateway_problems, problems, read

DEFAULT_CONFIG = "/etc/citadel-gateway/gateway.json"
EX_CONFIG = 78  # systemd does not restart on it: the file must be changed first


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="citadel-gateway", description="OpenAI-compatible gateway in front of the model servers."
    )
    parser.add_argument("--version", action="version", version=f"citadel-gateway {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        if name != "hash-key":
            one.add_argument(
                "--config",
                default=os.environ.get("CITADEL_GATEWAY_CONFIG", DEFAULT_CONFIG),
                metavar="FILE",
                help="gateway.json (default: $CITADEL_GATEWAY_CONFIG, else %(default)s)",
            )
        return one

    worker = command("worker", "Run one worker on the listening socket that systemd passes (LISTEN_FDS).")
    worker.add_argument("number", type=int, metavar="N", help="this worker's number, from 1; names its metrics file")
    worker.add_argument(
        "--listen-fd", type=int, metavar="FD", help="an inherited listening socket, instead of LISTEN_FDS"
    )
    command("control", "Run the control process on its Unix socket.")
    command("serve", "Run the control process and all workers on this machine, without systemd; end them together.")
    command("check-config", "Check the three files; print a line for each problem and exit with 78 if there is one.")
    command("hash-key", "Read a key from standard input and print the sha256 that keys.json wants.")
    for name, text in (
        ("drain", "Let a model take no new requests (those in flight go on)."),
        ("resume", "Let a drained model take requests again."),
    ):
        one = command(name, f"{text} Talks to the control process of this host.")
        one.add_argument("model", metavar="MODEL", help="name or alias")
        one.add_argument(
            "--key-file",
            metavar="FILE",
            help="file with a key of scope admin (default: $CITADEL_GATEWAY_KEY, else the engine key of this host)",
        )
        one.add_argument(
            "--engine-key-file", metavar="FILE", help="the engine key, where gateway.json does not name it"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 78 for a configuration that cannot be used."""
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return EX_CONFIG


def run(options: argparse.Namespace) -> int:
    if options.command == "hash-key":
        return hash_key()
    if options.command == "check-config":
        return check_config(options.config)
    settings = read(options.config, Gateway)
    found = gateway_problems(settings, options.config)
    if found:
        raise ConfigError(*found)
    if options.command in ("drain", "resume"):
        return change_model(settings, options)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if options.command == "worker":
        return start_worker(settings, options)
    if options.command == "control":
        from citadel_gateway.control.app import run_control  # FastAPI is not loaded into workers

        return run_control(settings)
    from citadel_gateway.serve import run_serve

    engine_key(settings)
    return run_serve(settings, options.config)


def start_worker(settings: Gateway, options: argparse.Namespace) -> int:
    from citadel_gateway.systemd import adopted, passed_sockets
    from citadel_gateway.worker.process import run_worker

    listeners: list[socket.socket] = passed_sockets() if options.listen_fd is None else [adopted(options.listen_fd)]
    if not listeners:
        raise ConfigError("worker: no listening socket was passed (start it by its systemd unit, or use `serve`)")
    return run_worker(settings, options.number, listeners)


def hash_key() -> int:
    key = sys.stdin.readline().strip()
    if not key:
        print("hash-key: there is no key on standard input", file=sys.stderr)
        return 2
    print(hashlib.sha256(key.encode()).hexdigest())
    return 0


def check_config(path: str) -> int:
    found = problems(path)
    for line in found:
        print(line)
    if not found:
        print(f"{path}: the configuration is in order")
    return EX_CONFIG if found else 0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def key_for(settings: Gateway, options: argparse.Namespace) -> tuple[str, str]:
    """The path and the key: an admin's, or the engine key that only root and the engines can read."""
    own = os.environ.get("CITADEL_GATEWAY_KEY", "")
    if options.key_file:
        own = read_key(options.key_file)
    if own:
        return f"/admin/models/{options.model}/{options.command}", own
    path = f"/internal/models/{options.model}/{options.command}?reason=operator"
    return path, read_key(options.engine_key_file) if options.engine_key_file else engine_key(settings)


def read_key(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def change_model(settings: Gateway, options: argparse.Namespace) -> int:
    path, key = key_for(settings, options)
    connection = UnixConnection(settings.control_socket)
    try:
        connection.request("POST", path, headers={"Authorization": f"Bearer {key}"})
        reply = connection.getresponse()
        answer = json.loads(reply.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"{settings.control_socket}: the control process does not answer: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if reply.status != 200:
        print(f"{options.model}: {answer['error']['message']}", file=sys.stderr)
        return 1
    print(f"{answer['model']}: {'draining' if answer['draining'] else 'taking requests'}")
    return 0
