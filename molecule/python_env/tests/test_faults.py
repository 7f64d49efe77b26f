"""What goes wrong while an environment is built must not touch the one in use. These tests change their own host."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "molecule/python_env/files"
LINK = "/opt/citadel/trial-env"
ENVS = "/opt/citadel/envs"

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(host: Host, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setenv("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))

    def play(lock: str = "first.txt", **options: Any) -> dict[str, Any]:
        arguments = {
            "name": "trial",
            "root": ENVS,
            "link": LINK,
            "lock": (FILES / lock).read_text(),
            "installer_lock": (ROOT / "files/requirements/installer.txt").read_text(),
            "wheelhouse": "/srv/wheelhouse",
            **options,
        }
        result: dict[str, Any] = host.ansible("citadel_python_env", json.dumps(arguments), check=False, verbose=True)
        return result

    return play


@pytest.fixture(autouse=True)
def afterwards(build: Build) -> Any:
    yield
    assert build(state="absent")["changed"] in {True, False}


def releases(host: Host) -> list[str]:
    return sorted(host.check_output("find %s -maxdepth 1 -name 'trial-*' -printf '%%f '", ENVS).split())


def works(host: Host) -> bool:
    return bool(host.run("%s/bin/python -I -c 'import h11, idna, typing_extensions'", LINK).succeeded)


def test_a_wrong_hash_leaves_the_environment_in_use_alone(host: Host, build: Build) -> None:
    before = build()
    failed = build("wrong-hash.txt")
    assert "release" not in failed
    assert "idna" in failed["msg"]
    assert releases(host) == [f"trial-{before['release']}"]
    assert host.file(LINK).linked_to == before["path"]
    assert works(host)


def test_a_failing_check_leaves_the_environment_in_use_alone(host: Host, build: Build) -> None:
    before = build()
    failed = build("second.txt", check=["python", "-c", "import typing_extensions"])
    assert "No module named 'typing_extensions'" in failed["msg"]
    assert releases(host) == [f"trial-{before['release']}"]
    assert works(host)


def test_a_release_can_be_gone_back_to(host: Host, build: Build) -> None:
    first, second = build(), build("second.txt")
    assert (second["previous"], host.file(LINK).linked_to) == (first["release"], second["path"])
    back = build("second.txt", release=first["release"])
    assert back["changed"]
    assert host.file(LINK).linked_to == first["path"]
    assert works(host)
    assert not build("second.txt", release=first["release"])["changed"]
    again = build("second.txt")
    assert again["changed"]
    assert sorted(again["releases"]) == sorted([first["release"], second["release"]])
    assert "there is no release" in build(release="0123456789ab")["msg"]


def test_a_killed_build_is_never_used_and_is_made_again(host: Host, build: Build) -> None:
    before = build()
    # uv is replaced by something that kills the module which called it: nothing gets a chance to clean up.
    uv = host.check_output("echo %s/installer-*/bin/uv", ENVS).strip()
    host.check_output("mv %s %s.real && printf '#!/bin/sh\nkill -9 $PPID\n' > %s && chmod 755 %s", uv, uv, uv, uv)
    try:
        assert "release" not in build("second.txt")
    finally:
        host.check_output("mv %s.real %s", uv, uv)
    assert len(releases(host)) == 2, "the half-made one is there"
    assert host.file(LINK).linked_to == before["path"]
    assert works(host)
    after = build("second.txt")
    assert after["changed"]
    assert sorted(after["releases"]) == sorted([before["release"], after["release"]])
    assert not build("second.txt")["changed"]


def test_old_releases_are_removed_unless_something_runs_from_them(host: Host, build: Build) -> None:
    first = build()
    user = "systemd-run --quiet --unit=trial-user %s/bin/python -c 'import time; time.sleep(600)'"
    host.check_output(user, first["path"])
    try:
        second = build("second.txt", keep=0)
        assert set(second["releases"]) == {first["release"], second["release"]}
    finally:
        host.check_output("systemctl stop trial-user")
    assert build("second.txt", keep=0)["releases"] == [second["release"]]
