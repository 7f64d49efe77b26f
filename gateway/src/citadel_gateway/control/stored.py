"""Users, keys and run-time changes as rows of the database."""

import time
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from citadel_gateway.control.sql.tables import audit, changes, keys, overrides, users
from citadel_gateway.overrides import Override
from citadel_gateway.settings import Key, User
from citadel_gateway.snapshot import People


def read_version(connection: Connection) -> int:
    return int(connection.execute(select(changes.c.version)).scalar_one())


def bump(connection: Connection) -> None:
    """First thing in a transaction that changes something: every control process then reads everything again, and two
    that change at the same moment do so one after the other.
    """
    connection.execute(changes.update().values(version=changes.c.version + 1))


def read_people(connection: Connection) -> People:
    """Everything that workers are to know. The version is read first: what changes meanwhile is seen next time."""
    version = read_version(connection)
    people = tuple(user_of(row) for row in connection.execute(select(users).order_by(users.c.id)).mappings())
    valid = select(keys).where(keys.c.revoked_at == 0).order_by(keys.c.id)
    return People(
        version,
        people,
        tuple(key_of(row) for row in connection.execute(valid).mappings()),
        read_overrides(connection),
    )


def read_overrides(connection: Connection) -> tuple[Override, ...]:
    rows = connection.execute(select(overrides).order_by(overrides.c.at)).mappings()
    names = Override.__struct_fields__
    return tuple(msgspec.convert({name: row[name] for name in names}, Override) for row in rows)


def user_of(row: Any) -> User:
    return User(row["id"], row["tier"], row["name"], row["enabled"], row["use_case"])


def key_of(row: Any) -> Key:
    entry = {name: row[name] for name in ("id", "sha256", "scopes", "models", "use_case")}
    return msgspec.convert(entry | {"user": row["user_id"], "expires": row["expires_at"]}, Key)


class Actor(msgspec.Struct, frozen=True):
    """Who changes something. `who`: the key's user, or who sits at the terminal with the local key."""

    who: str
    key_id: str
    via: str = "admin"  # admin, cli, graphql
    request_id: str = ""


def note(
    connection: Connection, actor: Actor, host: str, action: str, target: str, *, before: Any = None, after: Any = None
) -> None:
    """One line of the audit log, in the transaction that it is about. Nothing secret is in `before` and `after`."""
    connection.execute(
        audit.insert().values(
            at=time.time(), who=actor.who, key_id=actor.key_id, via=actor.via, request_id=actor.request_id,
            host=host, action=action, target=target, before=before, after=after,
        )
    )  # fmt: skip
