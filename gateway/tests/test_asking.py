"""What is read of a request, and the body that an engine gets."""

import json
from typing import Any

import pytest
from citadel_gateway.core.catalogue import Model
from citadel_gateway.core.keyring import Caller, Person
from citadel_gateway.core.ticket import Ticket
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Key, Limits, Tier, User
from citadel_gateway.worker.asking import NO_HINTS, Asking, hints_of, prompts, read, with_model
from citadel_gateway.worker.request import Request
from hypothesis import given
from hypothesis import strategies as st

from gateway.tests.site import digest

LIMITS = Limits(n=8, max_tokens=5000)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def model(name: str = "one", context: int = 1000, tokens_per_byte: float = 1.0) -> Model:
    found = Model(name)
    found.context, found.tokens_per_byte = context, tokens_per_byte
    return found


def asking(body: bytes | dict[str, Any], capability: str = "chat", **tier: Any) -> tuple[Asking, Ticket]:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = Asking(body, capability)
    ticket = Ticket("i", "r", b"r", capability, b"/", "c", 0.0, 0.0, len(body))
    ticket.key = Caller(Key("k", digest("k")), Person(User("u"), Tier("t", **tier)))
    found.describe(ticket, NO_HINTS, LIMITS, 16)
    return found, ticket


def test_another_name_in_the_same_body() -> None:
    body = b'{ "a": [1, 2.50], "model" :"uno", "b": {"model": "uno"}, "c": "\xc3\xa4\\u0041" }'
    assert with_model(body, "uno", "one") == b'{"a":[1, 2.50],"model":"one","b":{"model": "uno"},"c":"\xc3\xa4\\u0041"}'
    body = b'{ "a": [1, 2.50], "model" : "uno", "c": "m" }'
    assert with_model(body, "uno", "one") == b'{ "a": [1, 2.50], "model" : "one", "c": "m" }'


@given(
    members=st.dictionaries(st.text(max_size=8) | st.sampled_from(["stream_options", "max_tokens", "x"]), VALUES),
    name=st.text(min_size=1, max_size=6),
    escaped=st.booleans(),
    stream=st.booleans(),
)
def test_all_but_what_is_ours_goes_through(members: dict[str, Any], name: str, escaped: bool, stream: bool) -> None:
    """The engine sees the members of the client with the same values, under whatever escapes and duplicates."""
    for taken in ("model", "stream", "stream_options", "max_tokens", "n", "best_of", "user", "max_completion_tokens"):
        members.pop(taken, None)
    members.pop("max_output_tokens", None)
    wanted = {**members, "model": name, "stream": stream}
    body = json.dumps(wanted)
    if escaped:
        body = body.replace('"model"', '"\\u006dodel"')
    body = '{"model": "first", ' + body[1:]
    found, _ = asking(body.encode(), tokens_per_minute=10)
    assert found.wanted.model == name
    sent = json.loads(found.body_for(model("two")))
    assert sent.pop("model") == "two"
    assert sent.pop("max_tokens") == 1000
    if stream:
        assert sent.pop("stream_options") == {"include_usage": True, "continuous_usage_stats": True}
    assert sent.pop("stream") == stream
    assert sent == members


@pytest.mark.parametrize("null", [b'"max_tokens": null', b'"max_tok\\u0065ns": null', b'"x": {"max_tokens": 7}'])
def test_a_bound_that_cannot_be_undone(null: bytes) -> None:
    found, ticket = asking(b'{"model":"one", %b}' % null, tokens_per_day=5000, max_output_tokens=50)
    assert json.loads(found.body_for(model()))["max_tokens"] == 50
    assert ticket.output == 50
    responses, _ = asking(b'{"model":"one","input":"x"}', "responses", tokens_per_day=5000)
    assert json.loads(responses.body_for(model()))["max_output_tokens"] == 1000  # the context
    free, _ = asking(b'{"model":"one"}')
    assert free.body_for(model()) == b'{"model":"one"}'


def test_what_a_request_can_use_at_most() -> None:
    found, ticket = asking({"model": "one", "max_tokens": 10, "messages": []})
    size = len(found.body)
    assert found.reservation(ticket, model()) == size + 10
    assert found.reservation(ticket, model(tokens_per_byte=0.5)) == -(-size // 2) + 10
    assert found.reservation(ticket, model(context=20)) == 20
    found, ticket = asking({"model": "one", "max_tokens": 10, "n": 3, "prompt": ["a", "b"]}, "completions")
    assert ticket.texts == 6
    assert found.reservation(ticket, model()) == len(found.body) + 60
    assert found.many == 3
    found, ticket = asking({"model": "one", "max_tokens": 10, "max_completion_tokens": 20})
    assert ticket.output == 20
    found, ticket = asking({"model": "one", "input": "x" * 100, "max_tokens": 10}, "embeddings", tokens_per_day=9)
    assert (ticket.output, found.limit_output) == (0, 0)
    assert found.reservation(ticket, model()) == len(found.body)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [(b'"a"', 1), (b"[1,2,3]", 1), (b"[]", 1), (b'["a","b"]', 2), (b"[[1],[2],[3]]", 3), (b"", 1)],
)
def test_prompts(prompt: bytes, number: int) -> None:
    assert prompts(memoryview(prompt)) == number


@pytest.mark.parametrize("tools", [[], None, [{"type": "function"}]])
def test_tools_are_noticed(tools: object) -> None:
    _, ticket = asking({"model": "one", "tools": tools})
    assert ticket.query is not None
    assert ticket.query.tools == bool(tools)


def test_the_beginning_of_the_prompt_decides_where_it_goes() -> None:
    hashes = []
    for last in ("a", "b"):
        _, ticket = asking({"model": "one", "messages": [{"role": "user", "content": "the same " * 9 + last}]})
        assert ticket.query is not None
        hashes.append(ticket.query.prompt_hash)
    assert hashes[0] == hashes[1] != 0


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'{"model":1}', b'{"model":"\xff"}', b"{" * 100_000, b'{"model":"x",}']
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert refused.value.status == 400


def test_headers_are_read_once_and_kept_short() -> None:
    request = Request()
    request.headers = [
        (b"x-session-id", b"s" * 500),
        (b"x-tag", b"a\x01b"),
        (b"accept-language", b"de-CH;q=0.9, en"),
        (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
        (b"x-budget-usd", b"0.01"),
        (b"x-request-timeout", b"2.5"),
        (b"x-citadel-resumable", b"1"),
    ]
    hints = hints_of(request)
    assert (len(hints.session), hints.tag, hints.language) == (128, "ab", "de-CH")
    assert (hints.budget_usd, hints.timeout, hints.resumable) == (0.01, 2.5, True)
    assert hints.traceparent.endswith("-01")
    assert hints_of(request) is hints
    plain = Request()
    plain.headers = [(b"traceparent", b"nonsense"), (b"x-language", b"fr")]
    assert (hints_of(plain).traceparent, hints_of(plain).language) == ("", "fr")
    for name in (b"x-budget-usd", b"x-request-timeout"):
        for value in (b"", b"-1", b"1e9", b"nan", b"1.5.5", b"99999999999"):
            bad = Request()
            bad.headers = [(name, value)]
            with pytest.raises(Refusal):
                hints_of(bad)
