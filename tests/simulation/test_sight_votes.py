"""The simulator can see: bugs of a two-phase commit are planted, and must be found."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from amends.barrier import verdict
from amends.outcomes import Verb
from amends_runtime.actors.saga_actor import SagaActor, Turn
from amends_runtime.actors.turns import Turns
from amends_runtime.core import second_phase, two_phase_fold, voting
from amends_runtime.core import turn as core_turn
from amends_runtime.core import two_phase as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import Answered, Broken, Done, Rejected, RuntimeRestarted, Unknown
from amends_runtime.core.records import (
    CommitDecision,
    DecisionMade,
    Failure,
    SagaState,
    TurnCause,
)
from amends_runtime.core.records import Verb as CoreVerb
from amends_runtime.core.saga import Phase, Saga, StepState, StepStatus
from amends_runtime.wire import calls
from tests.simulation import participants
from tests.simulation.faults import Fault
from tests.simulation.schedule import draw
from tests.simulation.world import run

DECIDE: dict[Any, Any] = core._RULES
EVOLVE: dict[Any, Any] = two_phase_fold._EVOLVE_RULES

WITHIN = 400
"""Schedules in which each of these must be found; most are in the first dozen."""

COMMIT, ABORT = CommitDecision.COMMIT, CommitDecision.ABORT


def assert_found(*rules: str, weather: Mapping[Fault, float] = MappingProxyType({})) -> None:
    """Each of these rules (a part of its words) is found broken, by schedules of commits alone."""
    missing = {*rules}
    for seed in range(WITHIN):
        schedule, faults = draw(seed)
        if any(saga.plan.two_phase is None for saga in schedule.sagas):
            continue
        faults.weather.update(weather)
        broken = [violation.rule for violation in run(schedule, faults).violations]
        missing = {rule for rule in missing if not any(rule in words for words in broken)}
        if not missing:
            return
    pytest.fail(f"no schedule broke {sorted(missing)}")


def test_a_commit_one_vote_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one have voted yes, and it is committed."""

    def nearly_all(saga: Saga) -> bool:
        waits = [step for step in saga.steps if step.status is not StepStatus.PREPARED]
        return len(waits) <= 1 < len(saga.steps)

    monkeypatch.setattr(voting, "all_prepared", nearly_all)
    monkeypatch.setattr(two_phase_fold, "all_prepared", nearly_all)
    assert_found("all have voted yes", "all or none", "visible before", "money")


def test_an_unknown_vote_that_an_abort_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may have voted yes is not told, and holds what it voted for."""
    is_held = two_phase_fold.is_held

    def if_known(step: StepState) -> bool:
        return is_held(step) and step.status is not StepStatus.UNKNOWN

    monkeypatch.setattr(two_phase_fold, "is_held", if_known)
    often_lost = {Fault.LOSE_REPLY: 0.5, Fault.LOSE_REQUEST: 0.2}
    assert_found("is held at the end", "voted yes is told", weather=often_lost)


def test_a_decision_that_is_told_before_it_is_durable_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calls of the second phase leave, and then the decision is written."""
    decide_one = Turns._decide_one

    def tell_too_early(self: Turns, actor: SagaActor, now_ms: int, epoch: int) -> Turn | None:
        turn = decide_one(self, actor, now_ms, epoch)
        written = turn.transition.records if turn is not None and turn.transition else ()
        if turn is not None and any(isinstance(record, DecisionMade) for record in written):
            self._perform(turn)
        return turn

    monkeypatch.setattr(Turns, "_decide_one", tell_too_early)
    assert_found("persist before send", "not durable")


