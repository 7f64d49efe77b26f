"""Which headers go through, and how a head is put together. Names are lower case everywhere."""

from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]


USUAL: Final = frozenset((b"keep-alive", b"close", b"Keep-Alive", b"Close"))


def names(text: str) -> frozenset[bytes]:
    return frozenset(text.encode().split())


HOP_BY_HOP: Final = names(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade"
)

# never sent on to an engine: about this hop, or secrets of the client, or set by the gateway itself
DROP_TO_ENGINE: Final = HOP_BY_HOP | names(
    "host content-length authorization api-key x-api-key cookie expect accept-encoding x-request-id origin referer"
    " forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip x-citadel-worker x-citadel-peer"
    " x-citadel-resumable x-session-id x-tag x-use-case x-budget-usd x-language x-request-timeout"
)

# the control process asks for a key itself, so it gets the client's
DROP_TO_CONTROL: Final = HOP_BY_HOP | names(
    "content-length expect x-request-id forwarded x-forwarded-for x-real-ip x-citadel-worker x-citadel-peer"
)

DROP_TO_CLIENT: Final = HOP_BY_HOP | names(
    "content-length server date x-request-id access-control-allow-origin access-control-allow-credentials"
    " access-control-expose-headers"
)

# what another host's gateway says of its own; we say it ourselves
DROP_FROM_ENGINE: Final = DROP_TO_CLIENT | names(
    "x-citadel-model x-citadel-policy x-ratelimit-limit-requests x-ratelimit-remaining-requests"
    " x-ratelimit-reset-requests x-ratelimit-limit-tokens x-ratelimit-remaining-tokens x-ratelimit-reset-tokens"
)


def _line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


STATUS_LINES: Final = {status: _line(status) for status in range(100, 600)}


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or _line(status)


def passed_on(headers: Headers, drop: frozenset[bytes]) -> bytes:
    """The header lines that go through: all but `drop` and those that a Connection header names."""
    lines = []
    for name, value in headers:
        if name not in drop:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif name == b"connection" and value not in USUAL:
            named = drop.union(*(named_in(tokens) for other, tokens in headers if other == b"connection"))
            if named != drop:
                return passed_on(headers, named)
    return b"".join(lines)


def named_in(value: bytes) -> frozenset[bytes]:
    return frozenset(token.strip().lower() for token in value.split(b","))
