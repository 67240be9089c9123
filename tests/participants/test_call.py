"""A call as its handler sees it: a value like any other, although read when it is asked for."""

import copy
import dataclasses
import pickle

import pytest

from amends import Call, Verb
from amends.outcomes import Cause, Reason
from amends.v1 import types_pb2
from amends.wire import Said, call_from_wire
from tests.participants.asking import call_message, call_of

TURN = types_pb2.Turn(cause=types_pb2.TURN_CAUSE_DEADLINE)


def compensation() -> Call:
    """Make a call that has something in most of its fields."""
    return call_of(
        Verb.COMPENSATE, results={"reserve": {"n": 1}}, executed=True, own_result=[2], turn=TURN
    )


def test_it_equals_one_that_was_made_by_hand() -> None:
    """Field by field, whichever of the two is asked."""
    by_hand = Call(
        verb=Verb.EXECUTE,
        action="charge",
        saga_id="order-1",
        step="pay",
        round=1,
        idempotency_key="store/order-1/pay/execute/1",
        store_id="store",
        input=b'{"amount": 5}',
        content_type="application/json",
        definition="order",
        epoch=1,
    )
    assert call_of() == by_hand
    assert by_hand == call_of()
    assert repr(call_of()) == repr(by_hand)
    assert "amount" not in repr(call_of())


def test_it_has_all_that_was_sent() -> None:
    """Each field is there, of its type."""
    call = compensation()
    assert call.executed
    assert call.own_result_json() == [2]
    assert call.result_json("reserve") == {"n": 1}
    assert call.reason == Reason(Cause.DEADLINE, "", "", "")
    assert (call.attempt, call.poll, call.two_phase, call.deadline_at_ms) == (1, False, False, 0)


def test_it_cannot_be_changed() -> None:
    """Neither what has been read nor what has not."""
    call = compensation()
    assert call.input == call.input
    for name in ("input", "attempt", "verb"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(call, name, None)


@pytest.mark.parametrize("name", ["inputs", "_rest", "__wrapped__"])
def test_what_it_has_not_is_an_attribute_error(name: str) -> None:
    """Of a call that was made by hand, too."""
    by_hand = Call(
        verb=Verb.EXECUTE, action="a", saga_id="s", step="p", round=1, idempotency_key="k",
        store_id="t",
    )  # fmt: skip
    with pytest.raises(AttributeError, match=f"a Call has no '{name}'"):
        getattr(by_hand, name)


def test_it_can_be_copied() -> None:
    """With changes, or as it is; and what is copied needs no message any more."""
    call = call_of(amount=7)
    assert dataclasses.replace(call, attempt=2) == call_of(amount=7, attempt=2)
    assert copy.copy(call) == call
    assert {name.name for name in dataclasses.fields(call)} == set(Call.__dataclass_fields__)
    plain = dataclasses.replace(call, results={})
    assert pickle.loads(pickle.dumps(plain)) == plain  # noqa: S301  # our own


def test_what_a_stream_has_said_stands_for_what_a_call_leaves_out() -> None:
    """And what a call says itself comes first."""
    said = Said("store", 7, "first", 17)
    message = call_message()
    for name in ("store_id", "idempotency_key", "epoch"):
        message.ClearField(name)
    call = call_from_wire(message, said, 99)
    assert (call.store_id, call.idempotency_key) == ("store", "store/order-1/pay/execute/1")
    assert (call.epoch, call.incarnation, call.oldest_open_at_ms) == (7, "first", 17)
    assert call.deadline_at_ms == 99
    full = call_message(store_id="other")
    full.deadline_at_ms = 5
    call = call_from_wire(full, said, 99)
    assert (call.store_id, call.idempotency_key) == ("other", "other/order-1/pay/execute/1")
    assert (call.epoch, call.deadline_at_ms) == (1, 5)
