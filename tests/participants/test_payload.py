"""Values become payloads and payloads values, and what cannot is told without showing it."""

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends import (
    Call,
    Done,
    InProgress,
    InvalidOutcome,
    Payload,
    PayloadError,
    Rejected,
    Verb,
)
from amends.outcomes import MAX_MESSAGE, Broken
from amends.payload import EMPTY, MAX_PAYLOAD_BYTES, decode, encode, from_wire, to_wire
from amends.v1 import types_pb2
from amends.wire import outcome_from_wire, outcome_to_wire

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_json_values_come_back(value: object) -> None:
    """Through the wire's message and back."""
    payload = encode(value)
    assert payload.content_type == "application/json"
    assert decode(from_wire(to_wire(payload))) == value


@given(st.binary())
def test_bytes_come_back(data: bytes) -> None:
    """As they are, whatever holds them."""
    for value in (data, bytearray(data), memoryview(data)):
        assert encode(value) == Payload(data, "application/octet-stream")
    assert decode(encode(data)) == data


def test_a_payload_is_passed_on() -> None:
    """With its own content type."""
    payload = Payload(b"<a/>", "text/xml")
    assert encode(payload) is payload
    assert decode(payload) == b"<a/>"


def test_equal_values_are_equal_bytes() -> None:
    """The order of keys does not matter: an idempotent start compares bytes."""
    assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})


def test_an_absent_payload_is_none() -> None:
    """Nothing on the wire is nothing in Python."""
    assert from_wire(types_pb2.Payload()) == EMPTY
    assert decode(EMPTY) is None
    assert EMPTY.json() is None


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/hal+json"]
)
def test_json_is_recognised_by_its_media_type(content_type: str) -> None:
    """With parameters, in any case, and with a suffix."""
    assert decode(Payload(b"[1]", content_type)) == [1]


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1, 2}, object(), {"a": {2: object()}}, "\ud800"],
    ids=["nan", "inf", "set", "object", "object inside", "half a character"],
)
def test_what_is_not_json_is_refused_without_showing_it(value: object) -> None:
    """The message names the type."""
    with pytest.raises(PayloadError, match="cannot be encoded as JSON") as caught:
        encode(value)
    assert caught.value.__cause__ is None
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (
            {"items": [1, {"price": Decimal(4111)}]},
            'an object of type Decimal at ["items"][1]["price"]',
        ),
        ({"tags": {"4111"}}, 'an object of type set at ["tags"]'),
        ([0.5, math.nan], "NaN or an infinity at [1]"),
        ({"a": ({"4111-1111": b"4111"},)}, 'an object of type bytes at ["a"][0][key 1]'),
        ({"a": {("4111", 1): 1}}, 'a key of type tuple at ["a"]'),
        ({"a": {1: 1, "4111": 1}}, 'a key of type int at ["a"]'),
        ({"a": {math.inf: 1}}, 'a key of type float at ["a"]'),
        ({"a": ["\ud8004111"]}, 'text with half a character at ["a"][0]'),
        ({"\ud8004111": 1}, "a key that is text with half a character"),
        ({4111: 2}, "a key of type int"),
        ({"a": [{"b": {None: 4111}}]}, 'a key of type NoneType at ["a"][0]["b"]'),
        (({"a": 1}, {True: 4111}), "a key of type bool at [1]"),
        ([10**5000], "an int of too many digits at [0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_json_deep_inside_is_named(value: object, found: str) -> None:
    """Type and place; a key is shown if it looks like the name of a field, else its number is."""
    with pytest.raises(PayloadError) as caught:
        encode(value)
    assert f"cannot be encoded as JSON: {found};" in str(caught.value)
    assert "4111" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "an object of type object cannot be encoded as JSON; use dict"),
        (math.inf, "NaN or an infinity cannot be encoded as JSON; use dict"),
        ("\ud800", "text with half a character cannot be encoded as JSON; use dict"),
    ],
    ids=["object", "inf", "half a character"],
)
def test_what_is_wrong_altogether_is_said_once(value: object, said: str) -> None:
    """There is no place to name."""
    with pytest.raises(PayloadError) as caught:
        encode(value)
    assert str(caught.value).startswith(said)


def test_a_key_of_a_class_of_text_is_text() -> None:
    """JSON has it as it is."""
    assert decode(encode({Verb.EXECUTE: {Verb.PREPARE: 1}})) == {"execute": {"prepare": 1}}


def test_a_circle_is_refused() -> None:
    """A list in itself has no JSON."""
    circle: list[object] = []
    circle.append({"again": circle})
    with pytest.raises(PayloadError, match=r'something in itself at \[0\]\["again"\];'):
        encode(circle)


