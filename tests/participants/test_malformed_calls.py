"""Calls that are not calls are refused before anything runs, each with what to mend."""

from collections.abc import Callable

import grpc
import grpc.aio
import pytest

from amends import Call, InProgress, Participant, Payload, Verb, serve
from amends.payload import MAX_PAYLOAD_BYTES
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from tests.participants.asking import asking, call_message
from tests.participants.ledger import Ledger, read_rows

EXECUTE = Verb.EXECUTE


def without(field: str) -> Callable[[], pb.Call]:
    """Make a call that lacks a field."""

    def make() -> pb.Call:
        call = call_message(EXECUTE)
        call.ClearField(field)  # type: ignore[arg-type]
        return call

    return make


def with_number(field: str, number: int) -> Callable[[], pb.Call]:
    """Make a call with another number in a field."""

    def make() -> pb.Call:
        call = call_message(EXECUTE)
        setattr(call, field, number)
        return call

    return make


MALFORMED = {
    "no key": (without("idempotency_key"), "call.idempotency_key is missing"),
    "no store": (without("store_id"), "call.store_id is missing"),
    "no saga": (without("saga_id"), "call.saga_id is missing"),
    "no step": (without("step"), "call.step is missing"),
    "no action": (without("action"), "call.action is missing"),
    "no verb": (without("verb"), "call.verb is VERB_UNSPECIFIED, but the method called is Execute"),
    "unknown verb": (with_number("verb", 9), "call.verb is 9, but the method called is Execute"),
    "other verb": (
        with_number("verb", types_pb2.VERB_COMPENSATE),
        "call.verb is VERB_COMPENSATE, but the method called is Execute",
    ),
    "no round": (without("round"), "call.round is 0; rounds count from 1"),
    "no attempt": (with_number("attempt", -1), "call.attempt is -1; attempts count from 1"),
}


@pytest.mark.parametrize(("make", "message"), MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_call_is_an_invalid_argument(
    ledger: Ledger, make: Callable[[], pb.Call], message: str
) -> None:
    """The field is named, and nothing is run or stored."""
    async with ledger.served() as asker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asker.stub.Execute(pb.ExecuteRequest(call=make()))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == message
    assert ledger.ran == []
    assert read_rows(ledger.path) == []


async def test_no_call_at_all(ledger: Ledger) -> None:
    """Each method says so."""
    async with ledger.served() as asker:
        for answer in (
            asker.stub.Prepare(pb.PrepareRequest()),
            asker.stub.Execute(pb.ExecuteRequest()),
            asker.stub.Compensate(pb.CompensateRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "call is missing"


async def test_all_faults_are_told_at_once(ledger: Ledger) -> None:
    """Every violation in one message."""
    async with ledger.served() as asker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asker.stub.Execute(pb.ExecuteRequest(call=pb.Call()))
    assert (caught.value.details() or "").count(";") >= 7


async def test_an_unknown_action_names_the_known_ones(ledger: Ledger) -> None:
    """For every verb, and for a verb that the action does not have."""
    ledger.participant.execute("ship", compensatable=False)(ship)
    async with ledger.served() as asker:
        for verb, action in [
            (Verb.EXECUTE, "chrage"),
            (Verb.COMPENSATE, "chrage"),
            (Verb.PREPARE, "ship"),
        ]:
            code, details = await asker.status(call_message(verb, action=action))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert details == (
                f"participant payments has no {verb} for action '{action}'; it has: "
                "compensate charge, execute charge, prepare charge, execute ship"
            )


async def test_results_that_are_no_results_leave_the_outcome_open(ledger: Ledger) -> None:
    """Too large, not JSON, an awaitable: an error status, and no effect."""
    answers: list[object] = [b"x" * (MAX_PAYLOAD_BYTES + 1), object(), later(), None]

    @ledger.participant.execute("odd", compensatable=False)
    def odd(call: Call) -> object:
        return answers.pop(0)

    async with ledger.served() as asker:
        for kind in ("PayloadError", "PayloadError", "TypeError"):
            code, details = await asker.status(call_message(EXECUTE, action="odd"))
            assert code is grpc.StatusCode.UNKNOWN
            assert kind in details
        assert await asker.say(call_message(EXECUTE, action="odd")) == "done"


def ship(call: Call) -> None:
    """Do nothing."""


async def later() -> None:
    """Be a coroutine that a `def` handler returns by mistake."""


async def test_without_a_barrier_handlers_are_called_directly() -> None:
    """Repeated calls run again: the weaker form, for systems that know our key."""
    participant = Participant("payments", barrier=None)
    keys: list[str] = []

    @participant.execute("charge")
    def charge(call: Call) -> Payload:
        keys.append(call.idempotency_key)
        return Payload(b"ok", "text/plain")

    @participant.compensate("charge")
    async def refund(call: Call) -> InProgress | None:
        keys.append(call.idempotency_key)
        return None if call.poll else InProgress(after_s=0.5)

    async with serve(participant) as server, asking(server.address) as asker:
        for attempt in (1, 2):
            done = await asker.ask(call_message(EXECUTE, attempt=attempt))
            assert done.done.result == types_pb2.Payload(data=b"ok", content_type="text/plain")
        assert await asker.say(call_message(Verb.COMPENSATE)) == "in_progress"
        assert await asker.say(call_message(Verb.COMPENSATE, poll=True)) == "done"
    assert keys == ["store/order-1/pay/execute/1"] * 2 + ["store/order-1/pay/compensate/1"] * 2


async def test_without_a_barrier_nothing_undoes_an_action_without_compensation() -> None:
    """There is no row that could say that there was nothing to undo."""
    participant = Participant("payments", barrier=None)
    participant.execute("ship", compensatable=False)(ship)
    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(Verb.COMPENSATE, action="ship"))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert "compensatable=False" in details
        misspelt = call_message(Verb.COMPENSATE, action="shpi")
        misspelt.mode = types_pb2.MODE_TWO_PHASE_COMMIT
        code, details = await asker.status(misspelt)
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert "it has: execute ship" in details
