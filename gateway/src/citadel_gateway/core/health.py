"""Whether a backend is believed to be up, and when it is asked next. Plain state, the clock is passed in."""

FIRST_RETRY = 0.2  # seconds until a backend that went down is asked again; doubles up to the probe interval
PATIENCE = 3  # unanswered probes in a row: one may be a busy engine, three are a hanging one


class Health:
    """One backend as one worker sees it.

    It starts as up, so that a worker serves before its first probe. A refused connection, or a `/health` that says
    no, takes it down at once; silence does so after `PATIENCE` probes, because an engine at full load answers late
    and is not broken. Only a probe brings it up again.
    """

    __slots__ = ("backoff", "due", "interval", "probing", "silent", "up")

    def __init__(self, interval: float, now: float) -> None:
        self.interval = interval
        self.up = True
        self.due = now
        self.backoff = FIRST_RETRY
        self.silent = 0
        self.probing = False

    def begin(self, now: float) -> bool:
        """True when a probe is to be sent now; its end is told by one of the three methods below."""
        if self.probing or now < self.due:
            return False
        self.probing = True
        return True

    def healthy(self, now: float) -> bool:
        """A probe succeeded. True when that changed the state."""
        changed = not self.up
        self.up, self.probing, self.silent, self.backoff = True, False, 0, FIRST_RETRY
        self.due = now + self.interval
        return changed

    def failed(self, now: float) -> bool:
        """Refused or said no, by a probe or by a request. True when that changed the state."""
        changed = self.up
        self.up, self.probing, self.silent = False, False, 0
        if changed:
            self.backoff = FIRST_RETRY
        self.due = now + self.backoff
        self.backoff = min(self.backoff * 2, self.interval)
        return changed

    def unanswered(self, now: float) -> bool:
        """A probe ran into its timeout. True when that changed the state."""
        self.silent += 1
        if not self.up or self.silent >= PATIENCE:
            return self.failed(now)
        self.probing = False
        self.due = now + min(self.interval, 1.0)
        return False

    def suspect(self, now: float) -> None:
        """A request broke off: ask soon, decide then."""
        self.due = min(self.due, now)
