"""The saga: states, rules, `decide()`, `owed()`; its `evolve()` stands in `saga_fold`.

How to think about it. A saga is a fold over its history: `evolve` adds one record to a state, and
the state after all records is the saga. `decide` looks at a state and one message and answers with
the records that follow, the state after them, and the effects that are owed from then on. `owed`
says what a state owes the world: calls, withdrawals, wake-ups. Nothing here waits, and nothing here
remembers anything else.

A step's life in one round:

    forward     PENDING -> EXECUTING -> EXECUTED | REJECTED | UNKNOWN | STUCK
    backward    EXECUTED | UNKNOWN | REJECTED-but-earlier-unknown
                    -> COMPENSATING -> COMPENSATED | STUCK

The rules:

1. An attempt exists only by `AttemptStarted`, and its call is an effect of that record: no record,
   no call. A step has at most one attempt open at a time.
2. Only an answer to the open attempt counts. Anything else is an echo of an attempt that was lost
   or replaced: the next one, under the same key, hears the same from the participant's barrier.
3. Forward: a step starts when all that it waits for are EXECUTED. When all are, the saga is
   COMPLETED.
4. Rejected is definite. Before the point of no return, and of the pivot itself, it turns the saga
   back; after it nothing can be undone, so the step is STUCK.
5. Everything that is no typed outcome is unknown. Unknown is retried under the same key; given up,
   the step counts as one that may have run, and a compensatable one is compensated like one that
   did. Once unknown, a step stays "may have run" for the round, even if a later one is Rejected.
6. The point of no return is the pivot's first attempt, or without a pivot a retriable step's first.
   From there nothing turns the saga back but the pivot's own Rejected.
7. Backward: no forward attempt starts. A step is compensated when nothing that came after it is
   open or still owes a compensation: reverse dependency order, branch by branch, so that a stuck
   branch holds up only what lies under it. Pivot, retriable and read-only steps owe none.
   An attempt that was lost may still be running at the participant: its step is not compensated
   before its time is over, unless a later attempt has had a definite answer.
8. Nothing is silent: a saga that has not ended has an open attempt, a wake-up, or a stuck step.
9. InProgress is no record. The same attempt is polled; after `PROGRESS_LIMIT_MS`, or backward
   once the attempt's own deadline has passed, it counts as unknown.
10. The give-up clock is the sum of what the records say: time on the wire, at most an attempt's
    time-out each, and the waits between attempts. A lost attempt adds nothing to it and never gives
    up by itself. Nor does a probe of an open breaker that finds nobody there: its lane paces it,
    and a participant that is down is waited for, however long.
11. Terminal stays terminal.
12. An operator's retry gives a step that is stuck, or waits, a fresh give-up clock: under the same
    key, or, where a refusal ended its round, under the next round's. A compensation stays in the
    round that it undoes. A stuck saga can be abandoned, and any other one by force: what is open is
    withdrawn or left to itself, and nobody undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from amends_runtime.core import two_phase
from amends_runtime.core.attempts import (
    MAX_SAGA_PAYLOAD_BYTES,
    MISCONFIGURED_ATTEMPTS,
    MISCONFIGURED_FOR_MS,
    PROGRESS_LIMIT_MS,
    exhausted,
    failed,
    is_misconfigured,
    is_open,
    next_wait_ms,
    policy_of,
    rejected_compensation,
    step_of,
    timing_of,
    too_large,
)
from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.effects import CallParticipant, Effect, WakeAt, WithdrawCall
from amends_runtime.core.messages import (
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
from amends_runtime.core.records import (
    AttemptWithdrawn,
    CancelRequested,
    Failure,
    OperatorAction,
    Record,
    SagaEnded,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepRejected,
    StepStuck,
    TurnCause,
    Verb,
)
from amends_runtime.core.saga_fold import all_executed, can_be_retried, unsettled_steps
from amends_runtime.core.saga_fold import evolve as evolve_saga
from amends_runtime.core.state import Answer, Decision, Phase, Saga, StepState, StepStatus
from amends_runtime.core.turn import (
    Evolve,
    Turn,
    begin,
    lose_attempts,
    on_start,
    operated,
    poll_until,
    start_attempt,
    steps_to_retry,
    take_up,
)
from amends_runtime.core.two_phase_fold import evolve as evolve_two_phase
from amends_runtime.errors import IllegalMessage

__all__ = [
    "MAX_SAGA_PAYLOAD_BYTES",
    "MISCONFIGURED_ATTEMPTS",
    "MISCONFIGURED_FOR_MS",
    "PROGRESS_LIMIT_MS",
    "TRANSITIONS",
    "Answer",
    "Decision",
    "Phase",
    "Saga",
    "StepState",
    "StepStatus",
    "decide",
    "evolve",
    "fold",
    "owed",
    "remaining_steps",
]


# Reading a member of an enumeration costs CPython 3.11 a fifth of what `evolve` costs for a record,
# and a turn reads dozens: those that usual turns read are bound here once.
_FORWARD: Final = Phase.FORWARD
_BACKWARD: Final = Phase.BACKWARD
_ENDED: Final = Phase.ENDED
_PENDING: Final = StepStatus.PENDING
_EXECUTING: Final = StepStatus.EXECUTING
_EXECUTED: Final = StepStatus.EXECUTED
_COMPENSATING: Final = StepStatus.COMPENSATING
_STUCK: Final = StepStatus.STUCK
_EXECUTE: Final = Verb.EXECUTE
_COMPENSATE: Final = Verb.COMPENSATE
_COMPLETED: Final = SagaState.COMPLETED


# The state machine as a table: what may follow what. `evolve` refuses any other turn or end, and
# the diagram in the README is drawn from it.
TRANSITIONS: dict[SagaState, tuple[SagaState, ...]] = {
    SagaState.RUNNING: (
        SagaState.COMPLETED,
        SagaState.COMPENSATING,
        SagaState.STUCK,
        SagaState.ABANDONED,
    ),
    SagaState.COMPENSATING: (SagaState.COMPENSATED, SagaState.STUCK, SagaState.ABANDONED),
    SagaState.STUCK: (SagaState.RUNNING, SagaState.COMPENSATING, SagaState.ABANDONED),
    SagaState.COMPLETED: (),
    SagaState.COMPENSATED: (),
    SagaState.ABANDONED: (),
}


# -- what operators ask ----------------------------------------------------------------------------


def remaining_steps(plan: Plan, saga: Saga) -> list[int]:
    """The steps of an abandoned saga that may have an effect which nobody undoes any more."""
    return [
        number
        for number, step in enumerate(saga.steps)
        if (step.executed or step.unknown)
        and step.status is not StepStatus.COMPENSATED
        and plan.steps[number].kind is not Kind.READ_ONLY
    ]


# -- decide ----------------------------------------------------------------------------------------


def decide(plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int) -> Decision:
    """What a saga does about a message. `saga` is None only before StartSaga.

    Raises IllegalMessage for a message that no correct runtime can send in this state.
    """
    if plan.two_phase is not None:
        return two_phase.decide(plan, saga, message, now_ms, epoch)
    if saga is None:
        turn = begin(plan, message, now_ms, epoch, evolve_saga)
        _advance(turn, plan.roots)
    else:
        turn = Turn(plan, saga, saga, now_ms, epoch, evolve_saga)
        rule: Callable[[Turn, Any], None] | None = _RULES.get(type(message))
        if rule is None:
            raise IllegalMessage(saga.saga_id, saga.state.name, type(message).__name__)
        rule(turn, message)
    return _decision(turn)


def _decision(turn: Turn) -> Decision:
    """The effects are what is owed now and was not before; everything, where all was lost."""
    effects, saga = turn.effects, turn.saga
    if turn.fresh:
        effects += owed(turn.plan, saga)
    elif saga is not turn.before:
        _add_newly_owed(effects, turn.before, saga)
    return Decision(tuple(turn.records), saga, tuple(effects), turn.answer)


def _add_newly_owed(effects: list[Effect], before: Saga, saga: Saga) -> None:
    turned = before.phase is not saga.phase  # which can change what any step owes
    steps_before = before.steps
    for number, step in enumerate(saga.steps):
        was = steps_before[number]
        if (step is was and not turned) or not (step.open or step.retry_at_ms):
            continue
        now_owed = _owed_by_step(saga, number, step)
        owed_before = _owed_by_step(before, number, was)
        if not owed_before:  # as nearly always, and a comprehension costs as much as all above
            effects += now_owed
        else:
            effects += [effect for effect in now_owed if effect not in owed_before]


def _on_wake(turn: Turn, message: Wake) -> None:
    turn.now_ms = max(turn.now_ms, message.due_at_ms)
    _advance(turn)


def _on_restart(turn: Turn, _: RuntimeRestarted) -> None:
    lose_attempts(turn)
    _advance(turn)


def _on_revived(turn: Turn, message: Revived) -> None:
    take_up(turn, message, owed)
    _advance(turn)


def _on_cancel(turn: Turn, message: CancelSaga) -> None:
    saga = turn.saga
    if saga.end is SagaState.ABANDONED:
        turn.answer = Answer.ENDED
    elif saga.phase is Phase.BACKWARD or saga.end is SagaState.COMPENSATED:
        turn.answer = Answer.ALREADY_TURNED_BACK
    elif saga.phase is Phase.ENDED:
        turn.answer = Answer.COMPLETED
    elif not saga.past_no_return:
        turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
        _turn_back(turn, TurnCause.CANCELLED, None, Failure("CANCELLED", message.reason))
        turn.answer = Answer.TURNED_BACK
        _advance(turn)
    elif turn.plan.pivot is not None and saga.steps[turn.plan.pivot].status in _PIVOT_OPEN:
        if not saga.cancel_requested:
            turn.record(CancelRequested(turn.now_ms, message.author, message.reason))
        turn.answer = Answer.WAITS_FOR_PIVOT
    else:
        turn.answer = Answer.PAST_NO_RETURN


_PIVOT_OPEN = (StepStatus.EXECUTING, StepStatus.STUCK)


def _on_retry(turn: Turn, message: RetrySaga) -> None:
    found = steps_to_retry(turn, message, can_be_retried)
    if found is None:
        return
    for number in found:
        step = turn.saga.steps[number]
        anew = step.refused and step.verb is Verb.EXECUTE
        turn.record(operated(turn, message, OperatorAction.RETRY, number, step.round + anew))
    _advance(turn)


def _on_abandon(turn: Turn, message: AbandonSaga) -> None:
    saga = turn.saga
    if saga.end is SagaState.ABANDONED:
        turn.answer = Answer.ALREADY_ABANDONED
    elif saga.ended:
        turn.answer = Answer.ENDED
    elif saga.state is not SagaState.STUCK and not message.force:
        turn.answer = Answer.NOT_STUCK
    else:
        for number, step in enumerate(saga.steps):
            if step.open:
                turn.effects.append(WithdrawCall(number, step.verb, step.round, step.attempt))
        turn.record(operated(turn, message, OperatorAction.ABANDON))
        turn.record(SagaEnded(turn.now_ms, SagaState.ABANDONED))
        turn.answer = Answer.ABANDONED


def _on_not_sent(turn: Turn, message: NotSent) -> None:
    step = step_of(turn.saga, message)
    if not is_open(step, message):
        return  # an echo, see rule 2
    turn.record(AttemptWithdrawn(turn.now_ms, message.step, step.verb, step.round, step.attempt))
    _advance(turn)


def _on_answered(turn: Turn, message: Answered) -> None:
    step = step_of(turn.saga, message)
    if not is_open(step, message):
        return  # an echo, see rule 2
    outcome = message.outcome
    # Done is told from the others first: it comes most often, and costs a third of them to tell.
    if isinstance(outcome, Done):
        pass
    elif isinstance(outcome, InProgress):
        given_up = _in_progress(turn, message, outcome)
        if given_up is None:
            return
        outcome = given_up
    elif isinstance(outcome, Heuristic):
        outcome = _heuristic_in_saga(outcome)
    if step.verb is _EXECUTE:
        _executed(turn, message, outcome)
    elif step.verb is _COMPENSATE:
        _compensated(turn, message, outcome)
    else:
        raise IllegalMessage(
            turn.saga.saga_id, turn.saga.state.name, f"Answered to {step.verb.name}"
        )


def _heuristic_in_saga(outcome: Heuristic) -> Unknown:
    return Unknown(
        "HEURISTIC_IN_SAGA_MODE",
        "the participant answered Heuristic, which has a meaning only in two-phase commit;"
        f" its reason was {outcome.reason}",
        misconfigured=True,
    )


def _executed(turn: Turn, message: Answered, outcome: Done | Rejected | Broken | Unknown) -> None:
    number, now_ms, timing = message.step, turn.now_ms, timing_of(message)
    if isinstance(outcome, Done):
        oversize = too_large(turn.saga, outcome.result)
        if oversize is None:
            turn.record(
                StepExecuted(now_ms, number, message.round, message.attempt, timing, outcome.result)
            )
            _advance(turn, turn.plan.dependents[number])
            return
        outcome = oversize
    if isinstance(outcome, Rejected):
        failure = Failure(outcome.reason, outcome.message)
        turn.record(StepRejected(now_ms, number, message.round, message.attempt, timing, failure))
        if turn.saga.phase is Phase.FORWARD:
            if not turn.saga.past_no_return or number == turn.plan.pivot:
                _turn_back(turn, TurnCause.REJECTED, number, failure)
            else:
                turn.record(StepStuck(now_ms, number, Verb.EXECUTE, failure))
    elif turn.saga.phase is Phase.BACKWARD:
        # Whatever it was, it may have run; the compensation that follows settles it.
        _attempt_failed(turn, message, outcome, retry_at_ms=0)
    elif isinstance(outcome, Broken):
        _attempt_failed(turn, message, outcome, retry_at_ms=0)
        turn.record(
            StepStuck(now_ms, number, Verb.EXECUTE, Failure(outcome.reason, outcome.message))
        )
    elif not _retried(turn, message, outcome):
        _given_up_forward(turn, number, outcome)
    _advance(turn)


def _given_up_forward(turn: Turn, number: int, outcome: Unknown) -> None:
    """Retries are used up, and the step may have run."""
    kind = turn.plan.steps[number].kind
    turn.record(StepGivenUp(turn.now_ms, number, turn.saga.steps[number].spent_ms))
    failure = _retries_exhausted(outcome)
    if kind in (Kind.PIVOT, Kind.RETRIABLE) or turn.saga.past_no_return:
        turn.record(StepStuck(turn.now_ms, number, Verb.EXECUTE, failure))
    else:
        _turn_back(turn, TurnCause.GAVE_UP, number, failure)


def _compensated(
    turn: Turn, message: Answered, outcome: Done | Rejected | Broken | Unknown
) -> None:
    number, now_ms = message.step, turn.now_ms
    if isinstance(outcome, Rejected):
        outcome = rejected_compensation(outcome)
    if isinstance(outcome, Done):
        turn.record(
            StepCompensated(now_ms, number, message.round, message.attempt, timing_of(message))
        )
    elif isinstance(outcome, Broken):
        _attempt_failed(turn, message, outcome, retry_at_ms=0)
        failure = Failure(outcome.reason, outcome.message)
        turn.record(StepStuck(now_ms, number, Verb.COMPENSATE, failure))
    elif not _retried(turn, message, outcome):
        turn.record(StepGivenUp(now_ms, number, turn.saga.steps[number].spent_ms))
        turn.record(StepStuck(now_ms, number, Verb.COMPENSATE, _retries_exhausted(outcome)))
    _advance(turn)


def _retries_exhausted(outcome: Unknown) -> Failure:
    last = f"the last error was {outcome.reason}: {outcome.message}"
    return Failure("RETRIES_EXHAUSTED", last)


def _retried(turn: Turn, message: Answered, outcome: Unknown) -> bool:
    """Records an attempt of unknown outcome, with its retry if there is one.

    False when the retries are used up. A lasting misconfiguration is stuck, which is no giving up.
    """
    number = message.step
    step = turn.saga.steps[number]
    if message.probe:
        _attempt_failed(turn, message, outcome, retry_at_ms=turn.now_ms)
        return True
    policy = policy_of(turn.plan, number, message.verb)
    wait_ms = next_wait_ms(turn.saga, number, policy)
    misconfigured = is_misconfigured(step, message, outcome)
    used_up = exhausted(
        turn.plan, step, message, outcome, wait_ms=wait_ms, budget_ms=policy.give_up_after_ms
    )
    last = misconfigured or used_up
    _attempt_failed(turn, message, outcome, retry_at_ms=0 if last else turn.now_ms + wait_ms)
    if misconfigured:
        turn.record(
            StepStuck(turn.now_ms, number, step.verb, Failure(outcome.reason, outcome.message))
        )
        return True
    return not used_up


def _attempt_failed(
    turn: Turn, message: Answered, outcome: Broken | Unknown, retry_at_ms: int
) -> None:
    misconfigured = isinstance(outcome, Unknown) and outcome.misconfigured
    failure = Failure(outcome.reason, outcome.message)
    turn.record(
        failed(turn.now_ms, message, failure, misconfigured=misconfigured, retry_at_ms=retry_at_ms)
    )


def _in_progress(turn: Turn, message: Answered, outcome: InProgress) -> Unknown | None:
    """Plans the next poll; or says that the attempt has been in progress for too long."""
    limit_ms = PROGRESS_LIMIT_MS
    if turn.saga.phase is Phase.BACKWARD and message.verb is Verb.EXECUTE:
        limit_ms = turn.plan.steps[message.step].timeout_ms
    return poll_until(turn, message, outcome, message.sent_at_ms + limit_ms)


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


def _turn_back(turn: Turn, cause: TurnCause, step: int | None, failure: Failure) -> None:
    turn.record(SagaTurnedBack(turn.now_ms, cause, step, failure))


def _advance(turn: Turn, candidates: Sequence[int] | None = None) -> None:
    """Starts whatever may start now, and ends the saga when nothing is left.

    `candidates` are the only steps that can have become startable, where the caller knows.
    """
    saga = turn.saga
    if (
        saga.phase is _FORWARD
        and 0 < saga.deadline_at_ms <= turn.now_ms
        and not saga.past_no_return
    ):
        message = "the saga's deadline has passed"
        _turn_back(turn, TurnCause.DEADLINE, None, Failure("DEADLINE", message))
    if turn.saga.phase is _FORWARD:
        _advance_forward(turn, range(len(saga.steps)) if candidates is None else candidates)
    elif turn.saga.phase is _BACKWARD:
        _advance_backward(turn)


def _advance_forward(turn: Turn, candidates: Sequence[int]) -> None:
    for number in candidates:
        step = turn.saga.steps[number]
        if step.open:
            continue
        if step.status is _PENDING:
            if _may_start(turn, number):
                start_attempt(turn, number, _EXECUTE, step.round or 1)
        elif step.status is _EXECUTING and step.retry_at_ms <= turn.now_ms:
            start_attempt(turn, number, _EXECUTE, step.round or 1)
    if all_executed(turn.saga):
        turn.record(SagaEnded(turn.now_ms, _COMPLETED))


def _may_start(turn: Turn, number: int) -> bool:
    steps = turn.saga.steps
    for other in turn.plan.waits_for[number]:  # noqa: SIM110  # `all` takes three times as long
        if steps[other].status is not _EXECUTED:
            return False
    return True


def _advance_backward(turn: Turn) -> None:
    plan, steps = turn.plan, turn.saga.steps
    unsettled = unsettled_steps(plan, steps)
    if not unsettled:
        turn.record(SagaEnded(turn.now_ms, SagaState.COMPENSATED))
        return
    for number in reversed(range(len(steps))):
        step = steps[number]
        if step.open or step.status is _STUCK or not unsettled >> number & 1:
            continue
        begun = step.status is _COMPENSATING
        if step.retry_at_ms <= turn.now_ms and (begun or not plan.descendants[number] & unsettled):
            start_attempt(turn, number, _COMPENSATE, step.round or 1)


# -- owed ------------------------------------------------------------------------------------------


def owed(plan: Plan, saga: Saga) -> list[Effect]:
    """Everything that this state owes the world, in the order of the steps."""
    if plan.two_phase is not None:
        return two_phase.owed(plan, saga)
    effects: list[Effect] = []
    for number, step in enumerate(saga.steps):
        effects += _owed_by_step(saga, number, step)
    if saga.deadline_at_ms and saga.phase is _FORWARD and not saga.past_no_return:
        effects.append(WakeAt(saga.deadline_at_ms))
    return effects


def _owed_by_step(saga: Saga, number: int, step: StepState) -> tuple[Effect, ...]:
    if step.open:
        call = CallParticipant(number, step.verb, step.round, step.attempt)
        if step.verb is _EXECUTE and saga.phase is _BACKWARD:
            return (call, WithdrawCall(number, step.verb, step.round, step.attempt))
        return (call,)
    if step.retry_at_ms and saga.phase is not _ENDED:
        return (WakeAt(step.retry_at_ms),)
    return ()


# -- the door to both modes ------------------------------------------------------------------------


def evolve(plan: Plan, saga: Saga | None, record: Record) -> Saga:
    """The state after one more record. Raises IllegalRecord for one that cannot follow."""
    return _evolve_of(plan)(plan, saga, record)


def fold(plan: Plan, records: Iterable[Record]) -> Saga | None:
    """The state that a history comes to; None for an empty one."""
    evolve_by_mode = _evolve_of(plan)
    saga: Saga | None = None
    for record in records:
        saga = evolve_by_mode(plan, saga, record)
    return saga


def _evolve_of(plan: Plan) -> Evolve:
    return evolve_saga if plan.two_phase is None else evolve_two_phase
