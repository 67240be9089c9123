"""What a SagaTest shows of a saga's course, from its start to its end."""

from __future__ import annotations

import anyio
import pytest

import amends
from amends_runtime.testing import LostReply, NoReply, SagaTest, Slow, Status
from tests.testing.orders import ALL, ORDER, UNDONE


def test_without_a_script_everything_takes_effect() -> None:
    """A saga completes at once, and its read-only steps count for no effect."""
    with SagaTest(ORDER) as test:
        saga = test.run({"order_id": "A-1"}, saga_id="order-A-1", labels={"shop": "north"})
        assert saga.completed
        assert saga.saga_id == "order-A-1"
        assert saga.input.json() == {"order_id": "A-1"}
        assert saga.labels == {"shop": "north"}
        assert test.course == ALL
        assert test.effects == ["reserve", "charge", "ship", "confirm"]
        assert test.elapsed_s == 0


def test_a_refusal_undoes_what_was_done() -> None:
    """A refused step turns the saga back, and nothing is left."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").rejects("card_declined", "no money")
        saga = test.run()
        assert saga.state is amends.SagaState.COMPENSATED
        assert saga.turn is not None
        assert saga.turn.cause is amends.Cause.REJECTED
        assert str(saga.turn.failure) == "card_declined: no money"
        assert test.course == UNDONE
        assert test.effects == []


def test_calls_are_seen_as_a_handler_sees_them() -> None:
    """Inputs, results, rounds, attempts and the reason of a compensation are those of the SDK."""
    with SagaTest(ORDER) as test:
        test.participant("inventory").execute("reserve").answers({"reservation": 7})
        test.participant("shipping").execute("ship").rejects("no_address")
        undo = test.participant("inventory").compensate("reserve")
        saga = test.run([1, 2])
        (call,) = undo.calls
        assert call.json() == [1, 2]
        assert call.executed
        assert call.own_result_json() == {"reservation": 7}
        assert call.reason == amends.Reason(amends.Cause.REJECTED, "ship", "no_address", "")
        assert call.idempotency_key == f"test-store/{saga.saga_id}/reserve/compensate/1"
        assert call.deadline_at_ms == test.now_ms + 10_000
        assert test.participant("inventory").calls[-1] == call
        assert test.calls[-1] == call
        (charge,) = test.participant("payments").execute("charge").calls
        assert charge.result_json("reserve") == {"reservation": 7}


def test_a_handler_answers_like_a_real_one() -> None:
    """A function may return a value or an outcome and raise Rejected, and may be a coroutine's."""
    with SagaTest(ORDER) as test:

        @test.participant("payments").execute("charge")
        async def charge(call: amends.Call) -> object:
            if call.attempt == 1:
                return Status("UNKNOWN")
            return amends.InProgress(60) if not call.poll else {"cents": 1}

        @test.participant("shipping").execute("ship")
        def ship(call: amends.Call) -> None:
            assert call.result_json("charge") == {"cents": 1}
            raise amends.Rejected("no_address")

        saga = test.run()
        assert saga.state is amends.SagaState.COMPENSATED
        assert [(call.attempt, call.poll) for call in test.calls if call.step == "charge"] == [
            (1, False),
            (2, False),
            (2, True),
            (1, False),
        ]
        assert 60 <= test.elapsed_s < 61


def test_a_handler_that_raises_leaves_the_outcome_unknown() -> None:
    """Anything but an outcome is asked again, given up, and undone where it may have happened."""
    with SagaTest(ORDER) as test:

        @test.participant("payments").execute("charge")
        def charge(call: amends.Call) -> None:
            raise ValueError(call.step)

        saga = test.run()
        assert saga.turn is not None
        assert saga.turn.cause is amends.Cause.GAVE_UP
        assert test.course[-2:] == ["compensate charge", "compensate reserve"]
        error = saga.step("charge").last_error
        assert error is not None
        assert "ValueError" in error.message


def test_an_assertion_in_a_handler_fails_the_test() -> None:
    """What a test's own handler asserts is not taken for an unknown outcome and asked again."""
    with SagaTest(ORDER) as test:

        @test.participant("payments").execute("charge")
        def charge(call: amends.Call) -> None:
            raise AssertionError("too dear")

        with pytest.raises(AssertionError, match="too dear"):
            test.run()


def test_a_lost_reply_takes_effect_once() -> None:
    """The barrier knows of the effect when it is asked again, and answers what it answered."""
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        charge.answers(LostReply({"charge": 1}), {"charge": 2})
        saga = test.run()
        assert saga.completed
        assert [call.attempt for call in charge.calls] == [1, 2]
        assert test.effects.count("charge") == 1
        result = saga.step("charge").result
        assert result is not None
        assert result.json() == {"charge": 1}


def test_a_lost_refusal_stays_a_refusal() -> None:
    """What was refused once is refused for ever, whatever the script says later."""
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        charge.answers(LostReply(amends.Rejected("card_declined")), {"charge": 2})
        assert test.run().state is amends.SagaState.COMPENSATED
        assert test.effects == []


def test_no_reply_costs_the_attempt_its_time() -> None:
    """The deadline of the attempt passes, and it is asked again."""
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        charge.answers(NoReply(), None)
        assert test.run().completed
        assert [call.attempt for call in charge.calls] == [1, 2]
        assert 5 <= test.elapsed_s < 6


