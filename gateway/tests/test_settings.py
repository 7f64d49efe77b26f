"""The three files, and what is said about mistakes in them."""

import json
import re
from pathlib import Path

import pytest
from citadel_gateway import settings
from citadel_gateway.settings import ConfigError, Gateway, Keys, Models, engine_key, problems, read

from gateway.tests.site import Site, digest


def test_good_files_have_no_problems(site: Site) -> None:
    site.model("one", 11400, aliases=["uno"])
    assert problems(site.write()) == []
    assert site.settings.limits.body_bytes == 16 * 1024 * 1024


def test_an_unknown_key_is_named_with_its_file(site: Site) -> None:
    site.config["timeouts"]["conect"] = 1
    path = site.write()
    (line,) = problems(path)
    assert line == f"{path}: Object contains unknown field `conect` - at `$.timeouts`"
    with pytest.raises(ConfigError, match="conect"):
        read(path, Gateway)


@pytest.mark.parametrize(
    ("field", "value"),
    [("workers", 0), ("workers", "2"), ("listen", {"address": "x", "port": 70000}), ("timeouts", {"connect": 0})],
)
def test_impossible_values_are_refused(site: Site, field: str, value: object) -> None:
    site.config[field] = value
    (line,) = problems(site.write())
    assert f"$.{field}" in line


def test_what_the_types_cannot_say(site: Site) -> None:
    site.model("one", 1, aliases=["two"])
    site.model("two", 1)
    site.model("three", 3, 3)
    site.keys += [{"id": "user", "sha256": digest("x"), "models": ["nothing"]}, {"id": "y", "sha256": digest("x")}]
    site.config["cors"]["allow_origins"] = ["page.example", "*"]
    site.config["run_dir"] = "run"
    site.config["control_socket"] = "/" + "x" * 120
    found = "\n".join(problems(site.write()))
    for text in (
        "the name 'two' is used 2 times",
        "127.0.0.1:1 belongs to both 'one' and 'two'",
        "'three' names a backend twice",
        "the id 'user' is used 2 times",
        "the sha256",
        "key 'user' names the model 'nothing'",
        "'page.example' is no origin",
        "run_dir: 'run' is not an absolute path",
        "control_socket: longer than",
    ):
        assert text in found
    assert len(found.splitlines()) == 9


def test_users_tiers_and_where_limits_are_counted(site: Site) -> None:
    site.model("one", 1)
    site.users = [{"id": "ann", "tier": "gold"}, {"id": "ann"}]
    site.policies = {"tiers": [{"name": "free", "tokens_per_day": 5}, {"name": "staff"}]}
    path = site.write()
    assert problems(path) == [
        f"{site.config['keys_file']}: the user 'ann' is there 2 times",
        f"{site.config['keys_file']}: user 'ann' has the tier 'gold', which is not in the policies",
        f"{path}: tier 'free' has limits, which are counted in memory: one worker, or set redis.url",
    ]
    site.users = []
    site.config["workers"] = 1
    assert problems(site.write()) == []
    site.config |= {"workers": 2, "redis": {"url": "redis://gateway@127.0.0.1:6379/0"}}
    assert problems(site.write()) == []


def test_policies_that_cannot_be_used(site: Site) -> None:
    site.config["workers"] = 1
    site.model("one", 1)
    site.policies = {
        "tiers": [
            {"name": "free", "overage": "degrade"},
            {"name": "free", "models": ["two"]},
        ],
        "default_tier": "gold",
        "policies": [
            {"name": "one"},
            {"name": "auto", "rules": [{"name": "r", "models": ["three"], "when": {"tiers": ["gold"]}}]},
            {"name": "other", "aliases": ["auto"]},
        ],
        "routing": {"hedge_after": 1},
    }
    found = "\n".join(problems(site.write()))
    for text in (
        "the tier 'free' stands twice",
        "default_tier: there is no tier 'gold'",
        "tier 'free': overage 'degrade' needs degrade_to",
        "policy 'one' is called 'one', as a model is",
        "tier 'free' names the model 'two'",
        "rule 'r' names the model 'three'",
        "rule 'r' names the tier 'gold'",
        "the policy 'auto' stands twice",
        "routing.hedge_after: requests are not hedged",
    ):
        assert text in found
    assert len(found.splitlines()) == 9
    site.policies = {"tiers": []}
    site.model("two", 2, aliases=["deux"], fallback=["deux", "one", "three"])
    first, second, third = problems(site.write())
    assert "'two' falls back to 'deux', which is no other" in first
    assert "'two' falls back to 'three', which is no other" in second
    assert third.endswith("tiers: there must be one at least")


