"""Traces: a participant's part in a saga's trace, and a client's trace that a saga joins.

How to think about it
---------------------

1. This is the only file that knows OpenTelemetry, and of it only the API, which is optional
   (``amends[otel]``). Without it everything here does nothing.
2. Whether and where spans go is the author's affair: they come from the tracer provider that the
   author's process has set up, in code or by ``opentelemetry-instrument``. Nothing is configured
   here, and a provider may be set at any time.
3. A call is one SERVER span below the runtime's attempt, whose `traceparent` the call carries; each
   poll is a call, too. It covers the wait for a place. While the handler runs the span is the
   current one, in the event loop and in the barrier's threads.
4. A span says ids, outcomes, reasons and types of exceptions. Never a payload, and never the
   message of an exception or an outcome, which may quote one.
5. Tracing decides nothing. By the time of a span's end the handler has run and the barrier has
   committed; an answer that is lost then is an effect that nobody hears of. So whatever touches
   OpenTelemetry does so through `_safely`: what an author's provider raises is logged, once for
   each type, and the call goes on without what it would have told.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Final, ParamSpec, Self, TypeVar

from amends.outcomes import Broken, Done, Heuristic, InProgress, Outcome, Rejected, Verb
from amends.v1 import participant_pb2

try:
    from opentelemetry import context as otel_context
    from opentelemetry import trace as otel
    from opentelemetry.trace.propagation import tracecontext
except ImportError:  # the API is an extra
    _IS_AVAILABLE = False
else:
    _IS_AVAILABLE = True
    _PROPAGATOR: Final = tracecontext.TraceContextTextMapPropagator()
    _EMPTY: Final = otel_context.Context()

if TYPE_CHECKING:
    from contextvars import Token

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

SCOPE: Final = "amends"
"""The instrumentation scope of our spans."""

MAX_SHOWN: Final = 512
"""Characters of a name from the wire; a child saga's id, the longest, has fewer."""

MAX_TOLD: Final = 64
"""Types of exceptions that are told of; a program that makes types as it goes fills no log."""

TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C trace context, version 00."""

LATER_TRACEPARENT: Final = re.compile(
    r"(?!00|ff)[0-9a-f]{2}(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-)([0-9a-f]{2})(?:-.*)?",
    re.DOTALL,
)
"""What can be known of versions to come: they begin like version 00, and may go on after it."""

SAMPLED: Final = 0x01
"""The one flag that is known of every version."""

_METHODS: Final = {
    verb: f"{participant_pb2.DESCRIPTOR.package}.ParticipantService/{verb.capitalize()}"
    for verb in Verb
}

_AT_START: Final = {
    verb: {"rpc.system.name": "grpc", "rpc.method": method} for verb, method in _METHODS.items()
}
"""What a sampler is shown: the same few values for all calls."""

_ERRORS: Final = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
"""Statuses that are an error of the server's side, by OpenTelemetry's conventions for gRPC; the
others are the caller's, or, like CANCELLED, nobody's."""

_WITHOUT_SPAN: Final = "a call goes on without its span"
_WITHOUT_CALLER: Final = "a start goes on without its caller's trace"

_told: Final[set[tuple[str, str]]] = set()
"""What has been complained of. A provider belongs to the process, and so do its faults."""


def current_traceparent() -> str:
    """Give the W3C `traceparent` of the current span; empty if there is none."""
    if not _IS_AVAILABLE:
        return ""
    return _safely(_WITHOUT_CALLER, _current) or ""


def _current() -> str:
    span = otel.get_current_span().get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


def known_traceparent(text: str) -> str:
    """Give what version 00 has of a W3C `traceparent` of any version; empty if it is none.

    https://www.w3.org/TR/trace-context/#versioning-of-traceparent
    """
    if TRACEPARENT.fullmatch(text):
        return text
    later = LATER_TRACEPARENT.fullmatch(text)
    if later is None:
        return ""
    return f"00{later[1]}{int(later[2], 16) & SAMPLED:02x}"


class CallTracer:
    """Makes the spans of a participant's calls."""

    is_available: Final = _IS_AVAILABLE
    """Whether there is anything to do: without OpenTelemetry all spans are none."""

    def __init__(self, participant: str) -> None:
        self._participant = participant
        self.is_recording = False
        """Whether there is a provider: spans may be recorded."""
        self._tracer: otel.Tracer | None = None

    def look(self) -> None:
        """Look whether there is a provider by now; to be done before a call, or a batch of them."""
        if _IS_AVAILABLE and not self.is_recording:
            provider = _safely(_WITHOUT_SPAN, otel.get_tracer_provider)
            self.is_recording = not isinstance(provider, otel.ProxyTracerProvider | None)

    def span(self, verb: Verb, call: participant_pb2.Call, since_ns: int | None = None) -> CallSpan:
        """Give the span of a call, to be used by ``with`` in the task that answers it.

        It begins then, or at `since_ns` (UTC).
        """
        if not _IS_AVAILABLE:
            return _NO_SPAN
        if not self.is_recording:
            return _CallersSpan(self, call)
        return _RealSpan(self, verb, call, call.participant or self._participant, since_ns)

    def pass_on(self, call: participant_pb2.Call) -> Token[otel_context.Context]:
        """Without a provider: make the call's own context the current one, to be sent on.

        By OpenTelemetry's own means this takes 7 µs; here it is read when somebody asks.
        """
        return otel_context.attach(otel.set_span_in_context(_Attempt(call), _EMPTY))

    def start(
        self,
        method: str,
        call: participant_pb2.Call,
        at_start: dict[str, str],
        since_ns: int | None,
    ) -> otel.Span:
        """Start a span below the runtime's attempt. Raises what the author's provider raises."""
        if self._tracer is None:
            # Before the author has set a provider this is a proxy, which finds the one that is set.
            self._tracer = otel.get_tracer(SCOPE, _version())
        return self._tracer.start_span(
            method,
            context=_parent(call),
            kind=otel.SpanKind.SERVER,
            attributes=at_start,
            start_time=since_ns,
        )


class CallSpan:
    """The span of one call, from ``with`` to its end; this one is none."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it. What ended the block is told by its type alone."""

    def decided(self, outcome: Outcome) -> None:
        """Say what the call is answered with."""

    def failed(self, status: str, kind: str = "") -> None:
        """Say the name of the gRPC status that it is answered with, and the type of its cause."""


_NO_SPAN: Final = CallSpan()


if _IS_AVAILABLE:

    class _Attempt(otel.NonRecordingSpan):
        """The runtime's attempt as a parent. Read when somebody asks, which few handlers do."""

        def __init__(self, call: participant_pb2.Call) -> None:
            super().__init__(otel.INVALID_SPAN_CONTEXT)
            self._call = call

        def get_span_context(self) -> otel.SpanContext:
            return otel.get_current_span(_parent(self._call)).get_span_context()


class _CallersSpan(CallSpan):
    """Not recorded: the call's own context is the current one."""

    __slots__ = ("_call", "_token", "_tracer")

    def __init__(self, tracer: CallTracer, call: participant_pb2.Call) -> None:
        self._tracer = tracer
        self._call = call

    def __enter__(self) -> Self:
        self._token = self._tracer.pass_on(self._call)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        otel_context.detach(self._token)


