"""GetTrace: a saga's trace as bytes that every OpenTelemetry collector takes, made on request.

1. The trace is made from the history, by the same projection and under the same ids as what the
   runtime exports by itself; so it does not matter whether the saga was sampled or is a year old.
2. It comes in pages, so that a saga of any size has one: nothing is left out of a large trace.
   `TracesData` is a list, and lists of Protocol Buffers grow by joining their bytes: so all pages
   one behind the other are one message again.
3. All pages show the history as it was at the first: a token carries how many turns it had then. A
   prefix of a history never changes, and neither do the spans made of it.
4. Spans are made in a thread, one request at a time. A thousand of them take some 100 ms, in which
   the event loop would commit no saga.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final

import anyio
import anyio.to_thread
import msgspec

from amends.v1 import saga_pb2
from amends_runtime.api.paging import PAGE_BYTES, question, token_for
from amends_runtime.api.validation import Checks
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import Record, SagaStarted
from amends_runtime.core.tracing import Tracing
from amends_runtime.ports import LoadedSaga
from amends_runtime.telemetry.encoding import Frame, encode_span, sender_attributes
from amends_runtime.telemetry.projection import project
from amends_runtime.telemetry.spans import Span

__all__ = ["MAX_SPANS", "SagaTraces", "TracePage"]

MAX_SPANS: Final = 1000
"""Spans of a page: at some 500 bytes each well below `PAGE_BYTES`."""
_TURN: Final = 2**32
"""A position is turns times this, plus spans: a saga has fewer spans than it has records."""


class TracePage(msgspec.Struct, frozen=True):
    """What was asked for: whose trace, from where on, how much of it."""

    saga_id: str
    include_open: bool
    count: int
    asked: bytes
    turns: int
    first: int

    @classmethod
    def of(cls, request: saga_pb2.GetTraceRequest) -> TracePage:
        """Raises InvalidRequest with everything that is wrong with the request."""
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        count = checks.page_size("page_size", request.page_size, MAX_SPANS, MAX_SPANS)
        asked = question("trace", saga_id, request.include_open)
        position = checks.page_token("page_token", asked, request.page_token) or 0
        checks.passed()
        return cls(saga_id, request.include_open, count, asked, *divmod(position, _TURN))


class SagaTraces:
    """Makes traces of histories. `sender` are the resource attributes beside the usual ones.

    Made inside the running loop.
    """

    def __init__(self, tracing: Tracing, sender: Mapping[str, str]) -> None:
        self._tracing = tracing
        self._frame = Frame(sender_attributes(tracing.store_id, sender))
        self._one_makes = anyio.CapacityLimiter(1)

    async def page(
        self, wanted: TracePage, plan: Plan, loaded: LoadedSaga
    ) -> saga_pb2.GetTraceResponse:
        """One page of the trace of `loaded`."""
        turns = loaded.turns[: wanted.turns or None]
        records = [record for turn in turns for record in turn.records]
        make = functools.partial(self._make, wanted, plan, len(turns), records)
        return await anyio.to_thread.run_sync(make, limiter=self._one_makes)

    def _make(
        self, wanted: TracePage, plan: Plan, turns: int, records: Sequence[Record]
    ) -> saga_pb2.GetTraceResponse:
        started = records[0]
        assert isinstance(started, SagaStarted), "a history begins with its start"
        every = project(self._tracing, plan, records, open_too=True)
        spans = [_marked(span) for span in every if wanted.include_open or not span.is_open]
        end = wanted.first + wanted.count
        traces_data, fitted = self._encoded(spans[wanted.first : end])
        end = wanted.first + fitted
        more = end < len(spans)
        trace_id = self._tracing.trace_id(started.saga_id, started.traceparent)
        return saga_pb2.GetTraceResponse(
            traces_data=traces_data,
            trace_id=trace_id,
            sampled=self._tracing.is_sampled(trace_id, started.traceparent),
            spans=fitted,
            open_spans=sum(span.is_open for span in every),
            next_page_token=token_for(wanted.asked, turns * _TURN + end) if more else "",
        )

    def _encoded(self, spans: Sequence[Span]) -> tuple[bytes, int]:
        """As many of the spans as fit a page, at least one if there are any, and how many."""
        encoded: list[bytes] = []
        room = PAGE_BYTES - self._frame.size
        for span in spans:
            one = encode_span(span)
            room -= len(one)
            if encoded and room < 0:
                break
            encoded.append(one)
        return self._frame.message(encoded), len(encoded)


def _marked(span: Span) -> Span:
    """One that has not ended says so itself, for whoever finds it in a tracing system."""
    if not span.is_open:
        return span
    return msgspec.structs.replace(span, attributes={**span.attributes, "amends.open": True})
