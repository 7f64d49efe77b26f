"""Models, backends and keys as the decision core looks them up. Built from a snapshot; what is under way survives a
new one.
"""

from math import exp
from typing import Any, Final

from citadel_gateway.core.board import INFLIGHT, TOKENS, Board
from citadel_gateway.core.health import Health
from citadel_gateway.records import Candidate, Why
from citadel_gateway.settings import Address, Capability, Price, Routing
from citadel_gateway.settings import Key as KeyEntry
from citadel_gateway.settings import Model as ModelEntry
from citadel_gateway.snapshot import Snapshot

BLEND: Final = 10.0  # seconds in which a measurement loses two thirds of its weight against newer ones
FORGET: Final = 60.0  # and in which it is forgotten when there are none, so that a slow backend is tried again
SILENCE: Final = 5.0  # seconds without a byte that are never suspicious
UNUSUAL: Final = 10.0  # times what it usually takes to the first byte is
REMEMBERED: Final = 100_000  # generated tokens after which older ones count half in an engine's speed


class PeakEwma:
    """An average that believes bad news at once and good news slowly."""

    __slots__ = ("stamp", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.stamp = 0.0

    def observe(self, seconds: float, now: float) -> None:
        if seconds >= self.value:
            self.value = seconds
        else:
            weight = exp((self.stamp - now) / BLEND)
            self.value = self.value * weight + seconds * (1.0 - weight)
        self.stamp = now

    def read(self, now: float) -> float:
        """What is believed now; 0 when nothing was measured."""
        return self.value * exp((self.stamp - now) / FORGET)


class Backend:
    """One engine, or the gateway of another host that serves it. `pool` belongs to the upstream client; nothing here
    looks inside.

    `spent` is the engine's own clock: it goes as fast as one request advances, so at half the speed of the time of day
    while two requests share the engine. What it has gone on between a request's begin and end is the request's share
    of the engine's time, and the shares of all requests add up to the time in which the engine had work. The number of
    requests is that of all workers of this host; what the others begin is noticed with our next event or tick, a
    tenth of a second later at most.
    """

    __slots__ = (
        "busy", "capabilities", "first", "gateway", "health", "host", "idle", "inflight", "label", "last", "made",
        "model", "path", "per_token", "plain", "pool", "port", "row", "seed", "spent", "stamp", "tokens", "weight",
    )  # fmt: skip

    def __init__(
        self,
        host: str,
        port: int,
        health: Health,
        *,
        board: Board | None = None,
        model: str = "",
        gateway: bool = False,
        name: str = "",
    ) -> None:
        self.host = host
        self.port = port
        self.label = f"{host}:{port}"
        self.health = health
        self.model = model
        self.gateway = gateway
        self.path = "/health"  # where it says whether it is well
        self.capabilities: tuple[Capability, ...] = ()
        self.weight = 1.0
        self.inflight = 0
        self.tokens = 0  # of the requests in flight: their prompts and what they may generate
        self.pool: Any = None
        self.row = (board or Board()).row(name or self.label)
        self.seed = self.row.key & 0xFFFFFFFFFFFFFFFF  # the same in all workers and hosts
        self.last = 0.0  # when it last sent a byte
        self.idle = 0.0  # until when it last had nothing to do
        self.first = PeakEwma()  # seconds to the first byte of a reply
        self.per_token = PeakEwma()  # seconds of a request for a generated token
        self.plain = Why(candidates=(Candidate(model, self.label, 0.0, "only"),))  # of a request without a choice
        self.spent = 0.0
        self.stamp = 0.0
        self.busy = 0.0  # our share of the engine's time
        self.made = 0  # and the tokens that were generated in it

    # one request ----------------------------------------------------------------------------------------------------
    def begin(self, tokens: int, now: float) -> float:
        """A request goes to it. The reading of the engine's clock, from which its share will be counted."""
        self.advance(now)
        if not self.inflight:
            self.idle = now
        self.inflight += 1
        self.tokens += tokens
        row = self.row
        row.mine[row.base + INFLIGHT] = self.inflight
        row.mine[row.base + TOKENS] = self.tokens
        self.health.chosen()
        return self.spent

    def heard(self, now: float) -> None:
        """It sent something."""
        self.last = now

    def first_byte(self, seconds: float, now: float) -> None:
        """What came `seconds` after the request was sent: the first of a stream, or a whole reply."""
        self.last = now
        self.first.observe(seconds, now)

    def end(
        self, tokens: int, now: float, began: float, verdict: int, seconds: float = 0.0, output_tokens: int = 0
    ) -> float:
        """The one end of what `begin` began with the same `tokens` at the time `began`; the engine's clock again.
        `verdict`: one of those in core/health.py. `seconds` and `output_tokens`: how long it took to generate how much.
        """
        self.advance(now)
        self.inflight -= 1
        self.tokens -= tokens
        row = self.row
        row.mine[row.base + INFLIGHT] = self.inflight
        row.mine[row.base + TOKENS] = self.tokens
        if output_tokens:
            self.made += output_tokens
            self.per_token.observe(seconds / output_tokens, now)
        self.health.ended(verdict, now, began)
        return self.spent

    # what is known of it --------------------------------------------------------------------------------------------
    def advance(self, now: float) -> None:
        """Bring the engine's clock to `now`."""
        passed = now - self.stamp
        self.stamp = now
        mine = self.inflight
        row = self.row
        all_of_them = mine + row.elsewhere(INFLIGHT) if row.others else mine
        if all_of_them > 0 and passed > 0:
            share = passed / all_of_them
            self.spent += share
            self.busy += share * mine

    def load(self) -> int:
        """Tokens in flight, of all workers of this host."""
        return self.tokens + self.row.elsewhere(TOKENS) if self.row.others else self.tokens

    def requests(self) -> int:
        """Requests in flight, of all workers of this host."""
        return self.inflight + self.row.elsewhere(INFLIGHT) if self.row.others else self.inflight

    def tick(self, now: float) -> None:
        """Keep the engine's clock going, and notice one that has accepted requests and says nothing."""
        self.advance(now)
        if self.made > REMEMBERED:
            self.made //= 2
            self.busy /= 2
        health = self.health
        if self.inflight and now - max(self.last, self.idle) > max(SILENCE, UNUSUAL * self.first.value):
            health.doubt(now)
        elif health.doubted and self.last > health.doubted:
            health.heard()


class Model:
    __slots__ = (
        "aliases", "backends", "capabilities", "context", "description", "draining", "entry", "fallback", "inflight",
        "lane", "name", "price", "single", "slots", "tokens_per_byte", "wire_name",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.wire_name = b""
        self.aliases: tuple[str, ...] = ()
        self.backends: tuple[Backend, ...] = ()
        self.context = 0
        self.description = ""
        self.draining = False
        self.inflight = 0
        self.slots = 0
        self.capabilities: tuple[Capability, ...] = ()
        self.fallback: tuple[str, ...] = ()
        self.price = Price()
        self.tokens_per_byte = 1.0
        self.entry: ModelEntry | None = None
        self.single: Backend | None = None  # the only one it has
        self.lane: Any = None  # belongs to the gatekeeper

    def state(self) -> str:
        if self.draining:
            return "draining"
        return "up" if any(backend.health.up for backend in self.backends) else "down"

    def local_state(self) -> str:
        """What it is on this host, which is what the gateways of other hosts want to know."""
        here = [backend.health for backend in self.backends if not backend.gateway]
        if self.draining or (here and all(health.resting for health in here)):
            return "draining"
        return "up" if any(health.up and not health.resting for health in here) else "down"

    def usable(self, now: float) -> bool:
        """Whether one of its backends can take a request now."""
        single = self.single
        if single is not None:
            return single.health.usable(now)
        return any(backend.health.usable(now) for backend in self.backends)

    def load(self) -> float:
        """Tokens in flight for each unit of weight of the backends that are up."""
        weight = sum(backend.weight for backend in self.backends if backend.health.up)
        return sum(backend.load() for backend in self.backends) / weight if weight else 0.0

    def speed(self) -> float:
        """Tokens that were generated in a second of the engines' time; 0 when nothing was measured."""
        busy = sum(backend.busy for backend in self.backends)
        return sum(backend.made for backend in self.backends) / busy if busy > 0 else 0.0


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


class Catalogue:
    """The models by name and by alias."""

    def __init__(self, probe_interval: float, board: Board | None = None) -> None:
        self.probe_interval = probe_interval
        self.board = board or Board()
        self.routing = Routing()
        self.created = 0
        self.models: dict[str, Model] = {}
        self.by_name: dict[str, Model] = {}
        self.backends: dict[str, Backend] = {}

    def apply(self, snapshot: Snapshot, now: float) -> list[Backend]:
        """Take over a new snapshot; the backends that are gone. A model or backend that stays keeps its state."""
        self.created = snapshot.created
        self.routing = snapshot.policies.routing
        gone = self.backends
        self.backends = {}
        models = {}
        for entry in snapshot.models:
            model = self.models.get(entry.name) or Model(entry.name)
            self.fill(model, entry, gone, now)
            drain(model, snapshot.draining.get(entry.name, []))
            models[entry.name] = model
        self.models = models
        self.by_name = {name: model for model in models.values() for name in (model.name, *model.aliases)}
        return [backend for name, backend in gone.items() if name not in self.backends]

    def fill(self, model: Model, entry: ModelEntry, known: dict[str, Backend], now: float) -> None:
        new = not model.backends  # a replica that joins others starts slowly, the first ones at once
        model.entry = entry
        model.aliases = entry.aliases
        model.context = entry.context
        model.description = entry.description
        model.slots = entry.slots
        model.capabilities = entry.capabilities
        model.fallback = entry.fallback
        model.price = entry.price
        model.tokens_per_byte = entry.tokens_per_byte
        backends = []
        for address in entry.backends:
            name = identity(model, address)
            backend = known.get(name)
            if backend is None:
                health = Health(self.probe_interval, now)
                if not new:
                    health.since = now
                backend = Backend(
                    address.host,
                    address.port,
                    health,
                    board=self.board,
                    model=entry.name,
                    gateway=address.gateway,
                    name=name,
                )
            backend.weight = address.weight
            backend.path = address.health
            backend.model = entry.name
            backend.capabilities = entry.capabilities
            backend.health.routing = self.routing
            self.backends[name] = backend
            backends.append(backend)
        model.backends = tuple(backends)
        model.single = backends[0] if len(backends) == 1 else None


def drain(model: Model, reasons: list[str]) -> None:
    """An operator drains the model; an engine that stops only itself, where other hosts have replicas."""
    elsewhere = any(backend.gateway for backend in model.backends)
    local = reasons == ["engine"] and elsewhere
    model.draining = bool(reasons) and not local
    for backend in model.backends:
        backend.health.resting = local and not backend.gateway


def identity(model: Model, address: Address) -> str:
    """What makes a backend the same one in another snapshot, whatever its weight. Another host's gateway, and a server
    of several models, is one backend for each of them, because one may be down while another is not.
    """
    label = f"{address.host}:{address.port}"
    return f"{model.name} {label}" if address.gateway or address.shared else label
