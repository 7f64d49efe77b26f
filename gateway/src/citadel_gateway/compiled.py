"""The modules on the way of a request, compiled to machine code with mypyc.

The gateway is plain Python and runs as such. An interpreter takes three times as long for the same decisions, though,
so that a host that has a C compiler compiles these modules when it installs the package. Sources stay beside what was
compiled; without it Python takes them.

What msgspec decodes must not be compiled (mypyc forgets the types of a class's fields), so Structs live elsewhere.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent
MODULES = (
    "core/accounts", "core/admission", "core/board", "core/catalogue", "core/core", "core/health", "core/keyring",
    "core/limits", "core/limitstore", "core/pricing", "core/routing", "core/tally", "core/ticket", "errors",
    "worker/accesslog", "worker/asking", "worker/exchange", "worker/front", "worker/gate", "worker/headers",
    "worker/heads", "worker/journal", "worker/outbox", "worker/replying", "worker/request", "worker/sse",
    "worker/upstream", "worker/usage",
)  # fmt: skip
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class NotCompiledError(Exception):
    """It cannot be done here; the message says what is missing."""


def missing() -> str:
    """What a compilation would need and does not have; empty when all is there."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "there is no C compiler (Debian: gcc)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are missing (Debian: python3-dev)"
    return ""


def build(folder: Path) -> list[Path]:
    """Copy the package into `folder` and compile it there. The extensions, relative to `folder`.

    Raises NotCompiledError.
    """
    lacking = missing()
    if lacking:
        raise NotCompiledError(lacking)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", f"*{SUFFIX}"))
    files = [f"{PACKAGE.name}/{module}.py" for module in MODULES]
    environment = {**os.environ, "MYPYC_OPT_LEVEL": "1", "MYPYC_DEBUG_LEVEL": "0", "MYPYPATH": str(folder)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", "mypyc", *files],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotCompiledError((done.stdout + done.stderr).strip()[-2000:])
    shutil.rmtree(folder / "build")
    return [path.relative_to(folder) for path in sorted(folder.rglob(f"*{SUFFIX}"))]


def install() -> int:
    """Compile, and put the extensions beside the installed sources. Their number. Raises NotCompiledError."""
    with tempfile.TemporaryDirectory() as work:
        extensions = build(Path(work))
        for extension in extensions:
            target = PACKAGE.parent / extension
            fresh = target.with_name(f".{target.name}.new")
            shutil.copyfile(Path(work) / extension, fresh)
            fresh.replace(target)
    return len(extensions)
