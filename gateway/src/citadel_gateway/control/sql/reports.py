"""Reading the ledger: usage, requests, and whether the books agree with themselves. Plain functions of a connection."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, RowMapping, and_, case, distinct, func, or_, select, tuple_

from citadel_gateway.control.sql.book import GOOD, REFUSED
from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import NANO, requests, usage_daily
from citadel_gateway.records import Settled

GROUPS = {"user": "user_id", "key": "key_id", "model": "model", "day": "day"}
FIGURES = (
    "requests", "refused", "errors", "inexact", "input_tokens", "output_tokens", "cached_tokens", "overage_tokens",
    "engine_seconds", "cost_usd",
)  # fmt: skip
NAMES = {"user_id": "user", "key_id": "key", "cost_nanousd": "cost_usd"}  # a column's name in a record
PAGE = 1000
PRUNED = 5000

Rows = list[dict[str, Any]]


class Wanted(msgspec.Struct, frozen=True):
    """Which requests. Empty: all. Moments are seconds since the epoch; `until` is not in it."""

    user: str = ""
    key: str = ""
    model: str = ""
    outcome: str = ""
    session: str = ""
    host: str = ""
    since: float = 0.0
    until: float = 0.0

    def conditions(self) -> list[ColumnElement[bool]]:
        table = requests.c
        columns = {
            "user": table.user_id, "key": table.key_id, "model": table.model, "outcome": table.outcome,
            "session": table.session, "host": table.host,
        }  # fmt: skip
        found = [column == getattr(self, name) for name, column in columns.items() if getattr(self, name)]
        if self.since:
            found.append(table.at >= self.since)
        if self.until:
            found.append(table.at < self.until)
        return found


def usage(
    connection: Connection,
    groups: Sequence[str],
    first: str,
    last: str,
    *,
    user: str = "",
    key: str = "",
    model: str = "",
) -> Rows:
    """What was used from day to day (both in it), a row for each value of `groups` (of user, key, model, day)."""
    table = usage_daily.c
    names = [table[GROUPS[group]].label(group) for group in groups]
    sums = [func.coalesce(func.sum(table[name]), 0).label(name) for name in FIGURES]
    query = select(*names, *sums).where(table.day >= first, table.day <= last)
    for column, wanted in ((table.user_id, user), (table.key_id, key), (table.model, model)):
        if wanted:
            query = query.where(column == wanted)
    if names:
        query = query.group_by(*(table[GROUPS[group]] for group in groups)).order_by(*names)
    return [plain(row, sums=FIGURES) for row in connection.execute(query)]


def plain(row: Row[Any], sums: Sequence[str] = ()) -> dict[str, Any]:
    """A row with numbers as JSON has them: PostgreSQL adds whole numbers up as decimals."""
    found = dict(row._mapping)
    for name in sums:
        found[name] = float(found[name]) if name in ("engine_seconds", "cost_usd") else int(found[name])
    return found


def listing(
    connection: Connection, wanted: Wanted, limit: int, after: tuple[float, str] | None = None
) -> list[Settled]:
    """Requests, the newest first; `after`: time and id of the last one that was seen."""
    query = select(requests).where(*wanted.conditions())
    if after is not None:
        query = query.where(tuple_(requests.c.at, requests.c.id) < after)
    query = query.order_by(requests.c.at.desc(), requests.c.id.desc()).limit(limit)
    return [record_of(row) for row in connection.execute(query).mappings()]


def everything(database: Database, wanted: Wanted, limit: int) -> Iterator[Settled]:
    """`listing` page after page, each in a transaction of its own, so that nobody waits for a slow reader."""
    after: tuple[float, str] | None = None
    while limit > 0:
        with database.read() as connection:
            page = listing(connection, wanted, min(limit, PAGE), after)
        yield from page
        if len(page) < PAGE:
            return
        limit -= len(page)
        after = (page[-1].at, page[-1].id)


def record_of(row: RowMapping) -> Settled:
    """A row as the record it was."""
    found = {NAMES.get(name, str(name)): value for name, value in row.items() if name != "day"}
    return msgspec.convert(found, Settled)


def find(connection: Connection, name: str, user: str | None = None) -> Settled | None:
    """A request by its own id, or by the client's, which may stand twice: then the newest. `user`: only theirs."""
    query = select(requests).where(or_(requests.c.id == name, requests.c.request_id == name))
    if user is not None:
        query = query.where(requests.c.user_id == user)
    order = (case((requests.c.id == name, 0), else_=1), requests.c.at.desc())
    row = connection.execute(query.order_by(*order).limit(1)).mappings().first()
    return record_of(row) if row is not None else None


