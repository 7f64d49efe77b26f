"""OpenTelemetry traces, made of settled requests: nothing is done for them while a request runs.

A request is a span of the gateway, from its arrival to its last byte, and below it one of the engine with the GenAI
attributes. Where the client sent a `traceparent`, both belong to its trace and its decision to sample counts. Spans go
to a collector over OTLP/HTTP from a bounded queue: one that is away or slow costs spans, and nothing else.
"""

import logging
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from citadel_gateway import __version__
from citadel_gateway.records import Settled
from citadel_gateway.settings import Gateway

log = logging.getLogger("citadel_gateway")

QUEUE = 8192  # spans
BATCH = 512
DELAY_MS = 1000
EXPORT_SECONDS = 5.0
OPERATIONS = {
    "chat": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "responses": "chat",
    "messages": "chat",
}
GOOD = {"ok", "client_closed"}

Attributes = dict[str, AttributeValue]


class Reporting(SpanExporter):
    """Says once that the collector does not answer, and once that it does again; the SDK would say it each time."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self.inner = inner
        self.endpoint = endpoint
        self.failing = False
        self.sent = 0
        self.lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self.inner.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed:
            self.lost += len(spans)
        else:
            self.sent += len(spans)
        if failed != self.failing:
            self.failing = failed
            if failed:
                log.error("traces: %s takes no spans", self.endpoint)
            else:
                log.warning("traces: %s takes spans again", self.endpoint)
        return result

    def shutdown(self) -> None:
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class Telemetry:
    """`take` is what the settler calls with each batch of new records."""

    def __init__(self, settings: Gateway, delay_ms: float = DELAY_MS) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # `Reporting` says it
        wanted = settings.telemetry
        inner = OTLPSpanExporter(endpoint=f"{wanted.endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self.exporter = Reporting(inner, wanted.endpoint)
        resource = {"service.name": "citadel-gateway", "service.version": __version__, "host.name": settings.host}
        self.provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(wanted.sample)), resource=Resource(resource), shutdown_on_exit=False
        )
        self.processor = BatchSpanProcessor(
            self.exporter,
            max_queue_size=QUEUE,
            max_export_batch_size=BATCH,
            schedule_delay_millis=delay_ms,
            export_timeout_millis=EXPORT_SECONDS * 1000,
        )
        self.provider.add_span_processor(self.processor)
        self.tracer = self.provider.get_tracer("citadel_gateway", __version__)
        self.propagator = TraceContextTextMapPropagator()

    def take(self, records: Sequence[Settled]) -> None:
        for record in records:
            self.trace(record)

    def trace(self, one: Settled) -> None:
        context = self.propagator.extract({"traceparent": one.traceparent}, Context())
        begin, end = nanoseconds(one.at), nanoseconds(one.at + one.total_seconds)
        whole = self.tracer.start_span(
            f"gateway {one.endpoint}", context, SpanKind.SERVER, gateway_attributes(one), start_time=begin
        )
        failed = one.outcome not in GOOD
        if failed:
            whole.set_status(Status(StatusCode.ERROR, one.code or one.outcome))
        if one.tries and whole.is_recording():
            self.engine(one, set_span_in_context(whole, context), end, failed)
        whole.end(end)

    def engine(self, one: Settled, context: Context, end: int, failed: bool) -> None:
        operation = OPERATIONS.get(one.endpoint, one.endpoint)
        begin = nanoseconds(one.at + one.queue_seconds)
        span = self.tracer.start_span(
            f"{operation} {one.model}", context, SpanKind.CLIENT, engine_attributes(one, operation), start_time=begin
        )
        if one.first_byte_seconds:
            span.add_event("first_token", timestamp=nanoseconds(one.at + one.first_byte_seconds))
        if failed:
            span.set_attribute("error.type", one.code or one.outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """What is queued is sent first, if the collector answers."""
        self.provider.shutdown()


def nanoseconds(at: float) -> int:
    return int(at * 1e9)


def gateway_attributes(one: Settled) -> Attributes:
    """Nothing of what was asked or answered, and no address of the client."""
    return {
        "http.request.method": "POST",
        "http.response.status_code": one.status,
        "user.id": one.user,
        "citadel.id": one.id,
        "citadel.request_id": one.request_id,
        "citadel.key": one.key,
        "citadel.tier": one.tier,
        "citadel.asked": one.asked,
        "citadel.outcome": one.outcome,
        "citadel.policy": one.why.policy,
        "citadel.rule": one.why.rule,
        "citadel.queue_seconds": one.queue_seconds,
        "citadel.tries": one.tries,
        "citadel.cost_usd": one.cost_usd,
        "citadel.worker": one.worker,
    }


def engine_attributes(one: Settled, operation: str) -> Attributes:
    found: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": one.asked or one.model,
        "gen_ai.response.model": one.model,
        "gen_ai.request.stream": one.stream,
        "gen_ai.usage.input_tokens": one.input_tokens,
        "gen_ai.usage.output_tokens": one.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": one.cached_tokens,
    }
    host, colon, port = one.backend.rpartition(":")
    if colon and port.isdecimal():
        found["server.address"] = host
        found["server.port"] = int(port)
    if one.session:
        found["gen_ai.conversation.id"] = one.session
    return found
