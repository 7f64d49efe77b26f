"""The benchmark of forecasts, on a folder of its own."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

RUN = Path(__file__).resolve().parents[2] / "bench" / "predictor" / "run"


def write(file: Path, rows: dict[str, np.ndarray]) -> None:
    lines = ["V1,V2", *(f'"{name}",' + ",".join(f"{value:.3f}" for value in values) for name, values in rows.items())]
    file.write_text("\n".join(lines) + "\n")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUN, *words], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hours = np.arange(24 * 30)
    noise = np.random.default_rng(1)
    waves = 50 + 10 * np.sin(2 * np.pi * hours / 24)
    write(tmp_path / "train.csv", {f"H{n}": waves + noise.normal(0, 1, hours.size) for n in range(3)})
    return tmp_path


def test_the_end_is_held_out_where_there_is_no_test_part(folder: Path) -> None:
    ended = run(folder, "--json", "--jobs", "1")
    assert ended.returncode == 0, ended.stderr
    rows = {row["row"]: row for row in json.loads(ended.stdout)}
    assert rows["citadel"]["mase"] < rows["seasonal naive"]["mase"]
    assert 0.5 < rows["citadel"]["coverage"] <= 1
    assert "citadel: 3 series" in ended.stderr


def test_a_test_part_is_used(folder: Path) -> None:
    write(folder / "test.csv", {f"H{n}": np.full(48, 50.0) for n in range(3)})
    assert "seasonal naive" in run(folder, "--jobs", "1").stdout
    write(folder / "test.csv", {"H0": np.ones(48)})
    assert "test.csv has no row H1" in run(folder).stderr


def test_what_is_no_such_folder(folder: Path, tmp_path: Path) -> None:
    assert "has no train.csv" in run(tmp_path / "nothing").stderr
    (folder / "train.csv").write_text("V1,V2\nH1,1,zwei\n")
    ended = run(folder)
    assert ended.returncode == 1
    assert "train.csv line 2: could not convert" in ended.stderr
