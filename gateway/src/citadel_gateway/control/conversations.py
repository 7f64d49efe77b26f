"""Conversations: what the requests of one session come to.

A request belongs to the conversation of its user and its session id. Requests that never reached a model are no turns.
A conversation has ended when nothing came for `IDLE` seconds; the next request of the session begins another. It counts
as abandoned when its last turn was not answered to its end and nobody has given feedback: the one who asked went away.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel
from sqlalchemy import Connection, and_, select, tuple_, update
from sqlalchemy.exc import DBAPIError

from citadel_gateway.control import tallies
from citadel_gateway.control.auth import Control, Scoped
from citadel_gateway.control.business import Count, Rules, estimated
from citadel_gateway.control.feedback import Found, fields_of, user_of
from citadel_gateway.control.sql.engine import Database, is_away
from citadel_gateway.control.sql.tables import conversations
from citadel_gateway.control.state import State as Owner
from citadel_gateway.records import Settled
from citadel_gateway.settings import Key

log = logging.getLogger("citadel_gateway")
router = APIRouter(tags=["conversations"])

IDLE = 1800.0
AT_ONCE = 500  # conversations that one sweep ends
NO_TURN = frozenset({"refused", "limited", "unavailable"})

ENDED = "llm_gateway_conversations_total"
TURNS = "llm_gateway_conversations_turns"
TOKENS = "llm_gateway_conversations_tokens"
BUCKETS: dict[str, tuple[int, ...]] = {
    TURNS: (1, 2, 3, 5, 8, 13, 21, 34, 55),
    TOKENS: (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000),
}
State = Literal["open", "completed", "abandoned"]


class Conversation(BaseModel):
    """The latest conversation of a session."""

    user: str
    session: str
    model: str
    use_case: str
    started_at: float
    last_at: float
    turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    last_outcome: str
    rated: bool
    state: State


def settled(connection: Connection, database: Database, host: str, rules: Rules, records: Sequence[Settled]) -> None:
    """Take up requests that have just come into the ledger, in the transaction that brings them."""
    talks: dict[tuple[str, str], list[Settled]] = {}
    for record in records:
        if record.session:
            talks.setdefault((record.user, record.session), []).append(record)
    counts = estimated(rules, records)
    if talks:
        known = locked(connection, database, talks)
        for key, of_one in sorted(talks.items()):
            of_one.sort(key=lambda record: record.at)
            changed, more = follow(rules, known[key], of_one)
            counts += more
            connection.execute(
                update(conversations)
                .where(conversations.c.user_id == key[0], conversations.c.session == key[1])
                .values(**changed)
            )
    tallies.add(connection, database, host, counts)


def within(state: Owner) -> Callable[[Connection, Sequence[Settled]], None]:
    """What the settler calls with records that are new. Whatever fails here must not hold the ledger up: it is noted
    and taken back by itself, unless the database as a whole is away.
    """

    def take(connection: Connection, records: Sequence[Settled]) -> None:
        try:
            with connection.begin_nested():
                settled(connection, state.database, state.settings.host, Rules.of(state.snapshot), records)
        except DBAPIError as error:
            if is_away(error):
                raise
            log.error("conversations: %d requests are not in them: %s", len(records), type(error.orig).__name__)
        except Exception:
            log.exception("conversations: %d requests are not in them", len(records))

    return take


def locked(
    connection: Connection, database: Database, talks: dict[tuple[str, str], list[Settled]]
) -> dict[tuple[str, str], Found]:
    """The sessions' rows, made if need be; always in the same order, so that two hosts cannot block each other."""
    keys = sorted(talks)
    for user, session in keys:
        first = min(talks[user, session], key=lambda record: record.at)
        connection.execute(
            database.insert(conversations)
            .values(user_id=user, session=session, started_at=first.at, last_at=first.at)
            .on_conflict_do_nothing(index_elements=["user_id", "session"])
        )
    both = tuple_(conversations.c.user_id, conversations.c.session)
    query = select(conversations).where(both.in_(keys)).order_by(conversations.c.user_id, conversations.c.session)
    return {(row.user_id, row.session): row for row in connection.execute(query.with_for_update())}


