"""A worker and the control process in the test's own process, joined as on a host."""

import asyncio
import json
from typing import Any, Self

import pytest
from citadel_gateway.control.app import ControlServer, make_app
from citadel_gateway.control.state import State
from citadel_gateway.settings import Gateway
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gateway.tests import fake_engine
from gateway.tests.client import KEY, Wire, until
from gateway.tests.site import Running, Site, digest

READER, ALERTER = "sk-reader", "sk-alerter"


class LiveSite:
    """Everything that a client of the gateway can reach. `port` is that of the worker."""

    def __init__(self, site: Site, running: Running) -> None:
        site.keys += [
            {"id": "reader", "sha256": digest(READER), "scopes": ["read"]},
            {"id": "alerter", "sha256": digest(ALERTER), "scopes": ["alerts"]},
            {"id": "other", "sha256": digest("sk-other"), "user": "someone"},
        ]
        site.config["listen"]["port"] = running.port
        self.site = site
        self.running = running
        self.port = running.port
        self.settings: Gateway = site.settings
        self.server = ControlServer(make_app(self.settings, fake_engine.KEY))
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        self.task = asyncio.create_task(self.server._serve())  # `serve` less its signals
        await until(lambda: self.server.started)
        self.look()
        return self

    def look(self) -> None:
        """What happens twice a second otherwise: the worker takes over what control has published."""
        found = self.running.worker.watcher.changed()
        if found is not None:
            self.running.gate.apply(found)

    async def stop(self) -> None:
        if self.task is not None:
            self.server.should_exit = True
            await self.task
            self.task = None

    @property
    def state(self) -> State:
        state: State = self.server.config.app.state.control  # type: ignore[union-attr]  # the application that we made
        return state

    def part(self, name: str) -> Any:
        return self.state.parts[name]

    def socket(self, path: str = "/v1/ws/chat", key: str = KEY, **more: Any) -> connect:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return connect(f"ws://127.0.0.1:{self.port}{path}", additional_headers=headers, **more)


async def said(socket: ClientConnection) -> dict[str, Any]:
    """The next message."""
    message = await asyncio.wait_for(socket.recv(), 10)
    found: dict[str, Any] = json.loads(message)
    return found


async def say(socket: ClientConnection, **message: Any) -> None:
    await socket.send(json.dumps(message))


async def drained(socket: ClientConnection) -> None:
    while True:
        await asyncio.wait_for(socket.recv(), 10)


async def closed(socket: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as caught:
        await drained(socket)
    frame = caught.value.rcvd
    assert frame is not None
    return frame.code, frame.reason


class Events:
    """An event stream that is being read."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.parts: list[str] = []

    async def next(self) -> tuple[str, Any]:
        """The next event that has a name, decoded."""
        while True:
            while not self.parts:
                part = await self.wire.chunk()
                assert part, "the stream has ended"
                self.parts = part.decode().split("\n\n")
            lines = dict(line.split(": ", 1) for line in self.parts.pop(0).splitlines() if not line.startswith(":"))
            if "event" in lines:
                return lines["event"], json.loads(lines["data"])