class _RealSpan(CallSpan):
    __slots__ = ("_call", "_participant", "_since_ns", "_span", "_token", "_tracer", "_verb")

    def __init__(
        self,
        tracer: CallTracer,
        verb: Verb,
        call: participant_pb2.Call,
        participant: str,
        since_ns: int | None,
    ) -> None:
        self._since_ns = since_ns
        self._tracer = tracer
        self._verb = verb
        self._call = call
        self._participant = participant
        self._span: otel.Span = otel.INVALID_SPAN
        self._token: Token[otel_context.Context] | None = None

    def __enter__(self) -> Self:
        _safely(_WITHOUT_SPAN, self._start)
        # Even if it is none: what was current where the server was started is not our parent.
        self._token = _safely(_WITHOUT_SPAN, self._make_current)
        return self

    def _start(self) -> None:
        verb, call = self._verb, self._call
        self._span = self._tracer.start(_METHODS[verb], call, _AT_START[verb], self._since_ns)
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "amends.saga_id": call.saga_id[:MAX_SHOWN],
                    "amends.definition": call.definition[:MAX_SHOWN],
                    "amends.step": call.step[:MAX_SHOWN],
                    "amends.action": call.action[:MAX_SHOWN],
                    "amends.verb": verb.value,
                    "amends.participant": self._participant[:MAX_SHOWN],
                    "amends.round": call.round,
                    "amends.attempt": call.attempt,
                    "amends.poll": call.poll,
                }
            )

    def _make_current(self) -> Token[otel_context.Context]:
        return otel_context.attach(otel.set_span_in_context(self._span))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            # The caller left or its deadline passed, which only the caller can tell apart.
            is_cancelled = issubclass(kind, asyncio.CancelledError)
            self.failed("CANCELLED" if is_cancelled else "UNKNOWN", kind.__name__)
        if self._token is not None:
            _safely(_WITHOUT_SPAN, otel_context.detach, self._token)
        _safely(_WITHOUT_SPAN, self._end)

    def _end(self) -> None:
        self._span.end()

    def decided(self, outcome: Outcome) -> None:
        """Say what the call is answered with."""
        _safely(_WITHOUT_SPAN, self._say_decided, outcome)

    def _say_decided(self, outcome: Outcome) -> None:
        if not self._span.is_recording():
            return
        self._span.set_attribute("rpc.response.status_code", "OK")
        match outcome:
            case Done():
                self._span.set_attribute("amends.outcome", "done")
            case InProgress():
                self._span.set_attribute("amends.outcome", "in_progress")
            case Rejected(reason=reason):
                self._span.set_attribute("amends.outcome", "rejected")
                self._span.set_attribute("amends.reason", reason)
            case Broken(reason=reason):
                self._span.set_attribute("amends.outcome", "broken")
                self._span.set_attribute("amends.reason", reason)
                self._fault(Broken.__name__)
            case Heuristic(reason=reason, committed=committed):
                self._span.set_attribute("amends.outcome", "heuristic")
                self._span.set_attribute("amends.committed", committed)
                self._span.set_attribute("amends.reason", reason)
                self._fault(Heuristic.__name__)

    def failed(self, status: str, kind: str = "") -> None:
        """Say the name of the gRPC status that it is answered with, and the type of its cause."""
        _safely(_WITHOUT_SPAN, self._say_failed, status, kind)

    def _say_failed(self, status: str, kind: str) -> None:
        if not self._span.is_recording():
            return
        self._span.set_attribute("rpc.response.status_code", status)
        self._span.set_attribute("amends.outcome", "unknown")
        if status in _ERRORS:
            self._fault(kind or status)

    def _fault(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(otel.StatusCode.ERROR)


def _parent(call: participant_pb2.Call) -> otel_context.Context:
    """Give the context of the runtime's attempt; one without a span, if the call has no valid one.

    It begins empty: a call's parent is what the call says, and nothing else.
    """
    carrier = {"traceparent": call.traceparent}
    if call.tracestate:
        carrier["tracestate"] = call.tracestate
    return _PROPAGATOR.extract(carrier, context=_EMPTY)


def _safely(goes_on: str, touch: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Do what touches the author's provider; None if that raises, which is told once by its type.

    Not the message: whose it is, and what it quotes, nobody knows. Cancellation passes.
    """
    try:
        return touch(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # see rule 5
        _complain(goes_on, type(error).__name__)
        return None


def _complain(goes_on: str, kind: str) -> None:
    if (goes_on, kind) not in _told and len(_told) < MAX_TOLD:
        _told.add((goes_on, kind))
        logger.error("%s: %s in the tracer provider", goes_on, kind)


def _version() -> str | None:
    try:
        return metadata.version("amends")
    except metadata.PackageNotFoundError:  # run from its sources
        return None
