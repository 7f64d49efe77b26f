"""Who is served now, who waits, and who is told at once to come back later.

An engine works fastest with as many requests as it has slots; more of them only make each slower. So the rest waits
here, in a bounded queue for each model, where the order can follow tiers and a client that leaves costs nothing. The
slots are shared by all workers of the host (core/board.py); each worker has the queue of its own clients.

A waiter comes before those that have arrived later, but a tier that is a priority higher is moved ahead as if it had
come earlier, and a user with many waiters of his own is moved back a little. So everyone's turn comes. Where the higher
tiers alone are more than the engine can do, every eighth free slot goes to the others, and an eighth of the queue.

How long a wait will be is known from Little's law: slots divided by the time for which a request holds one is the rate
at which places become free. Who would wait for longer than allowed is refused at once, and the answer says when there
will be a place. Under overload (more than twice as much asked as can be done, for a while) a long queue helps nobody,
everyone would just wait as long as is allowed: it is then kept shorter than a turn of the engine.
"""

from bisect import bisect_left, insort
from collections import Counter
from math import ceil, exp
from typing import Any, Final, Protocol

from citadel_gateway.core.board import (
    ARRIVED,
    HEAD,
    INFLIGHT,
    NOTHING_WAITS,
    QUEUED,
    QUEUED_TOKENS,
    Board,
)
from citadel_gateway.core.catalogue import Catalogue, Model
from citadel_gateway.core.routing import RETRY_DRAINING, unavailable
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Admission

HIGHEST: Final = 9
STEPS: Final = 20  # priorities in a `max_wait`: so much earlier a request counts for each
OWN, OWN_MOST = 0.002, 0.04  # of the patience: so much later it counts for each waiter that its user has already
OTHERS: Final = 8  # every so many-th slot goes to a lower priority than the first waiter's, if such a one waits
NEWER: Final = 0.05  # weight of the newest measurement of how long a slot is held
UNFAIR: Final = 0.1  # seconds that another worker's waiter may be ahead of ours before we leave a slot to it
HORIZON: Final = 10.0  # seconds over which arrivals are compared with what can be done
OVERLOAD, RELIEF, MOST = 2.0, 1.2, 3.0  # times of what can be done: overload begins, ends, and is never called worse
TURN: Final = (
    0.6  # of the time for which a slot is held: the longest wait then, so that nobody takes twice as long as usual
)
FEWEST: Final = 2  # waiters that are let wait nevertheless, so that no slot is ever free
LENIENCE: Final = 1.5  # times of that wait before a waiter is sent away again: the estimate moves a little all the time
SHORTEST: Final = 0.05  # seconds: no queue is kept shorter than this
LAST: Final = 1 << 62  # comes after all serial numbers
LATEST: Final = 600  # seconds: nobody is told to come back later than this
SPREAD: Final = 0.25  # of a Retry-After, so that those who were refused together do not come back together


class Waiter(Protocol):
    """What waits. One of the two is called, once, and not before `enter` has returned; none after `cancel`."""

    def go(self) -> None: ...
    def refused(self, refusal: Refusal) -> None: ...


class Admitted:
    """The slot is yours; give it back with `leave`."""


ADMITTED: Final = Admitted()


class Shed(Refusal):
    """Refused because there is too much to do. `reason` is what metrics count (limit, full, wait, deadline, evicted,
    expired), `ahead` is how many would have been served first.
    """

    def __init__(self, model: str, reason: str, retry_after: int, ahead: int = 0, *, late: bool = False) -> None:
        if late:
            message = f"The model {model!r} was busy for longer than the request could wait"
            super().__init__(504, "deadline_exceeded", message, retry_after=retry_after)
        else:
            super().__init__(503, "overloaded", f"The model {model!r} is at its limit", retry_after=retry_after)
        self.reason = reason
        self.ahead = ahead


