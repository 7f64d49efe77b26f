"""Who asks: keys as the workers know them, and the people whom limits belong to."""

from typing import Any, Final

from citadel_gateway.core.catalogue import Key
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.settings import Tier, User
from citadel_gateway.snapshot import Snapshot

FOREVER: Final = float("inf")
GREAT: Final = 6000  # requests, or thousands of tokens, in a minute
DEFAULT_OUTPUT: Final = 1024  # tokens, for a request that names no number where tokens are limited


class Person:
    """A user with a tier. Limits are counted by `id`, whatever key is used."""

    __slots__ = (
        "account", "id", "limited", "most", "priority", "shown", "shown_for", "shown_until", "tier", "tokens_limited",
        "use_case",
    )  # fmt: skip

    def __init__(self, entry: User, tier: Tier) -> None:
        self.id = entry.id
        self.tier = tier
        self.account: Any = None  # the limiter's
        self.use_case = entry.use_case
        self.priority = tier.priority
        self.tokens_limited = bool(tier.tokens_per_minute or tier.tokens_per_day or tier.tokens_per_month)
        self.limited = self.tokens_limited or bool(tier.requests_per_minute or tier.concurrency)
        # header lines of the limits: of small ones each request counts, and they are made anew for each
        self.shown = b""
        self.shown_until = 0.0
        small = min(tier.requests_per_minute or GREAT, (tier.tokens_per_minute or GREAT) // 1000) < GREAT
        self.shown_for = 0.0 if small else 0.1
        self.most = tier.max_output_tokens or DEFAULT_OUTPUT


class Caller(Key):
    """A key that was found. `peer`: it belongs to the gateway of another host, which meters its requests itself."""

    __slots__ = ("expires", "peer", "person", "use_case")

    def __init__(self, entry: KeyEntry, person: Person) -> None:
        super().__init__(entry)
        self.person = person
        self.expires = entry.expires or FOREVER
        self.use_case = entry.use_case or person.use_case
        self.peer = "peer" in self.scopes
        self.inference = self.inference or self.peer


class KeyRing:
    """Keys by their SHA-256. Nothing else is kept of them, and a look-up by the hash of what was sent tells nothing
    about the others.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.people: dict[str, Person] = {}
        self.by_digest: dict[bytes, Caller] = {}
        if snapshot is None:
            return
        tiers = {tier.name: tier for tier in snapshot.policies.tiers}
        default = tiers.get(snapshot.policies.default_tier) or snapshot.policies.tiers[0]
        users = {user.id: user for user in snapshot.users}
        for entry in snapshot.keys:
            user = users.get(entry.user or entry.id) or User(entry.user or entry.id)
            if not user.enabled:
                continue
            person = self.people.get(user.id)
            if person is None:
                person = self.people[user.id] = Person(user, tiers.get(user.tier) or default)
            self.by_digest[bytes.fromhex(entry.sha256)] = Caller(entry, person)
