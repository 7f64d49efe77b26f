"""What the tests about feedback, value and conversations share: a database of each kind, and a ledger with requests."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import pytest
import uvicorn
from citadel_gateway.control.app import make_app
from citadel_gateway.control.business import Rules
from citadel_gateway.control.sql import Database
from citadel_gateway.control.sql.tables import requests, usage_daily
from citadel_gateway.control.state import State
from citadel_gateway.records import Settled
from citadel_gateway.settings import Address, Gateway, Key, Model, Policies, Value
from citadel_gateway.settings import Database as Settings

from gateway.tests import fake_engine
from gateway.tests.client import until
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site, digest

NOW = 1_900_000_000.0  # in 2030, at 17:46:40 UTC
HOST = "test"
MODELS = (Model("one", (Address("127.0.0.1", 1),)), Model("two", (Address("127.0.0.1", 2),)))
POLICIES = Policies(
    values=(Value("solved", 5.0), Value("solved", 20.0, "support"), Value("escalated", -3.0), Value("served", 0.1)),
    use_cases=("support",),
    budget_usd={"month": 500.0},
)
RULES = Rules(POLICIES, MODELS)


def key(user: str = "ann", *scopes: Any) -> Key:
    return Key(f"{user}-key", "0" * 64, scopes or ("inference",), user=user)


def request(id: str = "r1", **more: Any) -> Settled:  # noqa: A002  # the record's own name for it
    fields: dict[str, Any] = {
        "request_id": id, "at": NOW, "host": HOST, "worker": 1, "user": "ann", "key": "ann-key", "tier": "",
        "model": "one", "endpoint": "chat", "status": 200, "outcome": "ok",
        "input_tokens": 10, "output_tokens": 20, "cost_usd": 0.5,
    }  # fmt: skip
    return Settled(id, **(fields | more))


def enter(database: Database, records: Iterable[Settled]) -> None:
    """Put requests into the ledger, as the settler does."""
    with database.begin() as connection:
        for one in records:
            day = datetime.fromtimestamp(one.at, UTC).date().isoformat()
            names = {"user_id": one.user, "key_id": one.key, "model": one.model, "day": day}
            amounts = {name: getattr(one, name) for name in ("input_tokens", "output_tokens", "cost_usd")}
            more = {
                name: getattr(one, name)
                for name in ("id", "request_id", "at", "host", "outcome", "session", "use_case", "status")
            }
            connection.execute(database.insert(requests).values(**names, **amounts, **more, cost={}, why={}))
            c = usage_daily.c
            given = database.insert(usage_daily).values(
                **names,
                **amounts,
                requests=1,
                refused=int(one.outcome == "refused"),
                errors=int(one.outcome == "upstream_error"),
            )
            added = {
                name: c[name] + given.excluded[name]
                for name in ("requests", "refused", "errors", "input_tokens", "output_tokens", "cost_usd")
            }
            key_columns = ["day", "user_id", "key_id", "model"]
            connection.execute(given.on_conflict_do_update(index_elements=key_columns, set_=added))


def settings_of(site: Site, server: PostgresServer | None) -> Gateway:
    """Settings of the site with this server's database, in a schema of their own; without a server SQLite."""
    if server is not None:
        found = Settings(server.url, str(server.password_file), f"q{uuid4().hex}")
        site.config["database"] = {"url": found.url, "password_file": found.password_file, "schema": found.schema}
    return site.settings


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind."""
    server = request.getfixturevalue("postgres_server") if request.param == "postgresql" else None
    (tmp_path / "quality").mkdir()
    found = Database(settings_of(Site(tmp_path / "quality"), server))
    yield found
    found.close()


KEYS = {"ann": ("inference",), "bob": ("inference",), "root": ("admin",), "page": ("read",), "scrape": ("metrics",)}


class Served:
    """The control process inside this test, asked over its socket. The keys are `sk-NAME`, one for each of KEYS."""

    def __init__(self, site: Site, server: PostgresServer | None = None, engine: int = 11400) -> None:
        site.model("one", engine, aliases=["uno"], context=8192, price={"share": 0.5})
        site.model("two", 11401)
        site.keys = [{"id": f"{name}-key", "user": name, "sha256": digest(f"sk-{name}"), "scopes": list(scopes)}
                     for name, scopes in KEYS.items()]  # fmt: skip
        site.config["policies_file"] = str(site.folder / "policies.json")
        (site.folder / "policies.json").write_bytes(msgspec.json.encode(POLICIES))
        self.site = site
        self.settings = settings_of(site, server)
        self.app = make_app(self.settings, fake_engine.KEY)
        self.state: State = self.app.state.control
        config = uvicorn.Config(
            self.app, uds=self.settings.control_socket, log_config=None, ws="websockets-sansio", lifespan="on"
        )
        self.server = uvicorn.Server(config)
        self.session: aiohttp.ClientSession | None = None

    async def start(self) -> "Served":
        self.task = asyncio.create_task(self.server._serve())
        await until(lambda: self.server.started)
        connector = aiohttp.UnixConnector(self.settings.control_socket)
        self.session = aiohttp.ClientSession(connector=connector, base_url="http://gateway")
        return self

    async def stop(self) -> None:
        if self.session is not None:
            await self.session.close()
        self.server.should_exit = True
        await self.task

    async def ask(self, method: str, path: str, by: str = "ann", body: Any = None, **more: Any) -> tuple[int, Any]:
        """Status and decoded body. `by`: one of KEYS, or "=" and a whole key."""
        assert self.session is not None
        token = by.removeprefix("=") if by.startswith("=") else f"sk-{by}"
        headers = {"Authorization": f"Bearer {token}", **more.pop("headers", {})} if by else {}
        if body is not None:
            more["json"] = body
        async with self.session.request(method, path, headers=headers, **more) as reply:
            return reply.status, json.loads(await reply.read() or b"null")

    def enter(self, *records: Settled) -> None:
        enter(self.state.database, records)


@pytest.fixture
async def served(site: Site) -> AsyncIterator[Served]:
    found = await Served(site).start()
    yield found
    await found.stop()
