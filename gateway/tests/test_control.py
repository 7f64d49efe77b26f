"""The control process: keys, drain, metrics, snapshot. Asked over its socket, as everybody does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from citadel_gateway import snapshot
from citadel_gateway.control.app import make_app
from citadel_gateway.control.sql.tables import keys, overrides, users
from citadel_gateway.control.state import State
from citadel_gateway.control.stored import bump
from citadel_gateway.metrics import Metrics, encode
from citadel_gateway.settings import Gateway, Key
from sqlalchemy import text

from gateway.tests import fake_engine
from gateway.tests.client import ADMIN, KEY, Reply, Wire, head_of, until
from gateway.tests.site import Site, digest


class Control:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.settings: Gateway = site.settings
        self.app = make_app(self.settings, fake_engine.KEY)
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, uds=self.settings.control_socket, log_config=None, ws="none")
        )

    async def ask(self, method: str, path: str, key: str = ADMIN, headers: dict[str, str] | None = None) -> Reply:
        wire = Wire(*await asyncio.open_unix_connection(self.settings.control_socket))
        lines = {"Authorization": f"Bearer {key}"} if key else {}
        wire.send(head_of(method, path, {**lines, **(headers or {})}))
        try:
            return await wire.reply(method)
        finally:
            await wire.close()

    def snapshot(self) -> snapshot.Snapshot:
        return snapshot.decode(snapshot.snapshot_path(self.settings).read_bytes())


@pytest.fixture
async def control(site: Site) -> AsyncIterator[Control]:
    site.model("one", 11400, 11401, aliases=["uno"], context=100)
    site.model("org/two", 11402)
    found = Control(site)
    task = asyncio.create_task(found.server._serve())
    await until(lambda: found.server.started)
    yield found
    found.server.should_exit = True
    await task


async def test_it_writes_the_snapshot_and_follows_the_files(control: Control) -> None:
    assert [model.name for model in control.snapshot().models] == ["one", "org/two"]
    control.site.model("three", 11403)
    control.site.write()
    await until(lambda: len(control.snapshot().models) == 3)
    control.site.keys = [{"id": "new", "sha256": digest("n"), "scopes": ["admin"]}]
    control.site.write()
    await until(lambda: [key.id for key in control.snapshot().keys] == ["new"])
    for _ in range(50):  # the file is written first, and what is asked here is answered a moment later
        if (await control.ask("GET", "/admin/models")).status == 401:
            break
        await asyncio.sleep(0.1)
    assert (await control.ask("GET", "/admin/models")).status == 401
    assert (await control.ask("GET", "/admin/models", key="n")).status == 200


async def test_a_broken_file_changes_nothing(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    before = control.snapshot()
    control.site.spoil("models.json")
    await until(lambda: "the workers keep what they have" in caplog.text)
    assert control.snapshot() == before
    assert (await control.ask("GET", "/admin/models")).status == 200


async def test_an_engine_drains_itself(control: Control) -> None:
    key = fake_engine.KEY
    reply = await control.ask("POST", "/internal/models/one/drain", key=key)
    assert (reply.status, reply.json()) == (200, {"model": "one", "draining": True})
    assert control.snapshot().draining == {"one": ["engine"]}
    reply = await control.ask("POST", "/internal/models/one/resume", key=key)
    assert reply.json() == {"model": "one", "draining": False}
    assert control.snapshot().draining == {}
    assert (await control.ask("POST", "/internal/models/nothing/drain", key=key)).status == 404
    for bad in ("", "wrong", KEY, ADMIN):
        reply = await control.ask("POST", "/internal/models/one/drain", key=bad)
        assert (reply.status, reply.error()) == (401, "invalid_api_key")
    assert (await control.ask("POST", "/internal/models/one/drain?reason=x", key=key)).error() == "invalid_request"
    assert (await control.ask("POST", "/internal/models/one/drain", key, {"X-Citadel-Worker": "1"})).status == 404


async def test_reasons_are_a_set_and_survive_a_restart(control: Control) -> None:
    key = fake_engine.KEY
    await control.ask("POST", "/admin/models/uno/drain")
    await control.ask("POST", "/internal/models/one/drain", key=key)
    await control.ask("POST", "/admin/models/org/two/drain")
    reply = await control.ask("POST", "/internal/models/one/resume", key=key)
    assert reply.json()["draining"] is True
    again = State(control.settings)
    again.look()
    assert again.snapshot is not None
    assert again.snapshot.draining == {"one": ["operator"], "org/two": ["operator"]}
    assert (await control.ask("POST", "/admin/models/one/resume")).json()["draining"] is False
    assert control.snapshot().draining == {"org/two": ["operator"]}


async def test_scopes(control: Control) -> None:
    for method, path in (("GET", "/admin/models"), ("POST", "/admin/models/one/drain"), ("GET", "/metrics")):
        assert (await control.ask(method, path, key="")).status == 401
        reply = await control.ask(method, path, key=KEY)
        assert (reply.status, reply.error()) == (403, "insufficient_scope")
    reply = await control.ask("GET", "/nothing", key="")
    assert (reply.status, reply.error()) == (404, "not_found")
    assert (await control.ask("GET", "/admin/models/one/drain")).error() == "method_not_allowed"


async def test_the_state_of_the_models(control: Control) -> None:
    gauges: dict[str, dict[tuple[str, ...], float]] = {
        "llm_gateway_backend_up": {("one", "127.0.0.1:11400"): 1.0, ("one", "127.0.0.1:11401"): 0.0},
        "llm_gateway_inflight_requests": {("one",): 3.0},
    }
    metrics = Metrics()
    metrics.of("one", "chat", False).codes["200"] = 9
    folder = Path(control.settings.run_dir)
    (folder / "metrics-1.json").write_bytes(encode(metrics.report(1, gauges, time.time())))
    await control.ask("POST", "/admin/models/one/drain")
    one, two = (await control.ask("GET", "/admin/models")).json()
    assert one.pop("drained_at") > 0
    assert one == {
        "name": "one",
        "aliases": ["uno"],
        "context": 100,
        "draining": ["operator"],
        "drained_by": "admin",
        "inflight": 3,
        "backends": {"127.0.0.1:11400": True, "127.0.0.1:11401": False},
    }
    assert two["backends"] == {"127.0.0.1:11402": False}
    page = await control.ask("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'llm_gateway_requests_total{model="one",endpoint="chat",code="200"} 9' in page.body
    assert b'llm_gateway_draining{model="one"} 1' in page.body


async def test_the_description(control: Control) -> None:
    paths = (await control.ask("GET", "/openapi.json")).json()["paths"]
    assert "/admin/models" in paths
    assert not [path for path in paths if path.startswith("/internal")]
    assert (await control.ask("GET", "/openapi.json", key="")).status == 401
    assert (await control.ask("GET", "/docs")).status == 404


async def test_a_fault_is_an_error_of_the_same_shape(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("citadel_gateway.control.state.save_marks", broken)
    reply = await control.ask("POST", "/admin/models/one/drain?here=true")
    assert (reply.status, reply.error()) == (500, "internal_error")
    assert json.loads(reply.body)["error"]["type"] == "server_error"


async def test_what_is_done_now_and_then_goes_on_after_a_fault(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    state = State(site.settings)
    done = []

    def plain() -> None:
        done.append("plain")
        raise RuntimeError("once more")

    async def on_the_loop() -> None:
        done.append("loop")

    state.every(0.01, plain)
    state.every(0.01, on_the_loop)
    await until(lambda: done.count("plain") > 2 and done.count("loop") > 2)
    await state.close()
    assert "once more" in caplog.text


def test_a_snapshot_that_cannot_be_written_is_written_later(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.model("one", 1)
    state = State(site.settings)
    told: list[snapshot.Snapshot] = []
    state.subscribe(told.append)
    run = Path(state.settings.run_dir)
    run.rename(run.with_name("away"))
    assert not state.look()
    assert "cannot be written" in caplog.text
    assert told == []
    run.with_name("away").rename(run)
    assert state.look()
    assert [model.name for model in told[0].models] == ["one"]
    assert not state.look()


def test_people_that_cannot_be_read_change_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.model("one", 1)
    state = State(site.settings)
    state.look()
    assert state.poll()
    assert not state.poll()
    with state.database.begin() as connection:
        connection.execute(text("ALTER TABLE keys RENAME TO other"))
        bump(connection)
    assert not state.poll()
    assert not state.poll()
    assert caplog.text.count("users and keys cannot be read") == 1


def test_a_row_of_a_newer_release_holds_up_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.model("one", 1)
    state = State(site.settings)
    state.look()
    rows = [
        {"id": "new", "user_id": "ann", "sha256": digest("new"), "scopes": ["teleport"], "models": ["*"]},
        {"id": "old", "user_id": "ann", "sha256": digest("old"), "scopes": ["inference"], "models": ["*"]},
    ]
    with state.database.begin() as connection:
        bump(connection)
        connection.execute(users.insert().values(id="ann"))
        connection.execute(keys.insert(), rows)
        connection.execute(overrides.insert().values(kind="orbit", name="one", value=1))
    assert state.poll()
    assert [key.id for key in state.people.keys] == ["old"]
    assert state.people.overrides == ()
    assert "left out of key: Invalid enum value 'teleport'" in caplog.text


def test_whose_key_it_is(site: Site) -> None:
    site.model("one", 1)
    site.users = [{"id": "ann", "tier": "basic"}]
    site.policies = {"tiers": [{"name": "free"}, {"name": "basic"}, {"name": "default"}], "default_tier": "default"}
    state = State(site.settings)
    assert state.tier(state.user(Key("early", "0" * 64))).name == "unlimited"  # before there are files
    state.look()
    assert state.tier(state.user(Key("one", "0" * 64, user="ann"))).name == "basic"
    assert state.tier(state.user(Key("other", "0" * 64))).name == "default"
    assert state.key("Basic eDp5") is None


def test_without_files_it_waits_for_them(site: Site) -> None:
    settings = site.settings
    Path(settings.models_file).unlink()
    state = State(settings)
    assert not state.look()
    assert state.find("one") is None
    site.model("one", 1)
    site.write()
    assert state.look()
    assert state.find("one") == "one"
