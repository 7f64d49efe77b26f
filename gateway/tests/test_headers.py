"""Which headers go through."""

from citadel_gateway.worker.headers import DROP_TO_CLIENT, DROP_TO_ENGINE, passed_on, status_line


def test_hop_by_hop_headers_and_secrets_stay_here() -> None:
    headers = [
        (b"authorization", b"Bearer sk"),
        (b"content-type", b"application/json"),
        (b"connection", b"close, X-Named"),
        (b"x-named", b"1"),
        (b"te", b"trailers"),
        (b"x-mine", b"2"),
    ]
    assert passed_on(headers, DROP_TO_ENGINE) == b"content-type: application/json\r\nx-mine: 2\r\n"
    two = [(b"connection", b"close, a"), (b"connection", b"b"), (b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    assert passed_on(two, DROP_TO_ENGINE) == b"c: 3\r\n"
    assert passed_on([(b"connection", b"keep-alive"), (b"x", b"y")], DROP_TO_ENGINE) == b"x: y\r\n"


def test_what_a_client_sees() -> None:
    headers = [(b"server", b"uvicorn"), (b"date", b"now"), (b"content-length", b"3"), (b"x-model", b"m")]
    assert passed_on(headers, DROP_TO_CLIENT) == b"x-model: m\r\n"


def test_status_lines() -> None:
    assert status_line(404) == b"HTTP/1.1 404 Not Found\r\n"
    assert status_line(599) == b"HTTP/1.1 599 Status\r\n"
    assert status_line(700) == b"HTTP/1.1 700 Status\r\n"
