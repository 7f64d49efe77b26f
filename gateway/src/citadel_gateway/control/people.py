"""Users and their keys: what administration, GraphQL and the commands do with them.

Those of keys.json are declared: here they can be disabled, and users changed, as run-time changes over the file; they
are neither made nor deleted. Everything else lives in the database. Functions raise `Refusal` for what cannot be done
and `DatabaseAwayError` when nothing was changed because the database is away.
"""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from citadel_gateway.control.changes import Change, remove_changes, set_changes
from citadel_gateway.control.sql.tables import keys, users
from citadel_gateway.control.state import LOCAL, State
from citadel_gateway.control.stored import Actor, bump, note
from citadel_gateway.errors import Refusal
from citadel_gateway.keys import digest, new_key
from citadel_gateway.overrides import Files
from citadel_gateway.records import SYSTEM_USER
from citadel_gateway.settings import Key, User

RESERVED = (SYSTEM_USER, LOCAL)
USER_FIELDS = ("name", "tier", "use_case", "enabled")
GRACE = 86_400.0  # seconds that a rotated key is valid on
Row = dict[str, Any]


def declared(state: State) -> Files:
    if state.files is None:
        raise Refusal(503, "not_ready", "The gateway's files cannot be used; check-config says why", retry_after=5)
    return state.files


def unknown(kind: str, name: str) -> Refusal:
    return Refusal(404, f"{kind}_not_found", f"There is no {kind} {name[:128]!r}")


# users ----------------------------------------------------------------------------------------------------------------
def list_users(state: State) -> list[Row]:
    """Declared ones as they are now, with their changes, and those of the database."""
    names = {user.id for user in declared(state).users}
    shown = state.snapshot.users if state.snapshot is not None else ()
    found = [declared_row(user) for user in shown if user.id in names]
    with state.database.read() as connection:
        rows = connection.execute(select(users).order_by(users.c.id)).mappings()
        return found + [dict(row) | {"declared": False} for row in rows if row["id"] not in names]


def declared_row(user: User) -> Row:
    row = {name: getattr(user, name) for name in ("id", *USER_FIELDS)}
    return row | {"created_at": 0.0, "created_by": "", "updated_at": 0.0, "declared": True}


def get_user(state: State, name: str) -> Row:
    found = next((row for row in list_users(state) if row["id"] == name), None)
    if found is None:
        raise unknown("user", name)
    return found


def check_tier(state: State, tier: str) -> None:
    tiers = state.snapshot.policies.tiers if state.snapshot is not None else ()
    if tier and tier not in {one.name for one in tiers}:
        raise Refusal(400, "unknown_tier", f"There is no tier {tier[:128]!r}", param="tier")


def create_user(state: State, actor: Actor, name: str, *, title: str = "", tier: str = "", use_case: str = "") -> Row:
    check_tier(state, tier)
    with state.database.begin() as connection:
        bump(connection)
        insert_user(connection, state, actor, {"id": name, "name": title, "tier": tier, "use_case": use_case})
    state.poll()
    return get_user(state, name)


def insert_user(connection: Connection, state: State, actor: Actor, entry: Row) -> None:
    name = entry["id"]
    alike = select(users.c.id).where(func.lower(users.c.id) == name.lower())
    taken = [user.id for user in declared(state).users if user.id.lower() == name.lower()]
    taken += connection.execute(alike).scalars()
    if taken or name.lower() in RESERVED:
        raise Refusal(409, "user_exists", f"There is a user {(taken or [name])[0]!r} already", param="id")
    now = time.time()
    values = entry | {"enabled": True, "created_at": now, "created_by": actor.who, "updated_at": now}
    connection.execute(users.insert().values(values))
    note(connection, actor, state.settings.host, "user.create", name, after=entry)


