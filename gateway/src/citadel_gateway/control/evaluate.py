"""Runs of golden prompts: taken from `citadel-gateway evaluate`, kept, counted like feedback, and compared.

A run is sent as a whole when it is done. Its verdicts count as `llm_feedback_total{source="golden"}` and stand beside
the users' own opinions in the figures.
"""

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, case, func, select

from citadel_gateway.control import tallies
from citadel_gateway.control.auth import Control, Scoped
from citadel_gateway.control.business import FEEDBACK, Count, Rules
from citadel_gateway.control.feedback import SETTLING, Storable
from citadel_gateway.control.golden import Verdict
from citadel_gateway.control.sql.engine import Database
from citadel_gateway.control.sql.tables import evaluations, feedback, requests

router = APIRouter(prefix="/admin/evaluations", tags=["evaluations"], dependencies=[Depends(Scoped("admin"))])

MOST = 10_000
CORRECT: dict[Verdict, bool | None] = {"correct": True, "incorrect": False, "partial": None}
Text = Annotated[str, Field(max_length=256), Storable]
LongText = Annotated[str, Field(max_length=2000), Storable]
Tokens = Annotated[int, Field(ge=0, le=10**9)]


class Result(BaseModel):
    """One golden prompt. `reason`: what was missing; never the answer itself. `request_id`: empty if none was asked."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    model: Text = ""
    request_id: Text = ""
    verdict: Verdict
    reason: LongText = ""
    expected: LongText = ""
    seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    input_tokens: Tokens = 0
    output_tokens: Tokens = 0


class Run(BaseModel):
    """All prompts of a file, asked once. The same `run` is taken once."""

    model_config = ConfigDict(extra="forbid")

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    file: Text = ""
    results: Annotated[list[Result], Field(min_length=1, max_length=MOST)]


class Summary(BaseModel):
    """A run in one line."""

    run: str
    at: float
    file: str
    prompts: int
    passed: int
    seconds: float
    cost_usd: float


def enter(database: Database, host: str, rules: Rules, run: Run, at: float = 0.0) -> bool:
    """Keep a run; False if it is there already."""
    at = at or time.time()
    with database.begin() as connection:
        if connection.execute(select(evaluations.c.id).where(evaluations.c.run == run.run).limit(1)).first():
            return False
        known = entries(connection, [one.request_id for one in run.results if one.request_id])
        counts: list[Count] = []
        rows, opinions = [], []
        for one in run.results:
            request = known.get(one.request_id)
            model = one.model or (request.model if request else "")
            counts.append((FEEDBACK, (rules.model(model), "golden", one.verdict), 1))
            fields = one.model_dump(exclude={"request_id", "model"})
            rows.append(
                {
                    **fields,
                    "run": run.run,
                    "at": at,
                    "file": run.file,
                    "model": model,
                    "request": request.id if request else one.request_id,
                    "passed": one.verdict == "correct",
                    "cost_usd": request.cost_usd if request else 0.0,
                }
            )
            if request is not None:
                opinions.append(
                    {
                        "request": request.id,
                        "source": "golden",
                        "at": at,
                        "user_id": request.user_id,
                        "key_id": request.key_id,
                        "model": model,
                        "session": request.session,
                        "use_case": request.use_case,
                        "correct": CORRECT[one.verdict],
                    }
                )
        connection.execute(evaluations.insert(), rows)
        if opinions:
            ignoring = database.insert(feedback).on_conflict_do_nothing(index_elements=["request", "source"])
            connection.execute(ignoring, opinions)
        tallies.add(connection, database, host, counts)
    return True


def is_settled(database: Database, run: Run) -> bool:
    ids = [one.request_id for one in run.results if one.request_id]
    with database.read() as connection:
        return len(entries(connection, ids)) == len(set(ids))


class Entry(BaseModel):
    """What the ledger knows of a prompt's request."""

    id: str
    user_id: str
    key_id: str
    model: str
    session: str
    use_case: str
    cost_usd: float


def entries(connection: Connection, ids: Sequence[str]) -> dict[str, Entry]:
    """By the gateway's id, in portions that every database takes."""
    found: dict[str, Entry] = {}
    columns = [requests.c[name] for name in Entry.model_fields]
    for start in range(0, len(ids), 500):
        for row in connection.execute(select(*columns).where(requests.c.id.in_(ids[start : start + 500]))):
            found[row.id] = Entry(**{column.key: row._mapping[column] for column in columns})
    return found


def summaries(database: Database, limit: int = 50) -> list[Summary]:
    """The newest first."""
    c = evaluations.c
    sums = (
        func.min(c.at),
        func.min(c.file),
        func.count(),
        func.sum(case((c.passed, 1), else_=0)),
        func.sum(c.seconds),
        func.sum(c.cost_usd),
    )
    query = select(c.run, *sums).group_by(c.run).order_by(func.min(c.at).desc(), c.run).limit(limit)
    with database.read() as connection:
        return [
            Summary(run=run, at=at, file=file, prompts=count, passed=passed, seconds=seconds, cost_usd=cost)
            for run, at, file, count, passed, seconds, cost in connection.execute(query)
        ]


def results(database: Database, run: str) -> list[Result]:
    """The prompts of a run, as they came."""
    query = select(evaluations).where(evaluations.c.run == run).order_by(evaluations.c.id)
    kept = ("name", "model", "verdict", "reason", "expected", "seconds", "input_tokens", "output_tokens")
    with database.read() as connection:
        return [
            Result(request_id=row.request, **{name: getattr(row, name) for name in kept})
            for row in connection.execute(query)
        ]


@router.post("", status_code=201)
def post(run: Run, control: Control) -> Summary:
    """Keep a run of golden prompts. What was asked a moment ago may not be in the ledger yet."""
    for pause in SETTLING:
        time.sleep(pause)
        if is_settled(control.database, run):
            break
    if not enter(control.database, control.settings.host, Rules.of(control.snapshot), run):
        raise HTTPException(409, f"The run {run.run!r} is there already")
    return next(one for one in summaries(control.database, MOST) if one.run == run.run)


@router.get("")
def get(control: Control, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> list[Summary]:
    """The newest runs first."""
    return summaries(control.database, limit)


@router.get("/{run}")
def get_run(run: Annotated[Text, Path()], control: Control) -> list[Result]:
    """Each prompt of a run."""
    found = results(control.database, run)
    if not found:
        raise HTTPException(404, f"There is no run {run[:64]!r}")
    return found
