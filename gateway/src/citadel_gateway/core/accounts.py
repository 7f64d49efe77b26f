"""What a worker knows of a user's limits: what is held, what is running, what the store has not heard of yet."""

from collections.abc import Callable
from typing import Any, Protocol

from citadel_gateway.core.limitstore import CAUTION, KINDS, NEVER, Three
from citadel_gateway.settings import Tier

OLDEST = 64  # entries that an account keeps for a store that is away; older ones are put together
UNSURE = 1.0  # Retry-After when only a running request that ends can make room, and none has ended yet
SHORTEST = 0.1
RUSH = 2  # requests in a tick after which some more are expected
NAMES = ("requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day", "tokens_per_month")


class Person(Protocol):
    """A user as the limiter knows him. `account` is the limiter's own."""

    id: str
    tier: Tier
    account: Any


class Reservation:
    """What a request may use. `overage`: its user's day or month is spent and the tier says bill; `degrade`: likewise,
    and the tier says that a cheaper model does.
    """

    __slots__ = ("account", "at", "degrade", "overage", "tokens", "user")

    def __init__(self, user: str, tokens: int, account: "Account | None", at: float) -> None:
        self.user = user
        self.tokens = tokens
        self.account = account
        self.at = at
        self.overage = False
        self.degrade = False


class Denied:
    """Which limit, how much it allows, and after how many seconds it will have room. Not `possible`: never, because the
    request asks for more than the whole limit.
    """

    __slots__ = ("kind", "limit", "possible", "retry_after")

    def __init__(self, kind: str, limit: int, retry_after: float, possible: bool = True) -> None:
        self.kind = kind
        self.limit = limit
        self.retry_after = retry_after
        self.possible = possible


Done = Callable[[Reservation | Denied], None]


class Waiter:
    """A request that waits for the store's word."""

    __slots__ = ("asked", "done", "gone", "inside", "result", "since", "tokens")

    def __init__(self, tokens: int, since: float, done: Done) -> None:
        self.tokens = tokens
        self.since = since
        self.done = done
        self.inside = True  # `reserve` has not returned yet and returns `result` itself
        self.result: Reservation | Denied | None = None
        self.asked = False
        self.gone = False