def test_a_decision_that_a_recovery_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new runtime takes a commit that nobody has acknowledged for undecided, and aborts it."""
    restart = DECIDE[RuntimeRestarted]
    decided = EVOLVE[DecisionMade]

    def decide_anew(turn: core_turn.Turn, message: RuntimeRestarted) -> None:
        saga = turn.saga
        told = any(step.status is StepStatus.EXECUTED for step in saga.steps)
        if saga.decision is COMMIT and not saga.ended and not told:
            turn.record(
                DecisionMade(
                    turn.now_ms,
                    ABORT,
                    saga.round,
                    TurnCause.DEADLINE,
                    None,
                    Failure("DEADLINE", "as far as is known"),
                )
            )
        restart(turn, message)

    def take_anew(plan: Plan, saga: Saga, record: DecisionMade) -> Any:
        if saga.decision is None:
            return decided(plan, saga, record)
        return msgspec.structs.replace(
            saga,
            decision=record.decision,
            phase=Phase.BACKWARD,
            steps=tuple(
                msgspec.structs.replace(
                    step, status=StepStatus.PREPARED, verb=CoreVerb.PREPARE, open=False
                )
                for step in saga.steps
            ),
        )

    monkeypatch.setitem(DECIDE, RuntimeRestarted, decide_anew)
    monkeypatch.setitem(EVOLVE, DecisionMade, take_anew)
    often_dead = {Fault.CRASH_AFTER_WRITE: 0.3, Fault.CRASH_AFTER_COMMIT: 0.3}
    assert_found("anything but the decision", "one decision in a round", weather=often_dead)


def test_a_second_round_under_the_keys_of_the_first_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its Prepare meets the fence of the round before, and nothing is ever committed."""
    put = calls._put_attempt

    def in_the_first(message: Any, call: Any) -> None:
        put(message, call)
        if call.two_phase:
            message.round = 1

    monkeypatch.setattr(calls, "_put_attempt", in_the_first)
    assert_found("aborted only after")


def test_an_end_that_hides_a_broken_vote_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch is not as it was decided, and the saga says that all is well."""

    def as_decided(saga: Saga) -> SagaState:
        return SagaState.COMPLETED if saga.decision is COMMIT else SagaState.COMPENSATED

    monkeypatch.setattr(second_phase, "end_of", as_decided)
    monkeypatch.setattr(two_phase_fold, "end_of", as_decided)
    assert_found("broken promise shows", "all or none", weather={Fault.ALONE_CONTRARY: 0.2})


def test_a_late_vote_without_a_fence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cast after the roll back, and what it takes is held for ever."""

    def without_fence(question: verdict.Question, rows: verdict.Rows | None) -> verdict.Verdict:
        if rows is not None and question.verb is Verb.PREPARE:
            rows = {verb: row for verb, row in rows.items() if verb is Verb.PREPARE}
        said = verdict.judge(question, rows)
        if not isinstance(said, verdict.Answer):
            return said
        kept = tuple(
            write
            for write in said.writes
            if (write.verb, write.state) != (Verb.PREPARE, verdict.RowState.FENCED)
        )
        return verdict.Answer(said.outcome, kept)

    monkeypatch.setattr(participants, "judge", without_fence)
    assert_found("is held at the end")


def test_an_answer_that_presumes_an_abort_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A participant asks while votes are collected, is told ABORT, and it is committed."""

    def presumed(saga: Saga, round_: int) -> CommitDecision:
        return saga.decision or ABORT if round_ == saga.round else ABORT

    monkeypatch.setattr("amends_runtime.api.deciding.decision_of", presumed)
    assert_found("in doubt is told", weather={Fault.ASKED: 1.0})


def test_a_second_phase_that_gives_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that does not answer is taken for one that has acknowledged."""
    acknowledged = second_phase.acknowledged

    def give_up(turn: core_turn.Turn, message: Answered, outcome: Any) -> None:
        is_first = message.attempt == 1
        done = Done() if isinstance(outcome, Unknown) and is_first else outcome
        acknowledged(turn, message, done)

    monkeypatch.setattr(core, "acknowledged", give_up)
    assert_found("is held at the end", "all or none")


def test_a_promise_that_was_kept_and_called_broken_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An acknowledgement is lost, and the runtime says that the participant broke its vote."""
    acknowledged = second_phase.acknowledged

    def accuse(turn: core_turn.Turn, message: Answered, outcome: Any) -> None:
        is_lost = isinstance(outcome, Unknown)
        acknowledged(turn, message, Broken("no_answer") if is_lost else outcome)

    monkeypatch.setattr(core, "acknowledged", accuse)
    assert_found("only a broken vote is called one", "all or none")


def test_a_refused_commit_that_counts_as_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch refuses what it had voted for, and the saga says that it did it."""
    acknowledged = second_phase.acknowledged

    def count_it(turn: core_turn.Turn, message: Answered, outcome: Any) -> None:
        refuses = message.verb is CoreVerb.EXECUTE and isinstance(outcome, Rejected)
        acknowledged(turn, message, Done() if refuses else outcome)

    monkeypatch.setattr(core, "acknowledged", count_it)
    assert_found("all or none", weather={Fault.COMMIT_REFUSED: 0.2})
