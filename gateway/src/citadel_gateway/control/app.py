"""The control process: a FastAPI application on a Unix socket, one for a host.

It writes the snapshot that the workers serve from, keeps the drain states, and adds the workers' figures up. No
generation request passes through it, and the workers serve on without it.

Each subject is a module of its own. What it has of these two is named in one line each here:

    router = APIRouter()               # its paths, in ROUTERS

    @asynccontextmanager               # entered before the first request, left after the last, in LIFESPANS
    async def lifespan(state: State) -> AsyncIterator[None]: ...

A lifespan is entered when the snapshot is there; it may register `state.every(seconds, function)` and
`state.subscribe(listener)`. Handlers that ask the database are plain functions (they run in threads); `Refusal` and
`DatabaseAwayError` become answers of the right shape by themselves. `Admin`, `Control` and `Scoped` of `auth` are the
dependencies; a subject that others need keeps its object in `state.parts["name"]`.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from citadel_gateway import __version__
from citadel_gateway.control import (
    admin,
    alerts,
    analytics,
    chat,
    client,
    conversations,
    engines,
    evaluate,
    feedback,
    ledger,
    lines,
    live,
    models,
    quality,
    resume,
    streams,
    why,
)
from citadel_gateway.control.auth import Scoped
from citadel_gateway.control.graphql import http as graphql
from citadel_gateway.control.sockets import MESSAGE_BYTES, Frames
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.control.state import LOOK_SECONDS, State
from citadel_gateway.errors import Refusal, error_body
from citadel_gateway.keys import key_in_url
from citadel_gateway.settings import Gateway, engine_key
from citadel_gateway.systemd import notify

log = logging.getLogger("citadel_gateway")

CODES = {401: "invalid_api_key", 403: "insufficient_scope", 404: "not_found", 405: "method_not_allowed"}
DRAIN_SECONDS = 20  # less than the unit's TimeoutStopSec
ROUTERS = (
    models.router,
    admin.router,
    alerts.router,
    chat.router,
    engines.router,
    live.router,
    resume.router,
    streams.router,
    analytics.router,
    conversations.router,
    evaluate.router,
    feedback.router,
    graphql.router,
    ledger.router,
    why.router,
)
LIFESPANS: tuple[Callable[[State], AbstractAsyncContextManager[None]], ...] = (
    lines.lifespan,
    client.lifespan,
    alerts.lifespan,
    live.lifespan,
    resume.lifespan,
    quality.lifespan,
    graphql.lifespan,
    ledger.lifespan,
)


class ErrorEntry(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorEntry


def make_app(settings: Gateway, internal_key: str) -> FastAPI:
    """The application. `internal_key` opens /internal, which is for the engines of this host and not reachable through
    a worker.
    """
    state = State(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.look()
        state.every(LOOK_SECONDS, state.look)
        state.every(LOOK_SECONDS, state.poll)
        async with AsyncExitStack() as stack:
            for part in LIFESPANS:
                await stack.enter_async_context(part(state))
            yield
        await state.close()

    app = FastAPI(
        title="Citadel gateway",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses={
            "default": {"model": ErrorBody, "description": "Refused or failed, in the shape of OpenAI's errors"}
        },
    )
    app.state.control = state
    app.state.internal_key = internal_key
    app.add_middleware(NoKeyInUrl)
    add_errors(app)
    for router in ROUTERS:
        app.include_router(router)

    @app.get("/openapi.json", dependencies=[Depends(Scoped("admin"))], include_in_schema=False)
    def openapi() -> Response:
        return JSONResponse(app.openapi())

    return app


class NoKeyInUrl:
    """Refuses what a worker would have refused already; for what comes over the socket itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and key_in_url(scope["raw_path"] + b"?" + scope["query_string"]):
            message = "A key in the URL ends up in logs: send it as Authorization: Bearer KEY"
            await Response(error_body(400, "key_in_url", message), 400, None, "application/json")(scope, receive, send)
            return
        await self.app(scope, receive, send)


def add_errors(app: FastAPI) -> None:
    """Errors of this process look like those of the workers."""

    def answer(status: int, message: str, headers: Any = None) -> Response:
        code = CODES.get(status, "invalid_request" if status < 500 else "internal_error")
        return Response(error_body(status, code, message), status, headers, "application/json")

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Refusal)
    async def decided(request: Request, refusal: Refusal) -> Response:
        lines = (line.partition(": ") for line in refusal.headers().decode().splitlines())
        headers = {name: value for name, _, value in lines}
        return Response(refusal.body(), refusal.status, headers, "application/json")

    @app.exception_handler(DatabaseAwayError)
    async def away(request: Request, error: DatabaseAwayError) -> Response:
        body = error_body(503, "database_unavailable", "The gateway's database does not answer; nothing was changed")
        return Response(body, 503, {"Retry-After": "2"}, "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return answer(400, found)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(500, "The gateway's control process failed; its log has the reason")


class ControlServer(uvicorn.Server):
    """uvicorn's server that says READY and ends with status 0 when it is told to stop."""

    def __init__(self, app: FastAPI) -> None:
        state: State = app.state.control
        super().__init__(
            uvicorn.Config(
                app,
                uds=state.settings.control_socket,
                log_config=None,
                log_level="warning",  # uvicorn would write down the address of each WebSocket, query and all
                access_log=False,
                ws=Frames,
                ws_max_size=MESSAGE_BYTES,
                ws_ping_interval=20,
                ws_ping_timeout=60,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=5,
            )
        )
        self.parts = state.parts

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        notify("STOPPING=1")
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        notify("READY=1", "STATUS=serving")
        log.info("control is ready on %s", self.config.uds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Those who are connected for long end what they are doing and are sent away; then the rest."""
        await self.parts["lines"].drain(DRAIN_SECONDS)
        await super().shutdown(sockets)


def run_control(settings: Gateway) -> int:
    """Serve on the control socket until told to stop."""
    path = Path(settings.control_socket)
    path.unlink(missing_ok=True)  # left by a process that was killed; there is only one control process
    ControlServer(make_app(settings, engine_key(settings))).run()
    path.unlink(missing_ok=True)
    return 0
