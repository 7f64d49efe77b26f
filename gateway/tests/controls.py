"""A control process in a thread of the test, asked over its socket with blocking calls: so that commands can be run
against it too.
"""

import http.client
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import uvicorn
from citadel_gateway.cli.client import UnixConnection
from citadel_gateway.control.app import make_app
from citadel_gateway.control.state import State, local_key
from citadel_gateway.snapshot import Snapshot, decode, snapshot_path

from gateway.tests import fake_engine
from gateway.tests.client import ADMIN
from gateway.tests.site import Site


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> str:
        """The code of an error, after a check of its shape."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        return str(error["code"])


class ThreadedControl:
    def __init__(self, site: Site, port: int = 0) -> None:
        """`port`: of loopback, for clients that know no Unix sockets."""
        self.site = site
        self.settings = site.settings
        self.app = make_app(self.settings, fake_engine.KEY)
        self.state: State = self.app.state.control
        where = self.settings.control_socket if not port else None
        config = uvicorn.Config(self.app, uds=where, port=port, log_config=None, ws="websockets-sansio")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> "ThreadedControl":
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        key: str | None = ADMIN,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        lines = {"Content-Type": "application/json"} if body is not None or raw is not None else {}
        if key is not None:
            lines["Authorization"] = f"Bearer {key}"
        connection = UnixConnection(self.settings.control_socket, 20.0)
        try:
            data = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {**lines, **(headers or {})})
            reply: http.client.HTTPResponse = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, found, reply.read())
        finally:
            connection.close()

    def local(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """As a command of root does."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask(method, path, body, local_key(self.settings), headers=sent)

    def snapshot(self) -> Snapshot:
        return decode(snapshot_path(self.settings).read_bytes())

    def opens(self, token: str) -> bool:
        """Whether a worker would let this key in."""
        from citadel_gateway.keys import digest

        return any(key.sha256 == digest(token) for key in self.snapshot().keys)


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
