"""The engines' own figures, passed through: engines listen on loopback only, and their /metrics asks for no key."""

from collections.abc import Mapping

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response

from citadel_gateway.control.auth import Control, Scoped, known_model
from citadel_gateway.control.client import Client, Reply, Unreachable
from citadel_gateway.settings import Address

router = APIRouter()

PAGE_BYTES = 16 * 1024 * 1024
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics/engines/{name:path}", dependencies=[Depends(Scoped("metrics"))], tags=["metrics"])
async def page(name: str, request: Request, control: Control) -> Response:
    """The page of vLLM, byte for byte; that of several replicas as one, with the label `backend`. Replicas that are
    reached through the gateway of another host are on the page of that host.
    """
    found = known_model(name, control)
    models = control.snapshot.models if control.snapshot is not None else ()
    local = [one for model in models if model.name == found for one in model.backends if not one.gateway]
    if not local:
        raise HTTPException(404, f"The engines of {found!r} run on other hosts: ask the gateways there")
    key: str = request.app.state.internal_key
    pages = {f"{one.host}:{one.port}": text for one in local if (text := await fetched(one, key)) is not None}
    if not pages:
        raise HTTPException(502, f"No engine of {found!r} has answered")
    if len(local) == 1:
        return Response(pages.popitem()[1], media_type=TEXT)
    return Response(merged(pages), media_type=TEXT)


async def fetched(backend: Address, key: str) -> bytes | None:
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    async with Client(f"http://{host}:{backend.port}", seconds=5) as client:
        try:
            async with client.ask("GET", "/metrics", key) as reply:
                return await whole(reply)
        except Unreachable:
            return None


async def whole(reply: Reply) -> bytes | None:
    return await reply.body(PAGE_BYTES) if reply.status == 200 else None


def merged(pages: Mapping[str, bytes]) -> bytes:
    """One exposition of several: each family stands once, each sample says whose it is."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for backend, page in pages.items():
        family = ""
        for line in page.decode(errors="replace").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if not any(one.startswith(line[:7]) for one in head):
                    head.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(labelled(line, backend))
    lines = [line for family, found in samples.items() for line in (*heads.get(family, ()), *found)]
    return ("\n".join(lines) + "\n").encode()


def labelled(sample: str, backend: str) -> str:
    """The sample with one more label, put first: that is unambiguous whatever the others hold."""
    label = f'backend="{backend}"'
    brace = sample.find("{")
    blank = sample.find(" ")
    if 0 <= brace < blank:
        rest = sample[brace + 1 :]
        return f"{sample[:brace]}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    return f"{sample[:blank]}{{{label}}}{sample[blank:]}"
