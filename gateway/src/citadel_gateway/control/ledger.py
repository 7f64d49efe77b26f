"""What was used and what it cost: usage, the ledger's entries, prices, and whether the books agree with themselves."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

import hiredis
from fastapi import APIRouter, Depends, HTTPException, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from citadel_gateway.books import Books
from citadel_gateway.control import conversations, sheets
from citadel_gateway.control.auth import Admin, Control, Scoped
from citadel_gateway.control.settler import Settler
from citadel_gateway.control.sql import reports
from citadel_gateway.control.sql.reports import FIGURES, Wanted
from citadel_gateway.control.state import State
from citadel_gateway.control.stored import note
from citadel_gateway.core.pricing import Prices
from citadel_gateway.metrics import label_text, number
from citadel_gateway.records import encode
from citadel_gateway.settings import Hardware, Key, Tier, User

router = APIRouter(tags=["usage"])

Group = Literal["user", "key", "model", "day"]
Format = Literal["json", "csv", "jsonl"]
DAYS = 30
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day", "tokens_per_month")
COLUMNS = (
    "id", "request_id", "at", "host", "user", "key", "tier", "asked", "model", "backend", "endpoint", "status",
    "outcome", "code", "stream", "session", "use_case", "input_tokens", "output_tokens", "cached_tokens", "exact",
    "overage", "queue_seconds", "first_byte_seconds", "total_seconds", "engine_seconds", "cost_usd", "tries",
)  # fmt: skip
FAMILIES = {
    "llm_gateway_journal_lag_seconds": ("gauge", "Since when the ledger has had everything; 0 means that it has."),
    "llm_gateway_journal_open_requests": ("gauge", "Requests of this host that are not settled."),
    "llm_gateway_journal_settled_total": ("counter", "Requests that were entered since this process started."),
    "llm_gateway_journal_damaged_total": ("counter", "Lines of the journal that could not be read."),
    "llm_gateway_journal_lost_requests_total": ("counter", "Requests that were settled for a worker that died."),
    "llm_gateway_journal_rejected_total": ("counter", "Requests that the database would not have."),
}


class Usage(BaseModel):
    """Rows of figures; `total` is over all of them."""

    group_by: list[Group]
    first_day: str
    last_day: str
    data: list[dict[str, Any]]
    total: dict[str, Any]


class Limit(BaseModel):
    """`used` is None where only the workers know it."""

    limit: int
    used: int | None


class OwnUsage(Usage):
    """`limits`: those that the user has."""

    user: str
    tier: str
    limits: dict[str, Limit]


class Cost(BaseModel):
    """USD. `per_mtoken`: of tokens out, at the speed of the last day; None: there were none. `busy`: the share of the
    last day in which the model's engines worked; `idle_usd_today`: what the hardware cost while they did not.
    """

    model: str
    engine_hour_usd: float
    hardware_hour_usd: float
    energy_hour_usd: float
    idle_hour_usd: float
    input_mtoken_usd: float
    output_mtoken_usd: float
    cached_mtoken_usd: float
    tokens_per_engine_second: float
    per_mtoken_usd: float | None
    busy: float
    idle_usd_today: float


class Pruned(BaseModel):
    before: str
    requests: int


def day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise HTTPException(400, f"{text[:32]!r} is no day: write 2031-05-17") from None


def moment(text: str) -> float:
    """Seconds since the epoch, a day, or a day with a time (UTC unless it says otherwise)."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise HTTPException(400, f"{text[:32]!r} is no time: write 2031-05-17 or 2031-05-17T12:00:00Z") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def span(first: str, last: str) -> tuple[str, str]:
    """The days that were asked for; without, the last thirty."""
    today = datetime.now(UTC).date()
    end = day(last) if last else today.isoformat()
    begin = day(first) if first else (date.fromisoformat(end) - timedelta(days=DAYS - 1)).isoformat()
    return begin, end


def groups_of(text: str) -> list[Group]:
    found = [part for part in (part.strip() for part in text.split(",")) if part]
    for part in found:
        if part not in reports.GROUPS:
            raise HTTPException(400, f"group_by: {part[:32]!r} is none of {', '.join(reports.GROUPS)}")
    return list(dict.fromkeys(found))  # type: ignore[arg-type]  # it was just looked at


def added(rows: reports.Rows) -> dict[str, Any]:
    return {name: sum(row[name] for row in rows) for name in FIGURES}


First = Annotated[str, Query(alias="from", description="The first day; without, thirty days before the last.")]
Last = Annotated[str, Query(alias="to", description="The last day, which is in it; without, today (UTC).")]
Grouped = Annotated[str, Query(description="user, key, model, day: some of them with commas between.")]
NotAny = Literal["json", "csv"]


