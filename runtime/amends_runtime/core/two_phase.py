"""The two-phase commit: the coordinator, in the same shape as the saga.

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

Presumed abort is Mohan, Lindsay and Obermarck's ("Transaction Management in the R* Distributed
Database Management System", 1986), but for one thing: ABORT is recorded and acknowledged, too,
since a late Prepare must find its fence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from amends_runtime.core.attempts import (
    IN_PROGRESS,
    MISCONFIGURED_ATTEMPTS,
    PROGRESS_LIMIT_MS,
    exhausted,
    failed,
    illegal,
    is_misconfigured,
    is_open,
    policy_of,
    poll_of,
    rejected_compensation,
    step_ending,
    step_of,
    step_without_attempt,
    steps_with,
    timing_of,
    too_large,
    took_ms,
    with_step,
)
from amends_runtime.core.backoff import backoff_ms
from amends_runtime.core.definition import Plan, RetryPolicy
from amends_runtime.core.effects import CallParticipant, Effect, PollNow, WakeAt, WithdrawCall
from amends_runtime.core.messages import (
    NO_PARTICIPANT,
    AbandonSaga,
    Answered,
    Broken,
    CancelSaga,
    Done,
    Heuristic,
    InProgress,
    Message,
    NotSent,
    Rejected,
    RetrySaga,
    Revived,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    Failure,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepStuck,
    TurnCause,
    Verb,
    VoteRefused,
)
from amends_runtime.core.state import Answer, Decision, Phase, Saga, StepState, StepStatus
from amends_runtime.errors import IllegalMessage, IllegalRecord

__all__ = ["LOCKED", "TRANSITIONS", "decide", "decision_of", "evolve", "is_held", "owed"]

LOCKED: Final = "LOCKED"
"""The reason of a vote whose participant would have had to wait for a lock."""

UNACKNOWLEDGED: Final = "UNACKNOWLEDGED"
"""The reason of a mark on a branch of which no failure is known: it has not answered."""

_PREPARE: Final = Verb.PREPARE  # bound once: see `saga`
_EXECUTE: Final = Verb.EXECUTE
_COMPENSATE: Final = Verb.COMPENSATE
_COMMIT: Final = CommitDecision.COMMIT
_ABORT: Final = CommitDecision.ABORT

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
    """
    if round_ > saga.round and saga.ended:
        return _ABORT
    if not 1 <= round_ <= saga.round:
        return CommitDecision.UNKNOWN
    if round_ < saga.round:
        return _ABORT  # no round follows a commit
    return saga.decision or CommitDecision.PENDING


def is_held(step: StepState) -> bool:
    """Whether the participant may be holding something for this branch, which blocks others."""
    return step.status in _HELD or (step.status is StepStatus.REJECTED and step.unknown)


_HELD: Final = frozenset(
    (
        StepStatus.PREPARING,
        StepStatus.PREPARED,
        StepStatus.UNKNOWN,
        StepStatus.EXECUTING,
        StepStatus.COMPENSATING,
    )
)


# -- decide ----------------------------------------------------------------------------------------


def decide(plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int) -> Decision:
    """What a two-phase commit does about a message. `saga` is None only before StartSaga.

    Raises IllegalMessage for a message that no correct runtime can send in this state.
    """
    if saga is None:
        return _start(plan, message, now_ms, epoch)
    turn = _Turn(plan, saga, saga, now_ms, epoch)
    rule: Callable[[_Turn, Any], None] | None = _RULES.get(type(message))
    if rule is None:
        raise IllegalMessage(saga.saga_id, saga.state.name, type(message).__name__)
    rule(turn, message)
    return turn.decision()


class _Turn(msgspec.Struct, gc=False):
    """One call of `decide` in the making: the records so far, and the state after them."""

    plan: Plan
    before: Saga
    saga: Saga
    now_ms: int
    epoch: int
    records: list[Record] = []
    extra: list[Effect] = []
    answer: Answer | None = None
    fresh: bool = False

    def record(self, record: Record) -> None:
        self.saga = evolve(self.plan, self.saga, record)
        self.records.append(record)

    def decision(self) -> Decision:
        """The effects are what is owed now and was not before; everything, where all was lost."""
        effects = [*self.extra]
        known = [] if self.fresh else owed(self.plan, self.before)
        effects += [effect for effect in owed(self.plan, self.saga) if effect not in known]
        return Decision(tuple(self.records), self.saga, tuple(effects), self.answer)


