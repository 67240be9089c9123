"""Spans as OTLP's bytes: the protobuf wire format, written down directly.

How to think about it. OpenTelemetry's `encode_spans` makes a Python object of every attribute of
every span, which costs ten times what it takes to make the spans. But what spans say repeats
itself: the names, the keys, nearly all values. So each pair of key and value is encoded once and
kept, a span is a join of such pieces, and a message is a join of spans.

1. The field numbers are those of opentelemetry-proto's trace.proto, common.proto and
   resource.proto; each stands below beside its name. A test compares with what the library makes
   of the same spans.
2. What is kept is bounded, and short. The least recently used pieces go: what every saga says is
   used by every saga and stays, what one saga alone says is used some times and goes.
3. Every span can be encoded. What the wire cannot carry is changed as little as can be, for one odd
   value must not cost a message: a lone surrogate becomes a question mark, a number beyond 64 bits
   its digits as a text, an instant before 1970 is 1970.
4. `ExportTraceServiceRequest`, which collectors take, and `TracesData`, which files and `GetTrace`
   have, are the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Final

from amends_runtime.telemetry.spans import Attributes, Span, SpanEvent, SpanKind, SpanLink

__all__ = ["Frame", "encode_span", "sender_attributes"]

SCOPE_NAME: Final = "amends"
KEPT_PIECES: Final = (
    8_192  # each of attributes and of names; 5 MB at most, and far less in practice
)
KEPT_CHARACTERS: Final = 128  # longer texts are rare, and seldom said twice

_UINT64: Final = 0xFFFF_FFFF_FFFF_FFFF
_INT64: Final = range(-(2**63), 2**63)

_KINDS: Final = {SpanKind.INTERNAL: b"\x30\x01", SpanKind.CLIENT: b"\x30\x03"}  # 6: kind
_TIMES: Final = struct.Struct("<BQBQ")  # 7: start_time_unix_nano, 8: end_time_unix_nano
_AT: Final = struct.Struct("<BQ")  # 1: time_unix_nano
# 16: flags, fixed32. CONTEXT_HAS_IS_REMOTE: whether the parent is remote is known, and it is not.
_FLAGS: Final = b"\x85\x01" + struct.pack("<I", 0x100)
_LINK_FLAGS: Final = b"\x35" + struct.pack("<I", 0x100)  # 6
_ERROR: Final = b"\x18\x02"  # 3: code


# -- messages --------------------------------------------------------------------------------------


def sender_attributes(store_id: str, attributes: Mapping[str, str]) -> dict[str, str]:
    """Who sends: the runtime of this store. `attributes` are over what is said by default.

    The same after a restart, so that what is sent once more is equal to what was sent first:
    there is one runtime to a store, so the store's id is the instance's.
    """
    return {
        "service.name": "amends",
        "service.version": metadata.version("amends"),
        "service.instance.id": store_id,
        "telemetry.sdk.name": "amends",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": metadata.version("amends"),
        **attributes,
    }


class Frame:
    """What stands around spans in a message: who sends them. `sender` are resource attributes."""

    def __init__(self, sender: Mapping[str, str]) -> None:
        resource = b"".join([_encode(b"\x0a", key, value) for key, value in sender.items()])
        scope = _sized_text(b"\x0a", SCOPE_NAME) + _sized_text(b"\x12", metadata.version("amends"))
        self._resource = _sized(b"\x0a", resource)  # of ResourceSpans, 1: resource
        self._scope = _sized(b"\x0a", scope)  # of ScopeSpans, 1: scope

    @property
    def size(self) -> int:
        """How many bytes it adds to those of the spans, at most."""
        return len(self._resource) + len(self._scope) + 2 * 6  # two tags with their lengths

    def message(self, encoded: Sequence[bytes]) -> bytes:
        """The message of these spans, as `encode_span` makes them; empty if there are none."""
        if not encoded:
            return b""
        scoped = _sized(b"\x12", self._scope + b"".join(encoded))  # 2: scope_spans
        return _sized(b"\x0a", self._resource + scoped)  # 1: resource_spans

    def encode(self, spans: Iterable[Span]) -> bytes:
        """The message of these spans."""
        return self.message([encode_span(span) for span in spans])


# -- spans -----------------------------------------------------------------------------------------


def encode_span(span: Span) -> bytes:
    """One span, as it stands in a message."""
    parts = [
        b"\x0a\x10",  # 1: trace_id
        bytes.fromhex(span.trace_id),
        b"\x12\x08",  # 2: span_id
        bytes.fromhex(span.span_id),
    ]
    if span.parent_id:
        parts += (b"\x22\x08", bytes.fromhex(span.parent_id))  # 4: parent_span_id
    parts += (_text(b"\x2a", span.name), _KINDS[span.kind], _times(span))  # 5: name
    parts += _attributes(b"\x4a", span.attributes)  # 9: attributes
    if span.events:
        parts += [_sized(b"\x5a", _event(event)) for event in span.events]  # 11: events
    if span.dropped_events:
        parts.append(b"\x60" + _varint(span.dropped_events))  # 12: dropped_events_count
    if span.links:
        parts += [_sized(b"\x6a", _link(link)) for link in span.links]  # 13: links
    # 15: status
    parts.append(b"\x7a\x00" if span.error is None else _sized(b"\x7a", _status(span.error)))
    parts.append(_FLAGS)
    return _sized(b"\x12", b"".join(parts))  # of ScopeSpans, 2: spans


def _times(span: Span) -> bytes:
    try:
        return _TIMES.pack(0x39, span.start_ns, 0x41, span.end_ns)
    except struct.error:  # a clock that was set to what cannot be
        return _TIMES.pack(0x39, _instant(span.start_ns), 0x41, _instant(span.end_ns))


def _instant(at_ns: int) -> int:
    return min(max(at_ns, 0), _UINT64)


def _event(event: SpanEvent) -> bytes:
    parts = [_AT.pack(0x09, _instant(event.at_ns)), _text(b"\x12", event.name)]  # 2: name
    return b"".join(parts + _attributes(b"\x1a", event.attributes))  # 3: attributes


def _link(link: SpanLink) -> bytes:
    ids = b"\x0a\x10" + bytes.fromhex(link.trace_id) + b"\x12\x08" + bytes.fromhex(link.span_id)
    return ids + b"".join(_attributes(b"\x22", link.attributes)) + _LINK_FLAGS  # 4: attributes


def _status(error: str) -> bytes:
    return _text(b"\x12", error) + _ERROR  # 2: message


# -- pieces ----------------------------------------------------------------------------------------


def _attributes(tag: bytes, attributes: Attributes) -> list[bytes]:
    return [
        _encode(tag, key, value)
        if value.__class__ is str and len(value) > KEPT_CHARACTERS
        else _kept(tag, key, value)
        for key, value in attributes.items()
    ]


def _text(tag: bytes, text: str) -> bytes:
    return _kept_text(tag, text) if len(text) <= KEPT_CHARACTERS else _sized_text(tag, text)


def _encode(tag: bytes, key: str, value: str | int) -> bytes:
    """A KeyValue: 1: key, 2: value."""
    if isinstance(value, bool):
        encoded = b"\x10\x01" if value else b"\x10\x00"  # of AnyValue, 2: bool_value
    elif isinstance(value, int) and value in _INT64:
        encoded = b"\x18" + _varint(value & _UINT64)  # 3: int_value
    else:
        encoded = _sized_text(b"\x0a", str(value))  # 1: string_value
    return _sized(tag, _kept_text(b"\x0a", key) + _sized(b"\x12", encoded))


def _sized_text(tag: bytes, text: str) -> bytes:
    return _sized(tag, text.encode(errors="replace"))


def _sized(tag: bytes, content: bytes) -> bytes:
    return b"".join((tag, _varint(len(content)), content))


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SMALL[number]
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL: Final = [bytes((number,)) for number in range(0x80)]
_kept = lru_cache(KEPT_PIECES, typed=True)(_encode)  # True and 1 are equal, and not the same
_kept_text = lru_cache(KEPT_PIECES)(_sized_text)