@router.get("/v1/usage")
def own_usage(
    control: Control,
    key: Annotated[Key, Depends(Scoped("inference", "read", "admin"))],
    group_by: Grouped = "day",
    first: First = "",
    last: Last = "",
) -> OwnUsage:
    """What the key's user has used, with all of the user's keys, and how much of each limit is used up."""
    user = key.user or key.id
    begin, end = span(first, last)
    groups = groups_of(group_by)
    with control.database.read() as connection:
        rows = reports.usage(connection, groups, begin, end, user=user)
    return OwnUsage(
        group_by=groups, first_day=begin, last_day=end, data=rows, total=added(rows),
        user=user, tier=tier_of(control, user).name, limits=limits_of(control, user),
    )  # fmt: skip


def tier_of(control: State, user: str) -> Tier:
    users = control.snapshot.users if control.snapshot is not None else ()
    return control.tier(next((one for one in users if one.id == user), User(user)))


def limits_of(control: State, user: str) -> dict[str, Limit]:
    """Each limit that the user's tier has, and what counts against it now."""
    tier = tier_of(control, user)
    books: Books | None = control.parts.get("books")
    used: dict[str, int] = {}
    if books is not None:
        try:
            used = books.usage(user)
        except (OSError, hiredis.ReplyError):
            used = {}  # Redis is away: the limits are known all the same
    return {name: Limit(limit=limit, used=used.get(name)) for name in LIMITS if (limit := getattr(tier, name))}


@router.get("/admin/usage", dependencies=[Depends(Scoped("admin", "read"))], response_model=Usage)
def all_usage(
    control: Control,
    group_by: Grouped = "user,model",
    first: First = "",
    last: Last = "",
    user: str = "",
    key: str = "",
    model: str = "",
    format: NotAny = "json",  # noqa: A002  # it is what clients write
) -> Any:
    """What everybody has used."""
    begin, end = span(first, last)
    groups = groups_of(group_by)
    with control.database.read() as connection:
        rows = reports.usage(connection, groups, begin, end, user=user, key=key, model=model)
    if format == "csv":
        names = (*groups, *FIGURES)
        return sheet(sheets.lines(names, ([row[name] for name in names] for row in rows)), f"usage-{begin}-{end}")
    return Usage(group_by=groups, first_day=begin, last_day=end, data=rows, total=added(rows))


