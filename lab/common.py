"""What all parts of the lab share: its settings, its folders, and how it runs commands."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LAB = REPO / "lab"
VENV = REPO / ".venv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "citadel-lab"
BYTECODE = CACHE / "bytecode"
RUN = Path("/run/citadel-lab")
STATE = CACHE / "state"
KEY_FILE = STATE / "key"
# name of the file -> how the secret begins
SECRETS = {KEY_FILE.name: "sk-lab-", "sql-admin": "", "sql-gateway": "", "exporters": ""}
SSH_KEY = STATE / "id_lab"


class LabError(Exception):
    """Something that the user can act on; its text says how."""


@dataclass(frozen=True)
class Host:
    """One machine of the lab. ``loop``: how many loop devices it is lent."""

    name: str
    address: str
    layer: str = ""
    default: bool = False
    loop: int = 0


@dataclass(frozen=True)
class Layer:
    """What ``play`` leaves on a fresh machine; ``key``: the paths whose content decides whether it still fits.

    ``on``: the layer that it lies on. ``host`` is the inventory's host that the play takes the builder for,
    ``address`` where the builder is; ``secrets``: those of the lab that are in the layer, which is made anew when they
    are.
    """

    name: str
    host: str
    address: str
    play: tuple[str, ...]
    key: tuple[str, ...]
    secrets: tuple[str, ...] = ()
    on: str = ""


@dataclass(frozen=True)
class Network:
    namespace: str
    bridge: str
    gateway: str
    prefix: int
    proxy_port: int

    @property
    def proxy(self) -> str:
        return f"http://{self.gateway}:{self.proxy_port}"

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.namespace


def _load() -> dict[str, Any]:
    return tomllib.loads((LAB / "lab.toml").read_text())


_SETTINGS = _load()
NETWORK = Network(**_SETTINGS["network"])
HOSTS = {name: Host(name, **data) for name, data in _SETTINGS["hosts"].items()}
LAYERS = {
    name: Layer(
        name,
        data["host"],
        data["address"],
        tuple(data["play"]),
        tuple(data["key"]),
        tuple(data.get("secrets", ())),
        data.get("on", ""),
    )
    for name, data in _SETTINGS["layers"].items()
}
BASE_PACKAGES: list[str] = _SETTINGS["base"]["packages"]


def host_named(name: str) -> Host:
    """The host, or an error that lists those there are."""
    try:
        return HOSTS[name]
    except KeyError:
        raise LabError(f"there is no lab host {name!r}; lab/lab.toml has: {', '.join(HOSTS)}") from None


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return it with its output as text; a failure becomes a LabError with the end of that output."""
    done = subprocess.run(
        [str(word) for word in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **options,
    )
    if done.returncode:
        raise LabError(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done


@contextlib.contextmanager
def building(name: str) -> Iterator[None]:
    """Only one process at a time makes a thing of the cache; the others wait and then find it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def digest_of(paths: Sequence[Path], *words: str) -> str:
    """Twelve hex digits over the content of files and folders and over words."""
    total = hashlib.sha256("\0".join(words).encode())
    for top in paths:
        for path in (
            sorted(p for p in top.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if top.is_dir() else [top]
        ):
            total.update(str(path.relative_to(REPO)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