def _start(plan: Plan, message: Message, now_ms: int, epoch: int) -> Decision:
    if not isinstance(message, StartSaga):
        raise IllegalMessage("(none)", "(not started)", type(message).__name__)
    started = SagaStarted(
        now_ms,
        message.saga_id,
        plan.definition.name,
        plan.content_hash,
        message.content_hash,
        message.input,
        message.deadline_at_ms,
        message.labels,
        message.traceparent,
    )
    begun = evolve(plan, None, started)
    turn = _Turn(plan, begun, begun, now_ms, epoch, [started], [], Answer.STARTED, fresh=True)
    _advance(turn)
    return turn.decision()


def _on_start(turn: _Turn, message: StartSaga) -> None:
    """A repeated start: the caller's retry, or somebody else's use of the same id."""
    same = message.content_hash == turn.saga.content_hash
    turn.answer = Answer.EXISTED if same else Answer.OTHER_CONTENT


def _on_wake(turn: _Turn, message: Wake) -> None:
    turn.now_ms = max(turn.now_ms, message.due_at_ms)
    _advance(turn)


def _on_restart(turn: _Turn, _: RuntimeRestarted) -> None:
    for number, step in enumerate(turn.saga.steps):
        if step.open:
            lost = (number, step.verb, step.round, step.attempt)
            turn.record(AttemptLost(turn.now_ms, *lost, turn.epoch))
    turn.fresh = True
    _advance(turn)


def _on_revived(turn: _Turn, message: Revived) -> None:
    """Nothing was lost, but for an attempt that nobody looked after meanwhile."""
    for number, step in enumerate(turn.saga.steps):
        polls = [one for one in message.polls if one.step == number and is_open(step, one)]
        turn.extra += polls
        if step.open and not polls:
            lost = (number, step.verb, step.round, step.attempt)
            turn.record(AttemptLost(turn.now_ms, *lost, turn.epoch))
    for effect in owed(turn.plan, turn.saga):
        if isinstance(effect, WakeAt) and effect.at_ms > turn.now_ms:
            turn.extra.append(effect)
    _advance(turn)


def _on_cancel(turn: _Turn, message: CancelSaga) -> None:
    saga = turn.saga
    if saga.decision is None:
        turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
        _abort(turn, TurnCause.CANCELLED, None, Failure("CANCELLED", message.reason))
        turn.answer = Answer.TURNED_BACK
        _advance(turn)
    elif saga.end is SagaState.MIXED:
        turn.answer = Answer.ENDED
    elif saga.decision is _ABORT:
        if _may_try_again(turn.plan, saga):
            turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
            _advance(turn)
        turn.answer = Answer.ALREADY_TURNED_BACK
    else:
        turn.answer = Answer.COMPLETED if saga.ended else Answer.PAST_NO_RETURN


def _on_abandon(turn: _Turn, message: AbandonSaga) -> None:
    saga = turn.saga
    if message.request_id and message.request_id == saga.operator_request:
        turn.answer = Answer.ABORTED  # and what came of it is what the sender is shown
    elif saga.decision is None:
        turn.record(_operated(turn, message, OperatorAction.ABANDON))
        _abort(turn, TurnCause.CANCELLED, None, Failure("ABANDONED", message.reason))
        turn.answer = Answer.ABORTED
        _advance(turn)
    elif saga.ended:
        turn.answer = Answer.ENDED
    elif saga.decision is _ABORT:
        if _may_try_again(turn.plan, saga):
            turn.record(_operated(turn, message, OperatorAction.ABANDON))
            _advance(turn)
        turn.answer = Answer.ABORTED
    else:
        turn.answer = Answer.DECIDED


def _on_retry(turn: _Turn, message: RetrySaga) -> None:
    saga = turn.saga
    if message.request_id and message.request_id == saga.operator_request:
        turn.answer = Answer.RETRIED  # and what came of it is what the sender is shown
        return
    if saga.ended:
        turn.answer = Answer.ENDED
        return
    found = [
        number
        for number, step in enumerate(saga.steps)
        if message.step in (None, number) and _can_be_retried(step)
    ]
    if not found and not message.revived:
        turn.answer = Answer.NOTHING_STUCK
        return
    for number in found:
        step = saga.steps[number]
        turn.record(_operated(turn, message, OperatorAction.RETRY, number, saga.round))
        if step.open:
            turn.extra.append(PollNow(number, step.verb, step.round, step.attempt))
    if not found:
        turn.record(_operated(turn, message, OperatorAction.RETRY))
    turn.answer = Answer.RETRIED
    _advance(turn)