class Entry:
    """A waiter with its place."""

    __slots__ = ("deadline", "lane", "order", "priority", "serial", "since", "tokens", "until", "user", "waiter")

    def __init__(self, lane: "Lane", waiter: Waiter, user: str, priority: int, tokens: int) -> None:
        self.lane = lane
        self.waiter = waiter
        self.user = user
        self.priority = priority
        self.tokens = tokens
        self.order = 0.0
        self.serial = 0
        self.since = 0.0
        self.until = 0.0
        self.deadline = False  # `until` is the client's, not ours


class Lane:
    """The slots and the queue of one model."""

    def __init__(self, model: Model, board: Board, settings: Admission) -> None:
        self.model = model
        self.settings = settings
        self.row = board.row(f"lane {model.name}")
        self.slots = 0  # of one replica
        self.total = 0  # of those that are usable
        self.queue: list[tuple[float, int, Entry]] = []
        self.users: Counter[str] = Counter()
        self.priorities: Counter[int] = Counter()
        self.tokens = 0
        self.soonest = 1e18  # when the first of them has waited for too long
        self.held = 0.0  # seconds for which a request has its slot
        self.arrived = 0.0  # requests within the horizon, decayed
        self.stamp = 0.0
        self.overloaded = False
        self.turns = 0  # slots given to the first waiter since one was given to a lower priority
        self.serving = False

    # slots ----------------------------------------------------------------------------------------------------------
    def refresh(self, now: float) -> None:
        """How many slots there are."""
        self.total = self.slots * sum(backend.health.usable(now) for backend in self.model.backends)

    def free(self) -> int:
        """Slots that nobody of this host has. Requests of other hosts' gateways are seen at the backends only."""
        model = self.model
        admitted, running = model.inflight, 0
        if self.row.others:
            admitted += self.row.elsewhere(INFLIGHT)
        for backend in model.backends:
            running += backend.requests()
        return self.total - max(admitted, running)

    def may_take(self, free: int, order: float) -> bool:
        """Whether a free slot is ours, or should be left to an earlier waiter of another worker."""
        row = self.row
        if not row.others or row.earliest() > (order - UNFAIR) * 1e6:
            return True
        return free > row.elsewhere(QUEUED)

    def take(self) -> None:
        model = self.model
        model.inflight += 1
        self.row.mine[self.row.base + INFLIGHT] = model.inflight

    # how long it takes ----------------------------------------------------------------------------------------------
    def rate(self) -> float:
        """Slots that become free in a second; 0 when nothing is known yet."""
        return self.total / self.held if self.held > 0 else 0.0

    def capacity(self) -> float:
        """Requests that can be begun within the horizon."""
        return self.rate() * HORIZON + self.total

    def arrive(self, now: float, number: int) -> None:
        """Count requests that have come, and find out whether they are too many."""
        passed = now - self.stamp
        if passed > 0:
            self.arrived *= exp(-passed / HORIZON)
            self.stamp = now
        self.arrived += number
        if not self.held:
            return
        capacity = self.capacity()
        elsewhere = self.row.elsewhere(ARRIVED) if self.row.others else 0
        self.arrived = min(self.arrived, max(MOST * capacity - elsewhere, 0.0))
        self.overloaded = self.arrived + elsewhere > (RELIEF if self.overloaded else OVERLOAD) * capacity

    def relieve(self) -> None:
        """Half of the slots are free and nobody waits: whatever came before, it is over."""
        self.overloaded = False
        self.arrived = min(self.arrived, self.capacity())

    def patience(self, lower: bool = False) -> float:
        """Seconds that a request may wait. One of the lower priorities is always let wait for its turn."""
        longest = self.settings.max_wait
        if not self.overloaded:
            return longest
        rate = self.rate()
        turn = OTHERS / rate if lower and rate else 0.0
        return min(longest, max(self.held * max(TURN, min(FEWEST / (self.total or 1), 1.0)), SHORTEST, turn))

    def expected(self, ahead: float, lower: float | None = None) -> float:
        """Seconds until the turn of one with so many before it; `lower`: how many of them count where every eighth slot
        goes to lower priorities.
        """
        rate = self.rate()
        if not rate:
            return 0.0
        turns = ahead + 1 if lower is None else min(ahead + 1, (lower + 1) * OTHERS)
        return turns / rate

    def ahead(self, order: float) -> float:
        """How many are before a place in the order, with those of the other workers as far as can be guessed."""
        mine = bisect_left(self.queue, (order, LAST))
        row = self.row
        if not row.others:
            return mine
        share = mine / len(self.queue) if self.queue else float(row.earliest() <= order * 1e6)
        return mine + row.elsewhere(QUEUED) * share

    def lower_before(self, order: float, priority: int) -> float | None:
        """Of the waiters below the first one's priority, those before a place; nothing for who is not below it."""
        if not self.queue or priority >= self.queue[0][2].priority:
            return None
        top = self.queue[0][2].priority
        return self.scale() * sum(1 for place, _, entry in self.queue if place < order and entry.priority < top)

    def scale(self) -> float:
        """Waiters of all workers for each of ours."""
        return 1 + self.row.elsewhere(QUEUED) / len(self.queue) if self.row.others and self.queue else 1.0

    def wait(self, now: float) -> float:
        """What a request of middling luck would wait now, for the choice between models."""
        if not self.slots or self.free() > 0:
            return 0.0
        return self.expected(len(self.queue) + self.row.elsewhere(QUEUED))

    def waiting_tokens(self) -> int:
        return self.tokens + self.row.elsewhere(QUEUED_TOKENS)

    # the queue ------------------------------------------------------------------------------------------------------
    def place(self, user: str, priority: int, now: float) -> float:
        """Where a request belongs in the order."""
        own = min(self.users[user] * OWN, OWN_MOST) if user else 0.0
        return now + self.settings.max_wait * (HIGHEST - priority) / STEPS + self.patience() * own

    def insert(self, entry: Entry) -> None:
        insort(self.queue, (entry.order, entry.serial, entry))
        self.users[entry.user] += 1
        self.priorities[entry.priority] += 1
        self.tokens += entry.tokens
        self.soonest = min(self.soonest, entry.until)
        self.publish()

    def remove(self, entry: Entry) -> None:
        del self.queue[bisect_left(self.queue, (entry.order, entry.serial))]
        self.users[entry.user] -= 1
        if not self.users[entry.user]:
            del self.users[entry.user]
        self.priorities[entry.priority] -= 1
        self.tokens -= entry.tokens
        self.publish()

    def publish(self) -> None:
        row = self.row
        row.write(QUEUED, len(self.queue))
        row.write(QUEUED_TOKENS, self.tokens)
        row.write(HEAD, int(self.queue[0][0] * 1e6) if self.queue else NOTHING_WAITS)

    def next(self) -> Entry:
        """Whose turn it is: the first, or now and then the first of a lower priority."""
        first = self.queue[0][2]
        if self.turns >= OTHERS - 1 and len(self.queue) > self.priorities[first.priority]:
            for _, _, entry in self.queue:
                if entry.priority < first.priority:
                    self.turns = 0
                    return entry
        self.turns += 1
        return first

    def victim(self, priority: int) -> Entry | None:
        """Who has to go for one of a higher priority: the youngest of the lowest, but not the last eighth of the
        queue.
        """
        lowest = min((one for one, number in self.priorities.items() if number), default=priority)
        if lowest >= priority:
            return None
        lower = sum(number for one, number in self.priorities.items() if one < priority)
        if lower <= self.settings.queue // OTHERS:
            return None
        return max((entry for _, _, entry in self.queue if entry.priority == lowest), key=lambda entry: entry.serial)


