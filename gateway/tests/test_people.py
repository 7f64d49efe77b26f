"""Users and keys: made, listed, rotated, revoked; over HTTP, with everything that somebody may send."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.tests.client import ADMIN, KEY
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.site import Site, digest


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedControl]:
    """One for all tests of this file: each uses names of its own."""
    site = Site(tmp_path_factory.mktemp("people"))
    site.model("one", 11400, 11401, aliases=["uno"])
    site.model("org/two", 11402)
    site.keys.append({"id": "spare", "sha256": digest("sk-spare"), "user": "owner", "models": ["one"]})
    site.users.append({"id": "owner", "name": "An owner"})
    found = ThreadedControl(site).start()
    until(lambda: found.state.people.version >= 0)
    yield found
    found.stop()


def created(control: ThreadedControl, user: str, **more: object) -> tuple[str, str]:
    """A new key of a new user: its id and the key."""
    answer = control.ask("POST", "/admin/keys", {"user": user, "new_user": True, **more})
    assert answer.status == 201, answer.body
    return answer.json()["entry"]["id"], answer.json()["key"]


def test_a_user_is_made_and_changed(control: ThreadedControl) -> None:
    made = control.ask("POST", "/admin/users", {"id": "ann@example.org", "name": "Ann Ö", "use_case": "support"})
    assert made.status == 201
    assert made.json()["created_by"] == "admin"
    assert control.ask("GET", "/admin/users/ann@example.org").json() == made.json()
    changed = control.ask("PATCH", "/admin/users/ann@example.org", {"name": "Anna", "tier": "unlimited"})
    assert (changed.json()["name"], changed.json()["tier"]) == ("Anna", "unlimited")
    assert "ann@example.org" in [user["id"] for user in control.ask("GET", "/admin/users").json()]
    found = next(user for user in control.snapshot().users if user.id == "ann@example.org")
    assert (found.tier, found.use_case) == ("unlimited", "support")
    for entry, code in (
        ({"id": "ANN@example.org"}, "user_exists"),
        ({"id": "Owner"}, "user_exists"),
        ({"id": "system"}, "user_exists"),
        ({"id": "bob", "tier": "gold"}, "unknown_tier"),
    ):
        assert control.ask("POST", "/admin/users", entry).error() == code
    assert control.ask("PATCH", "/admin/users/nobody", {"name": "x"}).error() == "user_not_found"
    assert control.ask("GET", "/admin/users/nobody").error() == "user_not_found"


def test_a_key_is_shown_once_and_kept_as_its_digest(control: ThreadedControl) -> None:
    name, token = created(control, "carl", models=["uno"], scopes=["inference", "read"], expires_in=3600)
    assert re.fullmatch(r"ck-[A-Za-z0-9_-]{43}", token)
    assert control.opens(token)
    entry = control.ask("GET", f"/admin/keys/{name}").json()
    assert (entry["user"], entry["models"], entry["scopes"]) == ("carl", ["uno"], ["inference", "read"])
    assert (entry["state"], entry["declared"]) == ("valid", False)
    everything = control.ask("GET", "/admin/keys").body + control.ask("GET", "/admin/audit").body
    assert token.encode() not in everything
    assert digest(token).encode() not in everything
    assert token not in "".join(path.read_text(errors="replace") for path in control.site.folder.rglob("*.json"))
    assert [key["id"] for key in control.ask("GET", "/admin/keys?user=carl").json()] == [name]
    people = Path(control.settings.state_dir, "people.json")
    assert people.stat().st_mode & 0o777 == 0o640


def test_a_key_of_scope_admin_administers(control: ThreadedControl) -> None:
    _, token = created(control, "dora", scopes=["admin"])
    assert control.ask("GET", "/admin/keys", key=token).status == 200
    assert control.ask("GET", "/metrics", key=token).error() == "insufficient_scope"


def test_a_rotated_key_is_valid_for_its_grace(control: ThreadedControl) -> None:
    name, token = created(control, "emma", id="emma-laptop", models=["one"])
    answer = control.ask("POST", f"/admin/keys/{name}/rotate", {"grace": 3600})
    assert answer.status == 201
    entry = answer.json()["entry"]
    assert (entry["user"], entry["models"], entry["rotated_from"]) == ("emma", ["one"], name)
    assert control.opens(token)
    assert control.opens(answer.json()["key"])
    assert control.ask("GET", f"/admin/keys/{name}").json()["expires_at"] > 0
    at_once = control.ask("POST", f"/admin/keys/{entry['id']}/rotate", {"grace": 0})
    assert not control.opens(answer.json()["key"])
    assert control.opens(at_once.json()["key"])
    assert control.ask("GET", f"/admin/keys/{entry['id']}").json()["state"] == "revoked"
    assert control.ask("POST", f"/admin/keys/{entry['id']}/rotate").error() == "key_revoked"


def test_a_revoked_key_opens_nothing(control: ThreadedControl) -> None:
    name, token = created(control, "finn")
    assert control.ask("POST", f"/admin/keys/{name}/revoke").json()["state"] == "revoked"
    assert not control.opens(token)
    assert control.ask("POST", f"/admin/keys/{name}/revoke").error() == "key_revoked"
    assert control.ask("POST", "/admin/keys/nothing/revoke").error() == "key_not_found"
    assert name not in [key["id"] for key in control.ask("GET", "/admin/keys").json()]
    assert name in [key["id"] for key in control.ask("GET", "/admin/keys?gone=true").json()]
    assert control.ask("POST", "/admin/keys", {"user": "finn", "id": name}).error() == "key_exists"


def test_an_expired_key_opens_nothing(control: ThreadedControl) -> None:
    name, token = created(control, "gina", expires_in=1.2, scopes=["admin"])
    assert control.ask("GET", "/admin/users", key=token).status == 200
    until(lambda: not control.opens(token))
    assert control.ask("GET", "/admin/users", key=token).status == 401
    assert control.ask("GET", f"/admin/keys/{name}").json()["state"] == "expired"
    assert control.ask("POST", f"/admin/keys/{name}/rotate").error() == "key_expired"


def test_without_the_user_no_key_opens(control: ThreadedControl) -> None:
    name, token = created(control, "hugo")
    control.ask("PATCH", "/admin/users/hugo", {"enabled": False})
    assert not control.opens(token)
    assert control.ask("GET", f"/admin/keys/{name}").json()["state"] == "disabled"
    control.ask("PATCH", "/admin/users/hugo", {"enabled": True})
    assert control.opens(token)


def test_declared_ones_are_disabled_and_never_deleted(control: ThreadedControl) -> None:
    assert control.ask("GET", "/admin/keys/spare").json()["declared"] is True
    assert control.ask("POST", "/admin/keys/spare/revoke").json()["state"] == "disabled"
    assert not control.opens("sk-spare")
    assert control.ask("POST", "/admin/keys/spare/rotate").error() == "declared"
    assert control.ask("POST", "/admin/keys", {"user": "owner", "id": "spare"}).error() == "key_exists"
    assert control.ask("POST", "/admin/keys/spare/enable").json()["state"] == "valid"
    assert control.opens("sk-spare")
    assert control.ask("POST", "/admin/keys/spare/enable").error() == "change_not_found"
    assert control.ask("POST", "/admin/keys/none/enable").status == 404
    assert control.ask("PATCH", "/admin/users/owner", {"enabled": False}).json()["enabled"] is False
    assert not control.opens("sk-spare")
    assert control.ask("PATCH", "/admin/users/owner", {"enabled": True}).json()["enabled"] is True
    assert control.ask("PATCH", "/admin/users/owner", {"name": "x"}).error() == "declared"
    kinds = {change["kind"] for change in control.ask("GET", "/admin/overrides").json()}
    assert not kinds & {"user", "key"}


def test_every_change_is_in_the_audit_log(control: ThreadedControl) -> None:
    name, token = created(control, "iris")
    control.ask("POST", f"/admin/keys/{name}/revoke", headers={"X-Request-ID": "req-7"})
    line, *_ = control.ask("GET", f"/admin/audit?target={name}").json()
    assert (line["action"], line["who"], line["key_id"], line["via"]) == ("key.revoke", "admin", "admin", "admin")
    assert (line["request_id"], line["host"], line["before"]) == ("req-7", "test", {"revoked_at": 0})
    older = control.ask("GET", f"/admin/audit?target={name}&before={line['id']}").json()
    assert [one["action"] for one in older] == ["key.create"]
    assert token not in json.dumps(older)
    control.local("PATCH", "/admin/users/iris", {"name": "I"}, X_Citadel_Actor="root")
    line, *_ = control.ask("GET", "/admin/audit?limit=1").json()
    assert (line["who"], line["key_id"], line["via"]) == ("root", "local", "cli")
    control.local("PATCH", "/admin/users/iris", {"name": "J"}, X_Citadel_Actor="a b;c")
    assert control.ask("GET", "/admin/audit?limit=1").json()[0]["who"] == "local"


def test_the_local_key_counts_on_the_socket_only(control: ThreadedControl) -> None:
    assert control.local("GET", "/admin/users").status == 200
    assert control.local("GET", "/admin/users", X_Citadel_Worker="1").status == 401
    path = Path(control.settings.state_dir, "local-key")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/users"),
        ("POST", "/admin/users"),
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("POST", "/admin/keys/user/revoke"),
        ("PATCH", "/admin/tiers/unlimited"),
        ("PUT", "/admin/overrides"),
        ("DELETE", "/admin/overrides?kind=drain&name=one"),
        ("GET", "/admin/audit"),
        ("POST", "/admin/models/one/drain"),
    ],
)
def test_nothing_without_the_scope(control: ThreadedControl, method: str, path: str) -> None:
    for key in (None, "", "wrong", "\xff", digest(ADMIN)):
        answer = control.ask(method, path, {}, key)
        assert (answer.status, answer.error()) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert control.ask(method, path, {}, KEY).error() == "insufficient_scope"


@pytest.mark.parametrize(
    "path",
    [
        "/admin/users?api_key=sk-admin",
        "/v1/feedback?key=x",
        "/admin/users?API-KEY=x",
        "/admin/users?access_token=x",
        f"/admin/users?x=ck-{'a' * 43}",
        f"/admin/keys/ck-{'a' * 43}",
        f"/nothing?a=1&q=sk-{'b' * 30}",
    ],
)
def test_a_key_in_the_url_is_refused(control: ThreadedControl, path: str) -> None:
    answer = control.ask("GET", path)
    assert (answer.status, answer.error()) == (400, "key_in_url")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"[" * 20_000,
        b'{"id": "\xff"}',
        b'{"id": "\\ud800"}',
        b'{"id": "a", "surprise": 1}',
        b'{"id": 7}',
        b'{"id": ""}',
        b'{"id": "' + b"a" * 65 + b'"}',
        b'{"id": "a b"}',
        b'{"id": "a\\n"}',
        b'{"id": "a\\u0000"}',
        b'{"id": "../etc"}',
        '{"id": "аdmin"}'.encode(),  # noqa: RUF001  # its first letter is Cyrillic
        b'{"id": "ok", "name": "\\u202egnp"}',
        b'{"id": "ok", "name": "a\\u200bb"}',
        b'{"id": "ok", "name": "' + b"n" * 201 + b'"}',
        b'{"id": "ok", "tier": NaN}',
        b'{"id": "x\'; DROP TABLE users; --"}',
    ],
)
def test_a_body_that_is_no_user(control: ThreadedControl, body: bytes) -> None:
    before = control.ask("GET", "/admin/users").body
    answer = control.ask("POST", "/admin/users", raw=body)
    assert (answer.status, answer.error()) == (400, "invalid_request")
    assert control.ask("GET", "/admin/users").body == before


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"user": "zoe", "scopes": []}, "invalid_request"),
        ({"user": "zoe", "scopes": ["root"]}, "invalid_request"),
        ({"user": "zoe", "models": ["nothing"]}, "model_not_found"),
        ({"user": "zoe", "models": ["' OR 1=1 --"]}, "invalid_request"),
        ({"user": "zoe", "expires_in": -1}, "invalid_request"),
        ({"user": "zoe", "expires_in": 1e300}, "invalid_request"),
        ({"user": "zoe", "id": "local", "new_user": True}, "key_exists"),
        ({"user": "zoe"}, "user_not_found"),
        ({"user": "zoe", "key": "chosen"}, "invalid_request"),
    ],
)
def test_a_body_that_is_no_key(control: ThreadedControl, entry: dict[str, object], code: str) -> None:
    assert control.ask("POST", "/admin/keys", entry).error() == code
    assert control.ask("GET", "/admin/users/zoe").status == 404


def test_infinity_is_no_time(control: ThreadedControl) -> None:
    for number in (b"Infinity", b"NaN", b"1e999"):
        answer = control.ask("POST", "/admin/keys", raw=b'{"user": "owner", "expires_in": %b}' % number)
        assert (answer.status, answer.error()) == (400, "invalid_request")


@pytest.mark.parametrize("name", ["x'%20OR%20'1'='1", "%00", "a%0Ab", "..%2f..%2fetc", "%F0%9F%92%A9", "a" * 200])
def test_names_in_paths_are_checked(control: ThreadedControl, name: str) -> None:
    for path in (f"/admin/users/{name}", f"/admin/keys/{name}"):
        answer = control.ask("GET", path)
        assert answer.status in (400, 404), path
        assert answer.error() in ("invalid_request", "not_found")


def test_two_that_come_at_once(control: ThreadedControl) -> None:
    """One of them makes it; every key gets an id of its own."""
    statuses: list[int] = []
    ids: list[str] = []

    def work() -> None:
        statuses.append(control.ask("POST", "/admin/users", {"id": "twin"}).status)
        ids.append(created(control, "twins")[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [409] * 7
    assert len(set(ids)) == 8
