"""The commands of administration, against a control process."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from citadel_gateway.cli.client import Client, Failed, message_of, operator
from citadel_gateway.cli.main import main
from citadel_gateway.settings import local_key_path

from gateway.tests.client import ADMIN, KEY
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.site import Site

Command = Callable[..., str]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedControl]:
    site = Site(tmp_path_factory.mktemp("admin"))
    site.config["workers"] = 1
    site.model("one", 11400, aliases=["uno"])
    site.model("org/two", 11402)
    site.policies = {"tiers": [{"name": "basic", "tokens_per_minute": 1000}, {"name": "premium"}]}
    found = ThreadedControl(site).start()
    until(lambda: found.state.people.version >= 0)
    yield found
    found.stop()


@pytest.fixture
def command(
    control: ThreadedControl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs one and gives what it printed; the run-time changes are taken back at the end."""
    monkeypatch.setenv("CITADEL_GATEWAY_CONFIG", str(control.site.folder / "gateway.json"))
    monkeypatch.setenv("SUDO_USER", "olivia")

    def run(*words: str, status: int = 0) -> str:
        assert main(words) == status, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    yield run
    for change in control.ask("GET", "/admin/overrides").json():
        control.ask("DELETE", "/admin/overrides?kind={kind}&name={name}&field={field}".format(**change))


def test_the_first_admin_key(control: ThreadedControl, command: Command) -> None:
    """As the role does it: no key is needed by whoever may read the local one."""
    key = command("keys", "create", "--admin", "--user", "operator").strip()
    assert control.ask("GET", "/admin/users", key=key).status == 200
    assert control.ask("GET", "/metrics", key=key).status == 200
    assert "admin,read,metrics" in command("keys", "list", "--user", "operator")
    assert command("keys", "create", "--admin", "--user", "operator", "--if-none") == ""
    (line,) = json.loads(command("audit", "--json", "--target", "operator"))
    assert (line["action"], line["who"], line["via"]) == ("user.create", "olivia", "cli")


def test_users(command: Command) -> None:
    assert command("users", "create", "ann@example.org", "--tier", "premium", "--name", "Ann") == (
        "user ann@example.org is there\n"
    )
    assert "premium" in command("users", "list")
    changed = command("users", "change", "ann@example.org", "--tier", "basic")
    assert changed == "user ann@example.org: tier basic, name 'Ann'\n"
    assert command("users", "disable", "ann@example.org") == "user ann@example.org: disabled\n"
    assert "NO" in command("users", "list")
    assert command("users", "enable", "ann@example.org") == "user ann@example.org: enabled\n"
    assert command("users", "change", "nobody", status=1) == "There is no user 'nobody'\n"
    assert "ann@example.org" in [user["id"] for user in json.loads(command("users", "list", "--json"))]


def test_keys(control: ThreadedControl, command: Command) -> None:
    words = ("--id", "bob-1", "--model", "one", "--scope", "inference", "--scope", "read", "--expires", "90d")
    key = command("keys", "create", "--user", "bob", "--new-user", *words).strip()
    assert control.opens(key)
    listed = command("keys", "list")
    assert "bob-1" in listed
    assert key not in listed
    new = json.loads(command("keys", "rotate", "bob-1", "--grace", "0", "--json"))
    assert not control.opens(key)
    assert control.opens(new["key"])
    assert "bob-1" in command("keys", "list", "--all")
    assert command("keys", "revoke", new["entry"]["id"]).endswith(": revoked\n")
    assert not control.opens(new["key"])
    assert command("keys", "revoke", "user") == "key user: disabled\n"
    assert not control.opens(KEY)
    assert command("keys", "enable", "user") == "key user: valid\n"
    assert control.opens(KEY)
    assert "There is no user" in command("keys", "create", "--user", "nobody", status=1)
    with pytest.raises(SystemExit):
        command("keys", "create", "--user", "bob", "--expires", "soon")


def test_tiers_and_policies(command: Command) -> None:
    words = ("tokens_per_minute=50", "overage=bill")
    assert command("tiers", "set", "basic", *words) == "tier basic: tokens_per_minute=50, overage=bill\n"
    assert "50" in command("tiers", "list")
    assert command("tiers", "reset", "basic") == "basic: as the files say\n"
    assert json.loads(command("tiers", "list", "--json"))[0]["tokens_per_minute"] == 1000
    assert "write FIELD=VALUE" in command("tiers", "set", "basic", "x", status=1)
    assert "Expected `int`" in command("tiers", "set", "basic", "tokens_per_minute=x", status=1)
    assert command("policies", "set", "fast", '{"choose": "latency"}').startswith("policy fast: ")
    assert [one["name"] for one in json.loads(command("policies", "list"))] == ["auto", "fast"]
    assert command("policies", "reset", "fast") == "fast: as the files say\n"
    assert "@/nothing" in command("policies", "set", "fast", "@/nothing", status=1)


