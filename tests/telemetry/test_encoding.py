"""Spans as bytes: what the library would make of them, and of every span something."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Encoded
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from amends_runtime.core.tracing import Tracing
from amends_runtime.telemetry import encoding
from amends_runtime.telemetry.encoding import Frame, sender_attributes
from amends_runtime.telemetry.projection import project
from amends_runtime.telemetry.spans import Attributes, Span, SpanEvent, SpanKind, SpanLink
from tests.core.definitions import chooser, plans
from tests.core.world import World
from tests.telemetry.by_library import encoded_by_library
from tests.telemetry.otlp_receiver import plain

SENDER = sender_attributes("store-1", {"service.name": "billing", "team": "päyments"})
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def assert_same(spans: Sequence[Span]) -> None:
    """What is written down directly is, message by message, what the library makes."""
    ours = ExportTraceServiceRequest.FromString(Frame(SENDER).encode(spans))
    assert ours == encoded_by_library(spans, SENDER)


def hex_ids(size: int) -> st.SearchStrategy[str]:
    """Ids of so many bytes; none is all zeros, as those are none."""
    return st.binary(min_size=size, max_size=size).filter(any).map(bytes.hex)


# Letters of one to four bytes, and texts on both sides of what is kept and of one-byte lengths.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text("aé€𝄞", min_size=100, max_size=150),
    st.integers(1, 3).map(lambda times: "long" * 5_000 * times),
)
values: st.SearchStrategy[str | int | bool] = st.one_of(
    texts,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 127, 128, 16_383, 16_384, 2**63 - 1, -(2**63)]),
)
attributes: st.SearchStrategy[Attributes] = st.dictionaries(texts.filter(bool), values, max_size=5)
instants = st.integers(0, 2**64 - 1)
spans = st.builds(
    Span,
    trace_id=hex_ids(16),
    span_id=hex_ids(8),
    parent_id=st.one_of(st.just(""), hex_ids(8)),
    name=texts,
    kind=st.sampled_from(SpanKind),
    start_ns=instants,
    end_ns=instants,
    attributes=attributes,
    events=st.lists(st.builds(SpanEvent, texts, instants, attributes), max_size=3).map(tuple),
    dropped_events=st.sampled_from([0, 1, 127, 128, 2**32 - 1]),
    links=st.lists(st.builds(SpanLink, hex_ids(16), hex_ids(8), attributes), max_size=3).map(tuple),
    error=st.one_of(st.none(), texts),
)


@given(st.lists(spans, max_size=4))
def test_any_span_is_what_the_library_makes_of_it(some: list[Span]) -> None:
    """Whatever its ids, texts, numbers, instants, events, links and status are."""
    assert_same(some)


@given(st.data())
def test_the_spans_of_real_histories_are_what_the_library_makes_of_them(
    data: st.DataObject,
) -> None:
    """Those of a saga in an adversarial world, closed and open ones, with and without a caller."""
    plan = data.draw(plans(), "plan")
    caller = data.draw(st.sampled_from(["", CALLER]), "caller")
    world = World(plan, chooser(data))
    for _ in range(data.draw(st.integers(1, 60), "turns")):
        world.act()
    first, *rest = [record for _, decision in world.told for record in decision.records]
    records = [msgspec.structs.replace(first, traceparent=caller), *rest]
    for join in (True, False):
        assert_same(project(Tracing("store-1", join=join), plan, records, open_too=True))


ONE = Span(
    trace_id="0a" * 16,
    span_id="0b" * 8,
    parent_id="",
    name="saga order",
    kind=SpanKind.INTERNAL,
    start_ns=1,
    end_ns=2,
    attributes={},
)


def told(span: Span) -> Encoded:
    """The span as whoever reads the message has it."""
    message = TracesData.FromString(Frame(SENDER).encode([span]))
    return message.resource_spans[0].scope_spans[0].spans[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2**63, "9223372036854775808"),
        (-(2**63) - 1, "-9223372036854775809"),
        ("a\ud800b", "a?b"),
        ("\udfff" * 200, "?" * 200),
    ],
)
def test_what_the_wire_cannot_carry_is_changed_a_little(value: str | int, shown: str) -> None:
    """One odd value does not cost the message that it is in."""
    encoded = told(msgspec.structs.replace(ONE, attributes={"odd": value, "even": 2}))
    assert plain(encoded.attributes) == {"odd": shown, "even": 2}


def test_instants_that_cannot_be_are_the_nearest_that_can() -> None:
    """A clock may be set to anything."""
    odd = msgspec.structs.replace(
        ONE, start_ns=-5, end_ns=2**70, events=(SpanEvent("e", -1),), name="\ud800", error="\ud800"
    )
    encoded = told(odd)
    assert (encoded.start_time_unix_nano, encoded.end_time_unix_nano) == (0, 2**64 - 1)
    assert encoded.events[0].time_unix_nano == 0
    assert (encoded.name, encoded.status.message) == ("?", "?")


def test_equal_values_of_other_types_are_told_apart() -> None:
    """Whichever of them was kept first."""
    for order in ({"a": 1, "b": True}, {"a": True, "b": 1}, {"a": False, "b": 0}, {"a": "1"}):
        assert_same([msgspec.structs.replace(ONE, attributes=order)])


def test_what_is_kept_is_bounded_and_fixed_pieces_stay() -> None:
    """What each of many sagas says alone does not push out what all of them say."""
    fixed: Attributes = {f"fixed-{number}": number for number in range(20)}
    encoding.encode_span(msgspec.structs.replace(ONE, attributes=fixed))
    for number in range(3 * encoding.KEPT_PIECES):
        own: Attributes = {"amends.saga_id": f"order-{number}", "note": "x" * 1_000 + str(number)}
        encoding.encode_span(msgspec.structs.replace(ONE, attributes=own | fixed))
    before = encoding._kept.cache_info()
    assert before.currsize == encoding.KEPT_PIECES
    encoding.encode_span(msgspec.structs.replace(ONE, attributes=fixed))
    after = encoding._kept.cache_info()
    assert (after.hits - before.hits, after.misses) == (20, before.misses)


def test_no_spans_are_no_message() -> None:
    """A page of a saga without closed spans, for one."""
    assert Frame(SENDER).encode([]) == b""
    assert_same([])


@given(st.lists(spans, min_size=1, max_size=3))
def test_the_frame_is_no_larger_than_it_says(some: list[Span]) -> None:
    """Whoever has a bound for messages counts with it."""
    encoded = [encoding.encode_span(span) for span in some]
    frame = Frame(SENDER)
    assert len(frame.message(encoded)) <= frame.size + sum(map(len, encoded))
