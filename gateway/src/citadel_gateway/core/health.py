"""Whether a backend is believed to be well, and when it is asked next. Plain state, the clock is passed in.

Three things are told apart. It is *down* when it refuses connections, says so, or keeps silent: only a probe brings it
up again. Its *circuit* is open when requests to it fail: after a while one request is let through, and its end decides.
It is *suspect* when it has requests and has not sent a byte for much longer than it usually takes: `/health` of vLLM
says 200 while its worker hangs, so a suspect is asked to generate a token, and is *ejected* when it does not.
"""

from typing import Final, Literal

from citadel_gateway.settings import Routing

FIRST_RETRY: Final = 0.2  # seconds until a backend that went down is asked again; doubles up to the probe interval
PATIENCE: Final = 3  # unanswered probes in a row: one may be a busy engine, three are a hanging one
SUSPECT_PATIENCE: Final = 2  # a suspect has been silent before
PAUSE: Final = 1.0  # seconds between the probes of one that does not answer: each may leave work in a hanging engine
LONGEST: Final = 60.0  # seconds: no circuit is open longer, however often it was opened before
FLAPPING: Final = 60.0  # seconds within which a backend that goes down again counts as flapping
WINDOW: Final = 15.0  # two of these are looked at for the error rate
FEWEST: Final = 20  # requests in both together, below which a rate says nothing
LEAST_WEIGHT: Final = 0.1  # of its weight at the beginning of a slow start

# how a request ended, as far as the backend is concerned
SERVED: Final = 1
NEUTRAL: Final = 0  # the client went away, the request was wrong, or the engine was busy: says nothing
BROKEN: Final = -1  # no answer in time, a broken connection, garbage, a status that says that it is not well
UNREACHABLE: Final = -2  # no connection

Circuit = Literal["closed", "open", "half_open"]
CLOSED: Circuit = "closed"
OPEN: Circuit = "open"
HALF_OPEN: Circuit = "half_open"


