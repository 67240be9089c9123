"""A test decides how far a saga goes, and when somebody interferes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

import amends
from amends_runtime.testing import LostReply, NotEnded, SagaTest, SagaTestError, Slow
from tests.testing.orders import ALL, ORDER


def test_a_start_is_durable_and_nothing_is_called_yet() -> None:
    """What follows waits for the test to let it."""
    with SagaTest(ORDER) as test:
        saga = test.start()
        assert saga.get().state is amends.SagaState.RUNNING
        assert saga.step("quote").call_open
        assert test.course == []
        assert saga.result().completed


def test_time_passes_exactly() -> None:
    """What is due at that instant happens; what comes later does not."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").answers(amends.InProgress(60), None)
        saga = test.start()
        test.advance(59.999)
        assert test.course.count("execute charge") == 1
        test.advance(0.001)
        assert test.course.count("execute charge") == 2
        assert saga.get().state is amends.SagaState.COMPLETED
        assert test.elapsed_s == 60
        test.advance(3600)
        assert test.elapsed_s == 3660


def test_it_stops_exactly_where_a_step_is_done() -> None:
    """The next step's attempt is durable with it, so a cancellation has to undo that one, too."""
    with SagaTest(ORDER) as test:
        saga = test.start()
        saga.run_until_step("reserve", amends.StepState.EXECUTED)
        assert test.course == ALL[:2]
        assert saga.step("charge").state is amends.StepState.EXECUTING
        assert saga.cancel().disposition is amends.CancelDisposition.TURNED_BACK
        saga.run_until(amends.SagaState.COMPENSATED)
        assert test.course == [*ALL[:3], "compensate charge", "compensate reserve"]


def _parallel() -> amends.Definition:
    """Two branches that are done at the same instant, and the pivot after both."""
    return (
        amends.Definition("trip")
        .step("a", "travel", "a", after=[])
        .step("b", "travel", "b", after=[])
        .pivot("c", "payments", "c", after=["a", "b"])
    )


def test_a_cancellation_comes_before_what_is_under_way_at_that_instant() -> None:
    """The other branch's answer is there, but not at the runtime: the pivot has not begun."""
    with SagaTest(_parallel()) as test:
        saga = test.start()
        saga.run_until_step("a", amends.StepState.EXECUTED)
        assert saga.step("b").state is amends.StepState.EXECUTING
        assert saga.cancel().disposition is amends.CancelDisposition.TURNED_BACK
        assert saga.result().state is amends.SagaState.COMPENSATED
        assert "execute c" not in test.course
        assert test.effects == []


def test_a_script_changed_at_a_moment_holds_from_there() -> None:
    """The pivot is called after the test has said what it answers."""
    with SagaTest(_parallel()) as test:
        saga = test.start()
        saga.run_until_step("a", amends.StepState.EXECUTED)
        test.participant("payments").execute("c").rejects("too_late")
        assert saga.result().state is amends.SagaState.COMPENSATED


def test_an_abandonment_comes_before_what_is_under_way_at_that_instant() -> None:
    """As a cancellation: the operator's word is the next thing that the saga hears."""
    with SagaTest(_parallel()) as test:
        test.participant("travel").execute("a").answers(amends.Broken("plane_lost"))
        saga = test.start()
        saga.run_until_step("a", amends.StepState.STUCK)
        abandoned = saga.abandon(reason="it is a test", force=True)  # the other branch goes on
        assert abandoned.saga.step("b").state is amends.StepState.UNKNOWN
        assert "b" in abandoned.remaining_steps
        assert "execute c" not in test.course


def test_it_stops_where_a_condition_holds() -> None:
    """After a call its effect is there, and the runtime does not know of it."""
    with SagaTest(ORDER) as test:
        saga = test.start()
        test.run_until(lambda: "charge" in test.effects)
        assert saga.step("charge").state is amends.StepState.EXECUTING
        test.restart()
        assert saga.result().completed
        assert test.course.count("execute charge") == 2
        assert test.effects.count("charge") == 1


