"""Questions over HTTP, and servers that answer them badly."""

import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from citadel_predictor import settings
from citadel_predictor.prometheus import Client, QueryError

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]
SERIES = {"metric": {"model": "a"}, "values": [[1200, "1.5"], [1500, "NaN"], [1800.0, "+Inf"]]}
GOOD = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": [SERIES]}}).encode()


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients here hang up
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}"
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def says(body: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def asked(url: str, timeout: float = 5.0, **more: str) -> Client:
    return Client(settings.Prometheus(url, timeout, **more))


def reason(client: Client) -> str:
    with pytest.raises(QueryError) as failed:
        client.range("a:b:c", 1200, 1800, 300)
    return failed.value.reason


def test_a_question_and_its_answer() -> None:
    seen: list[tuple[str, str, str | None]] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
        seen.append((handler.path, body, handler.headers["Authorization"]))
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(GOOD)

    took: list[float] = []
    with server(answer) as url:
        found = Client(settings.Prometheus(url + "/", 5.0), took.append).range('a:b:c{d="e"}', 1200, 1800, 300)
    assert found[0].metric == {"model": "a"}
    assert [at for at, _ in found[0].points()] == [1200, 1500, 1800]
    path, body, authorization = seen[0]
    assert path == "/api/v1/query_range"
    form = dict(urllib.parse.parse_qsl(body))
    assert form == {"query": 'a:b:c{d="e"}', "start": "1200", "end": "1800", "step": "300", "timeout": "5s"}
    assert authorization is None
    assert len(took) == 1


@pytest.mark.parametrize(("start", "end", "step"), [(0, 600, 60), (0, 300 * 11_001, 300), (600, 0, 300)])
def test_what_is_beyond_the_budget_is_not_asked(start: int, end: int, step: int) -> None:
    with pytest.raises(ValueError, match="ask for 1 to 11000 of at least 300 s"):
        asked("http://127.0.0.1:1").range("a:b:c", start, end, step)


def test_a_password_and_a_token_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("pass word\n")
    seen: list[str | None] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        says(GOOD)(handler)

    with server(answer) as url:
        asked(url, username="citadel", password_file=str(tmp_path / "secret")).range("a:b:c", 1200, 1800, 300)
        asked(url, bearer_file=str(tmp_path / "secret")).range("a:b:c", 1200, 1800, 300)
    assert seen == ["Basic Y2l0YWRlbDpwYXNzIHdvcmQ=", "Bearer pass word"]
    assert reason(asked("http://127.0.0.1:1", bearer_file=str(tmp_path / "none"))) == "unauthorised"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(b'{"status":"error","error":"parse error"}', 400), "refused"),
        (says(b"<html>", 404), "refused"),
        (says(b"", 401), "unauthorised"),
        (says(b"", 503), "busy"),
        (says(b"", 302, Location="http://127.0.0.1:1/"), "refused"),
        (says(b"<html>not a Prometheus</html>"), "malformed"),
        (says(b'{"data":{"resultType":"vector","result":[]}}'), "malformed"),
        (says(GOOD[:-10]), "malformed"),
        (says(GOOD[:10], Connection="close"), "malformed"),
    ],
)
def test_bad_answers_have_their_names(answer: Answer, expected: str) -> None:
    with server(answer) as url:
        assert reason(asked(url)) == expected


def test_the_servers_own_words_are_passed_on() -> None:
    with server(says(b'{"status":"error","error":"unexpected end"}', 400)) as url:
        with pytest.raises(QueryError, match="answered 400 unexpected end") as failed:
            asked(url).range("a:b:c", 1200, 1800, 300)
        assert not failed.value.everywhere


def test_nobody_there() -> None:
    client = asked("http://127.0.0.1:1")
    assert reason(client) == "unreachable"


def test_an_answer_that_is_too_long() -> None:
    with server(says(b" " * 200_000)) as url:
        client = Client(settings.Prometheus(url, 5.0), most_bytes=100_000)
        assert reason(client) == "too_large"


def test_one_that_never_answers_and_one_that_trickles() -> None:
    over = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        over.wait(10)

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")

    for answer in (silent, slow):
        over.clear()
        with server(answer) as url:
            began = time.monotonic()
            assert reason(asked(url, 0.3)) == "timeout"
            assert time.monotonic() - began < 5
            over.set()