def _operated(
    turn: _Turn,
    message: RetrySaga | AbandonSaga,
    action: OperatorAction,
    step: int | None = None,
    round_: int = 0,
) -> OperatorActed:
    by = (message.author, message.reason)
    return OperatorActed(turn.now_ms, action, step, *by, round_, message.request_id)


def _on_not_sent(turn: _Turn, message: NotSent) -> None:
    step = step_of(turn.saga, message)
    if not is_open(step, message):
        return  # an echo, see rule 2 of `saga`
    turn.record(AttemptWithdrawn(turn.now_ms, message.step, step.verb, step.round, step.attempt))
    if message.reason and step.verb is _PREPARE and turn.saga.decision is None:
        participant = turn.plan.steps[message.step].participant
        failing = "its calls have been failing"
        because = "it is not registered" if message.reason == NO_PARTICIPANT else failing
        why = f"participant {participant} is not asked for votes: {because}"
        _abort(turn, TurnCause.GAVE_UP, message.step, Failure(message.reason, why))
    _advance(turn)


def _on_answered(turn: _Turn, message: Answered) -> None:
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
        _voted(turn, message, outcome)
    else:
        _acknowledged(turn, message, outcome)
    _advance(turn)


_RULES: dict[type[Any], Callable[[_Turn, Any], None]] = {
    StartSaga: _on_start,
    Answered: _on_answered,
    NotSent: _on_not_sent,
    Wake: _on_wake,
    CancelSaga: _on_cancel,
    RetrySaga: _on_retry,
    AbandonSaga: _on_abandon,
    RuntimeRestarted: _on_restart,
    Revived: _on_revived,
}


# -- decide: votes ---------------------------------------------------------------------------------


def _voted(
    turn: _Turn, message: Answered, outcome: Done | Rejected | Broken | Heuristic | Unknown
) -> None:
    number, now_ms = message.step, turn.now_ms
    attempt = (number, message.round, message.attempt, timing_of(message))
    decided = turn.saga.decision is not None
    if isinstance(outcome, Done):
        oversize = too_large(turn.saga, outcome.result)
        if oversize is None:
            turn.record(StepPrepared(now_ms, *attempt, outcome.result))
            return
        outcome = Broken(oversize.reason, oversize.message)  # asked again, it would say the same
    failure = Failure(outcome.reason, outcome.message)
    if isinstance(outcome, Rejected):
        turn.record(VoteRefused(now_ms, *attempt, failure))
        if not decided:
            _abort(turn, TurnCause.REJECTED, number, failure)
    elif decided or not isinstance(outcome, Unknown):
        turn.record(failed(now_ms, message, failure, retry_at_ms=0))
        if not decided:
            _abort(turn, TurnCause.GAVE_UP, number, failure)
    else:
        _vote_unknown(turn, message, outcome)


def _vote_unknown(turn: _Turn, message: Answered, outcome: Unknown) -> None:
    """Asks again, or takes it for a no: the retries are used up, or nobody is there at all."""
    number, step = message.step, turn.saga.steps[message.step]
    policy = policy_of(turn.plan, number)
    wait_ms = _wait_ms(turn, policy, message, step)
    failure = Failure(outcome.reason, outcome.message)
    used_up = exhausted(
        turn.plan, step, message, outcome, wait_ms=wait_ms, budget_ms=policy.give_up_after_ms
    )
    lasting = outcome.misconfigured and step.misconfigured + 1 >= MISCONFIGURED_ATTEMPTS
    is_last = message.probe or used_up or lasting
    turn.record(
        failed(
            turn.now_ms,
            message,
            failure,
            misconfigured=outcome.misconfigured,
            retry_at_ms=0 if is_last else turn.now_ms + wait_ms,
        )
    )
    if is_last:
        if used_up and not message.probe:
            turn.record(StepGivenUp(turn.now_ms, number, turn.saga.steps[number].spent_ms))
        _abort(turn, TurnCause.GAVE_UP, number, failure)


def _abort(turn: _Turn, cause: TurnCause, step: int | None, failure: Failure) -> None:
    turn.record(DecisionMade(turn.now_ms, _ABORT, turn.saga.round, cause, step, failure))


# -- decide: the second phase ----------------------------------------------------------------------


