"""Build a source tree's wheel once for each content of it, byte for byte the same everywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What never reaches a wheel: anywhere in a tree, and at its top.
ANYWHERE = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
AT_THE_TOP = {".git", ".venv", "build", "dist", "tests"}


class WheelError(Exception):
    """A source tree that cannot be built; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Built:
    source: str
    path: str
    sha256: str


def files(source: Path) -> Iterator[Path]:
    """What can reach the wheel, in a fixed order."""
    for directory, names, found in os.walk(source):
        left_out = ANYWHERE | AT_THE_TOP if Path(directory) == source else ANYWHERE
        names[:] = sorted(name for name in names if name not in left_out)
        for name in sorted(found):
            if not name.endswith((".pyc", ".swp")):
                yield Path(directory) / name


def content_key(source: Path, builder: str) -> str:
    """What the wheel depends on: every file, and the version of what builds it."""
    digest = hashlib.sha256(builder.encode())
    for path in files(source):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"\0{path.relative_to(source)}\0{content}".encode())
    return digest.hexdigest()[:24]


def builder_version() -> str:
    try:
        return f"hatchling-{importlib.metadata.version('hatchling')}"
    except importlib.metadata.PackageNotFoundError as error:
        message = f"hatchling is not installed beside {sys.executable}"
        raise WheelError(f"{message}: install requirements.txt on the control node") from error


def wheel_of(source: str, cache: Path) -> Built:
    """The wheel of a source tree, from the cache if nothing in the tree has changed."""
    tree = Path(source)
    if not (tree / "pyproject.toml").is_file():
        raise WheelError(f"{source} has no pyproject.toml: it is not a Python project")
    directory = cache / content_key(tree, builder_version())
    if not directory.is_dir():
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
            done = subprocess.run(
                [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", temporary],
                cwd=tree,
                env={**os.environ, "SOURCE_DATE_EPOCH": "1735689600", "PYTHONDONTWRITEBYTECODE": "1"},
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
                raise WheelError(f"the wheel of {source} cannot be built:\n{said}")
            try:
                Path(temporary).chmod(0o755)
                Path(temporary).rename(directory)
                Path(temporary).mkdir()  # what the context manager expects to remove
            except OSError:  # somebody else was faster, with the same content
                if not directory.is_dir():
                    raise
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        shutil.rmtree(directory)
        raise WheelError(f"{source} made {len(wheels)} wheels instead of one")
    return Built(source, str(wheels[0]), hashlib.sha256(wheels[0].read_bytes()).hexdigest())
