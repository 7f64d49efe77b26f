"""Errors in OpenAI's shape."""

import json

import pytest
from citadel_gateway.errors import Refusal, error_body, stream_error


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (504, "server_error"),
    ],
)
def test_the_kind_goes_with_the_status(status: int, kind: str) -> None:
    error = json.loads(error_body(status, "c", 'm"', "p"))["error"]
    assert error == {"message": 'm"', "type": kind, "param": "p", "code": "c"}


def test_headers_of_a_refusal() -> None:
    assert Refusal(429, "c", "m", retry_after=3).headers() == b"retry-after: 3\r\n"
    assert Refusal(405, "c", "m", allow="GET").headers() == b"allow: GET\r\n"
    assert b"www-authenticate" in Refusal(401, "c", "m").headers()
    assert str(Refusal(400, "c", "the message")) == "the message"


def test_the_last_event_of_a_broken_stream() -> None:
    event = stream_error(502, "c", "m")
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