def test_a_server_of_several_models(site: Site) -> None:
    for name in ("one", "two"):
        site.model(name, 1)
    assert "belongs to both" in problems(site.write())[0]
    for field in ("shared", "gateway"):
        for model in site.models:
            model["backends"] = [{"host": "127.0.0.1", "port": 1, field: True}]
        site.config["peer_key_file"] = "/peer"
        assert problems(site.write()) == []
    site.config["peer_key_file"] = ""
    assert "peer_key_file: needed" in problems(site.write())[0]


@pytest.mark.parametrize(
    ("section", "url", "said"),
    [
        ("redis", "http://h", "redis.url: must begin with redis://"),
        ("redis", "redis://u:secret@h:1/0", "redis.url: holds a password"),
        ("database", "mysql://h", "database.url: must begin with postgresql"),
        ("database", "postgresql+psycopg://u:secret@h/n", "database.password_file"),
        ("redis", "unix://u@/run/redis.sock?db=0", ""),
        ("database", "postgresql+psycopg://u@[::1]:5433/n", ""),
    ],
)
def test_where_things_are_kept(site: Site, section: str, url: str, said: str) -> None:
    site.config[section] = {"url": url}
    found = problems(site.write())
    assert bool(found) == bool(said)
    assert said in "".join(found)
    assert "secret" not in "".join(found)


def test_every_setting_is_described() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    structs = [kind for kind in vars(settings).values() if isinstance(kind, type) and issubclass(kind, settings.Strict)]
    names = {name for kind in structs for name in kind.__struct_fields__}
    assert len(names) > 80
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []


def test_each_file_is_looked_at(site: Site) -> None:
    path = site.write()
    Path(site.config["models_file"]).write_text("{")
    Path(site.config["keys_file"]).unlink()
    lines = problems(path)
    assert lines[0].startswith(f"{site.config['models_file']}: ")
    assert lines[1] == f"{site.config['keys_file']}: cannot be read: No such file or directory"
    assert problems(site.folder / "nothing.json")[0].endswith("No such file or directory")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Models, {"models": [{"name": "a b", "backends": [{"host": "h", "port": 1}]}]}),
        (Models, {"models": [{"name": "a\n", "backends": [{"host": "h", "port": 1}]}]}),
        (Models, {"models": [{"name": "a", "backends": []}]}),
        (Models, {"models": [{"name": "a", "backends": [{"host": "h", "port": 1, "health": "/a b"}]}]}),
        (Keys, {"keys": [{"id": "a", "sha256": "short"}]}),
        (Keys, {"keys": [{"id": "a", "sha256": "0" * 64, "scopes": ["root"]}]}),
    ],
)
def test_entries_are_checked(tmp_path: Path, kind: type[Models], value: object) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=str(path)):
        read(path, kind)


def test_the_engine_key(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_key(site.settings) == "engine-secret"
    site.config["engine_key_file"] = ""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="neither"):
        engine_key(site.settings)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(site.folder))
    assert engine_key(site.settings) == "engine-secret"
    (site.folder / "engine-key").write_text("a b")
    with pytest.raises(ConfigError, match="blank"):
        engine_key(site.settings)
    (site.folder / "engine-key").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        engine_key(site.settings)
