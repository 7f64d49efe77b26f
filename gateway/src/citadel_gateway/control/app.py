"""The control process: a FastAPI application on a Unix socket, one for a host.

It writes the snapshot that the workers serve from, keeps the drain states, and adds the workers' figures up. No
generation request passes through it, and the workers serve on without it.
"""

import asyncio
import hashlib
import hmac
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from citadel_gateway import __version__
from citadel_gateway.errors import error_body
from citadel_gateway.metrics import fresh, merged_gauges, read_reports, render
from citadel_gateway.settings import ConfigError, Gateway, Key, Scope, engine_key
from citadel_gateway.snapshot import Reasons, Snapshot, load_reasons, merge, save_reasons, stamp, write
from citadel_gateway.systemd import notify

log = logging.getLogger("citadel_gateway")

Reason = Literal["engine", "operator"]
CODES = {401: "invalid_api_key", 403: "insufficient_scope", 404: "not_found", 405: "method_not_allowed"}


class State:
    """The files as they were last found, the drain states, and the snapshot made of both."""

    def __init__(self, settings: Gateway) -> None:
        self.settings = settings
        self.files = (Path(settings.models_file), Path(settings.keys_file))
        self.seen: tuple[object, ...] = ()
        self.reasons: Reasons = load_reasons(settings)
        self.snapshot: Snapshot | None = None
        self.problem = ""

    def look(self) -> bool:
        """Write a new snapshot if a file has changed. One that cannot be used changes nothing, and is reported once."""
        now = tuple(stamp(path) for path in self.files)
        if now == self.seen and self.snapshot is not None:
            return False
        self.seen = now
        try:
            self.publish()
        except (ConfigError, OSError) as error:
            if str(error) != self.problem:
                log.error("the workers keep what they have: %s", error)
            self.problem = str(error)
            return False
        self.problem = ""
        return True

    def publish(self) -> None:
        snapshot = merge(self.settings, self.reasons)
        write(self.settings, snapshot)
        self.snapshot = snapshot

    def find(self, name: str) -> str | None:
        """The model's own name for a name or an alias."""
        for model in self.snapshot.models if self.snapshot is not None else ():
            if name == model.name or name in model.aliases:
                return model.name
        return None

    def change(self, model: str, reason: Reason, *, drain: bool) -> bool:
        """Drain or resume for one reason; whether the model is draining now. Kept on disk before anybody acts on it."""
        reasons = set(self.reasons.get(model, ()))
        (reasons.add if drain else reasons.discard)(reason)
        changed = {name: why for name, why in self.reasons.items() if name != model}
        if reasons:
            changed[model] = sorted(reasons)
        if changed != self.reasons:
            save_reasons(self.settings, changed)
            self.reasons = changed
            self.publish()
            log.warning("model %s: %s by %s", model, "drain" if drain else "resume", reason)
        return bool(reasons)

    def key(self, authorization: str) -> Key | None:
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or self.snapshot is None:
            return None
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        return next((key for key in self.snapshot.keys if key.sha256 == digest), None)


class Drained(BaseModel):
    """Answer to drain and resume."""

    model: str
    draining: bool


class ModelState(BaseModel):
    """One model as the operator sees it."""

    name: str
    aliases: list[str]
    context: int
    draining: list[str]
    inflight: int
    backends: dict[str, bool]


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
    add_errors(app)

    def scoped(scope: Scope) -> Callable[[Request], Key]:
        def check(request: Request) -> Key:
            key = state.key(request.headers.get("authorization", ""))
            if key is None:
                raise HTTPException(401, "A key is needed: Authorization: Bearer KEY")
            if scope not in key.scopes:
                raise HTTPException(403, f"This key lacks the scope {scope!r}")
            return key

        return check

    def is_engine(request: Request) -> None:
        if "x-citadel-worker" in request.headers:
            raise HTTPException(404, "Not Found")
        sent = request.headers.get("authorization", "")
        if not hmac.compare_digest(sent.encode(), f"Bearer {internal_key}".encode()):
            raise HTTPException(401, "The key of this host's engines is needed")

    def known(name: str) -> str:
        model = state.find(name)
        if model is None:
            raise HTTPException(404, f"The model {name[:128]!r} does not exist")
        return model

    @app.get("/metrics", dependencies=[Depends(scoped("metrics"))], response_class=PlainTextResponse, tags=["metrics"])
    def metrics() -> Response:
        """All workers of this host on one page (Prometheus text format). Runs in a thread and never on a worker."""
        names = state.snapshot.models if state.snapshot is not None else ()
        draining = {model.name: bool(state.reasons.get(model.name)) for model in names}
        page = render(read_reports(Path(settings.run_dir)), draining)
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/admin/models", dependencies=[Depends(scoped("admin"))], tags=["admin"])
    def models() -> list[ModelState]:
        """Each model with its backends, what is in flight, and why it is drained if it is."""
        gauges = merged_gauges(fresh(read_reports(Path(settings.run_dir)), time.time()))
        up = gauges.get("llm_gateway_backend_up", {})
        inflight = gauges.get("llm_gateway_inflight_requests", {})
        return [
            ModelState(
                name=model.name,
                aliases=list(model.aliases),
                context=model.context,
                draining=state.reasons.get(model.name, []),
                inflight=int(inflight.get((model.name,), 0)),
                backends={
                    label: bool(up.get((model.name, label), 0))
                    for label in (f"{backend.host}:{backend.port}" for backend in model.backends)
                },
            )
            for model in (state.snapshot.models if state.snapshot is not None else ())
        ]

    async def change(model: str, reason: Reason, *, drain: bool) -> Drained:
        return Drained(model=model, draining=state.change(model, reason, drain=drain))

    @app.post("/admin/models/{name:path}/drain", dependencies=[Depends(scoped("admin"))], tags=["admin"])
    async def drain(name: Annotated[str, Depends(known)]) -> Drained:
        """New requests get 503 with Retry-After, those in flight go on."""
        return await change(name, "operator", drain=True)

    @app.post("/admin/models/{name:path}/resume", dependencies=[Depends(scoped("admin"))], tags=["admin"])
    async def resume(name: Annotated[str, Depends(known)]) -> Drained:
        """Undo the operator's drain; an engine that is stopping stays drained."""
        return await change(name, "operator", drain=False)

    @app.post("/internal/models/{name:path}/drain", dependencies=[Depends(is_engine)], include_in_schema=False)
    async def engine_drain(name: Annotated[str, Depends(known)], reason: Reason = "engine") -> Drained:
        return await change(name, reason, drain=True)

    @app.post("/internal/models/{name:path}/resume", dependencies=[Depends(is_engine)], include_in_schema=False)
    async def engine_resume(name: Annotated[str, Depends(known)], reason: Reason = "engine") -> Drained:
        return await change(name, reason, drain=False)

    @app.get("/openapi.json", dependencies=[Depends(scoped("admin"))], include_in_schema=False)
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