def _acknowledged(
    turn: _Turn, message: Answered, outcome: Done | Rejected | Broken | Heuristic | Unknown
) -> None:
    number, now_ms = message.step, turn.now_ms
    attempt = (number, message.round, message.attempt, timing_of(message))
    if isinstance(outcome, Rejected) and message.verb is _COMPENSATE:
        outcome = rejected_compensation(outcome)
    if isinstance(outcome, Done):
        if message.verb is _COMPENSATE:
            turn.record(StepCompensated(now_ms, *attempt))
        else:
            turn.record(_committed(turn, message, outcome))
    elif isinstance(outcome, Unknown):
        _repeat(turn, message, outcome)
    else:
        committed: bool | None = None
        if isinstance(outcome, Heuristic):
            committed = outcome.committed
        elif isinstance(outcome, Rejected):
            committed = False  # definite: it has no effect and never will
        turn.record(
            HeuristicReported(
                now_ms,
                number,
                message.verb,
                message.round,
                message.attempt,
                timing_of(message),
                committed,
                Failure(outcome.reason, outcome.message),
            )
        )


def _committed(turn: _Turn, message: Answered, outcome: Done) -> StepExecuted:
    """It is committed, whatever it says of it: what is too large is left out, and that is said."""
    failure = outcome.left_out
    oversize = too_large(turn.saga, outcome.result)
    if oversize is not None:
        failure = Failure(oversize.reason, oversize.message)
    attempt = (message.step, message.round, message.attempt, timing_of(message))
    return StepExecuted(turn.now_ms, *attempt, Payload() if failure else outcome.result, failure)


def _repeat(turn: _Turn, message: Answered, outcome: Unknown) -> None:
    """Tells the branch again, for as long as it takes; see rule 5."""
    number, step = message.step, turn.saga.steps[message.step]
    failure = Failure(outcome.reason, outcome.message)
    wait_ms = 0  # of a probe: its lane paces it
    if not message.probe:
        policy = _phase_2_policy(turn.plan, number, message.verb)
        wait_ms = _wait_ms(turn, policy, message, step)
    turn.record(
        failed(
            turn.now_ms,
            message,
            failure,
            misconfigured=outcome.misconfigured,
            retry_at_ms=turn.now_ms + wait_ms,
        )
    )
    lasting = not message.probe and is_misconfigured(step, message, outcome)
    if lasting and not step.stuck_since_ms:
        turn.record(StepStuck(turn.now_ms, number, message.verb, failure))


def _phase_2_policy(plan: Plan, number: int, verb: Verb) -> RetryPolicy:
    if verb is _EXECUTE:
        return policy_of(plan, number)
    policy = plan.steps[number].compensation_retry
    assert policy is not None, "a plan is normalised"
    return policy


def _wait_ms(turn: _Turn, policy: RetryPolicy, message: Answered, step: StepState) -> int:
    key = (turn.saga.saga_id, message.step, step.verb, step.round, step.attempt)
    return backoff_ms(policy, step.failures + 1, *key)


def _in_progress(turn: _Turn, message: Answered, outcome: InProgress) -> Unknown | None:
    """Plans the next poll; or says that the attempt has been in progress for too long.

    Once ABORT is decided nobody waits for a vote: the fence comes before it or after it.
    """
    limit_at_ms = message.sent_at_ms + PROGRESS_LIMIT_MS
    too_late = message.verb is _PREPARE and turn.saga.decision is not None
    if too_late or turn.now_ms >= limit_at_ms:
        return Unknown(
            IN_PROGRESS, "the participant is still at it; nothing is known of the outcome"
        )
    turn.extra.append(poll_of(message, outcome, turn.now_ms, limit_at_ms))
    return None


# -- going on --------------------------------------------------------------------------------------


def _advance(turn: _Turn) -> None:
    """Decides if it is time to, starts whatever may start now, and ends what is over."""
    saga = turn.saga
    if saga.ended:
        return
    if saga.decision is None and 0 < saga.deadline_at_ms <= turn.now_ms:
        _abort(turn, TurnCause.DEADLINE, *_vote_missing(turn.plan, saga))
    elif saga.decision is None and _all_prepared(saga):
        turn.record(DecisionMade(turn.now_ms, _COMMIT, saga.round))
    if turn.saga.decision is None:
        _ask_for_votes(turn)
    else:
        _tell_decision(turn, _EXECUTE if turn.saga.decision is _COMMIT else _COMPENSATE)


def _vote_missing(plan: Plan, saga: Saga) -> tuple[int | None, Failure]:
    """Whose vote the deadline found missing, the first in the list, and what is known of it."""
    message = "the prepare deadline has passed before all had voted"
    for number, step in enumerate(saga.steps):
        late = step.prepared_at_ms >= saga.deadline_at_ms
        if step.status is StepStatus.PREPARED and not late:
            continue
        name = plan.step_names[number]
        message += f": {name} voted too late" if late else f": {name} has not"
        if not late and step.failure is not None:
            message += f"; its last failure is {step.failure.reason}: {step.failure.message}"
        return number, Failure("DEADLINE", message)
    return None, Failure("DEADLINE", message)  # a clock was set back in between


