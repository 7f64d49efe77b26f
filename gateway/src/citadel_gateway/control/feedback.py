"""What people say about answers: right or wrong, a rating from 1 to 10, what became of it, a comment.

A user has one feedback for each of his requests; sent again, it is corrected, and what is left out stays as it was. An
administrator may judge other people's requests, which is kept beside the user's own word (`source`: judge).
"""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt
from sqlalchemy import Connection, Row, Table, and_, or_, select, update
from starlette.concurrency import run_in_threadpool

from citadel_gateway.control import tallies
from citadel_gateway.control.auth import Control, Scoped
from citadel_gateway.control.business import FEEDBACK, SATISFACTION, Count, Rules, realised
from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import conversations, feedback, requests
from citadel_gateway.settings import Key

router = APIRouter(tags=["feedback"])

Found = Row[*tuple[Any, ...]]
Source = Literal["user", "judge", "golden"]
Channel = Literal["api", "graphql", "page"]
COMMENT = 2000
MOST = 200  # rows of a page
SETTLING = (0.0, 0.3, 0.7, 1.0)  # pauses: feedback may be faster than the journal is read


def storable(text: str) -> str:
    """What every database takes: no NUL, and no half of a character."""
    if "\x00" in text or (not text.isascii() and text.encode(errors="replace").decode() != text):
        raise ValueError("NUL and lone surrogates cannot be kept")
    return text


Storable = AfterValidator(storable)


class Given(BaseModel):
    """One feedback. `request_id` is the reply's `x-request-id`. At least one of the other fields must be there."""

    model_config = ConfigDict(extra="forbid")

    request_id: Annotated[str, Field(min_length=1, max_length=128), Storable]
    rating: Annotated[StrictInt, Field(ge=1, le=10)] | None = None
    correct: StrictBool | None = None
    outcome: Annotated[str, Field(max_length=64), Storable] | None = None
    comment: Annotated[str, Field(max_length=COMMENT), Storable] | None = None


class Feedback(BaseModel):
    """As it is kept. `value_usd`: what the outcome is worth."""

    id: int
    request_id: str
    at: float
    source: Source
    user: str
    model: str
    use_case: str
    session: str
    rating: int | None
    correct: bool | None
    outcome: str
    comment: str
    value_usd: float


class Wrong(ValueError):  # noqa: N818  # what a client sent, not an error of the program
    """Feedback that cannot be taken."""


def check(given: Given, rules: Rules) -> None:
    """Raises `Wrong` for feedback that says nothing or names an outcome that nobody has defined."""
    if all(one is None for one in (given.rating, given.correct, given.outcome, given.comment)):
        raise Wrong("One of rating, correct, outcome and comment is needed")
    if given.outcome and given.outcome not in rules.outcomes:
        raise Wrong(f"outcome must be one of {', '.join(rules.outcomes)}")


def user_of(key: Key) -> str:
    return key.user or key.id


def find_request(connection: Connection, request_id: str, user: str, *, everybody: bool) -> Found | None:
    """The ledger's entry by the gateway's id or by the client's own (of which the newest counts)."""
    mine = and_(requests.c.request_id == request_id, requests.c.user_id == user)
    wanted = or_(requests.c.id == request_id, requests.c.request_id == request_id if everybody else mine)
    columns = (requests.c.id, requests.c.user_id, requests.c.key_id, requests.c.model, requests.c.session)
    query = select(*columns, requests.c.use_case).where(wanted)
    if not everybody:
        query = query.where(requests.c.user_id == user)
    ordered = query.order_by((requests.c.id == request_id).desc(), requests.c.at.desc()).limit(1)
    return connection.execute(ordered).first()


def record(
    database: Database, host: str, rules: Rules, key: Key, given: Given, *, channel: Channel = "api", at: float = 0
) -> Feedback | None:
    """Note it; `None` when the caller has no such request."""
    user = user_of(key)
    with database.begin() as connection:
        request = find_request(connection, given.request_id, user, everybody="admin" in key.scopes)
        if request is None:
            return None
        source: Source = "user" if request.user_id == user else "judge"
        row = locked(connection, database, request, source, at or time.time())
        changes = {
            name: value
            for name in ("rating", "correct", "outcome", "comment")
            if (value := getattr(given, name)) is not None
        }
        counts = changed(rules, row, changes, source, channel)
        if "outcome" in changes:
            value = rules.value(changes["outcome"], row.use_case)
            counts += revalued(connection, rules, row, value)
            changes["value_usd"] = value
        connection.execute(update(feedback).where(feedback.c.id == row.id).values(at=at or time.time(), **changes))
        if row.session:
            connection.execute(
                update(conversations)
                .where(conversations.c.user_id == row.user_id, conversations.c.session == row.session)
                .values(rated=True)
            )
        tallies.add(connection, database, host, counts)
        return one_of(connection.execute(select(feedback).where(feedback.c.id == row.id)).one())


