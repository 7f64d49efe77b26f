"""A client of this host's workers, for everything in the control process that generates.

It asks with the caller's own key, so that limits, routing and the ledger have one way in. A reply is read event by
event; closing one that is not at its end closes the connection, which the worker takes as a client that has gone: the
engine stops within 100 ms.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from io import BytesIO
from types import TracebackType
from typing import Self

import aiohttp

from citadel_gateway.control.state import State
from citadel_gateway.errors import error_body
from citadel_gateway.settings import Gateway

CONNECTIONS = 2048  # of the whole control process to its workers
EVENT_BYTES = 16 * 1024 * 1024
REPLY_BYTES = 64 * 1024 * 1024
BLANKS = (b"\n\n", b"\r\n\r\n")
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104  # read, not bound


class Unreachable(Exception):  # noqa: N818  # a state of the host, reported to the client
    """No worker took the request, or the reply broke off."""

    def body(self) -> bytes:
        return error_body(503, "gateway_unavailable", "No worker of the gateway can be reached at the moment")


class Reply:
    """A worker's answer while it comes in."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == "text/event-stream"

    async def body(self, limit: int = REPLY_BYTES) -> bytes:
        """The whole body; `Unreachable` when it breaks off or is larger than `limit`."""
        parts, size = [], 0
        async for part in self.parts():
            size += len(part)
            if size > limit:
                raise Unreachable("the reply is too large")
            parts.append(part)
        return b"".join(parts)

    async def events(self) -> AsyncIterator[bytes]:
        """Whole server-sent events, byte for byte, each with the blank line that ends it."""
        held = b""
        async for part in self.parts():
            held += part
            start = 0
            while (end := end_of_event(held, start)) > 0:
                yield held[start:end]
                start = end
            held = held[start:]
            if len(held) > EVENT_BYTES:
                raise Unreachable("an event is too large")
        if held:
            yield held

    async def parts(self) -> AsyncIterator[bytes]:
        try:
            while part := await self.response.content.readany():
                yield part
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(str(error)) from None

    def close(self) -> None:
        """Whatever is still to come is not wanted: the worker and the engine are told by the closed connection."""
        self.response.close()


class Client:
    """Connections to the workers of one host. Made outside a loop, used in one."""

    def __init__(self, url: str, seconds: float | None = None) -> None:
        """`seconds`: for a whole request; without them the other side's limits hold."""
        self.url = url
        self.seconds = seconds
        self.session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, settings: Gateway) -> Self:
        address = EVERYWHERE.get(settings.listen.address, settings.listen.address)
        host = f"[{address}]" if ":" in address else address
        return cls(f"http://{host}:{settings.listen.port}")

    def opened(self) -> aiohttp.ClientSession:
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=self.seconds, sock_connect=5),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
            )
        return self.session

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        key: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Reply]:
        """One request with this key. The reply is closed at the end of the block, read or not."""
        lines = {**(headers or {}), "Authorization": f"Bearer {key}"}
        if body is not None:
            lines["Content-Length"] = str(len(body))
            lines["Content-Type"] = "application/json"
        try:
            response = await self.opened().request(
                method, f"{self.url}{path}", data=in_pieces(body), headers=lines, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(str(error)) from None
        reply = Reply(response)
        try:
            yield reply
        finally:
            reply.close()

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()
            self.session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def in_pieces(body: bytes | None) -> BytesIO | None:
    """A large body is handed over bit by bit, so that the loop has time for others."""
    return None if body is None else BytesIO(body)


def end_of_event(data: bytes, start: int = 0) -> int:
    """Where the first whole event of `data[start:]` ends, or -1."""
    ends = [found + len(blank) for blank in BLANKS if (found := data.find(blank, start)) >= 0]
    return min(ends) if ends else -1


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps `parts["client"]`, for all subjects that generate."""
    async with Client.of(state.settings) as client:
        state.parts["client"] = client
        yield