def test_a_condition_that_raises_fails_the_test() -> None:
    """Its own error reaches the test."""
    with SagaTest(ORDER) as test:
        test.start()
        with pytest.raises(ZeroDivisionError):
            test.run_until(lambda: bool(test.course) and 1 // 0 == 0)


def test_a_condition_only_looks() -> None:
    """It is asked in the middle of a drive, and cannot begin another one."""
    with SagaTest(ORDER) as test:
        saga = test.start()

        def condition(drive: Callable[[], object]) -> Callable[[], bool]:
            return lambda: bool(test.course) and drive() is None

        for drive in (saga.result, saga.cancel, test.restart, partial(test.advance, 1)):
            with pytest.raises(SagaTestError, match="not drive it"):
                test.run_until(condition(drive))
        assert saga.result().completed


def test_a_condition_that_never_holds_is_said() -> None:
    """When the saga has ended nothing is left that could make it hold."""
    with SagaTest(ORDER) as test:
        test.start()
        with pytest.raises(NotEnded) as caught:
            test.run_until(lambda: False)
    said = str(caught.value)
    assert said.startswith("the condition was to hold")
    assert "nothing is left that could happen" in said
    assert "saga saga-1 (order) is COMPLETED" in said


def test_a_cancellation_after_the_pivot_is_refused() -> None:
    """While the pivot is tried it waits for it; later nothing turns the saga back."""
    with SagaTest(ORDER) as test:
        test.participant("shipping").execute("ship").answers(amends.InProgress(5), None)
        saga = test.start()
        test.advance(1)
        assert saga.cancel().disposition is amends.CancelDisposition.WAITS_FOR_PIVOT
        saga.run_until_step("ship", amends.StepState.EXECUTED)
        with pytest.raises(amends.WrongState) as refused:
            saga.cancel()
        assert refused.value.reason == "PAST_NO_RETURN"
        assert saga.result().completed


def test_a_deadline_turns_back() -> None:
    """In virtual time, also while the runtime is down."""
    for down_s in (0, 600):
        with SagaTest(ORDER) as test:
            test.participant("payments").execute("charge").answers(amends.InProgress(60))
            saga = test.start(deadline_s=300)
            test.advance(10)
            test.restart(down_s=down_s)
            ended = saga.result()
            assert ended.state is amends.SagaState.COMPENSATED
            assert ended.turn is not None
            assert ended.turn.cause is amends.Cause.DEADLINE
            assert test.effects == []


def test_a_participant_that_is_down_opens_its_breaker_and_nothing_is_undone() -> None:
    """Calls wait for it; when it is back a probe finds out."""
    with SagaTest(ORDER) as test:
        payments = test.participant("payments")
        assert payments.breaker().state is amends.BreakerState.CLOSED
        payments.down(for_s=120)
        saga = test.start()
        test.advance(60)
        assert payments.breaker().participant == payments.name == "payments"
        assert payments.breaker().state is amends.BreakerState.OPEN
        assert payments.calls == []
        assert "down" in repr(payments)
        assert saga.result().completed
        assert payments.breaker().state is amends.BreakerState.CLOSED
        assert 120 <= test.elapsed_s < 180


def test_a_participant_can_come_back_by_hand() -> None:
    """Down until it is told to be up."""
    with SagaTest(ORDER) as test:
        payments = test.participant("payments")
        payments.down()
        saga = test.start()
        test.advance(100)
        assert saga.get().state is amends.SagaState.RUNNING
        payments.up()
        assert saga.result().completed


def test_a_participant_that_dies_in_the_middle_has_done_nothing() -> None:
    """What it was working on is rolled back with its process."""
    with SagaTest(ORDER) as test:
        payments = test.participant("payments")
        payments.execute("charge").answers(Slow(3), None)
        saga = test.start()
        test.advance(1)
        payments.down(for_s=1)
        test.advance(0.5)
        assert "charge" not in test.effects
        assert saga.result().completed
        assert test.effects.count("charge") == 1


def test_a_restart_asks_again_under_the_same_key() -> None:
    """Attempts that were on their way are lost; their effects are not doubled."""
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        charge.answers(Slow(2))
        saga = test.start()
        test.advance(1)
        test.restart()
        assert saga.result().completed
        assert {call.attempt for call in charge.calls} == {1, 2}
        assert len({call.idempotency_key for call in charge.calls}) == 1
        assert charge.calls[0].epoch < charge.calls[-1].epoch
        assert test.effects.count("charge") == 1
        lost = [one for one in saga.history() if one.kind is amends.RecordKind.ATTEMPT_LOST]
        assert [one.step for one in lost] == ["charge"]


def test_a_restart_while_nothing_happens_changes_nothing() -> None:
    """Before the first saga, after the last, twice."""
    with SagaTest(ORDER) as test:
        test.restart()
        saga = test.run()
        test.restart()
        test.restart(down_s=5)
        assert test.saga().get() == saga
        assert test.elapsed_s == 5


def test_an_operator_retries_a_stuck_step_in_a_new_round() -> None:
    """A refusal after the pivot is stuck; mended, the next round succeeds."""
    with SagaTest(ORDER) as test:
        confirm = test.participant("orders").execute("confirm")
        confirm.rejects("mailbox_full")
        saga = test.start()
        assert saga.result().state is amends.SagaState.STUCK
        confirm.answers({"sent": True})
        assert saga.retry(step="confirm", author="ann", reason="mended").version > 0
        assert saga.result().completed
        assert [call.round for call in confirm.calls] == [1, 2]
        (acted,) = [one for one in saga.history() if one.author == "ann"]
        assert acted.reason == "mended"


def test_an_operator_abandons_a_stuck_saga() -> None:
    """The answer names what remains, and it does."""
    with SagaTest(ORDER) as test:
        test.participant("orders").execute("confirm").answers(amends.Broken("mailbox_lost"))
        saga = test.start()
        with pytest.raises(amends.WrongState):
            saga.abandon()
        saga.result()
        abandoned = saga.abandon(reason="it is a test")
        assert abandoned.saga.state is amends.SagaState.ABANDONED
        assert set(test.effects) <= set(abandoned.remaining_steps)
        assert saga.result().state is amends.SagaState.ABANDONED


def test_a_stuck_compensation_is_retried_too() -> None:
    """Broken while undoing; mended, the saga is undone."""
    with SagaTest(ORDER) as test:
        test.participant("payments").execute("charge").answers(
            LostReply(amends.Rejected("card_declined"))
        )
        undo = test.participant("inventory").compensate("reserve")
        undo.answers(amends.Broken("shelf_lost"), None)
        saga = test.start()
        assert saga.result().state is amends.SagaState.STUCK
        assert test.effects == ["reserve"]
        saga.retry()
        assert saga.result().state is amends.SagaState.COMPENSATED
        assert test.effects == []
