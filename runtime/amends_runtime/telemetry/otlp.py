"""Spans as OpenTelemetry's SDK has them, and OTLP to a collector, by its exporters.

How to think about it. Spans are ours until the moment they leave: `readable_spans` makes the SDK's
values of them, and the SDK encodes and sends these. Which collector, and how, is worked out by
`otel_variables`; here it is a `Destination`.

1. This module imports OpenTelemetry's SDK, and an exporter only when one is made: a runtime that
   exports nothing imports neither of the exporters.
2. What a sender is (its resource) is the same after a restart, so that spans that are sent once
   more are equal to the first ones. `service.instance.id` is therefore the store's id: there is one
   runtime to a store.
3. The exporters log each failure, with tracebacks. `why_not` takes these lines off them, and who
   sends says it once (see `sending`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.resources import (
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    TELEMETRY_SDK_LANGUAGE,
    TELEMETRY_SDK_NAME,
    TELEMETRY_SDK_VERSION,
    Resource,
)
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanKind as OtelSpanKind

from amends_runtime.telemetry.otel_variables import Destination
from amends_runtime.telemetry.spans import Span, SpanKind

if TYPE_CHECKING:
    import grpc
    import requests
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = [
    "SCOPE",
    "SpanExport",
    "grpc_credentials",
    "http_session",
    "own_variables_hidden",
    "readable_spans",
    "resource",
    "why_not",
]

SCOPE: Final = InstrumentationScope("amends", metadata.version("amends"))
"""The instrumentation scope of all spans and metrics of the runtime."""

MAX_REASON: Final = 200  # characters of an exporter's words that are shown

_KINDS: Final = {SpanKind.INTERNAL: OtelSpanKind.INTERNAL, SpanKind.CLIENT: OtelSpanKind.CLIENT}
_FLAGS: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)


# -- values ----------------------------------------------------------------------------------------


def resource(store_id: str, attributes: Mapping[str, str]) -> Resource:
    """Who sends: the runtime of this store. `attributes` are over what is said by default."""
    return _Sender(
        {
            SERVICE_NAME: "amends",
            SERVICE_VERSION: metadata.version("amends"),
            SERVICE_INSTANCE_ID: store_id,
            TELEMETRY_SDK_NAME: "opentelemetry",
            TELEMETRY_SDK_LANGUAGE: "python",
            TELEMETRY_SDK_VERSION: metadata.version("opentelemetry-sdk"),
            **attributes,
        }
    )


class _Sender(Resource):
    """A resource whose hash is worked out once: the encoder wants it for every single span.

    The SDK's own makes JSON of all attributes each time, which took a quarter of the encoding.
    """

    def __init__(self, attributes: Mapping[str, str]) -> None:
        super().__init__(attributes)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def readable_spans(spans: Sequence[Span], sender: Resource) -> list[ReadableSpan]:
    """The SDK's spans, which the library's `encode_spans` makes OTLP of. In the order given."""
    return [_readable(span, sender) for span in spans]


def _readable(span: Span, sender: Resource) -> ReadableSpan:
    parent = _context(span.trace_id, span.parent_id) if span.parent_id else None
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=parent,
        resource=sender,
        attributes=span.attributes,
        events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
        links=[Link(_context(one.trace_id, one.span_id), one.attributes) for one in span.links],
        kind=_KINDS[span.kind],
        status=_UNSET if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=SCOPE,
    )


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=_FLAGS)


# -- sending ---------------------------------------------------------------------------------------


class SpanExport:
    """Spans to one collector. Made on the main thread, at start; used by one thread.

    Raises ConfigurationError if the library cannot be set up like this.
    """

    def __init__(self, to: Destination, sender: Resource) -> None:
        self._sender = sender
        self._exporter = _span_exporter(to)
        self._why_not = why_not()

    def send(self, spans: Sequence[Span]) -> str | None:
        """Sends spans and waits for the answer, for as long as the destination's time-out.

        Answers why that failed, in a few words for people; None: the collector has them.
        """
        self._why_not.forget()
        try:
            result = self._exporter.export(readable_spans(spans, self._sender))
        except Exception as error:  # noqa: BLE001  # the library's or a collector's, not a saga's
            return f"{type(error).__name__}: {error}"[:MAX_REASON]
        if result.name == "SUCCESS":
            return None
        return self._why_not.first() or "the collector did not take them"

    def close(self) -> None:
        """Breaks off what is being sent. From any thread; may itself hang."""
        self._exporter.shutdown()


def _span_exporter(to: Destination) -> SpanExporter:
    # Both imports take a tenth of a second, which a runtime that exports nothing does not pay.
    with own_variables_hidden():
        if to.protocol == "grpc":
            import grpc  # noqa: PLC0415
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter as GrpcExporter,
            )

            return GrpcExporter(
                endpoint=to.endpoint,
                insecure=not to.is_secure,
                credentials=grpc_credentials(to),
                headers=tuple(to.headers.items()),
                timeout=to.timeout_s,
                compression=grpc.Compression.Gzip if to.gzip else grpc.Compression.NoCompression,
            )
        from opentelemetry.exporter.otlp.proto.http import Compression  # noqa: PLC0415
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as HttpExporter,
        )

        return HttpExporter(
            endpoint=to.endpoint,
            certificate_file=to.certificate or None,
            client_key_file=to.client_key or None,
            client_certificate_file=to.client_certificate or None,
            headers=to.headers,
            timeout=to.timeout_s,
            compression=Compression.Gzip if to.gzip else Compression.NoCompression,
            session=http_session(to),
        )


def http_session(to: Destination) -> requests.Session:
    """The HTTP client for this destination: proxies are the environment's, trust is not.

    Without it `REQUESTS_CA_BUNDLE` would be over the certificate that was given for the collector.
    """
    import requests  # noqa: PLC0415  # as above

    class Session(requests.Session):
        def merge_environment_settings(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            settings = super().merge_environment_settings(*args, **kwargs)
            if to.certificate:
                settings["verify"] = to.certificate
            return settings

    return Session()


def grpc_credentials(to: Destination) -> grpc.ChannelCredentials | None:
    """What gRPC needs for TLS to this destination; None: it is plain text."""
    if not to.is_secure:
        return None
    import grpc  # noqa: PLC0415  # as above

    return grpc.ssl_channel_credentials(
        root_certificates=_content(to.certificate),
        private_key=_content(to.client_key),
        certificate_chain=_content(to.client_certificate),
    )


def _content(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


@contextmanager
def own_variables_hidden() -> Iterator[None]:
    """Hides `OTEL_EXPORTER_OTLP_*` inside, for making one of the library's exporters.

    They would read them once more, by rules of their own (time-outs in seconds, errors for what is
    to be ignored), and over what a `Destination` says. Only at start, before there are threads.
    """
    names = [name for name in os.environ if name.startswith("OTEL_EXPORTER_OTLP_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


# -- what the exporters have to say ----------------------------------------------------------------

_NOISY: Final = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http._common",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
)


class _WhyNot(logging.Filter):
    """Keeps the exporters' log lines instead of letting them through: the first of each export.

    The first says what happened; those after it are of tries that went no better, and of giving up.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.first():
            self._said.first = record.getMessage()[:MAX_REASON]
        return False

    def first(self) -> str:
        """What an exporter has said on this thread first, since `forget`; empty: nothing."""
        return str(getattr(self._said, "first", ""))

    def forget(self) -> None:
        """What comes now is about another export."""
        self._said.first = ""


_why_not: Final = _WhyNot()


def why_not() -> _WhyNot:
    """What the exporters would have logged. They are silent from here on, in the whole process."""
    for name in _NOISY:
        logger = logging.getLogger(name)
        # First, for the library's own filter hides a line that it has seen before.
        if _why_not not in logger.filters:
            logger.filters.insert(0, _why_not)
    return _why_not
