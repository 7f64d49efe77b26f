"""Where limits are counted: what a worker says about a user and asks for, and the store of a gateway with one worker.

limits.lua says the same for Redis, so that all workers of all hosts count together; tests/test_limits.py runs against
both. How a user's use is kept:

* Requests and tokens of the last minute lie in slots of 0.1 s; a slot counts until all of it is 60 s old.
* Each worker has holds: what its running requests may still use, and a little to spare. Counted and held together are
  never more than a limit. Holds of a worker that was not heard of for `DEAD` seconds are void.
* Days and months are those of UTC at the time when a request was settled: one that began before midnight and ended
  after it belongs to the new day.
"""

import heapq
import math
import time
from calendar import timegm
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from citadel_gateway.settings import Tier

WINDOW: Final = 601  # slots that count; the one that has just begun and 60 s of others
DEAD: Final = 5.0
CAUTION: Final = 8  # to spare is at most what is left / (CAUTION x workers)
NEVER: Final = 10**12  # a limit that is none
ADMITTED: Final = 0
OVERAGE: Final = 1
CONCURRENCY: Final = 2
REQUESTS: Final = 3
TOKENS: Final = 4
DAY: Final = 5
MONTH: Final = 6
SPARED: Final = 10  # added to a refusal that others, who have something to spare, may undo within a tick
KINDS: Final = ("", "", "concurrency", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month")

Three = tuple[int, int, int]  # requests, tokens, slots of concurrency


class Call:
    """What a worker tells about one user. Holds are absolute and used tokens bear a number, so saying it again does no
    harm; a call that arrives after one with a greater `number` is passed over.
    """

    __slots__ = (
        "account", "asks", "delta_number", "deltas", "done", "keep", "number", "opened", "sent", "tier", "user",
        "waiters", "want", "worker",
    )  # fmt: skip

    def __init__(self, worker: str, user: str, tier: Tier, number: int, sent: float, account: Any = None) -> None:
        self.worker = worker
        self.user = user
        self.tier = tier
        self.number = number
        self.sent = sent
        self.account = account
        self.delta_number = 0
        self.deltas: list[tuple[float, int, int]] = []  # when (the worker's clock), requests, tokens
        self.opened: Three = (0, 0, 0)  # held whatever the limits are, because it is running
        self.keep: Three = (0, 0, 0)  # held before and kept to spare
        self.want: Three = (0, 0, 0)  # more to spare, if there is plenty
        self.asks: list[int] = []  # tokens of each request that waits to be admitted
        self.waiters: list[Any] = []  # these requests; they and `account` are the limiter's own
        self.done: Callable[[Call, Answer | None], None] = ignore


class Answer:
    """`verdicts`: for each of `asks` what became of it and, where it was refused, after how many seconds enough will be
    free (negative: that depends on running requests). `left`: of the five limits, negative where there is none.
    """

    __slots__ = ("extra", "left", "overage", "verdicts", "workers")

    def __init__(
        self, workers: int, extra: Three, left: tuple[int, ...], overage: bool, verdicts: list[tuple[int, float]]
    ) -> None:
        self.workers = workers
        self.extra = extra
        self.left = left
        self.overage = overage
        self.verdicts = verdicts


def ignore(call: Call, answer: Answer | None) -> None:
    """For calls whose answer nobody waits for."""


class Store(Protocol):
    """`since`: since when it does not answer, in the clock of `tick`; it means something while it is not `up`. `on_up`
    is called when it answers again.
    """

    up: bool
    since: float
    on_up: Callable[[], None]

    def sync(self, call: Call) -> None:
        """`call.done` gets the answer, at once or later; None when it is not known whether the store has heard it."""

    def beat(self, worker: str, now: float, done: Callable[[float, bool], None]) -> None:
        """The worker lives. `done` gets `now` back and whether the store has heard it."""

    def tick(self, now: float) -> None: ...

    def close(self) -> None: ...


class Use:
    """What the store knows of one user."""

    __slots__ = ("counted", "days", "heap", "holds", "months", "requests", "tokens")

    def __init__(self) -> None:
        self.holds: dict[str, tuple[int, int, Three, Three]] = {}  # worker -> numbers, held, of that to spare
        self.counted: dict[int, tuple[int, int]] = {}
        self.heap: list[int] = []  # the slots in `counted`
        self.requests = 0
        self.tokens = 0
        self.days = (0, 0)  # which, and the tokens of it
        self.months = (0, 0)

    def trim(self, slot: int) -> None:
        while self.heap and self.heap[0] <= slot - WINDOW:
            requests, tokens = self.counted.pop(heapq.heappop(self.heap))
            self.requests -= requests
            self.tokens -= tokens

    def add(self, slot: int, requests: int, tokens: int) -> None:
        before = self.counted.get(slot)
        if before is None:
            heapq.heappush(self.heap, slot)
            before = (0, 0)
        self.counted[slot] = (before[0] + requests, before[1] + tokens)
        self.requests += requests
        self.tokens += tokens

    def spend(self, day: int, month: int, tokens: int) -> None:
        """What comes late for a day that is over is of no interest to any limit."""
        if day >= self.days[0]:
            self.days = (day, tokens + (self.days[1] if day == self.days[0] else 0))
        if month >= self.months[0]:
            self.months = (month, tokens + (self.months[1] if month == self.months[0] else 0))

    def idle(self) -> bool:
        """Nothing is held and nothing counts any more but days and months."""
        return not self.counted and not any(any(held) for _, _, held, _ in self.holds.values())


class MemoryStore:
    """For one worker: every answer comes at once. `wall`: the time of day, for days and months."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self.wall = wall
        self.up = True
        self.since = 0.0
        self.on_up: Callable[[], None] = lambda: None
        self.users: dict[str, Use] = {}
        self.quotas: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}  # of those who are idle
        self.beats: dict[str, float] = {}
        self.swept = 0.0

    def beat(self, worker: str, now: float, done: Callable[[float, bool], None]) -> None:
        self.beats[worker] = now
        done(now, True)

    def sync(self, call: Call) -> None:
        call.done(call, self.answer(call, call.sent))

    def answer(self, call: Call, now: float) -> Answer | None:
        self.beats[call.worker] = now
        use = self.users.get(call.user)
        if use is None:
            use = self.users[call.user] = Use()
            use.days, use.months = self.quotas.pop(call.user, (use.days, use.months))
        number, delta_number, _, _ = use.holds.get(call.worker, (0, 0, None, None))
        if call.number <= number:
            return None
        wall = self.wall()
        slot = math.floor(now * 10)
        use.trim(slot)
        if call.delta_number > delta_number:
            delta_number = call.delta_number
            for at, requests, tokens in call.deltas:
                age = max(0.0, now - at)
                counted_in = math.floor((now - age) * 10)
                if counted_in > slot - WINDOW:
                    use.add(counted_in, requests, tokens)
                if tokens:
                    use.spend(*calendar(wall - age), tokens)
        living = {name for name, at in self.beats.items() if now - at < DEAD}
        others = [hold for name, hold in use.holds.items() if name != call.worker and name in living]
        soon = total(held for _, _, held, spare in others if any(spare))
        room = Room(use, call, total(held for _, _, held, _ in others), soon, wall)
        room.window = [((slot_ + WINDOW) / 10 - now, *use.counted[slot_]) for slot_ in sorted(use.heap)]
        verdicts = [room.ask(tokens) for tokens in call.asks]
        extra = room.spare(call.want, len(living))
        spare = (call.keep[0] + extra[0], call.keep[1] + extra[1], call.keep[2] + extra[2])
        use.holds[call.worker] = (call.number, delta_number, total((call.opened, room.admitted, spare)), spare)
        return Answer(len(living), extra, room.remaining(), room.overage, verdicts)

    def tick(self, now: float) -> None:
        """Forget who has been idle for a minute, but for the tokens of this month."""
        if now - self.swept < 60:
            return
        self.swept = now
        slot = math.floor(now * 10)
        _, month = calendar(self.wall())
        for user, use in list(self.users.items()):
            use.trim(slot)
            if use.idle():
                del self.users[user]
                if use.months[0] == month:
                    self.quotas[user] = (use.days, use.months)
        for user in [user for user, (_, months) in self.quotas.items() if months[0] != month]:
            del self.quotas[user]

    def close(self) -> None:
        """Nothing lasts longer than the process."""


class Room:
    """What is left of each limit while the requests of one call are decided, one after another."""

    __slots__ = ("admitted", "block", "left", "overage", "queued", "quota", "refused", "soon", "wall", "window")

    def __init__(self, use: Use, call: Call, held: Three, soon: Three, wall: float) -> None:
        tier = call.tier
        mine = total((call.opened, call.keep, held))
        day, month = calendar(wall)
        tokens_today = use.days[1] if use.days[0] == day else 0
        tokens_this_month = use.months[1] if use.months[0] == month else 0
        self.wall = wall
        self.block = tier.overage == "block"
        self.left = [
            (tier.requests_per_minute or NEVER) - use.requests - mine[0],
            (tier.tokens_per_minute or NEVER) - use.tokens - mine[1],
            (tier.concurrency or NEVER) - mine[2],
        ]
        self.quota = [
            (tier.tokens_per_day or NEVER) - tokens_today - mine[1],
            (tier.tokens_per_month or NEVER) - tokens_this_month - mine[1],
        ]
        self.soon = soon  # held by workers with something to spare, who tell of what has ended at the next tick only
        self.admitted: Three = (0, 0, 0)
        self.window: list[tuple[float, int, int]] = []  # seconds until a slot is free again, its requests and tokens
        self.queued = [0, 0]  # requests and tokens that were refused and will come again
        self.refused = False
        self.overage = not self.block and min(self.quota) <= 0

    def ask(self, tokens: int) -> tuple[int, float]:
        """One request."""
        short = self.short_of(tokens)
        if short:
            self.refused = True
            return self.refuse(short, tokens)
        beyond = min(self.quota) < tokens
        self.overage = self.overage or beyond
        self.left = [self.left[0] - 1, self.left[1] - tokens, self.left[2] - 1]
        self.quota = [left - tokens for left in self.quota]
        self.admitted = total((self.admitted, (1, tokens, 1)))
        return (OVERAGE if beyond else ADMITTED), 0.0

    def short_of(self, tokens: int) -> list[int]:
        needs = ((CONCURRENCY, self.left[2], 1), (REQUESTS, self.left[0], 1), (TOKENS, self.left[1], tokens))
        short = [kind for kind, left, need in needs if left < need]
        if self.block:
            short += [kind for kind, left in zip((DAY, MONTH), self.quota, strict=True) if left < tokens]
        return short

    def refuse(self, short: list[int], tokens: int) -> tuple[int, float]:
        """The limit that takes longest, and how long that is."""
        soon = self.soon
        spared = {CONCURRENCY: self.left[2] + soon[2] >= 1, REQUESTS: self.left[0] + soon[0] >= 1}
        spared[TOKENS] = self.left[1] + soon[1] >= tokens
        spared[DAY] = self.quota[0] + soon[1] >= tokens
        spared[MONTH] = self.quota[1] + soon[1] >= tokens
        worst, longest = short[0], -1.0
        for kind in short:
            wait = self.wait_for(kind, tokens)
            if wait > longest:
                worst, longest = kind, wait
        if REQUESTS in short or TOKENS in short:
            self.queued[0] += 1
            self.queued[1] += tokens
        return worst + (SPARED if all(spared[kind] for kind in short) else 0), longest

    def wait_for(self, kind: int, tokens: int) -> float:
        if kind == REQUESTS:
            return self.slide(1, self.queued[0] + 1 - self.left[0])
        if kind == TOKENS:
            return self.slide(2, self.queued[1] + tokens - self.left[1])
        if kind == DAY:
            return 86400 - self.wall % 86400
        return month_end(self.wall) - self.wall if kind == MONTH else -1.0

    def slide(self, column: int, need: int) -> float:
        """Seconds until the window has let go of `need`; -1 when running requests must end before."""
        for entry in self.window:
            need -= int(entry[column])
            if need <= 0:
                return float(entry[0])
        return -1.0

    def spare(self, want: Three, workers: int) -> Three:
        """More than is needed, as long as there is far more than everybody together may hold."""
        if self.refused:
            return (0, 0, 0)
        tokens = self.left[1] if self.overage else min(self.left[1], *self.quota)
        share = CAUTION * max(1, workers)
        lefts = (self.left[0], tokens, self.left[2])
        extra = [max(0, min(wanted, left // share)) for wanted, left in zip(want, lefts, strict=True)]
        self.left = [left - more for left, more in zip(self.left, extra, strict=True)]
        self.quota = [left - extra[1] for left in self.quota]
        return (extra[0], extra[1], extra[2])

    def remaining(self) -> tuple[int, ...]:
        return tuple(max(0, left) if left < NEVER // 2 else -1 for left in (*self.left, *self.quota))


def total(parts: Iterable[Three]) -> Three:
    requests = tokens = slots = 0
    for part in parts:
        requests += part[0]
        tokens += part[1]
        slots += part[2]
    return (requests, tokens, slots)


def calendar(wall: float) -> tuple[int, int]:
    """The number of the UTC day and of the month, as limits.lua counts them too."""
    then = time.gmtime(wall)
    return int(wall // 86400), then.tm_year * 12 + then.tm_mon - 1


def month_end(wall: float) -> float:
    month = calendar(wall)[1] + 1
    return float(timegm((month // 12, month % 12 + 1, 1, 0, 0, 0)))
