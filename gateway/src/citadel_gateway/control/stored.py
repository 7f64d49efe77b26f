"""Users, keys and run-time changes as rows of the database."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Select, select

from citadel_gateway.control.sql.tables import audit, changes, keys, overrides, users
from citadel_gateway.overrides import Override
from citadel_gateway.settings import Key, User
from citadel_gateway.snapshot import People

log = logging.getLogger("citadel_gateway")
Row = TypeVar("Row", User, Key, Override)


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
    valid = select(keys).where(keys.c.revoked_at == 0).order_by(keys.c.id)
    return People(
        version,
        understood(connection, select(users).order_by(users.c.id), user_of),
        understood(connection, valid, key_of),
        read_overrides(connection),
    )


def read_overrides(connection: Connection) -> tuple[Override, ...]:
    return understood(connection, select(overrides).order_by(overrides.c.at), override_of)


def understood(connection: Connection, query: Select[Any], kind: Callable[[Any], Row]) -> tuple[Row, ...]:
    """The rows that this release understands. One of a newer release, during an upgrade, counts as none: it must not
    hold up the revocation of another.
    """
    found = []
    for row in connection.execute(query).mappings():
        try:
            found.append(kind(row))
        except msgspec.ValidationError as error:
            log.error("left out of %s: %s", kind.__name__.removesuffix("_of"), error)
    return tuple(found)


def user_of(row: Any) -> User:
    return User(row["id"], row["tier"], row["name"], row["enabled"], row["use_case"])


def key_of(row: Any) -> Key:
    entry = {name: row[name] for name in ("id", "sha256", "scopes", "models", "use_case")}
    return msgspec.convert(entry | {"user": row["user_id"], "expires": row["expires_at"]}, Key)


def override_of(row: Any) -> Override:
    return msgspec.convert({name: row[name] for name in Override.__struct_fields__}, Override)


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
