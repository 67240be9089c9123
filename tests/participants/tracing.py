"""What the tests of traces share: a tracer provider of their own, and words for what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

TRACE = "0af7651916cd43dd8448eb211c80319c"
ATTEMPT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{ATTEMPT}-01"
UNSAMPLED = f"00-{TRACE}-{ATTEMPT}-00"

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocked())
"""
"""The beginning of a program for which OpenTelemetry is not installed."""


class Spans(SpanProcessor):
    """The spans of a process, as they end; and whoever waits is told as they start."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.on_begin: Callable[[Span], None] = lambda _: None
        self.provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        self.provider.add_span_processor(self)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.on_begin(span)

    @property
    def ended(self) -> tuple[ReadableSpan, ...]:
        """All that have ended, in that order."""
        return self._exporter.get_finished_spans()

    @property
    def one(self) -> ReadableSpan:
        """The only one."""
        (span,) = self.ended
        return span

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of a name."""
        return [span for span in self.ended if span.name == name]


@contextmanager
def provided(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Be the process's tracer provider; OpenTelemetry itself lets it be set only once."""
    spans = Spans()
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", spans.provider)
    yield spans
    spans.provider.shutdown()


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Give the trace and the span, in hex."""
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent(span: ReadableSpan) -> str | None:
    """Give the parent's span id, in hex."""
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def facts(span: ReadableSpan) -> dict[str, object]:
    """Give the attributes."""
    return dict(span.attributes or {})
