"""Who may use how much: reserved before a request is sent, settled when it has ended, exact over all workers.

A worker holds a part of each active user's limits (see `limitstore`) and admits from it without asking anybody; only a
request that does not fit asks the store, and what is not needed goes back at the next tick. So no limit is ever
exceeded. A worker with something to spare tells what has ended at the next tick, one without at once; where the former
may make room, a request waits for up to `PATIENCE` and asks again. So nobody is refused for what others do not need.

Everything is called back, nothing waits. A user without any limit costs nothing and is not known to the store.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

from citadel_gateway.core.limitstore import (
    ADMITTED,
    CAUTION,
    DEAD,
    KINDS,
    NEVER,
    OVERAGE,
    SPARED,
    Answer,
    Call,
    Store,
    Three,
)
from citadel_gateway.settings import Tier

LEASE = DEAD - 0.5  # seconds after which we must assume that the store has given our holds to others
BEAT = 1.0
PATIENCE = 0.2  # for other workers to give back what they have to spare; with the tick after it at most 0.3 s
LATE = 1.0  # a request alone is told to the store within this; tokens and what is to spare at the next tick
FORGET = 10.0  # an account without anything is kept this long for the figures in it
BATCH = 128  # requests of one user that ask together
OLDEST = 64  # entries that an account keeps for a store that is away; older ones are put together
UNSURE = 1.0  # Retry-After when only a running request that ends can make room, and none has ended yet
SHORTEST = 0.1
RUSH = 2  # requests in a tick after which some more are expected
CLOSED = 2.0  # Retry-After when the store is away and requests are refused


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
NAMES = ("requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day", "tokens_per_month")


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
        "burst_requests", "burst_tokens", "calling", "delta_number", "dirty", "free", "idle_since", "left", "limits",
        "new_requests", "new_tokens", "open_slots", "open_tokens", "overage", "person", "sent", "spare_requests",
        "spare_slots", "spare_tokens", "tier", "told", "typical", "unsaid", "unsent", "user", "waiters", "workers",
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
        self.told = False  # what ends need not be told at once: there is plenty, or others know that they must wait
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

    def plenty(self) -> bool:
        """What we have to spare is little against what is left, so that it stands in nobody's way."""
        share = CAUTION * self.workers
        left = self.left
        requests, tokens, slots = self.spare()
        tokens_left = min((one for one in (left[1], left[3], left[4]) if one >= 0), default=NEVER)
        return (
            (left[0] < 0 or left[0] >= share * requests)
            and (tokens_left >= share * tokens)
            and (left[2] < 0 or left[2] >= share * slots)
        )

    def at_ease(self) -> bool:
        """Of all that a request gives back when it ends we have something to spare anyway."""
        return self.spare_tokens > 0 and self.spare_slots > 0

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
        spare = (requests, tokens, slots, tokens, tokens)
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


