"""The models: their state, drain and resume, and the page of metrics."""

import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel

from citadel_gateway.control import changes
from citadel_gateway.control.auth import Admin, Control, Scoped, is_engine, known_model
from citadel_gateway.control.changes import standings
from citadel_gateway.control.state import Reason, State
from citadel_gateway.metrics import fresh, merged_gauges, read_reports, render
from citadel_gateway.overrides import Override

router = APIRouter()


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
    drained_by: str
    drained_at: float
    inflight: int
    backends: dict[str, bool]


@router.get("/metrics", dependencies=[Depends(Scoped("metrics"))], response_class=PlainTextResponse, tags=["metrics"])
def metrics(control: Control) -> Response:
    """All workers of this host on one page (Prometheus text format). Runs in a thread and never on a worker."""
    names = control.snapshot.models if control.snapshot is not None else ()
    draining = {model.name: control.draining(model.name) for model in names}
    page = render(read_reports(Path(control.settings.run_dir)), draining)
    page += "".join(part() for part in control.pages)
    return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/admin/models", dependencies=[Depends(Scoped("admin"))], tags=["admin"])
def models(control: Control) -> list[ModelState]:
    """Each model with its backends, what is in flight, and why it is drained if it is."""
    gauges = merged_gauges(fresh(read_reports(Path(control.settings.run_dir)), time.time()))
    draining = control.snapshot.draining if control.snapshot is not None else {}
    by = {one.override.name: one.override for one in standings(control) if one.override.kind == "drain"}
    nobody = Override("drain", "")
    up = gauges.get("llm_gateway_backend_up", {})
    inflight = gauges.get("llm_gateway_inflight_requests", {})
    return [
        ModelState(
            name=model.name,
            aliases=list(model.aliases),
            context=model.context,
            draining=draining.get(model.name, []),
            drained_by=by.get(model.name, nobody).who,
            drained_at=by.get(model.name, nobody).at,
            inflight=int(inflight.get((model.name,), 0)),
            backends={
                label: bool(up.get((model.name, label), 0))
                for label in (f"{backend.host}:{backend.port}" for backend in model.backends)
            },
        )
        for model in (control.snapshot.models if control.snapshot is not None else ())
    ]


def change(control: State, model: str, reason: Reason, *, drain: bool) -> Drained:
    return Drained(model=model, draining=control.change(model, reason, drain=drain))


Known = Annotated[str, Depends(known_model)]


@router.post("/admin/models/{name:path}/drain", tags=["admin"])
def drain(name: Known, control: Control, actor: Admin, *, here: bool = False) -> Drained:
    """New requests get 503 with Retry-After, those in flight go on. On every host of the database, or `here` only."""
    return Drained(model=name, draining=changes.drain(control, actor, name, here=here))


@router.post("/admin/models/{name:path}/resume", tags=["admin"])
def resume(name: Known, control: Control, actor: Admin) -> Drained:
    """Undo the operator's drain; an engine that is stopping stays drained."""
    return Drained(model=name, draining=changes.resume(control, actor, name))


@router.post("/internal/models/{name:path}/drain", dependencies=[Depends(is_engine)], include_in_schema=False)
async def engine_drain(name: Known, control: Control, reason: Reason = "engine") -> Drained:
    return change(control, name, reason, drain=True)


@router.post("/internal/models/{name:path}/resume", dependencies=[Depends(is_engine)], include_in_schema=False)
async def engine_resume(name: Known, control: Control, reason: Reason = "engine") -> Drained:
    return change(control, name, reason, drain=False)
