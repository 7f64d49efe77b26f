"""Environments are built for real: by pip and uv, from wheels made on the spot, in a folder of the test's own."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from module_utils import citadel_python_env as env
from module_utils.citadel_python_env import BuildError, Environment, Interpreter, Supply, Wheel

UV = str(Path(sys.executable).with_name("uv"))
Play = Callable[..., dict[str, Any]]


def make_wheel(folder: Path, name: str, version: str = "1.0", files: dict[str, str] | None = None) -> Path:
    """The smallest wheel that an installer takes."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = {version!r}\n",
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    contents[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            archive.writestr(entry, text)
    return wheel


def pin(*wheels: Path) -> str:
    lines = ["# a comment"]
    for wheel in wheels:
        name, version, *_ = wheel.name.split("-")
        lines += [f"{name}=={version} \\", f"    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    return tmp_path / "wheelhouse"


@pytest.fixture
def python() -> Interpreter:
    return env.interpreter(sys.executable)


@pytest.fixture
def place(tmp_path: Path) -> Environment:
    root = tmp_path / "envs"
    root.mkdir()
    return Environment(root, "small", tmp_path / "link")


def release(place: Environment, identity: str, *, age: float = 0, complete: bool = True, lock: str = "") -> Path:
    """A release as far as its bookkeeping goes."""
    path = place.path(identity)
    path.mkdir()
    (path / env.LOCK).write_text(lock)
    if complete:
        (path / env.MARKER).write_text("{}")
        os.utime(path / env.MARKER, (time.time() - age, time.time() - age))
    return path


# --- names and numbers ---


def test_an_id_follows_from_what_is_installed() -> None:
    lock = "h11==1 \\\n    --hash=sha256:aa\n"
    wheel = Wheel("/x/a-1-py3-none-any.whl", "ab")
    first = env.release_id(lock, "cpython-3.11", [])
    assert env.release_id("# head\n\n" + lock + "    # via x\n", "cpython-3.11", []) == first
    others = {
        env.release_id(lock.replace("aa", "bb"), "cpython-3.11", []),
        env.release_id(lock, "cpython-3.12", []),
        env.release_id(lock, "cpython-3.11", [wheel]),
        env.release_id(lock, "cpython-3.11", [Wheel(wheel.path, "cd")]),
    }
    assert len({first, *others}) == 5
    assert len(first) == 12


def test_the_interpreter_counts_by_its_minor_version() -> None:
    assert Interpreter("p", (3, 12, 3), "cpython").tag == Interpreter("p", (3, 12, 4), "cpython").tag == "cpython-3.12"
    assert env.interpreter(sys.executable).text == ".".join(map(str, sys.version_info[:3]))


def test_packages_are_read_from_a_lock() -> None:
    lock = "# x\nh11==0.16.0 \\\n    --hash=sha256:aa\nidna==3.20 ; python_version > '3'\\\n    # via z\n"
    assert env.packages(lock) == ["h11==0.16.0", "idna==3.20"]


def test_a_wheel_lies_by_its_hash() -> None:
    wheel = Wheel.below(Path("/e"), "/cache/my_project-1.0-py3-none-any.whl", "0123456789abcdef01")
    assert wheel.path == "/e/.wheels/0123456789abcdef/my_project-1.0-py3-none-any.whl"
    assert wheel.requirement == f"my-project @ file://{wheel.path} --hash=sha256:0123456789abcdef01"


def test_with_a_wheelhouse_nothing_else_is_asked() -> None:
    supply = Supply(wheelhouse="/srv/w", index_url="https://secret@index", find_links=("/more",))
    assert supply.arguments() == ["--no-index", "--find-links=/srv/w"]
    assert supply.environment() == {}


def test_addresses_with_passwords_are_on_no_command_line() -> None:
    supply = Supply("", "https://u:p@one", ("https://u:p@two",), ("/links",), "http://u:p@proxy")
    assert supply.arguments() == ["--find-links=/links"]
    environment = supply.environment()
    assert environment["UV_DEFAULT_INDEX"] == environment["PIP_INDEX_URL"] == "https://u:p@one"
    assert environment["UV_INDEX"] == environment["PIP_EXTRA_INDEX_URL"] == "https://u:p@two"
    assert environment["https_proxy"] == "http://u:p@proxy"
    assert Supply().environment() == {}


# --- what is on the disk ---


def test_releases_are_listed_last_used_first(place: Environment) -> None:
    release(place, "a" * 12, age=10, lock="one")
    release(place, "b" * 12, age=5)
    half = release(place, "c" * 12, complete=False)
    release(Environment(place.root, "small-other", None), "d" * 12)
    (place.root / "small-file").touch()
    assert [(one.id, one.lock) for one in place.releases()] == [("b" * 12, ""), ("a" * 12, "one")]
    assert place.leftovers() == [half]
    assert Environment(place.root / "none", "x", None).releases() == []


def test_the_link_is_switched_and_followed(place: Environment) -> None:
    release(place, "a" * 12, age=100)
    release(place, "b" * 12, age=50)
    assert place.current() == ""
    place.switch("a" * 12)
    assert place.current() == "a" * 12
    assert place.releases()[0].id == "a" * 12, "what is switched to is used last"
    place.switch("b" * 12)
    assert place.current() == "b" * 12
    assert sorted(path.name for path in place.root.parent.iterdir()) == ["envs", "link"]
    Environment(place.root, "small", None).switch("a" * 12)
    assert Environment(place.root, "small", None).current() == ""
    assert place.link is not None
    place.link.unlink()
    place.link.symlink_to("/somewhere/else")
    assert place.current() == ""


def test_old_releases_go_unless_used(place: Environment, tmp_path: Path) -> None:
    for number, letter in enumerate("abcd"):
        release(place, letter * 12, age=number * 10)
    assert [path.name[-1] for path in place.superfluous("a" * 12, 1)] == ["c", "d"]
    assert place.superfluous("a" * 12, 3) == []
    sleeper = place.path("d" * 12) / "sleep"
    sleeper.symlink_to("/bin/sleep")
    with subprocess.Popen([str(sleeper), "60"]) as process:
        try:
            assert [path.name[-1] for path in place.superfluous("a" * 12, 1)] == ["c"]
        finally:
            process.kill()
    odd = tmp_path / "proc/1"
    odd.mkdir(parents=True)
    (odd / "cmdline").mkdir()
    assert not env.in_use(place.root, tmp_path / "proc"), "a process that cannot be read is none"


def test_one_build_at_a_time(tmp_path: Path) -> None:
    second = env.locked(tmp_path, patience=0.1)
    with env.locked(tmp_path), pytest.raises(BuildError, match="another build has held"), second:
        pass
    with env.locked(tmp_path, patience=0):
        pass


def test_a_lock_outlives_its_process_with_a_child(tmp_path: Path) -> None:
    with env.locked(tmp_path) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        with pytest.raises(BuildError), env.locked(tmp_path, patience=0):
            pass
    finally:
        child.kill()
        child.wait()


def test_commands_that_fail_say_how(tmp_path: Path) -> None:
    assert env.run(["sh", "-c", "echo $VIRTUAL_ENV$X"], environment={"X": "x", "VIRTUAL_ENV": "v"}) == "x\n"
    with pytest.raises(BuildError, match=r"ended with status 3:\nwhy"):
        env.run(["sh", "-c", "echo why; exit 3"])
    with pytest.raises(BuildError, match="cannot be run: No such file"):
        env.run([str(tmp_path / "nothing")])
    with pytest.raises(BuildError, match=r"did not end within 0.1 s"):
        env.run(["sleep", "5"], timeout=0.1)


# --- building ---


def test_a_release_is_built_checked_and_marked(place: Environment, house: Path, python: Interpreter) -> None:
    lock = pin(make_wheel(house, "alpha"))
    own = make_wheel(place.root / ".wheels" / ("f" * 16), "beta")
    old = make_wheel(place.root / ".wheels" / ("e" * 16), "beta", "0.9")
    wheel = Wheel(str(own), hashlib.sha256(own.read_bytes()).hexdigest())
    check = ["python", "-c", "import alpha, beta"]
    path = env.build(place, python, lock, [wheel], Supply(str(house)), uv=UV, check=check)
    assert env.run([str(path / "bin/python"), "-c", "import alpha; print(alpha.VERSION)"]) == "1.0\n"
    assert json.loads((path / env.MARKER).read_text())["wheels"] == {own.name: wheel.sha256}
    assert list(path.glob("lib/python*/site-packages/__pycache__/alpha.*.pyc"))
    assert not old.exists()
    assert not (place.root / ".cache").exists()
    assert not (path / ".lock").exists()
    assert place.leftovers() == []


@pytest.mark.parametrize("fault", ["hash", "missing", "check", "wheel"])
def test_what_fails_leaves_nothing(place: Environment, house: Path, python: Interpreter, fault: str) -> None:
    alpha = make_wheel(house, "alpha")
    lock, check, wheels = pin(alpha), ["true"], []
    if fault == "hash":
        make_wheel(house, "alpha", files={"other.py": ""})
    elif fault == "missing":
        alpha.unlink()
    elif fault == "check":
        check = ["python", "-c", "import nothing"]
    else:
        wheels = [Wheel(str(make_wheel(place.root / ".wheels/x", "beta")), "0" * 64)]
    running = release(place, "a" * 12)
    place.switch("a" * 12)
    with pytest.raises(BuildError):
        env.build(place, python, lock, wheels, Supply(str(house)), uv=UV, check=check)
    assert place.current() == "a" * 12
    assert [path for path in place.root.iterdir() if path.name.startswith("small-")] == [running]


def test_the_installer_is_made_once(tmp_path: Path, house: Path, python: Interpreter) -> None:
    lock = pin(make_wheel(house, "gamma"))
    older = Environment(tmp_path, env.INSTALLER, None)
    release(older, "a" * 12)
    release(older, "b" * 12, complete=False)
    first = env.ensure_installer(tmp_path, python, lock, Supply(str(house)))
    assert [path.name for path in tmp_path.glob("installer-*")] == [first.name]
    made = (first / env.MARKER).stat().st_mtime_ns
    assert env.ensure_installer(tmp_path, python, lock, Supply(str(house))) == first
    assert (first / env.MARKER).stat().st_mtime_ns == made


# --- the module ---


@pytest.fixture
def play(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, house: Path
) -> Iterator[Play]:
    """Run the module as Ansible would. The installer is a fake: a wheel with a script that calls the uv beside us."""
    monkeypatch.setitem(sys.modules, "ansible.module_utils.citadel_python_env", env)
    script = {"uv-0.1.data/scripts/uv": f'#!/bin/sh\nexec {UV} "$@"\n'}
    installer = pin(make_wheel(house, "uv", "0.1", script))
    alpha = make_wheel(house, "alpha")
    mask = os.umask(0o022)

    def call(**options: Any) -> dict[str, Any]:
        from ansible.module_utils.testing import patch_module_args
        from modules import citadel_python_env as module

        arguments = {
            "name": "small", "root": str(tmp_path / "envs"), "link": str(tmp_path / "link"), "lock": pin(alpha),
            "installer_lock": installer, "wheelhouse": str(house), "python": sys.executable, **options,
        }  # fmt: skip
        with patch_module_args(arguments), pytest.raises(SystemExit):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    yield call
    os.umask(mask)


def test_the_whole_life_of_an_environment(play: Play, house: Path, tmp_path: Path) -> None:
    planned = play(_ansible_check_mode=True)
    assert planned["changed"]
    assert "+" not in planned["diff"]["before"]
    assert "alpha==1.0" in planned["diff"]["after"]
    assert not (tmp_path / "envs").exists()

    first = play()
    assert "failed" not in first, first["msg"]
    assert first["release"] == planned["release"]
    assert (tmp_path / "link").resolve() == Path(first["path"])
    again = play()
    assert not again["changed"]
    assert "diff" not in again

    newer = pin(make_wheel(house, "alpha", "2.0"))
    second = play(lock=newer)
    assert (second["previous"], second["releases"]) == (first["release"], [second["release"], first["release"]])
    assert (second["diff"]["before"].splitlines()[-1], second["diff"]["after"].splitlines()[-1]) == (
        "alpha==1.0",
        "alpha==2.0",
    )
    back = play(lock=newer, release=first["release"])
    assert back["changed"]
    assert (tmp_path / "link").resolve() == Path(first["path"])

    half = release(Environment(tmp_path / "envs", "small", None), "0" * 12, complete=False)
    cleaned = play(lock=newer, keep=0)
    assert cleaned["releases"] == [second["release"]]
    assert not half.exists()

    gone = play(state="absent", _ansible_check_mode=True)
    assert gone["changed"]
    assert (tmp_path / "link").is_symlink()
    gone = play(state="absent")
    assert (gone["changed"], gone["previous"]) == (True, second["release"])
    assert not (tmp_path / "link").is_symlink()
    assert not play(state="absent")["changed"]


def test_what_cannot_be_is_refused_with_the_remedy(play: Play, tmp_path: Path) -> None:
    assert "there is no release '012345678901' on this host; there are: none" in play(release="012345678901")["msg"]
    assert "names no package" in play(lock="# nothing\n")["msg"]
    assert "older than 4.0: install a newer one" in play(python_minimum="4.0")["msg"]
    (tmp_path / "link").mkdir()
    refused = play()
    assert refused["failed"]
    assert "move it away" in refused["msg"]