def _all_prepared(saga: Saga) -> bool:
    return all(step.status is StepStatus.PREPARED for step in saga.steps)


def _ask_for_votes(turn: _Turn) -> None:
    for number, step in enumerate(turn.saga.steps):
        if step.open or step.retry_at_ms > turn.now_ms:
            continue
        if step.status is StepStatus.PREPARING or (
            step.status is StepStatus.PENDING and _is_next(turn.plan, turn.saga, number)
        ):
            _start_attempt(turn, number, _PREPARE)


def _is_next(plan: Plan, saga: Saga, number: int) -> bool:
    """Whether all those before it have voted yes; see rule 1."""
    return all(saga.steps[n].status is StepStatus.PREPARED for n in plan.waits_for[number])


def _tell_decision(turn: _Turn, verb: Verb) -> None:
    if not turn.fresh:  # what passed while no runtime was there, is told once more first
        _mark_overdue(turn, verb)
    left = False
    for number, step in enumerate(turn.saga.steps):
        if step.open or is_held(step):
            left = True
            if not step.open and step.retry_at_ms <= turn.now_ms:
                _start_attempt(turn, number, verb)
    if not left:
        _finish(turn)


def _mark_overdue(turn: _Turn, verb: Verb) -> None:
    """Marks what has been told for as long as its budget, under way or not; see rule 5."""
    for number, step in enumerate(turn.saga.steps):
        if 0 < step.mark_at_ms <= turn.now_ms:
            failure = step.failure if step.failures or step.prepared_at_ms else None
            if failure is None:
                what = "commit" if verb is _EXECUTE else "roll back"
                budget_s = _phase_2_policy(turn.plan, number, verb).give_up_after_ms / 1000
                message = f"told to {what} for {budget_s:g} s, and nothing is known of it"
                failure = Failure(UNACKNOWLEDGED, message)
            turn.record(StepStuck(turn.now_ms, number, verb, failure))


def _start_attempt(turn: _Turn, number: int, verb: Verb) -> None:
    step = turn.saga.steps[number]
    goes_on = step.verb is verb and step.round == turn.saga.round
    attempt = step.attempt + 1 if goes_on else 1
    key = (number, verb, turn.saga.round, attempt)
    turn.record(AttemptStarted(turn.now_ms, *key, turn.epoch))


def _finish(turn: _Turn) -> None:
    saga = turn.saga
    if _may_try_again(turn.plan, saga):
        starts_at_ms = turn.now_ms + _wait_for_round_ms(turn)
        if not 0 < saga.deadline_at_ms <= starts_at_ms:
            turn.record(RoundPlanned(turn.now_ms, saga.round + 1, starts_at_ms))
            return
    turn.record(SagaEnded(turn.now_ms, _end_of(saga)))


def _wait_for_round_ms(turn: _Turn) -> int:
    saga = turn.saga
    assert saga.turn is not None, "aborted"
    number = saga.turn.step
    assert number is not None, "by a refusal"
    key = (saga.saga_id, number, _PREPARE, saga.round, 0)
    return backoff_ms(policy_of(turn.plan, number), saga.round, *key)


def _may_try_again(plan: Plan, saga: Saga) -> bool:
    """Whether another round may follow what is aborted and has not ended; see rule 7."""
    assert plan.two_phase is not None, "two-phase commit"
    return (
        saga.round <= plan.two_phase.locked_retries
        and not saga.ended
        and not saga.cancel_requested
        and saga.turn is not None
        and saga.turn.cause is TurnCause.REJECTED
        and all(step.locked for step in saga.steps if step.refused)
        and all(step.status is not StepStatus.BROKEN for step in saga.steps)
    )


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


# -- evolve ----------------------------------------------------------------------------------------


def evolve(plan: Plan, saga: Saga | None, record: Record) -> Saga:
    """The state after one more record. Raises IllegalRecord for one that cannot follow."""
    if saga is None:
        if type(record) is not SagaStarted:
            raise IllegalRecord("(none)", "(not started)", type(record).__name__)
        return _evolve_started(plan, record)
    rule = _EVOLVE_RULES.get(type(record))
    if rule is None or saga.ended:
        raise illegal(saga, record)
    return rule(plan, saga, record)


