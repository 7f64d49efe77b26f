"""WebSocket chat: many requests over one connection.

Each request is an ordinary HTTP request to a worker with the caller's key, so it has the same limits, the same queue
and the same place in the ledger. Nothing is queued between the two: while the client does not read, the replies are not
read either, and the engine waits as it does for any slow reader. The protocol is in docs/gateway.md.
"""

import asyncio
import logging
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, WebSocket
from fastapi.responses import Response
from msgspec import Meta, Struct
from starlette.websockets import WebSocketDisconnect

from citadel_gateway.control.auth import state_of
from citadel_gateway.control.client import Client, Reply, Unreachable
from citadel_gateway.control.lines import Changes
from citadel_gateway.control.sockets import GOING, MESSAGE_BYTES, POLICY, RESTART, Socket, SocketEnd, first, serve
from citadel_gateway.errors import error_body

log = logging.getLogger("citadel_gateway")
router = APIRouter()
encode = msgspec.json.Encoder().encode

AT_ONCE = 32  # requests of one connection
IDLE_SECONDS = 900.0  # without a request or a message
SCOPES = frozenset(("inference",))
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
OURS = ("x-citadel-", "x-forwarded-", "x-real-ip", "x-api-key")  # headers that a request may not bring

Id = Annotated[str, Meta(min_length=1, max_length=128)]
HeaderName = Annotated[str, Meta(pattern=r"^[xX]-[A-Za-z0-9-]{1,62}$")]
HeaderValue = Annotated[str, Meta(max_length=1024, pattern=r"^[\x20-\x7e]*$")]


class Begin(Struct, tag="request", tag_field="type"):
    """`body`: that of the HTTP request, passed on byte for byte. `headers`: those that begin with X-."""

    id: Id
    body: msgspec.Raw
    endpoint: Literal["chat", "completions", "embeddings", "responses", "messages"] = "chat"
    headers: Annotated[dict[HeaderName, HeaderValue], Meta(max_length=16)] = {}


class Cancel(Struct, tag="cancel", tag_field="type"):
    id: Id


class Ping(Struct, tag="ping", tag_field="type"):
    data: Annotated[str, Meta(max_length=1024)] = ""


class Again(Struct, tag="auth", tag_field="type"):
    """Sent by clients that always begin so, also with a key in the header."""

    key: str


decode = msgspec.json.Decoder(Begin | Cancel | Ping | Again).decode


