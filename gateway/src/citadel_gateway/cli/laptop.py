"""`citadel-gateway serve`: everything on this machine, without systemd. With `--backend` also without any file: the
models are asked from the backends, and what the gateway needs is kept in a folder of the user's.
"""

import argparse
import fcntl
import http.client
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from citadel_gateway.cli.client import Failed
from citadel_gateway.cli.commands import DEFAULT_CONFIG, Commands
from citadel_gateway.cli.local import may_start, talk
from citadel_gateway.keys import new_key
from citadel_gateway.metrics import write_atomically
from citadel_gateway.settings import (
    WORKERS,
    Address,
    Capability,
    ConfigError,
    Gateway,
    Keys,
    Listen,
    Model,
    Models,
    Name,
    engine_key,
    gateway_problems,
    read_gateway,
)

PATIENCE = 5.0  # seconds that a backend has for saying what it serves
CONTEXT = 131_072  # tokens, of a model whose server does not say
CAPABILITIES: tuple[Capability, ...] = ("chat", "completions", "embeddings", "responses", "messages", "tools")
LENGTHS = ("max_model_len", "context_length", "max_context_length", "context_window")
SCOPES = ("inference", "read", "metrics")


def add(commands: Commands) -> None:
    text = "Run the control process and all workers on this machine, without systemd; end them together."
    parser = commands.bare("serve", text, run)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"gateway.json (default: $CITADEL_GATEWAY_CONFIG, else {DEFAULT_CONFIG}); not with --backend",
    )
    own = parser.add_argument_group("without any file")
    own.add_argument(
        "--backend",
        action="append",
        metavar="[NAME=]URL",
        help="an OpenAI-compatible server (http://127.0.0.1:11434): all its models, or the one that is named",
    )
    own.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    own.add_argument("--address", default="127.0.0.1", help="default: %(default)s")
    own.add_argument("--folder", type=Path, metavar="DIR", help="where keys and usage are kept (default: %(default)s)")
    own.add_argument("--backend-key-file", metavar="FILE", help="the key that the backends want")
    parser.set_defaults(folder=state_folder())


def state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "citadel-gateway"


def run(options: argparse.Namespace) -> int:
    if not options.backend:
        return serve(options.config or os.environ.get("CITADEL_GATEWAY_CONFIG", DEFAULT_CONFIG))
    if options.config:
        raise ConfigError("serve: --config and --backend exclude each other")
    with alone(options.folder):
        settings = prepare(options)
        greet(settings, options.folder / "gateway.json")
        return serve(str(options.folder / "gateway.json"))


def serve(path: str) -> int:
    """Limits of several workers need Redis to be counted; without it there is one."""
    from citadel_gateway.serve import run_serve

    settings = read_gateway(path)
    found = gateway_problems(settings, path)
    if found:
        raise ConfigError(*found)
    if not settings.redis.url:
        os.environ[WORKERS] = "1"
        settings = read_gateway(path)
    may_start(settings, path)
    talk()
    engine_key(settings)
    return run_serve(settings, path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One gateway at a time works in the folder, which is nobody else's to read."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"{folder}: another gateway uses this folder (give --folder and --port)") from None
        yield


# the files ------------------------------------------------------------------------------------------------------------
def prepare(options: argparse.Namespace) -> Gateway:
    """Ask the backends and write what the processes read."""
    folder: Path = options.folder.absolute()
    for name in ("run", "state"):
        (folder / name).mkdir(exist_ok=True, mode=0o700)
    key_file = Path(options.backend_key_file).absolute() if options.backend_key_file else folder / "backend-key"
    if not options.backend_key_file and not key_file.exists():
        write_atomically(key_file, new_key().encode(), 0o600)  # a server that wants none takes any
    settings = Gateway(
        host=re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname()) or "laptop",
        listen=Listen(options.address, options.port),
        control_socket=str(folder / "run" / "control.sock"),
        run_dir=str(folder / "run"),
        state_dir=str(folder / "state"),
        models_file=str(folder / "models.json"),
        keys_file=str(folder / "keys.json"),
        policies_file=str(folder / "policies.json") if (folder / "policies.json").exists() else "",
        engine_key_file=str(key_file),
        access_log=str(folder / "access.jsonl"),
        workers=1,
    )
    models = find_models(options.backend, engine_key(settings))
    contents = {"models": models, "gateway": settings}
    if not (folder / "keys.json").exists():
        contents["keys"] = Keys(())
    for name, content in contents.items():
        write_atomically(folder / f"{name}.json", msgspec.json.format(msgspec.json.encode(content)), 0o600)
    return settings