def test_overrides(control: ThreadedControl, command: Command, tmp_path: Path) -> None:
    assert command("overrides") == "nothing is changed: the files count\n"
    (tmp_path / "aliases").write_text('["due"]')
    made = command("overrides", "set", "aliases", "org/two", f"@{tmp_path / 'aliases'}")
    assert "olivia" in made
    assert "in force" in made
    command("overrides", "set", "weight", "one", "0.5", "--field", "127.0.0.1:11400")
    command("overrides", "set", "drain", "one")
    assert control.snapshot().draining == {"one": ["operator"]}
    assert [one["kind"] for one in json.loads(command("overrides", "list", "--json"))] == ["aliases", "weight", "drain"]
    command("overrides", "remove", "drain", "one")
    assert control.snapshot().draining == {}
    assert "KIND and NAME" in command("overrides", "set", "weight", status=1)
    assert "it has not been changed" in command("overrides", "remove", "drain", "one", status=1)


def test_what_a_deploy_would_undo(control: ThreadedControl, command: Command, tmp_path: Path) -> None:
    command("overrides", "set", "aliases", "org/two", '["due"]')
    command("tiers", "set", "basic", "tokens_per_minute=50")
    command("tiers", "set", "premium", "priority=4")
    assert command("overrides", "--against", str(control.site.folder)) == ""
    model = {"name": "one", "backends": [{"host": "127.0.0.1", "port": 11400}], "aliases": ["due"]}
    other = {"name": "org/two", "backends": [{"host": "127.0.0.1", "port": 11402}]}
    (tmp_path / "models.json").write_text(json.dumps({"models": [model, other]}))
    tiers = [{"name": "basic", "tokens_per_minute": 2000}, {"name": "premium"}]
    (tmp_path / "policies.json").write_text(json.dumps({"tiers": tiers}))
    collides, undone = command("overrides", "--against", str(tmp_path)).splitlines()
    assert collides.startswith('collides: aliases org/two = ["due"], set by olivia at ')
    assert "the name 'due' is used 2 times" in collides
    assert undone.startswith("undone: tier basic tokens_per_minute = 50, set by olivia at ")
    assert undone.endswith("declared was 1000 and becomes 2000")
    (tmp_path / "models.json").write_text(json.dumps({"models": [model]}))
    (gone,) = json.loads(command("overrides", "--json", "--against", str(tmp_path / "models.json")))
    assert gone["status"] == "gone"
    assert "is none of" in command("overrides", "--against", str(tmp_path / "other.json"), status=1)
    (tmp_path / "models.json").write_text("{")
    assert "models.json" in command("overrides", "--against", str(tmp_path), status=78)


def test_what_a_deploy_would_undo_without_the_control_process(
    control: ThreadedControl, command: Command, tmp_path: Path
) -> None:
    command("tiers", "set", "basic", "tokens_per_minute=50")
    config = json.loads((control.site.folder / "gateway.json").read_text()) | {"control_socket": str(tmp_path / "none")}
    (tmp_path / "gateway.json").write_text(json.dumps(config))
    (tmp_path / "policies.json").write_text(json.dumps({"tiers": [{"name": "basic"}, {"name": "premium"}]}))
    words = ("--config", str(tmp_path / "gateway.json"), "--against", str(tmp_path / "policies.json"))
    assert command("overrides", *words).startswith("undone: tier basic tokens_per_minute = 50")


def test_drain_and_resume(control: ThreadedControl, command: Command, tmp_path: Path) -> None:
    assert command("drain", "uno") == "one: draining\n"
    assert command("resume", "one") == "one: taking requests\n"
    assert command("drain", "one", "--here") == "one: draining\n"
    assert control.state.people.overrides == ()
    assert command("resume", "one") == "one: taking requests\n"
    assert "does not exist" in command("drain", "nothing", status=1)
    (tmp_path / "key").write_text(f"{ADMIN}\n")
    assert command("drain", "org/two", "--key-file", str(tmp_path / "key")) == "org/two: draining\n"
    engine = str(control.site.folder / "engine-key")
    assert command("resume", "org/two", "--engine-key-file", engine) == "org/two: draining\n"  # an operator's it is not
    assert command("resume", "org/two") == "org/two: taking requests\n"


def test_the_log_of_changes(command: Command) -> None:
    command("users", "create", "zack")
    line = next(one for one in command("audit", "--limit", "3").splitlines() if "zack" in one)
    assert "olivia" in line
    assert "user.create" in line
    assert "zack" in command("users", "change", "zack", "--name", "Z", "--json")


def test_answers_that_are_none(
    control: ThreadedControl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(control.settings, ADMIN)
    with pytest.raises(Failed, match="something else than JSON"):
        client.ask("GET", "/live")
    assert client.ask("GET", "/admin/models")[0]["name"] == "one"
    assert message_of(b"<html>") == "<html>"
    assert message_of(b"") == "refused without a reason"

    def nobody() -> str:
        raise OSError

    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr("getpass.getuser", nobody)
    assert operator() == str(os.getuid())


def test_the_key_that_is_given(
    control: ThreadedControl, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CITADEL_GATEWAY_KEY", KEY)
    assert "lacks the scope" in command("users", "list", status=1)
    (tmp_path / "key").write_text(ADMIN)
    assert "USER" in command("users", "list", "--key-file", str(tmp_path / "key"))
    assert "No such file" in command("users", "list", "--key-file", "/nothing", status=78)
    monkeypatch.delenv("CITADEL_GATEWAY_KEY")
    local = local_key_path(control.settings)
    local.rename(tmp_path / "kept")
    assert command("users", "list", status=78).startswith(f"{local}: not there: the control process makes it")
    (tmp_path / "kept").rename(local)
