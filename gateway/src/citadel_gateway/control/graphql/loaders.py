"""What many objects of one answer need from the database is asked for once, not once for each of them."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import and_, or_, select
from strawberry.dataloader import DataLoader

from citadel_gateway.control.analytics import Analytics, analyse, span_of
from citadel_gateway.control.business import Rules
from citadel_gateway.control.feedback import Feedback, one_of
from citadel_gateway.control.sql.tables import conversations, feedback, requests

if TYPE_CHECKING:
    from citadel_gateway.control.graphql.context import Context

K = TypeVar("K")
V = TypeVar("V")
Days = tuple[str, int]  # model, days back
Talk = tuple[str, str]  # user, session


class Loader(DataLoader[K, V], Generic[K, V]):
    """One that forgets: over a WebSocket the same context answers many questions, each from now."""

    def __init__(self, load: Callable[[Sequence[K]], Awaitable[Sequence[V]]]) -> None:
        super().__init__(load, cache=False)


class Loaders:
    """Those of one context. What the caller may see is decided where they are used."""

    def __init__(self, context: "Context") -> None:
        self.context = context
        self.analytics: Loader[Days, Analytics] = Loader(self.load_analytics)
        self.feedback: Loader[str, list[Feedback]] = Loader(self.load_feedback)
        self.requests: Loader[str, Any] = Loader(self.load_requests)
        self.conversations: Loader[Talk, Any] = Loader(self.load_conversations)

    async def load_analytics(self, keys: Sequence[Days]) -> list[Analytics]:
        """One question for all models of each span."""
        context = self.context
        user = context.whose("read", "admin")
        rules = Rules.of(context.state.snapshot)
        today = datetime.now(UTC).date()
        found: dict[int, dict[str, Analytics]] = {}
        for days in {days for _, days in keys}:
            span = span_of(today - timedelta(days=days - 1), today)
            rows = await context.in_thread(
                lambda span=span: analyse(context.state.database, rules, span, "model", user)  # type: ignore[misc]  # bound
            )
            found[days] = {row.group: row for row in rows}
        return [found[days].get(model) or Analytics(group=model) for model, days in keys]

    async def load_feedback(self, ids: Sequence[str]) -> list[list[Feedback]]:
        query = select(feedback).where(feedback.c.request.in_(set(ids))).order_by(feedback.c.id)
        found: dict[str, list[Feedback]] = {}
        for row in await self.context.rows(query):
            found.setdefault(row.request, []).append(one_of(row))
        return [found.get(one, []) for one in ids]

    async def load_requests(self, ids: Sequence[str]) -> list[Any]:
        rows = await self.context.rows(select(requests).where(requests.c.id.in_(set(ids))))
        found = {row.id: row for row in rows}
        return [found.get(one) for one in ids]

    async def load_conversations(self, keys: Sequence[Talk]) -> list[Any]:
        c = conversations.c
        wanted = or_(*(and_(c.user_id == user, c.session == session) for user, session in set(keys)))
        found = {
            (row.user_id, row.session): row for row in await self.context.rows(select(conversations).where(wanted))
        }
        return [found.get(one) for one in keys]
