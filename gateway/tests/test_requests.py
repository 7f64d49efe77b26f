"""Whole requests: what is counted, limited, chosen, written down, and said in headers."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from citadel_gateway.records import Opened, Progress

from gateway.tests.client import Wire, ask, chat, connect, get, post, until
from gateway.tests.fake_engine import FakeEngine, stream_bytes
from gateway.tests.site import Running, Site, digest


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[Running]:
    gateway = await Running(site).start()
    try:
        yield gateway
    finally:
        await gateway.stop()
    gateway.quiet()


async def test_a_reply_is_settled_with_the_engines_figures(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port, aliases=["uno"], price={"input_mtoken": 1e6, "output_mtoken": 2e6})
    headers = {"X-Session-ID": "s-1", "X-Tag": "t", "X-Use-Case": "search", "Accept-Language": "de-DE,de;q=0.9"}
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(model="uno", headers={**headers, "X-Request-ID": "mine"}))
        assert reply.headers["x-citadel-model"] == "one"
        assert "x-citadel-policy" not in reply.headers
    (found,) = site.settled()
    assert (found.request_id, found.user, found.key, found.tier) == ("mine", "user", "user", "unlimited")
    assert (found.model, found.asked, found.endpoint, found.status, found.outcome) == ("one", "uno", "chat", 200, "ok")
    assert (found.input_tokens, found.output_tokens, found.exact) == (3, 4, True)
    assert (found.session, found.use_case, found.why.tag, found.why.language) == ("s-1", "search", "t", "de-DE")
    assert found.cost_usd == pytest.approx(3 + 8)
    assert found.backend == f"127.0.0.1:{engine.port}"
    assert found.engine_seconds > 0
    seen = engine.seen[0].headers
    assert not {"x-session-id", "x-tag", "x-use-case"} & set(seen)
    (opened,) = (record for record in site.records() if isinstance(record, Opened))
    assert opened.id == found.id


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}, "all"])
async def test_a_stream_is_counted_and_looks_as_if_it_were_not(site: Site, engine: FakeEngine, options: object) -> None:
    site.model("one", engine.port)
    engine.fingerprint = "fake-1"
    wanted = {"include_usage": True, "continuous_usage_stats": True} if options == "all" else options
    more: dict[str, Any] = {"stream_options": wanted} if wanted is not None else {}
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(stream=True, **more))
    sent = json.loads(engine.seen[0].body)["stream_options"]
    assert sent["include_usage"]
    assert sent["continuous_usage_stats"]
    alone = FakeEngine(fingerprint="fake-1")
    await alone.start()
    direct = await ask(
        alone.port, post("/v1/chat/completions", json.dumps({"model": "one", "stream": True, **more}).encode())
    )
    await alone.stop()
    assert reply.body == direct.body
    (found,) = site.settled()
    assert (found.input_tokens, found.output_tokens, found.exact, found.stream) == (3, 5, True, True)
    assert found.first_byte_seconds > 0


async def test_an_engine_without_usage(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    engine.usage = False
    async with running(site) as gateway:
        assert (await ask(gateway.port, chat(stream=True))).body == stream_bytes(5, "one")
    (found,) = site.settled()
    assert (found.output_tokens, found.exact) == (5, False)


async def test_a_stream_that_is_left_is_charged_so_far(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    engine.delay, engine.events = 0.02, 1000
    async with running(site) as gateway:
        wire = await connect(gateway.port)
        wire.send(chat(stream=True))
        await wire.head()
        for _ in range(4):
            await wire.chunk()
        await wire.close()
        await until(lambda: engine.cancelled)
    (found,) = site.settled()
    assert (found.status, found.outcome, found.exact) == (499, "client_closed", False)
    assert found.input_tokens == 3
    assert 4 <= found.output_tokens <= 20


async def test_what_runs_long_is_noted_every_second(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    engine.delay, engine.events = 0.1, 25
    async with running(site) as gateway:
        assert (await ask(gateway.port, chat(stream=True))).status == 200
    progress = [record for record in site.records() if isinstance(record, Progress)]
    assert progress
    row = progress[-1].requests[0]
    assert row.input_tokens == 3
    assert 5 < row.output_tokens <= 25
    assert row.engine_seconds > 0.5


async def test_limits_in_headers_and_in_refusals(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    site.config["workers"] = 1
    site.tier("small", "sk-small", requests_per_minute=2, tokens_per_minute=1000, max_output_tokens=50)
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(key="sk-small"))
        assert json.loads(engine.seen[0].body)["max_tokens"] == 50
        assert reply.headers["x-ratelimit-limit-requests"] == "2"
        assert reply.headers["x-ratelimit-remaining-requests"] == "1"
        assert reply.headers["x-ratelimit-limit-tokens"] == "1000"
        too_large = await ask(gateway.port, chat(key="sk-small", max_tokens=2000))
        assert (too_large.status, too_large.error()) == (429, "request_too_large")
        assert (await ask(gateway.port, chat(key="sk-small", stream=True, max_tokens=5))).status == 200
        refused = await ask(gateway.port, chat(key="sk-small", max_tokens=5))
        assert (refused.status, refused.error()) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 50 < int(refused.headers["retry-after"]) <= 61
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        person = gateway.gate.core.keys.people["small-user"]
        assert gateway.gate.core.limiter.remaining(person)["tokens_per_minute"] == 1000 - 7 - 8
    assert [found.outcome for found in site.settled()] == ["ok", "limited", "ok", "limited"]
    assert [found.why.limit for found in site.settled()][1::2] == ["tokens_per_minute", "requests_per_minute"]


async def test_bounds_of_what_may_be_asked(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    async with running(site) as gateway:
        bounds: list[tuple[dict[str, Any], str]] = [
            ({"n": 16384}, "n"),
            ({"best_of": 10**6}, "n"),
            ({"max_tokens": 10**9}, "max_tokens"),
            ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ]
        for more, param in bounds:
            reply = await ask(gateway.port, chat(**more))
            assert (reply.status, reply.error()) == (400, "invalid_request")
            assert reply.json()["error"]["param"] == param
        for body in (
            b'{"model":"one","messages":[{"content":"\xff"}]}',
            b'{"model":"one","n":"2"}',
            b'{"model":"one","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        ):
            assert (await ask(gateway.port, post("/v1/chat/completions", body))).status == 400
        for name in ("X-Request-Timeout", "X-Budget-USD"):
            reply = await ask(gateway.port, chat(headers={name: "soon"}))
            assert (reply.status, reply.json()["error"]["param"]) == (400, name)
    assert not engine.seen
    assert {found.outcome for found in site.settled()} == {"refused"}


async def test_a_deadline_of_the_client(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    engine.mode = "hang"
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(headers={"X-Request-Timeout": "0.3"}))
        assert (reply.status, reply.error()) == (504, "timeout")
        await until(lambda: engine.cancelled)
        assert gateway.gate.core.catalogue.models["one"].state() == "up"  # not the engine's fault


async def test_a_policy_is_asked_like_a_model(site: Site, engine: FakeEngine, second: FakeEngine) -> None:
    site.model("one", engine.port)
    site.model("two", second.port)
    site.policies = {
        "policies": [
            {
                "name": "auto",
                "aliases": ["best"],
                "rules": [{"name": "german", "models": ["two"], "when": {"languages": ["de"]}}],
                "models": ["one"],
                "choose": "first",
            }
        ]
    }
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(model="auto"))
        assert (reply.headers["x-citadel-model"], reply.headers["x-citadel-policy"]) == ("one", "auto")
        reply = await ask(gateway.port, chat(model="best", headers={"X-Language": "de"}, stream=True))
        assert (reply.headers["x-citadel-model"], reply.headers["x-citadel-policy"]) == ("two", "auto")
        assert json.loads(second.seen[0].body)["model"] == "two"
    found = site.settled()[1]
    assert (found.asked, found.model, found.why.policy, found.why.rule) == ("best", "two", "auto", "german")


async def test_another_model_answers_when_one_is_gone(site: Site, engine: FakeEngine, second: FakeEngine) -> None:
    site.model("one", engine.port, fallback=["two"])
    site.model("two", second.port)
    await engine.stop()
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(stream=True))
        assert (reply.status, reply.headers["x-citadel-model"]) == (200, "two")
        assert json.loads(second.seen[0].body)["model"] == "two"
        assert gateway.worker.metrics.counters["llm_gateway_fallbacks_total"]["one", "two"] == 1
    (found,) = site.settled()
    assert (found.model, found.why.fallback_from, found.outcome) == ("two", "one", "ok")


@pytest.mark.parametrize("mode", ["500", "503", "close", "garbage", "die_early"])
async def test_an_engine_that_fails_before_the_first_token_costs_nothing(
    site: Site, engine: FakeEngine, second: FakeEngine, mode: str
) -> None:
    site.model("one", engine.port, fallback=["two"])
    site.model("two", second.port)
    engine.mode = mode
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat(stream=True))
        assert reply.body == stream_bytes(5, "two")
    (found,) = site.settled()
    assert (found.model, found.outcome, found.tries, found.output_tokens) == ("two", "ok", 2, 5)


async def test_the_last_status_is_the_engines_own(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    engine.mode = "500"
    async with running(site) as gateway:
        reply = await ask(gateway.port, chat())
        assert (reply.status, reply.json()["error"]["message"]) == (500, "on cue")
    (found,) = site.settled()
    assert (found.outcome, found.input_tokens, found.output_tokens) == ("error", 0, 0)


async def test_endpoints_are_there_where_the_model_has_them(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    site.model("vectors", engine.port + 1 if engine.port < 65535 else 1, capabilities=["embeddings"])
    async with running(site) as gateway:
        reply = await ask(gateway.port, post("/v1/embeddings", b'{"model":"one","input":"x"}'))
        assert (reply.status, reply.error()) == (400, "endpoint_not_supported")
        reply = await ask(gateway.port, chat(model="vectors"))
        assert (reply.status, reply.error()) == (400, "endpoint_not_supported")
        for path in ("/v1/responses", "/v1/messages"):
            body = b'{"model":"one","input":"x","messages":[],"max_tokens":5}'
            assert (await ask(gateway.port, post(path, body))).status == 200
            assert engine.seen[-1].path == path
            assert json.loads(engine.seen[-1].body) == json.loads(body)
        key = {"x-api-key": "sk-test"}
        assert (await ask(gateway.port, post("/v1/messages", body, key="", headers=key))).status == 200
        assert "x-api-key" not in engine.seen[-1].headers
        listed = {one["id"]: one for one in (await get(gateway.port, "/v1/models")).json()["data"]}
        assert listed["vectors"]["capabilities"] == ["embeddings"]
        assert set(listed["one"]["price"]) >= {"input_mtoken", "output_mtoken", "engine_second"}
    assert [found.endpoint for found in site.settled()][-3:] == ["responses", "messages", "messages"]


async def test_who_waits_for_a_slot(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port, slots=1)
    engine.delay, engine.events = 0.05, 4
    async with running(site) as gateway:
        first, second, third = [await connect(gateway.port) for _ in range(3)]
        first.send(chat(stream=True))
        await first.head()
        second.send(chat())
        third.send(chat())
        keeper, model = gateway.gate.core.gatekeeper, gateway.gate.core.catalogue.models["one"]
        await until(lambda: keeper.queued(model) == 2)
        assert len(engine.seen) == 1
        await third.close()  # leaves while it waits: nobody generates for it
        await until(lambda: keeper.queued(model) == 1)
        assert (await second.reply()).status == 200
        assert len(engine.seen) == 2
        await first.close()
        await second.close()
    found = {one.outcome: one for one in site.settled()}
    assert found["client_closed"].tries == 0
    assert max(one.queue_seconds for one in site.settled()) > 0.05


async def test_a_model_that_stops_while_somebody_waits(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port, slots=1)
    site.config["admission"] = {"queue": 8, "max_wait": 0.4}
    engine.mode = "hang"
    async with running(site) as gateway:
        first = await connect(gateway.port)
        first.send(chat())
        await until(lambda: engine.seen)
        reply = await ask(gateway.port, chat())
        assert reply.status in (429, 503)
        assert int(reply.headers["retry-after"]) >= 1
        await first.close()
    assert {one.outcome for one in site.settled()} >= {"client_closed"}


@asynccontextmanager
async def pair(site: Site, folder: Site, engine: FakeEngine) -> AsyncIterator[tuple[Running, Running]]:
    """Two hosts: the first has the engine of another one as its replica, reached through that one's gateway."""
    folder.model("one", engine.port)
    folder.keys.append({"id": "peer", "sha256": digest("sk-peer"), "scopes": ["peer"]})
    async with running(folder) as far:
        site.models = [{"name": "one", "backends": [{"host": "127.0.0.1", "port": far.port, "gateway": True}]}]
        (site.folder / "peer-key").write_text("sk-peer\n")
        site.config["peer_key_file"] = str(site.folder / "peer-key")
        async with running(site) as near:
            yield near, far


