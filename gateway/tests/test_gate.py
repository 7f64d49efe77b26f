"""What a worker answers: its own routes, errors, health, browsers, and the relay to the control process."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from citadel_gateway import snapshot
from citadel_gateway.control.app import make_app
from citadel_gateway.keys import new_key

from gateway.tests import fake_engine
from gateway.tests.client import ADMIN, ask, chat, connect, get, head_of, post, until
from gateway.tests.fake_engine import FakeEngine
from gateway.tests.site import Running, Site, digest


async def test_the_list_of_models(gateway: Running) -> None:
    reply = await get(gateway.port, "/v1/models")
    model, auto = reply.json()["data"]
    assert model["id"] == "one"
    assert (auto["id"], auto["models"], auto["state"], auto["max_model_len"]) == ("auto", ["one"], "up", 8192)
    assert (await get(gateway.port, "/v1/models/auto")).json() == auto
    assert model["object"] == "model"
    assert (model["max_model_len"], model["aliases"], model["state"]) == (8192, ["uno"], "up")
    assert (await get(gateway.port, "/v1/models/uno")).json() == model
    missing = await get(gateway.port, "/v1/models/nothing")
    assert (missing.status, missing.error()) == (404, "model_not_found")


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic c2stdGVzdA==", "sk-test"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/one", "/v1/chat/completions", "/v1/completions"])
async def test_a_key_is_needed(gateway: Running, engine: FakeEngine, authorization: str, path: str) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    if "completions" in path:
        reply = await ask(gateway.port, post(path, b'{"model":"one"}', key="", headers=headers))
    else:
        reply = await get(gateway.port, path, key="", headers=headers)
    assert reply.status == 401
    assert reply.error() in ("missing_api_key", "invalid_api_key")
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert not engine.seen


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions?api_key=sk-test", f"/v1/models/{new_key()}"], ids=["query", "path"]
)
async def test_a_key_in_the_url_is_refused(gateway: Running, path: str) -> None:
    reply = await ask(gateway.port, chat(path=path, key=""))
    assert (reply.status, reply.error()) == (400, "key_in_url")


async def test_what_a_key_may_use(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port, aliases=["uno"])
    site.model("two", engine.port + 1 if engine.port < 65535 else 1)
    site.keys.append({"id": "limited", "sha256": digest("sk-limited"), "models": ["uno"]})
    gateway = await Running(site).start()
    assert (await ask(gateway.port, chat(model="one", key="sk-limited"))).status == 200
    reply = await ask(gateway.port, chat(model="two", key="sk-limited"))
    assert (reply.status, reply.error()) == (403, "model_not_allowed")
    listed = (await get(gateway.port, "/v1/models", key="sk-limited")).json()["data"]
    assert [model["id"] for model in listed] == ["one", "auto"]
    assert listed[1]["models"] == ["one"]
    assert (await get(gateway.port, "/v1/models/two", key="sk-limited")).status == 404
    reply = await ask(gateway.port, chat(key=ADMIN))
    assert (reply.status, reply.error()) == (403, "insufficient_scope")
    await gateway.stop()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"no json", "invalid_json"),
        (b'{"model": "one", "temperature": NaN}', "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_json"),
        (b'{"model": "one", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b"[]", "invalid_request"),
        (b"{}", "invalid_request"),
        (b'{"model": 7}', "invalid_request"),
        (b'{"model": "one", "stream": "yes"}', "invalid_request"),
    ],
)
async def test_bodies_that_cannot_be_routed(gateway: Running, engine: FakeEngine, body: bytes, code: str) -> None:
    wire = await connect(gateway.port)
    wire.send(post("/v1/chat/completions", body))
    reply = await wire.reply()
    assert (reply.status, reply.error()) == (400, code)
    wire.send(chat())
    assert (await wire.reply()).status == 200  # the connection can still be used
    await wire.close()
    assert len(engine.seen) == 1


async def test_other_mistakes(gateway: Running, engine: FakeEngine) -> None:
    reply = await ask(gateway.port, chat(model="nothing"))
    assert (reply.status, reply.error(), reply.json()["error"]["param"]) == (404, "model_not_found", "model")
    reply = await get(gateway.port, "/v1/chat/completions")
    assert (reply.status, reply.error(), reply.headers["allow"]) == (405, "method_not_allowed", "POST")
    reply = await ask(gateway.port, post("/v1/models", b"{}"))
    assert (reply.status, reply.headers["allow"]) == (405, "GET")
    reply = await ask(gateway.port, chat(headers={"Content-Type": "text/plain"}))
    assert (reply.status, reply.error()) == (415, "unsupported_media_type")
    assert not engine.seen
    reply = await ask(gateway.port, chat(headers={"Content-Type": "Application/JSON; charset=utf-8"}))
    assert reply.status == 200


async def test_completions_have_their_own_path(gateway: Running, engine: FakeEngine) -> None:
    assert (await ask(gateway.port, post("/v1/completions", b'{"model":"one","prompt":"x"}'))).status == 200
    assert engine.seen[0].path == "/v1/completions"


async def test_a_request_id_is_kept_or_made(gateway: Running, engine: FakeEngine) -> None:
    for offered in ("a b", "x" * 200, "<script>"):
        reply = await ask(gateway.port, chat(headers={"X-Request-ID": offered}))
        made = reply.headers["x-request-id"]
        assert made != offered
        assert engine.seen[-1].headers["x-request-id"] == made
    await gateway.stop()
    assert [line["request_id"] for line in gateway.site.log()] == [seen.headers["x-request-id"] for seen in engine.seen]


async def test_health(gateway: Running, engine: FakeEngine) -> None:
    for path in ("/healthz", "/readyz"):
        reply = await get(gateway.port, path, key="")
        assert (reply.status, reply.json()["models"]) == (200, {"up": 1, "down": 0, "draining": 0})
        assert (await ask(gateway.port, head_of("HEAD", path))).status == 200
    assert (await ask(gateway.port, post("/healthz", b""))).status == 405
    engine.health = 503
    await until(lambda: gateway.gate.core.catalogue.models["one"].state() == "down")
    assert (await get(gateway.port, "/healthz", key="")).status == 200
    assert (await get(gateway.port, "/readyz", key="")).status == 503
    engine.health = 200
    await until(lambda: gateway.gate.core.catalogue.models["one"].state() == "up")
    assert (await get(gateway.port, "/readyz", key="")).status == 200


async def test_browsers(gateway: Running) -> None:
    good, evil = {"Origin": "https://page.example"}, {"Origin": "https://evil.example"}
    wanted = "authorization, x-stainless-os"
    ask_first = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    reply = await ask(gateway.port, head_of("OPTIONS", "/v1/chat/completions", {**good, **ask_first}))
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    assert reply.headers["access-control-allow-headers"] == wanted
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "content-length" not in reply.headers
    reply = await ask(gateway.port, head_of("OPTIONS", "/v1/chat/completions", {**evil, **ask_first}))
    assert (reply.status, reply.error()) == (403, "origin_not_allowed")
    reply = await ask(gateway.port, chat(headers=good))
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    reply = await ask(gateway.port, chat(headers=evil))
    assert "access-control-allow-origin" not in reply.headers


async def test_a_full_model_says_when_to_come_back(site: Site, engine: FakeEngine) -> None:
    site.config["limits"]["inflight_per_model"] = 1
    site.model("one", engine.port)
    engine.mode = "hang"
    gateway = await Running(site).start()
    wire = await connect(gateway.port)
    wire.send(chat())
    await until(lambda: engine.seen)
    reply = await ask(gateway.port, chat())
    assert (reply.status, reply.error(), reply.headers["retry-after"]) == (503, "overloaded", "1")
    await wire.close()
    await gateway.stop()
    gateway.quiet()


async def test_a_new_snapshot_is_taken_over(gateway: Running, engine: FakeEngine, second: FakeEngine) -> None:
    site = gateway.site
    site.model("two", second.port)
    site.keys = [{"id": "new", "sha256": digest("sk-new")}]
    snapshot.write(site.settings, snapshot.merge(site.settings, {"one": {"operator": snapshot.Mark()}}))
    await until(lambda: "two" in gateway.gate.core.catalogue.models)
    assert (await ask(gateway.port, chat())).status == 401
    assert (await ask(gateway.port, chat(model="two", key="sk-new"))).status == 200
    reply = await ask(gateway.port, chat(key="sk-new"))
    assert (reply.status, reply.error(), reply.headers["retry-after"]) == (503, "model_draining", "5")
    site.models = site.models[1:]
    snapshot.write(site.settings, snapshot.merge(site.settings, {}))
    await until(lambda: "one" not in gateway.gate.core.catalogue.models)
    assert (await ask(gateway.port, chat(key="sk-new"))).status == 404


async def test_a_drained_model_finishes_what_it_has(gateway: Running, engine: FakeEngine) -> None:
    engine.delay, engine.events = 0.05, 30
    wire = await connect(gateway.port)
    wire.send(chat(stream=True))
    await wire.head()
    snapshot.write(gateway.site.settings, snapshot.merge(gateway.site.settings, {"one": {"engine": snapshot.Mark()}}))
    await until(lambda: gateway.gate.core.catalogue.models["one"].draining)
    assert (await ask(gateway.port, chat())).status == 503
    body = b""
    while part := await wire.chunk():
        body += part
    assert body == fake_engine.stream_bytes(30, "one")
    await wire.close()


@pytest.fixture
async def control(gateway: Running) -> AsyncIterator[None]:
    """The real control process, as a task."""
    settings = gateway.site.settings
    config = uvicorn.Config(
        make_app(settings, fake_engine.KEY), uds=settings.control_socket, log_config=None, ws="none"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    yield
    server.should_exit = True
    await task


@pytest.mark.usefixtures("control")
async def test_every_other_path_is_the_controls(gateway: Running) -> None:
    reply = await get(gateway.port, "/admin/models", key=ADMIN)
    assert reply.json()[0]["name"] == "one"
    assert (await get(gateway.port, "/admin/models")).status == 403
    for path in ("/", "/nothing", "//v1/models", "/%76%31/models", "/V1/models", "/x/../v1/models", "/invocations"):
        reply = await get(gateway.port, path)
        assert (reply.status, reply.error()) == (404, "not_found")
    reply = await ask(gateway.port, post("/admin/models/one/drain", b"", key=ADMIN))
    assert reply.json() == {"model": "one", "draining": True}


@pytest.mark.usefixtures("control")
async def test_internal_routes_are_not_for_clients(gateway: Running) -> None:
    for path in ("/internal/models/one/drain", "/%69nternal/models/one/drain"):
        for spoof in ("", "0", "no"):
            headers = {"X-Citadel-Worker": spoof} if spoof else {}
            reply = await ask(gateway.port, post(path, b"", key=fake_engine.KEY, headers=headers))
            assert reply.status == 404


async def test_without_the_control_process_models_go_on(gateway: Running) -> None:
    reply = await get(gateway.port, "/admin/models", key=ADMIN)
    assert (reply.status, reply.error()) == (503, "control_unavailable")
    assert reply.headers["retry-after"]
    assert (await ask(gateway.port, chat())).status == 200


async def test_a_body_for_the_control_process_is_bounded(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("POST", "/admin/x", {"Content-Length": "2000000"}))
    assert (await wire.reply()).status == 413
    await wire.close()


async def test_the_log_says_what_happened_and_nothing_secret(gateway: Running, engine: FakeEngine) -> None:
    request = chat(model="uno", messages=[{"role": "user", "content": "a private matter"}])
    await ask(gateway.port, request)
    await ask(gateway.port, chat(stream=True))
    await ask(gateway.port, chat(key="sk-wrong"))
    await get(gateway.port, "/healthz")
    await gateway.stop()
    text = gateway.site.log_text()
    for secret in ("private", "sk-test", "sk-wrong", fake_engine.KEY):
        assert secret not in text
    whole, stream, refused = (json.loads(line) for line in text.splitlines())
    assert whole["key"] == "user"
    assert (whole["model"], whole["path"], whole["status"]) == ("one", "/v1/chat/completions", 200)
    assert (whole["outcome"], whole["stream"], whole["client"]) == ("ok", False, "127.0.0.1")
    assert whole["bytes_in"] == len(request.partition(b"\r\n\r\n")[2])
    assert stream["bytes_out"] == len(fake_engine.stream_bytes(5, "one"))
    assert 0 < stream["ttft_ms"] <= stream["duration_ms"]
    assert (refused["status"], refused["key"], refused["outcome"]) == (401, "", "refused")
