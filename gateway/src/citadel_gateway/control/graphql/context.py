"""Who asks, and what answering has at hand."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Select
from starlette.requests import HTTPConnection
from strawberry.types import Info as StrawberryInfo

from citadel_gateway.control.auth import actor_for, is_local, state_of
from citadel_gateway.control.graphql.loaders import Loaders
from citadel_gateway.control.lines import Line
from citadel_gateway.control.state import State
from citadel_gateway.control.stored import Actor
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Key, Scope

T = TypeVar("T")
THREADS = 8  # that questions may keep busy with the database at the same time


class Context:
    """One HTTP request, or one WebSocket with all its operations."""

    def __init__(self, connection: HTTPConnection, limiter: CapacityLimiter) -> None:
        self.connection = connection
        self.limiter = limiter
        self.state: State = state_of(connection)
        self.authorization = connection.headers.get("authorization", "")
        self.connection_params: dict[str, Any] | None = None  # set by the protocol's handler
        self.line: Line | None = None
        self.generating = 0  # token streams that are open
        self.quiet = asyncio.Event()  # there is none
        self.quiet.set()
        self.loaders = Loaders(self)

    @property
    def key(self) -> Key:
        """The key as it is now: one that was revoked opens nothing any more, also on an open WebSocket."""
        key = self.state.key(self.authorization, local=is_local(self.connection))
        if key is None:
            raise Refusal(401, "invalid_api_key", "A valid key is needed: Authorization: Bearer KEY")
        return key

    @property
    def token(self) -> str:
        return self.authorization.partition(" ")[2].strip()

    @property
    def user(self) -> str:
        key = self.key
        return key.user or key.id

    @property
    def actor(self) -> Actor:
        return actor_for(self.connection, self.key, "graphql")

    def has(self, *scopes: Scope) -> bool:
        return bool(set(scopes) & set(self.key.scopes))

    def need(self, *scopes: Scope) -> None:
        """Refuse a key that has none of them."""
        if not self.has(*scopes):
            wanted = " or ".join(map(repr, scopes))
            raise Refusal(403, "insufficient_scope", f"This key lacks the scope {wanted}")

    def whose(self, *everybody: Scope) -> str | None:
        """Whose figures are shown: the caller's, or everybody's (None) for these scopes."""
        return None if self.has(*everybody) else self.user

    @contextmanager
    def busy(self) -> Iterator[None]:
        """An answer is being generated; the end of the process waits a moment for it."""
        self.generating += 1
        self.quiet.clear()
        try:
            yield
        finally:
            self.generating -= 1
            if not self.generating:
                self.quiet.set()

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Whatever asks the database: the loop has streams to serve."""
        return await to_thread.run_sync(function, limiter=self.limiter)

    async def rows(self, query: Select[Any]) -> list[Any]:
        def ask() -> list[Any]:
            with self.state.database.read() as connection:
                return list(connection.execute(query))

        return await self.in_thread(ask)


Info = StrawberryInfo[Context, None]
