"""Who may use how much: reserved before a request is sent, settled when it has ended, exact over all workers.

A worker holds a part of each active user's limits (see `limitstore`) and admits from it without asking anybody; only a
request that does not fit asks the store, and what is not needed goes back at the next tick. So no limit is ever
exceeded. A worker with something to spare tells what has ended at the next tick, one without at once; where the former
may make room, a request waits for up to `PATIENCE` and asks again. So nobody is refused for what others do not need.

Everything is called back, nothing waits. A user without any limit costs nothing and is not known to the store.
"""

from collections.abc import Callable
from typing import Any, Final, Literal

from citadel_gateway.core.accounts import (
    NAMES,
    Account,
    Denied,
    Done,
    Free,
    Person,
    Reservation,
    Waiter,
    impossible,
    limits_of,
    refusal,
)
from citadel_gateway.core.limitstore import ADMITTED, DEAD, OVERAGE, SPARED, Answer, Call, Store

__all__ = ["Denied", "Limiter", "Person", "Reservation"]

LEASE: Final = DEAD - 0.5  # seconds after which we must assume that the store has given our holds to others
BEAT: Final = 1.0
PATIENCE: Final = 0.15  # for other workers to give back what they have to spare; with the tick after it at most 0.25 s
LATE: Final = 1.0  # a request alone is told to the store within this; tokens and what is to spare at the next tick
FORGET: Final = 10.0  # an account without anything is kept this long for the figures in it
BATCH: Final = 128  # requests of one user that ask together
CLOSED: Final = 2.0  # Retry-After when the store is away and requests are refused


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
        tier = person.tier
        found = person.account
        if not isinstance(found, Account) or found.tier is not tier or found.free:
            found = self.account(person)
            if found.free:
                return Reservation(person.id, tokens, None, now)
        account: Account = found
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
        if account.told and account.spare_tokens <= account.ease_tokens and account.spare_slots <= account.ease_slots:
            return  # the tick tells it
        if not account.calling and self.store.up:
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
            account.weigh()
            account.told = account.at_ease()
            if not account.plenty():  # somebody else may be refused because of us
                account.unsaid = True
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
