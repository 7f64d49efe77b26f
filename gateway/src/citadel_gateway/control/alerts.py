"""Alerts: Alertmanager tells us, and we tell whoever looks: the page, event streams, GraphQL subscriptions.

One entry for each fingerprint. The store is bounded (what was resolved longest ago goes first), survives a restart, and
takes the same notification any number of times, as two Alertmanagers of a pair send it.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response
from msgspec import Struct

from citadel_gateway.control.auth import Scoped, state_of
from citadel_gateway.control.figures import gauge
from citadel_gateway.control.lines import Changes
from citadel_gateway.control.state import State
from citadel_gateway.metrics import write_atomically

log = logging.getLogger("citadel_gateway")
router = APIRouter()

MOST = 1000
RESOLVED_SECONDS = 24 * 3600  # shown so long after its end
SILENT_SECONDS = 7 * 24 * 3600  # one that nobody has repeated for a week is over, whatever became of its end
WORDS, LETTERS = 64, 2048  # labels and annotations of an alert, letters of each
SEVERITIES = {"critical": 0, "warning": 1, "info": 2}
Status = Literal["firing", "resolved"]


class Alert(Struct, frozen=True):
    """As it is kept and shown. Moments are seconds since the epoch; `ends`: 0 while it fires."""

    fingerprint: str
    status: Status
    labels: dict[str, str]
    annotations: dict[str, str]
    starts: float
    ends: float
    seen: float
    source: str = ""

    @property
    def name(self) -> str:
        return self.labels.get("alertname", "")

    def rank(self) -> tuple[object, ...]:
        """The order of a list: what fires, the worst, the newest."""
        severity = SEVERITIES.get(self.labels.get("severity", ""), 3)
        return (self.status != "firing", severity, -self.starts, self.fingerprint)


class Sent(Struct, rename="camel"):
    """One alert in a notification. Prometheus' zero time (year 1) is sent for an end that is not known."""

    labels: dict[str, str]
    status: Status = "firing"
    annotations: dict[str, str] = {}
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    generator_url: str = msgspec.field(name="generatorURL", default="")
    fingerprint: str = ""


class Notification(Struct):
    """Alertmanager's webhook, version 4; what the gateway has no use for is passed over."""

    alerts: Annotated[list[Sent], msgspec.Meta(max_length=5000)]
    version: str = "4"


decode_notification = msgspec.json.Decoder(Notification).decode
decode_stored = msgspec.json.Decoder(list[Alert]).decode
encode = msgspec.json.Encoder().encode


