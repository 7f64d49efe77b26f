"""What concerns this host alone: its processes, its files, its models' drain."""

import argparse
import hashlib
import logging
import os
import socket
import sys
from pathlib import Path
from urllib.parse import quote

from citadel_gateway.cli.client import Client, Failed, add_key_options, given_key, read_key
from citadel_gateway.cli.commands import DEFAULT_CONFIG, Commands
from citadel_gateway.settings import (
    ConfigError,
    Gateway,
    engine_key,
    local_key_path,
    problems,
    start_problems,
)

EX_CONFIG = 78  # systemd does not restart on it: the file must be changed first


def add(commands: Commands) -> None:
    worker = commands.add("worker", "Run one worker on the listening socket that systemd passes (LISTEN_FDS).", run_one)
    worker.add_argument("number", type=int, metavar="N", help="this worker's number, from 1; names its metrics file")
    worker.add_argument(
        "--listen-fd", type=int, metavar="FD", help="an inherited listening socket, instead of LISTEN_FDS"
    )
    commands.add("control", "Run the control process on its Unix socket.", run_control)
    check = commands.bare(
        "check-config", "Check all files; print a line for each problem and exit with 78 if there is one.", check_config
    )
    check.add_argument("--config", default=os.environ.get("CITADEL_GATEWAY_CONFIG", DEFAULT_CONFIG), metavar="FILE")
    commands.bare("hash-key", "Read a key from standard input and print the sha256 that keys.json wants.", hash_key)
    for name, text in (
        ("drain", "Let a model take no new requests (those in flight go on)."),
        ("resume", "Let a drained model take requests again."),
    ):
        one = commands.add(name, f"{text} Talks to the control process of this host.", change_model)
        one.add_argument("model", metavar="MODEL", help="name or alias")
        add_key_options(one)
        if name == "drain":
            one.add_argument("--here", action="store_true", help="on this host only, not on all of the same database")
        one.add_argument(
            "--engine-key-file", metavar="FILE", help="the engine key, where gateway.json does not name it"
        )


def talk() -> None:
    """The log of a process that serves."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def run_control(options: argparse.Namespace, settings: Gateway) -> int:
    from citadel_gateway.control import app  # FastAPI is not loaded into workers

    may_start(settings, options.config)
    talk()
    return app.run_control(settings)


def run_one(options: argparse.Namespace, settings: Gateway) -> int:
    from citadel_gateway.systemd import adopted, passed_sockets
    from citadel_gateway.worker.process import run_worker

    may_start(settings, options.config)
    talk()
    listeners: list[socket.socket] = passed_sockets() if options.listen_fd is None else [adopted(options.listen_fd)]
    if not listeners:
        raise ConfigError("worker: no listening socket was passed (start it by its systemd unit, or use `serve`)")
    return run_worker(settings, options.number, listeners)


def may_start(settings: Gateway, path: str) -> None:
    found = start_problems(settings, path)
    if found:
        raise ConfigError(*found)


def hash_key(options: argparse.Namespace) -> int:
    key = sys.stdin.readline().strip()
    if not key:
        print("hash-key: there is no key on standard input", file=sys.stderr)
        return 2
    print(hashlib.sha256(key.encode()).hexdigest())
    return 0


def check_config(options: argparse.Namespace) -> int:
    found = problems(options.config)
    for line in found:
        print(line)
    if not found:
        print(f"{options.config}: the configuration is in order")
    return EX_CONFIG if found else 0


def way_in(settings: Gateway, options: argparse.Namespace) -> tuple[str, str]:
    """The path and the key of drain and resume: an admin's or the local one, else the engine key."""
    key = given_key(options)
    if not key and not options.engine_key_file and os.access(local_key_path(settings), os.R_OK):
        key = read_key(local_key_path(settings))
    name = quote(options.model)
    if key:
        query = "?here=true" if options.command == "drain" and options.here else ""
        return f"/admin/models/{name}/{options.command}{query}", key
    path = f"/internal/models/{name}/{options.command}?reason=operator"
    return path, read_key(Path(options.engine_key_file)) if options.engine_key_file else engine_key(settings)


def change_model(options: argparse.Namespace, settings: Gateway) -> int:
    path, key = way_in(settings, options)
    try:
        answer = Client(settings, key, 10.0).ask("POST", path)
    except Failed as error:
        raise Failed(f"{options.model}: {error}" if error.status else str(error), error.status) from None
    print(f"{answer['model']}: {'draining' if answer['draining'] else 'taking requests'}")
    return 0
