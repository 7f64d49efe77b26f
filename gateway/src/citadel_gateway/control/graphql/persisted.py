"""Persisted queries, as Apollo's clients send them (APQ): the hash of a query instead of its text.

The first client that sends a hash alone is told that it is not known, and sends hash and text; from then on the hash
is enough, for everybody. What is kept is bounded, and a hash that was dropped is asked for again. A hash opens nothing:
what it stands for is measured, validated and authorised as if the text had been sent.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from graphql import GraphQLError

KEPT = 1000
KEPT_BYTES = 4 * 1024 * 1024


class NotFound(GraphQLError):  # noqa: N818  # part of the protocol: the client sends the text then
    """The two names are those that Apollo's clients look for."""

    def __init__(self) -> None:
        super().__init__("PersistedQueryNotFound", extensions={"code": "PERSISTED_QUERY_NOT_FOUND"})


class Persisted:
    """Queries by their SHA-256; the one that was not used for longest is dropped first."""

    def __init__(self, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self.kept = kept
        self.kept_bytes = kept_bytes
        self.queries: OrderedDict[str, str] = OrderedDict()
        self.bytes = 0

    def resolve(self, query: str | None, extensions: Mapping[str, Any]) -> str | None:
        """The text to execute. Raises `NotFound`, and `GraphQLError` for a hash that is not that of its query."""
        asked = extensions.get("persistedQuery")
        if asked is None:
            return query
        digest = asked.get("sha256Hash") if isinstance(asked, dict) and asked.get("version") == 1 else None
        if not isinstance(digest, str):
            raise GraphQLError(
                "extensions.persistedQuery must be {version: 1, sha256Hash}", extensions={"code": "bad_request"}
            )
        if query is None:
            found = self.queries.get(digest)
            if found is None:
                raise NotFound
            self.queries.move_to_end(digest)
            return found
        if hashlib.sha256(query.encode()).hexdigest() != digest:
            raise GraphQLError("sha256Hash is not the hash of the query", extensions={"code": "bad_request"})
        return query

    def keep(self, query: str, extensions: Mapping[str, Any]) -> None:
        """Remember a query that has proved to be valid; only those, so that nobody fills the store with rubbish."""
        asked = extensions.get("persistedQuery")
        if asked is None or asked["sha256Hash"] in self.queries:
            return
        self.queries[asked["sha256Hash"]] = query
        self.bytes += len(query)
        while len(self.queries) > self.kept or self.bytes > self.kept_bytes:
            _, dropped = self.queries.popitem(last=False)
            self.bytes -= len(dropped)
