"""The service: a thread that works, and scrapes that never wait for it."""

import http.server
import signal
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from .cycle import Clock, Cycle
from .exposition import Metrics
from .journal import Journal
from .prometheus import Client
from .settings import ConfigError, Settings
from .state import Store
from .systemd import notify, watchdog_interval

SILENT = 600.0  # seconds without a sign of the working thread, after which it is taken for stuck
IDLE = 5.0  # seconds that a connection may take over its request
CONTENT = "text/plain; version=0.0.4; charset=utf-8"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /metrics and /healthz."""

    timeout = IDLE
    protocol_version = "HTTP/1.1"
    server: "Front"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, self.server.service.metrics_text(), CONTENT)
        elif path == "/healthz":
            well = self.server.service.well()
            self._answer(200 if well else 503, "ok\n" if well else "the cycle is stuck\n", "text/plain")
        else:
            self._answer(404, "there are /metrics and /healthz\n", "text/plain")

    def _answer(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name of http.server
        """Scrapes are not worth a line."""


class Front(http.server.ThreadingHTTPServer):
    """Connections, of which there are only so many at a time."""

    daemon_threads = True
    allow_reuse_address = True
    most: ClassVar[int] = 32

    def __init__(self, address: tuple[str, int], service: "Service") -> None:
        self.service = service
        self.free = threading.Semaphore(self.most)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is no news."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without asking the resolver for our name


class Service:
    """Everything together. ``run`` returns after `stop`."""

    def __init__(
        self, settings: Settings, report: Callable[..., None] | None = None, clock: Clock | None = None
    ) -> None:
        self.settings, self.report, self.clock = settings, report or Journal(), clock or Clock()
        self.metrics = Metrics()
        self.stopping = threading.Event()
        self.beaten = time.monotonic()
        self.complete: float | None = None
        store = Store(Path(settings.state_dir) / "targets", self.report, self._count)
        client = Client(settings.prometheus, lambda took: self.metrics.observe("llm_predictor_query_seconds", took))
        self.cycle = Cycle(settings, client, store, self.metrics, self.report, clock=self.clock, beat=self._beat)
        try:
            self.front = Front((settings.listen.host, settings.listen.port), self)
        except OSError as error:
            address = f"{settings.listen.host}:{settings.listen.port}"
            raise ConfigError(f"listen: {address} cannot be listened at: {error.strerror}") from None

    @property
    def port(self) -> int:
        return int(self.front.server_address[1])

    def metrics_text(self) -> str:
        late = self.complete is None or time.monotonic() - self.complete > 3 * self.settings.cycle_seconds
        return self.metrics.text(up_to_date=not late)

    def well(self) -> bool:
        return time.monotonic() - self.beaten < SILENT

    def stop(self, *_: object) -> None:
        self.stopping.set()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        serving = threading.Thread(target=self.front.serve_forever, name="scrapes", daemon=True)
        working = threading.Thread(target=self._work, name="cycle", daemon=True)
        serving.start()
        working.start()
        self.report("serving", address=f"{self.settings.listen.host}:{self.port}", targets=len(self.settings.targets))
        notify("READY=1")
        interval = watchdog_interval() or 60.0
        while not self.stopping.wait(interval) and working.is_alive():
            if self.well():
                notify("WATCHDOG=1")
        notify("STOPPING=1")
        self.front.shutdown()
        self.front.server_close()
        working.join(self.settings.prometheus.timeout_seconds + 5)
        if not working.is_alive():  # else it is within a fit, and what it had last written stands
            self.cycle.save()
        self.report("stopped")

    def _work(self) -> None:
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                if self.cycle.run():
                    self.complete = time.monotonic()
                wait = self.cycle.wait(time.monotonic() - began)
            except Stopping:
                return
            self._idle(wait)

    def _idle(self, seconds: float) -> None:
        """Wait, with a sign of life from time to time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.stopping.wait(min(left, 30.0)):
            self.beaten = time.monotonic()

    def _beat(self) -> None:
        self.beaten = time.monotonic()
        if self.stopping.is_set():
            raise Stopping

    def _count(self, reason: str) -> None:
        self.metrics.add("llm_predictor_errors_total", reason=reason)


class Stopping(BaseException):
    """Leave the cycle: the service ends."""
