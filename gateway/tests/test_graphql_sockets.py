"""GraphQL over WebSockets (graphql-transport-ws): keys, subscriptions, and ends."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from citadel_gateway.control.client import Client
from citadel_gateway.control.graphql import http, subscriptions
from citadel_gateway.worker import process

from gateway.tests.client import until
from gateway.tests.fake_engine import FakeEngine
from gateway.tests.quality import Served, request, served
from gateway.tests.site import Running, Site, digest

__all__ = ["served"]

PROTOCOL = "graphql-transport-ws"


class Talk:
    """One connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, **message: Any) -> None:
        await self.socket.send_str(json.dumps(message))

    async def receive(self) -> dict[str, Any]:
        found = json.loads(await self.socket.receive_str(timeout=10))
        assert isinstance(found, dict)
        return found

    async def subscribe(self, query: str, name: str = "1", **variables: Any) -> None:
        await self.send(id=name, type="subscribe", payload={"query": query, "variables": variables})

    async def data(self) -> Any:
        """Of the next result."""
        message = await self.receive()
        assert message["type"] == "next", message
        assert "errors" not in message["payload"], message
        return message["payload"]["data"]

    async def code(self) -> str:
        """Of the next error, before or after the first result."""
        message = await self.receive()
        errors = message["payload"] if message["type"] == "error" else message["payload"]["errors"]
        return str(errors[0].get("extensions", {}).get("code", ""))

    async def end(self) -> int | None:
        """The code with which the connection is closed."""
        await self.socket.receive(timeout=10)
        return self.socket.close_code


@asynccontextmanager
async def talk(served: Served, by: str | None = "ann", **more: Any) -> AsyncIterator[Talk]:
    """A connection; `by` is said in connection_init, unless it is None."""
    assert served.session is not None
    async with served.session.ws_connect("/graphql", protocols=(PROTOCOL,), **more) as socket:
        found = Talk(socket)
        if by is not None:
            await found.send(type="connection_init", payload={"Authorization": f"Bearer sk-{by}"})
            assert await found.receive() == {"type": "connection_ack"}
        yield found


async def test_queries_and_mutations(served: Served) -> None:
    served.enter(request("r1", at=time.time()))
    async with talk(served) as one:
        await one.subscribe("query ($n: String!) { model(name: $n) { name } me { user } }", n="uno")
        assert await one.data() == {"model": {"name": "one"}, "me": {"user": "ann"}}
        assert (await one.receive())["type"] == "complete"
        await one.subscribe('mutation { feedback(input: {requestId: "r1", rating: 3}) { rating } }', "1")
        assert await one.data() == {"feedback": {"rating": 3}}
        assert (await one.receive())["type"] == "complete"
        await one.send(type="ping")
        assert await one.receive() == {"type": "pong"}
        assert next(iter(served.state.parts["lines"].open)).owner == "ann-key"
    await until(lambda: not served.state.parts["lines"].open)


async def test_a_key_in_the_header(served: Served) -> None:
    async with talk(served, None, headers={"Authorization": "Bearer sk-page"}) as one:
        await one.send(type="connection_init")
        assert (await one.receive())["type"] == "connection_ack"
        await one.subscribe("{ me { user } }")
        assert await one.data() == {"me": {"user": "page"}}


async def test_without_a_key(served: Served) -> None:
    payloads: tuple[Any, ...] = (None, {}, {"Authorization": "Bearer wrong"}, {"Authorization": 5}, [1])
    for payload in payloads:
        async with talk(served, None) as one:
            await one.send(type="connection_init", payload=payload)
            assert await one.end() in (4400, 4403)
    await until(lambda: not served.state.parts["lines"].open)


