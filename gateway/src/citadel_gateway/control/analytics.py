"""Figures about quality and worth, for a span of days: use, accuracy, satisfaction, cost and value side by side."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query
from pydantic import BaseModel
from sqlalchemy import BigInteger, ColumnElement, Connection, FromClause, Select, case, cast, func, select

from citadel_gateway.control.auth import Control, Scoped
from citadel_gateway.control.business import SERVED, Rules
from citadel_gateway.control.feedback import Source, user_of
from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import feedback, requests, usage_daily
from citadel_gateway.records import SYSTEM_USER
from citadel_gateway.settings import Key

router = APIRouter(tags=["analytics"])

Group = Literal["model", "day", "use_case", "user", "outcome"]
DAYS = 366
DAY = 86_400
SATISFIED, DISSATISFIED = 8, 4  # ratings from, and up to


class Analytics(BaseModel):
    """One group. `accuracy` is correct / (correct + incorrect), `satisfaction` the mean rating; None: nobody said.
    `net_usd` is realised value less cost.
    """

    group: str
    requests: int = 0
    refused: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    feedback: int = 0
    correct: int = 0
    incorrect: int = 0
    accuracy: float | None = None
    rated: int = 0
    satisfaction: float | None = None
    satisfied: int = 0
    dissatisfied: int = 0
    value_usd: float = 0.0
    estimated_usd: float = 0.0
    net_usd: float = 0.0


class Adoption(BaseModel):
    """Users who were served on a day, and in the seven days that end with it."""

    day: str
    users: int
    week_users: int
    requests: int


class Span(BaseModel):
    """Whole days (UTC), both included."""

    first: date
    last: date

    @property
    def start(self) -> float:
        return midnight(self.first)

    @property
    def end(self) -> float:
        return midnight(self.last + timedelta(days=1))


def midnight(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def span_of(first: date | None, last: date | None, now: float | None = None) -> Span:
    """The last seven days, as far as nothing else is said. Raises `ValueError` for one that is empty or too long."""
    today = datetime.fromtimestamp(time.time() if now is None else now, UTC).date()
    last = last or today
    span = Span(first=first or last - timedelta(days=6), last=last)
    if span.first > span.last:
        raise ValueError("from must not be later than to")
    if (span.last - span.first).days >= DAYS:
        raise ValueError(f"at most {DAYS} days can be asked for at once")
    return span


def analyse(
    database: Database,
    rules: Rules,
    span: Span,
    group: Group | None,
    user: str | None,
    source: Source | None = None,
) -> list[Analytics]:
    """One row for each group, in order of their names; without `group` a single one. `source`: whose opinions count."""
    rows: dict[str, Analytics] = {}

    def row(name: object) -> Analytics:
        return rows.setdefault(str(name), Analytics(group=str(name)))

    if group is None:
        row("")
    with database.read() as connection:
        if group != "outcome":
            add_use(connection, span, group, user, row)
        add_feedback(connection, database, span, group, user, source, row)
        if rules.estimates and group != "outcome":
            add_estimates(connection, rules, span, group, user, row)
    for one in rows.values():
        one.net_usd = one.value_usd - one.cost_usd
    return [rows[name] for name in sorted(rows)]


def add_use(
    connection: Connection, span: Span, group: Group | None, user: str | None, row: Callable[[object], Analytics]
) -> None:
    """From the sums of days, and from the ledger itself for what those do not know."""
    sums: Sequence[ColumnElement[Any]]
    if group == "use_case":
        c, source = requests.c, requests
        failed = case((c.outcome.in_(("refused", "limited", "unavailable")), 1), else_=0)
        sums = (func.count(), func.sum(failed), func.sum(case((c.outcome == "ok", 0), else_=1)) - func.sum(failed))
        limits = [c.at >= span.start, c.at < span.end]
    else:
        c, source = usage_daily.c, usage_daily
        sums = (func.sum(c.requests), func.sum(c.refused), func.sum(c.errors))
        limits = [c.day >= span.first.isoformat(), c.day <= span.last.isoformat()]
    amounts = (func.sum(c.input_tokens), func.sum(c.output_tokens), func.sum(c.cost_usd))
    names = {"user": "user_id", "model": "model", "day": "day", "use_case": "use_case"}
    query = grouped(source, c[names[group]] if group else None, [*sums, *amounts])
    query = query.where(*limits, *([c.user_id == user] if user is not None else [c.user_id != SYSTEM_USER]))
    for name, count, refused, errors, given, made, cost in connection.execute(query):
        one = row(name)
        one.requests, one.refused, one.errors = int(count or 0), int(refused or 0), int(errors or 0)
        one.input_tokens, one.output_tokens, one.cost_usd = int(given or 0), int(made or 0), float(cost or 0)


def grouped(source: FromClause, name: ColumnElement[Any] | None, sums: Sequence[ColumnElement[Any]]) -> Select[Any]:
    if name is None:
        return select(func.coalesce("", ""), *sums).select_from(source)
    return select(name, *sums).select_from(source).group_by(name)


def day_of(database: Database, column: ColumnElement[float]) -> ColumnElement[int]:
    """Days since the epoch. A cast rounds in PostgreSQL and cuts in SQLite, which need not have `floor`."""
    days = column / DAY
    return cast(days if database.sqlite else func.floor(days), BigInteger)


def add_feedback(
    connection: Connection,
    database: Database,
    span: Span,
    group: Group | None,
    user: str | None,
    source: Source | None,
    row: Callable[[object], Analytics],
) -> None:
    c = feedback.c
    names = {
        "user": c.user_id,
        "model": c.model,
        "use_case": c.use_case,
        "outcome": c.outcome,
        "day": day_of(database, c.at),
    }

    def many(condition: ColumnElement[bool]) -> ColumnElement[Any]:
        return func.sum(case((condition, 1), else_=0))

    sums = [
        func.count(),
        many(c.correct.is_(True)),
        many(c.correct.is_(False)),
        func.count(c.rating),
        func.sum(c.rating),
        many(c.rating >= SATISFIED),
        many(c.rating <= DISSATISFIED),
        func.sum(c.value_usd),
    ]
    query = grouped(feedback, names[group] if group else None, sums).where(c.at >= span.start, c.at < span.end)
    if user is not None:
        query = query.where(c.user_id == user)
    if source is not None:
        query = query.where(c.source == source)
    if group == "outcome":
        query = query.where(c.outcome != "")
    for name, count, right, wrong, rated, total, happy, unhappy, value in connection.execute(query):
        label = (date(1970, 1, 1) + timedelta(days=name)).isoformat() if group == "day" else name
        one = row(label)
        one.feedback, one.correct, one.incorrect = count, int(right or 0), int(wrong or 0)
        one.rated, one.satisfied, one.dissatisfied = rated, int(happy or 0), int(unhappy or 0)
        one.value_usd = float(value or 0)
        judged = one.correct + one.incorrect
        one.accuracy = one.correct / judged if judged else None
        one.satisfaction = float(total) / rated if rated else None


def add_estimates(
    connection: Connection,
    rules: Rules,
    span: Span,
    group: Group | None,
    user: str | None,
    row: Callable[[object], Analytics],
) -> None:
    c = requests.c
    names = {"user": c.user_id, "model": c.model, "use_case": c.use_case, "day": c.day}
    by = [c.use_case] if group in (None, "use_case") else [names[group], c.use_case]
    query = select(*by, func.count()).where(c.at >= span.start, c.at < span.end, c.outcome == "ok").group_by(*by)
    if user is not None:
        query = query.where(c.user_id == user)
    for *labels, count in connection.execute(query):
        usd = rules.value(SERVED, labels[-1]) * count
        if usd:
            row(labels[0] if group else "").estimated_usd += usd


def adoption(database: Database, span: Span) -> list[Adoption]:
    """Each day of the span, also those on which nobody came."""
    c = usage_daily.c
    first = span.first - timedelta(days=6)
    query = (
        select(c.day, c.user_id, func.sum(c.requests))
        .where(c.day >= first.isoformat(), c.day <= span.last.isoformat())
        .where(c.requests > c.refused, c.user_id != SYSTEM_USER)
        .group_by(c.day, c.user_id)
    )
    users: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    with database.read() as connection:
        for day, user, count in connection.execute(query):
            users.setdefault(day, set()).add(user)
            counts[day] = counts.get(day, 0) + int(count)
    found = []
    for number in range((span.last - span.first).days + 1):
        day = span.first + timedelta(days=number)
        week = [(day - timedelta(days=back)).isoformat() for back in range(7)]
        found.append(
            Adoption(
                day=day.isoformat(),
                users=len(users.get(day.isoformat(), ())),
                week_users=len(set().union(*(users.get(one, set()) for one in week))),
                requests=counts.get(day.isoformat(), 0),
            )
        )
    return found


def asked_span(
    first: Annotated[date | None, Query(alias="from")] = None, last: Annotated[date | None, Query(alias="to")] = None
) -> Span:
    """A dependency: `from` and `to`."""
    try:
        return span_of(first, last)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


Asked = Annotated[Span, Depends(asked_span)]


@router.get("/v1/analytics")
def get(
    control: Control,
    key: Annotated[Key, Depends(Scoped("inference", "read", "admin"))],
    span: Asked,
    group_by: Group | None = None,
    source: Source | None = None,
) -> list[Analytics]:
    """The caller's own figures; those of everybody for the scopes `read` (not by user) and `admin`. `source`: only the
    users' own opinions, judges', or golden prompts'.
    """
    everybody = bool({"read", "admin"} & set(key.scopes))
    if group_by == "user" and "admin" not in key.scopes:
        raise HTTPException(403, "This key lacks the scope 'admin'")
    user = None if everybody else user_of(key)
    return analyse(control.database, Rules.of(control.snapshot), span, group_by, user, source)


@router.get("/v1/analytics/adoption", dependencies=[Depends(Scoped("read", "admin"))])
def get_adoption(control: Control, span: Asked) -> list[Adoption]:
    """Active users by day and by week."""
    return adoption(control.database, span)