def tokens(connection: Connection, since: float, until: float, model: str) -> dict[str, dict[str, int]]:
    """For each backend of a model: tokens in and out, requests, and those of which the engine told no figures."""
    table = requests.c
    unsure = and_(table.exact.is_(False), table.outcome.not_in(REFUSED), table.backend != "")
    query = (
        select(
            table.backend,
            func.sum(table.input_tokens).label("input_tokens"),
            func.sum(table.output_tokens).label("output_tokens"),
            func.count().label("requests"),
            func.sum(case((unsure, 1), else_=0)).label("inexact"),
        )
        .where(table.model == model, table.at >= since, table.at < until, table.backend != "")
        .group_by(table.backend)
    )
    names = ("input_tokens", "output_tokens", "requests", "inexact")
    return {row.backend: {name: int(row._mapping[name]) for name in names} for row in connection.execute(query)}


class Check(msgspec.Struct):
    """What `ledger check` found. `differences`: days of which the sums are not those of the requests."""

    requests: int
    users: int
    differences: list[dict[str, Any]]

    @property
    def good(self) -> bool:
        return not self.differences


def check(connection: Connection) -> Check:
    """Whether the days add up to the requests. That an id stands once is the table's own promise. Days before the first
    request that is kept have only their sums left.
    """
    names = ("requests", "refused", "errors", "input_tokens", "output_tokens", "cached_tokens", "cost_usd")
    table = requests.c
    refused = case((table.outcome.in_(REFUSED), 1), else_=0)
    errors = case((table.outcome.in_(REFUSED | GOOD), 0), else_=1)
    sums = (
        func.count(), func.sum(refused), func.sum(errors), func.sum(table.input_tokens),
        func.sum(table.output_tokens), func.sum(table.cached_tokens), func.sum(table.cost_usd),
    )  # fmt: skip
    keys = ("day", "user_id", "key_id", "model")
    counted = select(*(table[key] for key in keys), *(one.label(name) for one, name in zip(sums, names, strict=True)))
    real = {
        tuple(row)[:4]: exact(row, names) for row in connection.execute(counted.group_by(*(table[k] for k in keys)))
    }
    kept = select(*(usage_daily.c[key] for key in keys), *(usage_daily.c[name] for name in names))
    first = connection.execute(select(func.min(table.day))).scalar()
    if first is not None:
        kept = kept.where(usage_daily.c.day >= first)
    said = {tuple(row)[:4]: exact(row, names) for row in connection.execute(kept)}
    wrong = [
        {
            **dict(zip(("day", "user", "key", "model"), key, strict=True)),
            "requests": real.get(key),
            "usage": said.get(key),
        }
        for key in sorted(real.keys() | said.keys())
        if real.get(key) != said.get(key)
    ]
    people = connection.execute(select(func.count(distinct(table.user_id)))).scalar_one()
    return Check(sum(int(row["requests"]) for row in real.values()), int(people), wrong)


def exact(row: Row[Any], names: Sequence[str]) -> dict[str, int]:
    """Whole numbers, money in nano-dollars."""
    found = row._mapping
    return {name: round(found[name] * NANO) if name == "cost_usd" else int(found[name]) for name in names}


def missing(connection: Connection, names: Sequence[str]) -> list[str]:
    """Those ids that are not in the ledger."""
    found: list[str] = []
    for start in range(0, len(names), PAGE):
        part = names[start : start + PAGE]
        known = set(connection.execute(select(requests.c.id).where(requests.c.id.in_(part))).scalars())
        found += [name for name in part if name not in known]
    return found


def prune(database: Database, before: float) -> int:
    """Delete requests that came before a moment, a few thousand in a transaction; how many. Their sums stay."""
    gone = 0
    while True:
        with database.begin() as connection:
            found = select(requests.c.id).where(requests.c.at < before).limit(PRUNED)
            count = connection.execute(requests.delete().where(requests.c.id.in_(found.scalar_subquery()))).rowcount
        gone += count
        if count < PRUNED:
            return gone
