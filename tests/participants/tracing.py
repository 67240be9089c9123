"""What the tests of traces share: a tracer provider of their own, and words for what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span as AnySpan
from opentelemetry.trace import Tracer, use_span

TRACE = "0af7651916cd43dd8448eb211c80319c"
ATTEMPT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{ATTEMPT}-01"
UNSAMPLED = f"00-{TRACE}-{ATTEMPT}-00"

SECRET = "4111-secret"  # noqa: S105  # what may be in no span, and in no log

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
    monkeypatch.setattr("amends.tracing._told", set())  # of each process, a fault is told once
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


FAULTS = (
    *("get_tracer", "start_span", "is_recording", "set_attributes", "set_attribute"),
    *("set_status", "get_span_context", "end"),
)
"""Every method of a provider, its tracers and its spans that a call or a start may touch."""


class Faulty(TracerProvider):
    """A provider of which one method raises, whenever it is used."""

    def __init__(self, fault: str) -> None:
        super().__init__(shutdown_on_exit=False)
        self._fault = fault

    def get_tracer(self, *arguments: Any, **named: Any) -> Tracer:
        """Give a tracer that has the fault."""
        if self._fault == "get_tracer":
            raise FaultError(SECRET)
        return FaultyTracer(super().get_tracer(*arguments, **named), self._fault)


class FaultyTracer(Tracer):
    """Makes spans that have the fault."""

    def __init__(self, real: Tracer, fault: str) -> None:
        self._real = real
        self._fault = fault

    def start_span(self, *arguments: Any, **named: Any) -> AnySpan:
        """Give a span of which one method raises."""
        if self._fault == "start_span":
            raise FaultError(SECRET)
        span = self._real.start_span(*arguments, **named)
        if hasattr(span, self._fault):
            setattr(span, self._fault, raises(FaultError))
        return span

    def start_as_current_span(self, *arguments: Any, **named: Any) -> Any:
        """Give what an author's handler would use."""
        return use_span(self.start_span(*arguments, **named))


class FaultError(Exception):
    """What a faulty provider raises, with a message that is for nobody."""


def raises(kind: type[Exception]) -> Callable[..., NoReturn]:
    """Make something to be called that raises it."""

    def fail(*arguments: Any, **named: Any) -> NoReturn:
        raise kind(SECRET)

    return fail
