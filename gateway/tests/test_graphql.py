"""GraphQL over HTTP: what is answered, to whom, with how many questions to the database, and what is refused."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from citadel_gateway.control.client import Client
from citadel_gateway.control.graphql import http
from citadel_gateway.control.graphql.limits import BOUNDS
from citadel_gateway.control.graphql.schema import schema
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.worker import process
from hypothesis import HealthCheck, given, settings
from hypothesis_graphql import from_schema
from sqlalchemy import event

from gateway.tests.client import until
from gateway.tests.fake_engine import FakeEngine
from gateway.tests.quality import KEYS, Served, request, served
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Running, Site, digest

__all__ = ["served"]


async def ask(served: Served, text: str | None, by: str = "ann", **more: Any) -> dict[str, Any]:
    body = {"query": text, **more} if text is not None else more
    status, found = await served.ask("POST", "/graphql", by, body)
    assert status == 200, found
    assert isinstance(found, dict)
    return found


async def data(served: Served, query: str, by: str = "ann", **variables: Any) -> Any:
    found = await ask(served, query, by, variables=variables)
    assert "errors" not in found, found
    return found["data"]


async def refused(served: Served, query: str, by: str = "ann", **variables: Any) -> str:
    """The code of the only error."""
    found = await ask(served, query, by, variables=variables)
    assert len(found["errors"]) == 1, found
    return str(found["errors"][0].get("extensions", {}).get("code", ""))


@contextmanager
def statements(served: Served) -> Iterator[list[str]]:
    """What the database is asked meanwhile, without what the process asks by itself."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "changes" not in statement:
            found.append(statement)

    event.listen(served.state.database.engine, "before_cursor_execute", note)
    yield found
    event.remove(served.state.database.engine, "before_cursor_execute", note)


def fill(served: Served) -> None:
    now = time.time()
    served.enter(
        *(
            request(f"r{number}", at=now - number, session=f"s{number % 3}", model=("one", "two")[number % 2])
            for number in range(10)
        ),
        request("b1", user="bob", at=now, use_case="support"),
    )


async def test_who_am_i(served: Served) -> None:
    found = await data(served, "{ me { user key scopes models tier { name overage } limits { name limit used } } }")
    assert found["me"] == {
        "user": "ann", "key": "ann-key", "scopes": ["inference"], "models": ["*"],
        "tier": {"name": "unlimited", "overage": "block"}, "limits": [],
    }  # fmt: skip


async def test_models(served: Served) -> None:
    fill(served)
    query = "{ models { name aliases context capabilities price { share } analytics(days: 3) { requests costUsd } } }"
    one, two = (await data(served, query))["models"]
    assert (one["name"], one["aliases"], one["context"], one["price"]) == ("one", ["uno"], 8192, {"share": 0.5})
    assert (one["analytics"]["requests"], two["analytics"]["requests"]) == (5, 5)
    one, two = (await data(served, query, "page"))["models"]
    assert one["analytics"] == {"requests": 6, "costUsd": 3.0}
    assert (await data(served, '{ model(name: "uno") { name } }'))["model"] == {"name": "one"}
    assert (await data(served, '{ model(name: "none") { name } }'))["model"] is None
    query = "{ models { name figures { state inflight backends { address up } firstTokenSeconds { p95 } } } }"
    figures = (await data(served, query, "scrape"))["models"][0]["figures"]
    assert figures["state"] in ("unknown", "down")
    assert await refused(served, '{ model(name: "one") { analytics(days: 0) { requests } } }') == "invalid_request"


async def test_a_key_sees_its_own_models(served: Served) -> None:
    served.site.keys.append({"id": "narrow", "user": "ann", "sha256": digest("sk-narrow"), "models": ["two"]})
    served.site.write()
    await until(lambda: served.state.key("Bearer sk-narrow"))
    assert (await data(served, "{ models { name } }", "narrow"))["models"] == [{"name": "two"}]
    assert (await data(served, '{ model(name: "one") { name } }', "narrow"))["model"] is None