def greet(settings: Gateway, config: Path) -> None:
    """What is served; and the first key, on the one occasion on which it is made."""
    from citadel_gateway.control import people
    from citadel_gateway.control.state import State
    from citadel_gateway.control.stored import Actor

    state = State(settings)
    state.look()
    if state.snapshot is None:
        raise ConfigError(state.problem)
    print("models: " + ", ".join(model.name for model in state.snapshot.models))
    if not people.list_keys(state, gone=True):
        actor = Actor("laptop", "local", "cli")
        _, key = people.create_key(state, actor, "me", scopes=SCOPES, new_user=True)
        print(f"key (shown this once): {key}")
    else:
        print(f"a new key: citadel-gateway keys create --user me --config {config}")
    state.database.close()


# the backends ---------------------------------------------------------------------------------------------------------
class Backend(Struct, frozen=True):
    """What was given as `[NAME=]URL`."""

    name: str
    host: str
    port: int
    url: str


def parsed(text: str) -> Backend:
    name, equals, url = text.partition("=")
    if not equals or "://" in name:
        name, url = "", text
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError as error:
        raise ConfigError(f"--backend {text}: {error}") from None
    if parts.scheme == "https":
        raise ConfigError(
            f"--backend {text}: https is not supported: the gateway speaks plain HTTP to its backends. Give the http"
            " address, or let a TLS tunnel on this machine (stunnel, nginx, socat) lead there."
        )
    if parts.scheme != "http" or not host:
        raise ConfigError(f"--backend {text}: write http://HOST:PORT or NAME=http://HOST:PORT")
    if parts.username or parts.password:
        raise ConfigError("--backend: no user or password in a URL; give --backend-key-file")
    if parts.path.rstrip("/") not in ("", "/v1") or parts.query or parts.fragment:
        raise ConfigError(f"--backend {text}: only servers whose paths begin with /v1 (http://{host}:{port})")
    return Backend(name, host, port, f"http://{host}:{port}")


def find_models(backends: Sequence[str], key: str) -> Models:
    """The models of all backends; one that several serve has several replicas."""
    found: dict[str, Model] = {}
    entries = [(backend, entry) for backend in map(parsed, backends) for entry in served(backend, key)]
    counts: dict[str, int] = {}
    for backend, _ in entries:
        counts[backend.url] = counts.get(backend.url, 0) + 1
    paths = {backend.url: health_path(backend, key) for backend, _ in entries}
    for backend, entry in entries:
        address = Address(backend.host, backend.port, shared=counts[backend.url] > 1, health=paths[backend.url])
        name = str(entry["id"])
        known = found.get(name)
        if known is None:
            found[name] = Model(name, (address,), context=context_of(entry), capabilities=CAPABILITIES)
        elif address not in known.backends:
            found[name] = msgspec.structs.replace(known, backends=(*known.backends, address))
    if not found:
        raise ConfigError("the backends serve no model")
    return Models(tuple(found.values()))


def served(backend: Backend, key: str) -> list[dict[str, Any]]:
    """What the backend says it serves. One whose model is named need not be up, nor say anything."""
    try:
        status, answer = get(backend, "/v1/models", key)
        listed = [entry for entry in json.loads(answer)["data"] if isinstance(entry, dict) and "id" in entry]
    except (OSError, http.client.HTTPException) as error:
        if backend.name:
            return [{"id": backend.name}]
        raise ConfigError(f"{backend.url}: does not answer: {error}") from None
    except (ValueError, KeyError, TypeError):
        if backend.name:
            return [{"id": backend.name}]
        hint = "it wants a key: give --backend-key-file" if status == 401 else f"{status} and no list of models"
        raise ConfigError(f"{backend.url}/v1/models: {hint}; or name a model: NAME={backend.url}") from None
    if backend.name:
        chosen = [entry for entry in listed if entry["id"] == backend.name]
        if listed and not chosen:
            names = ", ".join(str(entry["id"]) for entry in listed)
            raise ConfigError(f"{backend.url}: has no model {backend.name!r}; it has {names}")
        return chosen or [{"id": backend.name}]
    return [entry for entry in listed if usable(entry["id"])]


def usable(name: object) -> bool:
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        print(f"left out: the model {name!r}, whose name cannot be used")
        return False
    return True


def health_path(backend: Backend, key: str) -> str:
    """vLLM and llama.cpp have /health; a list of models has everybody."""
    try:
        return "/health" if get(backend, "/health", key)[0] == 200 else "/v1/models"
    except (OSError, http.client.HTTPException):
        return "/v1/models"


def get(backend: Backend, path: str, key: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(backend.host, backend.port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        reply = connection.getresponse()
        return reply.status, reply.read(4 * 1024 * 1024)
    finally:
        connection.close()


def context_of(entry: dict[str, Any]) -> int:
    meta = entry.get("meta")
    lengths = [entry.get(name) for name in LENGTHS] + ([meta.get("n_ctx")] if isinstance(meta, dict) else [])
    return next((length for length in lengths if isinstance(length, int) and length > 0), CONTEXT)
