"""The Python environments in use: whole, exactly what their locks say, ready to run, and nobody's to change."""

import json
import re
from pathlib import PurePosixPath

import pytest
from testinfra.host import Host

# Runs in an environment: what is installed there, and from where.
_INVENTORY = """
import importlib.metadata, json, os, re, sys
names = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"prefix": os.path.realpath(sys.prefix), "installed": names}))
"""


@pytest.fixture
def links(host: Host) -> list[str]:
    """Links to releases. A host that was given no environment has none."""
    found = host.check_output("find /opt/citadel -maxdepth 1 -type l -lname '*/envs/*' 2>/dev/null | sort").split()
    if not found:
        pytest.skip("no environment on this host")
    return list(found)


def test_each_environment_holds_exactly_what_its_lock_says(host: Host, links: list[str]) -> None:
    for link in links:
        release = host.check_output("readlink -f %s", link)
        description = json.loads(host.file(f"{release}/citadel-release.json").content_string)
        assert PurePosixPath(release).name == f"{description['name']}-{description['id']}"
        told = json.loads(host.check_output("%s -I -c %s", f"{link}/bin/python", _INVENTORY))
        assert told["prefix"] == release
        lock = host.file(f"{release}/citadel-lock.txt").content_string
        # one name may be there several times, each version for other interpreters
        pins: dict[str, set[str]] = {}
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, re.MULTILINE):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
        wheels = {re.sub(r"[-_.]+", "-", wheel.split("-", 1)[0]).lower() for wheel in description["wheels"]}
        # A universal lock also names packages of other systems, so not every pin is installed; but nothing else is.
        assert {name for name in told["installed"] if name not in pins} == wheels
        wrong = {
            name: version for name, version in told["installed"].items() if version not in pins.get(name, {version})
        }
        assert wrong == {}, f"{link}: other versions than the lock's"


def test_no_interrupted_build_is_left(host: Host, links: list[str]) -> None:
    roots = {str(PurePosixPath(host.check_output("readlink -f %s", link)).parent) for link in links}
    for root in roots:
        command = "find %s -mindepth 1 -maxdepth 1 -name '[a-z]*' ! -exec test -e {}/citadel-release.json ';' -print"
        assert host.check_output(command, root) == ""


def test_only_root_can_change_an_environment(host: Host, links: list[str]) -> None:
    for link in links:
        command = "find -H %s ! -type l '(' ! -user root -o -perm /022 ')' -print -quit"
        assert host.check_output(command, link) == ""


def test_byte_code_is_compiled(host: Host, links: list[str]) -> None:
    for link in links:
        sources, compiled = (
            int(host.check_output("find -H %s/lib -path '*/site-packages/*' -name %s | wc -l", link, name))
            for name in ("*.py", "*.pyc")
        )
        assert compiled > 0.9 * sources, "some packages ship templates that are no Python, but not that many"
