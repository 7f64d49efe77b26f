"""Run-time changes over the files: which hold, and which a deploy undoes. Pure, and against a control process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import hypothesis
import msgspec
import pytest
from citadel_gateway import snapshot
from citadel_gateway.control.changes import Change, drain, resume, set_changes
from citadel_gateway.control.state import State
from citadel_gateway.control.stored import Actor
from citadel_gateway.errors import Refusal
from citadel_gateway.overrides import Kind, Override, apply, problems_of, read_files
from citadel_gateway.settings import Model, Policies
from hypothesis import strategies as st

from gateway.tests.client import ADMIN
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site, digest

TIERS = [{"name": "basic", "tokens_per_minute": 1000}, {"name": "premium", "priority": 5}]
ROOT = Actor("root", "local", "cli")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path)
    found.config["workers"] = 1
    found.model("one", 11400, 11401, aliases=["uno", "prod"])
    found.model("two", 11402)
    found.policies = {"tiers": TIERS, "policies": [{"name": "auto"}, {"name": "fast", "choose": "latency"}]}
    found.users.append({"id": "owner", "tier": "basic"})
    return found


def judged(site: Site, *changes: Override) -> dict[tuple[str, str], str]:
    settings = site.settings
    _, standings = apply(read_files(settings), changes, settings)
    return {(one.override.kind, one.override.name): one.status for one in standings}


def test_a_change_holds_as_long_as_the_files_say_what_they_said(site: Site) -> None:
    weight = Override("weight", "one", "127.0.0.1:11400", 0.25, 1.0, at=1)
    aliases = Override("aliases", "two", "", ["due"], [], at=2)
    tier = Override("tier", "basic", "tokens_per_minute", 500, 1000, at=3)
    policy = Override("policy", "slow", "", {"models": ["two"]}, None, at=4)
    user = Override("user", "owner", "tier", "premium", "basic", at=5)
    key = Override("key", "user", "enabled", False, True, at=6)
    drained = Override("drain", "two", "", True, None, at=7)
    changes = (weight, aliases, tier, policy, user, key, drained)
    settings = site.settings
    files, standings = apply(read_files(settings), changes, settings)
    assert {one.status for one in standings} == {"holds"}
    assert files.models[0].backends[0].weight == 0.25
    assert files.models[1].aliases == ("due",)
    assert files.policies.tiers[0].tokens_per_minute == 500
    assert [one.name for one in files.policies.policies] == ["auto", "fast", "slow"]
    assert files.users[0].tier == "premium"
    assert [one.id for one in files.keys] == ["admin"]
    assert files.drained == ("two",)

    assert site.policies is not None
    site.policies["tiers"] = [{"name": "basic", "tokens_per_minute": 2000}, TIERS[1]]
    site.users[0]["tier"] = "premium"
    site.models[0]["backends"].pop(0)
    site.models[1]["name"] = "three"
    assert judged(site, *changes) == {
        ("weight", "one"): "gone",
        ("aliases", "two"): "gone",
        ("tier", "basic"): "undone",
        ("policy", "slow"): "collides",
        ("user", "owner"): "same",
        ("key", "user"): "holds",
        ("drain", "two"): "gone",
    }


def test_a_change_for_another_host_is_none_here(site: Site) -> None:
    change = Override("drain", "one", value=True, host="elsewhere")
    settings = site.settings
    files, standings = apply(read_files(settings), [change], settings)
    assert (files.drained, standings[0].status) == ((), "elsewhere")


def test_an_alias_moves_from_model_to_model_in_any_order(site: Site) -> None:
    take = Override("aliases", "two", "", ["prod"], [], at=1)
    give = Override("aliases", "one", "", ["uno"], ["uno", "prod"], at=2)
    assert set(judged(site, take, give).values()) == {"holds"}
    assert judged(site, take) == {("aliases", "two"): "collides"}


@pytest.mark.parametrize(
    ("kind", "name", "field", "value", "said"),
    [
        ("weight", "one", "127.0.0.1:11400", -1, "Expected `float` >= 0.0"),
        ("weight", "one", "127.0.0.1:11400", float("inf"), "finite"),
        ("weight", "one", "127.0.0.1:1", 1, "not_declared"),
        ("weight", "one", "", 1, "a field is needed"),
        ("aliases", "two", "", ["one"], "used 2 times"),
        ("aliases", "two", "", ["a b"], "matching regex"),
        ("aliases", "two", "", ["a\n"], "matching regex"),
        ("aliases", "two", "", "due", "Expected `array`"),
        ("aliases", "two", "x", ["due"], "a field is not needed"),
        ("aliases", "nothing", "", ["due"], "not_declared"),
        ("policy", "slow", "", {"models": ["nothing"]}, "not in the model list"),
        ("policy", "slow", "", {"modls": []}, "unknown field"),
        ("policy", "slow", "", 3, "is an object"),
        ("policy", "slow", "", {"name": "other"}, "cannot be called"),
        ("policy", "one", "", {}, "as a model is"),
        ("tier", "basic", "tokens_per_minute", -1, "Expected `int` >= 0"),
        ("tier", "basic", "tokens_per_minute", 10**30, "Expected `int`"),
        ("tier", "basic", "tokens_per_minute", "many", "Expected `int`"),
        ("tier", "basic", "nothing", 1, "not_declared"),
        ("tier", "basic", "overage", "degrade", "needs degrade_to"),
        ("tier", "basic", "", {"priority": 1}, "change its fields"),
        ("tier", "gold", "priority", 1, "not_declared"),
        ("user", "owner", "tier", "gold", "not in the policies"),
        ("user", "owner", "id", "x", "not_declared"),
        ("user", "nobody", "enabled", False, "not_declared"),
        ("key", "user", "enabled", 0, "only be disabled"),
        ("key", "user", "scopes", ["admin"], "only be disabled"),
        ("key", "nobody", "enabled", False, "not_declared"),
        ("drain", "nothing", "", True, "not_declared"),
    ],
)
def test_what_cannot_be_said_in_the_files_cannot_be_changed(
    site: Site, kind: Kind, name: str, field: str, value: object, said: str
) -> None:
    state = State(site.settings)
    state.look()
    with pytest.raises(Refusal) as refused:
        set_changes(state, ROOT, [Change(kind, name, field, value)])
    assert said in f"{refused.value.code} {refused.value.message}"
    assert state.people.overrides == ()


def test_limits_need_one_place_where_they_are_counted(site: Site) -> None:
    site.config["workers"] = 2
    site.policies = {"tiers": [{"name": "free"}]}
    site.users = []
    state = State(site.settings)
    state.look()
    with pytest.raises(Refusal, match=r"one worker, or set redis\.url"):
        set_changes(state, ROOT, [Change("tier", "free", "concurrency", 1)])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.floats(), st.sampled_from(["uno", "one", "premium", "x\n"]),
    st.lists(st.sampled_from(["uno", "prod", "due", "one"]), max_size=3),
    st.dictionaries(st.sampled_from(["name", "models", "choose", "priority"]), st.integers(0, 9), max_size=2),
)  # fmt: skip
CHANGES = st.builds(
    Override,
    kind=st.sampled_from(get_args(Kind)),
    name=st.sampled_from(["one", "two", "basic", "premium", "auto", "new", "owner", "user"]),
    field=st.sampled_from(["", "127.0.0.1:11400", "tokens_per_minute", "priority", "tier", "enabled"]),
    value=VALUES,
    declared=st.one_of(st.none(), st.just(1.0), st.just(True), st.just(["uno", "prod"]), st.just([]), st.just(0)),
    at=st.floats(0, 9),
    host=st.sampled_from(["", "test", "elsewhere"]),
)


def test_no_set_of_changes_makes_files_that_could_not_be_read(site: Site) -> None:
    settings = site.settings
    declared = read_files(settings)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.lists(CHANGES, max_size=5))
    def every(changes: list[Override]) -> None:
        files, standings = apply(declared, changes, settings)
        assert sorted(one.override.at for one in standings) == sorted(one.at for one in changes)
        assert problems_of(files, settings) == []
        assert msgspec.json.decode(msgspec.json.encode(files.policies), type=Policies) == files.policies
        assert msgspec.json.decode(msgspec.json.encode(files.models), type=tuple[Model, ...]) == files.models

    every()


# against a control process --------------------------------------------------------------------------------------------
@pytest.fixture
def control(site: Site) -> Iterator[ThreadedControl]:
    found = ThreadedControl(site).start()
    until(lambda: found.state.people.version >= 0)
    yield found
    found.stop()


def put(control: ThreadedControl, kind: str, name: str, value: object, **more: object) -> Any:
    return control.ask("PUT", "/admin/overrides", {"kind": kind, "name": name, "value": value, **more})


def test_changes_are_made_shown_and_removed(control: ThreadedControl) -> None:
    (made,) = put(control, "weight", "one", 0.5, field="127.0.0.1:11401").json()
    assert (made["declared"], made["value"], made["who"], made["status"]) == (1.0, 0.5, "admin", "holds")
    assert control.snapshot().models[0].backends[1].weight == 0.5
    assert control.ask("GET", "/admin/overrides").json() == [made]
    query = "kind=weight&name=one&field=127.0.0.1:11401"
    assert control.ask("DELETE", f"/admin/overrides?{query}").status == 204
    assert control.snapshot().models[0].backends[1].weight == 1.0
    assert control.ask("DELETE", f"/admin/overrides?{query}").error() == "change_not_found"
    assert control.ask("GET", "/admin/overrides").json() == []
    put(control, "weight", "one", 0.5, field="127.0.0.1:11401")
    assert put(control, "weight", "one", 1.0, field="127.0.0.1:11401").json() == []  # as the files say
    actions = [line["action"] for line in control.ask("GET", "/admin/audit?target=one").json()]
    assert actions[:2] == ["override.remove.weight", "override.set.weight"]


def test_tiers(control: ThreadedControl) -> None:
    changed = control.ask("PATCH", "/admin/tiers/basic", {"tokens_per_minute": 50, "concurrency": 2}).json()
    assert (changed["tokens_per_minute"], changed["concurrency"]) == (50, 2)
    assert control.ask("PATCH", "/admin/tiers/gold", {"priority": 9}).json()["priority"] == 9
    assert control.ask("PATCH", "/admin/tiers/gold", {"concurrency": 7}).json()["concurrency"] == 7
    assert [tier["name"] for tier in control.ask("GET", "/admin/tiers").json()] == ["basic", "premium", "gold"]
    assert control.ask("POST", "/admin/users", {"id": "ann", "tier": "gold"}).status == 201
    assert control.ask("DELETE", "/admin/tiers/gold").error() == "tier_in_use"
    control.ask("PATCH", "/admin/users/ann", {"tier": ""})
    control.ask("PATCH", "/admin/users/owner", {"tier": "gold"})
    assert control.ask("DELETE", "/admin/tiers/gold").error() == "invalid_change"  # the change of owner needs it
    control.ask("PATCH", "/admin/users/owner", {"tier": "basic"})
    assert control.ask("DELETE", "/admin/tiers/gold").status == 200
    (basic, _) = control.ask("DELETE", "/admin/tiers/basic").json()
    assert basic["tokens_per_minute"] == 1000
    assert control.ask("DELETE", "/admin/tiers/basic").error() == "change_not_found"
    assert control.ask("PATCH", "/admin/tiers/basic", {"speed": 1}).error() == "invalid_request"
    assert control.ask("PATCH", "/admin/tiers/basic", {}).error() == "invalid_request"
    assert control.ask("PATCH", "/admin/tiers/basic", {"name": "other"}).error() == "invalid_request"


def test_policies(control: ThreadedControl) -> None:
    fast = {"choose": "cost", "rules": [{"name": "long", "models": ["two"], "when": {"min_tokens": 100}}]}
    assert control.ask("PUT", "/admin/policies/fast", fast).json()["choose"] == "cost"
    assert control.snapshot().policies.policies[1].rules[0].models == ("two",)
    assert control.ask("PUT", "/admin/policies/fast", {"choose": "luck"}).error() == "invalid_request"
    names = [policy["choose"] for policy in control.ask("DELETE", "/admin/policies/fast").json()]
    assert names == ["load", "latency"]


def test_a_change_that_needs_another_keeps_it(control: ThreadedControl) -> None:
    assert put(control, "aliases", "one", ["uno"]).status == 200
    assert put(control, "aliases", "two", ["prod"]).status == 200
    answer = control.ask("DELETE", "/admin/overrides?kind=aliases&name=one")
    assert (answer.status, answer.error()) == (409, "invalid_change")
    assert "aliases two, changed by admin" in answer.body.decode()


def test_changes_survive_a_restart_without_the_database(control: ThreadedControl) -> None:
    put(control, "aliases", "two", ["due"])
    key = control.ask("POST", "/admin/keys", {"user": "ann", "new_user": True}).json()["key"]
    control.stop()
    settings = control.settings
    Path(settings.state_dir, "gateway.sqlite").unlink()
    Path(settings.state_dir, "gateway.sqlite").mkdir()
    again = ThreadedControl(control.site)
    Path(settings.run_dir, "snapshot.json").unlink()
    again.start()
    try:
        assert again.snapshot().models[1].aliases == ("due",)
        assert again.opens(key)
        assert again.ask("GET", "/admin/overrides").json()[0]["name"] == "two"
        for method, path, body in (
            ("GET", "/admin/keys", None),
            ("POST", "/admin/keys", {"user": "ann"}),
            ("PATCH", "/admin/tiers/basic", {"concurrency": 1}),
        ):
            answer = again.ask(method, path, body)
            assert (answer.status, answer.error()) == (503, "database_unavailable")
            assert answer.headers["retry-after"] == "2"
        assert again.ask("POST", "/admin/models/one/drain").json()["draining"] is True  # on this host alone
        assert again.ask("POST", "/admin/models/one/resume").json()["draining"] is False
    finally:
        again.stop()


def test_files_that_are_broken_hold_nothing_up(control: ThreadedControl) -> None:
    answer = control.ask("POST", "/admin/keys", {"user": "ann", "new_user": True}).json()
    control.site.spoil("models.json")
    until(lambda: control.state.problem)
    control.ask("POST", f"/admin/keys/{answer['entry']['id']}/revoke")
    assert not control.opens(answer["key"])
    assert control.ask("POST", "/admin/models/one/drain").json()["draining"] is True
    assert control.snapshot().draining == {"one": ["operator"]}


def test_without_files_nothing_is_administered(site: Site) -> None:
    settings = site.settings
    Path(settings.models_file).unlink()
    state = State(settings)
    state.look()
    for wanted in (Change("drain", "one", "", value=True), Change("tier", "basic", "priority", 1)):
        with pytest.raises(Refusal) as refused:
            set_changes(state, ROOT, [wanted])
        assert refused.value.code == "not_ready"


# two hosts ------------------------------------------------------------------------------------------------------------
def test_two_hosts_of_one_database(tmp_path: Path, postgres_server: PostgresServer) -> None:
    """A key, its revocation, a drain and a weight are on the other host within two seconds."""
    database = {"url": postgres_server.url, "password_file": str(postgres_server.password_file), "schema": "two_hosts"}
    states = []
    for host in ("first", "second"):
        (tmp_path / host).mkdir()
        site = Site(tmp_path / host)
        site.config |= {"host": host, "database": database}
        site.model("one", 11400)
        states.append(State(site.settings))
    first, second = states
    for state in states:
        state.look()
        state.poll()
    set_changes(first, ROOT, [Change("weight", "one", "127.0.0.1:11400", 0.5)])
    drain(first, ROOT, "one")
    assert second.poll()
    assert second.snapshot is not None
    assert second.snapshot.draining == {"one": ["operator"]}
    assert second.snapshot.models[0].backends[0].weight == 0.5
    assert not second.poll()
    assert not resume(second, ROOT, "one")
    drain(second, ROOT, "one", here=True)
    first.poll()
    assert first.snapshot is not None
    assert first.snapshot.draining == {}
    assert second.draining("one")
    for state in states:
        state.database.close()


def test_a_revocation_reaches_the_other_host(tmp_path: Path, postgres_server: PostgresServer) -> None:
    password = str(postgres_server.password_file)
    controls = []
    for host in ("first", "second"):
        (tmp_path / host).mkdir()
        site = Site(tmp_path / host)
        database = {"url": postgres_server.url, "password_file": password, "schema": "revocation"}
        site.config |= {"host": host, "database": database}
        site.model("one", 11400)
        controls.append(ThreadedControl(site).start())
    first, second = controls
    try:
        answer = first.ask("POST", "/admin/keys", {"user": "ann", "new_user": True}).json()
        assert first.opens(answer["key"])
        until(lambda: second.opens(answer["key"]))
        second.ask("POST", f"/admin/keys/{answer['entry']['id']}/revoke")
        assert not second.opens(answer["key"])
        until(lambda: not first.opens(answer["key"]))
        hosts = [line["host"] for line in first.ask("GET", f"/admin/audit?target={answer['entry']['id']}").json()]
        assert hosts == ["second", "first"]
    finally:
        for control in controls:
            control.stop()


def test_the_local_drain_is_among_the_changes(control: ThreadedControl) -> None:
    control.ask("POST", "/admin/models/one/drain?here=true")
    (change,) = control.ask("GET", "/admin/overrides").json()
    assert (change["kind"], change["name"], change["who"], change["host"]) == ("drain", "one", "admin", "test")
    marks = snapshot.load_marks(control.settings)
    assert marks["one"]["operator"].who == "admin"
    assert marks["one"]["operator"].at > 0


def test_keys_of_the_file_come_first(control: ThreadedControl) -> None:
    """A key of the database that is declared later is the declared one from then on."""
    answer = control.ask("POST", "/admin/keys", {"user": "ann", "id": "twice", "new_user": True}).json()
    control.site.keys.append({"id": "twice", "sha256": digest("sk-declared"), "models": ["one"]})
    control.site.write()
    until(lambda: control.opens("sk-declared"))
    assert not control.opens(answer["key"])
    assert len([key for key in control.ask("GET", "/admin/keys").json() if key["id"] == "twice"]) == 1
    assert json.loads(control.ask("GET", "/admin/keys", key=ADMIN).body)
