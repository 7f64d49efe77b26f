"""The part of /metrics that comes from the database: feedback, value, adoption, conversations, budget.

The figures are read in a thread of their own, at most every ten seconds, and a scrape waits for them only a moment.
When the database is away, counters stay where they were (they belong to what has happened), gauges are left out (they
would be lies), and the page comes all the same.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from citadel_gateway.control import tallies
from citadel_gateway.control.business import FEEDBACK, SATISFACTION, VALUE
from citadel_gateway.control.conversations import BUCKETS, ENDED, IDLE, TOKENS, TURNS
from citadel_gateway.control.sql import Database, DatabaseAwayError
from citadel_gateway.control.sql.tables import conversations, usage_daily
from citadel_gateway.metrics import label_text, number
from citadel_gateway.records import SYSTEM_USER
from citadel_gateway.settings import Policies

log = logging.getLogger("citadel_gateway")

TTL = 10.0
WAIT = 0.5  # seconds that a scrape waits for new figures; then it takes the last ones
STALE = 300.0  # gauges older than this are left out
BUDGET = "llm_budget_usd"
ACTIVE = "llm_gateway_active_users"
OPEN = "llm_gateway_conversations_open"
WINDOWS = {"day": 1, "week": 7}
RATINGS = tuple(str(rating) for rating in range(1, 11))

Samples = dict[tuple[str, ...], float]
# name -> (type, labels, help)
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    FEEDBACK: ("counter", ("model", "source", "verdict"), "Opinions about answers; accuracy is correct over all."),
    SATISFACTION: ("histogram", ("model", "channel"), "Ratings from 1 to 10."),
    VALUE: ("counter", ("model", "use_case", "kind"), "Worth of answers: realised, lost by a correction, estimated."),
    ENDED: ("counter", ("model", "outcome"), "Conversations that are over: completed, abandoned."),
    TURNS: ("histogram", ("model",), "Turns of conversations that are over."),
    TOKENS: ("histogram", ("model",), "Tokens, in and out, of conversations that are over."),
    BUDGET: ("gauge", ("period",), "What may be spent, as the operator has set it."),
    ACTIVE: ("gauge", ("window",), "Users who were served, today and in the last seven days (UTC); of all hosts."),
    OPEN: ("gauge", (), "Conversations that are not over; of all hosts."),
}
BOUNDS: dict[str, tuple[str, ...]] = {
    SATISFACTION: RATINGS,
    **{name: tuple(str(bound) for bound in bounds) for name, bounds in BUCKETS.items()},
}


class Gauges:
    """Makes the text. `policies` gives those of the moment."""

    def __init__(
        self,
        database: Database,
        host: str,
        policies: Callable[[], Policies],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.database = database
        self.host = host
        self.policies = policies
        self.clock = clock
        self.wall = wall
        self.pool = ThreadPoolExecutor(1, "gauges")
        self.running: Future[None] | None = None
        self.tried = float("-inf")
        self.counted = float("-inf")  # when the figures below were read
        self.counters: dict[str, Samples] = {}
        self.gauges: dict[str, Samples] = {}

    def page(self) -> str:
        """What there is; a database that is slow costs a scrape no more than `WAIT`."""
        if self.running is not None and self.running.done():
            self.running = None
        if self.running is None and self.clock() - self.tried > TTL:
            self.tried = self.clock()
            self.running = self.pool.submit(self.refresh)
        if self.running is not None:
            with suppress(FutureTimeout):
                self.running.result(WAIT)
        return self.text()

    def refresh(self) -> None:
        """Read all figures; what goes wrong is for the log, never for the scrape."""
        try:
            with self.database.read() as connection:
                counters = tallies.read(connection, self.host)
                gauges = {ACTIVE: self.active(connection), OPEN: self.open(connection)}
        except (DatabaseAwayError, SQLAlchemyError) as error:
            log.warning("metrics: the database has no figures: %s", type(error).__name__)
            return
        self.counters, self.gauges, self.counted = counters, gauges, self.clock()

    def active(self, connection: Connection) -> Samples:
        today = datetime.fromtimestamp(self.wall(), UTC).date()
        found: Samples = {}
        for window, days in WINDOWS.items():
            first = (today - timedelta(days=days - 1)).isoformat()
            query = select(func.count(usage_daily.c.user_id.distinct())).where(
                usage_daily.c.day >= first,
                usage_daily.c.requests > usage_daily.c.refused,
                usage_daily.c.user_id != SYSTEM_USER,
            )
            found[(window,)] = connection.execute(query).scalar_one()
        return found

    def open(self, connection: Connection) -> Samples:
        query = select(func.count()).where(
            conversations.c.ended_at == 0, conversations.c.last_at > self.wall() - IDLE, conversations.c.turns > 0
        )
        return {(): connection.execute(query).scalar_one()}

    def text(self) -> str:
        gauges: dict[str, Samples] = {BUDGET: {(one,): usd for one, usd in self.policies().budget_usd.items()}}
        if self.clock() - self.counted < STALE:
            gauges |= self.gauges
        lines: list[str] = []
        for name, (kind, names, text) in FAMILIES.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            if kind == "histogram":
                lines += histogram(name, names, self.counters)
            else:
                samples = (gauges if kind == "gauge" else self.counters).get(name, {})
                lines += [
                    f"{name}{label_text(names, labels)} {number(value)}" for labels, value in sorted(samples.items())
                ]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def histogram(name: str, names: tuple[str, ...], counters: dict[str, Samples]) -> Iterable[str]:
    """The counters hold each bucket by itself, with its bound as the last label. Ratings add up by their bounds."""
    series: dict[tuple[str, ...], dict[str, float]] = {}
    for key, value in counters.get(name, {}).items():
        series.setdefault(key[:-1], {})[key[-1]] = value
    sums = counters.get(f"{name}_sum", {})
    for labels, counts in sorted(series.items()):
        running = 0.0
        for bound in (*BOUNDS[name], "+Inf"):
            running += counts.get(bound, 0)
            le = bound if bound == "+Inf" else f"{bound}.0"
            yield f"{name}_bucket{label_text((*names, 'le'), (*labels, le))} {number(running)}"
        total = sums.get(labels) if name != SATISFACTION else sum(int(one) * many for one, many in counts.items())
        yield f"{name}_sum{label_text(names, labels)} {number(total or 0)}"
        yield f"{name}_count{label_text(names, labels)} {number(running)}"
