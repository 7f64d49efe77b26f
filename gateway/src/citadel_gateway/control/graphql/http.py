"""The two ways in: POST with a body of JSON, and a WebSocket that speaks graphql-transport-ws.

Nothing comes by GET, and no other content type is taken, so that no page of another origin can make a browser ask.
Batches are refused. The size of a body is bounded before it is read.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Request, WebSocket
from fastapi.responses import Response
from graphql import GraphQLError
from msgspec import Struct
from starlette.websockets import WebSocketDisconnect, WebSocketState
from strawberry.asgi import ASGIWebSocketAdapter, GraphQL
from strawberry.exceptions import ConnectionRejectionError
from strawberry.http import process_result
from strawberry.http.exceptions import NonJsonMessageReceived
from strawberry.subscriptions import GRAPHQL_TRANSPORT_WS_PROTOCOL
from strawberry.types import ExecutionResult
from strawberry.types.unset import UNSET, UnsetType

from citadel_gateway.control.auth import Scoped
from citadel_gateway.control.graphql.context import THREADS, Context
from citadel_gateway.control.graphql.faults import shown
from citadel_gateway.control.graphql.limits import nested
from citadel_gateway.control.graphql.persisted import Persisted
from citadel_gateway.control.graphql.schema import VARIABLES_DEPTH, schema
from citadel_gateway.control.lines import Line
from citadel_gateway.control.sockets import RESTART, Socket, first
from citadel_gateway.control.state import State
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Key, Scope

router = APIRouter(tags=["graphql"])

PATH = "/graphql"
BODY_BYTES = 256 * 1024
OPERATIONS = 20  # of one WebSocket at the same time
INIT_SECONDS = 10
QUERY_SECONDS = 30.0
CHAT_SECONDS = 600.0
FINISH_SECONDS = 15.0  # that token streams have when the process ends
DEEPEST = VARIABLES_DEPTH + 5
encode = msgspec.json.Encoder().encode
EVERYBODY: tuple[Scope, ...] = ("inference", "read", "metrics", "admin")


class Posted(Struct, rename="camel"):
    """The body, as the GraphQL over HTTP specification has it."""

    query: str | None = None
    variables: dict[str, Any] | None = None
    operation_name: str | None = None
    extensions: dict[str, Any] | None = None


decode = msgspec.json.Decoder(Posted).decode


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps what questions share."""
    state.parts["persisted"] = Persisted()
    state.parts["graphql_threads"] = CapacityLimiter(THREADS)
    yield


async def read(request: Request) -> Posted:
    """The body, if it is one. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "unsupported_media_type", "Send the query as application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES:
            raise Refusal(413, "request_too_large", f"The body may have {BODY_BYTES} bytes", close=True)
        parts.append(part)
    body = b"".join(parts)
    if body.lstrip()[:1] == b"[":
        raise Refusal(400, "batch_refused", "Send one operation at a time")
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_request", f"The body is no GraphQL request: {error}"[:300]) from None


@router.post(PATH)
async def post(request: Request, key: Annotated[Key, Depends(Scoped(*EVERYBODY))]) -> Response:
    """One query or mutation: {"query", "variables", "operationName", "extensions"}."""
    posted = await read(request)
    answer = asyncio.create_task(execute(context_of(request), posted))
    leaving = asyncio.create_task(gone(request))
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it; a model that is asked is stopped
        return Response(encode(process_result(answer.result())), media_type="application/json")
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def gone(request: Request) -> None:
    """Until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def context_of(connection: Request | WebSocket) -> Context:
    state: State = connection.app.state.control
    return Context(connection, state.parts["graphql_threads"])


async def execute(context: Context, posted: Posted) -> ExecutionResult:
    persisted: Persisted = context.state.parts["persisted"]
    extensions = posted.extensions or {}
    try:
        query = persisted.resolve(posted.query, extensions)
        if not query:
            raise GraphQLError("There is no query", extensions={"code": "bad_request"})
        seconds = CHAT_SECONDS if "chatCompletion" in query else QUERY_SECONDS
        async with asyncio.timeout(seconds):
            result = await schema.execute(
                query,
                variable_values=posted.variables,
                context_value=context,
                operation_name=posted.operation_name,
            )
    except GraphQLError as error:
        return ExecutionResult(data=None, errors=[error])
    except TimeoutError:
        late = Refusal(504, "timeout", "The query has taken too long")
        return ExecutionResult(data=None, errors=[shown(GraphQLError("", original_error=late))])
    except Exception as error:  # an operation that is not there, or of the wrong kind
        return ExecutionResult(data=None, errors=[operation_error(error)])
    if not isinstance(result, ExecutionResult):
        raise TypeError("incremental delivery is not offered")
    if result.data is not None:
        persisted.keep(query, extensions)
    return result


