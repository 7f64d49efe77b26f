"""The types of what can be asked for: models, requests, people, alerts, answers."""

from typing import Any

import strawberry

from citadel_gateway.control import conversations as talks
from citadel_gateway.control.alerts import Alert as StoredAlert
from citadel_gateway.control.feedback import Feedback as StoredFeedback
from citadel_gateway.control.figures import Figures
from citadel_gateway.control.graphql.context import Info
from citadel_gateway.control.graphql.fields import field
from citadel_gateway.control.graphql.measures import Analytics, Loose, ModelFigures, Price, days_of, picked
from citadel_gateway.control.ledger import limits_of
from citadel_gateway.settings import Model as Declared
from citadel_gateway.settings import Tier as DeclaredTier


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


@strawberry.type(description="Why a request went as it did, also before it is in the ledger. `whole`: as REST has it.")
class Explanation:
    id: str
    state: str
    model: str
    backend: str
    outcome: str | None
    status: int | None
    story: list[str]
    whole: Loose

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Explanation":
        fields: dict[str, Any] = {
            name: found.get(name) for name in ("id", "state", "model", "backend", "outcome", "status", "story")
        }
        return cls(**fields, whole=found)


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


@strawberry.type(description="A limit of the caller. `used` is null where only the workers know it.")
class Limit:
    name: str
    limit: float
    used: float | None


@strawberry.type(description="The caller.")
class Me:
    user: str
    key: str
    scopes: list[str]
    models: list[str]
    expires_at: float
    tier: Tier

    @field("What the caller has used of each limit.")
    async def limits(self, info: Info) -> list[Limit]:
        context, user = info.context, self.user
        found = await context.in_thread(lambda: limits_of(context.state, user))
        return [Limit(name=name, limit=one.limit, used=one.used) for name, one in found.items()]


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
