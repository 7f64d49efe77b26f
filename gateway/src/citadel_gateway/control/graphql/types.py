"""The types of the schema. Money is USD, moments are seconds since the epoch, as everywhere in the gateway."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import strawberry
from strawberry.scalars import JSON

from citadel_gateway.control import conversations as talks
from citadel_gateway.control.alerts import Alert as StoredAlert
from citadel_gateway.control.analytics import DAYS
from citadel_gateway.control.analytics import Analytics as StoredAnalytics
from citadel_gateway.control.feedback import Feedback as StoredFeedback
from citadel_gateway.control.figures import Figures
from citadel_gateway.control.graphql.context import Info
from citadel_gateway.control.graphql.fields import field
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Model as Declared
from citadel_gateway.settings import Price as DeclaredPrice
from citadel_gateway.settings import Tier as DeclaredTier

if TYPE_CHECKING:
    Loose = dict[str, Any]
else:
    Loose = JSON


def days_of(days: int) -> int:
    if not 1 <= days <= DAYS:
        raise Refusal(400, "invalid_request", f"days must be between 1 and {DAYS}")
    return days


def picked(kind: type[Any], source: object, **more: Any) -> Any:
    """An object of `kind` from the fields of the same name."""
    names = [field.python_name for field in kind.__strawberry_definition__.fields if field.base_resolver is None]
    return kind(**{name: more[name] if name in more else getattr(source, name) for name in names})


@strawberry.type(description="Use, quality and worth of a group of requests.")
class Analytics:
    group: str
    requests: int
    refused: int
    errors: int
    input_tokens: float
    output_tokens: float
    cost_usd: float
    feedback: int
    correct: int
    incorrect: int
    accuracy: float | None
    rated: int
    satisfaction: float | None
    satisfied: int
    dissatisfied: int
    value_usd: float
    estimated_usd: float
    net_usd: float

    @classmethod
    def of(cls, found: StoredAnalytics) -> "Analytics":
        made: Analytics = picked(cls, found)
        return made


@strawberry.type(description="A span of seconds by quantile.")
class Quantiles:
    p50: float
    p95: float


@strawberry.type(description="A replica of a model.")
class Backend:
    address: str
    up: bool


@strawberry.type(description="What a model does now: rates of the last ten seconds, times of the last minute.")
class ModelFigures:
    name: str
    state: str
    draining: list[str]
    backends: list[Backend]
    inflight: int
    queue: int
    requests_per_second: float
    errors_per_minute: float
    limited_per_minute: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    first_token_seconds: Quantiles | None
    duration_seconds: Quantiles | None
    cost_today_usd: float | None

    @classmethod
    def of(cls, name: str, found: Figures) -> "ModelFigures":
        return cls(
            name=name,
            state=found["state"],
            draining=found["draining"],
            backends=[Backend(address=one, up=up) for one, up in sorted(found["backends"].items())],
            inflight=int(found["inflight"]),
            queue=int(found["queue"]),
            requests_per_second=found["requests_per_second"],
            errors_per_minute=found["errors_per_minute"],
            limited_per_minute=found["limited_per_minute"],
            input_tokens_per_second=found["input_tokens_per_second"],
            output_tokens_per_second=found["output_tokens_per_second"],
            first_token_seconds=quantiles(found, "first_token_seconds"),
            duration_seconds=quantiles(found, "duration_seconds"),
            cost_today_usd=found.get("cost_today_usd"),
        )


def quantiles(found: Figures, name: str) -> Quantiles | None:
    return Quantiles(p50=found[name]["p50"], p95=found[name]["p95"]) if name in found else None


@strawberry.type(description="The gateway of this host now.")
class Metrics:
    at: float
    host: str
    workers: int
    connections: int
    inflight: int
    queue: int
    requests_per_second: float
    output_tokens_per_second: float
    errors_per_minute: float
    cost_today_usd: float | None
    models: list[ModelFigures]

    @classmethod
    def of(cls, found: Figures) -> "Metrics":
        total = found["total"]
        return cls(
            at=found["at"],
            host=found["host"],
            workers=found["workers"],
            connections=int(total.get("connections", 0)),
            inflight=int(total.get("inflight", 0)),
            queue=int(total.get("queue", 0)),
            requests_per_second=total.get("requests_per_second", 0.0),
            output_tokens_per_second=total.get("output_tokens_per_second", 0.0),
            errors_per_minute=total.get("errors_per_minute", 0.0),
            cost_today_usd=total.get("cost_today_usd"),
            models=[ModelFigures.of(name, one) for name, one in found["models"].items()],
        )


@strawberry.type(description="USD; the hardware's price is a share of the host's.")
class Price:
    share: float
    input_mtoken: float
    output_mtoken: float
    cached_mtoken: float

    @classmethod
    def of(cls, price: DeclaredPrice) -> "Price":
        made: Price = picked(cls, price)
        return made


@strawberry.type(description="A model that is served.")
class Model:
    name: str
    aliases: list[str]
    context: int
    description: str
    capabilities: list[str]
    fallback: list[str]
    slots: int
    price: Price
    state: str

    @classmethod
    def of(cls, model: Declared, figures: Figures) -> "Model":
        live = figures["models"].get(model.name, {})
        return cls(
            name=model.name,
            aliases=list(model.aliases),
            context=model.context,
            description=model.description,
            capabilities=list(model.capabilities),
            fallback=list(model.fallback),
            slots=model.slots,
            price=Price.of(model.price),
            state=live.get("state", "unknown"),
        )

    @field("What it does now; scope read, metrics or admin.")
    async def figures(self, info: Info) -> ModelFigures | None:
        info.context.need("read", "metrics", "admin")
        found = info.context.state.parts["live"].figures["models"].get(self.name)
        return ModelFigures.of(self.name, found) if found else None

    @field("Of the last days, today included: the caller's own; read and admin: everybody's.")
    async def analytics(self, info: Info, days: int = 7) -> Analytics:
        info.context.need("inference", "read", "admin")
        return Analytics.of(await info.context.loaders.analytics.load((self.name, days_of(days))))


@strawberry.type(description="What somebody said about an answer.")
class Feedback:
    id: int
    request_id: str
    at: float
    source: str
    user: str
    model: str
    use_case: str
    rating: int | None
    correct: bool | None
    outcome: str
    comment: str
    value_usd: float

    @classmethod
    def of(cls, found: StoredFeedback) -> "Feedback":
        made: Feedback = picked(cls, found)
        return made

    @field("What it is about.")
    async def request(self, info: Info) -> "Request | None":
        row = await info.context.loaders.requests.load(self.request_id)
        return Request.of(row) if row is not None else None


@strawberry.type(description="The latest conversation of a session.")
class Conversation:
    user: str
    session: str
    model: str
    use_case: str
    started_at: float
    last_at: float
    turns: int
    input_tokens: float
    output_tokens: float
    cost_usd: float
    last_outcome: str
    rated: bool
    state: str

    @classmethod
    def of(cls, found: talks.Conversation) -> "Conversation":
        made: Conversation = picked(cls, found)
        return made


@strawberry.type(description="A replica that was looked at; the smallest score is taken.")
class Candidate:
    model: str
    backend: str
    score: float
    note: str


@strawberry.type(description="How a request was decided.")
class Why:
    policy: str
    rule: str
    choose: str
    candidates: list[Candidate]
    fallback_from: str
    degraded_from: str
    limit: str
    queue_length: int
    remaining: Loose

    @classmethod
    def of(cls, why: dict[str, Any]) -> "Why":
        candidates = [Candidate(model=one[0], backend=one[1], score=one[2], note=one[3])
                      for one in why.get("candidates", ())]  # fmt: skip
        words = ("policy", "rule", "choose", "fallback_from", "degraded_from", "limit")
        return cls(
            candidates=candidates,
            queue_length=why.get("queue_length", 0),
            remaining=why.get("remaining", {}),
            **{name: why.get(name, "") for name in words},
        )


@strawberry.type(description="A request in the ledger.")
class Request:
    id: str
    request_id: str
    at: float
    user: str
    key: str
    tier: str
    model: str
    asked: str
    backend: str
    endpoint: str
    status: int
    outcome: str
    code: str
    stream: bool
    session: str
    use_case: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    exact: bool
    queue_seconds: float
    first_byte_seconds: float
    total_seconds: float
    engine_seconds: float
    cost_usd: float
    cost: Loose
    tries: int
    why: Why

    @classmethod
    def of(cls, row: Any) -> "Request":
        made: Request = picked(cls, row, user=row.user_id, key=row.key_id, why=Why.of(row.why))
        return made

    @field("What was said about it.")
    async def feedback(self, info: Info) -> list[Feedback]:
        return [Feedback.of(one) for one in await info.context.loaders.feedback.load(self.id)]

    @field("The conversation it belongs to.")
    async def conversation(self, info: Info) -> Conversation | None:
        if not self.session:
            return None
        row = await info.context.loaders.conversations.load((self.user, self.session))
        return Conversation.of(talks.one_of(row, info.context.state.wall())) if row is not None else None


@strawberry.type(description="A page of requests. `next` goes into `before`; null: there are no more.")
class RequestPage:
    nodes: list[Request]
    next: str | None


@strawberry.type(description="Limits of each user of a tier; 0 is none.")
class Tier:
    name: str
    priority: int
    requests_per_minute: int
    tokens_per_minute: float
    concurrency: int
    tokens_per_day: float
    tokens_per_month: float
    overage: str

    @classmethod
    def of(cls, tier: DeclaredTier) -> "Tier":
        made: Tier = picked(cls, tier)
        return made


@strawberry.type(description="The caller.")
class Me:
    user: str
    key: str
    scopes: list[str]
    models: list[str]
    expires_at: float
    tier: Tier


@strawberry.type(description="An alert, as Alertmanager sent it.")
class Alert:
    fingerprint: str
    status: str
    name: str
    severity: str
    starts: float
    ends: float
    labels: Loose
    annotations: Loose

    @classmethod
    def of(cls, alert: StoredAlert) -> "Alert":
        made: Alert = picked(cls, alert, severity=alert.labels.get("severity", ""))
        return made


@strawberry.type(description="A key without its secret.")
class KeyEntry:
    id: str
    user: str
    scopes: list[str]
    models: list[str]
    use_case: str
    expires_at: float
    created_at: float
    revoked_at: float
    state: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> "KeyEntry":
        return cls(**{field: row[field] for field in cls.__annotations__ if field in row})


@strawberry.type(description="A new key. It is shown this once.")
class CreatedKey:
    key: str
    entry: KeyEntry


@strawberry.enum(description="Whether a model takes new requests.")
class ModelState(Enum):
    SERVING = "serving"
    DRAINED = "drained"


@strawberry.type(description="Tokens as the engine counted them.")
class TokenUsage:
    input_tokens: int
    output_tokens: int


@strawberry.type(description="An answer. `raw` is the whole reply of the model.")
class ChatCompletion:
    request_id: str
    model: str
    content: str | None
    finish_reason: str | None
    usage: TokenUsage | None
    raw: Loose


@strawberry.type(description="A piece of an answer; the last one has the reason why it ended.")
class Token:
    request_id: str
    model: str
    index: int
    content: str
    finish_reason: str | None
    usage: TokenUsage | None


@strawberry.input(description="One message of a chat.")
class MessageInput:
    role: str
    content: str


@strawberry.input(description="A chat request. `parameters`: everything else that /v1/chat/completions takes.")
class ChatInput:
    messages: list[MessageInput]
    model: str = "auto"
    max_tokens: int | None = None
    temperature: float | None = None
    session: str | None = None
    use_case: str | None = None
    parameters: Annotated[Loose | None, strawberry.argument(description="Fields of the request, as they are.")] = None


@strawberry.input(description="At least one of rating (1-10), correct, outcome and comment.")
class FeedbackInput:
    request_id: str
    rating: int | None = None
    correct: bool | None = None
    outcome: str | None = None
    comment: str | None = None


@strawberry.input(description="A new key. `expiresIn`: seconds; 0: never.")
class KeyInput:
    user: str
    id: str | None = None
    scopes: list[str] = strawberry.field(default_factory=lambda: ["inference"])
    models: list[str] = strawberry.field(default_factory=lambda: ["*"])
    expires_in: float = 0.0
    use_case: str = ""
    new_user: bool = False
