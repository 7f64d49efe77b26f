"""From the journal into the ledger, exactly once.

A thread of the control process reads what the workers of this host have written, and enters settled requests by their
id, a batch in a transaction, together with how far it has read. A request whose worker has died is settled here, from
the last that was noted of it. With the database away the journal waits; nothing else does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from citadel_gateway.control.segments import Folder, Segment, decoded, folder_of
from citadel_gateway.control.sql import book
from citadel_gateway.control.sql.engine import Database, DatabaseAwayError, is_away, reason
from citadel_gateway.core.pricing import Prices
from citadel_gateway.records import Opened, Progress, Running, Settled, encode
from citadel_gateway.settings import Gateway

log = logging.getLogger("citadel_gateway")

INTERVAL = 0.2
BATCH = 2000  # records
OFFSETS_EVERY = 5.0  # when there is nothing but progress to note
LOOK_EVERY = 0.5
RETIRE_EVERY = 60.0
NEWBORN = 1.0  # a worker makes its first segment, then locks it
TELL_TRIES = 3
TELL_EVERY = 60.0

Subscriber = Callable[[Sequence[Settled]], None]


class Books(Protocol):
    """What the limiter must be told of a request that its worker could not settle."""

    def settle_lost(self, user: str, tokens: int, at: float, id: str) -> object: ...  # noqa: A002  # as Books names it


class Live(NamedTuple):
    """A request that is still running."""

    opened: Opened
    segment: Segment
    running: Running | None = None
    seen: float = 0.0


class Batch:
    """What was read and is not in the database yet."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[Settled, bytes]] = {}
        self.orphans: list[Settled] = []

    def add(self, record: Settled, raw: bytes) -> None:
        self.records.setdefault(record.id, (record, raw))


