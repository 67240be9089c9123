"""Every row of the barrier's table, through real gRPC and a real database of each kind."""

import logging
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from amends import Broken, Call, InProgress, InvalidOutcome, Rejected, Verb
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from tests.participants.asking import call_message, json_payload
from tests.participants.every_barrier import every_ledger
from tests.participants.ledger import LIMIT, Ledger, Write

EXECUTE, COMPENSATE, PREPARE = Verb.EXECUTE, Verb.COMPENSATE, Verb.PREPARE
TOO_MUCH = LIMIT + 1

ledger = every_ledger


async def test_first_call_and_finished_duplicate(ledger: Ledger) -> None:
    """The handler runs once; a repeated attempt gets the very same reply."""
    async with ledger.served() as asker:
        first = await asker.ask(call_message(EXECUTE))
        again = await asker.ask(call_message(EXECUTE, attempt=2, poll=True))
    assert first.done.result == json_payload_compact({"charged": 5})
    assert again == first
    assert ledger.entries() == [("charge", 5)]
    assert ledger.ran == ["execute"]


async def test_a_refusal_leaves_no_effect_and_is_remembered(ledger: Ledger) -> None:
    """The effect goes back to the savepoint, the refusal is committed and repeated."""
    async with ledger.served() as asker:
        first = await asker.ask(call_message(EXECUTE, amount=TOO_MUCH))
        again = await asker.ask(call_message(EXECUTE, amount=TOO_MUCH, attempt=2))
    assert first.rejected.reason == "card_declined"
    assert first.rejected.message == "the amount is above the limit"
    assert again == first
    assert ledger.entries() == []
    assert ledger.ran == ["execute"]
    assert ledger.rows() == [("execute", "rejected")]


async def test_another_request_under_the_same_key_is_broken(ledger: Ledger) -> None:
    """No stored reply is true for two requests."""
    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE))
        assert await asker.say(call_message(EXECUTE, amount=6)) == "broken request_changed"
    assert ledger.entries() == [("charge", 5)]


async def test_compensate_undoes_what_was_done_once(ledger: Ledger) -> None:
    """A repeated Compensate is answered from its row."""
    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE))
        undo = call_message(COMPENSATE, executed=True, own_result={"charged": 5})
        assert await asker.say(undo) == "done"
        assert await asker.say(undo) == "done"
    assert ledger.entries() == [("charge", 5), ("refund", 5)]
    assert ledger.ran == ["execute", "compensate"]


async def test_compensate_of_a_refused_step_runs_nothing(ledger: Ledger) -> None:
    """There is nothing to undo, and the saga may go on turning back."""
    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE, amount=TOO_MUCH))
        assert await asker.say(call_message(COMPENSATE, amount=TOO_MUCH)) == "done"
    assert ledger.ran == ["execute"]
    assert ledger.entries() == []


@pytest.mark.parametrize("late", [EXECUTE, PREPARE], ids=str)
async def test_compensate_comes_first_and_fences(ledger: Ledger, late: Verb) -> None:
    """Compensate of a step that never came runs nothing; what comes late is refused."""
    async with ledger.served() as asker:
        assert await asker.say(call_message(COMPENSATE)) == "done"
        assert await asker.say(call_message(late)) == "rejected fenced"
        assert await asker.say(call_message(COMPENSATE, attempt=2)) == "done"
    assert ledger.ran == []
    assert ledger.entries() == []
    assert ledger.rows() == [
        ("compensate", "done"),
        ("execute", "fenced"),
        ("prepare", "fenced"),
    ]


async def test_a_lost_barrier_is_broken(ledger: Ledger) -> None:
    """The runtime recorded Done and the row is gone: never a silent Done."""
    async with ledger.served() as asker:
        assert await asker.say(call_message(COMPENSATE, executed=True)) == "broken barrier_lost"
        # Nothing was written: the answer stays the same until somebody mends it.
        assert await asker.say(call_message(COMPENSATE, executed=True)) == "broken barrier_lost"
    assert ledger.rows() == []


