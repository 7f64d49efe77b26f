"""Every molecule scenario, one test each. `full` is site.yml on the shared lab."""

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAST = "full"
SCENARIOS = sorted(path.parent.name for path in (REPO / "molecule").glob("*/molecule.yml"))
SCENARIO_SECONDS = 1800


@pytest.mark.parametrize("name", sorted(SCENARIOS, key=lambda name: (name == LAST, name)))
def test_scenario(name: str) -> None:
    done = subprocess.run(
        ["molecule", "test", "-s", name],
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SCENARIO_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"molecule test -s {name} ended with {done.returncode}:\n{done.stdout[-12000:]}"