class Settler:
    """`step` does one pass and is what the tests call; `start` and `stop` run it in a thread."""

    def __init__(
        self,
        settings: Gateway,
        database: Database,
        prices: Callable[[], Prices],
        books: Books | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.database = database
        self.prices = prices
        self.books = books
        self.wall = wall
        self.clock = clock
        self.folder = Folder(folder_of(settings))
        self.offsets: dict[str, int] | None = None  # None: the database has not been asked yet
        self.live: dict[str, Live] = {}
        self.batch = Batch()
        self.subscribers: list[Subscriber] = []
        self.joined: list[book.Within] = []
        self.untold: list[tuple[Settled, int, float]] = []  # lost ones, tries so far, not before
        self.caught_up = clock()
        self.looked = self.saved = self.retired = -1e9
        self.met: dict[str, float] = {}  # when a group was found
        self.counts = {"settled": 0, "damaged": 0, "lost": 0, "rejected": 0}
        self.complained: set[str] = set()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    # For others ---------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Subscriber) -> None:
        """Be told of every record that is new in the ledger, in batches, after the commit, in the settler's thread."""
        self.subscribers.append(callback)

    def within(self, callback: book.Within) -> None:
        """Take part in the transaction that enters new records: both happen, or neither."""
        self.joined.append(callback)

    def figures(self) -> dict[str, float]:
        """For the page of metrics."""
        return {
            "llm_gateway_journal_lag_seconds": self.clock() - self.caught_up,
            "llm_gateway_journal_open_requests": float(len(self.live)),
            "llm_gateway_journal_settled_total": float(self.counts["settled"]),
            "llm_gateway_journal_damaged_total": float(self.counts["damaged"]),
            "llm_gateway_journal_lost_requests_total": float(self.counts["lost"]),
            "llm_gateway_journal_rejected_total": float(self.counts["rejected"]),
        }

    def find(self, name: str) -> Settled | Live | None:
        """A request that is not in the ledger yet, by its own id or the client's. From any thread."""
        for one in list(self.live.values()):
            if name in (one.opened.id, one.opened.request_id):
                return one
        for record, _ in list(self.batch.records.values()):
            if name in (record.id, record.request_id):
                return record
        return self.find_unread(name.encode())

    def find_unread(self, name: bytes) -> Settled | Live | None:
        found: Settled | Live | None = None
        for segment in self.folder:
            try:
                data = segment.unread()
            except OSError:  # closed meanwhile: it is in the ledger
                continue
            for line in data.split(b"\n")[:-1] if name in data else ():
                if name not in line:
                    continue
                record = decoded(line)
                if isinstance(record, Progress | None) or name.decode() not in (record.id, record.request_id):
                    continue
                found = record if isinstance(record, Settled) else found or Live(record, segment)
        return found

    # The thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.thread = threading.Thread(target=self.run, name="settler", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """After a last pass, so that what a request has cost is in the ledger when the host goes down."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join(10)
            self.thread = None

    def run(self) -> None:
        while not self.stopping.is_set():
            self.stopping.wait(0.0 if self.attempt() else INTERVAL)
        self.attempt()
        self.folder.close()

    def attempt(self) -> bool:
        """One pass that outlives whatever is wrong; whether there may be more to do at once."""
        try:
            return self.step()
        except DatabaseAwayError:
            return False  # it is reported where it is noticed, and the batch waits
        except Exception as error:  # a fault of one pass must not end the bookkeeping
            if self.first(f"{type(error)}"):
                log.exception("the settler failed, and tries again")
            return False

    def first(self, what: str) -> bool:
        """Whether this is to be complained of: once is enough."""
        if what in self.complained:
            return False
        if len(self.complained) > 1000:
            self.complained.clear()
        self.complained.add(what)
        return True

    def step(self) -> bool:
        """Read a batch, enter it, tell the others."""
        began = self.clock()
        if self.offsets is None:
            self.recall()
        if began - self.looked >= LOOK_EVERY:
            self.look()
        more = bool(self.batch.records) or self.read()
        self.enter()
        if began - self.retired >= RETIRE_EVERY:
            self.retire()
        self.tell()
        if not more:
            self.caught_up = began
        return more

    def look(self) -> None:
        self.looked = self.clock()
        self.folder.look(self.offsets or {})
        self.met = {group: self.met.get(group, self.looked) for group in self.folder.groups}

    def recall(self) -> None:
        with self.database.read() as connection:
            found = book.offsets_of(connection, self.settings.host)
        self.folder.finished = {name for name, (_, done) in found.items() if done}
        self.offsets = {name: offset for name, (offset, _) in found.items()}

    # Reading ------------------------------------------------------------------------------------------------------

    def is_dead(self, group: str) -> bool:
        """No segment is locked, and there is no newer one that we have not met."""

        def unlocked() -> bool:
            # The oldest first: the newest may be just about to be locked by its worker.
            return not any(segment.locked() for segment in self.folder.groups[group])

        if self.clock() - self.met[group] < NEWBORN or not unlocked():
            return False
        self.look()
        return unlocked()

    def read(self) -> bool:
        """Fill the batch; whether there may be more. A segment is read only after those that were written before it."""
        for group in list(self.folder.groups):
            dead = self.is_dead(group)
            segments = list(self.folder.groups[group])
            begun = [segment for segment in segments if dead or segment.has_data()]
            for segment in begun:
                if not self.read_segment(segment, final=dead or segment is not begun[-1]):
                    return True
            if dead:
                self.settle_orphans(segments)
        return False

    def read_segment(self, segment: Segment, final: bool) -> bool:
        """Whether all that is there was read."""
        while len(self.batch.records) < BATCH:
            lines, position = segment.read(final)
            for line in lines:
                self.take(segment, line.start, line.data)
                segment.used = line.start + len(line.data) + 1
            if position == segment.position:
                if final and not segment.open:
                    segment.done = True
                return True
            segment.position = position
        return False

    def take(self, segment: Segment, start: int, raw: bytes) -> None:
        raw = book.clean(raw)
        record = decoded(raw)
        if isinstance(record, Settled):
            self.closed(record.id)
            segment.settled += 1
            self.batch.add(record, raw)
        elif isinstance(record, Opened):
            self.live[record.id] = Live(record, segment)
            segment.open[record.id] = start
        elif isinstance(record, Progress):
            for running in record.requests:
                known = self.live.get(running.id)
                if known is not None:
                    self.live[running.id] = known._replace(running=running, seen=record.at)
        else:
            self.damaged(segment, start)

    def closed(self, name: str) -> None:
        known = self.live.pop(name, None)
        if known is not None:
            known.segment.open.pop(name, None)

    def damaged(self, segment: Segment, start: int) -> None:
        segment.damaged += 1
        self.counts["damaged"] += 1
        if self.first(segment.name):
            log.error("%s: the line at byte %d is damaged and was skipped", segment.path, start)

    def settle_orphans(self, segments: list[Segment]) -> None:
        """The worker is gone, and all that it wrote is read."""
        for name in [name for segment in segments for name in segment.open]:
            record = self.lost(self.live[name])
            self.closed(name)
            self.batch.orphans.append(record)
            self.batch.add(record, encode(record))
        for segment in segments:
            segment.done = True

    def lost(self, one: Live) -> Settled:
        """What is known of a request whose worker died, at most a second old."""
        opened = one.opened
        running = one.running or Running(opened.id, 0, 0, 0.0)
        usd, parts = self.prices().cost(
            opened.model, running.input_tokens, running.output_tokens, 0, running.engine_seconds
        )
        return Settled(
            **{field: getattr(opened, field) for field in opened.__struct_fields__},
            status=0,
            outcome="lost",
            code="worker_lost",
            input_tokens=running.input_tokens,
            output_tokens=running.output_tokens,
            total_seconds=max(0.0, one.seen - opened.at) if one.seen else 0.0,
            engine_seconds=running.engine_seconds,
            cost_usd=usd,
            cost=parts,
            tries=1,
        )

    # Entering -----------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """The batch and the offsets in one transaction. What fails stays, and is tried again."""
        moved = [one for one in self.folder if one.safe != one.saved or one.done or one.settled or one.damaged]
        finished = [segment for segment in moved if segment.done]
        now = self.clock()
        if not self.batch.records and not finished and (not moved or now - self.saved < OFFSETS_EVERY):
            return
        wall = self.wall()
        batch, fresh = self.batch, self.commit(self.batch.records, [self.offset(one, wall) for one in moved])
        self.batch = Batch()
        self.saved = now
        for segment in moved:
            segment.saved = segment.safe
            segment.settled = segment.damaged = 0
        self.folder.drop(finished)
        self.publish(batch, fresh)

    def offset(self, segment: Segment, now: float) -> dict[str, object]:
        return {
            "segment": segment.name,
            "host": self.settings.host,
            "offset": segment.safe,
            "settled": segment.settled,
            "damaged": segment.damaged,
            "done": segment.done,
            "updated_at": now,
        }

    def commit(self, records: dict[str, tuple[Settled, bytes]], offsets: list[dict[str, object]]) -> list[Settled]:
        """Those that are new. A record that the database will not have must not hold up the others: the batch is
        halved until it stands alone.
        """
        try:
            with self.database.begin() as connection:
                fresh = book.enter(connection, self.database, records)
                if fresh:
                    self.join(connection, fresh)
                book.save_offsets(connection, self.database, offsets)
            return fresh
        except (DataError, IntegrityError) as error:
            if not records:
                raise
            if len(records) == 1:
                self.counts["rejected"] += 1
                log.error("the database will not have the request %s: %s", next(iter(records)), reason(error))
                return self.commit({}, offsets)
        items = list(records.items())
        middle = len(items) // 2
        return self.commit(dict(items[:middle]), []) + self.commit(dict(items[middle:]), offsets)

    def join(self, connection: Connection, fresh: list[Settled]) -> None:
        """Others in the same transaction. Their faults are theirs alone: the ledger goes on without them."""
        for callback in self.joined:
            try:
                with connection.begin_nested():
                    callback(connection, fresh)
            except Exception as error:
                if isinstance(error, SQLAlchemyError) and is_away(error):
                    raise
                if self.first(repr(callback)):
                    log.exception("%r failed for a batch of the ledger", callback)

    def publish(self, batch: Batch, fresh: list[Settled]) -> None:
        self.counts["settled"] += len(fresh)
        lost = {record.id for record in batch.orphans}
        for record in fresh:
            if record.id in lost:
                self.counts["lost"] += 1
                self.untold.append((record, 0, self.clock()))
        if lost:
            log.warning("%d requests were settled for a worker that died", len(lost))
        for callback in self.subscribers if fresh else ():
            try:
                callback(fresh)
            except Exception:
                if self.first(repr(callback)):
                    log.exception("%r failed for a batch of the ledger", callback)

    def tell(self) -> None:
        """The limiter counts what the worker could not tell it any more."""
        now = self.clock()
        if self.books is None:
            self.untold = []
        waiting, self.untold = self.untold, []
        for record, tries, at in waiting:
            if now < at:
                self.untold.append((record, tries, at))
                continue
            try:
                if self.books is not None:
                    used = record.input_tokens + record.output_tokens
                    self.books.settle_lost(record.user, used, record.at + record.total_seconds, record.id)
            except Exception as error:
                if tries + 1 < TELL_TRIES:
                    self.untold.append((record, tries + 1, now + TELL_EVERY))
                else:
                    log.error("the limits of %s were not told of a lost request: %s", record.user, error)

    def retire(self) -> None:
        """Remove segments that were kept long enough for `replay`."""
        self.retired = self.clock()
        gone = self.folder.expired(self.wall() - self.settings.journal.keep_hours * 3600)
        if gone:
            with self.database.begin() as connection:
                book.forget_offsets(connection, gone)
