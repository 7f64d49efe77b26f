"""Users, keys and run-time changes as rows of the database: the reading side, which every control process polls."""

from typing import Any

import msgspec
from sqlalchemy import Connection, select

from citadel_gateway.control.sql.tables import changes, keys, overrides, users
from citadel_gateway.overrides import Override
from citadel_gateway.settings import Key, User
from citadel_gateway.snapshot import People


def read_version(connection: Connection) -> int:
    return int(connection.execute(select(changes.c.version)).scalar_one())


def bump(connection: Connection) -> None:
    """In the transaction that changes something: every control process then reads everything again."""
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
        tuple(override_of(row) for row in connection.execute(select(overrides)).mappings()),
    )


def user_of(row: Any) -> User:
    return User(row["id"], row["tier"], row["name"], row["enabled"], row["use_case"])


def key_of(row: Any) -> Key:
    entry = {name: row[name] for name in ("id", "sha256", "scopes", "models", "use_case")}
    return msgspec.convert(entry | {"user": row["user_id"], "expires": row["expires_at"]}, Key)


def override_of(row: Any) -> Override:
    return msgspec.convert(dict(row), Override)
