"""The escalator: it runs, looks at Alertmanager, goes by the site's matrix, and is shut in."""

import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "citadel-escalator.service"


@pytest.fixture
def config_file(host: Host) -> str:
    command = host.check_output("systemctl show --property=ExecStart --value %s", UNIT)
    found = re.search(r"--config (\S+\.json)", command)
    if not found:
        pytest.skip("the escalator is on another host")
    return found[1]


@pytest.fixture
def config(read_json: Callable[[str], Any], config_file: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(config_file)
    return found


@pytest.fixture
def ask(fetch: Callable[..., Any], config: dict[str, Any]) -> Callable[[str], Any]:
    listen = f"[{config['listen']}]" if ":" in config["listen"] else config["listen"]
    return lambda path: fetch(f"http://{listen}:{config['port']}{path}")


def test_it_is_up_and_comes_back(unit: Callable[[str], Any], config_file: str) -> None:
    """The escalator is up, and started at boot."""
    assert config_file
    unit(UNIT).assert_active()
    unit(UNIT).assert_enabled()


def test_it_sees_alertmanager(ask: Callable[[str], Any]) -> None:
    """It has looked at Alertmanager in the last few intervals."""
    answer = ask("/healthz")
    assert answer.status == 200, answer.body


def test_its_metrics_name_every_level_of_the_matrix(ask: Callable[[str], Any], config: dict[str, Any]) -> None:
    """Each severity and level of the matrix has its counter, from the start on."""
    page = ask("/metrics").body
    for rule in config["rules"]:
        for level in rule["levels"]:
            assert f'citadel_escalations_total{{level="{level}",severity="{rule["severity"]}"}}' in page
    assert "citadel_escalator_last_success_timestamp_seconds " in page


def test_it_has_counted_no_damaged_state(ask: Callable[[str], Any]) -> None:
    """Its memory on the disk is sound."""
    assert 'citadel_escalator_errors_total{reason="state"} 0\n' in ask("/metrics").body


def test_its_configuration_is_one_that_it_takes(host: Host, unit: Callable[[str], Any], config_file: str) -> None:
    """The program takes the configuration that is there, and runs on it."""
    program = re.search(r"path=(\S+)", unit(UNIT).show("ExecStart")["ExecStart"])
    assert program
    assert host.run("%s --check --config %s", program[1], config_file).rc == 0


def test_it_is_a_user_of_its_own(host: Host, unit: Callable[[str], Any], config_file: str) -> None:
    """It runs as a user that cannot log in and owns nothing but its memory."""
    who = unit(UNIT).show("User")["User"]
    assert host.user(who).shell.endswith("nologin")
    assert host.file("/var/lib/citadel-escalator").mode == 0o700
    assert host.file(config_file).user == "root"


def test_a_password_is_closed(host: Host, config: dict[str, Any], config_file: str) -> None:
    """A password of Alertmanager's is readable by root and the escalator alone."""
    if not config["password_file"]:
        pytest.skip("Alertmanager wants no password")
    found = host.file(config["password_file"])
    assert (found.user, found.mode) == ("root", 0o640)
    assert PurePosixPath(config["password_file"]).parent == PurePosixPath(config_file).parent
    assert found.content_string.strip() not in json.dumps(config)


def test_exposure_is_small(host: Host, config_file: str) -> None:
    """systemd calls it well shut in: 1.5 or better."""
    assert config_file
    told = host.check_output("systemd-analyze security --no-pager %s", UNIT)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert found, told
    assert float(found[1]) <= 1.5, told