def operation_error(error: Exception) -> GraphQLError:
    """Strawberry's own words for an operation that cannot be chosen, as an answer."""
    if hasattr(error, "as_http_error_reason"):
        reason = "Subscriptions need a WebSocket, and operationName must name an operation of the query"
        return GraphQLError(reason, extensions={"code": "bad_request"})
    raise error


# WebSocket ------------------------------------------------------------------------------------------------------------
class Adapter(ASGIWebSocketAdapter):
    """Messages are bounded in size and depth before anybody looks at them."""

    async def iter_json(self, *, ignore_parsing_errors: bool = False) -> AsyncGenerator[object, None]:
        while self.ws.application_state != WebSocketState.DISCONNECTED:
            try:
                text = await self.ws.receive_text()
            except (WebSocketDisconnect, KeyError):
                return
            if len(text) > BODY_BYTES:
                await self.close(1009, "The message is too large")
                return
            try:
                message = msgspec.json.decode(text)
            except (msgspec.DecodeError, RecursionError) as error:
                raise NonJsonMessageReceived from error
            if nested(message, DEEPEST) or not isinstance(message, dict):
                raise NonJsonMessageReceived
            yield well_formed(message)

    async def send_json(self, message: Mapping[str, object]) -> None:
        if self.ws.application_state is not WebSocketState.DISCONNECTED:
            await super().send_json(message)


def well_formed(message: dict[str, Any]) -> dict[str, Any]:
    """What the protocol's handler takes for granted about a message."""
    fine = isinstance(message.get("id", ""), str)
    if message.get("type") == "subscribe":
        payload = message.get("payload")
        fine = fine and isinstance(payload, dict) and isinstance(payload.get("query"), str)
        fine = fine and isinstance(payload.get("variables"), dict | None)  # type: ignore[union-attr]  # a dict by now
    if not fine:
        raise NonJsonMessageReceived
    return message


class View(GraphQL[Context, None]):
    """Strawberry's handler of graphql-transport-ws, with our keys."""

    websocket_adapter_class = Adapter

    def __init__(self) -> None:
        super().__init__(
            schema,
            graphql_ide=None,
            allow_queries_via_get=False,
            subscription_protocols=(GRAPHQL_TRANSPORT_WS_PROTOCOL,),
            connection_init_wait_timeout=timedelta(seconds=INIT_SECONDS),
            max_subscriptions_per_connection=OPERATIONS,
            allowed_origins=("*",),  # looked at before, by the settings
        )

    async def on_ws_connect(self, context: Context) -> UnsetType | dict[str, object] | None:
        """The key of the payload of connection_init, where no header can be sent: {"Authorization": "Bearer KEY"}."""
        payload = context.connection_params or {}
        given = payload.get("Authorization", payload.get("authorization"))
        if isinstance(given, str):
            context.authorization = given
        try:
            context.need(*EVERYBODY)
            if context.line is not None:
                context.state.parts["lines"].belongs(context.line, context.key.id)
        except Refusal as error:
            raise ConnectionRejectionError from error
        nothing: UnsetType = UNSET  # acknowledged without a payload
        return nothing


@router.websocket(PATH)
async def websocket(socket: WebSocket) -> None:
    """Queries, mutations and subscriptions over one connection."""
    guard = Socket(socket, frozenset())
    with ExitStack() as held:
        try:
            if not guard.right_origin():
                raise Refusal(403, "origin_not_allowed", "Pages of this origin may not use the gateway")
            line = held.enter_context(guard.lines.line("", socket))
        except Refusal as refusal:
            await guard.refuse(refusal)
            return
        context = context_of(socket)
        context.line = line
        await first(speak(socket, context), farewell(socket, context, line))


async def speak(socket: WebSocket, context: Context) -> None:
    view = View()
    await view.run(socket, context=context, root_value=None)


async def farewell(socket: WebSocket, context: Context, line: Line) -> None:
    """When the process is to stop: answers that are being generated have a moment to end, the rest is over."""
    await line.ending.wait()
    with suppress(TimeoutError):
        await asyncio.wait_for(context.quiet.wait(), FINISH_SECONDS)
    if socket.application_state is WebSocketState.CONNECTED:
        await socket.close(RESTART, "restarting")
