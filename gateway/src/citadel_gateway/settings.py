"""The four rendered files: gateway.json, models.json, keys.json, policies.json.

Read once into frozen structs. A key that is not known is refused with its file and its name, because a misspelt
setting that is silently ignored is found weeks later. What the types cannot say (a name given twice, a key for a
model that is not there) is said by `problems`.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Amount = Annotated[float, Meta(ge=0)]
Scope = Literal["inference", "read", "admin", "metrics", "alerts", "peer"]
Overage = Literal["block", "degrade", "bill"]
Capability = Literal["chat", "completions", "embeddings", "responses", "messages", "tools"]
WORKERS = "CITADEL_GATEWAY_WORKERS"  # from `serve` to the processes that it starts
ORIGIN = re.compile(r"\*|https?://[^/\s,]+")


class ConfigError(Exception):
    """The configuration cannot be used. One line for each problem, each naming its file."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Every rendered struct: nothing changes after reading, nothing unknown is swallowed."""


class Listen(Strict, frozen=True):
    address: str = "127.0.0.1"
    port: Port = 8000


class Cors(Strict, frozen=True):
    allow_origins: tuple[str, ...] = ()


class Limits(Strict, frozen=True):
    """Bounds of one worker; `n` and `max_tokens` are the most that a request may ask for."""

    body_bytes: Positive = 16 * 1024 * 1024
    header_bytes: Positive = 32 * 1024
    connections: Positive = 4096
    inflight_per_model: Positive = 512
    n: Positive = 16
    max_tokens: Positive = 131_072


class Admission(Strict, frozen=True):
    """The bounded queue of each model in each worker. A request that would wait longer than `max_wait` is refused."""

    queue: Count = 256
    max_wait: Seconds = 30.0


class Redis(Strict, frozen=True):
    """Where limits are counted for all workers and hosts; without a `url` each gateway has one worker and counts in
    memory. `url`: redis://USER@HOST:PORT/DB, rediss://…, unix://USER@/PATH?db=0; the password is in a file.
    """

    url: str = ""
    password_file: str = ""
    ca_file: str = ""
    timeout: Seconds = 0.25
    on_failure: Literal["open", "closed"] = "open"
    prefix: str = "citadel"


class Database(Strict, frozen=True):
    """An SQLAlchemy URL without a password (postgresql+psycopg://USER@HOST:PORT/NAME); empty: SQLite in `state_dir`."""

    url: str = ""
    password_file: str = ""
    schema: str = "citadel_gateway"


class Journal(Strict, frozen=True):
    """Where workers note what was asked and used; empty: `state_dir`/journal."""

    folder: str = ""
    segment_bytes: Positive = 16 * 1024 * 1024
    keep_hours: Count = 24  # segments that are in the ledger already are kept for `replay`


class Telemetry(Strict, frozen=True):
    """OpenTelemetry traces, off without an `endpoint` (OTLP over HTTP: http://HOST:4318)."""

    endpoint: str = ""
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Timeouts(Strict, frozen=True):
    connect: Seconds = 2.0
    headers: Seconds = 15.0
    first_byte: Seconds = 600.0
    between_bytes: Seconds = 120.0
    total: Seconds = 3600.0
    keepalive: Seconds = 75.0
    drain: Seconds = 600.0
    probe_interval: Seconds = 5.0
    probe: Seconds = 3.0


class Gateway(Strict, frozen=True):
    """gateway.json. Limits are those of one worker."""

    host: str
    listen: Listen
    control_socket: str
    run_dir: str
    state_dir: str
    models_file: str
    keys_file: str
    policies_file: str = ""  # empty: one tier without limits, no prices
    engine_key_file: str = ""
    peer_key_file: str = ""  # the key this gateway shows to the gateways of other hosts
    access_log: str = "-"
    workers: Positive = 2
    cors: Cors = Cors()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    admission: Admission = Admission()
    redis: Redis = Redis()
    database: Database = Database()
    journal: Journal = Journal()
    telemetry: Telemetry = Telemetry()


class Address(Strict, frozen=True):
    """A replica. `gateway`: it is the gateway of another host, asked with the peer key, which meters nothing.
    `shared`: it serves other models too. `health`: what is asked to see whether it is well.
    """

    host: str
    port: Port
    weight: Amount = 1.0
    gateway: bool = False
    shared: bool = False
    health: Annotated[str, Meta(pattern=r"^/[!-~]{0,255}\Z")] = "/health"


class Price(Strict, frozen=True):
    """What a model costs, in USD. The hardware price is `share` of the host's (see `Hardware`)."""

    share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    input_mtoken: Amount = 0.0  # per million tokens, besides the engine's time
    output_mtoken: Amount = 0.0
    cached_mtoken: Amount = 0.0


