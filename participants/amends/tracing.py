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
5. Tracing decides nothing: what an author's sampler or span processor raises is logged, and the
   call goes on without its span.
"""

from __future__ import annotations

import asyncio
import logging
import re
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from amends.outcomes import Broken, Done, InProgress, Outcome, Rejected, Verb
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

if TYPE_CHECKING:
    from contextvars import Token

logger = logging.getLogger(__name__)

SCOPE: Final = "amends"
"""The instrumentation scope of our spans."""

MAX_SHOWN: Final = 512
"""Characters of a name from the wire; a child saga's id, the longest, has fewer."""

TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C trace context, version 00."""

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


def current_traceparent() -> str:
    """Give the W3C `traceparent` of the current span; empty if there is none."""
    if not _IS_AVAILABLE:
        return ""
    span = otel.get_current_span().get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


class CallTracer:
    """Makes the spans of a participant's calls."""

    def __init__(self, participant: str) -> None:
        self._participant = participant
        # Before the author has set a provider this is a proxy, which finds the one that is set.
        self._tracer = otel.get_tracer(SCOPE, _version()) if _IS_AVAILABLE else None

    def span(self, verb: Verb, call: participant_pb2.Call) -> CallSpan:
        """Give the span of a call, to be used by ``with`` in the task that answers it."""
        if self._tracer is None:
            return _NO_SPAN
        return _RealSpan(self._tracer, verb, call, call.participant or self._participant)


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


class _RealSpan(CallSpan):
    __slots__ = ("_call", "_participant", "_span", "_token", "_tracer", "_verb")

    def __init__(
        self, tracer: otel.Tracer, verb: Verb, call: participant_pb2.Call, participant: str
    ) -> None:
        self._tracer = tracer
        self._verb = verb
        self._call = call
        self._participant = participant
        self._span: otel.Span = otel.INVALID_SPAN
        self._token: Token[otel_context.Context] | None = None

    def __enter__(self) -> Self:
        try:
            self._span = self._tracer.start_span(
                _METHODS[self._verb],
                context=_parent(self._call),
                kind=otel.SpanKind.SERVER,
                attributes=_AT_START[self._verb],
            )
            if self._span.is_recording():
                self._describe()
        except Exception as error:  # noqa: BLE001  # the author's sampler or processor
            _complain(error)
        # Even if it is none: what was current where the server was started is not our parent.
        self._token = otel_context.attach(otel.set_span_in_context(self._span))
        return self

    def _describe(self) -> None:
        call = self._call
        self._span.set_attributes(
            {
                "amends.saga_id": call.saga_id[:MAX_SHOWN],
                "amends.definition": call.definition[:MAX_SHOWN],
                "amends.step": call.step[:MAX_SHOWN],
                "amends.action": call.action[:MAX_SHOWN],
                "amends.verb": self._verb.value,
                "amends.participant": self._participant[:MAX_SHOWN],
                "amends.round": call.round,
                "amends.attempt": call.attempt,
                "amends.poll": call.poll,
            }
        )

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
        assert self._token is not None, "left, so it was entered"
        otel_context.detach(self._token)
        try:
            self._span.end()
        except Exception as failure:  # noqa: BLE001  # the author's processor
            _complain(failure)

    def decided(self, outcome: Outcome) -> None:
        """Say what the call is answered with."""
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

    def failed(self, status: str, kind: str = "") -> None:
        """Say the name of the gRPC status that it is answered with, and the type of its cause."""
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
    return _PROPAGATOR.extract(carrier, context=otel_context.Context())


def _complain(error: Exception) -> None:
    # By its type alone: whose it is, and what it quotes, nobody knows.
    logger.error("a call goes on without its span: %s in the tracer provider", type(error).__name__)


def _version() -> str | None:
    try:
        return metadata.version("amends")
    except metadata.PackageNotFoundError:  # run from its sources
        return None