def follow(rules: Rules, row: Found, records: Sequence[Settled]) -> tuple[dict[str, Any], list[Count]]:
    """The row after these requests, and what is to be counted if one conversation ended between them."""
    now = fields_of(row, conversations)
    counts: list[Count] = []
    for record in records:
        over = record.at - now["last_at"] > IDLE
        if over and not now["ended_at"]:
            counts += ended(rules, now)
        if over or now["ended_at"]:
            now |= fresh(record)
        now["started_at"] = min(now["started_at"], record.at)
        if record.at >= now["last_at"]:
            now |= {"last_at": record.at, "last_request": record.id, "last_outcome": record.outcome}
        now["turns"] += record.outcome not in NO_TURN
        now["model"] = record.model or now["model"]
        now["use_case"] = record.use_case or now["use_case"]
        for name in ("input_tokens", "output_tokens", "cost_usd"):
            now[name] += getattr(record, name)
    return now, counts


def fresh(record: Settled) -> dict[str, Any]:
    """Where a conversation begins."""
    return {
        "started_at": record.at,
        "last_at": record.at,
        "turns": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "cost_usd": 0.0,
        "rated": False,
        "abandoned": False,
        "ended_at": 0.0,
    }


def is_abandoned(row: dict[str, Any]) -> bool:
    return row["last_outcome"] != "ok" and not row["rated"]


def ended(rules: Rules, row: dict[str, Any]) -> list[Count]:
    """What a conversation that is over adds to the counters. One without a single turn was none."""
    if not row["turns"]:
        return []
    model = rules.model(row["model"])
    counts: list[Count] = [(ENDED, (model, "abandoned" if is_abandoned(row) else "completed"), 1)]
    for name, value in ((TURNS, row["turns"]), (TOKENS, row["input_tokens"] + row["output_tokens"])):
        counts += [(name, (model, bucket(name, value)), 1), (f"{name}_sum", (model,), value)]
    return counts


def bucket(name: str, value: int) -> str:
    """The histogram's bucket by its upper bound."""
    return next((str(bound) for bound in BUCKETS[name] if value <= bound), "+Inf")


def sweep(database: Database, host: str, rules: Rules, now: float = 0.0) -> int:
    """End the conversations that nothing came for; how many. Hosts that share a database share the work."""
    now = now or time.time()
    with database.begin() as connection:
        query = (
            select(conversations)
            .where(conversations.c.ended_at == 0, conversations.c.last_at < now - IDLE)
            .order_by(conversations.c.user_id, conversations.c.session)
            .limit(AT_ONCE)
            .with_for_update(skip_locked=True)
        )
        counts: list[Count] = []
        rows = connection.execute(query).all()
        for row in rows:
            fields = fields_of(row, conversations)
            counts += ended(rules, fields)
            connection.execute(
                update(conversations)
                .where(conversations.c.user_id == row.user_id, conversations.c.session == row.session)
                .values(ended_at=row.last_at + IDLE, abandoned=is_abandoned(fields))
            )
        tallies.add(connection, database, host, counts)
    return len(rows)


def one_of(row: Found, now: float) -> Conversation:
    fields = fields_of(row, conversations)
    over = bool(fields["ended_at"]) or now - fields["last_at"] > IDLE
    state: State = "open" if not over else "abandoned" if is_abandoned(fields) else "completed"
    return Conversation(user=fields["user_id"], state=state, **{
        name: value for name, value in fields.items() if name in Conversation.model_fields
    })  # fmt: skip


def listed(
    database: Database,
    *,
    user: str | None = None,
    state: State | None = None,
    before: float | None = None,
    limit: int = 50,
    now: float = 0.0,
) -> list[Conversation]:
    """The latest first; `before` is `last_at` of the last one of the page before."""
    now = now or time.time()
    c = conversations.c
    query = select(conversations).where(c.turns > 0).order_by(c.last_at.desc()).limit(limit)
    if user is not None:
        query = query.where(c.user_id == user)
    if before is not None:
        query = query.where(c.last_at < before)
    if state == "open":
        query = query.where(c.ended_at == 0, c.last_at >= now - IDLE)
    elif state is not None:
        query = query.where(c.last_at < now - IDLE)
        went = and_(c.last_outcome != "ok", ~c.rated)
        query = query.where(went if state == "abandoned" else ~went)
    with database.read() as connection:
        return [one_of(row, now) for row in connection.execute(query)]


@router.get("/v1/conversations")
def get(
    control: Control,
    key: Annotated[Key, Depends(Scoped("inference", "admin"))],
    state: State | None = None,
    before: Annotated[float | None, Query(ge=0, le=1e12)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> list[Conversation]:
    """The caller's conversations, the latest first (`admin`: everybody's)."""
    user = None if "admin" in key.scopes else user_of(key)
    return listed(control.database, user=user, state=state, before=before, limit=limit)
