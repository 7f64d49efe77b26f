"""The benchmark of forecasts, on a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.predictor import capacity, faults, nab, peers

RUN = Path(__file__).resolve().parents[2] / "bench" / "predictor" / "run"


def write(file: Path, rows: dict[str, np.ndarray]) -> None:
    lines = ["V1,V2", *(f'"{name}",' + ",".join(f"{value:.3f}" for value in values) for name, values in rows.items())]
    file.write_text("\n".join(lines) + "\n")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """With an empty cache, so that no peer is there."""
    environment = os.environ | {"XDG_CACHE_HOME": "/nonexistent"}
    return subprocess.run([RUN, *words], capture_output=True, text=True, timeout=300, check=False, env=environment)


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
    assert 0 < rows["citadel"]["mb_per_series"] < 100
    assert "left out: statsforecast is not installed. bench/predictor/run --install" in ended.stderr


def test_a_test_part_is_used(folder: Path) -> None:
    write(folder / "test.csv", {f"H{n}": np.full(48, 50.0) for n in range(3)})
    assert "seasonal naive" in run(folder, "--jobs", "1").stdout
    write(folder / "test.csv", {"H0": np.ones(48)})
    assert "test.csv has no row H1" in run(folder).stderr


def test_what_is_no_such_folder(folder: Path, tmp_path: Path) -> None:
    assert "has no train.csv and no windows.json" in run(tmp_path / "nothing").stderr
    (folder / "train.csv").write_text("V1,V2\nH1,1,zwei\n")
    ended = run(folder)
    assert ended.returncode == 1
    assert "train.csv line 2: could not convert" in ended.stderr


def labelled(size: int = 1000) -> nab.Labelled:
    return nab.Labelled("x", np.arange(0.0, 300.0 * size, 300.0), np.zeros(size), [(400, 449), (700, 749)])


def test_nabs_score_of_who_is_perfect_and_who_says_nothing() -> None:
    series = labelled()
    scores = np.zeros(1000)
    for profile in nab.PROFILES:
        assert nab.normalised([(scores, series)], 1.0, profile) == 0
    scores[[400, 700]] = 1
    for profile in nab.PROFILES:
        assert nab.normalised([(scores, series)], 1.0, profile) == pytest.approx(100)
        assert nab.best([(scores, series)], profile)[0] == pytest.approx(100)


def test_nabs_score_of_the_late_and_of_the_wrong() -> None:
    series, standard = labelled(), nab.PROFILES[0]
    late = np.zeros(1000)
    late[[425, 449]] = 1
    middle = (2 / (1 + np.exp(-5 * 25 / 50)) - 1) / (2 / (1 + np.exp(-5)) - 1)
    assert nab.normalised([(late, series)], 1.0, standard) == pytest.approx(100 * (middle + 1) / 4)
    wrong = np.zeros(1000)
    wrong[[10, 200, 900]] = 1  # on probation, before any window, far behind one
    assert nab.normalised([(wrong, series)], 1.0, standard) == pytest.approx(-100 * 0.11 * 2 / 4)
    assert nab.events([(wrong, series)], 1.0)["recall"] == 0


def test_a_folder_of_nab(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    steps = np.arange(600)
    values = 50 + np.random.default_rng(3).normal(0, 1, steps.size)
    values[400:420] += 40
    lines = [f"2026-01-{1 + at // 288:02} {at % 288 // 12:02}:{at % 12 * 5:02}:00,{values[at]:.3f}" for at in steps]
    (tmp_path / "some" / "one.csv").write_text("timestamp,value\n" + "\n".join(lines) + "\n")
    span = ["2026-01-02 09:00:00.000000", "2026-01-02 12:00:00.000000"]
    (tmp_path / "windows.json").write_text(json.dumps({"some/one.csv": [span]}))
    ended = run(tmp_path, "--json", "--jobs", "1")
    assert ended.returncode == 0, ended.stderr
    rows = {row["row"]: row for row in json.loads(ended.stdout)}
    assert rows["citadel"]["nab_standard"] > 80
    assert rows["citadel"]["recall"] == 1
    assert 0 < rows["citadel"]["mb_per_series"] < 2
    (tmp_path / "some" / "one.csv").write_text("timestamp,value\nyesterday,1\n")
    assert "some/one.csv line 2" in run(tmp_path).stderr


def test_the_windowed_gaussian_moves_in_steps() -> None:
    values = np.random.default_rng(5).normal(0, 1, 6600)
    values[6405:] += 100
    scores = nab.gaussian(values)
    assert scores[0] == 0
    assert scores[6499] == 1  # the window has not moved yet
    assert scores[6500] < 1  # it has seen 95 of the higher ones


def test_the_date_of_exhaustion_on_a_sample() -> None:
    rows = {row["row"]: row for row in capacity.score(1, 8)}
    assert len(rows) == 6
    for kind in ("straight", "compound"):
        assert rows[f"{kind} growth, 14 days before"]["median_error_days"] <= 3
    grown = capacity.growth("straight", 1)
    assert grown.values[grown.day] >= grown.limit > grown.values[: grown.day].max()


def test_faults_that_are_put_in() -> None:
    alarms, until = faults.watch(("ensemble", 1))
    assert alarms <= 2
    assert until["drop"] < 12
    assert until["season_break"] < faults.WATCHED
    assert np.isnan(until["missing"])


def test_a_peer_answers_from_an_environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "statsforecast").mkdir()
    (tmp_path / "statsforecast" / "models.py").write_text(
        "class Theta:\n"
        "    def __init__(self, season_length): pass\n"
        "    def forecast(self, y, h, level):\n"
        "        return {'mean': y[:1].repeat(h), 'lo-80': y[:1].repeat(h) - 1, 'hi-80': y[:1].repeat(h) + 1}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "environment", lambda: tmp_path)
    assert not peers.installed()
    series = [np.full(5, float(number)) for number in range(3)]
    found = peers.forecast("Theta", series, 24, 2, 2)
    assert [one["mean"] for one in found] == [[0, 0], [1, 1], [2, 2]]
    assert [one["high"][0] for one in found] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"AutoETS ended with 1: .*no attribute 'AutoETS'"):
        peers.forecast("AutoETS", series, 24, 2, 1)


def test_it_says_what_to_ask_for() -> None:
    ended = run()
    assert ended.returncode == 2
    assert "say what to score" in ended.stderr
