"""What can be asked."""

from datetime import date
from enum import Enum
from typing import Annotated, Any

import msgspec
import strawberry
from sqlalchemy import and_, or_, select

from citadel_gateway.control import analytics as figures
from citadel_gateway.control import conversations as talks
from citadel_gateway.control import feedback as opinions
from citadel_gateway.control.business import Rules
from citadel_gateway.control.graphql.context import Context, Info
from citadel_gateway.control.graphql.fields import field
from citadel_gateway.control.graphql.limits import MOST_ROWS
from citadel_gateway.control.graphql.measures import Analytics, Metrics
from citadel_gateway.control.graphql.types import (
    Alert,
    Conversation,
    Explanation,
    Feedback,
    Me,
    Model,
    Request,
    RequestPage,
    Tier,
)
from citadel_gateway.control.sql.tables import requests
from citadel_gateway.control.why import explain
from citadel_gateway.errors import Refusal


@strawberry.enum(description="What figures are grouped by.")
class GroupBy(Enum):
    MODEL = "model"
    DAY = "day"
    USE_CASE = "use_case"
    USER = "user"
    OUTCOME = "outcome"


@strawberry.enum(description="Whose opinion it is: the user's own, an administrator's, or that of golden prompts.")
class Source(Enum):
    USER = "user"
    JUDGE = "judge"
    GOLDEN = "golden"


@strawberry.enum(description="Where a conversation stands.")
class ConversationState(Enum):
    OPEN = "open"
    COMPLETED = "completed"
    ABANDONED = "abandoned"


From = Annotated[date | None, strawberry.argument(name="from")]


def rows_of(first: int) -> int:
    if not 1 <= first <= MOST_ROWS:
        raise Refusal(400, "invalid_request", f"first must be between 1 and {MOST_ROWS}")
    return first


def span_of(first: date | None, last: date | None) -> figures.Span:
    try:
        return figures.span_of(first, last)
    except ValueError as error:
        raise Refusal(400, "invalid_request", str(error)) from None


def visible_models(context: Context) -> list[Model]:
    """Those that the key may use; all of them for who looks after them."""
    snapshot = context.state.snapshot
    live = context.state.parts["live"].figures
    key = context.key
    everything = "*" in key.models or context.has("read", "metrics", "admin")
    return [
        Model.of(model, live)
        for model in (snapshot.models if snapshot is not None else ())
        if everything or {model.name, *model.aliases} & set(key.models)
    ]


def cursor_of(text: str) -> tuple[float, str]:
    try:
        at, name = msgspec.json.decode(bytes.fromhex(text), type=tuple[float, str])
    except (ValueError, msgspec.DecodeError):
        raise Refusal(400, "invalid_request", "before: not a cursor of this list") from None
    return at, name


async def request_of(context: Context, request_id: str) -> Request | None:
    """By the gateway's id or the client's own; somebody else's is not there."""
    user = context.user
    everybody = context.has("admin")

    def ask() -> Any:
        with context.state.database.read() as connection:
            found = opinions.find_request(connection, request_id[:128], user, everybody=everybody)
            if found is None:
                return None
            return connection.execute(select(requests).where(requests.c.id == found.id)).first()

    row = await context.in_thread(ask)
    return Request.of(row) if row is not None else None


