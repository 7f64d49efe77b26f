"""Every molecule scenario, one test each. `full` is site.yml on the shared lab.

Two run at a time, each on a host of its own: half of a play is waiting. The longest begin first.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LOGS = REPO / "build/molecule"
AT_A_TIME = 2
SCENARIO_SECONDS = 1800
LONGEST = ["vllm", "vllm_alternative", "gateway_alternative"]
LAST = "full"
SCENARIOS = sorted(
    (path.parent.name for path in (REPO / "molecule").glob("*/molecule.yml")),
    key=lambda name: (name == LAST, name not in LONGEST, name),
)


def run(name: str, state: Path) -> tuple[int, str, float]:
    """Status, output and seconds of `molecule test`.

    ``state``: where molecule notes what it has created. Its own place is shared by all checkouts of one name, and a
    note of an earlier run would have it skip making the hosts.
    """
    start = time.monotonic()
    done = subprocess.run(
        ["molecule", "test", "-s", name],
        cwd=REPO,
        env=os.environ | {"NO_COLOR": "1", "MOLECULE_EPHEMERAL_DIRECTORY": str(state / name)},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SCENARIO_SECONDS,
        check=False,
    )
    LOGS.mkdir(parents=True, exist_ok=True)  # read while the others still run
    (LOGS / f"{name}.log").write_text(done.stdout)
    return done.returncode, done.stdout, time.monotonic() - start


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[tuple[int, str, float]]"]]:
    """The scenarios whose tests were chosen (`-k`), in order, on a few threads."""
    state = tmp_path_factory.mktemp("molecule")
    params = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = {spec.params.get("name") for spec in params if spec is not None}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(run, name, state) for name in SCENARIOS if name in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, running: dict[str, "Future[tuple[int, str, float]]"]) -> None:
    status, output, seconds = running[name].result()
    print(f"\nmolecule {name}: {seconds:.0f} s")
    assert status == 0, f"molecule test -s {name} ended with {status}:\n{output[-12000:]}"