def _evolve_started(plan: Plan, record: SagaStarted) -> Saga:
    return Saga(
        saga_id=record.saga_id,
        definition_name=record.definition_name,
        definition_hash=record.definition_hash,
        content_hash=record.content_hash,
        input=record.input,
        started_at_ms=record.at_ms,
        updated_at_ms=record.at_ms,
        deadline_at_ms=record.deadline_at_ms,
        labels=record.labels,
        traceparent=record.traceparent,
        steps=(StepState(verb=_PREPARE),) * len(plan.steps),
        payload_bytes=len(record.input.data),
        round=1,
    )


def _evolve_attempt_started(plan: Plan, saga: Saga, record: AttemptStarted) -> Saga:
    step = saga.steps[record.step]
    goes_on = step.verb is record.verb and step.round == record.round
    if step.open or record.round != saga.round or (goes_on and record.attempt <= step.attempt):
        raise illegal(saga, record)
    if record.verb is not _VERB_AFTER[saga.decision]:
        raise illegal(saga, record)  # nobody is told what was not decided
    if record.verb is _PREPARE:
        due = step.status in _ASKABLE and _is_next(plan, saga, record.step)
    else:
        due = is_held(step)  # nobody is told what it has acknowledged
    if not due:
        raise illegal(saga, record)
    if step.verb is not record.verb:
        # What a vote failed with before it was a yes says nothing of what it is told now.
        failure = None if step.prepared_at_ms else step.failure
        step = _replace(step, failures=0, spent_ms=0, misconfigured=0, failure=failure)
    step = _replace(
        step,
        status=_UNDER_WAY[record.verb],
        verb=record.verb,
        round=record.round,
        attempt=record.attempt,
        open=True,
        retry_at_ms=0,
        began_at_ms=step.began_at_ms if goes_on and step.began_at_ms else record.at_ms,
        mark_at_ms=_mark_at_ms(plan, step, record, goes_on=goes_on),
    )
    return with_step(saga, record, step)


def _mark_at_ms(plan: Plan, step: StepState, record: AttemptStarted, *, goes_on: bool) -> int:
    """When this branch is to be marked: once it has been told for its budget.

    A mark that is overdue when an attempt begins was kept by no runtime: it waits for that attempt.
    """
    if record.verb is _PREPARE or (goes_on and step.stuck_since_ms):
        return 0
    budget_ms = _phase_2_policy(plan, record.step, record.verb).give_up_after_ms
    if not goes_on or not step.mark_at_ms:
        return record.at_ms + budget_ms
    if record.at_ms < step.mark_at_ms:
        return step.mark_at_ms
    return record.at_ms + min(plan.steps[record.step].timeout_ms, budget_ms)


_ASKABLE: Final = frozenset((StepStatus.PENDING, StepStatus.PREPARING))
_VERB_AFTER: Final = {None: _PREPARE, _COMMIT: _EXECUTE, _ABORT: _COMPENSATE}
_UNDER_WAY: Final = {
    _PREPARE: StepStatus.PREPARING,
    _EXECUTE: StepStatus.EXECUTING,
    _COMPENSATE: StepStatus.COMPENSATING,
}


def _evolve_prepared(_: Plan, saga: Saga, record: StepPrepared) -> Saga:
    step = _replace(
        step_ending(saga, record),
        status=StepStatus.PREPARED,
        open=False,
        result=record.result,
        vote=record.result,
        prepared_at_ms=record.at_ms,
    )
    saga = _replace(saga, payload_bytes=saga.payload_bytes + len(record.result.data))
    return with_step(saga, record, step)


def _evolve_vote_refused(_: Plan, saga: Saga, record: VoteRefused) -> Saga:
    step = _replace(
        step_ending(saga, record),
        status=StepStatus.REJECTED,
        open=False,
        refused=True,
        locked=record.failure.reason == LOCKED,
        failure=record.failure,
    )
    return with_step(saga, record, step)


def _evolve_decision(plan: Plan, saga: Saga, record: DecisionMade) -> Saga:
    if saga.decision is not None or record.round != saga.round:
        raise illegal(saga, record)
    if record.decision is _COMMIT:
        if not _all_prepared(saga) or 0 < saga.deadline_at_ms <= record.at_ms:
            raise illegal(saga, record)
        return _replace(saga, decision=_COMMIT, past_no_return=True, updated_at_ms=record.at_ms)
    if record.decision is not _ABORT or record.cause is None:
        raise illegal(saga, record)
    return _replace(
        saga,
        decision=_ABORT,
        phase=Phase.BACKWARD,
        turn=SagaTurnedBack(record.at_ms, record.cause, record.step, record.failure),
        updated_at_ms=record.at_ms,
        steps=tuple(map(_vote_not_awaited, saga.steps)),
    )


