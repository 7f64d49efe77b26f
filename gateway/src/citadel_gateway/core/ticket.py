"""One request, from its complete arrival to its one settlement."""

from typing import Any, Final

from msgspec import Struct

from citadel_gateway.core.catalogue import Backend, Model
from citadel_gateway.core.keyring import Caller
from citadel_gateway.core.routing import Query

# received → (authenticated, read) → reserving → queued → routed → sent → first byte → settled; the waits are skipped
# where nothing has to wait
RECEIVED: Final = 0
RESERVING: Final = 1
QUEUED: Final = 2
ADMITTED: Final = 3
ROUTED: Final = 4
SENT: Final = 5
FIRST_BYTE: Final = 6
SETTLED: Final = 7


class Line(Struct, gc=False):
    """What the access log says about a request: no prompt, no answer, no key."""

    ts: float
    request_id: str
    key: str
    model: str
    path: str
    status: int
    stream: bool
    bytes_in: int
    bytes_out: int
    ttft_ms: float | None
    duration_ms: float
    client: str
    outcome: str


class Used:
    """Tokens of a request. `exact`: said by the engine about the whole request, not counted on the way."""

    __slots__ = ("cached", "exact", "input", "output")

    def __init__(self, input: int = 0, output: int = 0, cached: int = 0, exact: bool = False) -> None:  # noqa: A002  # the word for it
        self.input = input
        self.output = output
        self.cached = cached
        self.exact = exact


class Ticket:
    """Filled step by step. `id` is the gateway's own and unique; `request_id` is the client's, if that is harmless, and
    `name` is the same as text.

    Times are those of the monotonic clock, but for `at`.
    """

    state: int = RECEIVED
    bytes_out: int = 0
    lines: bytes = b""  # header lines of the answer that are known before it
    waiter: Any = None  # who is called when what it waits for has come

    # who asks, and for what
    key: Caller | None = None
    query: Query | None = None
    stream: bool = False
    texts: int = 1  # n times the number of prompts
    tokens: int = 0  # at most, prompt and output: what is reserved
    output: int = 0  # tokens that may be generated in all
    session: str = ""
    use_case: str = ""
    traceparent: str = ""
    deadline: float = 0.0  # 0: none
    load: int = 0  # tokens that it is likely to be, at most
    metered: bool = True  # not for the gateway of another host, which does it itself
    asks: bool = False  # somebody whom we know asks for a model: it belongs into the ledger, whatever becomes of it

    # what was decided
    models: tuple[Model, ...] = ()  # those that may answer, the present one first
    model: Model | None = None
    backend: Backend | None = None
    tried: tuple[Backend, ...] = ()
    tries: int = 0
    reservation: Any = None
    limit: str = ""
    retry_after: float = 0.0
    remaining: dict[str, int] | None = None
    overage: bool = False
    degraded_from: str = ""
    fallback_from: str = ""
    ahead: int = 0
    opened: bool = False

    # what happened
    queued: float = 0.0  # since when it waits for a slot
    admitted: float = 0.0  # since when it holds one
    waited: float = 0.0  # seconds in queues
    begun: float = 0.0  # when the present backend got it
    engine: float = 0.0  # the engine's clock then
    engine_seconds: float = 0.0  # of backends before
    sent: float = 0.0
    first: float = 0.0
    meter: Any = None  # counts the tokens of the reply

    def __init__(
        self,
        id: str,  # noqa: A002  # what else
        name: str,
        request_id: bytes,
        endpoint: str,
        path: bytes,
        client: str,
        started: float,
        at: float,
        bytes_in: int,
    ) -> None:
        self.id = id
        self.name = name
        self.request_id = request_id
        self.endpoint = endpoint
        self.path = path
        self.client = client
        self.started = started
        self.at = at
        self.bytes_in = bytes_in
