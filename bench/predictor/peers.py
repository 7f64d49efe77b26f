"""Theta and AutoETS of statsforecast, in an environment of their own: the product needs neither."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from citadel_predictor.forecast import FloatArray

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "citadel-bench"
INSTALL = "bench/predictor/run --install"
# Every so many series: AutoETS takes seconds for each.
PEERS = {"Theta": 1, "AutoETS": 10}


def environment() -> Path:
    """Where the peers are installed, named by what is locked."""
    lock = hashlib.sha256(sys.version.encode() + (HERE / "requirements.txt").read_bytes()).hexdigest()[:12]
    return CACHE / "venvs" / f"predictor-{lock}"


def installed() -> bool:
    return (environment() / "complete").exists()


def install() -> None:
    """Raises CalledProcessError or OSError; pip has then said why."""
    target = environment()
    if installed():
        return
    print("installing statsforecast", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(target)], check=True)
    pip = [str(target / "bin" / "pip"), "install", "--quiet", "--require-hashes"]
    subprocess.run([*pip, "--requirement", str(HERE / "requirements.txt")], check=True)
    (target / "complete").touch()


def forecast(method: str, series: Sequence[FloatArray], season: int, horizon: int, jobs: int) -> list[dict[str, Any]]:
    """For each series mean, low and high of the interval of 80 %, ms of CPU and MB of its process.

    Raises ValueError with the peer's last words.
    """

    def share(number: int) -> list[dict[str, Any]]:
        order = {"method": method, "season": season, "horizon": horizon}
        asked = json.dumps(order | {"series": [values.tolist() for values in series[number::jobs]]})
        python = str(environment() / "bin" / "python")
        ended = subprocess.run(
            [python, str(HERE / "peer.py")], input=asked, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise ValueError(f"{method} ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}")
        found: list[dict[str, Any]] = json.loads(ended.stdout)
        return found

    jobs = min(jobs, len(series))
    with ThreadPoolExecutor(jobs) as pool:
        shares = list(pool.map(share, range(jobs)))
    return [shares[at % jobs][at // jobs] for at in range(len(series))]
