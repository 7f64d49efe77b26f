"""Generation for GraphQL: as an ordinary client of a worker, with the caller's own key."""

from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from citadel_gateway.control.client import Client, Unreachable
from citadel_gateway.control.graphql.context import Context
from citadel_gateway.control.graphql.inputs import ChatInput
from citadel_gateway.control.graphql.types import ChatCompletion, Token, TokenUsage
from citadel_gateway.errors import Refusal

PATH = "/v1/chat/completions"
OWN = frozenset({"messages", "model", "max_tokens", "temperature", "stream", "stream_options", "n"})
DATA, DONE = b"data:", b"[DONE]"


def body_of(wanted: ChatInput, *, stream: bool) -> bytes:
    """The request as the OpenAI API has it."""
    more: dict[str, Any] = wanted.parameters or {}
    if not isinstance(more, dict) or OWN & more.keys():
        raise Refusal(400, "invalid_request", f"parameters must be an object without {', '.join(sorted(OWN))}")
    body = {
        **more,
        "model": wanted.model,
        "messages": [{"role": one.role, "content": one.content} for one in wanted.messages],
        "stream": stream,
    }
    if wanted.max_tokens is not None:
        body["max_tokens"] = wanted.max_tokens
    if wanted.temperature is not None:
        body["temperature"] = wanted.temperature
    if stream:
        body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)


def headers_of(wanted: ChatInput) -> dict[str, str]:
    given = {"x-session-id": wanted.session, "x-use-case": wanted.use_case}
    found = {name: value for name, value in given.items() if value}
    if any(not value.isascii() or not value.isprintable() or len(value) > 128 for value in found.values()):
        raise Refusal(400, "invalid_request", "session and useCase: at most 128 printable ASCII characters")
    return found


def refusal_of(status: int, body: bytes) -> Refusal:
    """The worker's refusal, as it said it."""
    try:
        error = msgspec.json.decode(body)["error"]
        return Refusal(status, str(error["code"]), str(error["message"]), param=error.get("param"))
    except (msgspec.DecodeError, KeyError, TypeError):
        return Refusal(502, "bad_reply", "The gateway's worker gave no answer that can be understood")


def usage_of(found: Any) -> TokenUsage | None:
    if not isinstance(found, dict):
        return None
    return TokenUsage(
        input_tokens=int(found.get("prompt_tokens") or 0), output_tokens=int(found.get("completion_tokens") or 0)
    )


async def complete(context: Context, wanted: ChatInput) -> ChatCompletion:
    """The whole answer at once."""
    client: Client = context.state.parts["client"]
    async with client.ask("POST", PATH, context.token, body_of(wanted, stream=False), headers_of(wanted)) as reply:
        body = await reply.body()
    if reply.status != 200:
        raise refusal_of(reply.status, body)
    try:
        raw = msgspec.json.decode(body)
        choice = raw["choices"][0]
        return ChatCompletion(
            request_id=reply.request_id,
            model=str(raw["model"]),
            content=choice["message"].get("content"),
            finish_reason=choice.get("finish_reason"),
            usage=usage_of(raw.get("usage")),
            raw=raw,
        )
    except (msgspec.DecodeError, KeyError, TypeError, IndexError):
        raise Refusal(502, "bad_reply", "The model's answer is no chat completion") from None


async def stream(context: Context, wanted: ChatInput) -> AsyncGenerator[Token, None]:
    """Piece by piece. Leaving it closes the worker's connection, which stops the engine."""
    client: Client = context.state.parts["client"]
    async with client.ask("POST", PATH, context.token, body_of(wanted, stream=True), headers_of(wanted)) as reply:
        if reply.status != 200:
            raise refusal_of(reply.status, await reply.body())
        index = 0
        async for event in reply.events():
            data = event.strip().removeprefix(DATA).strip()
            if not event.startswith(DATA) or data == DONE:
                continue
            token = token_of(reply.request_id, index, data)
            if token is not None:
                index += 1
                yield token


def token_of(request_id: str, index: int, data: bytes) -> Token | None:
    """Nothing for an event without content, reason or usage; an error event is raised."""
    try:
        event = msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise Unreachable("an event that is no JSON") from None
    if "error" in event:
        raise refusal_of(502, data)
    choice: dict[str, Any] = next(iter(event.get("choices") or ()), {})
    content = (choice.get("delta") or {}).get("content") or ""
    usage = usage_of(event.get("usage"))
    reason = choice.get("finish_reason")
    if not content and reason is None and usage is None:
        return None
    return Token(
        request_id=request_id,
        model=str(event.get("model", "")),
        index=index,
        content=content,
        finish_reason=reason,
        usage=usage,
    )
