"""A head that was accepted once, met again."""

import pytest
from citadel_gateway.worker.heads import known_head

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAccept: */*\r\n\r\n"


def message(body: bytes, head: bytes = HEAD) -> bytes:
    return head % len(body) + body


def test_the_same_head_gives_the_next_body() -> None:
    known = known_head(message(b"{}"), 2)
    assert known is not None
    for body in (b"", b"{}", b"x" * 70_000):
        assert known.body_of(message(body)) == body


@pytest.mark.parametrize(
    "data",
    [
        message(b"{}", HEAD.replace(b"Host: x", b"Host: y")),
        message(b"{}", HEAD.replace(b"*/*", b"text/plain")),
        message(b"{}")[:-1],
        message(b"{}") + b"GET / HTTP/1.1\r\n\r\n",
        HEAD.replace(b"%d", b"+2") + b"{}",
        HEAD.replace(b"%d", b"2, 2") + b"{}",
        HEAD.replace(b"%d", b"") + b"{}",
        HEAD.replace(b"%d", b"00000000000002") + b"{}",
        HEAD.replace(b"%d", "٢".encode()) + b"{}",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2\r\nTransfer-Encoding: chunked") + b"{}",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2\r\nContent-Length: 2") + b"{}",
    ],
)
def test_everything_else_is_for_the_parser(data: bytes) -> None:
    known = known_head(message(b"{}"), 2)
    assert known is not None
    assert known.body_of(data) is None


def test_what_cannot_be_remembered() -> None:
    assert known_head(message(b"{}"), 3) is None
    assert known_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 2) is None
    assert known_head(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", 0) is None
    assert known_head(b"POST / HTTP/1.1\r\ncontent-length: 02\r\n\r\n{}", 2) is None
