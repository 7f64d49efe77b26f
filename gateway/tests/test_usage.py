"""Usage that is asked for, read, and cut out again, on streams as vLLM writes them."""

import itertools
import json
from typing import Any

import pytest
from citadel_gateway.core.ticket import Used
from citadel_gateway.worker.sse import end_of_events
from citadel_gateway.worker.usage import Ask, Meter, asked, replaced, with_member, with_options
from hypothesis import example, given
from hypothesis import strategies as st

TRICKY = st.sampled_from(
    [
        '"usage":{"prompt_tokens":1}',
        "usage",
        ',"usage":null',
        '"choices":[]',
        "\n\n",
        "data: [DONE]",
        '\\"',
        "{}}",
        "ü💥",
    ]
)
TEXTS = st.lists(st.one_of(TRICKY, st.text(max_size=12)), min_size=1, max_size=6)


def values(used: Used) -> tuple[int, int, int, bool]:
    return used.input, used.output, used.cached, used.exact


def event(value: dict[str, Any]) -> bytes:
    """As pydantic dumps it: no blanks, and no ASCII escapes."""
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace") + b"\n\n"


def figures(prompt: int, output: int, cached: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}
    return found if cached is None else {**found, "prompt_tokens_details": {"cached_tokens": cached}}


def vllm_stream(texts: list[str], ask: Ask, fingerprint: str | None, n: int = 1, prompt: int = 7) -> list[bytes]:
    """The events of vLLM's chat stream for each setting of `stream_options`."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events = []

    def add(choice: dict[str, Any], output: int, after: dict[str, Any]) -> None:
        usage = {"usage": figures(prompt, output)} if ask == "all" else {}
        events.append(event({**head, "choices": [choice], **usage, **after}))

    for index in range(n):
        delta = {"role": "assistant", "content": ""}
        first = {"prompt_token_ids": None, "prompt_text": "usage"}
        add({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, 0, first)
    for number, text in enumerate(texts):
        for index in range(n):
            last = number == len(texts) - 1
            choice = {"index": index, "delta": {"content": text}, "finish_reason": "stop" if last else None}
            stamp = {"system_fingerprint": fingerprint} if last and fingerprint and ask == "nothing" else {}
            add(choice, number + 1, stamp)
    if ask != "nothing":
        tail = {"system_fingerprint": fingerprint} if fingerprint else {}
        events.append(event({**head, "choices": [], "usage": figures(prompt, n * len(texts), 3), **tail}))
    return [*events, b"data: [DONE]\n\n"]


def passed(events: list[bytes], cuts: list[int], meter: Meter) -> bytes:
    """The stream in pieces cut anywhere, joined to whole events as an exchange does it."""
    data = b"".join(events)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    out, tail = b"", b""
    for start, end in itertools.pairwise(edges):
        piece = tail + data[start:end]
        whole = end_of_events(piece)
        tail = piece[whole:]
        if whole:
            out += meter.stream(piece[:whole])
    assert not tail
    return out + meter.rest()


@given(
    texts=TEXTS,
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
    ask=st.sampled_from(["nothing", "total", "all"]),
    n=st.integers(1, 3),
    fingerprint=st.sampled_from([None, "vllm-0.33.0-abc"]),
)
@example(texts=["a", "b"], cuts=[], ask="nothing", n=1, fingerprint="f")
def test_the_client_gets_what_it_would_get_without_us(
    texts: list[str], cuts: list[int], ask: Ask, n: int, fingerprint: str | None
) -> None:
    if n > 1 and ask == "nothing":
        fingerprint = None  # with several texts it cannot be put back
    meter = Meter(ask, n if n > 1 else 0)
    out = passed(vllm_stream(texts, "all", fingerprint, n), cuts, meter)
    assert out == b"".join(vllm_stream(texts, ask, fingerprint, n))
    assert values(meter.used(99)) == values(Used(7, n * len(texts), 3, True))


@given(texts=TEXTS, count=st.integers(1, 20), n=st.integers(1, 3))
def test_a_stream_that_breaks_off_is_counted_so_far(texts: list[str], count: int, n: int) -> None:
    events = vllm_stream(texts, "all", None, n)[:count]
    meter = Meter("nothing", n if n > 1 else 0)
    passed(events, [], meter)
    used = meter.used(99)
    outputs = [json.loads(one[6:])["usage"]["completion_tokens"] for one in events if not one.startswith(b"data: [")]
    assert used.input == 7
    if used.exact:
        assert used.output == n * len(texts)
    elif n == 1:
        assert used.output == outputs[-1]
    else:
        assert used.output == sum(max(0, (count - n - index + n - 1) // n) for index in range(n))


@given(texts=TEXTS, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_an_engine_that_says_nothing_is_counted_by_its_events(texts: list[str], cuts: list[int]) -> None:
    events = vllm_stream(texts, "nothing", "f")
    meter = Meter("nothing")
    assert passed(events, cuts, meter) == b"".join(events)
    assert not meter.used(12).exact
    assert meter.used(12).input == 12
    assert meter.used(12).output == len(texts) + 1  # the first event has no text


def test_openai_writes_null_and_others_blanks() -> None:
    meter = Meter("nothing")
    assert (
        meter.stream(b'data: {"choices": [{"index": 0}], "usage": null}\n\n')
        == b'data: {"choices": [{"index": 0}]}\n\n'
    )
    assert meter.stream(b'data: {"usage": {"prompt_tokens": 2}, "choices": [1]}\n\n') == b'data: {"choices": [1]}\n\n'
    assert meter.stream(b'data: {"usage": {"prompt_tokens": 2}}\n\n') == b"data: {}\n\n"
    assert values(meter.used(0)) == values(Used(2, 0))
    crlf = b'data: {"choices":[1],"usage":null}\r\n\r\ndata: {"choices":[2],"usage":null}\r\n\r\n'
    assert meter.stream(crlf) == b'data: {"choices":[1]}\r\n\r\ndata: {"choices":[2]}\r\n\r\n'


@pytest.mark.parametrize("value", [b'{"prompt_tokens":"x"}', b'{"a":1}', b'{"prompt_tokens":{}}'])
def test_a_usage_that_is_none_is_not_believed(value: bytes) -> None:
    meter = Meter("nothing")
    meter.stream(b'data: {"choices":[],"usage":%b}\n\n' % value)
    assert values(meter.used(5)) == values(Used(5, 0))


def test_several_prompts_have_each_their_own_count() -> None:
    meter = Meter("nothing", 1)
    for index, (prompt, output) in enumerate([(3, 1), (5, 2)]):
        meter.stream(event({"choices": [{"index": index, "text": "x"}], "usage": figures(prompt, output)}))
    assert values(meter.used(0)) == values(Used(8, 3))


def test_responses_and_messages_tell_unasked() -> None:
    meter = Meter()
    created = b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n'
    delta = (
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"\\"usage\\":{}"}\n\n'
    )
    assert meter.stream(created + delta * 3) == created + delta * 3
    assert values(meter.used(4)) == values(Used(4, 3))
    usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 3, "total_tokens": 12}
    done = b"event: response.completed\n" + event({"type": "response.completed", "response": {"usage": usage}})
    assert meter.stream(done) == done
    assert values(meter.used(4)) == values(Used(9, 3, 2, True))

    meter = Meter()
    begin = {"type": "message_start", "message": {"usage": {"input_tokens": 6, "output_tokens": 0}}}
    meter.stream(b"event: message_start\n" + event(begin))
    meter.stream(b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n' * 2)
    assert values(meter.used(0)) == values(Used(6, 2))
    end = {"type": "message_delta", "usage": {"input_tokens": 4, "output_tokens": 5, "cache_read_input_tokens": 2}}
    meter.stream(b"event: message_delta\n" + event(end))
    assert values(meter.used(0)) == values(Used(6, 5, 2, True))


def test_replies() -> None:
    meter = Meter()
    body = b'{"choices":[{"text":"\\"usage\\":{}"}],"usage":{"prompt_tokens":3,"completion_tokens":4},"x":"usage"}'
    meter.reply(body)
    assert values(meter.used(0)) == values(Used(3, 4, 0, True))
    silent = Meter()
    silent.reply(b'{"choices":[{"text":"0123456789"}],"usage":null}')
    assert values(silent.used(2)) == values(Used(2, 12))


@pytest.mark.parametrize(
    ("options", "ask"),
    [
        (b"", "nothing"),
        (b"null", "nothing"),
        (b"{}", "nothing"),
        (b'{"include_usage":false,"continuous_usage_stats":true}', "nothing"),
        (b'{"include_usage":true}', "total"),
        (b'{"include_usage":true,"continuous_usage_stats":true}', "all"),
        (b'"yes"', None),
        (b'{"include_usage":"yes"}', None),
    ],
)
def test_what_a_client_asks_for(options: bytes, ask: Ask | None) -> None:
    assert asked(options) == ask


def test_what_the_engine_is_asked_for() -> None:
    body = b' {"model":"m","x":[1.50, 2]}'
    sent = with_options(body, b"")
    assert sent == b' {"model":"m","x":[1.50, 2],"stream_options":{"include_usage":true,"continuous_usage_stats":true}}'
    for options in (b"null", b'{"include_usage":false,"more":1}'):
        body = b'{"stream_options":{"a":1},"model":"m","stream_options":%b}' % options  # the last of a name counts
        found = json.loads(with_options(body, options))
        assert found["stream_options"].pop("include_usage")
        assert found["stream_options"].pop("continuous_usage_stats")
        assert found["stream_options"] == ({"more": 1} if b"more" in options else {})


def test_members() -> None:
    assert with_member(b'{"a":{}} ', b'"max_tokens":5') == b'{"a":{},"max_tokens":5} '
    assert replaced(b'{ "a": [1, 2.50], "m":"x", "m": "y"}', "m", b'"z"') == b'{"a":[1, 2.50],"m":"z"}'
