"""Our gateway as a host runs it: the same Python, the locked wheels, compiled."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "citadel-bench"


def product_python() -> str:
    """The interpreter of an environment like the one on a host: Debian's Python where there is one, the locked wheels.

    It matters: an interpreter that was built without profiles takes a sixth longer.
    """
    base = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    lock = ROOT / "files" / "requirements" / "gateway.txt"
    version = subprocess.run([base, "-VV"], capture_output=True, check=True).stdout
    target = CACHE / "venvs" / f"gateway-{hashlib.sha256(version + lock.read_bytes()).hexdigest()[:12]}"
    python = str(target / "bin" / "python")
    if not (target / "complete").exists():
        print("installing what the gateway needs", file=sys.stderr)
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", base, str(target)], check=True)
        words = ["uv", "pip", "sync", "--quiet", "--python", python, "--require-hashes", str(lock)]
        subprocess.run(words, check=True)
        (target / "complete").touch()
    return python


def compiled(source: str, python: str) -> str:
    """The gateway's package as `citadel-gateway compile` leaves it on a host, kept in the cache by its text."""
    files = sorted(Path(source).rglob("*.py"))
    text = hashlib.sha256(python.encode() + b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    target = CACHE / f"gateway-{text}"
    if not target.exists():
        print("compiling the gateway, which takes a minute", file=sys.stderr)
        fresh = target.with_suffix(f".{os.getpid()}")
        words = "import sys, pathlib, citadel_gateway.compiled as c; c.build(pathlib.Path(sys.argv[1]))"
        subprocess.run([python, "-c", words, str(fresh)], check=True, env=os.environ | {"PYTHONPATH": source})
        fresh.rename(target)
    return str(target)