def test_too_deep_is_refused() -> None:
    """Beyond what Python's encoder can follow."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PayloadError, match="too many levels;"):
        encode(deep)


def test_too_large_is_refused() -> None:
    """One byte above the runtime's limit."""
    assert len(encode(b"x" * MAX_PAYLOAD_BYTES).data) == MAX_PAYLOAD_BYTES
    with pytest.raises(PayloadError, match=f"{MAX_PAYLOAD_BYTES + 1} bytes"):
        encode(b"x" * (MAX_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize(
    ("content_type", "said"),
    [("é" * 129, "258 bytes, the limit is 256"), ("4111\udce9", "half a character")],
)
def test_a_content_type_that_no_message_carries_is_refused(content_type: str, said: str) -> None:
    """The runtime would not take the result; what it was is not shown."""
    assert encode(Payload(b"", "é" * 128)).content_type == "é" * 128
    with pytest.raises(PayloadError, match=said) as caught:
        Done(Payload(b"x", content_type))
    assert "4111" not in str(caught.value)


def test_bad_json_is_told_without_showing_it() -> None:
    """The decoder's own message would quote the document."""
    payload = Payload(b"secret", "application/json")
    with pytest.raises(PayloadError) as caught:
        decode(payload)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert "secret" not in repr(payload)


def test_a_payload_is_made_of_bytes_and_text() -> None:
    """A str as data is found at the author's line."""
    with pytest.raises(PayloadError, match="made of bytes and a str, not of str and str"):
        Payload("text", "text/plain")  # type: ignore[arg-type]


def test_a_result_that_is_not_handed_over_is_named() -> None:
    """With what is, and where to change it."""
    call = Call(
        verb=Verb.EXECUTE, action="a", saga_id="s", step="ship", round=1,
        idempotency_key="k", store_id="i", results={"pay": encode(1)},
    )  # fmt: skip
    assert call.result_json("pay") == 1
    with pytest.raises(PayloadError, match=r"'reserve'.*handed: pay"):
        call.result_json("reserve")
    assert call.json() is None
    assert call.own_result_json() is None


def test_outcomes_come_back_from_the_wire() -> None:
    """Each kind, with what it carries."""
    done = outcome_from_wire(outcome_to_wire(Done({"id": 1})))
    assert done == Done({"id": 1})
    assert outcome_from_wire(outcome_to_wire(Done())) == Done()
    assert outcome_from_wire(outcome_to_wire(InProgress(0.25))) == InProgress(0.25)
    for refusal in (Rejected("a", "b"), Broken("a", "b")):
        back = outcome_from_wire(outcome_to_wire(refusal))
        assert type(back) is type(refusal)
        assert str(back) == "a: b"


@pytest.mark.parametrize(("after_s", "after_ms"), [(0, 1), (1e9, 86_400_000), (1e308, 86_400_000)])
def test_polls_have_bounds(after_s: float, after_ms: int) -> None:
    """At least a millisecond, at most a day."""
    assert outcome_to_wire(InProgress(after_s)).in_progress.poll_after_ms == after_ms


@pytest.mark.parametrize("after_s", [-1, math.nan, math.inf], ids=str)
def test_a_poll_in_no_time_is_refused(after_s: float) -> None:
    """Seconds from now, finite."""
    with pytest.raises(InvalidOutcome, match="finite seconds"):
        InProgress(after_s)


@pytest.mark.parametrize("after_s", ["soon", None, True], ids=str)
def test_a_poll_in_what_is_no_number_is_refused(after_s: Any) -> None:
    """The message names the type that was given, not its value."""
    with pytest.raises(InvalidOutcome, match=f"a {type(after_s).__name__} is no number"):
        InProgress(after_s)


@pytest.mark.parametrize("kind", [Rejected, Broken])
@pytest.mark.parametrize("reason", ["", "x" * 129, "Größe", 7], ids=str)
def test_a_reason_is_a_word_for_programs(kind: type[Rejected | Broken], reason: Any) -> None:
    """Short and ASCII; what is wrong with it is said without repeating it."""
    with pytest.raises(
        InvalidOutcome, match=f"reason of {kind.__name__} is for programs"
    ) as caught:
        kind(reason)
    assert str(reason) not in str(caught.value) or not reason


def test_a_message_is_cut_and_mended() -> None:
    """Too long or not encodable, it still arrives."""
    assert len(Rejected("a", "x" * 10_000).message) == MAX_MESSAGE
    assert outcome_to_wire(Rejected("a", "\ud800")).rejected.message == "?"