async def test_a_replica_of_another_host_is_metered_once(
    site: Site, tmp_path_factory: pytest.TempPathFactory, engine: FakeEngine
) -> None:
    engine.fingerprint = "f"
    far_site = Site(tmp_path_factory.mktemp("far"))
    async with pair(site, far_site, engine) as (near, far):
        reply = await ask(near.port, chat(stream=True, headers={"X-Request-ID": "both"}))
        alone = stream_bytes(4, "one").removesuffix(b"data: [DONE]\n\n")
        assert reply.body.startswith(alone)
        assert reply.headers["x-citadel-model"] == "one"
        assert (await ask(near.port, chat())).status == 200
        assert engine.seen[0].headers["x-request-id"] == "both"
        assert not far.worker.metrics.counters["llm_gateway_requests_total"]
        health = near.gate.core.catalogue.models["one"].backends[0].health
        await until(lambda: not health.probing)
        assert health.up
    assert [(one.input_tokens, one.output_tokens, one.exact) for one in site.settled()] == [(3, 5, True), (3, 4, True)]
    assert not far_site.records()
    assert len(far_site.log()) == 2 + sum(line["path"].startswith("/v1/models") for line in far_site.log())


async def test_resumable_streams_are_the_controls(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    async with running(site) as gateway:
        headers = {"X-Citadel-Resumable": "1"}
        reply = await ask(gateway.port, chat(stream=True, headers=headers))
        assert (reply.status, reply.error()) == (503, "control_unavailable")
        reply = await ask(gateway.port, chat(stream=True, headers=headers, key="sk-wrong"))
        assert reply.status == 401
    assert not site.settled()


async def test_many_texts_of_one_prompt(site: Site, engine: FakeEngine) -> None:
    site.model("one", engine.port)
    async with running(site) as gateway:
        body = json.dumps({"model": "one", "prompt": ["a", "b"], "n": 2, "max_tokens": 9}).encode()
        assert (await ask(gateway.port, post("/v1/completions", body))).status == 200
        wire: Wire = await connect(gateway.port)
        wire.send(chat(stream=True, n=3))
        assert (await wire.reply()).body.endswith(b"data: [DONE]\n\n")
        await wire.close()
    assert [found.exact for found in site.settled()] == [True, True]
