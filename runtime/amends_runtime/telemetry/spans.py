"""Spans as the projection makes them: plain values that know no exporter."""

from __future__ import annotations

import enum

import msgspec

__all__ = ["Attributes", "Span", "SpanEvent", "SpanKind", "SpanLink"]

Attributes = dict[str, str | int | bool]


class SpanKind(enum.Enum):
    """What a span stands for, as far as the runtime makes any."""

    INTERNAL = "internal"
    CLIENT = "client"


class SpanEvent(msgspec.Struct, frozen=True):
    """Something that happened at one instant, UTC nanoseconds."""

    name: str
    at_ns: int
    attributes: Attributes = {}


class SpanLink(msgspec.Struct, frozen=True):
    """Another span, of this trace or another, and what it is to this one."""

    trace_id: str
    span_id: str
    attributes: Attributes = {}


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One span. Ids are lower-case hex digits, instants UTC nanoseconds.

    `parent_id` is empty for the root of a trace. `dropped_events` is how many more events there
    were than `events` shows. `error` is why the span is one that failed, and None for one that did
    not. `is_open` marks one that has not ended: its end is then the instant
    of the last record, and another projection may give another one.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: SpanKind
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: tuple[SpanEvent, ...] = ()
    dropped_events: int = 0
    links: tuple[SpanLink, ...] = ()
    error: str | None = None
    is_open: bool = False