def test_an_effect_may_come_after_the_deadline() -> None:
    """A slow action goes on when nobody waits; asked again meanwhile, it is in progress."""
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        charge.answers(Slow(8, {"charge": 1}))
        saga = test.run()
        assert saga.completed
        assert test.effects.count("charge") == 1
        assert 8 <= test.elapsed_s < 9
        assert charge.calls[1].attempt == 2


def test_a_coroutine_that_is_too_slow_is_rolled_back() -> None:
    """Its caller leaves at the attempt's deadline, and with him the handler is cancelled."""
    with SagaTest(ORDER) as test:

        @test.participant("payments").execute("charge")
        async def charge(call: amends.Call) -> None:
            if call.attempt == 1:
                await anyio.sleep(8)

        saga = test.start()
        test.advance(4.9)
        assert test.course.count("execute charge") == 1
        assert saga.result().completed
        assert test.effects.count("charge") == 1
        assert 5 <= test.elapsed_s < 6


def test_a_broken_contract_is_stuck() -> None:
    """Broken stops the step for an operator."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").answers(amends.Broken("ledger_lost"))
        saga = test.run()
        assert saga.state is amends.SagaState.STUCK
        assert saga.step("charge").state is amends.StepState.STUCK


def test_a_missing_method_is_stuck_after_a_minute() -> None:
    """A misconfiguration is not tried for ever."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").fails("UNIMPLEMENTED")
        assert test.run().state is amends.SagaState.STUCK
        assert test.elapsed_s > 60


def test_a_compensation_is_tried_until_it_succeeds() -> None:
    """It fails three times, and the saga is undone at the fourth."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").rejects("card_declined")
        undo = test.participant("inventory").compensate("reserve")
        undo.fails(times=3)
        assert test.run().state is amends.SagaState.COMPENSATED
        assert [call.attempt for call in undo.calls] == [1, 2, 3, 4]


def test_a_day_of_retries_ends_stuck() -> None:
    """A retriable step is given up after its 24 hours, in virtual time."""
    patient = amends.Retry(max_s=3600, give_up_after_s=86_400)
    definition = amends.Definition("tell").retriable("tell", "mail", "tell", retry=patient)
    with SagaTest(definition) as test:
        test.participant("mail").execute("tell").fails("UNKNOWN")
        saga = test.run()
        assert saga.state is amends.SagaState.STUCK
        # The next wait, of up to an hour, would have ended after the day.
        assert 23 * 3600 <= test.elapsed_s <= 24 * 3600


def test_branches_run_side_by_side_and_are_undone_in_reverse() -> None:
    """What comes first in one branch is undone last, whatever the other one does."""
    definition = (
        amends.Definition("trip")
        .step("flight", "travel", "book", after=[])
        .step("seat", "travel", "choose", after=["flight"])
        .step("hotel", "travel", "stay", after=[])
        .pivot("pay", "payments", "pay", after=["seat", "hotel"])
    )
    with SagaTest(definition) as test:
        test.participant("payments").execute("pay").rejects("no_money")
        assert test.run().state is amends.SagaState.COMPENSATED
        undone = [name for name in test.course if name.startswith("compensate")]
        assert sorted(undone) == ["compensate flight", "compensate hotel", "compensate seat"]
        assert undone.index("compensate seat") < undone.index("compensate flight")
        assert test.effects == []


def test_several_sagas_and_definitions_at_once() -> None:
    """Each saga has its own course, counts its own answers, and ends for itself."""
    refund = amends.Definition("refund").step("credit", "payments", "credit")
    with SagaTest(ORDER, refund) as test:
        test.participant("payments").execute("charge").answers(Status(), {"ok": True})
        one = test.start({"n": 1}, definition="order")
        two = test.start({"n": 2}, definition="order")
        other = test.start({"n": 3}, definition="refund", saga_id="refund-3")
        assert test.course == []
        ends = test.finish()
        assert [saga.saga_id for saga in ends] == [one.saga_id, two.saga_id, "refund-3"]
        assert all(saga.completed for saga in ends)
        assert one.course.count("execute charge") == two.course.count("execute charge") == 2
        assert other.effects == ["credit"]
        assert len(test.effects) == 9
        assert {call.saga_id for call in one.calls} == {one.saga_id}
        with pytest.raises(ValueError, match="say which definition"):
            test.run()
        with pytest.raises(ValueError, match="say which one"):
            test.saga()


def test_the_history_is_the_clients() -> None:
    """Records come as `amends.Record`, from the start to the end."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").rejects("card_declined")
        test.run()
        history = test.saga().history()
        assert history[0].kind is amends.RecordKind.SAGA_STARTED
        assert history[-1].kind is amends.RecordKind.SAGA_ENDED
        assert history[-1].state is amends.SagaState.COMPENSATED
        (refused,) = [one for one in history if one.kind is amends.RecordKind.STEP_REJECTED]
        assert refused.step == "charge"


def test_the_same_test_takes_the_same_course() -> None:
    """Nothing is left to chance: waits and ids are the same each time."""

    def a_run() -> tuple[float, list[str], tuple[amends.Record, ...]]:
        with SagaTest(ORDER) as test:
            test.participant("payments").execute("charge").fails(times=4)
            test.run()
            return test.elapsed_s, test.course, test.saga().history()

    assert a_run() == a_run()
