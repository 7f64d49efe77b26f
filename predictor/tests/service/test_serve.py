"""The service in this process: scrapes that do not wait, health, and its end."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from citadel_predictor import serve, systemd
from citadel_predictor.journal import Journal
from citadel_predictor.serve import Service
from citadel_predictor.settings import ConfigError, Listen

from .fakes import FakePrometheus, requests, settings, traffic


def service(folder: Path, port: int = 0) -> Service:
    lines: list[Any] = []
    made = Service(
        settings(requests(), state_dir=str(folder), listen=Listen("127.0.0.1", port)),
        lambda event, **fields: lines.append((event, fields)),
    )
    fake = FakePrometheus()
    fake.add("model:requests:rate5m", traffic(1), model="small")
    made.cycle.client = fake
    return made


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


@contextmanager
def answering(made: Service) -> Iterator[int]:
    thread = threading.Thread(target=made.front.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield made.port
    finally:
        made.front.shutdown()
        thread.join()
        made.front.server_close()


def test_paths_and_health(tmp_path: Path) -> None:
    made = service(tmp_path)
    with answering(made) as port:
        assert get(port, "/metrics?x=y")[0] == 200
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/") == (404, "there are /metrics and /healthz\n")
        made.beaten -= serve.SILENT
        assert get(port, "/healthz") == (503, "the cycle is stuck\n")


def test_a_scrape_does_not_wait_for_a_cycle(tmp_path: Path) -> None:
    made = service(tmp_path)
    release = threading.Event()
    slow = made.cycle.client
    assert isinstance(slow, FakePrometheus)
    slow.add("model:requests:rate5m", lambda at: float(release.wait(20)), model="slow")
    working = threading.Thread(target=made.cycle.run)
    with answering(made) as port:
        working.start()
        began = time.monotonic()
        assert "llm_predictor_up_to_date 0.0" in get(port, "/metrics")[1]
        assert time.monotonic() - began < 3
        assert working.is_alive()
        made.stopping.set()  # so that it ends at the next piece of work
        release.set()
        with pytest.raises(serve.Stopping):
            made.cycle.beat()
        made.stopping.clear()
        working.join(60)


def test_up_to_date_is_a_matter_of_time(tmp_path: Path) -> None:
    made = service(tmp_path)
    made.complete = time.monotonic()
    assert "llm_predictor_up_to_date 1.0" in made.metrics_text()
    made.complete -= 4 * made.settings.cycle_seconds
    assert "llm_predictor_up_to_date 0.0" in made.metrics_text()
    made.front.server_close()


def test_connections_are_bounded_and_idle_ones_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    made = service(tmp_path)
    with answering(made) as port:
        idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(made.front.most + 1)]
        assert idle[-1].recv(1) == b"", "one too many is closed at once"
        assert idle[0].recv(1) == b"", "and one that says nothing in time"
        assert get(port, "/healthz")[0] == 200
        for each in idle:
            each.close()


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"listen: 127.0.0.1:{port} cannot be listened at: Address already in use"
        ):
            service(tmp_path, port)


def test_a_run_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the main thread, for signals; told to stop by a thread that waits for the first forecast."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = tmp_path / "notify"
    listener.bind(str(address))
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    installed: list[int] = []
    monkeypatch.setattr("signal.signal", lambda number, _: installed.append(number))
    made = service(tmp_path)

    def wait() -> None:
        deadline = time.monotonic() + 60
        while made.complete is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # the cycle may be faster than the watchdog's interval
        made.stop(15, None)

    watcher = threading.Thread(target=wait)
    watcher.start()
    made.run()
    watcher.join()
    listener.settimeout(5)
    said = {listener.recv(100)}
    while b"STOPPING=1" not in said:
        said.add(listener.recv(100))
    listener.close()
    assert said == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}
    assert installed == [15, 2]
    assert "llm_forecast_value" in made.metrics_text()
    assert json.loads((tmp_path / "targets" / "requests.json").read_text())["series"]


def test_words_for_the_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "@citadel-predictor-nobody")
    systemd.notify("READY=1")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval() == 0


def test_log_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    stream = StringIO()
    Journal(stream)("model_card", mase=float("nan"), by={"a": 0.123456789}, words={"b", "a"}, many=(1, 2))
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {"event": "model_card", "mase": None, "by": {"a": 0.123457}, "words": ["a", "b"], "many": [1, 2]}
    Journal()("stopped")
    assert json.loads(capsys.readouterr().out)["event"] == "stopped"