class Limiter:
    """The limits of all users in one worker. `patience`: how long a request waits for a store that does not answer;
    afterwards, and as long as the store is away, `on_failure` decides.
    """

    def __init__(
        self,
        store: Store,
        worker_id: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
        *,
        on_failure: Literal["open", "closed"] = "open",
        patience: float = 0.25,
    ) -> None:
        self.store = store
        self.worker = worker_id  # of this process alone: a worker that starts again is another one
        self.clock = clock
        self.wall = wall
        self.open = on_failure == "open"
        self.patience = patience
        self.accounts: dict[str, Account] = {}
        self.dirty: list[Account] = []
        self.idle: dict[str, Account] = {}
        self.waiting: dict[Done, tuple[Account, Waiter]] = {}
        self.lease = 0.0
        self.serial = 0
        self.beaten = -BEAT
        store.on_up = self.resume

    # one request ----------------------------------------------------------------------------------------------------
    def reserve(self, person: Person, tokens: int, now: float, done: Done) -> Reservation | Denied | None:
        """At once, or None: then `done` is called later, unless `cancel(done)` comes before."""
        account = person.account
        if account is None or account.tier is not person.tier:
            account = self.account(person)
        if account.free:
            return Reservation(person.id, tokens, None, now)
        if (
            account.spare_requests > 0
            and account.spare_tokens >= tokens
            and account.spare_slots > 0
            and now < self.lease
        ):
            account.spare_requests -= 1
            account.spare_tokens -= tokens
            account.spare_slots -= 1
            return self.admit(account, tokens, now)
        return self.ask_store(account, tokens, now, done)

    def admit(self, account: Account, tokens: int, now: float, overage: bool = False) -> Reservation:
        account.new_requests += 1
        account.burst_requests += 1
        account.burst_tokens += tokens
        account.open_tokens += tokens
        account.open_slots += 1
        if not account.dirty:
            account.dirty = True
            self.dirty.append(account)
        found = Reservation(account.user, tokens, account, now)
        if overage or account.overage:
            if account.tier.overage == "degrade":
                found.degrade = True
            elif account.tier.overage == "bill":
                found.overage = True
        return found

    def settle(self, reservation: Reservation, tokens_used: int, now: float) -> None:
        """What it has used in the end; the rest is free again. Only the first call counts."""
        account = reservation.account
        if account is None:
            return
        reservation.account = None
        tokens = reservation.tokens
        account.open_tokens -= tokens
        account.open_slots -= 1
        account.spare_slots += 1
        account.new_tokens += tokens_used
        if tokens_used < tokens:
            account.spare_tokens += tokens - tokens_used
        account.typical += 0.2 * (now - reservation.at - account.typical)
        account.unsaid = True
        if not account.dirty:
            account.dirty = True
            self.dirty.append(account)
        if not account.told and not account.calling and self.store.up:
            self.call(account, now)

    def cancel(self, done: Done) -> None:
        """Whoever waited has gone; what the store may still grant goes back."""
        found = self.waiting.pop(done, None)
        if found is not None:
            account, waiter = found
            waiter.gone = True
            if not waiter.asked:
                account.waiters.remove(waiter)

    def ask_store(self, account: Account, tokens: int, now: float, done: Done) -> Reservation | Denied | None:
        denied = impossible(account, tokens)
        if denied is not None:
            return denied
        if now >= self.lease:
            self.lapse()
        if not self.store.up and now - self.store.since >= self.patience:
            return self.without_store(account, tokens, now)
        waiter = Waiter(tokens, now, done)
        account.waiters.append(waiter)
        self.mark(account)
        if not account.calling and self.store.up:
            self.call(account, now)
        waiter.inside = False
        if waiter.result is None:
            self.waiting[done] = (account, waiter)
        return waiter.result

    def deliver(self, waiter: Waiter, result: Reservation | Denied) -> None:
        if waiter.inside:
            waiter.result = result
        else:
            del self.waiting[waiter.done]
            waiter.done(result)

    def without_store(self, account: Account, tokens: int, now: float) -> Reservation | Denied:
        """The store is away: admit and count, or refuse."""
        if self.open:
            return self.admit(account, tokens, now)
        return Denied("limits_unavailable", 0, CLOSED)

    # accounts -------------------------------------------------------------------------------------------------------
    def account(self, person: Person) -> Any:
        """That of a person whose tier is new to us."""
        account = self.accounts.get(person.id)
        limited = any(limit >= 0 for limit in limits_of(person.tier))
        if account is None:
            if not limited:
                person.account = Free(person.tier)
                return person.account
            account = self.accounts[person.id] = Account(person)
        account.person = person
        account.free = not limited
        if account.tier is not person.tier:
            account.tier = person.tier
            account.limits = account.left = limits_of(person.tier)
            account.overage = False
            account.drop_spare()
            self.mark(account)
        person.account = account
        return account

    def mark(self, account: Account) -> None:
        if not account.dirty:
            account.dirty = True
            self.dirty.append(account)

    # the store ------------------------------------------------------------------------------------------------------
    def call(self, account: Account, now: float, keep: bool = False) -> None:
        """Tell the store what was used and is held, and ask for those who wait. `keep`: stay with what is to spare."""
        account.flush(now)
        if not account.sent and account.unsent:
            account.sent, account.unsent = account.unsent, []
            self.serial += 1
            account.delta_number = self.serial
        self.serial += 1
        call = Call(self.worker, account.user, account.tier, self.serial, now, account)
        if account.sent:
            call.deltas = account.sent
            call.delta_number = account.delta_number
        call.waiters, account.waiters = account.waiters[:BATCH], account.waiters[BATCH:]
        for waiter in call.waiters:
            waiter.asked = True
        call.asks = [waiter.tokens for waiter in call.waiters]
        if call.asks or not keep:
            account.drop_spare()
        pending_requests = sum(requests for _, requests, _ in account.unsent)
        pending_tokens = sum(tokens for _, _, tokens in account.unsent)
        call.opened = (pending_requests, account.open_tokens + pending_tokens, account.open_slots)
        call.keep = account.spare()
        call.want = account.want()
        call.done = self.answered
        account.calling = True
        account.unsaid = False
        account.told = account.at_ease()
        self.store.sync(call)

    def answered(self, call: Call, answer: Answer | None) -> None:
        account: Account = call.account
        now = self.clock()
        self.mark(account)
        if answer is None:
            self.unanswered(account, call, now)
            return
        self.renew(call.sent, now)
        if call.deltas:
            account.sent = []
        if call.tier is account.tier:
            account.left = answer.left
            account.workers = answer.workers
            account.overage = answer.overage
            account.spare_requests += answer.extra[0]
            account.spare_tokens += answer.extra[1]
            account.spare_slots += answer.extra[2]
            account.told = account.at_ease()
        kept = [
            waiter
            for waiter, (code, wait) in zip(call.waiters, answer.verdicts, strict=True)
            if not self.decide(account, waiter, code, wait, now)
        ]
        more = bool(account.waiters) or (account.unsaid and not account.told)
        self.return_waiters(account, kept)
        account.calling = False
        if more:
            self.call(account, now)

    def return_waiters(self, account: Account, waiters: list[Waiter]) -> None:
        """They have not been decided and will ask again."""
        for waiter in waiters:
            waiter.asked = False
        account.waiters[:0] = [waiter for waiter in waiters if not waiter.gone]

    def decide(self, account: Account, waiter: Waiter, code: int, wait: float, now: float) -> bool:
        """False when it stays, to ask once more at the next tick."""
        if code in (ADMITTED, OVERAGE):
            if waiter.gone:  # it goes back with the next tick
                account.spare_requests += 1
                account.spare_tokens += waiter.tokens
                account.spare_slots += 1
            else:
                self.deliver(waiter, self.admit(account, waiter.tokens, now, code == OVERAGE))
        elif not waiter.gone:
            if code > SPARED and now - waiter.since < PATIENCE:
                return False
            self.deliver(waiter, refusal(account, code % SPARED, wait))
        return True

    def unanswered(self, account: Account, call: Call, now: float) -> None:
        """Nobody knows whether the store has heard it. It is told again; those who wait may have no time for that."""
        account.calling = False
        self.return_waiters(account, call.waiters)
        self.lapse()
        self.give_up(account, now)

    def give_up(self, account: Account, now: float) -> None:
        """Decide without the store about those who have waited for it long enough."""
        before = now - self.patience
        if self.store.since <= before:
            before = now
        late = [waiter for waiter in account.waiters if waiter.since <= before]
        account.waiters = [waiter for waiter in account.waiters if waiter.since > before]
        for waiter in late:
            self.deliver(waiter, self.without_store(account, waiter.tokens, now))

    def lapse(self) -> None:
        """What we have to spare may be others' by now."""
        if self.lease:
            self.lease = 0.0
            for account in self.accounts.values():
                account.drop_spare()

    def renew(self, sent: float, now: float) -> None:
        """The store has heard us. If it had not for long, it may have forgotten all that we hold: tell it first."""
        closed = now >= self.lease
        self.lease = max(self.lease, sent + LEASE)
        if closed and now < self.lease:
            for account in list(self.accounts.values()):
                account.drop_spare()
                if not account.calling and not account.empty():
                    self.call(account, now)

    def heard(self, sent: float, answered: bool) -> None:
        """A beat's answer."""
        if answered:
            self.renew(sent, self.clock())
        else:
            self.lapse()

    def resume(self) -> None:
        """The store is up: those who have waited for that need not wait for the tick."""
        now = self.clock()
        for account in {account for account, _ in self.waiting.values()}:
            if not account.calling:
                self.call(account, now)

    # now and then ---------------------------------------------------------------------------------------------------
    def tick(self, now: float) -> None:
        """Ten times a second: tell the store what was used, and give back what is not needed."""
        self.store.tick(now)
        if now - self.beaten >= BEAT:
            self.beaten = now
            if self.store.up:
                self.store.beat(self.worker, now, self.heard)
        dirty, self.dirty = self.dirty, []
        for account in dirty:
            account.dirty = False
            self.care(account, now)
        self.forget(now)

    def care(self, account: Account, now: float) -> None:
        account.flush(now)
        if not self.store.up:
            self.give_up(account, now)
            if not account.empty():
                self.mark(account)
        elif account.calling:
            self.mark(account)
        elif self.worth_a_call(account, now):
            self.call(account, now, keep=account.burst_requests > 0 and now < self.lease and account.plenty())
        elif account.unsent:
            self.mark(account)
        elif account.empty():
            account.idle_since = now
            self.idle.pop(account.user, None)
            self.idle[account.user] = account
        account.burst_requests = account.burst_tokens = 0

    def worth_a_call(self, account: Account, now: float) -> bool:
        """Requests alone can wait a little: they are held, and are told with the time when they came."""
        if account.waiters or account.sent or any(account.spare()):
            return True
        unsent = account.unsent
        return bool(unsent) and (now - unsent[0][0] >= LATE or any(tokens for _, _, tokens in unsent))

    def forget(self, now: float) -> None:
        """Those who have been without anything for a while, the longest first."""
        while self.idle:
            user, account = next(iter(self.idle.items()))
            if now - account.idle_since < FORGET:
                return
            del self.idle[user]
            if account.dirty or not account.empty():
                continue
            del self.accounts[user]
            if account.person.account is account:
                account.person.account = None

    def close(self) -> None:
        """Give everything back. To be called when no request is left."""
        now = self.clock()
        for account in list(self.accounts.values()):
            if not account.empty() and not account.calling and self.store.up:
                self.call(account, now)
        self.store.close()

    # what is shown --------------------------------------------------------------------------------------------------
    def remaining(self, person: Person) -> dict[str, int]:
        """Of each limit that the person has, as far as this worker knows."""
        account = person.account
        if account is None or account.tier is not person.tier:
            left = limits_of(person.tier)
        elif account.free:
            return {}
        else:
            left = account.remaining()
        return {name: max(0, value) for name, value in zip(NAMES, left, strict=True) if value >= 0}

    def headers(self, person: Person) -> tuple[tuple[bytes, bytes], ...]:
        """OpenAI's headers of the limits per minute. The window slides: all is free a minute after the last use."""
        tier = person.tier
        if not tier.requests_per_minute and not tier.tokens_per_minute:
            return ()
        remaining = self.remaining(person)
        lines = []
        for what, name in ((b"requests", "requests_per_minute"), (b"tokens", "tokens_per_minute")):
            if name in remaining:
                limit, left = getattr(tier, name), remaining[name]
                lines.append((b"x-ratelimit-limit-" + what, b"%d" % limit))
                lines.append((b"x-ratelimit-remaining-" + what, b"%d" % left))
                lines.append((b"x-ratelimit-reset-" + what, b"0s" if left == limit else b"1m0s"))
        return tuple(lines)


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