class Model(Strict, frozen=True):
    """`slots`: requests that one replica generates at the same time (vLLM's max-num-seqs); 0: not known, no queue
    before it. `fallback`: models that take over when no replica of this one can.
    """

    name: Name
    backends: Annotated[tuple[Address, ...], Meta(min_length=1)]
    aliases: tuple[Name, ...] = ()
    context: Positive = 4096
    description: str = ""
    slots: Count = 0
    capabilities: tuple[Capability, ...] = ("chat", "completions", "responses", "messages", "tools")
    fallback: tuple[Name, ...] = ()
    price: Price = Price()
    tokens_per_byte: Annotated[float, Meta(gt=0)] = 1.0  # most tokens that a byte of a request's body can become


class Models(Strict, frozen=True):
    models: tuple[Model, ...]


class User(Strict, frozen=True):
    """Whom limits belong to. One that is not enabled has no key that opens anything."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")]
    tier: str = ""  # empty: `default_tier` of the policies
    name: str = ""
    enabled: bool = True
    use_case: str = ""


class Key(Strict, frozen=True):
    """A key belongs to a user; without `user` to one of its own name. `expires`: seconds since the epoch, 0: never."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = ("inference",)
    models: tuple[str, ...] = ("*",)
    user: str = ""
    expires: Amount = 0
    use_case: str = ""


class Keys(Strict, frozen=True):
    keys: tuple[Key, ...]
    users: tuple[User, ...] = ()


class Tier(Strict, frozen=True):
    """Limits of each user of the tier; 0 is no limit. Minutes slide, days and months are those of UTC. A greater
    `priority` is served earlier when requests wait. `overage`: what a spent day or month means.
    """

    name: Name
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    concurrency: Count = 0
    tokens_per_day: Count = 0
    tokens_per_month: Count = 0
    max_output_tokens: Count = 0  # for a request that names none, where tokens are limited; 0: 1024
    models: tuple[str, ...] = ("*",)
    overage: Overage = "block"
    degrade_to: str = ""


class When(Strict, frozen=True):
    """All that is given must be true. Tokens are those of the prompt, estimated from its bytes."""

    min_tokens: Count = 0
    max_tokens: Count = 0
    tools: bool | None = None
    stream: bool | None = None
    languages: tuple[str, ...] = ()  # first part of Accept-Language or X-Language
    tags: tuple[str, ...] = ()  # X-Tag
    tiers: tuple[str, ...] = ()


class Rule(Strict, frozen=True):
    name: Name
    models: Annotated[tuple[str, ...], Meta(min_length=1)]
    when: When = When()


class Policy(Strict, frozen=True):
    """How `auto` (and each alias of the policy) becomes a model: the first rule that holds gives the models, `choose`
    takes one. Replicas of a model: power of two choices by the same measure, prefix and session affinity before it.
    """

    name: Name
    aliases: tuple[Name, ...] = ()
    rules: tuple[Rule, ...] = ()
    models: tuple[str, ...] = ()  # when no rule holds; empty: every model
    choose: Literal["first", "load", "latency", "cost"] = "load"


class Routing(Strict, frozen=True):
    """Between the replicas of a model, and what is done when one fails.

    `retry_budget`: retries as a share of requests.
    """

    choose: Literal["load", "latency"] = "load"
    prefix_bytes: Count = 1024  # of the prompt that decide where its prefix is cached; 0: no affinity
    affinity_load: Annotated[float, Meta(ge=1)] = 1.25  # times the mean load that affinity may cost
    retry_budget: Annotated[float, Meta(ge=0, le=1)] = 0.2
    slow_start: Amount = 10.0
    failures: Positive = 5  # in a row open the circuit
    error_rate: Annotated[float, Meta(gt=0, le=1)] = 0.5  # of at least 20 requests in 30 s open it too
    open_seconds: Seconds = 5.0
    hedge_after: Amount = 0.0


class Hardware(Strict, frozen=True):
    """What the host costs. `utilisation`: share of its life in which it is expected to work."""

    usd: Amount = 0.0
    lifetime_years: Annotated[float, Meta(gt=0)] = 4.0
    watts: Amount = 0.0
    usd_per_kwh: Amount = 0.0
    utilisation: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Value(Strict, frozen=True):
    """What an outcome is worth in USD; an empty `use_case` is for all."""

    outcome: str
    usd: float
    use_case: str = ""


