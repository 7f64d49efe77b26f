"""Counters that live in the database, so that they are as exact as the rows they count.

They are added to in the transaction of what they count. They do not follow from the rows later on: feedback is
corrected and old rows are deleted, and a counter of Prometheus must never go back. Each host has its own, so that two
gateways which share a database do not both show the same events.
"""

from collections.abc import Iterable

import msgspec
from sqlalchemy import Connection, select

from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import tallies

Labels = tuple[str, ...]
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Labels).decode


def add(connection: Connection, database: Database, host: str, counts: Iterable[tuple[str, Labels, float]]) -> None:
    """Count on. Rows are taken in one order everywhere, so that two hosts do not wait for each other."""
    sums: dict[tuple[str, str], float] = {}
    for name, labels, amount in counts:
        key = (name, encode(labels).decode())
        sums[key] = sums.get(key, 0.0) + amount
    for (name, labels_text), amount in sorted(sums.items()):
        statement = database.insert(tallies).values(host=host, name=name, labels=labels_text, value=amount)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["host", "name", "labels"], set_={"value": tallies.c.value + statement.excluded.value}
            )
        )


def read(connection: Connection, host: str) -> dict[str, dict[Labels, float]]:
    """All counters of a host, by name and labels."""
    found: dict[str, dict[Labels, float]] = {}
    for name, labels, value in connection.execute(
        select(tallies.c.name, tallies.c.labels, tallies.c.value).where(tallies.c.host == host)
    ):
        found.setdefault(name, {})[decode(labels)] = value
    return found
