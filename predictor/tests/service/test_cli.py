"""Commands that need no Prometheus."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from citadel_predictor import __version__
from citadel_predictor.cli.main import main

from .fakes import HOUR, traffic


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["explain"], ["backtest"]])
def test_help_is_there_for_all(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "usage: citadel-predictor" in said
    assert not command or "--config FILE" in said


def test_the_module_is_the_command() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "citadel_predictor", "--version"], env=env, text=True, capture_output=True, check=True
    )
    assert done.stdout == f"citadel-predictor {__version__}\n"


def test_settings_that_cannot_be_used_are_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictor.json"
    path.write_text('{"prometheus": {"url": "http://127.0.0.1:9"}, "targets": [], "colour": 1}')
    assert main(["check", "--config", str(path)]) == 78
    assert str(path) in capsys.readouterr().err


def test_a_prometheus_that_is_not_there_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictor.json"
    path.write_text('{"prometheus": {"url": "http://127.0.0.1:1"}, "targets": [{"name": "a", "query": "a:b:c"}]}')
    assert main(["check", "--config", str(path), "--live"]) == 1
    assert "http://127.0.0.1:1 cannot be asked" in capsys.readouterr().err


def file(folder: Path, hours: int) -> str:
    path = folder / "requests.csv"
    values = traffic(4)
    rows = [f"{at},{'' if at == 50 else values(at * HOUR)}" for at in range(hours)]
    path.write_text("\n".join(["hour,value", *rows]))
    return str(path)


def test_backtest_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, 28 * 24)
    assert main(["backtest", "--csv", path]) == 0
    said = capsys.readouterr().out
    assert "requests.csv" in said
    assert main(["backtest", "--csv", path, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["folds"] == 3
    assert row["mase"] < row["mase_naive"]
    assert 0 < row["coverage_80"] <= 1
    assert math.isfinite(row["ms"])
    assert main(["backtest", "--csv", path, "--horizon", "7d", "--folds", "1"]) == 0


def test_backtest_of_too_little_and_of_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, 10)
    assert main(["backtest", "--csv", path]) == 1
    assert "too few" in capsys.readouterr().out
    assert main(["backtest", "--csv", path, "--step", "7000"]) == 1
    assert "do not divide a day" in capsys.readouterr().err
    Path(path).write_text("1\n2\nx\n")
    assert main(["backtest", "--csv", path]) == 1
    assert "line 3: 'x' is no number" in capsys.readouterr().err
    assert main(["backtest", "--csv", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
