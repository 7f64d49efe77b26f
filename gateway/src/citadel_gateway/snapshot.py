"""What the workers serve from: models, keys and drain states in one file, written by the control process.

Workers look at it twice a second and serve on without the control process. A worker that finds no snapshot merges the
files itself, so that neither process waits for the other when a host boots.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

from citadel_gateway.metrics import write_atomically
from citadel_gateway.settings import (
    ConfigError,
    Gateway,
    Key,
    Keys,
    Model,
    Models,
    Policies,
    User,
    key_problems,
    model_problems,
    policy_problems,
    read,
    read_policies,
)

Reasons = dict[
    str, list[str]
]  # model -> why it is drained ("engine", "operator"); a model without reasons is not in it


class Snapshot(Struct, frozen=True):
    """Users and keys are those of keys.json and of the database together; models and policies have the run-time
    changes in them (weights, aliases, tiers).
    """

    created: int  # when the model list was written; what /v1/models shows as the models' age
    models: tuple[Model, ...]
    keys: tuple[Key, ...]
    draining: Reasons = {}
    users: tuple[User, ...] = ()
    policies: Policies = Policies()


decode = msgspec.json.Decoder(Snapshot).decode
decode_reasons = msgspec.json.Decoder(Reasons).decode
encode = msgspec.json.Encoder().encode


def snapshot_path(gateway: Gateway) -> Path:
    return Path(gateway.run_dir) / "snapshot.json"


def drain_path(gateway: Gateway) -> Path:
    return Path(gateway.state_dir) / "drain.json"


def load_reasons(gateway: Gateway) -> Reasons:
    """Drain states that survived a restart. A damaged file counts as none: serving is better than standing still."""
    try:
        return decode_reasons(drain_path(gateway).read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}


def save_reasons(gateway: Gateway, reasons: Reasons) -> None:
    write_atomically(drain_path(gateway), encode(reasons))


def merge(gateway: Gateway, reasons: Reasons) -> Snapshot:
    """The two rendered files and the drain states as one; `ConfigError` when the files cannot be used."""
    models = read(gateway.models_file, Models)
    keys = read(gateway.keys_file, Keys)
    policies = read_policies(gateway)
    found = model_problems(models, gateway.models_file) + key_problems(keys, None, gateway.keys_file)
    found += policy_problems(policies, models, gateway.policies_file)
    if found:
        raise ConfigError(*found)
    created = int(Path(gateway.models_file).stat().st_mtime)
    names = {model.name for model in models.models}
    kept = {name: why for name, why in reasons.items() if name in names}
    return Snapshot(created, models.models, keys.keys, kept, keys.users, policies)


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
        return found if found is not None else merge(self.gateway, load_reasons(self.gateway))

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
