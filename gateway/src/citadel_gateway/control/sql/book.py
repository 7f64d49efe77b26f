"""Writing into the ledger: a batch of settled requests, each once, and what they add up to by day.

The records go to the database as the one JSON document that they are in the journal; the database takes them apart.
That costs a tenth of what a parameter for each value does.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Integer,
    Text,
    TextClause,
    delete,
    select,
    text,
)

from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import NANO, Usd, journal_offsets, requests, usage_daily
from citadel_gateway.records import Settled

FIELDS = {"user_id": "user", "key_id": "key", "cost_nanousd": "cost_usd"}  # a column's name in a record
KINDS = (  # of PostgreSQL; the first that fits
    (Usd, "double precision"),
    (BigInteger, "bigint"),
    (Integer, "integer"),
    (Double, "double precision"),
    (Boolean, "boolean"),
    (JSON, "json"),
    (Text, "text"),
)
REFUSED = {"refused", "limited", "unavailable"}
GOOD = {"ok", "client_closed"}
# PostgreSQL has no zero character in texts. An even number of backslashes before it are characters of their own.
ZERO = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")

Within = Callable[[Connection, Sequence[Settled]], None]


def clean(raw: bytes) -> bytes:
    """A record that every database takes."""
    return ZERO.sub(rb"\1", raw) if b"\\u0000" in raw else raw


def day_of(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def default(column: Column[Any]) -> str:
    if isinstance(column.type, Text):
        return "''"
    if isinstance(column.type, JSON):
        return "'{}'"
    return "false" if isinstance(column.type, Boolean) else "0"


def insertion(*, sqlite: bool) -> TextClause:
    """The statement that takes a JSON list of records and returns the ids that were new, with their cost."""
    columns = list(requests.columns)
    fields = {column.name: FIELDS.get(column.name, column.name) for column in columns}

    def value(column: Column[Any]) -> str:
        field = fields[column.name]
        if column.name == "day":
            at = "json_extract(value, '$.at')" if sqlite else "r.at"
            return f"date({at}, 'unixepoch')" if sqlite else f"to_char(to_timestamp({at}), 'YYYY-MM-DD')"
        found = f"json_extract(value, '$.{field}')" if sqlite else f'r."{field}"'
        if isinstance(column.type, Usd):
            found = f"CAST(round({found} * {NANO}.0) AS BIGINT)"
        return f"coalesce({found}, {default(column)})"

    def kind(column: Column[Any]) -> str:
        return next(name for known, name in KINDS if isinstance(column.type, known))

    listed = ", ".join(column.name for column in columns)
    values = ", ".join(value(column) for column in columns)
    described = ", ".join(f'"{fields[column.name]}" {kind(column)}' for column in columns if column.name != "day")
    source = (
        "json_each(:records) WHERE true" if sqlite else f"json_to_recordset(CAST(:records AS json)) AS r({described})"
    )
    return text(
        f"INSERT INTO requests ({listed}) SELECT {values} FROM {source} "  # noqa: S608  # our own column names only
        "ON CONFLICT (id) DO NOTHING RETURNING id, cost_nanousd"
    )


INSERTIONS = {True: insertion(sqlite=True), False: insertion(sqlite=False)}


def enter(connection: Connection, database: Database, records: dict[str, tuple[Settled, bytes]]) -> list[Settled]:
    """Put records (by id, with their JSON) into the ledger; those that were not in it yet."""
    if not records:
        return []
    document = b"[%s]" % b",".join(raw for _, raw in records.values())
    found = connection.execute(INSERTIONS[database.sqlite], {"records": document.decode(errors="replace")}).all()
    fresh = [(records[row.id][0], int(row.cost_nanousd)) for row in found]
    add_to_days(connection, database, fresh)
    return [record for record, _ in fresh]


def add_to_days(connection: Connection, database: Database, records: Iterable[tuple[Settled, int]]) -> None:
    """`records`: each with its cost in nano-dollars as it stands in the ledger."""
    sums: dict[tuple[str, str, str, str], dict[str, Any]] = defaultdict(lambda: defaultdict(int))
    for one, nano in records:
        row = sums[day_of(one.at), one.user, one.key, one.model]
        row["requests"] += 1
        row["refused"] += one.outcome in REFUSED
        row["errors"] += one.outcome not in REFUSED and one.outcome not in GOOD
        row["inexact"] += not one.exact and one.input_tokens + one.output_tokens > 0
        row["input_tokens"] += one.input_tokens
        row["output_tokens"] += one.output_tokens
        row["cached_tokens"] += one.cached_tokens
        row["overage_tokens"] += (one.input_tokens + one.output_tokens) if one.overage else 0
        row["engine_seconds"] += one.engine_seconds
        row["cost_nanousd"] += nano
    if not sums:
        return
    # In one order for all, so that two hosts never wait for each other.
    rows = [dict(zip(("day", "user_id", "key_id", "model"), key, strict=True)) | sums[key] for key in sorted(sums)]
    connection.execute(ADDITION, rows)


def addition() -> TextClause:
    names = [column.name for column in usage_daily.columns]
    added = [column.name for column in usage_daily.columns if not column.primary_key]
    return text(
        f"INSERT INTO usage_daily ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)}) "  # noqa: S608  # our own column names only
        "ON CONFLICT (day, user_id, key_id, model) DO UPDATE SET "
        + ", ".join(f"{name} = usage_daily.{name} + excluded.{name}" for name in added)
    )


ADDITION = addition()


def offsets_of(connection: Connection, host: str) -> dict[str, tuple[int, bool]]:
    """How far the segments of a host are in the ledger, and whether they are done."""
    table = journal_offsets
    rows = connection.execute(select(table.c.segment, table.c.offset, table.c.done).where(table.c.host == host))
    return {row.segment: (row.offset, row.done) for row in rows}


def save_offsets(connection: Connection, database: Database, rows: list[dict[str, Any]]) -> None:
    """`settled` and `damaged` of a row are added to what is there."""
    if not rows:
        return
    table = journal_offsets
    insert = database.insert(table)
    new = insert.excluded
    added = {name: table.c[name] + new[name] for name in ("settled", "damaged")}
    moved = {name: new[name] for name in ("offset", "done", "updated_at")}
    connection.execute(insert.on_conflict_do_update(index_elements=["segment"], set_=added | moved), rows)


def forget_offsets(connection: Connection, segments: list[str]) -> None:
    """Of segments that are removed."""
    if segments:
        connection.execute(delete(journal_offsets).where(journal_offsets.c.segment.in_(segments)))
