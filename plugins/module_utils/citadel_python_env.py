"""Python environments as releases: built beside the running one, checked, then switched to by a symbolic link.

A release is a directory ``<root>/<name>-<id>``; the id follows from what goes in, so the same input is the same
release on every host. ``citadel-release.json`` is written last: a directory without it is what an interrupted build
left, and is never used. Nothing here hashes installed files: to find that there is nothing to do costs one small file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARKER = "citadel-release.json"
LOCK = "citadel-lock.txt"
INSTALLER = "installer"


class BuildError(Exception):
    """Something that the operator has to know; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel that is on the host already, installed besides the lock."""

    path: str
    sha256: str

    @classmethod
    def below(cls, root: Path, built: str, sha256: str) -> Wheel:
        """Where the role puts a wheel: by its hash, because two versions may have the same name."""
        return cls(str(root / ".wheels" / sha256[:16] / Path(built).name), sha256)

    @property
    def project(self) -> str:
        return Path(self.path).name.split("-", 1)[0].replace("_", "-")

    @property
    def requirement(self) -> str:
        return f"{self.project} @ file://{self.path} --hash=sha256:{self.sha256}"


@dataclasses.dataclass(frozen=True)
class Supply:
    """Where packages come from. With a wheelhouse nothing else is asked."""

    wheelhouse: str = ""
    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    proxy: str = ""

    def arguments(self) -> list[str]:
        """Arguments that uv and pip have in common. Index addresses may hold a password, so they go by environment."""
        found = [f"--find-links={link}" for link in ([self.wheelhouse] if self.wheelhouse else self.find_links)]
        return ["--no-index", *found] if self.wheelhouse else found

    def environment(self) -> dict[str, str]:
        values: dict[str, str] = {}
        if self.proxy:
            values |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.proxy)
        if self.wheelhouse:
            return values
        if self.index_url:
            values |= {"UV_DEFAULT_INDEX": self.index_url, "PIP_INDEX_URL": self.index_url}
        if self.extra_index_urls:
            extra = " ".join(self.extra_index_urls)
            # The hashes decide which file is the right one, whichever index offers it.
            values |= {"UV_INDEX": extra, "PIP_EXTRA_INDEX_URL": extra, "UV_INDEX_STRATEGY": "unsafe-best-match"}
        return values


@dataclasses.dataclass(frozen=True)
class Interpreter:
    path: str
    version: tuple[int, int, int]
    implementation: str

    @property
    def tag(self) -> str:
        """What a release depends on: a patch update of the distribution's Python rebuilds nothing."""
        return f"{self.implementation}-{self.version[0]}.{self.version[1]}"

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))


@dataclasses.dataclass(frozen=True)
class Release:
    id: str
    path: Path
    activated: float
    lock: str