async def test_before_the_key(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talk(served, None) as one:
        await one.subscribe("{ me { user } }")
        assert await one.end() == 4401
    monkeypatch.setattr(http, "INIT_SECONDS", 0.05)
    async with talk(served, None) as one:
        assert await one.end() == 4408


async def test_origins(served: Served) -> None:
    for origin in ("https://page.example", "http://gateway"):
        async with talk(served, "ann", headers={"Origin": origin}):
            pass
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        async with talk(served, "ann", headers={"Origin": "https://evil.example"}):
            pass
    assert caught.value.status == 403


async def test_metrics(served: Served) -> None:
    async with talk(served, "page") as one:
        await one.subscribe("subscription { metrics(interval: 1) { at host models { name state } } }")
        first, second = await one.data(), await one.data()
        assert first["metrics"]["host"] == "test"
        assert second["metrics"]["at"] > first["metrics"]["at"]
        await one.send(id="1", type="complete")
        await one.subscribe("subscription { metrics(interval: 0.01) { at } }", "2")
        assert await one.code() == "invalid_request"


async def test_alerts(served: Served) -> None:
    served.site.keys.append({"id": "am", "sha256": digest("sk-am"), "scopes": ["alerts"]})
    served.site.write()
    await until(lambda: served.state.key("Bearer sk-am"))

    async def fire(name: str) -> None:
        alert = {"status": "firing", "labels": {"alertname": name, "severity": "critical"}, "annotations": {}}
        assert (await served.ask("POST", "/v1/alerts", "am", {"version": "4", "alerts": [alert]}))[0] == 200

    await fire("First")
    async with talk(served, "page") as one:
        await one.subscribe("subscription { alerts { name severity status labels } }")
        labels = {"alertname": "First", "severity": "critical"}
        assert await one.data() == {
            "alerts": {"name": "First", "severity": "critical", "status": "firing", "labels": labels}
        }
        await fire("Second")
        assert (await one.data())["alerts"]["name"] == "Second"
    assert (await served.ask("POST", "/graphql", "page", {"query": "{ alerts { name } }"}))[1]["data"]["alerts"]


async def test_who_may_follow_what(served: Served) -> None:
    chat = "subscription { tokens(input: {messages: []}) { index } }"
    for by, query in (("ann", "subscription { metrics { at } }"), ("ann", "subscription { alerts { name } }"),
                      ("page", chat), ("root", chat)):  # fmt: skip
        async with talk(served, by) as one:
            await one.subscribe(query)
            assert await one.code() == "insufficient_scope"


async def test_bounds(served: Served) -> None:
    async with talk(served, "page") as one:
        await one.subscribe("{ a: me { user } " * 5 + "__schema { queryType { name } } }" + "}" * 4)
        assert await one.end() == 4400, "a query that cannot be parsed"
    async with talk(served, "page") as one:
        await one.subscribe("{ __schema { queryType { name } } }")
        assert await one.code() == "insufficient_scope"
        await one.subscribe("{ models { ...a } } fragment a on Model { ...a }", "2")
        assert await one.code() == "query_too_large"
        for number in range(http.OPERATIONS + 1):
            await one.subscribe("subscription { metrics(interval: 60) { at } }", f"m{number}")
        codes = [message for _ in range(http.OPERATIONS + 1) if (message := await one.receive())["type"] == "error"]
        assert codes == [{"id": "m20", "type": "error", "payload": [{"message": "Subscription limit reached"}]}]
        await one.subscribe("subscription { metrics { at } }", "m1")
        assert await one.end() == 4409


NONE = (
    "{",
    "[]",
    "[" * 200_000,
    '{"a":' * 50 + "1" + "}" * 50,
    "5",
    '{"type": "subscribe", "id": "1"}',
    '{"type": "subscribe", "id": 1, "payload": {"query": "{ me { user } }"}}',
    '{"type": "subscribe", "id": "1", "payload": {"query": 5}}',
    '{"type": "subscribe", "id": "1", "payload": {"query": "{ me { user } }", "variables": []}}',
    '{"type": "complete", "id": []}',
    '{"type": "unknown"}',
    "{}",
    "x" * (http.BODY_BYTES + 1),
)


async def test_messages_that_are_none(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for message in NONE:
        async with talk(served) as one:
            await one.socket.send_str(message)
            assert await one.end() in (4400, 1009), message[:80]
    assert "Traceback" not in caplog.text


async def test_binary_is_refused(served: Served) -> None:
    async with talk(served) as one:
        await one.socket.send_bytes(b"\x00")
        assert await one.end() is not None


async def test_a_key_that_is_revoked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "LOOK_SECONDS", 0.05)
    async with talk(served, "page") as one:
        await one.subscribe("subscription { metrics(interval: 60) { at } }")
        await one.data()
        served.site.keys = [key for key in served.site.keys if key["id"] != "page-key"]
        served.site.write()
        assert await one.code() == "invalid_api_key"
        assert (await one.receive())["type"] == "complete"
        await one.subscribe("{ me { user } }", "2")
        assert await one.code() == "invalid_api_key"


async def test_the_end_of_the_process(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "LOOK_SECONDS", 0.05)
    async with talk(served, "page") as one:
        await one.subscribe("subscription { alerts { name } }")
        await asyncio.sleep(0.05)
        drained = asyncio.create_task(served.state.parts["lines"].drain(5))
        while (message := await one.socket.receive(timeout=10)).type is aiohttp.WSMsgType.TEXT:
            assert json.loads(message.data)["type"] == "complete"
        assert one.socket.close_code == 1012
        await drained
    with pytest.raises(aiohttp.WSServerHandshakeError):
        async with talk(served, None):
            pass


@pytest.fixture
async def generating(site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A worker in front of the fake engine; everything is asked through it, as in production."""
    monkeypatch.setattr(process, "GRACE", 0.1)
    found = await Served(site, engine=engine.port).start()
    worker = await Running(site).start()
    client: Client = found.state.parts["client"]
    client.url = f"http://127.0.0.1:{worker.port}"
    assert found.session is not None
    await found.session.close()
    found.session = aiohttp.ClientSession(base_url=f"http://127.0.0.1:{worker.port}")
    yield found
    await found.stop()
    await worker.stop()
    worker.quiet()


TOKENS = "subscription ($i: ChatInput!) { tokens(input: $i) { requestId model index content finishReason } }"
INPUT = {"model": "one", "messages": [{"role": "user", "content": "?"}]}


async def test_tokens(generating: Served) -> None:
    async with talk(generating) as one:
        await one.subscribe(TOKENS, i=INPUT)
        found = []
        while (message := await one.receive())["type"] == "next":
            found.append(message["payload"]["data"]["tokens"])
        assert message["type"] == "complete"
    assert [one["content"] for one in found if one["content"]] == [f" word{number}" for number in range(5)]
    assert [one["index"] for one in found] == list(range(len(found)))
    assert len({one["requestId"] for one in found}) == 1
    assert (await generating.ask("POST", "/graphql", "ann", {"query": "{ me { user } }"}))[1]["data"]["me"]


async def test_leaving_stops_the_engine(generating: Served, engine: FakeEngine) -> None:
    engine.events, engine.delay = 1000, 0.02
    async with talk(generating) as one:
        await one.subscribe(TOKENS, i=INPUT)
        await one.data()
        await one.send(id="1", type="complete")
        await until(lambda: engine.cancelled == 1)
        await one.subscribe(TOKENS, "2", i=INPUT)
        while (await one.receive()).get("id") != "2":
            pass
    await until(lambda: engine.cancelled == 2)


async def test_streams_that_fail(generating: Served, engine: FakeEngine) -> None:
    async with talk(generating) as one:
        await one.subscribe(TOKENS, i={**INPUT, "model": "none"})
        assert await one.code() == "model_not_found"
        assert (await one.receive())["type"] == "complete"
        engine.mode = "die"
        await one.subscribe(TOKENS, "2", i=INPUT)
        while "errors" not in (message := await one.receive())["payload"]:
            assert message["type"] == "next"
        assert message["payload"]["errors"][0]["extensions"]["status"] >= 500


async def test_a_stream_may_end_when_the_process_does(generating: Served, engine: FakeEngine) -> None:
    engine.events, engine.delay = 20, 0.02
    async with talk(generating) as one:
        await one.subscribe(TOKENS, i=INPUT)
        await one.data()
        drained = asyncio.create_task(generating.state.parts["lines"].drain(10))
        count = 1
        while (message := await one.socket.receive(timeout=10)).type is aiohttp.WSMsgType.TEXT:
            kind = json.loads(message.data)["type"]
            count += kind == "next"
        assert kind == "complete"
        assert count >= 20
        assert one.socket.close_code == 1012
        await drained
