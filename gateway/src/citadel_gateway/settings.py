"""The three rendered files: gateway.json, models.json, keys.json.

Read once into frozen structs. A key that is not known is refused with its file and its name, because a misspelt
setting that is silently ignored is found weeks later. What the types cannot say (a name given twice, a key for a
model that is not there) is said by `problems`.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
Scope = Literal["inference", "admin", "metrics"]
ORIGIN = re.compile(r"\*|https?://[^/\s,]+")


class ConfigError(Exception):
    """The configuration cannot be used. One line for each problem, each naming its file."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Every rendered struct: nothing changes after reading, nothing unknown is swallowed."""


class Listen(Strict, frozen=True):
    address: str = "127.0.0.1"
    port: Port = 8000


class Cors(Strict, frozen=True):
    allow_origins: tuple[str, ...] = ()


class Limits(Strict, frozen=True):
    body_bytes: Positive = 16 * 1024 * 1024
    header_bytes: Positive = 32 * 1024
    connections: Positive = 4096
    inflight_per_model: Positive = 512


class Timeouts(Strict, frozen=True):
    connect: Seconds = 2.0
    headers: Seconds = 15.0
    first_byte: Seconds = 600.0
    between_bytes: Seconds = 120.0
    total: Seconds = 3600.0
    keepalive: Seconds = 75.0
    drain: Seconds = 600.0
    probe_interval: Seconds = 5.0
    probe: Seconds = 3.0


class Gateway(Strict, frozen=True):
    """gateway.json. Limits are those of one worker."""

    host: str
    listen: Listen
    control_socket: str
    run_dir: str
    state_dir: str
    models_file: str
    keys_file: str
    engine_key_file: str = ""
    access_log: str = "-"
    workers: Positive = 2
    cors: Cors = Cors()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()


class Address(Strict, frozen=True):
    host: str
    port: Port


class Model(Strict, frozen=True):
    name: Name
    backends: Annotated[tuple[Address, ...], Meta(min_length=1)]
    aliases: tuple[Name, ...] = ()
    context: Positive = 4096
    description: str = ""


class Models(Strict, frozen=True):
    models: tuple[Model, ...]


class Key(Strict, frozen=True):
    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = ("inference",)
    models: tuple[str, ...] = ("*",)


class Keys(Strict, frozen=True):
    keys: tuple[Key, ...]


T = TypeVar("T", Gateway, Models, Keys)


def read(path: str | Path, kind: type[T]) -> T:
    """One file as its struct; `ConfigError` says which file and which key is wrong."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:  # ValidationError is one of these
        raise ConfigError(f"{path}: {error}") from None


def gateway_problems(gateway: Gateway, path: str) -> list[str]:
    """What the types of gateway.json cannot say."""
    found = [
        f"{path}: cors.allow_origins: {origin!r} is no origin (write https://host or *)"
        for origin in gateway.cors.allow_origins
        if not ORIGIN.fullmatch(origin)
    ]
    found += [
        f"{path}: {field}: {value!r} is not an absolute path"
        for field in ("control_socket", "run_dir", "state_dir", "models_file", "keys_file")
        if not Path(value := getattr(gateway, field)).is_absolute()
    ]
    if len(gateway.control_socket.encode()) > 107:
        found.append(f"{path}: control_socket: longer than the 107 bytes a Unix socket's path may have")
    return found


def model_problems(models: Models, path: str) -> list[str]:
    """A name or an alias that stands twice, a backend that belongs to two models."""
    names = Counter(name for model in models.models for name in (model.name, *model.aliases))
    found = [f"{path}: the name {name!r} is used {count} times" for name, count in names.items() if count > 1]
    owners: dict[Address, str] = {}
    for model in models.models:
        for backend in model.backends:
            owner = owners.setdefault(backend, model.name)
            if owner != model.name:
                found.append(f"{path}: {backend.host}:{backend.port} belongs to both {owner!r} and {model.name!r}")
        if len(set(model.backends)) != len(model.backends):
            found.append(f"{path}: {model.name!r} names a backend twice")
    return found


def key_problems(keys: Keys, models: Models | None, path: str) -> list[str]:
    """An id or a hash that stands twice, a key for a model that is not there."""
    found = []
    for field in ("id", "sha256"):
        counts = Counter(getattr(key, field) for key in keys.keys)
        found += [
            f"{path}: the {field} {value!r} is used {count} times" for value, count in counts.items() if count > 1
        ]
    if models is not None:
        known = {"*", *(name for model in models.models for name in (model.name, *model.aliases))}
        found += [
            f"{path}: key {key.id!r} names the model {name!r}, which is not in the model list"
            for key in keys.keys
            for name in key.models
            if name not in known
        ]
    return found


def problems(path: str | Path) -> list[str]:
    """Everything that is wrong with the three files, one line each; empty when they can be used."""
    found: list[str] = []
    try:
        gateway = read(path, Gateway)
    except ConfigError as error:
        return list(error.lines)
    found += gateway_problems(gateway, str(path))
    models = None
    try:
        models = read(gateway.models_file, Models)
        found += model_problems(models, gateway.models_file)
    except ConfigError as error:
        found += error.lines
    try:
        found += key_problems(read(gateway.keys_file, Keys), models, gateway.keys_file)
    except ConfigError as error:
        found += error.lines
    return found


def engine_key(gateway: Gateway) -> str:
    """The key of the engines of this host: from the file named in the settings, else from systemd's credentials."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(gateway.engine_key_file or (Path(folder) / "engine-key" if folder else ""))
    if path == Path():
        raise ConfigError("engine key: neither engine_key_file nor $CREDENTIALS_DIRECTORY is set")
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the engine key cannot be read: {error}") from None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{path}: the engine key is empty or holds a blank")
    return key
