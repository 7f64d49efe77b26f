"""The live page, and the pulse behind it: once a second the workers' reports become figures for whoever looks."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Request, WebSocket
from fastapi.responses import Response
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from citadel_gateway.control.alerts import Alerts
from citadel_gateway.control.auth import state_of
from citadel_gateway.control.figures import Figures, Maker, patch, states, stopping
from citadel_gateway.control.lines import Changes, Lines
from citadel_gateway.control.sockets import POLICY, RESTART, Socket, SocketEnd, first, serve
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.control.sql.tables import usage_daily
from citadel_gateway.control.state import State
from citadel_gateway.metrics import fresh, read_reports

router = APIRouter()
encode = msgspec.json.Encoder().encode

COST_SECONDS = 10.0
SCOPES = frozenset(("read", "metrics", "admin"))
PAGE = Path(__file__).parent / "live_page"
FILES = {
    "": ("live.html", "text/html; charset=utf-8"),
    "live.css": ("live.css", "text/css; charset=utf-8"),
    "live.js": ("live.js", "text/javascript; charset=utf-8"),
    "draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing from elsewhere, nothing inline, in nobody's frame, and no string ever becomes markup.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


class Live:
    """The newest figures. `changes` moves once a second, `turns` when the state of a model has changed."""

    def __init__(self, state: State, lines: Lines, wall: Callable[[], float] = time.time) -> None:
        self.state = state
        self.lines = lines
        self.wall = wall
        self.maker = Maker(state.settings.host)
        self.changes = Changes()
        self.turns = Changes()
        self.figures: Figures = {"at": 0, "host": state.settings.host, "workers": 0, "models": {}, "total": {}}
        self.cost: dict[str, float] | None = None

    def look(self) -> None:
        wall = self.wall()
        reports = read_reports(Path(self.state.settings.run_dir))
        self.lines.look(stopping(fresh(reports, wall)))
        before, self.figures = self.figures, self.maker.make(self.state.snapshot, reports, wall, self.cost)
        self.changes.tell()
        if states(before) != states(self.figures):
            self.turns.tell()

    async def beat(self) -> None:
        self.look()

    def price(self) -> None:
        """What each model has cost today, as the ledger has it; not known while the database is away."""
        try:
            self.cost = self.spent()
        except (DatabaseAwayError, SQLAlchemyError):  # reported by the database's own module
            self.cost = None

    def spent(self) -> dict[str, float]:
        day = time.strftime("%Y-%m-%d", time.gmtime(self.wall()))
        cost = func.sum(usage_daily.c.cost_usd)
        query = select(usage_daily.c.model, cost).where(usage_daily.c.day == day).group_by(usage_daily.c.model)
        with self.state.database.read() as connection:
            return {model: float(usd or 0) for model, usd in connection.execute(query)}

    async def updates(self) -> AsyncIterator[Figures]:
        """The figures of now, then those of each second, without end. A slow reader skips some."""
        while True:
            seen = self.changes.version
            yield self.figures
            await self.changes.after(seen)


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps `parts["live"]`."""
    live = state.parts["live"] = Live(state, state.parts["lines"])
    state.every(1.0, live.beat)
    state.every(COST_SECONDS, live.price)
    yield


def live_of(request: Request) -> Live:
    found: Live = state_of(request).parts["live"]
    return found


Pulse = Annotated[Live, Depends(live_of)]


# the page -----------------------------------------------------------------------------------------------------------
@cache
def loaded(name: str) -> tuple[bytes, str]:
    """A file of the page and its tag."""
    data = (PAGE / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:20]}"'


def served(request: Request, name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404, "Not Found")
    data, tag = loaded(FILES[name][0])
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=FILES[name][1])


@router.get("/live", include_in_schema=False)
async def page(request: Request) -> Response:
    """Holds no figures: those come over the WebSocket, to whoever has a key."""
    return served(request, "")


@router.get("/live/{name}", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    return served(request, name)


@router.websocket("/live/ws")
async def socket(websocket: WebSocket) -> None:
    """Figures and alerts for the page: first everything, then what changes."""
    await serve(websocket, SCOPES, watch)


async def watch(connection: Socket) -> None:
    """Until the page goes away, or its key does."""
    parts = connection.state.parts
    await first(tell(connection, parts["live"], parts["alerts"]), listen(connection))


async def listen(connection: Socket) -> None:
    while await connection.receive() is not None:
        pass  # a page has nothing to say


async def tell(connection: Socket, live: Live, alerts: Alerts) -> None:
    async def send(kind: str, **more: Any) -> None:
        await connection.send(encode({"type": kind, **more}))

    seen, told = live.changes.version, alerts.changes.version
    last = live.figures
    await send("snapshot", figures=last, history=live.maker.history(), alerts=alerts.all())
    while not connection.line.ending.is_set():
        seen = await live.changes.after(seen)
        if connection.known() is None:
            raise SocketEnd(POLICY, "invalid_api_key")
        before, last = last, live.figures
        await send("delta", figures=patch(before, last))
        if alerts.changes.version != told:
            told = alerts.changes.version
            await send("alerts", alerts=alerts.all())
    raise SocketEnd(RESTART, "restarting")