class Gatekeeper:
    """Admission to all models of one worker. `most`: requests to one model that the worker holds at the same time."""

    def __init__(self, settings: Admission, most: int, seed: int = 1) -> None:
        self.settings = settings
        self.most = most
        self.lanes: dict[str, Lane] = {}
        self.entries: dict[Any, Entry] = {}  # by waiter
        self.serial = 0
        self.state = seed * 2654435761 & 0x7FFFFFFF

    @property
    def waiting(self) -> int:
        """Requests that wait, before all models; `pump` is wanted fifty times a second while there are any."""
        return len(self.entries)

    def queued(self, model: Model) -> int:
        """Those that wait in this worker for one model."""
        lane = self.lanes.get(model.name)
        return len(lane.queue) if lane is not None else 0

    def apply(self, catalogue: Catalogue, now: float) -> None:
        """Take over the models of a new snapshot. Who waits for one that is gone is told so."""
        lanes = {}
        for name, model in catalogue.models.items():
            lane = self.lanes.pop(name, None) or Lane(model, catalogue.board, self.settings)
            lane.model, lane.slots = model, model.slots
            lane.refresh(now)
            model.lane = lane
            lanes[name] = lane
        gone, self.lanes = self.lanes, lanes
        for lane in gone.values():
            self.refuse_all(lane, unavailable(lane.model.name))
        self.pump(now)

    # one request ----------------------------------------------------------------------------------------------------
    def enter(
        self, waiter: Waiter, model: Model, priority: int, user: str, deadline: float, now: float, tokens: int = 0
    ) -> Admitted | Refusal | None:
        """`ADMITTED` with a slot that `leave` gives back, a refusal, or nothing: then the waiter will be called.
        `deadline`: when the client will have given up, on the same clock as `now`; 0: never.
        """
        lane: Lane = model.lane
        if not lane.slots:
            if model.inflight >= self.most:
                return Shed(model.name, "limit", 1)
            model.inflight += 1
            return ADMITTED
        lane.arrive(now, 1)
        free = lane.free()
        if free > 0 and lane.queue:
            self.serve(lane, now)
            free = lane.free()
        if free > 0 and not lane.queue and model.inflight < self.most and lane.may_take(free, now):
            if lane.overloaded and 2 * free >= lane.total:
                lane.relieve()
            lane.take()
            return ADMITTED
        if lane.total <= 0:
            lane.refresh(now)
            if lane.total <= 0:
                return unavailable(model.name)
        return self.wait(lane, waiter, priority, user, deadline, now, tokens)

    def wait(
        self, lane: Lane, waiter: Waiter, priority: int, user: str, deadline: float, now: float, tokens: int
    ) -> Shed | None:
        """A place in the queue, if its turn will come in time."""
        order = lane.place(user, priority, now)
        ahead = lane.ahead(order)
        lower = lane.lower_before(order, priority)
        expected = lane.expected(ahead, lower)
        patience = lane.patience(lower is not None)
        left = deadline - now if deadline else patience
        if expected > min(patience, left):
            return self.shed(lane, "deadline" if left < patience else "wait", expected - min(patience, left), ahead)
        if len(lane.queue) >= self.settings.queue:
            victim = lane.victim(priority)
            if victim is None:
                return self.shed(lane, "full", lane.expected(0), ahead)
            self.drop(victim, self.shed(lane, "evicted", lane.expected(ahead), len(lane.queue)))
        self.serial += 1
        entry = Entry(lane, waiter, user, priority, tokens)
        entry.order, entry.serial, entry.since = order, self.serial, now
        entry.until = now + min(self.settings.max_wait, left)
        entry.deadline = left < self.settings.max_wait and bool(deadline)
        self.entries[waiter] = entry
        lane.insert(entry)
        return None

    def leave(self, model: Model, now: float, held: float = 0.0) -> None:
        """Give a slot back, after the backend's `end`. `held`: for how many seconds it was taken; 0: not to be
        counted.
        """
        model.inflight -= 1
        lane: Lane = model.lane
        if not lane.slots:
            return
        lane.row.mine[lane.row.base + INFLIGHT] = model.inflight
        if held > 0:
            lane.held += (held - lane.held) * NEWER if lane.held else held
        if lane.queue:
            self.serve(lane, now)

    def cancel(self, waiter: Waiter) -> bool:
        """The client has gone. False when it did not wait any more."""
        entry = self.entries.pop(waiter, None)
        if entry is None:
            return False
        entry.lane.remove(entry)
        return True

    # from time to time ----------------------------------------------------------------------------------------------
    def tick(self, now: float) -> None:
        """Ten times a second: how many slots there are, and how much has come."""
        for lane in self.lanes.values():
            if lane.slots:
                lane.refresh(now)
                lane.arrive(now, 0)
                lane.row.write(ARRIVED, int(lane.arrived))
        self.pump(now)

    def pump(self, now: float) -> None:
        """Let in whom slots have become free for in other workers, and let go who has waited for too long."""
        if not self.entries:
            return
        for lane in self.lanes.values():
            if lane.queue:
                self.look_after(lane, now)

    def look_after(self, lane: Lane, now: float) -> None:
        name = lane.model.name
        if lane.model.draining:
            message = f"The model {name!r} is being restarted"
            self.refuse_all(lane, Refusal(503, "model_draining", message, retry_after=RETRY_DRAINING))
            return
        lane.refresh(now)
        if lane.slots and not lane.total:
            self.refuse_all(lane, unavailable(name))
            return
        if now >= lane.soonest:
            self.expire(lane, now)
        self.serve(lane, now)
        if lane.overloaded:
            self.shorten(lane, now)

    def serve(self, lane: Lane, now: float) -> None:
        """Give free slots to waiters. One that goes may come back here before it returns; that one changes nothing."""
        if lane.serving:
            return
        lane.serving = True
        try:
            while lane.queue and lane.model.inflight < self.most:
                if lane.slots:
                    free = lane.free()
                    if free <= 0 or not lane.may_take(free, lane.queue[0][0]):
                        break
                entry = lane.next()
                del self.entries[entry.waiter]
                lane.remove(entry)
                lane.take()
                entry.waiter.go()
        finally:
            lane.serving = False

    def expire(self, lane: Lane, now: float) -> None:
        late = [entry for _, _, entry in lane.queue if entry.until <= now]
        for entry in late:
            if entry.waiter in self.entries:  # not cancelled by what another one's refusal has set off
                refusal = self.shed(lane, "expired", lane.expected(len(lane.queue)), len(lane.queue), entry.deadline)
                self.drop(entry, refusal)
        lane.soonest = min((entry.until for _, _, entry in lane.queue), default=1e18)

    def shorten(self, lane: Lane, now: float) -> None:
        """Under overload: let go at once whose turn will not come soon, from the end of the queue, and who has waited
        for too long already: that is who came in the burst before, and was set back for it.
        """
        patience, longer = lane.patience() * LENIENCE, lane.patience(True) * LENIENCE
        top = lane.queue[0][2].priority if lane.queue else 0
        lower = sum(1 for _, _, entry in lane.queue if entry.priority < top)
        scale = lane.scale()
        for position, (_, _, entry) in reversed(tuple(enumerate(lane.queue))):
            allowed, expected = patience, lane.expected(position * scale)
            if entry.priority < top:
                lower -= 1
                allowed, expected = longer, lane.expected(position * scale, lower * scale)
            if (expected > allowed or now - entry.since > allowed) and entry.waiter in self.entries:
                self.drop(entry, self.shed(lane, "wait", expected - patience, position))

    # refusals -------------------------------------------------------------------------------------------------------
    def shed(self, lane: Lane, reason: str, seconds: float, ahead: float, late: bool = False) -> Shed:
        """With the time after which there will be a place, a little more for some than for others."""
        self.state = (self.state * 1103515245 + 12345) & 0x7FFFFFFF
        seconds *= 1 + SPREAD * self.state / 0x80000000
        return Shed(lane.model.name, reason, min(max(ceil(seconds), 1), LATEST), ceil(ahead), late=late)

    def drop(self, entry: Entry, refusal: Refusal) -> None:
        del self.entries[entry.waiter]
        entry.lane.remove(entry)
        entry.waiter.refused(refusal)

    def refuse_all(self, lane: Lane, refusal: Refusal) -> None:
        for _, _, entry in tuple(lane.queue):
            if entry.waiter in self.entries:
                self.drop(entry, refusal)
