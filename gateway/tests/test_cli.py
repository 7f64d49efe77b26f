"""The command, as far as it needs no server. What starts processes is in test_serve."""

import hashlib
import io
import runpy
import sys

import pytest
from citadel_gateway import __version__
from citadel_gateway.cli.main import main

from gateway.tests.site import Site

COMMANDS = (
    "worker", "control", "serve", "check-config", "hash-key", "drain", "resume", "users", "keys", "tiers", "policies",
    "overrides", "audit",
)  # fmt: skip


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: citadel-gateway" in text
    if not command:
        assert all(name in text for name in COMMANDS)


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["citadel-gateway", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("citadel_gateway", run_name="__main__")
    assert capsys.readouterr().out == f"citadel-gateway {__version__}\n"


def test_a_key_is_hashed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("sk-mine\n"))
    assert main(["hash-key"]) == 0
    assert capsys.readouterr().out.strip() == hashlib.sha256(b"sk-mine").hexdigest()
    assert main(["hash-key"]) == 2  # nothing left to read


def test_check_config(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(site.write())
    assert main(["check-config", "--config", path]) == 0
    site.config["limits"]["bodybytes"] = 1
    site.keys[0]["sha256"] = "x"
    site.write()
    monkeypatch.setenv("CITADEL_GATEWAY_CONFIG", path)
    capsys.readouterr()
    assert main(["check-config"]) == 78
    (line,) = capsys.readouterr().out.splitlines()
    assert "bodybytes" in line
    del site.config["limits"]["bodybytes"]
    site.model("one", 1)
    site.model("one", 2)
    site.write()
    assert main(["check-config"]) == 78
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("command", [["worker", "1"], ["control"], ["serve"], ["drain", "one"]])
def test_a_configuration_that_cannot_be_used_is_status_78(
    site: Site, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    site.config["unknown"] = 1
    assert main([*command, "--config", str(site.write())]) == 78
    assert "unknown field `unknown`" in capsys.readouterr().err
    del site.config["unknown"]
    site.config["run_dir"] = "relative"
    assert main([*command, "--config", str(site.write())]) == 78
    assert "not an absolute path" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["worker", "1"], ["control"]])
def test_several_workers_do_not_count_limits_each_for_itself(
    site: Site, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    site.policies = {"tiers": [{"name": "free", "requests_per_minute": 5}]}
    assert main([*command, "--config", str(site.write())]) == 78
    assert "counted in memory: one worker, or set redis.url" in capsys.readouterr().err


def test_a_worker_needs_a_socket(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "1", "--config", str(site.write())]) == 78
    assert "no listening socket" in capsys.readouterr().err


def test_drain_without_a_control_process(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(site.write())
    assert main(["drain", "one", "--config", path]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["drain", "one", "--config", path, "--key-file", "/nothing"]) == 78
    monkeypatch.setenv("CITADEL_GATEWAY_KEY", "sk")
    assert main(["resume", "one", "--config", path, "--engine-key-file", "/nothing"]) == 1