def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
    keep_open: Sequence[int] = (),
) -> str:
    """Run a command and return its output; a failure tells the last lines of what it said."""
    merged = {**os.environ, **(environment or {})}
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
        merged.pop(name, None)
    try:
        done = subprocess.run(
            list(argv),
            env=merged,
            cwd="/",
            timeout=timeout,
            pass_fds=tuple(keep_open),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{argv[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{argv[0]} did not end within {timeout:g} s: {' '.join(argv)}") from error
    if done.returncode != 0:
        said = "\n".join(done.stdout.strip().splitlines()[-40:])
        raise BuildError(f"{' '.join(argv)} ended with status {done.returncode}:\n{said}")
    return done.stdout


def interpreter(path: str) -> Interpreter:
    code = "import json, sys; print(json.dumps([*sys.version_info[:3], sys.implementation.name]))"
    major, minor, patch, implementation = json.loads(run([path, "-I", "-c", code], timeout=60))
    return Interpreter(path, (major, minor, patch), implementation)


def substance(lock: str) -> list[str]:
    """The lines of a lock that say what is installed: a changed comment is not a new release."""
    return [line.rstrip() for line in lock.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def packages(lock: str) -> list[str]:
    """``name==version`` of each package, as a diff shows them."""
    found = [re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*==[^\s;\\]+", line) for line in substance(lock)]
    return [match.group(0) for match in found if match]


def release_id(lock: str, tag: str, wheels: Sequence[Wheel]) -> str:
    content = [substance(lock), tag, sorted([Path(wheel.path).name, wheel.sha256] for wheel in wheels)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class Environment:
    """One named environment below ``root``."""

    def __init__(self, root: Path, name: str, link: Path | None) -> None:
        self.root = root
        self.name = name
        self.link = link
        self._pattern = re.compile(rf"{re.escape(name)}-([0-9a-f]{{12}})")

    def path(self, identity: str) -> Path:
        return self.root / f"{self.name}-{identity}"

    def _directories(self) -> Iterator[tuple[str, Path]]:
        if self.root.is_dir():
            for path in sorted(self.root.iterdir()):
                match = self._pattern.fullmatch(path.name)
                if match and path.is_dir():
                    yield match.group(1), path

    def releases(self) -> list[Release]:
        """The complete ones, last used first."""
        found = []
        for identity, path in self._directories():
            marker = path / MARKER
            if marker.is_file():
                lock = path / LOCK
                text = lock.read_text() if lock.is_file() else ""
                found.append(Release(identity, path, marker.stat().st_mtime, text))
        return sorted(found, key=lambda release: -release.activated)

    def leftovers(self) -> list[Path]:
        """What interrupted builds left."""
        return [path for _, path in self._directories() if not (path / MARKER).is_file()]

    def current(self) -> str:
        """The release that the link points to, or nothing."""
        if self.link is None or not self.link.is_symlink():
            return ""
        target = Path(os.path.normpath(self.link.parent / self.link.readlink()))
        match = self._pattern.fullmatch(target.name)
        return match.group(1) if match and target.parent == self.root else ""

    def switch(self, identity: str) -> None:
        """Point the link at a release, in one step, and remember when."""
        if self.link is None:
            return
        marker = self.path(identity) / MARKER
        os.utime(marker)
        self.link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        beside = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        beside.symlink_to(self.path(identity))
        beside.replace(self.link)

    def superfluous(self, wanted: str, keep: int) -> list[Path]:
        """Old releases beyond ``keep``, except what a process still runs from."""
        others = [release.path for release in self.releases() if release.id != wanted]
        return [path for path in others[keep:] if not in_use(path)]


def in_use(path: Path, proc: Path = Path("/proc")) -> bool:
    """Whether a process was started from this directory."""
    start = f"{path}/".encode()
    for command in proc.glob("[0-9]*/cmdline"):
        try:
            if any(word.startswith(start) for word in command.read_bytes().split(b"\0")):
                return True
        except OSError:
            continue  # it ended meanwhile
    return False


@contextlib.contextmanager
def locked(root: Path, patience: float = 900.0) -> Iterator[int]:
    """One build at a time below ``root``.

    Children inherit the lock: an installer that outlives a killed play still holds it.
    """
    with (root / ".lock").open("w") as handle:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    message = f"another build has held {root}/.lock for {patience:g} s; wait for it or end it"
                    raise BuildError(message) from error
                time.sleep(0.5)
        yield handle.fileno()


def remove(path: Path) -> None:
    """Remove a release so that a half-removed one is never taken for a whole one."""
    with contextlib.suppress(FileNotFoundError):
        (path / MARKER).unlink()
    shutil.rmtree(path)


def finish(path: Path, description: Mapping[str, Any]) -> None:
    """Write the marker, after everything else has reached the disk."""
    # A file system that cannot be synchronised (an overlay mounted volatile) says so here; the build itself is sound.
    subprocess.run(["sync", "--file-system", str(path)], check=False, capture_output=True)
    temporary = path / f".{MARKER}"
    temporary.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    temporary.replace(path / MARKER)


def create(path: Path, python: Interpreter, *, pip: bool) -> None:
    if path.exists():
        shutil.rmtree(path)
    run([python.path, "-I", "-m", "venv", "--symlinks", *([] if pip else ["--without-pip"]), str(path)], timeout=300)


def ensure_installer(
    root: Path, python: Interpreter, lock: str, supply: Supply, *, timeout: float = 3600, keep_open: Sequence[int] = ()
) -> Path:
    """The directory with uv, itself hash-locked and fetched with the pip that python3 brings."""
    environment = Environment(root, INSTALLER, None)
    identity = release_id(lock, python.tag, ())
    path = environment.path(identity)
    if not (path / MARKER).is_file():
        create(path, python, pip=True)
        (path / LOCK).write_text(lock)
        argv = [str(path / "bin/python"), "-I", "-m", "pip", "install", "--quiet", "--no-input", "--no-cache-dir"]
        argv += ["--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        argv += [*supply.arguments(), f"--requirement={path / LOCK}"]
        run(argv, environment=supply.environment(), timeout=timeout, keep_open=keep_open)
        finish(path, {"name": INSTALLER, "id": identity, "python": python.text})
    for old in [*environment.superfluous(identity, 0), *environment.leftovers()]:
        if old != path:
            remove(old)
    return path


def build(
    environment: Environment,
    python: Interpreter,
    lock: str,
    wheels: Sequence[Wheel],
    supply: Supply,
    *,
    uv: str,
    check: Sequence[str] = (),
    install_timeout: float = 3600,
    check_timeout: float = 600,
    keep_open: Sequence[int] = (),
) -> Path:
    """Make one release. What fails is removed again; the running release is not touched."""
    identity = release_id(lock, python.tag, wheels)
    path = environment.path(identity)
    cache = environment.root / ".cache"
    try:
        for wheel in wheels:
            found = hashlib.sha256(Path(wheel.path).read_bytes()).hexdigest()
            if found != wheel.sha256:
                raise BuildError(f"{wheel.path} has sha256 {found} instead of {wheel.sha256}: remove it and run again")
        create(path, python, pip=False)
        (path / LOCK).write_text(lock)
        wanted = path / "citadel-requirements.txt"
        wanted.write_text("\n".join([*substance(lock), *(wheel.requirement for wheel in wheels), ""]))
        argv = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-config",
            f"--python={path / 'bin/python'}",
            f"--cache-dir={cache}",
        ]
        argv += ["--require-hashes", "--no-deps", "--only-binary=:all:", "--compile-bytecode"]
        argv += [*supply.arguments(), f"--requirements={wanted}"]
        settings = {"UV_PYTHON_DOWNLOADS": "never", "UV_COMPILE_BYTECODE_TIMEOUT": "600"}
        run(argv, environment={**supply.environment(), **settings}, timeout=install_timeout, keep_open=keep_open)
        (path / ".lock").unlink(missing_ok=True)  # uv's own, which it leaves writable for everybody
        if check:
            first = path / "bin" / check[0]
            argv = [str(first) if first.exists() else check[0], *check[1:]]
            search = f"{path / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}"
            run(argv, environment={"PATH": search, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=check_timeout)
        description = {
            "name": environment.name,
            "id": identity,
            "python": python.text,
            "tag": python.tag,
            "wheels": {Path(wheel.path).name: wheel.sha256 for wheel in wheels},
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        finish(path, description)
    except Exception:
        shutil.rmtree(path, ignore_errors=True)  # the exception is the news; the next run clears what stays
        raise
    for wheel in wheels:  # releases are complete in themselves: older wheels of the same project are not needed again
        directory = Path(wheel.path).parent
        for older in directory.parent.glob(f"*/{Path(wheel.path).name.split('-', 1)[0]}-*.whl"):
            if older.parent != directory:
                shutil.rmtree(older.parent)
    shutil.rmtree(cache, ignore_errors=True)  # only a failed build keeps its downloads, to go on from there
    return path