class Policies(Strict, frozen=True):
    """policies.json: everything that an operator decides about users, ways and money."""

    tiers: tuple[Tier, ...] = (Tier("unlimited"),)
    default_tier: str = ""  # empty: the first
    policies: tuple[Policy, ...] = (Policy("auto"),)
    routing: Routing = Routing()
    hardware: Hardware = Hardware()
    budget_usd: dict[str, Amount] = {}  # period (day, month) -> USD
    values: tuple[Value, ...] = ()
    use_cases: tuple[str, ...] = ()  # those that metrics may name


T = TypeVar("T", Gateway, Models, Keys, Policies)


def read(path: str | Path, kind: type[T]) -> T:
    """One file as its struct; `ConfigError` says which file and which key is wrong."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:  # ValidationError is one of these
        raise ConfigError(f"{path}: {error}") from None


def read_gateway(path: str | Path) -> Gateway:
    """gateway.json, with the number of workers that `serve` has chosen."""
    settings = read(path, Gateway)
    workers = os.environ.get(WORKERS, "")
    return msgspec.structs.replace(settings, workers=int(workers)) if workers.isdecimal() and int(workers) else settings


def gateway_problems(gateway: Gateway, path: str) -> list[str]:
    """What the types of gateway.json cannot say."""
    found = [
        f"{path}: cors.allow_origins: {origin!r} is no origin (write https://host or *)"
        for origin in gateway.cors.allow_origins
        if not ORIGIN.fullmatch(origin)
    ]
    found += [
        f"{path}: {field}: {value!r} is not an absolute path"
        for field in ("control_socket", "run_dir", "state_dir", "models_file", "keys_file")
        if not Path(value := getattr(gateway, field)).is_absolute()
    ]
    for field, url, schemes in (
        ("redis.url", gateway.redis.url, ("redis", "rediss", "unix")),
        ("database.url", gateway.database.url, ("postgresql+psycopg", "postgresql", "sqlite")),
    ):
        scheme, _, rest = url.partition("://")
        if url and scheme not in schemes:
            found.append(f"{path}: {field}: must begin with {' or '.join(f'{name}://' for name in schemes)}")
        elif ":" in rest.rpartition("@")[0]:
            found.append(f"{path}: {field}: holds a password; put it into a file ({field[:-3]}password_file)")
    if len(gateway.control_socket.encode()) > 107:
        found.append(f"{path}: control_socket: longer than the 107 bytes a Unix socket's path may have")
    return found


def model_problems(models: Models, path: str) -> list[str]:
    """A name or an alias that stands twice, a backend that belongs to two models, a fallback that is not there."""
    names = Counter(name for model in models.models for name in (model.name, *model.aliases))
    found = [f"{path}: the name {name!r} is used {count} times" for name, count in names.items() if count > 1]
    owners: dict[tuple[str, int], str] = {}
    for model in models.models:
        for backend in model.backends:
            owner = owners.setdefault((backend.host, backend.port), model.name)
            if owner != model.name and not (backend.gateway or backend.shared):
                found.append(f"{path}: {backend.host}:{backend.port} belongs to both {owner!r} and {model.name!r}")
        if len({(backend.host, backend.port) for backend in model.backends}) != len(model.backends):
            found.append(f"{path}: {model.name!r} names a backend twice")
        found += [
            f"{path}: {model.name!r} falls back to {name!r}, which is no other model of the list"
            for name in model.fallback
            if name not in names or name in (model.name, *model.aliases)
        ]
    return found


def key_problems(keys: Keys, models: Models | None, path: str) -> list[str]:
    """An id or a hash that stands twice, a key for a model that is not there."""
    found = []
    for field in ("id", "sha256"):
        counts = Counter(getattr(key, field) for key in keys.keys)
        found += [
            f"{path}: the {field} {value!r} is used {count} times" for value, count in counts.items() if count > 1
        ]
    if models is not None:
        known = {"*", *(name for model in models.models for name in (model.name, *model.aliases))}
        found += [
            f"{path}: key {key.id!r} names the model {name!r}, which is not in the model list"
            for key in keys.keys
            for name in key.models
            if name not in known
        ]
    return found


def user_problems(keys: Keys, policies: Policies, path: str) -> list[str]:
    """A user that stands twice, a tier that is not there."""
    counts = Counter(user.id for user in keys.users)
    found = [f"{path}: the user {name!r} is there {count} times" for name, count in counts.items() if count > 1]
    tiers = {tier.name for tier in policies.tiers}
    return found + [
        f"{path}: user {user.id!r} has the tier {user.tier!r}, which is not in the policies"
        for user in keys.users
        if user.tier and user.tier not in tiers
    ]


def policy_problems(policies: Policies, models: Models | None, path: str) -> list[str]:
    """A name that stands twice, and names of tiers and models that are not there."""
    found: list[str] = []
    ways = [name for one in policies.policies for name in (one.name, *one.aliases)]
    groups = {"tier": [one.name for one in policies.tiers], "policy": ways}
    for kind, names in groups.items():
        found += [f"{path}: the {kind} {name!r} stands twice" for name, count in Counter(names).items() if count > 1]
    if not policies.tiers:
        found.append(f"{path}: tiers: there must be one at least")
    if policies.routing.hedge_after:
        found.append(f"{path}: routing.hedge_after: requests are not hedged; leave it at 0")
    if policies.default_tier and policies.default_tier not in groups["tier"]:
        found.append(f"{path}: default_tier: there is no tier {policies.default_tier!r}")
    found += [
        f"{path}: tier {tier.name!r}: overage 'degrade' needs degrade_to"
        for tier in policies.tiers
        if tier.overage == "degrade" and not tier.degrade_to
    ]
    found += [
        f"{path}: rule {rule.name!r} names the tier {name!r}, which is not there"
        for policy in policies.policies
        for rule in policy.rules
        for name in rule.when.tiers
        if name not in groups["tier"]
    ]
    if models is not None:
        known = {name for model in models.models for name in (model.name, *model.aliases)}
        wanted = [(f"tier {tier.name!r}", name) for tier in policies.tiers for name in (*tier.models, tier.degrade_to)]
        for policy in policies.policies:
            wanted += [(f"policy {policy.name!r}", name) for name in policy.models]
            wanted += [(f"rule {rule.name!r}", name) for rule in policy.rules for name in rule.models]
            found += [
                f"{path}: policy {policy.name!r} is called {name!r}, as a model is"
                for name in (policy.name, *policy.aliases)
                if name in known
            ]
        found += [
            f"{path}: {who} names the model {name!r}, which is not in the model list"
            for who, name in wanted
            if name and name != "*" and name not in known
        ]
    return found


def problems(path: str | Path) -> list[str]:
    """Everything that is wrong with the files, one line each; empty when they can be used."""
    found: list[str] = []
    try:
        gateway = read(path, Gateway)
    except ConfigError as error:
        return list(error.lines)
    found += gateway_problems(gateway, str(path))
    models = None
    try:
        models = read(gateway.models_file, Models)
        found += model_problems(models, gateway.models_file)
        if not gateway.peer_key_file and any(one.gateway for model in models.models for one in model.backends):
            found.append(f"{path}: peer_key_file: needed, because a backend is the gateway of another host")
    except ConfigError as error:
        found += error.lines
    try:
        keys = read(gateway.keys_file, Keys)
        found += key_problems(keys, models, gateway.keys_file)
        policies = read_policies(gateway)
        found += policy_problems(policies, models, gateway.policies_file)
        found += user_problems(keys, policies, gateway.keys_file)
        found += counting_problems(gateway, policies, str(path))
    except ConfigError as error:
        found += error.lines
    return found


def read_policies(gateway: Gateway) -> Policies:
    """policies.json; without a file one tier without limits."""
    return read(gateway.policies_file, Policies) if gateway.policies_file else Policies()


def limited(tier: Tier) -> bool:
    """Whether anything is counted for the users of this tier."""
    counts = (tier.requests_per_minute, tier.tokens_per_minute, tier.concurrency)
    return any(counts) or bool(tier.tokens_per_day or tier.tokens_per_month)


def counting_problems(gateway: Gateway, policies: Policies, path: str) -> list[str]:
    """Limits that no one place would count: each of several workers without Redis has a memory of its own."""
    found = [tier.name for tier in policies.tiers if limited(tier)]
    if gateway.workers == 1 or gateway.redis.url or not found:
        return []
    return [
        f"{path}: tier {name!r} has limits, which are counted in memory: one worker, or set redis.url" for name in found
    ]


def start_problems(gateway: Gateway, path: str) -> list[str]:
    """Why a process must not start with these settings, whatever the snapshot says."""
    return counting_problems(gateway, read_policies(gateway), path)


def local_key_path(gateway: Gateway) -> Path:
    """The key of whoever may read the gateway's state folder, made by the control process."""
    return Path(gateway.state_dir) / "local-key"


def engine_key(gateway: Gateway) -> str:
    """The key of the engines of this host: from the file named in the settings, else from systemd's credentials."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(gateway.engine_key_file or (Path(folder) / "engine-key" if folder else ""))
    if path == Path():
        raise ConfigError("engine key: neither engine_key_file nor $CREDENTIALS_DIRECTORY is set")
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the engine key cannot be read: {error}") from None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{path}: the engine key is empty or holds a blank")
    return key
