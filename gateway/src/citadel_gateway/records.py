"""What workers note in their journal, and the settler puts into the ledger: one JSON line a record.

A request has one `Opened` and one `Settled`; as long as it runs, `Progress` says once a second what it has used. Who is
left with an `Opened` alone when a worker has died is settled by the settler, from the last `Progress`. `id` is the
gateway's own and unique; `request_id` is what the client may have chosen, and chosen twice.
"""

from typing import Literal

import msgspec
from msgspec import Struct

SYSTEM_USER = "system"  # to whom the gateway's own probes are ledgered


class Candidate(Struct, array_like=True, frozen=True, gc=False):
    """One replica that was looked at. The smallest `score` is taken; `note` says what spoke for it or against it
    (best, affinity, session, second_choice, down, open, draining, tried, full, slow_start).
    """

    model: str
    backend: str
    score: float
    note: str


class Why(Struct, frozen=True, gc=False, omit_defaults=True):
    """The decision about one request, complete enough to take it again under another policy."""

    policy: str = ""
    rule: str = ""
    choose: str = ""
    candidates: tuple[Candidate, ...] = ()
    fallback_from: str = ""
    degraded_from: str = ""
    prompt_tokens: int = 0  # as estimated before
    language: str = ""
    tag: str = ""
    tools: bool = False
    budget_usd: float = 0.0
    limit: str = ""  # which limit refused it, or would have
    remaining: dict[str, int] = {}  # of each limit, as far as the worker knew
    queue_length: int = 0
    retry_after: float = 0.0


class Opened(Struct, frozen=True, gc=False, tag="opened", tag_field="kind", omit_defaults=True):
    id: str
    request_id: str
    at: float  # seconds since the epoch
    host: str
    worker: int
    user: str
    key: str
    tier: str
    model: str
    endpoint: str
    stream: bool = False
    session: str = ""
    use_case: str = ""
    reserved: int = 0  # tokens
    asked: str = ""  # what the client named: an alias, a policy
    backend: str = ""


class Running(Struct, array_like=True, frozen=True, gc=False):
    id: str
    input_tokens: int
    output_tokens: int
    engine_seconds: float


class Progress(Struct, frozen=True, gc=False, tag="progress", tag_field="kind"):
    at: float
    requests: tuple[Running, ...]


class Settled(Struct, frozen=True, gc=False, tag="settled", tag_field="kind", omit_defaults=True):
    """Seconds are durations. `exact`: the engine said how many tokens there were; else they are
    counted or estimated.
    """

    id: str
    request_id: str
    at: float  # when it came, seconds since the epoch
    host: str
    worker: int
    user: str
    key: str
    tier: str
    model: str
    endpoint: str
    status: int
    outcome: str  # ok, error, refused, limited, unavailable, client_closed, timeout, upstream_error, cut, lost
    code: str = ""
    stream: bool = False
    session: str = ""
    use_case: str = ""
    asked: str = ""
    backend: str = ""
    reserved: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    exact: bool = False
    overage: bool = False
    queue_seconds: float = 0.0
    first_byte_seconds: float = 0.0
    total_seconds: float = 0.0
    engine_seconds: float = 0.0  # its share of the engine's time: a second with four requests is a quarter for each
    cost_usd: float = 0.0
    cost: dict[str, float] = {}  # by component: hardware, energy, tokens
    tries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    client: str = ""
    traceparent: str = ""
    why: Why = Why()


Record = Opened | Progress | Settled
Kind = Literal["opened", "progress", "settled"]

encode = msgspec.json.Encoder().encode
encode_lines = msgspec.json.Encoder().encode_lines
decode = msgspec.json.Decoder(Record).decode
