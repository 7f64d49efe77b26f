"""What can be followed over a WebSocket (graphql-transport-ws). A slow reader skips figures and is never queued for."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

import strawberry

from citadel_gateway.control.alerts import Alerts
from citadel_gateway.control.graphql import chat
from citadel_gateway.control.graphql.context import Context, Info
from citadel_gateway.control.graphql.fields import subscription
from citadel_gateway.control.graphql.inputs import ChatInput
from citadel_gateway.control.graphql.measures import Metrics
from citadel_gateway.control.graphql.types import Alert, Token
from citadel_gateway.control.live import Live
from citadel_gateway.errors import Refusal

T = TypeVar("T")
LOOK_SECONDS = 1.0  # how often a subscription that has no news looks whether its key still counts
INTERVALS = (1.0, 60.0)


async def while_allowed(context: Context, source: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The source's items until the connection is to end; raises when the key opens nothing any more."""
    news = asyncio.ensure_future(anext(source))
    try:
        while context.line is None or not context.line.ending.is_set():
            await asyncio.wait((news,), timeout=LOOK_SECONDS)
            context.need("read", "metrics", "admin")
            if news.done():
                item = news.result()
                news = asyncio.ensure_future(anext(source))
                yield item
    finally:
        news.cancel()
        await asyncio.gather(news, return_exceptions=True)


@strawberry.type
class Subscription:
    @subscription("The figures, every second or less often; scope read, metrics or admin.")
    async def metrics(self, info: Info, interval: float = 1.0) -> AsyncGenerator[Metrics, None]:
        info.context.need("read", "metrics", "admin")
        if not INTERVALS[0] <= interval <= INTERVALS[1]:
            raise Refusal(400, "invalid_request", f"interval must be between {INTERVALS[0]} and {INTERVALS[1]}")
        live: Live = info.context.state.parts["live"]
        due = 0.0
        async with aclosing(while_allowed(info.context, live.updates())) as updates:
            async for figures in updates:
                if figures["at"] >= due:
                    due = figures["at"] + interval - 0.5
                    yield Metrics.of(figures)

    @subscription("What fires now, then each change; scope read, metrics or admin.")
    async def alerts(self, info: Info) -> AsyncGenerator[Alert, None]:
        info.context.need("read", "metrics", "admin")
        alerts: Alerts = info.context.state.parts["alerts"]
        async with aclosing(while_allowed(info.context, alerts.updates())) as updates:
            for alert in alerts.all():
                if alert.status == "firing":
                    yield Alert.of(alert)
            async for alert in updates:
                yield Alert.of(alert)

    @subscription("An answer while it is generated. Leaving it stops the model.")
    async def tokens(self, info: Info, input: ChatInput) -> AsyncGenerator[Token, None]:  # noqa: A002  # the argument
        info.context.need("inference")
        with info.context.busy():
            async with aclosing(chat.stream(info.context, input)) as tokens:
                async for token in tokens:
                    yield token