class Account:
    """One user in this worker. What is to spare can be given out at once; `NEVER` where there is no limit."""

    __slots__ = (
        "burst_requests", "burst_tokens", "calling", "delta_number", "dirty", "ease_requests", "ease_slots",
        "ease_tokens", "free", "idle_since", "left", "limits", "new_requests", "new_tokens", "open_slots",
        "open_tokens", "overage", "person", "sent", "spare_requests", "spare_slots", "spare_tokens", "tier", "told",
        "typical", "unsaid", "unsent", "user", "waiters", "workers",
    )  # fmt: skip

    def __init__(self, person: Person) -> None:
        self.person = person
        self.user = person.id
        self.tier = person.tier
        self.limits = limits_of(person.tier)
        self.free = False
        self.open_tokens = 0  # reserved by running requests
        self.open_slots = 0
        self.spare_requests = self.spare_tokens = self.spare_slots = 0
        self.new_requests = self.new_tokens = 0  # used since the last time it was written down
        self.unsent: list[tuple[float, int, int]] = []
        self.sent: list[tuple[float, int, int]] = []  # the store may know it or not: it is said again
        self.delta_number = 0
        self.burst_requests = self.burst_tokens = 0  # admitted since the last tick
        self.calling = False
        self.told = False  # the store knows that we have something to spare, and it is little
        self.ease_requests = self.ease_tokens = self.ease_slots = 0
        self.unsaid = False  # something has ended since the last call
        self.dirty = False
        self.waiters: list[Waiter] = []
        self.overage = False
        self.left: tuple[int, ...] = self.limits
        self.workers = 1
        self.typical = 0.0  # seconds that a request takes
        self.idle_since = 0.0
        self.drop_spare()

    def drop_spare(self) -> None:
        limits = self.limits
        self.spare_requests = 0 if limits[0] >= 0 else NEVER
        self.spare_tokens = 0 if limits[1] >= 0 or limits[3] >= 0 or limits[4] >= 0 else NEVER
        self.spare_slots = 0 if limits[2] >= 0 else NEVER

    def spare(self) -> Three:
        """What of it the store has to know."""
        requests, tokens, slots = self.spare_requests, self.spare_tokens, self.spare_slots
        return (
            requests if requests < NEVER // 2 else 0,
            tokens if tokens < NEVER // 2 else 0,
            slots if slots < NEVER // 2 else 0,
        )

    def flush(self, now: float) -> None:
        """Write down when it was used; what the store has not heard of for long is put together."""
        if not self.new_requests and not self.new_tokens:
            return
        if self.unsent and now - self.unsent[-1][0] < 0.1:
            _, requests, tokens = self.unsent.pop()
            self.unsent.append((now, requests + self.new_requests, tokens + self.new_tokens))
        else:
            self.unsent.append((now, self.new_requests, self.new_tokens))
        self.new_requests = self.new_tokens = 0
        if len(self.unsent) > OLDEST:
            (_, requests, tokens), (at, more_requests, more_tokens) = self.unsent[:2]
            self.unsent[:2] = [(at, requests + more_requests, tokens + more_tokens)]

    def weigh(self) -> None:
        """How much we may have to spare without standing in anybody's way: little against what is left."""
        share = CAUTION * self.workers
        left = self.left
        requests, tokens, slots = self.spare()
        quotas = () if self.overage else (left[3], left[4])  # a spent one bounds nothing any more
        tokens_left = min((one for one in (left[1], *quotas) if one >= 0), default=-1)
        self.ease_requests = (left[0] + requests) // share if left[0] >= 0 else 2 * NEVER
        self.ease_tokens = (tokens_left + tokens) // share if tokens_left >= 0 else 2 * NEVER
        self.ease_slots = (left[2] + slots) // share if left[2] >= 0 else 2 * NEVER

    def plenty(self) -> bool:
        return (
            self.spare_requests <= self.ease_requests
            and self.spare_tokens <= self.ease_tokens
            and self.spare_slots <= self.ease_slots
        )

    def at_ease(self) -> bool:
        """What ends need not be told at once: there is plenty, and others know that they must wait for us."""
        return self.spare_tokens > 0 and self.spare_slots > 0 and self.plenty()

    def want(self) -> Three:
        """To spare until the next tick: twice what was needed since the last one; a single request makes no rush."""
        if self.burst_requests < RUSH:
            return (0, 0, 0)
        wanted = (2 * self.burst_requests, 2 * self.burst_tokens, 2 * self.burst_requests)
        have = (self.spare_requests, self.spare_tokens, self.spare_slots)
        requests, tokens, slots = (max(0, want - spare) for want, spare in zip(wanted, have, strict=True))
        return (requests, tokens, slots)

    def remaining(self) -> tuple[int, ...]:
        """Of each of the five limits, as far as we know; negative where there is none."""
        requests, tokens, slots = self.spare()
        quota = 0 if self.overage else tokens
        spare = (requests, tokens, slots, quota, quota)
        return tuple(
            min(limit, left + more) if limit >= 0 else -1
            for limit, left, more in zip(self.limits, self.left, spare, strict=True)
        )

    def empty(self) -> bool:
        return not (
            self.open_slots
            or self.unsent
            or self.sent
            or self.new_requests
            or self.new_tokens
            or self.waiters
            or self.calling
            or any(self.spare())
        )


class Free:
    """Stands for the account of a user without limits."""

    __slots__ = ("free", "tier")

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.free = True


def limits_of(tier: Tier) -> tuple[int, ...]:
    """In the order of NAMES; -1 where there is none."""
    values = (tier.requests_per_minute, tier.tokens_per_minute, tier.concurrency)
    return tuple(value or -1 for value in (*values, tier.tokens_per_day, tier.tokens_per_month))


def impossible(account: Account, tokens: int) -> Denied | None:
    """A request that alone is more than the limit."""
    block = account.tier.overage == "block"
    for name, limit in zip(NAMES, account.limits, strict=True):
        if name.startswith("tokens") and 0 <= limit < tokens and (block or name == "tokens_per_minute"):
            return Denied(name, limit, 60.0, possible=False)
    return None


def refusal(account: Account, code: int, wait: float) -> Denied:
    kind = KINDS[code]
    if wait < 0:  # one of the running requests must end; they do so evenly
        wait = account.typical / max(1, account.open_slots) if account.typical else UNSURE
    limit: int = getattr(account.tier, kind)
    return Denied(kind, limit, max(SHORTEST, wait))
