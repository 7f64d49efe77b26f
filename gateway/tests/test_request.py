"""What is read from a request's head."""

from citadel_gateway.worker.request import Request


def request(*headers: tuple[bytes, bytes], target: bytes = b"/p?q=1", version: str = "1.1") -> Request:
    found = Request()
    found.target = target
    found.headers.extend(headers)
    found.end_of_head(b"GET", version, True)
    return found


def test_path_and_query() -> None:
    found = request()
    assert (found.path, found.query) == (b"/p", b"q=1")
    assert request(target=b"/p").query == b""


def test_what_is_known_of_the_body() -> None:
    assert request().declared() == 0
    assert request((b"content-length", b"12")).declared() == 12
    assert request((b"transfer-encoding", b"chunked")).declared() == -1


def test_the_size_of_a_head() -> None:
    assert request((b"ab", b"cd"), target=b"/").head_size() == 1 + 8


def test_an_offer_of_another_protocol_can_be_taken_back() -> None:
    found = request((b"host", b"x"), (b"connection", b"Upgrade, X-Hop"), (b"upgrade", b"h2c"), version="1.0")
    assert not found.wants_websocket()
    assert found.without_upgrade() == b"GET /p?q=1 HTTP/1.0\r\nhost: x\r\nconnection: X-Hop\r\n\r\n"
    assert request((b"upgrade", b"WebSocket")).wants_websocket()
