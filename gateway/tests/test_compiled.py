"""What `citadel-gateway compile` says and does; the lab's gateways run what it makes."""

import sys
from pathlib import Path

import pytest
from citadel_gateway import compiled
from citadel_gateway.cli.main import main
from citadel_gateway.compiled import MODULES, PACKAGE


def test_every_module_is_there() -> None:
    assert [name for name in MODULES if not (PACKAGE / f"{name}.py").exists()] == []


def test_no_struct_that_is_decoded_is_compiled() -> None:
    texts = {name: (PACKAGE / f"{name}.py").read_text() for name in MODULES}
    assert [name for name, text in texts.items() if "(Struct" in text] == ["core/ticket"]  # not decoded


def test_without_a_compiler_the_gateway_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["compile"]) == 0
    assert "there is no C compiler" in capsys.readouterr().err
    assert main(["compile", "--required"]) == 1


def test_what_was_made_is_put_beside_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one module instead of all: the whole takes a minute."""
    package = tmp_path / "small"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("def twice(number: int) -> int:\n    return 2 * number\n")
    monkeypatch.setattr(compiled, "PACKAGE", package)
    monkeypatch.setattr(compiled, "MODULES", ("one",))
    if compiled.missing():
        pytest.skip(compiled.missing())
    assert main(["compile", "--required"]) == 0
    assert "compiled: " in capsys.readouterr().out
    monkeypatch.syspath_prepend(tmp_path)
    import small.one  # type: ignore[import-not-found]  # made above

    assert small.one.__file__.endswith(compiled.SUFFIX)
    assert small.one.twice(21) == 42
    del sys.modules["small.one"], sys.modules["small"]


def test_a_module_that_cannot_be_compiled_is_no_failure_of_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "one.py").write_text("def wrong() -> int:\n    return 'text'\n")
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    monkeypatch.setattr(compiled, "MODULES", ("one",))
    assert main(["compile"]) == 0
    assert main(["compile", "--required"]) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".so"] == []