class Chat:
    """One connection."""

    def __init__(self, socket: Socket, client: Client) -> None:
        self.socket = socket
        self.client = client
        self.running: dict[str, asyncio.Task[None]] = {}
        self.ended = Changes()  # a request has ended
        self.last = asyncio.get_running_loop().time()

    async def run(self) -> None:
        await self.tell("ready", requests=AT_ONCE, message_bytes=MESSAGE_BYTES)
        try:
            await first(self.listen(), self.finish(), self.idle())
        finally:
            for task in self.running.values():
                task.cancel()
            await asyncio.gather(*self.running.values(), return_exceptions=True)

    async def tell(self, kind: str, **more: object) -> None:
        await self.socket.send(encode({"type": kind, **more}))

    # what the client says -------------------------------------------------------------------------------------------
    async def listen(self) -> None:
        while (data := await self.socket.receive()) is not None:
            self.last = asyncio.get_running_loop().time()
            try:
                message = decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                await self.wrong(None, 400, "invalid_message", f"The message cannot be understood: {error}")
                continue
            if isinstance(message, Begin):
                await self.begin(message)
            elif isinstance(message, Cancel):
                await self.cancel(message.id)
            elif isinstance(message, Ping):
                await self.tell("pong", data=message.data)

    async def begin(self, message: Begin) -> None:
        if self.socket.line.ending.is_set():
            await self.wrong(message.id, 503, "restarting", "This connection is about to end: open another one")
        elif self.socket.known() is None:
            await self.wrong(message.id, 401, "invalid_api_key", "The key is not valid any more")
            raise SocketEnd(POLICY, "invalid_api_key")
        elif message.id in self.running:
            await self.wrong(None, 409, "id_in_use", f"A request with the id {message.id!r} is running")
        elif len(self.running) >= AT_ONCE:
            text = f"A connection may have {AT_ONCE} requests at the same time"
            await self.wrong(message.id, 429, "too_many_requests", text)
        elif any(name.lower().startswith(OURS) for name in message.headers):
            await self.wrong(message.id, 400, "invalid_header", "One of the headers cannot be sent by a client")
        else:
            task = asyncio.create_task(self.answer(message))
            self.running[message.id] = task
            task.add_done_callback(lambda done: self.over(message.id, done))

    def over(self, name: str, task: "asyncio.Task[None]") -> None:
        if self.running.get(name) is task:
            del self.running[name]
        self.last = asyncio.get_running_loop().time()
        self.ended.tell()
        if not task.cancelled():
            task.exception()  # of somebody who has gone; the others were told

    async def cancel(self, name: str) -> None:
        """One that is over already is no error: the two may have crossed."""
        task = self.running.pop(name, None)
        if task is not None and task.cancel():
            await asyncio.gather(task, return_exceptions=True)
            if task.cancelled():
                await self.tell("cancelled", id=name)

    async def wrong(self, name: str | None, status: int, code: str, message: str) -> None:
        await self.failed(name, status, error_body(status, code, message))

    async def failed(self, name: str | None, status: int, body: bytes, retry_after: str = "") -> None:
        """The end of a request as an error of OpenAI's shape; without an id of a message that was none."""
        head: dict[str, object] = {"type": "error", "status": status}
        if name is not None:
            head["id"] = name
        if retry_after.isdecimal():
            head["retry_after"] = int(retry_after)
        await self.socket.send(encode(head)[:-1] + b"," + body[1:])

    # one request ----------------------------------------------------------------------------------------------------
    async def answer(self, message: Begin) -> None:
        """Ends with exactly one of response, done, error (or cancelled, told by `cancel`)."""
        path, key = PATHS[message.endpoint], self.socket.token
        try:
            async with self.client.ask("POST", path, key, bytes(message.body), message.headers) as reply:
                if reply.is_stream:
                    await self.stream(message.id, reply)
                else:
                    await self.whole(message.id, reply)
        except Unreachable as error:
            await self.failed(message.id, 503, error.body())
        except WebSocketDisconnect:
            return  # `listen` hears of it too
        except Exception:
            log.exception("a request of a WebSocket failed")
            await self.wrong(message.id, 500, "internal_error", "The gateway's control process failed")

    async def whole(self, name: str, reply: Reply) -> None:
        body = await reply.body()
        if reply.status >= 400 and body[:1] == b"{":
            await self.failed(name, reply.status, body, reply.headers.get("retry-after", ""))
            return
        head = {"type": "response", "id": name, "status": reply.status, "request_id": reply.request_id}
        await self.socket.send(encode(head)[:-1] + b',"data":' + (body or b"null") + b"}")

    async def stream(self, name: str, reply: Reply) -> None:
        await self.tell("started", id=name, request_id=reply.request_id, model=reply.headers.get("x-citadel-model", ""))
        prefix = encode({"type": "event", "id": name})[:-1]
        async for event in reply.events():
            kind, data = parsed(event)
            if data == b"[DONE]":
                break
            if data.startswith(b'{"error"') and kind is None:
                await self.failed(name, 502, data)
                return
            if data[:1] == b"{":
                named = b',"event":' + encode(kind) if kind is not None else b""
                await self.socket.send(prefix + named + b',"data":' + data + b"}")
        await self.tell("done", id=name)

    # the end --------------------------------------------------------------------------------------------------------
    async def finish(self) -> None:
        """When the worker or this process is about to stop: no new requests, those that run go on to their end."""
        await self.socket.line.ending.wait()
        await self.tell("draining")
        while self.running:
            await self.ended.after(self.ended.version)
        raise SocketEnd(RESTART, "restarting")

    async def idle(self) -> None:
        while True:
            left = self.last + IDLE_SECONDS - asyncio.get_running_loop().time()
            if left <= 0 and not self.running:
                raise SocketEnd(GOING, "idle")
            await asyncio.sleep(max(left, 1.0))


def parsed(event: bytes) -> tuple[str | None, bytes]:
    """The name (of /v1/messages and /v1/responses) and the data of a server-sent event."""
    kind, data = None, []
    for line in event.splitlines():
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            kind = value.decode("latin-1")
    return kind, b"\n".join(data)


@router.websocket("/v1/ws/chat")
async def chat(websocket: WebSocket) -> None:
    """See the docs for the protocol."""
    client: Client = state_of(websocket).parts["client"]

    async def work(socket: Socket) -> None:
        await Chat(socket, client).run()

    await serve(websocket, SCOPES, work)


@router.get("/v1/ws/chat", include_in_schema=False)
async def no_socket() -> Response:
    """A browser or a curl that came without an Upgrade."""
    body = error_body(426, "upgrade_required", "This is a WebSocket: connect with ws:// or wss://")
    return Response(body, 426, {"upgrade": "websocket"}, "application/json")
