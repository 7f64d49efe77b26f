"""The control process: a FastAPI application on a Unix socket, one for a host.

It writes the snapshot that the workers serve from, keeps the drain states, and adds the workers' figures up. No
generation request passes through it, and the workers serve on without it. Each subject is a module with a `router`.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from citadel_gateway import __version__
from citadel_gateway.control import models
from citadel_gateway.control.auth import Scoped
from citadel_gateway.control.state import State
from citadel_gateway.errors import error_body
from citadel_gateway.settings import Gateway, engine_key
from citadel_gateway.systemd import notify

log = logging.getLogger("citadel_gateway")

CODES = {401: "invalid_api_key", 403: "insufficient_scope", 404: "not_found", 405: "method_not_allowed"}
ROUTERS = (models.router,)


def make_app(settings: Gateway, internal_key: str) -> FastAPI:
    """The application. `internal_key` opens /internal, which is for the engines of this host and not reachable through
    a worker.
    """
    state = State(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.look()
        task = asyncio.create_task(watch(state))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="Citadel gateway", version=__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    app.state.control = state
    app.state.internal_key = internal_key
    add_errors(app)
    for router in ROUTERS:
        app.include_router(router)

    @app.get("/openapi.json", dependencies=[Depends(Scoped("admin"))], include_in_schema=False)
    def openapi() -> Response:
        return JSONResponse(app.openapi())

    return app


async def watch(state: State) -> None:
    """Twice a second."""
    while True:
        await asyncio.sleep(0.5)
        state.look()


def add_errors(app: FastAPI) -> None:
    """Errors of this process look like those of the workers."""

    def answer(status: int, message: str, headers: Any = None) -> Response:
        code = CODES.get(status, "invalid_request" if status < 500 else "internal_error")
        return Response(error_body(status, code, message), status, headers, "application/json")

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return answer(400, found)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(500, "The gateway's control process failed; its log has the reason")


class ControlServer(uvicorn.Server):
    """uvicorn's server that says READY and ends with status 0 when it is told to stop."""

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


def run_control(settings: Gateway) -> int:
    """Serve on the control socket until told to stop."""
    path = Path(settings.control_socket)
    path.unlink(missing_ok=True)  # left by a process that was killed; there is only one control process
    config = uvicorn.Config(
        make_app(settings, engine_key(settings)),
        uds=str(path),
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    ControlServer(config).run()
    path.unlink(missing_ok=True)
    return 0