def _vote_not_awaited(step: StepState) -> StepState:
    """After ABORT: nobody asks for a vote any more; it may have been cast, or it was not."""
    if step.open or step.status not in (StepStatus.PREPARING, StepStatus.PENDING):
        return step
    return _vote_over(step)


def _vote_over(step: StepState) -> StepState:
    status = StepStatus.UNKNOWN if step.unknown else StepStatus.PENDING
    return _replace(step, status=status, open=False, retry_at_ms=0)


def _evolve_executed(_: Plan, saga: Saga, record: StepExecuted) -> Saga:
    step = step_ending(saga, record)
    step = _replace(
        step,
        status=StepStatus.EXECUTED,
        open=False,
        executed=True,
        # What a vote brought is shown, unless the commit has something to say.
        result=record.result if record.result.data else step.result,
        failure=record.failure or step.failure,
        stuck_since_ms=0,
        mark_at_ms=0,
    )
    saga = _replace(saga, payload_bytes=saga.payload_bytes + len(record.result.data))
    return with_step(saga, record, step)


def _evolve_compensated(_: Plan, saga: Saga, record: StepCompensated) -> Saga:
    step = _replace(
        step_ending(saga, record),
        status=StepStatus.COMPENSATED,
        open=False,
        stuck_since_ms=0,
        mark_at_ms=0,
    )
    return with_step(saga, record, step)


def _evolve_heuristic(_: Plan, saga: Saga, record: HeuristicReported) -> Saga:
    step = step_ending(saga, record)
    committed = record.verb is _EXECUTE
    if record.verb is _PREPARE:
        raise illegal(saga, record)
    if record.committed is committed:
        status = StepStatus.EXECUTED if committed else StepStatus.COMPENSATED
    else:
        status = StepStatus.BROKEN
    step = _replace(
        step,
        status=status,
        open=False,
        executed=bool(record.committed),
        failure=record.failure,
        stuck_since_ms=0,
        mark_at_ms=0,
    )
    return with_step(saga, record, step)


def _evolve_attempt_failed(plan: Plan, saga: Saga, record: AttemptFailed) -> Saga:
    step = step_ending(saga, record)
    timing = record.timing
    wait_ms = max(0, record.retry_at_ms - record.at_ms) if record.retry_at_ms else 0
    since_ms = step.misconfigured_since_ms if step.misconfigured else timing.answered_at_ms
    took = took_ms(plan, record.step, timing, record.failure.reason)
    voting = record.verb is _PREPARE
    if not voting and not record.retry_at_ms:
        raise illegal(saga, record)  # the second phase gives up nothing
    step = _replace(
        step,
        open=False,
        unknown=step.unknown or voting,
        failures=step.failures + (not record.probe),
        spent_ms=step.spent_ms + (0 if record.probe else took + wait_ms),
        retry_at_ms=record.retry_at_ms,
        misconfigured=step.misconfigured + 1 if record.misconfigured else 0,
        misconfigured_since_ms=since_ms,
        failure=record.failure,
    )
    if voting and saga.decision is not None:
        step = _vote_over(step)
    return with_step(saga, record, step)


def _evolve_attempt_over(_: Plan, saga: Saga, record: AttemptLost | AttemptWithdrawn) -> Saga:
    """Lost or never sent: it is due again at once, unless it is a vote that nobody wants now."""
    step = step_ending(saga, record)
    voting = record.verb is _PREPARE
    lost = type(record) is AttemptLost
    step = _replace(
        step, open=False, unknown=step.unknown or (voting and lost), retry_at_ms=record.at_ms
    )
    if voting and saga.decision is not None:
        step = _vote_over(step)
    return with_step(saga, record, step)


def _evolve_given_up(_: Plan, saga: Saga, record: StepGivenUp) -> Saga:
    step = step_without_attempt(saga, record)
    if step.status is not StepStatus.PREPARING:
        raise illegal(saga, record)  # only a vote is given up
    step = _replace(step, status=StepStatus.UNKNOWN, retry_at_ms=0)
    return with_step(saga, record, step)


def _evolve_stuck(_: Plan, saga: Saga, record: StepStuck) -> Saga:
    step = saga.steps[record.step]  # its attempt may be under way
    if step.verb is not record.verb or step.status not in _TOLD or step.stuck_since_ms:
        raise illegal(saga, record)
    step = _replace(step, failure=record.failure, stuck_since_ms=record.at_ms, mark_at_ms=0)
    return with_step(saga, record, step)