def sheet(lines: Iterator[str], name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def wanted(
    first: Annotated[str, Query(alias="from", description="A day or a moment; it is in it.")] = "",
    last: Annotated[str, Query(alias="to", description="A day or a moment; it is not in it.")] = "",
    user: str = "",
    key: str = "",
    model: str = "",
    outcome: str = "",
    session: str = "",
    host: str = "",
) -> Wanted:
    """A dependency: which requests."""
    since, until = (moment(text) if text else 0.0 for text in (first, last))
    return Wanted(user, key, model, outcome, session, host, since, until)


@router.get("/admin/ledger", dependencies=[Depends(Scoped("admin"))])
def entries(
    control: Control,
    which: Annotated[Wanted, Depends(wanted)],
    limit: Annotated[int, Query(ge=1, le=10_000_000)] = 100,
    after: Annotated[str, Query(description="`next` of the page before.")] = "",
    format: Format = "json",  # noqa: A002  # it is what clients write
) -> Response:
    """Settled requests, the newest first. `jsonl` has the records as `replay` reads them."""
    if format == "json":
        with control.database.read() as connection:
            found = reports.listing(connection, which, min(limit, reports.PAGE), place(after))
        more = f"{found[-1].at!r},{found[-1].id}" if len(found) == min(limit, reports.PAGE) else ""
        rows = [{name: getattr(one, name) for name in COLUMNS} for one in found]
        return JSONResponse({"object": "list", "data": rows, "next": more})
    with control.database.read():  # that it is away must be said before the answer begins
        records = reports.everything(control.database, which, limit)
    if format == "csv":
        return sheet(sheets.lines(COLUMNS, ([getattr(one, name) for name in COLUMNS] for one in records)), "ledger")
    return StreamingResponse((encode(one) + b"\n" for one in records), media_type="application/x-ndjson")


def place(after: str) -> tuple[float, str] | None:
    if not after:
        return None
    at, _, name = after.partition(",")
    return moment(at), name


@router.get("/admin/ledger/check", dependencies=[Depends(Scoped("admin"))])
def check(control: Control, sums: bool = True) -> dict[str, Any]:
    """Whether the days add up to the requests, and what is not settled yet on this host (only that without `sums`)."""
    settler: Settler = control.parts["settler"]
    found = reports.Check(0, 0, [])
    if sums:
        with control.database.read() as connection:
            found = reports.check(connection)
    figures = settler.figures()
    return {
        "good": found.good,
        "requests": found.requests,
        "users": found.users,
        "differences": found.differences[:100],
        "open": int(figures["llm_gateway_journal_open_requests"]),
        "lag_seconds": figures["llm_gateway_journal_lag_seconds"],
        "damaged": int(figures["llm_gateway_journal_damaged_total"]),
        "rejected": int(figures["llm_gateway_journal_rejected_total"]),
    }


@router.post("/admin/ledger/prune")
def prune(control: Control, actor: Admin, before: Annotated[str, Query(description="A day; it stays.")]) -> Pruned:
    """Delete old requests; what they add up to by day stays."""
    end = day(before)
    gone = reports.prune(control.database, moment(end))
    with control.database.begin() as connection:
        note(connection, actor, control.settings.host, "ledger.prune", end, after={"requests": gone})
    return Pruned(before=end, requests=gone)


@router.get("/admin/ledger/tokens", dependencies=[Depends(Scoped("admin"))])
def tokens(
    control: Control,
    model: str,
    first: Annotated[str, Query(alias="from")],
    last: Annotated[str, Query(alias="to")],
) -> dict[str, dict[str, int]]:
    """Tokens by backend, for `reconcile`."""
    with control.database.read() as connection:
        return reports.tokens(connection, moment(first), moment(last), model)


@router.get("/admin/cost", dependencies=[Depends(Scoped("admin", "read"))])
def cost(control: Control) -> list[Cost]:
    """What each model costs: for an hour at work, for an hour without work, and for a million tokens."""
    models = control.snapshot.models if control.snapshot is not None else ()
    prices = prices_of(control)
    today = datetime.now(UTC).date()
    begin = (today - timedelta(days=1)).isoformat()
    with control.database.read() as connection:
        rows = reports.usage(connection, ("model",), begin, today.isoformat())
    used = {row["model"]: row for row in rows}
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC).timestamp()
    elapsed = 86_400 + max(1.0, time.time() - midnight)
    found = []
    for model in models:
        row = used.get(model.name, {"engine_seconds": 0.0, "output_tokens": 0})
        rate = prices.rate(model.name)
        seconds = row["engine_seconds"]
        speed = row["output_tokens"] / seconds if seconds else 0.0
        busy = min(1.0, seconds / elapsed / len(model.backends))
        found.append(
            Cost(
                model=model.name,
                engine_hour_usd=rate.second * 3600,
                hardware_hour_usd=rate.hardware * 3600,
                energy_hour_usd=rate.energy * 3600,
                idle_hour_usd=rate.idle_hour,
                input_mtoken_usd=model.price.input_mtoken,
                output_mtoken_usd=model.price.output_mtoken,
                cached_mtoken_usd=model.price.cached_mtoken,
                tokens_per_engine_second=speed,
                per_mtoken_usd=prices.per_token(model.name, speed) * 1e6 if speed else None,
                busy=busy,
                idle_usd_today=rate.idle_hour * (elapsed - 86_400) / 3600 * (1 - busy),
            )
        )
    return found


def prices_of(state: State) -> Prices:
    snapshot = state.snapshot
    return Prices(snapshot.policies.hardware, snapshot.models) if snapshot is not None else Prices(Hardware(), ())


def page(settler: Settler, state: State) -> str:
    """What the settler has for the page of metrics."""
    figures = settler.figures()
    lines = []
    for name, (kind, text) in FAMILIES.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {number(figures[name])}"]
    name = "llm_gateway_idle_usd_per_hour"
    lines += [f"# HELP {name} Hardware of an hour in which the model does nothing.", f"# TYPE {name} gauge"]
    prices = prices_of(state)
    for model in state.snapshot.models if state.snapshot is not None else ():
        lines.append(f"{name}{label_text(('model',), (model.name,))} {number(prices.idle_per_hour(model.name))}")
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """`state.parts`: "settler", whom others may join, and "books" (what limits have counted)."""
    books = state.parts["books"] = Books(state.settings)
    settler = Settler(state.settings, state.database, lambda: prices_of(state), books)
    state.parts["settler"] = settler
    settler.within(conversations.within(state))
    state.pages.append(lambda: page(settler, state))
    close = trace(state, settler)
    settler.start()
    yield
    await asyncio.to_thread(settler.stop)  # it reads what there is, and may wait for the database
    await asyncio.to_thread(close)
    books.close()


def trace(state: State, settler: Settler) -> Callable[[], None]:
    """Send traces if they are wanted; what ends it. OpenTelemetry is loaded only then."""
    if not state.settings.telemetry.endpoint:
        return lambda: None
    from citadel_gateway.control.telemetry import Telemetry

    telemetry = Telemetry(state.settings)
    settler.subscribe(telemetry.take)
    return telemetry.close
