"""Wheels of source trees: the same bytes for the same content, built once."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from module_utils import citadel_source_wheel as source
from module_utils.citadel_source_wheel import WheelError, content_key, wheel_of


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "src/probe").mkdir(parents=True)
    (folder / "src/probe/__init__.py").write_text("NAME = 'probe'\n")
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "probe"\nversion = "1.0"\nrequires-python = ">=3.11"\n'
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["src/probe"]\n'
    )
    return folder


def test_the_same_content_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    first = wheel_of(str(tree), tmp_path / "one")
    second = wheel_of(str(tree), tmp_path / "two")
    assert first.sha256 == second.sha256
    assert Path(first.path).name == "probe-1.0-py3-none-any.whl"
    assert list((tmp_path / "one").glob(".building-*")) == []


def test_a_wheel_is_built_once_for_each_content(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = wheel_of(str(tree), cache)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert wheel_of(str(tree), cache) == first
    monkeypatch.undo()
    (tree / "src/probe/__init__.py").write_text("NAME = 'other'\n")
    assert wheel_of(str(tree), cache).sha256 != first.sha256
    assert len(list(cache.iterdir())) == 2


def test_what_never_reaches_a_wheel_does_not_count(tree: Path) -> None:
    key = content_key(tree, "b")
    for path in ("tests/test_x.py", "dist/x.whl", "src/probe/__pycache__/x.pyc", ".venv/bin/python", "build/x"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("x")
    assert content_key(tree, "b") == key
    (tree / "src/probe/build").mkdir()
    (tree / "src/probe/build/__init__.py").write_text("")
    assert content_key(tree, "b") != key, "below the top a folder of that name is a package"
    assert content_key(tree, "c") != content_key(tree, "b")


def test_what_cannot_be_built_says_why(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WheelError, match=r"has no pyproject.toml"):
        wheel_of(str(tmp_path), tmp_path / "cache")
    (tree / "pyproject.toml").write_text('[project]\nname = "probe"\n')
    with pytest.raises(WheelError, match="cannot be built:\n"):
        wheel_of(str(tree), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(WheelError, match=r"install requirements.txt on the control node"):
        wheel_of(str(tree), tmp_path / "cache")


def test_a_cache_that_lost_its_wheel_is_cleared(tree: Path, tmp_path: Path) -> None:
    built = wheel_of(str(tree), tmp_path / "cache")
    Path(built.path).unlink()
    with pytest.raises(WheelError, match="0 wheels instead of one"):
        wheel_of(str(tree), tmp_path / "cache")
    assert wheel_of(str(tree), tmp_path / "cache") == built


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    monkeypatch.setitem(sys.modules, "ansible.module_utils.citadel_source_wheel", source)

    def call(**options: Any) -> dict[str, Any]:
        from ansible.module_utils.testing import patch_module_args
        from modules import citadel_source_wheel as module

        with patch_module_args(options), pytest.raises(SystemExit):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    return call


def test_the_module_never_reports_a_change(play: Callable[..., dict[str, Any]], tree: Path, tmp_path: Path) -> None:
    answer = play(sources=[str(tree)], cache=str(tmp_path / "cache"))
    assert answer["changed"] is False
    assert [wheel["source"] for wheel in answer["wheels"]] == [str(tree)]
    assert "has no pyproject.toml" in play(sources=[str(tmp_path)], cache=str(tmp_path / "cache"))["msg"]