class Alerts:
    """The store. `changes` tells subscribers that there is something new."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self.wall = wall
        self.changes = Changes()
        self.entries: dict[str, Alert] = {}
        self.versions: dict[str, int] = {}  # fingerprint -> the version that changed it last
        self.stored = 0  # the version that is on disk
        with suppress(OSError, msgspec.DecodeError):  # a damaged file counts as none
            self.entries = {alert.fingerprint: alert for alert in decode_stored(path.read_bytes())}

    def take(self, notification: Notification) -> int:
        """Note what was sent; how many alerts are new or have changed."""
        now = self.wall()
        changed = 0
        for sent in notification.alerts:
            alert = made(sent, now)
            known = self.entries.get(alert.fingerprint)
            if known is not None and alert.starts < known.starts:
                continue  # late news of an earlier time
            self.entries[alert.fingerprint] = alert
            if known is None or told(known) != told(alert):
                changed += 1
                self.versions[alert.fingerprint] = self.changes.version + 1
        changed += self.tidy(now)
        if changed:
            self.changes.tell()
        return changed

    def tidy(self, now: float) -> int:
        """End what nobody repeats, forget what is long over; how many have changed."""
        silent = [one for one in self.entries.values() if one.status == "firing" and now - one.seen > SILENT_SECONDS]
        for one in silent:
            self.entries[one.fingerprint] = msgspec.structs.replace(one, status="resolved", ends=now, seen=now)
            self.versions[one.fingerprint] = self.changes.version + 1
        old = [one for one in self.entries.values() if one.status == "resolved" and now - one.seen > RESOLVED_SECONDS]
        excess = len(self.entries) - len(old) - MOST
        if excess > 0:
            rest = [one for one in self.entries.values() if one not in old]
            old += sorted(rest, key=lambda one: (one.status == "firing", one.seen))[:excess]
        for one in old:
            del self.entries[one.fingerprint]
            self.versions.pop(one.fingerprint, None)
        return len(silent) + len(old)

    def all(self) -> list[Alert]:
        return sorted(self.entries.values(), key=Alert.rank)

    def counts(self) -> dict[tuple[str, ...], float]:
        firing = sum(alert.status == "firing" for alert in tuple(self.entries.values()))
        return {("firing",): float(firing), ("resolved",): float(len(self.entries) - firing)}

    def since(self, version: int) -> list[Alert]:
        """Those that changed after it."""
        return [self.entries[one] for one, changed in self.versions.items() if changed > version]

    async def updates(self) -> AsyncIterator[Alert]:
        """Each change from now on, without end. A slow reader gets the latest state of each alert."""
        seen = self.changes.version
        while True:
            now = await self.changes.after(seen)
            for alert in self.since(seen):
                yield alert
            seen = now

    # disk -----------------------------------------------------------------------------------------------------------
    async def keep(self) -> None:
        """Write to disk what has changed since the last time. Called once a second, and at the end."""
        version = self.changes.version
        if version == self.stored:
            return
        try:
            await asyncio.to_thread(write_atomically, self.path, encode(list(self.entries.values())))
            self.stored = version
        except OSError as error:
            log.error("%s: the alerts cannot be kept: %s", self.path, error)


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps `parts["alerts"]`."""
    alerts = state.parts["alerts"] = Alerts(Path(state.settings.state_dir) / "alerts.json")
    state.every(1.0, alerts.keep)
    state.pages.append(lambda: gauge("llm_gateway_alerts", "Alerts that are kept.", alerts.counts(), ("status",)))
    yield
    await alerts.keep()


def made(sent: Sent, now: float) -> Alert:
    labels = bounded(sent.labels)
    text = encode(sorted(sent.labels.items()))
    fingerprint = sent.fingerprint[:64] or hashlib.sha256(text).hexdigest()[:16]
    ends = moment(sent.ends_at) or now
    return Alert(
        fingerprint,
        sent.status,
        labels,
        bounded(sent.annotations),
        moment(sent.starts_at) or now,
        min(ends, now) if sent.status == "resolved" else 0.0,
        now,
        sent.generator_url[:LETTERS],
    )


def bounded(words: dict[str, str]) -> dict[str, str]:
    return {name[:128]: text[:LETTERS] for name, text in list(words.items())[:WORDS]}


def moment(at: datetime | None) -> float:
    """0 for none and for Go's zero time."""
    if at is None or at.year <= 1:
        return 0.0
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def told(alert: Alert) -> tuple[object, ...]:
    """What makes a change worth telling; that it was sent once more does not."""
    return (alert.status, alert.starts, alert.ends if alert.status == "resolved" else 0, alert.annotations)


def alerts_of(request: Request) -> Alerts:
    found: Alerts = state_of(request).parts["alerts"]
    return found


Store = Annotated[Alerts, Depends(alerts_of)]


@router.post("/v1/alerts", dependencies=[Depends(Scoped("alerts"))], tags=["alerts"])
async def receive(request: Request, store: Store) -> dict[str, Any]:
    """Alertmanager's webhook (version 4). Answers before anything is on disk: a repeated notification does no harm."""
    try:
        notification = decode_notification(await request.body())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"This is no notification of an Alertmanager: {error}") from None
    if notification.version != "4":
        raise HTTPException(400, f"Version {notification.version[:16]!r} of the webhook is not known; 4 is")
    return {"received": len(notification.alerts), "changed": store.take(notification)}


@router.get("/v1/alerts", dependencies=[Depends(Scoped("read", "metrics", "admin"))], tags=["alerts"])
async def listed(store: Store, status: Status | None = None) -> Response:
    """What fires, then what was resolved in the last day."""
    found = [alert for alert in store.all() if status is None or alert.status == status]
    return Response(encode({"alerts": found}), media_type="application/json")