class Health:
    """One backend as one worker sees it.

    It starts as up, so that a worker serves before its first probe. A refused connection, or a `/health` that says
    no, takes it down at once; silence does so after `PATIENCE` probes, because an engine at full load answers late
    and is not broken. Only a probe brings it up again.
    """

    __slots__ = (
        "backoff", "bad", "bad_before", "circuit", "doubted", "due", "ejected", "flaps", "good", "good_before", "hold",
        "in_a_row", "interval", "opened", "openings", "probing", "resting", "routing", "silent", "since", "trial",
        "until", "up", "went_down", "window",
    )  # fmt: skip

    def __init__(self, interval: float, now: float, routing: Routing | None = None) -> None:
        self.interval = interval
        self.routing = routing or Routing()
        self.up = True
        self.resting = False  # it is about to stop, and gets no new requests
        self.since = -1e9  # when it began to be well; its weight grows from then on
        self.due = now
        self.backoff = FIRST_RETRY
        self.silent = 0
        self.probing = False
        self.doubted = 0.0  # since when it is suspect
        self.ejected = False
        self.went_down = -1e9
        self.flaps = 0
        self.hold = 0.0  # a flapping backend is not believed to be up before
        self.circuit: Circuit = CLOSED
        self.opened = 0.0
        self.openings = 0  # in close succession
        self.until = 0.0  # an open circuit takes its trial then
        self.trial = False
        self.in_a_row = 0
        self.window = now
        self.good = self.bad = self.good_before = self.bad_before = 0

    # what the router asks -------------------------------------------------------------------------------------------
    def usable(self, now: float) -> bool:
        """Whether a request may be sent to it, be it as the one trial of an open circuit."""
        if not self.up or self.resting:
            return False
        return self.circuit == CLOSED or (not self.trial and now >= self.until)

    def ramp(self, now: float) -> float:
        """How much of its weight counts: less than 1 for a while after it came back."""
        slow = self.routing.slow_start
        age = now - self.since
        return 1.0 if age >= slow else max(LEAST_WEIGHT, age / slow)

    def chosen(self) -> None:
        """A request goes to it."""
        if self.circuit != CLOSED:
            self.circuit = HALF_OPEN
            self.trial = True

    # what requests tell ---------------------------------------------------------------------------------------------
    def ended(self, verdict: int, now: float, began: float) -> None:
        """How a request ended that was sent at `began`. What was sent before a circuit opened decides nothing there."""
        if now - self.window >= WINDOW:
            self.turn(now)
        trial = self.circuit == HALF_OPEN and began >= self.until
        if trial:
            self.trial = False
        if verdict > 0:
            self.good += 1
            self.in_a_row = 0
            if trial:
                self.close(now)
        elif verdict < 0:
            self.bad += 1
            self.in_a_row += 1
            if verdict == UNREACHABLE:
                self.failed(now)
            else:
                self.suspect(now)
            if trial or (self.circuit == CLOSED and self.too_many()):
                self.open(now)

    def too_many(self) -> bool:
        bad = self.bad + self.bad_before
        total = bad + self.good + self.good_before
        return self.in_a_row >= self.routing.failures or (total >= FEWEST and bad >= total * self.routing.error_rate)

    def turn(self, now: float) -> None:
        """Begin another window."""
        late = now - self.window >= 2 * WINDOW
        self.good_before, self.bad_before = (0, 0) if late else (self.good, self.bad)
        self.good = self.bad = 0
        self.window = now

    def open(self, now: float) -> None:
        """No request for a while; twice as long each time in close succession."""
        if self.circuit == CLOSED and now - self.since > FLAPPING:
            self.openings = 0
        self.openings += 1
        self.circuit, self.opened, self.trial = OPEN, now, False
        self.until = now + self.damped(self.openings)

    def damped(self, times: int) -> float:
        first = self.routing.open_seconds
        return min(first * 2.0 ** min(times - 1, 30), max(first, LONGEST))

    def close(self, now: float) -> None:
        self.circuit, self.trial, self.in_a_row, self.since = CLOSED, False, 0, now
        self.good = self.bad = self.good_before = self.bad_before = 0

    def doubt(self, now: float) -> None:
        """It has requests and sends nothing: ask it to generate, and prefer others until it has."""
        if not self.doubted:
            self.doubted = now
            self.silent = 0
            self.due = min(self.due, now)

    def heard(self) -> None:
        """It sends again, before the probe has come back."""
        if not self.ejected:
            self.doubted = 0.0

    def suspect(self, now: float) -> None:
        """A request broke off: ask soon, decide then."""
        self.due = min(self.due, now)

    # probes ---------------------------------------------------------------------------------------------------------
    def begin(self, now: float) -> bool:
        """True when a probe is to be sent now; its end is told by one of the three methods below."""
        if self.probing or now < self.due:
            return False
        self.probing = True
        return True

    def must_generate(self) -> bool:
        """The next probe has to be a generation: `/health` would say yes."""
        return self.ejected or self.doubted > 0

    def healthy(self, now: float) -> bool:
        """A probe succeeded. True when that changed the state."""
        self.probing, self.silent = False, 0
        self.due = now + self.interval
        if now < self.hold:
            self.due = min(self.due, self.hold)
            return False
        changed = not self.up
        self.up, self.ejected, self.doubted, self.backoff = True, False, 0.0, FIRST_RETRY
        if changed:
            self.since = now
        return changed

    def failed(self, now: float) -> bool:
        """Refused or said no, by a probe or by a request. True when that changed the state."""
        changed = self.up
        self.up, self.probing, self.silent = False, False, 0
        if changed:
            self.backoff = FIRST_RETRY
            self.flaps = self.flaps + 1 if now - self.went_down < FLAPPING else 0
            self.went_down = now
            self.hold = now + self.damped(self.flaps - 1) if self.flaps > 1 else 0.0
        self.due = now + self.backoff
        self.backoff = min(self.backoff * 2, self.interval)
        return changed

    def unanswered(self, now: float) -> bool:
        """A probe ran into its timeout. True when that changed the state."""
        self.silent += 1
        doubted = self.must_generate()
        if not self.up or self.silent >= (SUSPECT_PATIENCE if doubted else PATIENCE):
            self.ejected = self.ejected or doubted
            changed = self.failed(now)
            self.due = max(self.due, now + min(self.interval, PAUSE))
            return changed
        self.probing = False
        self.due = now + min(self.interval, PAUSE)
        return False