def locked(connection: Connection, database: Database, request: Found, source: Source, at: float) -> Found:
    """The feedback's row, made if need be, and nobody else's until the transaction ends."""
    connection.execute(
        database.insert(feedback)
        .values(
            request=request.id,
            source=source,
            at=at,
            user_id=request.user_id,
            key_id=request.key_id,
            model=request.model,
            session=request.session,
            use_case=request.use_case,
        )
        .on_conflict_do_nothing(index_elements=["request", "source"])
    )
    mine = select(feedback).where(feedback.c.request == request.id, feedback.c.source == source)
    return connection.execute(mine.with_for_update()).one()


def changed(rules: Rules, row: Found, changes: dict[str, Any], source: Source, channel: Channel) -> list[Count]:
    """What the counters are to be told: each new opinion, and a changed one as one more."""
    counts: list[Count] = []
    correct, rating = changes.get("correct"), changes.get("rating")
    if correct is not None and correct != row.correct:
        verdict = "correct" if correct else "incorrect"
        counts.append((FEEDBACK, (rules.model(row.model), source, verdict), 1))
    if rating is not None and rating != row.rating:
        counts.append((SATISFACTION, (rules.model(row.model), channel, str(rating)), 1))
    return counts


def revalued(connection: Connection, rules: Rules, row: Found, value: float) -> list[Count]:
    """A request has one value, and the last word about its outcome decides: user's and judge's are not added up."""
    others = select(feedback.c.id, feedback.c.value_usd).where(
        feedback.c.request == row.request, feedback.c.id != row.id, feedback.c.value_usd != 0
    )
    before = row.value_usd
    for other in connection.execute(others.with_for_update()).all():
        before += other.value_usd
        connection.execute(update(feedback).where(feedback.c.id == other.id).values(value_usd=0))
    return realised(rules, row.model, row.use_case, value - before)


def fields_of(row: Found, table: Table) -> dict[str, Any]:
    """A whole row of a table by the keys of its columns (those of money are not their names)."""
    return {column.key: row._mapping[column] for column in table.c}


def one_of(row: Found) -> Feedback:
    fields = fields_of(row, feedback)
    return Feedback(request_id=fields.pop("request"), user=fields.pop("user_id"), **fields)


def listed(
    database: Database,
    *,
    user: str | None = None,
    model: str | None = None,
    request: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[Feedback]:
    """The newest first; `before` is the id of the last one of the page before."""
    query = select(feedback).order_by(feedback.c.id.desc()).limit(limit)
    for column, value in (
        (feedback.c.user_id, user), (feedback.c.model, model), (feedback.c.request, request),
    ):  # fmt: skip
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(feedback.c.id < before)
    with database.read() as connection:
        return [one_of(row) for row in connection.execute(query)]


async def take(control: Control, key: Key, given: Given, channel: Channel) -> Feedback | None:
    """Check and note it, off the loop. A request that ended a moment ago may not be in the ledger yet."""
    rules = Rules.of(control.snapshot)
    check(given, rules)
    for pause in SETTLING:
        await asyncio.sleep(pause)
        found = await run_in_threadpool(
            record, control.database, control.settings.host, rules, key, given, channel=channel
        )
        if found is not None:
            return found
    return None


Asked = Annotated[Annotated[str, Field(max_length=128), Storable] | None, Query()]
Caller = Annotated[Key, Depends(Scoped("inference", "admin"))]


@router.post("/v1/feedback")
async def post(given: Given, control: Control, key: Caller) -> Feedback:
    """Feedback for one of the caller's own requests (`admin`: anybody's). Sent again, it corrects what was said."""
    try:
        found = await take(control, key, given, "api")
    except Wrong as error:
        raise HTTPException(400, str(error)) from None
    if found is None:
        raise HTTPException(404, "There is no such request of yours")
    return found


@router.get("/v1/feedback")
def get(
    control: Control,
    key: Caller,
    model: Asked = None,
    request_id: Asked = None,
    before: Annotated[int | None, Query(ge=0, le=2**62)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
) -> list[Feedback]:
    """The caller's feedback, the newest first (`admin`: everybody's)."""
    user = None if "admin" in key.scopes else user_of(key)
    return listed(control.database, user=user, model=model, request=request_id, before=before, limit=limit)