async def test_execute_after_its_compensation_is_fenced(ledger: Ledger) -> None:
    """A runtime restored from a backup asks again, and must turn back."""
    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE))
        await asker.ask(call_message(COMPENSATE, executed=True))
        assert await asker.say(call_message(EXECUTE, attempt=2)) == "rejected fenced"
    assert ledger.ran == ["execute", "compensate"]


async def test_a_vote_is_undone_although_it_was_never_committed(ledger: Ledger) -> None:
    """Prepare's row is a forward row like Execute's."""
    async with ledger.served() as asker:
        assert await asker.say(call_message(PREPARE)) == "done"
        assert await asker.say(call_message(COMPENSATE)) == "done"
        assert await asker.say(call_message(EXECUTE)) == "rejected fenced"
    assert ledger.entries() == [("reserve", 5), ("refund", 5)]


@pytest.mark.parametrize(
    "other",
    [{"round": 2}, {"step": "pay-again"}, {"saga_id": "order-2"}, {"store_id": "other"}],
    ids=["round", "step", "saga", "store"],
)
async def test_another_life_is_untouched_by_a_fence(
    ledger: Ledger, other: dict[str, object]
) -> None:
    """Round, step, saga and store each make a key of their own."""
    async with ledger.served() as asker:
        await asker.ask(call_message(COMPENSATE))
        assert await asker.say(call_message(EXECUTE, **other)) == "done"  # type: ignore[arg-type]


async def test_rows_outlive_the_process(ledger: Ledger) -> None:
    """A participant that was started again remembers."""
    async with ledger.served() as asker:
        first = await asker.ask(call_message(EXECUTE))
    reborn = ledger.reborn()
    async with reborn.served() as asker:
        assert await asker.ask(call_message(EXECUTE, attempt=2)) == first
    assert reborn.ran == []


