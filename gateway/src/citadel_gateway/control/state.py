"""What the control process knows: the files, the drain states, and the snapshot made of them."""

import hashlib
import logging
from pathlib import Path
from typing import Literal

from citadel_gateway.settings import ConfigError, Gateway, Key
from citadel_gateway.snapshot import Reasons, Snapshot, load_reasons, merge, save_reasons, stamp, write

log = logging.getLogger("citadel_gateway")

Reason = Literal["engine", "operator"]


class State:
    """The files as they were last found, the drain states, and the snapshot made of both."""

    def __init__(self, settings: Gateway) -> None:
        self.settings = settings
        self.files = (Path(settings.models_file), Path(settings.keys_file))
        self.seen: tuple[object, ...] = ()
        self.reasons: Reasons = load_reasons(settings)
        self.snapshot: Snapshot | None = None
        self.problem = ""

    def look(self) -> bool:
        """Write a new snapshot if a file has changed. One that cannot be used changes nothing, and is reported once."""
        now = tuple(stamp(path) for path in self.files)
        if now == self.seen and self.snapshot is not None:
            return False
        self.seen = now
        try:
            self.publish()
        except (ConfigError, OSError) as error:
            if str(error) != self.problem:
                log.error("the workers keep what they have: %s", error)
            self.problem = str(error)
            return False
        self.problem = ""
        return True

    def publish(self) -> None:
        snapshot = merge(self.settings, self.reasons)
        write(self.settings, snapshot)
        self.snapshot = snapshot

    def find(self, name: str) -> str | None:
        """The model's own name for a name or an alias."""
        for model in self.snapshot.models if self.snapshot is not None else ():
            if name == model.name or name in model.aliases:
                return model.name
        return None

    def change(self, model: str, reason: Reason, *, drain: bool) -> bool:
        """Drain or resume for one reason; whether the model is draining now. Kept on disk before anybody acts on it."""
        reasons = set(self.reasons.get(model, ()))
        (reasons.add if drain else reasons.discard)(reason)
        changed = {name: why for name, why in self.reasons.items() if name != model}
        if reasons:
            changed[model] = sorted(reasons)
        if changed != self.reasons:
            save_reasons(self.settings, changed)
            self.reasons = changed
            self.publish()
            log.warning("model %s: %s by %s", model, "drain" if drain else "resume", reason)
        return bool(reasons)

    def key(self, authorization: str) -> Key | None:
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or self.snapshot is None:
            return None
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        return next((key for key in self.snapshot.keys if key.sha256 == digest), None)
