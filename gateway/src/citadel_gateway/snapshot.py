"""What the workers serve from: models, users, keys, policies and drain states in one file, written by the control
process.

Workers look at it twice a second and serve on without the control process. A worker that finds no snapshot merges the
files itself, so that neither process waits for the other when a host boots.
"""

from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from citadel_gateway.metrics import write_atomically
from citadel_gateway.overrides import Files, Override, Standing, apply, read_files
from citadel_gateway.settings import Gateway, Key, Model, Policies, User

Reasons = dict[
    str, list[str]
]  # model -> why it is drained ("engine", "operator"); a model without reasons is not in it


class Snapshot(Struct, frozen=True):
    """Users and keys are those of keys.json and of the database together; models and policies have the run-time
    changes in them (weights, aliases, tiers). Every key names its user, and every user is here. A key that is revoked
    or disabled, or whose user is, is not here: what is not in the snapshot opens nothing.
    """

    created: int  # when the model list was written; what /v1/models shows as the models' age
    models: tuple[Model, ...]
    keys: tuple[Key, ...]
    draining: Reasons = {}
    users: tuple[User, ...] = ()
    policies: Policies = Policies()


class Mark(Struct, frozen=True):
    """Who drained a model, and when."""

    at: float = 0.0
    who: str = ""


Marks = dict[str, dict[str, Mark]]  # model -> reason -> who and when


class People(Struct, frozen=True):
    """What the database knows of users, keys and run-time changes; kept in a file for when it is away. Keys that are
    revoked are not in it.
    """

    version: int = -1
    users: tuple[User, ...] = ()
    keys: tuple[Key, ...] = ()
    overrides: tuple[Override, ...] = ()


decode = msgspec.json.Decoder(Snapshot).decode
decode_marks = msgspec.json.Decoder(Marks).decode
decode_lists = msgspec.json.Decoder(Reasons).decode
decode_people = msgspec.json.Decoder(People).decode
encode = msgspec.json.Encoder().encode


def snapshot_path(gateway: Gateway) -> Path:
    return Path(gateway.run_dir) / "snapshot.json"


def drain_path(gateway: Gateway) -> Path:
    return Path(gateway.state_dir) / "drain.json"


def people_path(gateway: Gateway) -> Path:
    return Path(gateway.state_dir) / "people.json"


def load_marks(gateway: Gateway) -> Marks:
    """Drain states that survived a restart. A damaged file counts as none: serving is better than standing still."""
    try:
        raw = drain_path(gateway).read_bytes()
    except OSError:
        return {}
    try:
        return decode_marks(raw)
    except msgspec.DecodeError:
        pass
    try:  # as releases before wrote it
        return {name: {reason: Mark() for reason in reasons} for name, reasons in decode_lists(raw).items()}
    except msgspec.DecodeError:
        return {}


def save_marks(gateway: Gateway, marks: Marks) -> None:
    write_atomically(drain_path(gateway), encode(marks))


def load_people(gateway: Gateway) -> People:
    """As they were last known. A damaged file is replaced as soon as the database answers."""
    try:
        return decode_people(people_path(gateway).read_bytes())
    except (OSError, msgspec.DecodeError):
        return People()


def save_people(gateway: Gateway, people: People) -> None:
    write_atomically(people_path(gateway), encode(people))


def compose(
    gateway: Gateway, declared: Files, marks: Marks, people: People, now: float = 0.0
) -> tuple[Snapshot, list[Standing]]:
    """Files, drain states and people as one: what workers serve from, and what has become of each run-time change.
    `now`: keys that have expired by then are left out.
    """
    files, standings = apply(declared, people.overrides, gateway)
    reasons = {model.name: set(marks.get(model.name, ())) for model in files.models}
    for name in files.drained:
        reasons[name].add("operator")
    tiers = {"", *(tier.name for tier in files.policies.tiers)}
    known = {user.id for user in files.users}
    users = (*files.users, *(user for user in people.users if user.id not in known))
    users = tuple(user if user.tier in tiers else replace(user, tier="") for user in users)
    snapshot = Snapshot(
        declared.created,
        files.models,
        valid_keys(declared, files, people, {user.id for user in users if user.enabled}, now),
        {name: sorted(why) for name, why in reasons.items() if why},
        users,
        files.policies,
    )
    return snapshot, standings


def valid_keys(declared: Files, files: Files, people: People, enabled: set[str], now: float) -> tuple[Key, ...]:
    """A declared key comes before one of the database with its id or its hash, also when it is disabled."""
    ids = {key.id for key in declared.keys}
    hashes = {key.sha256 for key in declared.keys}
    added = (key for key in people.keys if key.id not in ids and key.sha256 not in hashes)
    return tuple(key for key in (*files.keys, *added) if key.user in enabled and (not key.expires or key.expires > now))


def merge(gateway: Gateway, marks: Marks, people: People | None = None, now: float = 0.0) -> Snapshot:
    """By the files as they are now; `ConfigError` when they cannot be used."""
    return compose(gateway, read_files(gateway), marks, people or People(), now)[0]


def write(gateway: Gateway, snapshot: Snapshot) -> None:
    write_atomically(snapshot_path(gateway), encode(snapshot))


def stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced or written."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


class Watcher:
    """The worker's side: the newest snapshot, or nothing when there is nothing new."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.path = snapshot_path(gateway)
        self.seen: tuple[int, int] | None = None

    def first(self) -> Snapshot:
        """What to start with. Raises `ConfigError` when there is neither a snapshot nor files that can be used."""
        found = self.changed()
        return found if found is not None else merge(self.gateway, load_marks(self.gateway), load_people(self.gateway))

    def changed(self) -> Snapshot | None:
        now = stamp(self.path)
        if now is None or now == self.seen:
            return None
        try:
            found = decode(self.path.read_bytes())
        except (OSError, msgspec.DecodeError):
            return None  # never half a file (rename), so damaged from outside: keep what we have
        self.seen = now
        return found