async def test_an_exception_rolls_back_and_leaves_the_outcome_open(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets an error status, the log ids and frames, and neither gets the payload."""
    card_number = "4111-1111"
    calls = 0

    @ledger.execute("fragile")
    def fragile(call: Call, write: Write) -> None:
        nonlocal calls
        calls += 1
        write("fragile")
        if calls == 1:
            raise ValueError(card_number)

    @ledger.compensate("fragile")
    def undo(call: Call, write: Write) -> None:
        write("undo")

    async with ledger.served() as asker:
        code, details = await asker.status(call_message(EXECUTE, action="fragile"))
        assert code is grpc.StatusCode.UNKNOWN
        assert "ValueError" in details
        assert ledger.entries() == []
        assert await asker.say(call_message(EXECUTE, action="fragile", attempt=2)) == "done"
    assert ledger.entries() == [("fragile", 5)]
    assert "saga=order-1 step=pay round=1 attempt=1" in caplog.text
    assert "in fragile" in caplog.text
    assert card_number not in caplog.text + details


@pytest.fixture
def sqlite_ledger(tmp_path: Path) -> Ledger:
    """Give one ledger, for what has nothing to do with its database."""
    return Ledger(tmp_path / "payments.db")


async def test_the_traceback_of_a_failed_handler_is_in_the_debug_log(
    sqlite_ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """With its message, which may quote a payload: so not above DEBUG, and never to the caller."""

    @sqlite_ledger.participant.execute("fragile", compensatable=False)
    async def fragile(call: Call) -> None:
        raise ValueError("4111-1111")

    with caplog.at_level(logging.DEBUG, logger="amends"):
        async with sqlite_ledger.served() as asker:
            _, details = await asker.status(call_message(EXECUTE, action="fragile"))
    assert "4111-1111" not in details
    [traceback] = [r for r in caplog.records if "4111-1111" in (r.exc_text or "")]
    assert traceback.levelno == logging.DEBUG
    assert "saga=order-1 step=pay" in traceback.getMessage()
    assert 'raise ValueError("4111-1111")' in (traceback.exc_text or "")


@pytest.mark.parametrize(
    "outcome",
    [lambda: Rejected(""), lambda: Broken("x" * 129), lambda: InProgress(-1)],
    ids=["Rejected", "Broken", "InProgress"],
)
async def test_what_is_wrong_with_an_outcome_reaches_caller_and_log(
    sqlite_ledger: Ledger, caplog: pytest.LogCaptureFixture, outcome: Callable[[], object]
) -> None:
    """Whose mistake it is and how to mend it, in place of the bare name of an exception."""

    @sqlite_ledger.participant.execute("say", compensatable=False)
    def say(call: Call) -> object:
        return outcome()

    async with sqlite_ledger.served() as asker:
        code, details = await asker.status(call_message(EXECUTE, action="say"))
    assert code is grpc.StatusCode.UNKNOWN
    with pytest.raises(InvalidOutcome) as caught:
        outcome()
    assert str(caught.value) in details
    assert str(caught.value) in caplog.text


async def test_a_long_message_of_a_refusal_arrives_cut(sqlite_ledger: Ledger) -> None:
    """It is for people: a shorter one says enough, and the refusal stands."""

    @sqlite_ledger.participant.execute("say", compensatable=False)
    def say(call: Call) -> None:
        raise Rejected("card_declined", "x" * 10_000)

    async with sqlite_ledger.served() as asker:
        outcome = await asker.ask(call_message(EXECUTE, action="say"))
    assert outcome.rejected.message == "x" * 4095 + "…"


async def test_a_refused_compensation_is_an_error(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """A compensation must succeed in the end: its Rejected decides nothing."""

    @ledger.execute("final")
    def final(call: Call, write: Write) -> None:
        write("final")

    @ledger.compensate("final")
    def refuse(call: Call, write: Write) -> None:
        write("refuse")
        raise Rejected("too_late")

    async with ledger.served() as asker:
        await asker.ask(call_message(EXECUTE, action="final"))
        code, details = await asker.status(call_message(COMPENSATE, action="final"))
    assert code is grpc.StatusCode.UNKNOWN
    assert "a compensation cannot be refused" in details
    assert "a compensation cannot be refused" in caplog.text
    assert ledger.entries() == [("final", 5)]


async def test_in_progress_and_broken_keep_nothing(ledger: Ledger) -> None:
    """What the handler wrote is rolled back, and the next attempt runs anew."""
    answers: list[object] = [InProgress(after_s=2.5), Broken("ledger_lost", "no"), None]

    @ledger.execute("slow", compensatable=False)
    def slow(call: Call, write: Write) -> object:
        write("slow")
        answer = answers.pop(0)
        if isinstance(answer, Broken):
            raise answer
        return answer

    async with ledger.served() as asker:
        first = await asker.ask(call_message(EXECUTE, action="slow"))
        assert first.in_progress.poll_after_ms == 2500
        assert ledger.entries() == []
        again = call_message(EXECUTE, action="slow", poll=True)
        assert await asker.say(again) == "broken ledger_lost"
        assert ledger.entries() == []
        assert await asker.say(again) == "done"
    assert ledger.entries() == [("slow", 5)]


async def test_a_handler_sees_its_call(ledger: Ledger) -> None:
    """Input, results, own result and the reason arrive as they were sent."""
    seen: list[Call] = []

    @ledger.participant.execute("look")
    def look(call: Call) -> bytes:
        seen.append(call)
        return b"\x00raw"

    @ledger.participant.compensate("look")
    async def unlook(call: Call) -> None:
        seen.append(call)

    turn = types_pb2.Turn(
        cause=types_pb2.TURN_CAUSE_REJECTED,
        step="ship",
        error=types_pb2.Error(reason="out_of_stock", message="none left"),
    )
    async with ledger.served() as asker:
        done = await asker.ask(call_message(EXECUTE, action="look", results={"reserve": {"id": 7}}))
        assert done.done.result.data == b"\x00raw"
        assert done.done.result.content_type == "application/octet-stream"
        await asker.ask(
            call_message(COMPENSATE, action="look", executed=True, own_result=[1], turn=turn)
        )
    execute, compensate = seen
    assert execute.verb is EXECUTE
    assert execute.json() == {"amount": 5}
    assert execute.result_json("reserve") == {"id": 7}
    assert execute.idempotency_key == "store/order-1/pay/execute/1"
    assert execute.reason is None
    assert compensate.executed
    assert compensate.own_result_json() == [1]
    assert compensate.reason is not None
    assert (compensate.reason.cause, compensate.reason.step) == ("rejected", "ship")
    assert (compensate.reason.code, compensate.reason.message) == ("out_of_stock", "none left")
    assert "amount" not in repr(execute)


async def test_an_action_without_a_compensation_still_has_a_barrier(ledger: Ledger) -> None:
    """Nothing to undo is Done and fenced; something to undo is an error that says what to do."""

    @ledger.execute("ship", compensatable=False)
    def ship(call: Call, write: Write) -> None:
        if call.json()["amount"] > LIMIT:
            raise Rejected("too_heavy")
        write("ship")

    async with ledger.served() as asker:
        heavy = call_message(EXECUTE, action="ship", saga_id="heavy", amount=TOO_MUCH)
        assert await asker.say(heavy) == "rejected too_heavy"
        undo = call_message(COMPENSATE, action="ship", saga_id="heavy", amount=TOO_MUCH)
        assert await asker.say(undo) == "done"
        await asker.ask(call_message(EXECUTE, action="ship"))
        code, details = await asker.status(call_message(COMPENSATE, action="ship"))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "compensatable=False" in details
    assert ledger.entries() == [("ship", 5)]
    assert ledger.rows() == [("execute", "done")]


def two_phase(verb: Verb, action: str, *, saga_id: str, executed: bool = False) -> pb.Call:
    """Make a call of a two-phase commit."""
    call = call_message(verb, action=action, saga_id=saga_id, executed=executed)
    call.mode = types_pb2.MODE_TWO_PHASE_COMMIT
    return call


async def test_a_vote_that_nobody_could_give_is_rolled_back(ledger: Ledger) -> None:
    """Its action is misspelt: nothing is held, a late vote is fenced, and the transfer ends."""
    async with ledger.served() as asker:
        code, _ = await asker.status(two_phase(PREPARE, "chrage", saga_id="t-1"))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        undo = two_phase(COMPENSATE, "chrage", saga_id="t-1")
        assert [await asker.say(undo) for _ in range(2)] == ["done", "done"]
        assert await asker.say(two_phase(PREPARE, "charge", saga_id="t-1")) == "rejected fenced"
    assert ledger.ran == []


async def test_what_was_done_by_an_action_that_is_gone_is_not_rolled_back(ledger: Ledger) -> None:
    """Something is held, by the rows or by what the runtime knows: who undid it is missing."""
    no_compensate = "participant payments has no compensate for action 'chrage'"
    async with ledger.served() as asker:
        assert await asker.say(two_phase(PREPARE, "charge", saga_id="t-1")) == "done"
        undone = [
            two_phase(COMPENSATE, "chrage", saga_id="t-1"),
            two_phase(COMPENSATE, "chrage", saga_id="t-2", executed=True),
            call_message(COMPENSATE, action="chrage", saga_id="order-2"),
        ]
        for undo in undone:
            code, details = await asker.status(undo)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert no_compensate in details
        assert await asker.say(two_phase(COMPENSATE, "charge", saga_id="t-1")) == "done"


def json_payload_compact(value: object) -> types_pb2.Payload:
    """Make the payload as the SDK writes it: without blanks."""
    payload = json_payload(value)
    payload.data = payload.data.replace(b" ", b"")
    return payload
