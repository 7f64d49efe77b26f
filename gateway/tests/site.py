"""A gateway for the tests: its files in a temporary folder, and workers inside the test's own process."""

import asyncio
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import uvicorn
from citadel_gateway.records import Opened, Record, Settled, decode
from citadel_gateway.settings import Gateway, read
from citadel_gateway.worker.exchange import Exchange
from citadel_gateway.worker.front import Front, bound_to
from citadel_gateway.worker.gate import Gate
from citadel_gateway.worker.process import Worker, WorkerServer, answered_elsewhere

from gateway.tests import fake_engine
from gateway.tests.client import ADMIN, KEY, until


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Site:
    """The three files. `model` and `key` add entries; `settings` reads what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("run", "state"):
            (folder / name).mkdir()
        (folder / "engine-key").write_text(f"{fake_engine.KEY}\n")
        self.config: dict[str, Any] = {
            "host": "test",
            "listen": {"address": "127.0.0.1", "port": free_port()},
            "control_socket": str(folder / "run" / "control.sock"),
            "run_dir": str(folder / "run"),
            "state_dir": str(folder / "state"),
            "models_file": str(folder / "models.json"),
            "keys_file": str(folder / "keys.json"),
            "engine_key_file": str(folder / "engine-key"),
            "access_log": str(folder / "access.jsonl"),
            "workers": 2,
            "cors": {"allow_origins": ["https://page.example"]},
            "limits": {},
            "timeouts": {"connect": 1, "probe_interval": 0.5, "probe": 0.5, "headers": 5, "drain": 20},
        }
        self.models: list[dict[str, Any]] = []
        self.keys: list[dict[str, Any]] = [
            {"id": "user", "sha256": digest(KEY)},
            {"id": "admin", "sha256": digest(ADMIN), "scopes": ["admin", "metrics"]},
        ]

        self.users: list[dict[str, Any]] = []
        self.policies: dict[str, Any] | None = None

    def model(self, name: str, *ports: int, **more: Any) -> None:
        backends = [{"host": "127.0.0.1", "port": port} for port in ports]
        self.models.append({"name": name, "backends": backends, **more})

    def write(self) -> Path:
        if self.policies is not None:
            self.config["policies_file"] = str(self.folder / "policies.json")
        for name, value in (
            ("gateway", self.config),
            ("models", {"models": self.models}),
            ("keys", {"keys": self.keys, "users": self.users}),
            ("policies", self.policies),
        ):
            if value is not None:
                (self.folder / f"{name}.json").write_text(json.dumps(value))
        return self.folder / "gateway.json"

    def spoil(self, name: str) -> None:
        """Half a file, as a careless hand leaves it."""
        (self.folder / name).write_text("{")

    @property
    def settings(self) -> Gateway:
        return read(self.write(), Gateway)

    def log_text(self) -> str:
        path = self.folder / "access.jsonl"
        return path.read_text() if path.exists() else ""

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_text().splitlines()]

    def tier(self, name: str, key: str, **limits: Any) -> None:
        """A tier with one user and one key."""
        self.policies = self.policies or {"tiers": [{"name": "free"}]}
        self.policies["tiers"].append({"name": name, **limits})
        self.users.append({"id": f"{name}-user", "tier": name})
        self.keys.append({"id": f"{name}-key", "sha256": digest(key), "user": f"{name}-user"})

    def records(self) -> list[Record]:
        """What all workers have noted in their journals."""
        found: list[Record] = []
        for path in sorted((self.folder / "state" / "journal").glob("*.jsonl")):
            data = path.read_bytes().partition(b"\0")[0]
            found += [decode(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return found

    def settled(self) -> list[Settled]:
        """The settled requests; each once, whatever has happened."""
        found = [record for record in self.records() if isinstance(record, Settled)]
        assert len({record.id for record in found}) == len(found)
        return found


class Running:
    """A worker that serves in this process."""

    def __init__(self, site: Site, number: int = 1) -> None:
        self.site = site
        self.worker = Worker(site.settings, number)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.task: asyncio.Task[None] | None = None
        self.server: WorkerServer | None = None

    @property
    def gate(self) -> Gate:
        assert self.worker.gate is not None
        return self.worker.gate

    async def start(self) -> "Running":
        config = uvicorn.Config(
            answered_elsewhere, http=bound_to(self.worker.make_gate()), ws="none", lifespan="off", log_config=None
        )
        self.server = WorkerServer(config, self.worker)
        self.task = asyncio.create_task(self.server._serve([self.listener]))  # `serve` less its signals
        server = self.server
        await until(lambda: server.started)
        return self

    async def stop(self) -> None:
        if self.server is not None and self.task is not None:
            self.server.should_exit = True
            await self.task
            self.server = None

    def exchange(self) -> Exchange | None:
        """What the one client is waiting for."""
        assert self.server is not None
        for front in self.server.server_state.connections:
            assert isinstance(front, Front)
            return front.exchange
        return None

    def quiet(self) -> None:
        """Nothing may be left over: every request settled, every gauge back at zero."""
        core = self.gate.core
        assert core.open == 0
        for model in core.catalogue.models.values():
            assert model.inflight == 0
            assert [backend.inflight for backend in model.backends] == [0] * len(model.backends)
            assert [backend.tokens for backend in model.backends] == [0] * len(model.backends)
            assert core.gatekeeper.queued(model) == 0
        assert not core.running
        opened = {record.id for record in self.site.records() if isinstance(record, Opened)}
        assert opened <= {record.id for record in self.site.settled()}
        for person in core.keys.people.values():
            account = person.account
            if account is not None and not account.free:
                assert (account.open_slots, account.open_tokens) == (0, 0), person.id


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
