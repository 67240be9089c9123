"""The two-phase commit: the coordinator, in the same shape as the saga.

Here are its theory, its door and what it does about each message; `voting` is its first phase,
`second_phase` its second one, and `two_phase_fold` what its records make of it.

How to think about it. A branch is a step. Its participant is asked to Prepare, which is the vote:
who says Done holds what the transaction needs, a lock or a reservation, and may not let go of it
alone. One record is the decision. After it every branch is told, Execute for COMMIT, Compensate for
ABORT, until each has acknowledged.

A branch's life in one round:

    votes     PENDING -> PREPARING -> PREPARED | REJECTED | UNKNOWN
    COMMIT    PREPARED -> EXECUTING -> EXECUTED | BROKEN
    ABORT     PREPARED | UNKNOWN | REJECTED-but-earlier-unknown
                  -> COMPENSATING -> COMPENSATED | BROKEN

The rules. Those of attempts (1, 2, 8, 9 of `saga`) are the same.

1. All are asked at once, or in the order of the list: then a branch is asked once the one before it
   is PREPARED.
2. COMMIT is decided when all are PREPARED and the prepare deadline has not passed. ABORT is decided
   by the first no: a refusal; an outcome that stays unknown after the retries; a breaker that is
   open; a contract that a participant cannot keep; the deadline, which runs from the start through
   everything; or somebody who cancels or abandons. There is one decision in a round, and no
   decision record means ABORT. A participant that three times in a row answers what a retry won't
   mend is such a contract, however quickly it does: others hold locks for this vote.
3. The attempts of the second phase are records of the decision's own turn, or of later ones:
   nobody is told what is not durable. They go to all branches at once, and none waits for another.
4. After ABORT a vote that was never sent is withdrawn, and one on the wire is awaited. One that may
   have been cast, because its outcome is unknown or it was lost with its runtime, is rolled back
   like a yes: Compensate fences the branch, so that a late Prepare votes no. A clear no holds
   nothing, and is told nothing.
5. The second phase gives up nothing. Its waits are capped; a branch that has not acknowledged what
   it has been told for as long as its budget, or has answered for a minute what a retry won't mend,
   is marked for an operator (StepStuck), and its attempts go on. The budget is a matter of time,
   and of nothing else: whether it is asked, refused, in progress or waits in its lane, others'
   locks are held meanwhile. What passed while no runtime was there is no mark yet: it is told once
   more before.
6. A vote is a promise. In the second phase Broken, a commit that is Rejected, or a Heuristic
   outcome contrary to the decision breaks it: the branch is BROKEN, at once and for good, the
   others are told all the same, and the end is MIXED. A Heuristic outcome that agrees with the
   decision acknowledges it. A roll back that is Rejected is a failed attempt, as a compensation's
   is.
7. Where everything that was refused was refused as LOCKED, all of it is acknowledged, nobody has
   asked to end it meanwhile and the definition allows one more try, a new round follows after a
   random wait, if that is over before the deadline: under new keys, for the fence of the old ones
   stands.
8. Nothing is silent: one that has not ended has an open attempt or a wake-up.
9. A retry by an operator makes what waits for its next attempt due. A branch that is told the
   decision loses its mark and has a fresh budget, also where its attempt is under way; one that is
   in progress there is asked at once.
10. It ends COMPLETED when all are EXECUTED, COMPENSATED when nothing is held any more, and MIXED if
    any is BROKEN. Cancelling and abandoning are possible before the decision, and abort it; after
    ABORT they keep another round from following, and for the rest nothing is skipped and nothing is
    forced.

11. Where a restored store has lost what came after, any branch may have been asked and told, in
    this round and in each that the definition allows. So after ABORT all are
    rolled back that have not refused, asked or not, and every such round is aborted and told after
    it: who was fenced there says Done, and who has committed there breaks the silence (MIXED).

Presumed abort is Mohan, Lindsay and Obermarck's ("Transaction Management in the R* Distributed
Database Management System", 1986), but for one thing: ABORT is recorded and acknowledged, too,
since a late Prepare must find its fence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from amends_runtime.core.attempts import PROGRESS_LIMIT_MS, is_open, step_of
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import CallParticipant, Effect, PollNow, WakeAt, WithdrawCall
from amends_runtime.core.messages import (
    NO_PARTICIPANT,
    AbandonSaga,
    Answered,
    CancelSaga,
    InProgress,
    Message,
    NotSent,
    RetrySaga,
    Revived,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.records import (
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    Failure,
    OperatorActed,
    OperatorAction,
    SagaState,
    TurnCause,
    Verb,
)
from amends_runtime.core.second_phase import acknowledged, tell_decision
from amends_runtime.core.state import Answer, Decision, Saga
from amends_runtime.core.turn import (
    Turn,
    begin,
    lose_attempts,
    on_start,
    operated,
    poll_until,
    steps_to_retry,
    take_up,
)
from amends_runtime.core.two_phase_fold import (
    LOCKED,
    can_be_retried,
    evolve,
    is_held,
    may_try_again,
)
from amends_runtime.core.voting import abort, ask_for_votes, count_votes, voted
from amends_runtime.errors import IllegalMessage

__all__ = ["LOCKED", "TRANSITIONS", "decide", "decision_of", "is_held", "owed"]

_PREPARE: Final = Verb.PREPARE  # bound once: see `saga`
_ABORT: Final = CommitDecision.ABORT
_LOST: Final = "the store was restored, and this may have gone on in what it has lost"

TRANSITIONS: dict[SagaState, tuple[SagaState, ...]] = {
    SagaState.RUNNING: (
        SagaState.COMPENSATING,
        SagaState.STUCK,
        SagaState.COMPLETED,
        SagaState.MIXED,
    ),
    SagaState.COMPENSATING: (
        SagaState.RUNNING,  # a new round
        SagaState.STUCK,
        SagaState.COMPENSATED,
        SagaState.MIXED,
    ),
    SagaState.STUCK: (SagaState.RUNNING, SagaState.COMPENSATING),
    SagaState.COMPLETED: (),
    SagaState.COMPENSATED: (),
    SagaState.MIXED: (),
}
"""What may follow what, as everybody outside sees it; the diagram in the docs is drawn from it."""


# -- what participants and operators ask -----------------------------------------------------------


def decision_of(saga: Saga, round_: int) -> CommitDecision:
    """What was decided in a round, of a durable state: what GetDecision answers with.

    A round that this history does not have is UNKNOWN: another history asked for that vote. Once
    the saga has ended it is ABORT: that round cannot come any more, so nothing will commit it.
    Unless it ended MIXED after a restore: then such a round was not looked at, see rule 11.
    """
    if (
        round_ > saga.round
        and saga.ended
        and not (saga.history_lost and saga.end is SagaState.MIXED)
    ):
        return _ABORT
    if not 1 <= round_ <= saga.round:
        return CommitDecision.UNKNOWN
    if round_ < saga.round:
        return _ABORT  # no round follows a commit
    return saga.decision or CommitDecision.PENDING


# -- decide ----------------------------------------------------------------------------------------


def decide(plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int) -> Decision:
    """What a two-phase commit does about a message. `saga` is None only before StartSaga.

    Raises IllegalMessage for a message that no correct runtime can send in this state.
    """
    if saga is None:
        turn = begin(plan, message, now_ms, epoch, evolve)
        _advance(turn)
    else:
        turn = Turn(plan, saga, saga, now_ms, epoch, evolve)
        rule: Callable[[Turn, Any], None] | None = _RULES.get(type(message))
        if rule is None:
            raise IllegalMessage(saga.saga_id, saga.state.name, type(message).__name__)
        rule(turn, message)
    return _decision(turn)


def _decision(turn: Turn) -> Decision:
    """The effects are what is owed now and was not before; everything, where all was lost."""
    known = [] if turn.fresh else owed(turn.plan, turn.before)
    turn.effects += [effect for effect in owed(turn.plan, turn.saga) if effect not in known]
    return Decision(tuple(turn.records), turn.saga, tuple(turn.effects), turn.answer)


def _on_wake(turn: Turn, message: Wake) -> None:
    turn.now_ms = max(turn.now_ms, message.due_at_ms)
    _advance(turn)


def _on_restart(turn: Turn, message: RuntimeRestarted) -> None:
    lose_attempts(turn)
    if message.restored and not turn.saga.ended and not turn.saga.history_lost:
        confirmed = OperatorAction.CONFIRM_RESTORE
        turn.record(OperatorActed(turn.now_ms, confirmed, None, "amends", _LOST))
    _advance(turn)


def _on_revived(turn: Turn, message: Revived) -> None:
    take_up(turn, message, owed)
    _advance(turn)


def _on_cancel(turn: Turn, message: CancelSaga) -> None:
    saga = turn.saga
    if saga.decision is None:
        turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
        abort(turn, TurnCause.CANCELLED, None, Failure("CANCELLED", message.reason))
        turn.answer = Answer.TURNED_BACK
        _advance(turn)
    elif saga.end is SagaState.MIXED:
        turn.answer = Answer.ENDED
    elif saga.decision is _ABORT:
        if may_try_again(turn.plan, saga):
            turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
            _advance(turn)
        turn.answer = Answer.ALREADY_TURNED_BACK
    else:
        turn.answer = Answer.COMPLETED if saga.ended else Answer.PAST_NO_RETURN


def _on_abandon(turn: Turn, message: AbandonSaga) -> None:
    saga = turn.saga
    if message.request_id and message.request_id == saga.operator_request:
        turn.answer = Answer.ABORTED  # and what came of it is what the sender is shown
    elif saga.decision is None:
        turn.record(operated(turn, message, OperatorAction.ABANDON))
        abort(turn, TurnCause.CANCELLED, None, Failure("ABANDONED", message.reason))
        turn.answer = Answer.ABORTED
        _advance(turn)
    elif saga.ended:
        turn.answer = Answer.ENDED
    elif saga.decision is _ABORT:
        if may_try_again(turn.plan, saga):
            turn.record(operated(turn, message, OperatorAction.ABANDON))
            _advance(turn)
        turn.answer = Answer.ABORTED
    else:
        turn.answer = Answer.DECIDED


def _on_retry(turn: Turn, message: RetrySaga) -> None:
    found = steps_to_retry(turn, message, can_be_retried)
    if found is None:
        return
    for number in found:
        step = turn.saga.steps[number]
        turn.record(operated(turn, message, OperatorAction.RETRY, number, turn.saga.round))
        if step.open:
            turn.effects.append(PollNow(number, step.verb, step.round, step.attempt))
    _advance(turn)


def _on_not_sent(turn: Turn, message: NotSent) -> None:
    step = step_of(turn.saga, message)
    if not is_open(step, message):
        return  # an echo, see rule 2 of `saga`
    turn.record(AttemptWithdrawn(turn.now_ms, message.step, step.verb, step.round, step.attempt))
    if message.reason and step.verb is _PREPARE and turn.saga.decision is None:
        participant = turn.plan.steps[message.step].participant
        failing = "its calls have been failing"
        because = "it is not registered" if message.reason == NO_PARTICIPANT else failing
        why = f"participant {participant} is not asked for votes: {because}"
        abort(turn, TurnCause.GAVE_UP, message.step, Failure(message.reason, why))
    _advance(turn)


def _on_answered(turn: Turn, message: Answered) -> None:
    step = step_of(turn.saga, message)
    if not is_open(step, message):
        return  # an echo, see rule 2 of `saga`
    outcome = message.outcome
    if isinstance(outcome, InProgress):
        given_up = _in_progress(turn, message, outcome)
        if given_up is None:
            return
        outcome = given_up
    if step.verb is _PREPARE:
        voted(turn, message, outcome)
    else:
        acknowledged(turn, message, outcome)
    _advance(turn)


_RULES: dict[type[Any], Callable[[Turn, Any], None]] = {
    StartSaga: on_start,
    Answered: _on_answered,
    NotSent: _on_not_sent,
    Wake: _on_wake,
    CancelSaga: _on_cancel,
    RetrySaga: _on_retry,
    AbandonSaga: _on_abandon,
    RuntimeRestarted: _on_restart,
    Revived: _on_revived,
}


# -- going on --------------------------------------------------------------------------------------


def _in_progress(turn: Turn, message: Answered, outcome: InProgress) -> Unknown | None:
    """Plans the next poll; or says that the attempt has been in progress for too long.

    Once ABORT is decided nobody waits for a vote: the fence comes before it or after it.
    """
    limit_at_ms = message.sent_at_ms + PROGRESS_LIMIT_MS
    if message.verb is _PREPARE and turn.saga.decision is not None:
        limit_at_ms = turn.now_ms
    return poll_until(turn, message, outcome, limit_at_ms)


def _advance(turn: Turn) -> None:
    """Decides if it is time to, starts whatever may start now, and ends what is over."""
    if turn.saga.ended:
        return
    count_votes(turn)
    if turn.saga.decision is None:
        ask_for_votes(turn)
    else:
        tell_decision(turn)


# -- owed ------------------------------------------------------------------------------------------


def owed(_: Plan, saga: Saga) -> list[Effect]:
    """Everything that this state owes the world, in the order of the steps."""
    effects: list[Effect] = []
    if saga.ended:
        return effects
    instants = set()
    for number, step in enumerate(saga.steps):
        key = (number, step.verb, step.round, step.attempt)
        if step.open:
            effects.append(CallParticipant(*key))
            if step.verb is _PREPARE and saga.decision is not None:
                effects.append(WithdrawCall(*key))
        elif step.retry_at_ms and step.retry_at_ms not in instants:  # a round's is all branches'
            instants.add(step.retry_at_ms)
            effects.append(WakeAt(step.retry_at_ms))
        if step.mark_at_ms and step.mark_at_ms not in instants:  # and so is a decision's
            instants.add(step.mark_at_ms)
            effects.append(WakeAt(step.mark_at_ms))
    if saga.deadline_at_ms and saga.decision is None and saga.deadline_at_ms not in instants:
        effects.append(WakeAt(saga.deadline_at_ms))
    return effects