async def test_requests(served: Served) -> None:
    fill(served)
    query = "query ($c: String) { requests(first: 4, before: $c) { next nodes { id user costUsd why { policy } } } }"
    seen, cursor = [], None
    while True:
        page = (await data(served, query, c=cursor))["requests"]
        seen += [one["id"] for one in page["nodes"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [f"r{number}" for number in range(10)]
    page = (await data(served, '{ requests(user: "bob") { nodes { id model useCase } } }', "root"))["requests"]
    assert page["nodes"] == [{"id": "b1", "model": "one", "useCase": "support"}]
    assert (await data(served, '{ requests(user: "bob") { nodes { id } } }'))["requests"]["nodes"] == []
    assert await refused(served, '{ requests(before: "zz") { next } }') == "invalid_request"
    (story,) = (await data(served, '{ why(id: "r1") { story state whole } }'))["why"]["story"][:1]
    assert "ann" in story
    for query in ('{ request(id: "b1") { id } }', '{ why(id: "b1") { story } }'):
        assert list((await data(served, query)).values()) == [None]
        assert list((await data(served, query, "root")).values()) != [None]


async def test_no_question_for_each_row(served: Served) -> None:
    fill(served)
    for number in range(4):
        mutation = f'mutation {{ feedback(input: {{requestId: "r{number}", rating: 7}}) {{ id }} }}'
        await data(served, mutation)
    fields = "id conversation { turns } feedback { rating request { id } }"
    query = f"query ($n: Int!) {{ requests(first: $n) {{ nodes {{ {fields} }} }} }}"
    counts = []
    for rows in (1, 4, 10):
        with statements(served) as found:
            page = (await data(served, query, n=rows))["requests"]
        counts.append(sum(one.startswith("SELECT") for one in found))
        assert len(page["nodes"]) == rows
    assert counts == [4, 4, 4], "requests, feedback, conversations, the feedbacks' requests"
    with statements(served) as found:
        await data(served, "{ models { name analytics(days: 7) { requests } more: analytics(days: 7) { costUsd } } }")
    assert sum(one.startswith("SELECT") for one in found) == 3, "use, feedback, estimates, for all models at once"


async def test_figures(served: Served) -> None:
    fill(served)
    await data(served, 'mutation { feedback(input: {requestId: "r1", correct: true, outcome: "solved"}) { valueUsd } }')
    rows = (await data(served, "{ analytics(source: GOLDEN) { feedback } }"))["analytics"]
    assert [one["feedback"] for one in rows] == [0, 0]
    rows = (await data(served, "{ analytics { group requests accuracy valueUsd } }"))["analytics"]
    assert rows[1] == {"group": "two", "requests": 5, "accuracy": 1.0, "valueUsd": 5.0}
    assert (await data(served, "{ usage { group requests } }"))["usage"][-1]["requests"] >= 1
    assert len((await data(served, "{ usage(groupBy: USER) { group } }", "root"))["usage"]) == 2
    assert (await data(served, '{ usage(user: "ann", groupBy: MODEL) { requests } }', "root"))["usage"][0] == {
        "requests": 5
    }
    assert await refused(served, '{ usage(user: "bob") { requests } }') == "insufficient_scope"
    assert await refused(served, "{ analytics(groupBy: USER) { requests } }", "page") == "insufficient_scope"
    assert await refused(served, '{ analytics(from: "2031-01-02", to: "2031-01-01") { group } }') == "invalid_request"
    found = (await data(served, "{ feedback { requestId correct outcome channel: source request { model } } }"))[
        "feedback"
    ]
    assert found == [
        {"requestId": "r1", "correct": True, "outcome": "solved", "channel": "user", "request": {"model": "two"}}
    ]
    assert (await data(served, "{ conversations(state: OPEN) { session } }"))["conversations"] == []
    metrics = (await data(served, "{ metrics { host workers inflight models { name queue } } }", "page"))["metrics"]
    assert (metrics["host"], metrics["inflight"]) == ("test", 0)


ALLOWED = {
    "{ me { user } }": {"ann", "root", "page", "scrape"},
    "{ models { name } }": {"ann", "root", "page", "scrape"},
    "{ metrics { host } }": {"root", "page", "scrape"},
    "{ alerts { name } }": {"root", "page", "scrape"},
    "{ usage { group } }": {"ann", "root"},
    "{ analytics { group } }": {"ann", "root", "page"},
    "{ requests { next } }": {"ann", "root"},
    '{ request(id: "x") { id } }': {"ann", "root"},
    '{ why(id: "x") { state } }': {"ann", "root", "page"},
    "{ conversations { session } }": {"ann", "root"},
    "{ feedback { id } }": {"ann", "root"},
    "{ __schema { queryType { name } } }": {"root"},
    'mutation { setModelState(name: "one", state: SERVING) { state } }': {"root"},
    'mutation { createKey(input: {user: "ann"}) { key } }': {"root"},
    'mutation { revokeKey(id: "bob-key") { state } }': {"root"},
}


async def test_who_may_what(served: Served) -> None:
    """The matrix of REST: each field by each kind of key."""
    for query, allowed in ALLOWED.items():
        for by in set(KEYS) - {"bob"}:
            found = await ask(served, query, by)
            codes = [one["extensions"]["code"] for one in found.get("errors", ())]
            assert codes == ([] if by in allowed else ["insufficient_scope"]), (query, by, found)
    assert (
        await refused(served, 'mutation { feedback(input: {requestId: "x"}) { id } }', "page") == "insufficient_scope"
    )
    assert await refused(served, "mutation { chatCompletion(input: {messages: []}) { model } }", "root") == (
        "insufficient_scope"
    )
    for by in ("", "stranger"):
        assert (await served.ask("POST", "/graphql", by, {"query": "{ me { user } }"}))[0] == 401


async def test_what_operators_do(served: Served) -> None:
    query = 'mutation ($s: ModelState!) { setModelState(name: "uno", state: $s) { name state } }'
    assert (await data(served, query, "root", s="DRAINED"))["setModelState"] == {"name": "one", "state": "draining"}
    assert served.state.draining("one")
    assert (await data(served, query, "root", s="SERVING"))["setModelState"]["state"] != "draining"
    assert not served.state.draining("one")
    create = "mutation ($i: KeyInput!) { createKey(input: $i) { key entry { id user scopes models state } } }"
    made = (await data(served, create, "root", i={"user": "eve", "newUser": True, "scopes": ["read"]}))["createKey"]
    assert made["entry"]["scopes"] == ["read"]
    token = f"={made['key']}"
    assert (await data(served, "{ me { user } }", token))["me"]["user"] == "eve"
    revoked = await data(
        served, "mutation ($k: String!) { revokeKey(id: $k) { state } }", "root", k=made["entry"]["id"]
    )
    assert revoked["revokeKey"]["state"] == "revoked"
    assert (await served.ask("POST", "/graphql", token, {"query": "{ me { user } }"}))[0] == 401
    for wrong, code in (({"user": "nobody"}, "user_not_found"), ({"user": "../x"}, "invalid_request"),
                        ({"user": "ann", "scopes": ["root"]}, "invalid_request"),
                        ({"user": "ann", "models": ["none"]}, "model_not_found")):  # fmt: skip
        assert await refused(served, create, "root", i=wrong) == code
    log = (await served.ask("GET", "/admin/audit", "root"))[1]
    assert {one["via"] for one in log} == {"graphql"}
    assert {one["who"] for one in log} == {"root"}


async def test_feedback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("citadel_gateway.control.feedback.SETTLING", (0.0,))
    fill(served)
    give = "mutation ($i: FeedbackInput!) { feedback(input: $i) { rating source } }"
    assert (await data(served, give, i={"requestId": "r1", "rating": 8}))["feedback"] == {"rating": 8, "source": "user"}
    assert await refused(served, give, i={"requestId": "b1", "rating": 8}) == "not_found"
    assert await refused(served, give, i={"requestId": "r1", "rating": 11}) == "invalid_request"
    assert await refused(served, give, i={"requestId": "r1", "outcome": "invented"}) == "invalid_request"


async def test_the_database_is_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise DatabaseAwayError("secret reason")

    monkeypatch.setattr(served.state.database, "read", away)
    found = await ask(served, "{ me { user } feedback { id } }")
    assert found["errors"][0]["extensions"] == {"code": "database_unavailable", "status": 503}
    assert "secret" not in json.dumps(found)


async def test_faults_stay_inside(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise ValueError("a secret value")

    monkeypatch.setattr(served.state.database, "read", broken)
    found = await ask(served, "{ feedback { id } }")
    assert found["errors"][0]["extensions"] == {"code": "internal_error", "status": 500}
    assert "secret" not in json.dumps(found)
    assert "Traceback" not in json.dumps(found)
    assert "graphql: feedback failed" in caplog.text


# What is built to hurt ------------------------------------------------------------------------------------------------
ONE_CHAT = "chatCompletion(input: {messages: []}) { model }"
CHAIN = "".join(f"fragment f{n} on Model {{ ...f{n + 1} ...f{n + 1} }} " for n in range(25))
BOMBS = {
    "depth": "{ feedback {" + " request { feedback {" * 10 + " id " + "} }" * 10 + "} }",
    "nesting": "{ me" * 900,
    "aliases": "{" + " ".join(f"a{n}: me {{ user }}" for n in range(BOUNDS.aliases + 1)) + "}",
    "fields": "{ me {" + " user" * (BOUNDS.fields + 1) + "} }",
    "cycle": "{ models { ...a } } fragment a on Model { analytics { group } ...b } fragment b on Model { ...a }",
    "doubling": f"{{ models {{ ...f0 }} }} {CHAIN} fragment f25 on Model {{ name }}",
    "rows": "{ requests(first: 200) { nodes { feedback { request { feedback { id } } } } } }",
    "directives": "{ me { user " + "@include(if: true) " * 100 + "} }",
    "tokens": "{ me { user } } #\n" + "query q { me { user } } " * 1000,
    "chats": "mutation {"
    + " ".join(f"a{n}: chatCompletion(input: {{messages: []}}) {{ model }}" for n in range(29))
    + "}",
}


async def test_bombs(served: Served) -> None:
    for name, bomb in BOMBS.items():
        started = time.process_time()
        found = await ask(served, bomb)
        assert time.process_time() - started < 1, name
        assert found["data"] is None, name
        assert len(found["errors"]) == 1, name
        assert len(json.dumps(found)) < 1000, name


async def test_what_is_no_request(served: Served) -> None:
    async def status(body: bytes, kind: str = "application/json") -> int:
        assert served.session is not None
        headers = {"Authorization": "Bearer sk-ann", "Content-Type": kind}
        async with served.session.post("/graphql", data=body, headers=headers) as reply:
            error = (await reply.json()).get("error", {})
            assert set(error) in ({"message", "type", "param", "code"}, set())
            return reply.status

    query = b'{"query": "{ me { user } }"}'
    assert await status(query) == 200
    assert await status(query, "application/json; charset=utf-8") == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/graphql", ""):
        assert await status(query, kind) == 415
    assert await status(b"[" + query + b"]") == 400
    assert await status(b'{"query": 5}') == 400
    assert await status(b'{"query": "{ me { user } }", "variables": []}') == 400
    assert await status(b"{" * 100_000) == 400
    assert await status(b'{"variables": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001) == 400
    assert await status(b'{"query": "' + b" " * http.BODY_BYTES + b'"}') == 413
    assert await status(b"\xff\xfe") == 400
    for method in ("GET", "PUT", "DELETE"):
        assert (await served.ask(method, "/graphql?query={me{user}}"))[0] == 405


NONE: tuple[dict[str, Any], ...] = (
    {},
    {"query": ""},
    {"query": "{"},
    {"query": "{ nothing }"},
    {"query": "subscription { metrics { host } }"},
    {"query": "query a { me { user } } query b { me { key } }"},
    {"query": "{ me { user } }", "operationName": "c"},
    {"query": "{ requests(first: 201) { next } }"},
    {"query": '{ requests(first: "x") { next } }'},
    {"query": "query ($v: Int!) { requests(first: $v) { next } }", "variables": {"v": [[[1]]]}},
)


async def test_queries_that_are_none(served: Served) -> None:
    for body in NONE:
        found = await ask(served, None, **body)
        assert len(found["errors"]) >= 1, body
        assert "Did you mean" not in json.dumps(found)


async def test_deep_variables(served: Served) -> None:
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    query = "mutation ($p: JSON) { chatCompletion(input: {messages: [], parameters: $p}) { model } }"
    assert await refused(served, query, p=deep) == "query_too_large"


async def test_the_schema_is_shown_to_administrators(served: Served) -> None:
    from graphql import get_introspection_query

    found = await ask(served, get_introspection_query(), "root")
    assert len(found["data"]["__schema"]["types"]) > 30
    assert await refused(served, get_introspection_query(), "ann") == "insufficient_scope"
    hidden = '{ ...f } fragment f on Query { __type(name: "Me") { name } }'
    assert await refused(served, hidden) == "insufficient_scope"
    assert (await data(served, "{ me { __typename } }"))["me"] == {"__typename": "Me"}


async def test_persisted_queries(served: Served) -> None:
    query = "query ($n: String!) { model(name: $n) { name } }"
    asked = {"persistedQuery": {"version": 1, "sha256Hash": hashlib.sha256(query.encode()).hexdigest()}}
    found = await ask(served, None, extensions=asked)
    assert found["errors"][0]["message"] == "PersistedQueryNotFound"
    for text in (query, None):
        found = await ask(served, text, extensions=asked, variables={"n": "one"})
        assert found["data"] == {"model": {"name": "one"}}
    wrong = "{ metrics { host } nothing }"
    asked = {"persistedQuery": {"version": 1, "sha256Hash": hashlib.sha256(wrong.encode()).hexdigest()}}
    assert (await ask(served, wrong, extensions=asked))["data"] is None
    assert (await ask(served, None, extensions=asked))["errors"][0]["message"] == "PersistedQueryNotFound"


async def test_a_query_that_takes_too_long(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "QUERY_SECONDS", 0.05)
    monkeypatch.setattr(schema, "execute", lambda *_, **__: asyncio.sleep(5))
    assert await refused(served, "{ me { user } }") == "timeout"


async def test_queries_that_nobody_thought_of(
    site: Site, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made from the schema: whatever is asked, the fault is never ours."""
    monkeypatch.setattr("citadel_gateway.control.feedback.SETTLING", (0.0,))
    queries: list[str] = []

    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(from_schema(schema.as_str()))
    def collect(query: str) -> None:
        queries.append(query)

    collect()
    served = await Served(site, postgres_server).start()
    try:
        fill(served)
        for query in queries:
            for by in ("ann", "root"):
                errors = (await ask(served, query, by)).get("errors", ())
                assert "internal_error" not in [one.get("extensions", {}).get("code") for one in errors], query
    finally:
        await served.stop()


# Generation -----------------------------------------------------------------------------------------------------------
@pytest.fixture
async def generating(site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """The control process as the client of a worker, in front of the fake engine."""
    monkeypatch.setattr(process, "GRACE", 0.1)
    found = await Served(site, engine=engine.port).start()
    worker = await Running(site).start()
    client: Client = found.state.parts["client"]
    client.url = f"http://127.0.0.1:{worker.port}"
    yield found
    await found.stop()
    await worker.stop()
    worker.quiet()


FIELDS = "requestId model content finishReason usage { outputTokens }"
CHAT = f"mutation ($i: ChatInput!) {{ chatCompletion(input: $i) {{ {FIELDS} }} }}"


async def test_a_chat(generating: Served, engine: FakeEngine) -> None:
    wanted = {
        "model": "one", "messages": [{"role": "user", "content": "?"}], "maxTokens": 9, "temperature": 0.5,
        "session": "s1", "useCase": "support", "parameters": {"seed": 4},
    }  # fmt: skip
    found = (await data(generating, CHAT, i=wanted))["chatCompletion"]
    assert found.pop("requestId")
    assert found == {"model": "one", "content": "It is 42.", "finishReason": "stop", "usage": {"outputTokens": 4}}
    body = json.loads(engine.seen[-1].body)
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (9, 0.5, 4)
    for wrong in ({"parameters": {"stream": True}}, {"parameters": [1]}, {"session": "x\r\ny"}, {"useCase": "x" * 200}):
        assert await refused(generating, CHAT, i={**wanted, **wrong}) == "invalid_request"
    assert await refused(generating, CHAT, i={**wanted, "model": "none"}) == "model_not_found"
    engine.mode = "garbage"
    assert await refused(generating, CHAT, i=wanted)
    generating.state.parts["client"].url = "http://127.0.0.1:9"
    assert await refused(generating, CHAT, i=wanted) == "gateway_unavailable"


async def test_leaving_stops_the_engine(generating: Served, engine: FakeEngine) -> None:
    engine.mode, engine.delay = "slow", 30
    wanted = {"model": "one", "messages": [{"role": "user", "content": "?"}]}
    asking = asyncio.create_task(data(generating, CHAT, i=wanted))
    await until(lambda: engine.seen)
    asking.cancel()
    await until(lambda: engine.cancelled == 1)
