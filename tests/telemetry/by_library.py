"""The same spans as OpenTelemetry's SDK encodes them, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanKind as OtelSpanKind

from amends_runtime.telemetry.spans import Span, SpanKind

KINDS = {SpanKind.INTERNAL: OtelSpanKind.INTERNAL, SpanKind.CLIENT: OtelSpanKind.CLIENT}
SCOPE = InstrumentationScope("amends", metadata.version("amends"))


def encoded_by_library(
    spans: Sequence[Span], sender: Mapping[str, str]
) -> ExportTraceServiceRequest:
    """Give the message that the library makes of these spans."""
    resource = Resource(sender)
    return encode_spans([_readable(span, resource) for span in spans])


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    events = BoundedList.from_seq(
        None, [Event(event.name, event.attributes, event.at_ns) for event in span.events]
    )
    events.dropped = span.dropped_events
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=resource,
        attributes=span.attributes,
        events=events,
        links=[Link(_context(one.trace_id, one.span_id), one.attributes) for one in span.links],
        kind=KINDS[span.kind],
        status=Status(StatusCode.UNSET)
        if span.error is None
        else Status(StatusCode.ERROR, span.error),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=SCOPE,
    )


def _context(trace_id: str, span_id: str) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=flags)