@strawberry.type
class Query:
    @field("Who you are, and what you may do.")
    async def me(self, info: Info) -> Me:
        key = info.context.key
        return Me(
            user=info.context.user,
            key=key.id,
            scopes=list(key.scopes),
            models=list(key.models),
            expires_at=key.expires,
            tier=Tier.of(info.context.state.tier(info.context.state.user(key))),
        )

    @field("The models that the key may use.")
    async def models(self, info: Info) -> list[Model]:
        info.context.need("inference", "read", "metrics", "admin")
        return visible_models(info.context)

    @field("One model, by its name or an alias.")
    async def model(self, info: Info, name: str) -> Model | None:
        info.context.need("inference", "read", "metrics", "admin")
        return next((one for one in visible_models(info.context) if name in (one.name, *one.aliases)), None)

    @field("The figures of this second; scope read, metrics or admin.")
    async def metrics(self, info: Info) -> Metrics:
        info.context.need("read", "metrics", "admin")
        return Metrics.of(info.context.state.parts["live"].figures)

    @field("What fires, and what was resolved in the last day; scope read, metrics or admin.")
    async def alerts(self, info: Info, first: int = 50) -> list[Alert]:
        info.context.need("read", "metrics", "admin")
        return [Alert.of(one) for one in info.context.state.parts["alerts"].all()[: rows_of(first)]]

    @field("Your own use, of the last seven days if nothing else is said; admin: of all or of a user.")
    async def usage(
        self, info: Info, from_: From = None, to: date | None = None, user: str | None = None,
        group_by: GroupBy = GroupBy.DAY, first: int = MOST_ROWS,
    ) -> list[Analytics]:  # fmt: skip
        info.context.need("inference", "admin")
        mine = info.context.whose("admin")
        if mine is not None and user not in (None, mine):
            raise Refusal(403, "insufficient_scope", "This key lacks the scope 'admin'")
        return await analysed(info.context, span_of(from_, to), group_by, mine or user, first)

    @field("Use, accuracy, satisfaction, cost and value; read and admin: of everybody.")
    async def analytics(
        self, info: Info, from_: From = None, to: date | None = None,
        group_by: GroupBy = GroupBy.MODEL, source: Source | None = None, first: int = MOST_ROWS,
    ) -> list[Analytics]:  # fmt: skip
        info.context.need("inference", "read", "admin")
        if group_by is GroupBy.USER:
            info.context.need("admin")
        user = info.context.whose("read", "admin")
        return await analysed(info.context, span_of(from_, to), group_by, user, first, source)

    @field("Your requests, the newest first; admin: everybody's.")
    async def requests(
        self, info: Info, first: int = 20, before: str | None = None, model: str | None = None, user: str | None = None
    ) -> RequestPage:
        info.context.need("inference", "admin")
        whose = info.context.whose("admin")
        c = requests.c
        query = select(requests).order_by(c.at.desc(), c.id.desc()).limit(rows_of(first) + 1)
        for column, value in ((c.user_id, whose), (c.user_id, user), (c.model, model)):
            if value is not None:
                query = query.where(column == value)
        if before is not None:
            at, name = cursor_of(before)
            query = query.where(or_(c.at < at, and_(c.at == at, c.id < name)))
        rows = await info.context.rows(query)
        last = rows[first - 1] if len(rows) > first else None
        cursor = msgspec.json.encode((last.at, last.id)).hex() if last is not None else None
        return RequestPage(nodes=[Request.of(row) for row in rows[:first]], next=cursor)

    @field("One request, by the id of the reply's x-request-id.")
    async def request(self, info: Info, id: str) -> Request | None:  # noqa: A002  # the argument's name
        info.context.need("inference", "admin")
        return await request_of(info.context, id)

    @field("Why a request went as it did.")
    async def why(self, info: Info, id: str) -> Explanation | None:  # noqa: A002  # the argument's name
        info.context.need("inference", "read", "admin")
        state, user = info.context.state, info.context.whose("admin")
        found = await info.context.in_thread(
            lambda: explain(state.database, state.parts.get("settler"), id[:128], user)
        )
        return Explanation.of(found) if found is not None else None

    @field("Your conversations, the latest first; admin: everybody's.")
    async def conversations(
        self, info: Info, first: int = 20, before: float | None = None, state: ConversationState | None = None
    ) -> list[Conversation]:
        info.context.need("inference", "admin")
        context, user = info.context, info.context.whose("admin")
        wanted: talks.State | None = state.value if state is not None else None
        limit = rows_of(first)
        found = await context.in_thread(
            lambda: talks.listed(context.state.database, user=user, state=wanted, before=before, limit=limit)
        )
        return [Conversation.of(one) for one in found]

    @field("Your feedback, the newest first; admin: everybody's.")
    async def feedback(
        self, info: Info, first: int = 20, before: int | None = None, model: str | None = None
    ) -> list[Feedback]:
        info.context.need("inference", "admin")
        context, user = info.context, info.context.whose("admin")
        limit = rows_of(first)
        found = await context.in_thread(
            lambda: opinions.listed(context.state.database, user=user, model=model, before=before, limit=limit)
        )
        return [Feedback.of(one) for one in found]


async def analysed(
    context: Context, span: figures.Span, group: GroupBy, user: str | None, first: int, source: Source | None = None
) -> list[Analytics]:
    database, rules = context.state.database, Rules.of(context.state.snapshot)
    by: figures.Group = group.value
    whose: opinions.Source | None = source.value if source is not None else None
    limit = rows_of(first)
    rows = await context.in_thread(lambda: figures.analyse(database, rules, span, by, user, whose))
    return [Analytics.of(one) for one in rows[:limit]]
