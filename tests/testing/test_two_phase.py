"""What a SagaTest shows of a two-phase commit: votes, the decision, and what is held meanwhile."""

from __future__ import annotations

import dataclasses

import pytest

import amends
from amends_runtime.testing import (
    InvalidScript,
    LostReply,
    NoReply,
    SagaTest,
    Status,
    check_every_crash,
)

TRANSFER = (
    amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT, locked_retries=2)
    .step("debit", "east", "debit")
    .step("credit", "west", "credit")
)
VOTES = ["prepare debit", "prepare credit"]
COMMITTED = [*VOTES, "execute debit", "execute credit"]


def test_without_a_script_all_vote_yes_and_commit() -> None:
    """Nothing takes effect before the decision, and nothing is held after it."""
    with SagaTest(TRANSFER) as test:
        saga = test.start({"cents": 5})
        test.run_until(lambda: len(test.held) == 2)
        assert (sorted(test.held), test.effects) == (["credit", "debit"], [])
        done = saga.result()
        assert (done.state, done.decision) == (amends.SagaState.COMPLETED, amends.Decision.COMMIT)
        assert test.course == COMMITTED
        assert (test.held, sorted(test.effects)) == ([], ["credit", "debit"])


def test_it_goes_until_the_decision_and_no_further() -> None:
    """A condition is the whole test's; a saga's own `run_until` takes a state, and says so."""
    with SagaTest(TRANSFER) as test:
        saga = test.start()
        test.run_until(lambda: saga.get().decision == amends.Decision.COMMIT)
        assert (sorted(test.held), test.effects) == (["credit", "debit"], [])
        with pytest.raises(TypeError, match="a condition of yours there is run_until of the Saga"):
            saga.run_until(lambda: True)  # type: ignore[arg-type]


def test_a_no_rolls_back_who_said_yes() -> None:
    """The one that refused holds nothing and is told nothing."""
    with SagaTest(dataclasses.replace(TRANSFER, ordered=True)) as test:
        test.participant("west").prepare("credit").rejects("account_closed")
        saga = test.run()
        assert (saga.state, saga.decision) == (
            amends.SagaState.COMPENSATED,
            amends.Decision.ABORT,
        )
        assert saga.turn is not None
        assert (saga.turn.step, saga.turn.cause) == ("credit", amends.Cause.REJECTED)
        assert test.course == [*VOTES, "compensate debit"]
        assert (test.held, test.effects) == ([], [])


def test_a_lock_is_tried_again_as_a_whole() -> None:
    """In a round of its own, after everything of the one before was rolled back."""
    with SagaTest(TRANSFER) as test:
        test.participant("west").prepare("credit").answers(amends.Rejected("LOCKED"), None)
        saga = test.run()
        assert (saga.state, saga.round) == (amends.SagaState.COMPLETED, 2)
        assert test.course[-4:] == COMMITTED
        assert "compensate debit" in test.course
        assert (test.held, sorted(test.effects)) == ([], ["credit", "debit"])


@pytest.mark.parametrize(
    ("answer", "committed", "effects"),
    [
        (amends.Heuristic(False, "expired"), False, ["debit"]),
        (amends.Heuristic(True, "by_hand"), True, ["credit", "debit"]),
        (amends.Rejected("gone"), False, ["debit"]),
    ],
)
def test_who_decides_alone_is_seen(answer: object, *, committed: bool, effects: list[str]) -> None:
    """Against the decision it ends MIXED, and the other has committed all the same."""
    with SagaTest(TRANSFER) as test:
        test.participant("west").execute("credit").answers(answer)
        saga = test.run()
        assert saga.completed is committed
        assert (saga.state is amends.SagaState.MIXED) is not committed
        assert sorted(test.effects) == effects
        assert test.held == []
        [report] = [one for one in test.saga().history() if one.kind == "HeuristicReported"]
        assert (report.step, report.committed) == ("credit", committed)


def test_the_second_phase_gives_up_nothing() -> None:
    """A participant that is away for a day is told when it is back, and it has held all day."""
    with SagaTest(TRANSFER) as test:
        saga = test.start()
        saga.run_until_step("debit", amends.StepState.EXECUTING)
        test.participant("east").down()
        test.advance(86_400)
        assert test.held == ["debit"]
        assert (saga.get().state, saga.get().decision) == (
            amends.SagaState.STUCK,  # it needs somebody to look, and goes on trying
            amends.Decision.COMMIT,
        )
        test.participant("east").up()
        saga.run_until(amends.SagaState.COMPLETED)
        assert (test.held, sorted(test.effects)) == ([], ["credit", "debit"])


def test_nobody_takes_a_commit_back() -> None:
    """Before the decision abandoning aborts; after it, it is refused."""
    with SagaTest(TRANSFER, strict=False) as test:
        first = test.start(saga_id="first")
        abandoned = first.abandon()
        assert abandoned.remaining_steps == ()
        assert first.result().state is amends.SagaState.COMPENSATED
        second = test.start(saga_id="second")
        second.run_until_step("debit", amends.StepState.EXECUTING)
        with pytest.raises(amends.WrongState, match="has decided COMMIT"):
            second.abandon(force=True)
        with pytest.raises(amends.WrongState):
            second.cancel()
        assert second.result().completed


def test_the_deadline_ends_the_votes() -> None:
    """Half a minute by default; who has voted yes is rolled back, who has not is fenced."""
    with SagaTest(TRANSFER) as test:
        test.participant("west").prepare("credit").answers(NoReply())
        saga = test.run()
        assert saga.state is amends.SagaState.COMPENSATED
        assert saga.turn is not None
        assert saga.turn.cause is amends.Cause.DEADLINE
        assert (test.held, test.effects) == ([], [])


@pytest.mark.parametrize("refused", [False, True])
def test_no_crash_of_the_runtime_matters(*, refused: bool) -> None:
    """Wherever it strikes: all or nothing, and no vote is left holding anything."""

    def script(test: SagaTest) -> None:
        east = test.participant("east")
        east.prepare("debit").answers(LostReply())
        if refused:
            test.participant("west").prepare("credit").rejects("account_closed")
            east.compensate("debit").answers(Status("UNAVAILABLE"), None)
        else:
            east.execute("debit").answers(Status("UNAVAILABLE"), LostReply())

    ordered = dataclasses.replace(TRANSFER, ordered=True)
    report = check_every_crash(ordered, {"cents": 5}, script)
    if refused:
        assert (report.state, report.effects) == (amends.SagaState.COMPENSATED, ())
    else:
        assert (report.state, report.effects) == (amends.SagaState.COMPLETED, ("credit", "debit"))
    assert len(report.crashes) > 10


def test_a_vote_is_not_scripted_where_there_is_none() -> None:
    """A saga's steps are not prepared, and nobody decides alone before a vote or without one."""
    saga = amends.Definition("order").step("charge", "payments", "charge")
    with SagaTest(saga) as test, pytest.raises(InvalidScript, match="no two-phase commit asks for"):
        test.participant("payments").prepare("charge").rejects("no")
    with SagaTest(TRANSFER) as test, pytest.raises(InvalidScript, match="is not decided alone"):
        test.participant("east").prepare("debit").answers(amends.Heuristic(True, "by_hand"))
    with SagaTest(saga) as test:
        test.participant("payments").execute("charge").answers(amends.Heuristic(True, "by_hand"))
        with pytest.raises(InvalidScript, match="has decided alone"):
            test.run()
