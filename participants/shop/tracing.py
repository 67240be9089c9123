"""Where the services' spans go, and the spans of their own that they make.

This is what an author does once per process; amends makes its spans wherever such a provider is.
Without OpenTelemetry, or without a collector in the environment, nothing is traced.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

try:
    from opentelemetry import trace
except ImportError:
    _HAS_API = False
else:
    _HAS_API = True
    _TRACER: Final = trace.get_tracer("shop")

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

FLUSH_S: Final = 2.0
"""For the spans that are still queued at the end: a collector that is gone must not hold it up."""

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@contextmanager
def span(name: str) -> Iterator[None]:
    """Make a span of the service's own, below the call that is being answered."""
    if not _HAS_API:
        yield
        return
    # A refusal is no error, and what an exception says is not for spans.
    with _TRACER.start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        yield


@contextmanager
def exported(service: str) -> Iterator[None]:
    """Send the process's spans to the collector that the OTEL_* variables name, if they name one.

    At the end what is queued is sent, for `FLUSH_S` at most.
    """
    if not _is_wanted():
        yield
        return
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  # they are optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        exporter = _exporter()
    except ImportError as error:
        logger.warning("a collector is named, and nothing is traced: %s is missing", error.name)
        yield
        return
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.namespace": "shop"}),
        shutdown_on_exit=False,  # it waits for a collector that hangs; see below
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # A daemon, because a collector that hangs makes it last as long as it likes.
        last = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(FLUSH_S)
        if last.is_alive():
            logger.warning("the collector does not take the last spans; ending without them")


def _is_wanted() -> bool:
    return (
        any(map(os.environ.get, _ENDPOINTS))
        and os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        and os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "none"
    )


def _exporter() -> SpanExporter:
    """Give an exporter, which reads its endpoint, headers and all else from the environment."""
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter()
    if protocol != "http/protobuf":
        logger.warning("OTEL_EXPORTER_OTLP_PROTOCOL=%s: http/protobuf is used", protocol)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter()
