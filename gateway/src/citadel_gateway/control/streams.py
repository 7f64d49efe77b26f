"""Event streams: figures, states of the models, and alerts as they change (server-sent events).

Each begins with the whole state and goes on with changes, so that a client that comes back needs no memory. Nothing is
queued for a slow reader: it gets the difference between what it was sent last and what holds when it can read again.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from citadel_gateway.control.alerts import Alerts, Store
from citadel_gateway.control.auth import Scoped, key_of, state_of
from citadel_gateway.control.figures import Figures, patch, states
from citadel_gateway.control.lines import Changes, Line, Lines
from citadel_gateway.control.live import Live, Pulse
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Key

router = APIRouter()
encode = msgspec.json.Encoder().encode

LOOK_SECONDS = 1.0  # how often a silent stream looks whether it may go on
HEARTBEAT = 15  # looks without an event
RETRY = b"retry: 2000\n\n"  # what a browser's EventSource waits before it comes back
BEAT = b": still here\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Reader = Annotated[Key, Depends(Scoped("read", "metrics", "admin"))]
News = Callable[[], list[bytes]]


def event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(data))


class Stream(StreamingResponse):
    """Counted among the long-lived connections from here to its end, whatever ends it."""

    def __init__(self, request: Request, key: Key, changes: Changes, news: News) -> None:
        """`news`: the events since it was called last; at first the whole state."""
        lines: Lines = state_of(request).parts["lines"]
        self.request = request
        self.held = ExitStack()
        line = self.held.enter_context(lines.line(key.id, request))
        super().__init__(self.told(line, changes, news), media_type="text/event-stream", headers=HEADERS)

    async def told(self, line: Line, changes: Changes, news: News) -> AsyncIterator[bytes]:
        seen = changes.version
        yield RETRY + b"".join(news())
        silent = 0
        while not line.ending.is_set():
            now = await changes.after(seen, LOOK_SECONDS)
            if not self.allowed():
                yield event("error", msgspec.Raw(revoked().body()))
                return
            found = news() if now != seen else []
            seen = now
            silent = 0 if found else silent + 1
            for one in found:
                yield one
            if silent >= HEARTBEAT:
                silent = 0
                yield BEAT

    def allowed(self) -> bool:
        """A key that was revoked ends the streams that it has opened."""
        return key_of(self.request) is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


def revoked() -> Refusal:
    return Refusal(401, "invalid_api_key", "The key is not valid any more")


def figures_news(live: Live) -> News:
    last: list[Figures] = []

    def news() -> list[bytes]:
        now = live.figures
        if not last:
            last.append(now)
            return [event("snapshot", now)]
        change = patch(last[0], now)
        last[0] = now
        return [event("delta", change)] if change else []

    return news


def states_news(live: Live) -> News:
    last: list[Figures] = []

    def news() -> list[bytes]:
        now = states(live.figures)
        if not last:
            last.append(now)
            return [event("snapshot", {"models": now})]
        before, last[0] = last[0], now
        changed = [event("model", {"model": name, **one}) for name, one in now.items() if before.get(name) != one]
        return changed + [event("model", {"model": name, "state": "removed"}) for name in before if name not in now]

    return news


def alerts_news(alerts: Alerts) -> News:
    seen: list[int] = []

    def news() -> list[bytes]:
        version = alerts.changes.version
        if not seen:
            seen.append(version)
            return [event("snapshot", {"alerts": alerts.all()})]
        since, seen[0] = seen[0], version
        return [event("alert", alert) for alert in alerts.since(since)]

    return news


@router.get("/v1/stream/metrics", tags=["streams"])
async def metrics(request: Request, key: Reader, live: Pulse) -> Response:
    """`snapshot` once, then a `delta` (JSON merge patch) a second."""
    return Stream(request, key, live.changes, figures_news(live))


@router.get("/v1/stream/status", tags=["streams"])
async def status(request: Request, key: Reader, live: Pulse) -> Response:
    """`snapshot` once, then a `model` event whenever the state of one changes."""
    return Stream(request, key, live.turns, states_news(live))


@router.get("/v1/stream/alerts", tags=["streams"])
async def alerts(request: Request, key: Reader, store: Store) -> Response:
    """`snapshot` once, then an `alert` event for each that fires or is resolved."""
    return Stream(request, key, store.changes, alerts_news(store))