def change_user(state: State, actor: Actor, name: str, entries: Mapping[str, Any]) -> Row:
    """Any of name, tier, use_case, enabled. Without `enabled` no key of the user opens anything."""
    check_tier(state, entries.get("tier", ""))
    if any(user.id == name for user in declared(state).users):
        if "name" in entries:
            raise Refusal(409, "declared", f"The user {name!r} is declared; its name is changed there", param="name")
        set_changes(state, actor, [Change("user", name, field, value) for field, value in entries.items()])
        return get_user(state, name)
    with state.database.begin() as connection:
        bump(connection)
        row = connection.execute(select(users).where(users.c.id == name)).mappings().first()
        if row is None:
            raise unknown("user", name)
        before = {field: row[field] for field in entries}
        connection.execute(users.update().where(users.c.id == name).values(dict(entries) | {"updated_at": time.time()}))
        note(connection, actor, state.settings.host, "user.change", name, before=before, after=dict(entries))
    state.poll()
    return get_user(state, name)


# keys -----------------------------------------------------------------------------------------------------------------
def list_keys(state: State, user: str = "", *, gone: bool = False) -> list[Row]:
    """Never the key itself, which nobody has, nor its digest. `gone`: those that are revoked or expired too."""
    files = declared(state)
    open_now = {key.id for key in state.snapshot.keys} if state.snapshot is not None else set()
    rows = [declared_key_row(key) for key in files.keys]
    query = select(keys).order_by(keys.c.created_at, keys.c.id)
    with state.database.read() as connection:
        names = {key.id for key in files.keys}
        rows += [public(row) for row in connection.execute(query).mappings() if row["id"] not in names]
    for row in rows:
        row["state"] = standing(row, time.time(), open_now)
    return [
        row for row in rows if (not user or row["user"] == user) and (gone or row["state"] in ("valid", "disabled"))
    ]


def standing(row: Row, now: float, open_now: set[str]) -> str:
    if row["revoked_at"]:
        return "revoked"
    if 0 < row["expires_at"] <= now:
        return "expired"
    return "valid" if row["id"] in open_now else "disabled"


def declared_key_row(key: Key) -> Row:
    return {
        "id": key.id, "user": key.user, "scopes": list(key.scopes), "models": list(key.models),
        "use_case": key.use_case, "expires_at": key.expires, "created_at": 0.0, "created_by": "", "revoked_at": 0.0,
        "revoked_by": "", "rotated_from": "", "declared": True,
    }  # fmt: skip


def public(row: Mapping[Any, Any]) -> Row:
    """Everything but the digest."""
    found = {name: value for name, value in row.items() if name != "sha256"}
    return found | {"user": found.pop("user_id"), "declared": False}


def get_key(state: State, name: str) -> Row:
    found = next((row for row in list_keys(state, gone=True) if row["id"] == name), None)
    if found is None:
        raise unknown("key", name)
    return found


def create_key(
    state: State,
    actor: Actor,
    user: str,
    *,
    name: str = "",
    scopes: Sequence[str] = ("inference",),
    models: Sequence[str] = ("*",),
    expires_in: float = 0.0,
    use_case: str = "",
    new_user: bool = False,
) -> tuple[Row, str]:
    """The key's row, and the key, which is shown this once. `new_user`: make the user if there is none."""
    check_models(state, models)
    token = new_key()
    now = time.time()
    entry: Row = {
        "id": name or new_id(user),
        "user_id": user,
        "scopes": list(dict.fromkeys(scopes)),
        "models": list(dict.fromkeys(models)),
        "use_case": use_case,
        "expires_at": now + expires_in if expires_in else 0.0,
    }
    with state.database.begin() as connection:
        bump(connection)
        if not user_exists(connection, state, user):
            if not new_user:
                raise unknown("user", user)
            insert_user(connection, state, actor, {"id": user, "name": "", "tier": "", "use_case": ""})
        insert_key(connection, state, actor, "key.create", entry, token)
    state.poll()
    return get_key(state, entry["id"]), token


def user_exists(connection: Connection, state: State, name: str) -> bool:
    if any(user.id == name for user in declared(state).users):
        return True
    return connection.execute(select(users.c.id).where(users.c.id == name)).first() is not None