_TOLD: Final = frozenset((StepStatus.EXECUTING, StepStatus.COMPENSATING))


def _evolve_cancel_requested(_: Plan, saga: Saga, record: CancelRequested) -> Saga:
    if saga.decision is _COMMIT:
        raise illegal(saga, record)
    return _replace(saga, cancel_requested=True, updated_at_ms=record.at_ms)


def _evolve_operated(plan: Plan, saga: Saga, record: OperatorActed) -> Saga:
    number, steps = record.step, saga.steps
    abandons = record.action is OperatorAction.ABANDON
    if abandons and saga.decision is _COMMIT:
        raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(ABANDON)")
    if record.action is OperatorAction.RETRY and number is not None:
        if not _can_be_retried(steps[number]):
            raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(RETRY)")
        steps = steps_with(saga, number, _step_retried(plan, number, steps[number], record.at_ms))
    return _replace(
        saga,
        steps=steps,
        cancel_requested=saga.cancel_requested or abandons,
        operator_request=record.request_id,
        updated_at_ms=record.at_ms,
    )


def _can_be_retried(step: StepState) -> bool:
    """Whether it waits for its next attempt, or is told the decision."""
    return step.status in _TOLD or (not step.open and step.retry_at_ms > 0)


def _step_retried(plan: Plan, number: int, step: StepState, at_ms: int) -> StepState:
    """A branch with a fresh budget: its attempt is due, if none is under way."""
    mark_at_ms = 0  # its next attempt says it
    if step.open:
        mark_at_ms = at_ms + _phase_2_policy(plan, number, step.verb).give_up_after_ms
    return _replace(
        step,
        failures=0,
        spent_ms=0,
        misconfigured=0,
        retry_at_ms=0 if step.open else at_ms,
        stuck_since_ms=0,
        began_at_ms=at_ms if step.open else 0,
        mark_at_ms=mark_at_ms,
    )


def _evolve_round_planned(plan: Plan, saga: Saga, record: RoundPlanned) -> Saga:
    due = _may_try_again(plan, saga) and not _is_left(saga)
    if not due or record.round != saga.round + 1 or record.starts_at_ms <= 0:
        raise illegal(saga, record)
    steps = tuple(
        StepState(
            verb=_PREPARE,
            failure=step.failure,
            retry_at_ms=0 if plan.waits_for[number] else record.starts_at_ms,
        )
        for number, step in enumerate(saga.steps)
    )
    return _replace(
        saga,
        phase=Phase.FORWARD,
        decision=None,
        turn=None,
        round=record.round,
        steps=steps,
        payload_bytes=len(saga.input.data),  # what the votes brought went with their round
        updated_at_ms=record.at_ms,
    )


def _evolve_ended(_: Plan, saga: Saga, record: SagaEnded) -> Saga:
    if saga.decision is None or _is_left(saga) or record.state is not _end_of(saga):
        raise IllegalRecord(saga.saga_id, saga.state.name, f"SagaEnded({record.state.name})")
    return _replace(
        saga,
        phase=Phase.ENDED,
        end=record.state,
        ended_at_ms=record.at_ms,
        updated_at_ms=record.at_ms,
    )


def _is_left(saga: Saga) -> bool:
    """Whether anything is held, or under way, that an end would leave behind."""
    return any(step.open or is_held(step) for step in saga.steps)


def _end_of(saga: Saga) -> SagaState:
    if any(step.status is StepStatus.BROKEN for step in saga.steps):
        return SagaState.MIXED
    return SagaState.COMPLETED if saga.decision is _COMMIT else SagaState.COMPENSATED


_replace = msgspec.structs.replace

_EVOLVE_RULES: dict[type[Any], Callable[[Plan, Saga, Any], Saga]] = {
    AttemptStarted: _evolve_attempt_started,
    StepPrepared: _evolve_prepared,
    VoteRefused: _evolve_vote_refused,
    DecisionMade: _evolve_decision,
    StepExecuted: _evolve_executed,
    StepCompensated: _evolve_compensated,
    HeuristicReported: _evolve_heuristic,
    AttemptFailed: _evolve_attempt_failed,
    AttemptLost: _evolve_attempt_over,
    AttemptWithdrawn: _evolve_attempt_over,
    StepGivenUp: _evolve_given_up,
    StepStuck: _evolve_stuck,
    CancelRequested: _evolve_cancel_requested,
    OperatorActed: _evolve_operated,
    RoundPlanned: _evolve_round_planned,
    SagaEnded: _evolve_ended,
}
"""What may follow a start; a second start may not."""
