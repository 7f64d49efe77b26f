"""A gateway of two workers and Debian's Chromium. Figures come from a fake worker that reports what a test wants."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from citadel_gateway.metrics import BUCKETS, Counter, Distribution, Report, write_atomically
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from gateway.tests.client import ADMIN, KEY
from gateway.tests.processes import start, stop, wait_for
from gateway.tests.site import Site, digest, free_port

READER, ALERTER = "sk-live-reader", "sk-live-alerter"
MODELS = ("mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini")
FIRST, DURATION = "llm_gateway_time_to_first_token_seconds", "llm_gateway_request_duration_seconds"


class FakeWorker:
    """Writes the report of a worker that is not there, twice a second, with the load that it was told of."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics-9.json"
        self.inflight = dict.fromkeys(MODELS, 0)
        self.queue = dict.fromkeys(MODELS, 0)
        self.rate = dict.fromkeys(MODELS, 0.0)  # requests a second
        self.first = dict.fromkeys(MODELS, 0.3)
        self.tokens: dict[tuple[str, ...], float] = {}
        self.requests: dict[tuple[str, ...], float] = {}
        self.times: dict[tuple[str, str], list[int]] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.work(0.5)

    def work(self, seconds: float) -> None:
        for model, rate in self.rate.items():
            count = rate * seconds
            for kind, tokens in (("input", 210), ("output", 96)):
                self.tokens[model, kind] = self.tokens.get((model, kind), 0) + count * tokens
            for code, share in (("200", 0.97), ("429", 0.02), ("502", 0.01)):
                labels = (model, "chat", code)
                self.requests[labels] = self.requests.get(labels, 0) + count * share
            for name, value in ((FIRST, self.first[model]), (DURATION, self.first[model] * 9)):
                counts = self.times.setdefault((name, model), [0] * (len(BUCKETS[name]) + 1))
                place = sum(bound < value for bound in BUCKETS[name])
                counts[place] += max(1, round(count * 10))
                counts[min(place + 1, len(counts) - 1)] += 1
        self.write()

    def write(self) -> None:
        report = Report(
            9,
            time.time(),
            {
                "llm_gateway_tokens_total": [Counter(labels, int(value)) for labels, value in self.tokens.items()],
                "llm_gateway_requests_total": [Counter(labels, int(value)) for labels, value in self.requests.items()],
            },
            {
                name: [self.distribution(name, model, counts) for (one, model), counts in self.times.items()
                       if one == name]
                for name in (FIRST, DURATION)
            },
            {
                "llm_gateway_inflight_requests": [Counter((model,), value) for model, value in self.inflight.items()],
                "llm_gateway_queue_length": [Counter((model,), value) for model, value in self.queue.items()],
                "llm_gateway_connections": [Counter((), 41.0)],
            },
        )  # fmt: skip
        write_atomically(self.path, msgspec.json.encode(report))

    def distribution(self, name: str, model: str, counts: list[int]) -> Distribution:
        return Distribution((model,) if name == FIRST else (model, "chat", "true"), counts, 0.0)


class Served:
    """The gateway, as `serve` runs it."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self.site.config["host"] = "hx-llm-server-01"
        self.site.keys += [
            {"id": "page", "sha256": digest(READER), "scopes": ["read"]},
            {"id": "alertmanager", "sha256": digest(ALERTER), "scopes": ["alerts"]},
        ]
        for model in MODELS:
            self.site.model(model, free_port(), context=8192)
        self.worker = FakeWorker(folder / "run")
        self.url = f"http://127.0.0.1:{self.site.config['listen']['port']}"

    def __enter__(self) -> "Served":
        with ExitStack() as stack:  # whatever fails, nothing stays behind
            config = str(self.site.write())
            for model in self.site.models:
                port = model["backends"][0]["port"]
                engine = start("-m", "gateway.tests.fake_engine", str(port))
                stack.callback(stop, engine)
                wait_for(f"http://127.0.0.1:{port}/health", engine)
            self.process = start("-m", "citadel_gateway", "serve", "--config", config)
            stack.callback(stop, self.process, 60)
            wait_for(f"{self.url}/live", self.process, 60)
            self.worker.thread.start()
            stack.callback(self.worker.thread.join)
            stack.callback(self.worker.ended.set)
            self.held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def post(self, path: str, body: Any = None, key: str = ADMIN) -> None:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            reply.read()

    def ask(self, model: str) -> None:
        self.post("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "x"}]}, KEY)

    def control(self) -> int:
        """The process id of the control process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"\0control\0" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def alert(self, name: str, status: str = "firing", severity: str = "critical", **more: str) -> None:
        sent = {
            "status": status,
            "labels": {"alertname": name, "severity": severity, "model": "mixtral-8x7b"},
            "annotations": {"runbook_url": f"https://runbooks.example/{name}", **more},
            "startsAt": "2026-03-17T09:30:00Z",
            "endsAt": "0001-01-01T00:00:00Z" if status == "firing" else "2026-03-17T09:42:00Z",
            "fingerprint": name,
        }
        self.post("/v1/alerts", {"version": "4", "alerts": [sent]}, ALERTER)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture(scope="session")
def browser(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Closed before the gateway is."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()
