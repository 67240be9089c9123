"""A call says whom it is for, and nobody else takes it: a typo in a port costs no money."""

import logging

import grpc
import pytest

from amends import Call, Participant, Verb, serve
from tests.participants.asking import asking, call_message
from tests.participants.ledger import Ledger, read_rows

FOR_CAR = (
    "this is participant 'payments', and the call is for 'car': is the address of 'car' right? "
    "(amends participants add car=HOST:PORT) If it is, 'payments' needs the alias 'car'"
)


@pytest.mark.parametrize("verb", Verb)
async def test_a_call_for_somebody_else_is_refused(ledger: Ledger, verb: Verb) -> None:
    """No handler runs and the barrier writes nothing: not even that it will never run."""
    async with ledger.served() as asker:
        refusal = await asker.status(call_message(verb, participant="car"))
    assert refusal == (grpc.StatusCode.UNIMPLEMENTED, FOR_CAR)
    assert ledger.ran == []
    assert read_rows(ledger.path) == []


async def test_who_was_called_by_mistake_says_so_in_its_log(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """With the ids of the call."""
    with caplog.at_level(logging.ERROR, logger="amends"):
        async with ledger.served() as asker:
            await asker.status(call_message(participant="car"))
    assert [record.getMessage() for record in caplog.records] == [
        f"execute charge saga=order-1 step=pay round=1 attempt=1: refused: {FOR_CAR}"
    ]


async def test_a_call_that_says_of_nobody_is_taken(ledger: Ledger) -> None:
    """An older runtime does not say, and a repeat by a newer one is the same request."""
    async with ledger.served() as asker:
        assert await asker.say(call_message(participant="")) == "done"
        assert await asker.say(call_message(participant="payments")) == "done"
        assert (
            await asker.say(call_message(participant="payments", amount=6))
            == "broken request_changed"
        )
    assert ledger.ran == ["execute"]
    assert ledger.entries() == [("charge", 5)]


async def test_one_program_answers_to_its_aliases(ledger: Ledger) -> None:
    """It may be registered by several names; they are named to whom it refuses."""
    ledger.participant.aliases = ("payments-eu", "payments-us")
    async with ledger.served() as asker:
        assert await asker.say(call_message(participant="payments-eu")) == "done"
        assert await asker.say(call_message(participant="payments-us")) == "done"
        code, details = await asker.status(call_message(participant="payments-asia"))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details.startswith(
        "this is participant 'payments' (or 'payments-eu', 'payments-us'), and the call is for "
        "'payments-asia':"
    )
    assert ledger.ran == ["execute"]


async def test_without_a_barrier_nothing_runs_either() -> None:
    """The name is compared before anything that the participant decides itself."""
    keys: list[str] = []
    participant = Participant("other", barrier=None)

    @participant.execute("rent", compensatable=False)
    def rent(call: Call) -> None:
        keys.append(call.idempotency_key)

    async with serve(participant) as server, asking(server.address) as asker:
        code, details = await asker.status(call_message(action="rent", participant="car"))
        assert (code, keys) == (grpc.StatusCode.UNIMPLEMENTED, [])
        assert details.startswith("this is participant 'other', and the call is for 'car':")
        assert await asker.say(call_message(action="rent", participant="other")) == "done"


async def test_a_name_of_nonsense_is_shown_as_one(ledger: Ledger) -> None:
    """It is neither long nor a line of its own in anybody's log."""
    async with ledger.served() as asker:
        code, details = await asker.status(call_message(participant="\n\x1b[31m" + "car" * 10_000))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details.isprintable()
    assert len(details) < 500
