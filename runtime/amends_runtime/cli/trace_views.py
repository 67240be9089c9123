"""How a trace looks in a terminal, and as values for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from amends.sagas import Trace
from amends_runtime.cli.documents import print_document, print_each
from amends_runtime.cli.options import Common
from amends_runtime.cli.otlp import traces_data
from amends_runtime.cli.tables import Columns, print_facts, print_line

__all__ = ["print_trace"]

OPEN = "amends.open"
NOT_ANSWERED = "not answered yet: on the wire, in progress, or held (amends breakers)"


def print_trace(trace: Trace, common: Common) -> None:
    """Prints a trace as a tree, or its spans as JSON."""
    spans = [
        span
        for of_resource in traces_data(trace).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]
    if common.output == "jsonl":
        for span in spans:
            print_each({"trace_id": trace.trace_id, **_document(span)})
        return
    if common.output == "json":
        shown = [_document(span) for span in spans]
        facts = {"trace_id": trace.trace_id, "sampled": trace.sampled, "spans": shown}
        print_document(facts, common.output)
        return
    not_sampled = "no: nothing of it is sent by itself, and participants do not trace it"
    print_facts([("trace", trace.trace_id), ("sampled", "yes" if trace.sampled else not_sampled)])
    print_line()
    _print_tree(spans)


# -- the tree --------------------------------------------------------------------------------------


def _print_tree(spans: list[Span]) -> None:
    known = {span.span_id for span in spans}
    below: dict[bytes, list[Span]] = {}
    for span in spans:
        parent = span.parent_span_id if span.parent_span_id in known else b""
        below.setdefault(parent, []).append(span)
    begin_ns = min((span.start_time_unix_nano for span in spans), default=0)
    rows = [
        (f"+{duration(at_ns - begin_ns)}", took, text)
        for at_ns, took, text in _rows(below, b"", "")
    ]
    # All are known, so that no later one is wider than the column and shifts the tree.
    at = ["+10.123 s", *(row[0] for row in rows)]
    table = Columns(
        "AT", "TOOK", "SPAN", expected={"AT": at, "TOOK": ["10.123 s", *(row[1] for row in rows)]}
    )
    for row in rows:
        table.print(*row)


def _rows(
    below: Mapping[bytes, list[Span]], parent: bytes, indent: str
) -> Iterator[tuple[int, str, str]]:
    """When, how long, and what: spans and events below a span, in the order of their beginnings."""
    spans = sorted(below.get(parent, ()), key=lambda span: span.start_time_unix_nano)
    for number, span in enumerate(spans, start=1):
        is_last = number == len(spans)
        branch, deeper = ("", "") if not parent else ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        # Nobody knows how long what has not ended will have taken.
        took = (
            "" if _is_open(span) else duration(span.end_time_unix_nano - span.start_time_unix_nano)
        )
        yield span.start_time_unix_nano, took, f"{indent}{branch}{_title(span)}"
        has_children = bool(below.get(span.span_id))
        for event in span.events:
            bar = "│  " if has_children else "   "
            said = _told(_plain(event.attributes))
            text = f"{indent}{deeper}{bar}· {event.name}{said and f' ({said})'}"
            yield event.time_unix_nano, "", text
        yield from _rows(below, span.span_id, indent + deeper)


def _title(span: Span) -> str:
    attributes = _plain(span.attributes)
    name = span.name
    if span.kind == Span.SPAN_KIND_CLIENT:
        verb = name.rpartition("/")[2]
        name = f"{verb} {attributes.get('service.peer.name', '')}".strip()
        name += f", attempt {attributes.get('amends.attempt', '?')}"
    if attributes.get(OPEN):
        # The history has that it was decided; whether it was sent since, only its lane knows.
        is_call = span.kind == Span.SPAN_KIND_CLIENT
        return f"{name}: {NOT_ANSWERED if is_call else 'has not ended'}"
    if span.status.code == Status.STATUS_CODE_ERROR:
        return f"{name}: {span.status.message or 'failed'}"
    outcome = attributes.get("amends.outcome", "")
    return f"{name}: {outcome}" if outcome else name


def _is_open(span: Span) -> bool:
    return any(attribute.key == OPEN for attribute in span.attributes)


def _told(attributes: Mapping[str, object]) -> str:
    return ", ".join(f"{key.removeprefix('amends.')}={value}" for key, value in attributes.items())


def duration(ns: int) -> str:
    """So much time, in the unit that a person would say it in."""
    if ns < 1_000_000:
        return f"{ns / 1_000:.0f} µs" if ns else "0 s"
    if ns < 1_000_000_000:
        return f"{ns / 1_000_000:.1f} ms"
    seconds = ns / 1_000_000_000
    if seconds < 600:  # ten minutes
        return f"{seconds:.3f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


# -- for programs ----------------------------------------------------------------------------------


def _document(span: Span) -> dict[str, Any]:
    attributes = _plain(span.attributes)
    is_error = span.status.code == Status.STATUS_CODE_ERROR
    return {
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex() or None,
        "name": span.name,
        "kind": Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        "start_ns": span.start_time_unix_nano,
        "end_ns": span.end_time_unix_nano,
        "open": bool(attributes.get(OPEN)),
        "error": (span.status.message or "failed") if is_error else None,
        "attributes": attributes,
        "events": [
            {
                "name": event.name,
                "at_ns": event.time_unix_nano,
                "attributes": _plain(event.attributes),
            }
            for event in span.events
        ],
        "links": [
            {
                "trace_id": link.trace_id.hex(),
                "span_id": link.span_id.hex(),
                "attributes": _plain(link.attributes),
            }
            for link in span.links
        ],
    }


def _plain(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
