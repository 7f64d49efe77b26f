"""Models, backends and keys as the decision core looks them up. Built from a snapshot; what is under way survives a
new one.
"""

import hashlib
from typing import Any

from citadel_gateway.core.health import Health
from citadel_gateway.settings import Address
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.settings import Model as ModelEntry
from citadel_gateway.snapshot import Snapshot


class Backend:
    """One engine. `pool` belongs to the upstream client; nothing here looks inside."""

    __slots__ = ("health", "host", "inflight", "label", "pool", "port")

    def __init__(self, host: str, port: int, health: Health) -> None:
        self.host = host
        self.port = port
        self.label = f"{host}:{port}"
        self.health = health
        self.inflight = 0
        self.pool: Any = None


class Model:
    __slots__ = ("aliases", "backends", "context", "description", "draining", "inflight", "name", "wire_name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.wire_name = b""
        self.aliases: tuple[str, ...] = ()
        self.backends: tuple[Backend, ...] = ()
        self.context = 0
        self.description = ""
        self.draining = False
        self.inflight = 0

    def state(self) -> str:
        if self.draining:
            return "draining"
        return "up" if any(backend.health.up for backend in self.backends) else "down"


class Key:
    __slots__ = ("everything", "id", "inference", "models", "scopes")

    def __init__(self, entry: KeyEntry) -> None:
        self.id = entry.id
        self.scopes = frozenset(entry.scopes)
        self.inference = "inference" in self.scopes
        self.everything = "*" in entry.models
        self.models = frozenset(entry.models)

    def may_use(self, model: Model) -> bool:
        """By the model's name or by any of its aliases."""
        return self.everything or model.name in self.models or not self.models.isdisjoint(model.aliases)


class KeyRing:
    """Only hashes are kept, and a look-up by the hash of what was sent tells nothing about the others."""

    def __init__(self, entries: tuple[KeyEntry, ...] = ()) -> None:
        self.by_digest = {bytes.fromhex(entry.sha256): Key(entry) for entry in entries}

    def find(self, token: bytes) -> Key | None:
        return self.by_digest.get(hashlib.sha256(token).digest())


class Catalogue:
    """The models by name and by alias."""

    def __init__(self, probe_interval: float) -> None:
        self.probe_interval = probe_interval
        self.created = 0
        self.models: dict[str, Model] = {}
        self.by_name: dict[str, Model] = {}
        self.backends: dict[Address, Backend] = {}

    def apply(self, snapshot: Snapshot, now: float) -> list[Backend]:
        """Take over a new snapshot; the backends that are gone. A model or backend that stays keeps its state."""
        self.created = snapshot.created
        gone = self.backends
        self.backends = {}
        models = {}
        for entry in snapshot.models:
            model = self.models.get(entry.name) or Model(entry.name)
            self.fill(model, entry, gone, now)
            model.draining = bool(snapshot.draining.get(entry.name))
            models[entry.name] = model
        self.models = models
        self.by_name = {name: model for model in models.values() for name in (model.name, *model.aliases)}
        return [backend for address, backend in gone.items() if address not in self.backends]

    def fill(self, model: Model, entry: ModelEntry, known: dict[Address, Backend], now: float) -> None:
        model.aliases = entry.aliases
        model.context = entry.context
        model.description = entry.description
        backends = []
        for address in entry.backends:
            backend = known.get(address)
            if backend is None:
                backend = Backend(address.host, address.port, Health(self.probe_interval, now))
            self.backends[address] = backend
            backends.append(backend)
        model.backends = tuple(backends)