def insert_key(connection: Connection, state: State, actor: Actor, action: str, entry: Row, token: str) -> None:
    exists = Refusal(409, "key_exists", f"There is or was a key {entry['id']!r} already", param="id")
    if entry["id"] in (LOCAL, *(key.id for key in declared(state).keys)):
        raise exists
    values = entry | {"sha256": digest(token), "created_at": time.time(), "created_by": actor.who}
    try:
        with connection.begin_nested():
            connection.execute(keys.insert().values(values))
    except IntegrityError:
        raise exists from None
    note(connection, actor, state.settings.host, action, entry["id"], after=entry)


def check_models(state: State, names: Sequence[str]) -> None:
    snapshot = state.snapshot
    known = {"*"}
    for model in snapshot.models if snapshot is not None else ():
        known.update((model.name, *model.aliases))
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise Refusal(400, "model_not_found", f"The model {wrong[:128]!r} does not exist", param="models")


def new_id(user: str) -> str:
    return f"{re.sub('[^A-Za-z0-9._-]', '.', user)[:48]}-{secrets.token_hex(4)}"


def row_to_end(connection: Connection, state: State, name: str) -> Mapping[Any, Any]:
    """A key that can still be rotated or revoked."""
    row = connection.execute(select(keys).where(keys.c.id == name)).mappings().first()
    if row is None:
        raise unknown("key", name)
    if row["revoked_at"]:
        raise Refusal(409, "key_revoked", f"The key {name!r} is revoked already")
    return row


def is_declared(state: State, name: str) -> bool:
    return any(key.id == name for key in declared(state).keys)


def rotate_key(state: State, actor: Actor, name: str, grace: float = GRACE) -> tuple[Row, str]:
    """A new key that may what the old one may. The old one is valid for `grace` seconds more."""
    if is_declared(state, name):
        raise Refusal(409, "declared", f"The key {name!r} is declared: rotate it in the inventory, or make another")
    token = new_key()
    now = time.time()
    with state.database.begin() as connection:
        bump(connection)
        row = row_to_end(connection, state, name)
        if 0 < row["expires_at"] <= now:
            raise Refusal(409, "key_expired", f"The key {name!r} has expired: make another")
        copied = ("user_id", "scopes", "models", "use_case", "expires_at")
        entry = {field: row[field] for field in copied} | {"id": new_id(row["user_id"]), "rotated_from": name}
        insert_key(connection, state, actor, "key.rotate", entry, token)
        end = min(now + grace, row["expires_at"] or now + grace)
        ending = {"expires_at": end} if grace else {"revoked_at": now, "revoked_by": actor.who}
        connection.execute(keys.update().where(keys.c.id == name).values(ending))
        note(
            connection, actor, state.settings.host, "key.end" if grace else "key.revoke", name,
            before={"expires_at": row["expires_at"]}, after=ending,
        )  # fmt: skip
    state.poll()
    return get_key(state, entry["id"]), token


def revoke_key(state: State, actor: Actor, name: str) -> Row:
    """For ever; a declared key is disabled, which can be taken back."""
    if is_declared(state, name):
        set_changes(state, actor, [Change("key", name, "enabled", False)])
        return get_key(state, name)
    now = time.time()
    with state.database.begin() as connection:
        bump(connection)
        row_to_end(connection, state, name)
        ending = {"revoked_at": now, "revoked_by": actor.who}
        connection.execute(keys.update().where(keys.c.id == name).values(ending))
        note(connection, actor, state.settings.host, "key.revoke", name, before={"revoked_at": 0}, after=ending)
    state.poll()
    return get_key(state, name)


def enable_key(state: State, actor: Actor, name: str) -> Row:
    """A declared key that was disabled opens again."""
    if not is_declared(state, name):
        raise unknown("declared key", name)
    remove_changes(state, actor, [("key", name, "enabled")])
    return get_key(state, name)
