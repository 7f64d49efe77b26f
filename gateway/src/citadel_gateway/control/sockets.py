"""What every WebSocket of the control process has: a key, a place among the long-lived connections, an orderly end.

The key comes in the Authorization header or, from browsers, in the first message: {"type": "auth", "key": "…"}. It is
never taken from the URL, which ends up in logs and histories.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from citadel_gateway.control.auth import is_local, state_of
from citadel_gateway.control.lines import Line, Lines, address_of
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Key

AUTH_SECONDS = 10.0
CLOSE_SECONDS = 2.0
MESSAGE_BYTES = 4 * 1024 * 1024  # the largest message; larger requests go by HTTP
REASON_BYTES = 120  # room that a close frame has
POLICY, RESTART, LATER, GOING = 1008, 1012, 1013, 1001  # RFC 6455, section 7.4, and IANA's list


class Auth(Struct, tag="auth", tag_field="type"):
    """The first message of a browser."""

    key: str


decode_auth = msgspec.json.Decoder(Auth).decode


class Frames(WebSocketsSansIOProtocol):
    """uvicorn's protocol; to who does not read, no pong is sent, because nobody would bound how many there are."""

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def shutdown(self) -> None:
        if self.writable.is_set():
            super().shutdown()
        else:
            self.transport.abort()


class SocketEnd(Exception):  # noqa: N818  # an end that was decided
    """Close with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Socket:
    """One connection, accepted and with a key."""

    line: Line
    key: Key
    token: str

    def __init__(self, websocket: WebSocket, scopes: frozenset[str]) -> None:
        self.websocket = websocket
        self.scopes = scopes
        self.state = state_of(websocket)
        self.lines: Lines = self.state.parts["lines"]

    # begin ----------------------------------------------------------------------------------------------------------
    async def begin(self, held: ExitStack) -> None:
        """The handshake. Raises Refusal."""
        websocket = self.websocket
        if not self.right_origin():
            raise Refusal(403, "origin_not_allowed", "Pages of this origin may not use the gateway")
        authorization = websocket.headers.get("authorization", "")
        if authorization:
            self.use(authorization.partition(" ")[2].strip())
        self.line = held.enter_context(
            self.lines.line(self.key.id if authorization else address_of(websocket), websocket)
        )
        await websocket.accept()
        if not authorization:
            await first(self.first_message(), self.ended())

    async def first_message(self) -> None:
        try:
            first = await asyncio.wait_for(self.receive(), AUTH_SECONDS)
        except TimeoutError:
            raise Refusal(401, "missing_api_key", "No key came in time") from None
        try:
            self.use(decode_auth(first or b"").key.strip())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Refusal(401, "missing_api_key", 'The first message must be {"type":"auth","key":"…"}') from None
        self.lines.belongs(self.line, self.key.id)

    async def ended(self) -> None:
        await self.line.ending.wait()
        raise SocketEnd(RESTART, "restarting")

    def use(self, token: str) -> None:
        self.token = token
        key = self.known()
        if key is None:
            raise Refusal(401, "invalid_api_key", "The key that was given is not known here")
        if not self.scopes & set(key.scopes):
            wanted = " or ".join(map(repr, sorted(self.scopes)))
            raise Refusal(403, "insufficient_scope", f"This key lacks the scope {wanted}")
        self.key = key

    def known(self) -> Key | None:
        """What the token is worth now."""
        printable = self.token.isascii() and self.token.isprintable()
        if not printable:
            return None
        return self.state.key(f"Bearer {self.token}", local=is_local(self.websocket))

    def right_origin(self) -> bool:
        """A page's own origin, or one that the settings name. Programs send none."""
        origin = self.websocket.headers.get("origin")
        allowed = self.state.settings.cors.allow_origins
        if origin is None or "*" in allowed or origin in allowed:
            return True
        return urlsplit(origin).netloc.lower() == self.websocket.headers.get("host", "").lower()

    # use ------------------------------------------------------------------------------------------------------------
    async def receive(self) -> bytes | None:
        """The next message; None when the other side has gone."""
        message = await self.websocket.receive()
        if message["type"] != "websocket.receive":
            return None
        text = message.get("text")
        return text.encode() if text is not None else message.get("bytes") or b""

    async def send(self, data: bytes) -> None:
        """Waits while the other side does not read. Raises WebSocketDisconnect when it has gone."""
        await self.websocket.send({"type": "websocket.send", "text": data.decode()})

    # end ------------------------------------------------------------------------------------------------------------
    async def refuse(self, refusal: Refusal) -> None:
        """As an answer to the handshake if there was none yet, else as a message and a code."""
        websocket = self.websocket
        if websocket.application_state is WebSocketState.CONNECTING:
            headers = [line.partition(b": ") for line in refusal.headers().splitlines()]
            lines = {name.decode(): value.decode() for name, _, value in headers}
            await websocket.send_denial_response(
                Response(refusal.body(), refusal.status, lines, media_type="application/json")
            )
            return
        await self.send(b'{"type":"error",' + refusal.body()[1:])
        await self.close(LATER if refusal.status in (429, 503) else POLICY, refusal.code)

    async def close(self, code: int, reason: str) -> None:
        await self.websocket.close(code, reason.encode()[:REASON_BYTES].decode(errors="ignore"))


async def serve(websocket: WebSocket, scopes: frozenset[str], work: Callable[[Socket], Awaitable[None]]) -> None:
    """One connection from its handshake to its end; `work` ends it by returning or raising SocketEnd."""
    socket = Socket(websocket, scopes)
    with suppress(WebSocketDisconnect), ExitStack() as held:
        last: Coroutine[Any, Any, None]
        try:
            await websocket.receive()  # websocket.connect
            await socket.begin(held)
            await work(socket)
            last = socket.close(1000, "")
        except Refusal as refusal:
            last = socket.refuse(refusal)
        except SocketEnd as end:
            last = socket.close(end.code, end.reason)
        with suppress(TimeoutError):  # of who does not read
            await asyncio.wait_for(last, CLOSE_SECONDS)


async def first(*works: Coroutine[Any, Any, None]) -> None:
    """Run them side by side until one ends; the others are cancelled, and an exception of the ended one is ours."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
