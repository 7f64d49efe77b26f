"""Traces, received by a small collector that is one: OTLP over HTTP, decoded with OpenTelemetry's own messages."""

import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import citadel_gateway
import msgspec
import pytest
from citadel_gateway.control import settler as settling
from citadel_gateway.control.segments import folder_of
from citadel_gateway.control.telemetry import Telemetry
from citadel_gateway.settings import Telemetry as Wanted
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gateway.tests.controls import ThreadedControl, until
from gateway.tests.fake_worker import FakeJournal, settled
from gateway.tests.site import Site

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
AT = 1_900_000_000.25


class Collector:
    """Keeps what is sent to /v1/traces; answers `status`."""

    def __init__(self) -> None:
        collector = self
        self.status = 200
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name that http.server wants
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.status == 200 and self.path == "/v1/traces":
                    collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002  # so named there

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def take(self, message: Any) -> None:
        for group in message.resource_spans:
            self.resource = attributes(group.resource)
            for scope in group.scope_spans:
                self.spans += scope.spans

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


def telemetry(site: Site, collector: Collector, sample: float = 1.0) -> Telemetry:
    wanted = Wanted(endpoint=collector.endpoint, sample=sample)
    return Telemetry(msgspec.structs.replace(site.settings, telemetry=wanted), delay_ms=20)


def test_a_request_is_two_spans_of_the_clients_trace(site: Site, collector: Collector) -> None:
    traces = telemetry(site, collector)
    traces.take(
        [
            settled(
                "a-1", traceparent=f"00-{TRACE}-{PARENT}-01", asked="auto", backend="[::1]:11400", stream=True, tries=1,
                queue_seconds=0.25, first_byte_seconds=0.5, total_seconds=2.0, cached_tokens=3, session="talk",
            )
        ]
    )  # fmt: skip
    traces.close()
    assert collector.resource["service.name"] == "citadel-gateway"
    engine, whole = sorted(collector.spans, key=lambda span: span.kind, reverse=True)
    assert (whole.name, whole.kind, whole.trace_id.hex(), whole.parent_span_id.hex()) == (
        "gateway chat",
        2,
        TRACE,
        PARENT,
    )
    assert (engine.name, engine.kind, engine.trace_id.hex(), engine.parent_span_id) == (
        "chat one",
        3,
        TRACE,
        whole.span_id,
    )
    assert (whole.start_time_unix_nano, whole.end_time_unix_nano) == (int(AT * 1e9), int((AT + 2) * 1e9))
    assert (engine.start_time_unix_nano, engine.end_time_unix_nano) == (int((AT + 0.25) * 1e9), int((AT + 2) * 1e9))
    assert [(event.name, event.time_unix_nano) for event in engine.events] == [("first_token", int((AT + 0.5) * 1e9))]
    assert attributes(engine) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "auto",
        "gen_ai.response.model": "one",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.conversation.id": "talk",
        "server.address": "[::1]",
        "server.port": 11400,
    }
    found = attributes(whole)
    assert (found["citadel.id"], found["user.id"], found["citadel.cost_usd"]) == ("a-1", "ann", 0.001)
    assert whole.status.code == engine.status.code == 0


def test_failures_are_errors(site: Site, collector: Collector) -> None:
    traces = telemetry(site, collector)
    traces.take(
        [
            settled("a-1", outcome="limited", code="rate_limit_exceeded", status=429),
            settled(
                "a-2", outcome="upstream_error", status=502, tries=2, endpoint="completions", traceparent="nonsense"
            ),
        ]
    )
    traces.close()
    spans = {attributes(span).get("citadel.id", "engine"): span for span in collector.spans}
    refused, failed, engine = spans["a-1"], spans["a-2"], spans["engine"]
    assert (refused.status.code, refused.status.message) == (2, "rate_limit_exceeded")
    assert refused.parent_span_id == b""
    assert (failed.status.code, failed.status.message) == (2, "upstream_error")
    assert (engine.name, engine.status.code) == ("text_completion one", 2)
    assert attributes(engine)["error.type"] == "upstream_error"
    assert refused.trace_id != failed.trace_id


def test_the_client_decides_what_is_sampled_else_the_share(site: Site, collector: Collector) -> None:
    traces = telemetry(site, collector, sample=0.0)
    traces.take(
        [
            settled("a-1", tries=1),
            settled("a-2", tries=1, traceparent=f"00-{TRACE}-{PARENT}-00"),
            settled("a-3", tries=1, traceparent=f"00-{TRACE}-{PARENT}-01"),
        ]
    )
    traces.close()
    assert len(collector.spans) == 2
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


def test_a_collector_that_refuses_is_named_once(
    site: Site, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    traces = telemetry(site, collector)
    collector.status = 400
    for name in ("a-1", "a-2"):
        traces.take([settled(name)])
        traces.processor.force_flush()
    assert traces.exporter.lost == 2
    assert caplog.text.count("takes no spans") == 1
    collector.status = 200
    traces.take([settled("a-3")])
    traces.close()
    assert "takes spans again" in caplog.text
    assert traces.exporter.sent == len(collector.spans) == 1


def test_control_sends_what_it_settles(site: Site, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "INTERVAL", 0.01)
    site.config["telemetry"] = {"endpoint": collector.endpoint + "/"}
    control = ThreadedControl(site).start()
    journal = FakeJournal(folder_of(site.settings))
    journal.write(settled("a-1"))
    until(lambda: control.state.parts["settler"].counts["settled"])
    control.stop()  # sends what is queued
    journal.die()
    assert [attributes(span)["citadel.id"] for span in collector.spans] == ["a-1"]


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    code = "import sys, citadel_gateway.control.app; print('opentelemetry.sdk' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(citadel_gateway.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
