"""The saga: states, rules, `decide()`, `evolve()`, `owed()`.

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

import msgspec

from amends_runtime.core import two_phase
from amends_runtime.core.attempts import (
    IN_PROGRESS,
    MAX_SAGA_PAYLOAD_BYTES,
    MISCONFIGURED_ATTEMPTS,
    MISCONFIGURED_FOR_MS,
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
from amends_runtime.core.definition import Kind, Plan, RetryPolicy
from amends_runtime.core.effects import (
    CallParticipant,
    Effect,
    WakeAt,
    WithdrawCall,
)
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
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    Failure,
    OperatorActed,
    OperatorAction,
    Record,
    SagaEnded,
    SagaStarted,
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
from amends_runtime.core.state import Answer, Decision, Phase, Saga, StepState, StepStatus
from amends_runtime.errors import IllegalMessage, IllegalRecord

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
    "owes_compensation",
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
_REJECTED: Final = StepStatus.REJECTED
_COMPENSATING: Final = StepStatus.COMPENSATING
_STUCK: Final = StepStatus.STUCK
_EXECUTE: Final = Verb.EXECUTE
_COMPENSATE: Final = Verb.COMPENSATE
_COMPENSATABLE: Final = Kind.COMPENSATABLE
_RETRIABLE: Final = Kind.RETRIABLE
_RUNNING: Final = SagaState.RUNNING
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


# -- decide ----------------------------------------------------------------------------------------


def decide(plan: Plan, saga: Saga | None, message: Message, now_ms: int, epoch: int) -> Decision:
    """What a saga does about a message. `saga` is None only before StartSaga.

    Raises IllegalMessage for a message that no correct runtime can send in this state.
    """
    if plan.two_phase is not None:
        return two_phase.decide(plan, saga, message, now_ms, epoch)
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
        effects, saga, before = self.extra, self.saga, self.before
        if self.fresh:
            effects += owed(self.plan, saga)
        elif saga is not before:
            _add_newly_owed(effects, before, saga)
        return Decision(tuple(self.records), saga, tuple(effects), self.answer)


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
    _advance(turn, plan.roots)
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
        anew = step.refused and step.verb is Verb.EXECUTE
        turn.record(_operated(turn, message, OperatorAction.RETRY, number, step.round + anew))
    if not found:
        turn.record(_operated(turn, message, OperatorAction.RETRY))
    turn.answer = Answer.RETRIED
    _advance(turn)


def _on_abandon(turn: _Turn, message: AbandonSaga) -> None:
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
                turn.extra.append(WithdrawCall(number, step.verb, step.round, step.attempt))
        turn.record(_operated(turn, message, OperatorAction.ABANDON))
        turn.record(SagaEnded(turn.now_ms, SagaState.ABANDONED))
        turn.answer = Answer.ABANDONED


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
        return  # an echo, see rule 2
    turn.record(AttemptWithdrawn(turn.now_ms, message.step, step.verb, step.round, step.attempt))
    _advance(turn)


def _on_answered(turn: _Turn, message: Answered) -> None:
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


def _executed(turn: _Turn, message: Answered, outcome: Done | Rejected | Broken | Unknown) -> None:
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
    elif not _retried(turn, message, outcome, policy_of(turn.plan, number)):
        _given_up_forward(turn, number, outcome)
    _advance(turn)


def _given_up_forward(turn: _Turn, number: int, outcome: Unknown) -> None:
    """Retries are used up, and the step may have run."""
    kind = turn.plan.steps[number].kind
    turn.record(StepGivenUp(turn.now_ms, number, turn.saga.steps[number].spent_ms))
    failure = Failure(
        "RETRIES_EXHAUSTED", f"the last error was {outcome.reason}: {outcome.message}"
    )
    if kind in (Kind.PIVOT, Kind.RETRIABLE) or turn.saga.past_no_return:
        turn.record(StepStuck(turn.now_ms, number, Verb.EXECUTE, failure))
    else:
        _turn_back(turn, TurnCause.GAVE_UP, number, failure)


def _compensated(
    turn: _Turn, message: Answered, outcome: Done | Rejected | Broken | Unknown
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
    else:
        policy = turn.plan.steps[number].compensation_retry
        assert policy is not None, "a plan is normalised"
        if not _retried(turn, message, outcome, policy):
            turn.record(StepGivenUp(now_ms, number, turn.saga.steps[number].spent_ms))
            failure = Failure(
                "RETRIES_EXHAUSTED", f"the last error was {outcome.reason}: {outcome.message}"
            )
            turn.record(StepStuck(now_ms, number, Verb.COMPENSATE, failure))
    _advance(turn)


def _retried(turn: _Turn, message: Answered, outcome: Unknown, policy: RetryPolicy) -> bool:
    """Records an attempt of unknown outcome, with its retry if there is one.

    False when the retries are used up. A lasting misconfiguration is stuck, which is no giving up.
    """
    number = message.step
    step = turn.saga.steps[number]
    if message.probe:
        _attempt_failed(turn, message, outcome, retry_at_ms=turn.now_ms)
        return True
    wait_ms = backoff_ms(
        policy, step.failures + 1, turn.saga.saga_id, number, step.verb, step.round, step.attempt
    )
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
    turn: _Turn, message: Answered, outcome: Broken | Unknown, retry_at_ms: int
) -> None:
    misconfigured = isinstance(outcome, Unknown) and outcome.misconfigured
    failure = Failure(outcome.reason, outcome.message)
    turn.record(
        failed(turn.now_ms, message, failure, misconfigured=misconfigured, retry_at_ms=retry_at_ms)
    )


def _in_progress(turn: _Turn, message: Answered, outcome: InProgress) -> Unknown | None:
    """Plans the next poll; or says that the attempt has been in progress for too long."""
    limit_at_ms = message.sent_at_ms + PROGRESS_LIMIT_MS
    if turn.saga.phase is Phase.BACKWARD and message.verb is Verb.EXECUTE:
        limit_at_ms = message.sent_at_ms + turn.plan.steps[message.step].timeout_ms
    if turn.now_ms >= limit_at_ms:
        return Unknown(
            IN_PROGRESS, "the participant is still at it; nothing is known of the outcome"
        )
    turn.extra.append(poll_of(message, outcome, turn.now_ms, limit_at_ms))
    return None


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


# -- going on --------------------------------------------------------------------------------------


def _turn_back(turn: _Turn, cause: TurnCause, step: int | None, failure: Failure) -> None:
    turn.record(SagaTurnedBack(turn.now_ms, cause, step, failure))


def _advance(turn: _Turn, candidates: Sequence[int] | None = None) -> None:
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


def _advance_forward(turn: _Turn, candidates: Sequence[int]) -> None:
    for number in candidates:
        step = turn.saga.steps[number]
        if step.open:
            continue
        if step.status is _PENDING:
            if _may_start(turn, number):
                _start_attempt(turn, number, _EXECUTE)
        elif step.status is _EXECUTING and step.retry_at_ms <= turn.now_ms:
            _start_attempt(turn, number, _EXECUTE)
    if _all_executed(turn.saga):
        turn.record(SagaEnded(turn.now_ms, _COMPLETED))


def _may_start(turn: _Turn, number: int) -> bool:
    steps = turn.saga.steps
    for other in turn.plan.waits_for[number]:  # noqa: SIM110  # `all` takes three times as long
        if steps[other].status is not _EXECUTED:
            return False
    return True


def _advance_backward(turn: _Turn) -> None:
    plan, steps = turn.plan, turn.saga.steps
    unsettled = _unsettled(plan, steps)
    if not unsettled:
        turn.record(SagaEnded(turn.now_ms, SagaState.COMPENSATED))
        return
    for number in reversed(range(len(steps))):
        step = steps[number]
        if step.open or step.status is _STUCK or not unsettled >> number & 1:
            continue
        begun = step.status is _COMPENSATING
        if step.retry_at_ms <= turn.now_ms and (begun or not plan.descendants[number] & unsettled):
            _start_attempt(turn, number, _COMPENSATE)


def _start_attempt(turn: _Turn, number: int, verb: Verb) -> None:
    step = turn.saga.steps[number]
    attempt = step.attempt + 1 if step.verb is verb else 1
    turn.record(AttemptStarted(turn.now_ms, number, verb, step.round or 1, attempt, turn.epoch))


def _all_executed(saga: Saga) -> bool:
    for step in reversed(saga.steps):  # noqa: SIM110  # as above; most often the last one is left
        if step.status is not _EXECUTED:
            return False
    return True


def _unsettled(plan: Plan, steps: tuple[StepState, ...]) -> int:
    """The steps that hold up a saga going backward, as a bit set."""
    unsettled = 0
    for number, step in enumerate(steps):
        if step.open or owes_compensation(plan, number, step):
            unsettled |= 1 << number
    return unsettled


def owes_compensation(plan: Plan, number: int, step: StepState) -> bool:
    """Whether a saga that goes backward has to undo this step, or to learn that it never ran."""
    if plan.steps[number].kind is not _COMPENSATABLE:
        return False
    if step.status is _REJECTED:
        return step.unknown
    return step.status in _MAY_HAVE_RUN


_MAY_HAVE_RUN = frozenset(
    (StepStatus.EXECUTED, StepStatus.UNKNOWN, StepStatus.COMPENSATING, StepStatus.STUCK)
)


def remaining_steps(plan: Plan, saga: Saga) -> list[int]:
    """The steps of an abandoned saga that may have an effect which nobody undoes any more."""
    return [
        number
        for number, step in enumerate(saga.steps)
        if (step.executed or step.unknown)
        and step.status is not StepStatus.COMPENSATED
        and plan.steps[number].kind is not Kind.READ_ONLY
    ]


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


# -- evolve ----------------------------------------------------------------------------------------


def fold(plan: Plan, records: Iterable[Record]) -> Saga | None:
    """The state that a history comes to; None for an empty one."""
    saga: Saga | None = None
    for record in records:
        saga = evolve(plan, saga, record)
    return saga


def evolve(plan: Plan, saga: Saga | None, record: Record) -> Saga:
    """The state after one more record. Raises IllegalRecord for one that cannot follow."""
    if plan.two_phase is not None:
        return two_phase.evolve(plan, saga, record)
    if saga is None:
        if type(record) is not SagaStarted:
            raise IllegalRecord("(none)", "(not started)", type(record).__name__)
        return _evolve_started(plan, record)
    rule = _EVOLVE_RULES.get(type(record))
    if rule is None or saga.phase is _ENDED:
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
        steps=(_NEW_STEP,) * len(plan.steps),
        payload_bytes=len(record.input.data),
    )


_NEW_STEP = StepState()


def _evolve_turned_back(plan: Plan, saga: Saga, record: SagaTurnedBack) -> Saga:
    by_pivot = record.step is not None and record.step == plan.pivot
    if saga.phase is not _FORWARD or (saga.past_no_return and not by_pivot):
        raise illegal(saga, record)
    return _replace(
        saga,
        phase=Phase.BACKWARD,
        turn=record,
        past_no_return=False,
        updated_at_ms=record.at_ms,
        steps=tuple(_step_turned_back(step) for step in saga.steps),
    )


def _step_turned_back(step: StepState) -> StepState:
    """A forward step that will not go on: it may have run, or it has not."""
    if step.open or step.status not in _UNDER_WAY:
        return step
    return _forward_over(step)


_UNDER_WAY = frozenset((StepStatus.EXECUTING, StepStatus.UNKNOWN, StepStatus.STUCK))


def _forward_over(step: StepState) -> StepState:
    """Nobody tries to execute the step any more: it may have run, or it has not."""
    return _replace(
        step,
        status=StepStatus.UNKNOWN if step.unknown else StepStatus.PENDING,
        open=False,
        retry_at_ms=step.running_until_ms,
        stuck_since_ms=0,
    )


def _evolve_cancel_requested(_: Plan, saga: Saga, record: CancelRequested) -> Saga:
    return _replace(saga, cancel_requested=True, updated_at_ms=record.at_ms)


def _evolve_operated(_: Plan, saga: Saga, record: OperatorActed) -> Saga:
    number, steps = record.step, saga.steps
    if record.action is OperatorAction.RETRY and number is not None:
        if not _can_be_retried(steps[number]):
            raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(RETRY)")
        steps = (*steps[:number], _step_retried(steps[number], record), *steps[number + 1 :])
    return _replace(
        saga,
        steps=steps,
        abandoned=record.action is OperatorAction.ABANDON,
        operator_request=record.request_id,
        updated_at_ms=record.at_ms,
    )


def _can_be_retried(step: StepState) -> bool:
    """Whether it is stuck, or waits for its next attempt.

    One whose lost attempt may still be running waits for that, and must.
    """
    if step.status in (StepStatus.EXECUTING, StepStatus.COMPENSATING):
        return not step.open
    return step.status is StepStatus.STUCK


def _step_retried(step: StepState, record: OperatorActed) -> StepState:
    """A step that is tried now: its attempt is due, and its give-up clock starts anew."""
    executing = step.verb is Verb.EXECUTE
    return _replace(
        step,
        status=StepStatus.EXECUTING if executing else StepStatus.COMPENSATING,
        round=record.round,
        attempt=step.attempt if record.round == step.round else 0,
        refused=False,
        failures=0,
        spent_ms=0,
        misconfigured=0,
        retry_at_ms=record.at_ms,
        stuck_since_ms=0,
        began_at_ms=0,
    )


def _evolve_ended(plan: Plan, saga: Saga, record: SagaEnded) -> Saga:
    steps = saga.steps
    if record.state is _COMPLETED:
        due = saga.phase is _FORWARD and _all_executed(saga)
    elif record.state is SagaState.COMPENSATED:
        due = saga.phase is _BACKWARD and not _unsettled(plan, saga.steps)
    elif record.state is SagaState.ABANDONED:
        due = saga.abandoned
        steps = tuple(_step_abandoned(step) for step in steps)
    else:
        due = False
    if not due:
        raise IllegalRecord(saga.saga_id, saga.state.name, f"SagaEnded({record.state.name})")
    return _replace(
        saga,
        phase=_ENDED,
        steps=steps,
        end=record.state,
        ended_at_ms=record.at_ms,
        updated_at_ms=record.at_ms,
    )


def _step_abandoned(step: StepState) -> StepState:
    """A step that nobody looks after any more: what was open may have run, or run still."""
    if step.status is StepStatus.EXECUTING:
        step = _forward_over(_replace(step, unknown=step.unknown or step.open))
    return _replace(step, open=False, retry_at_ms=0)


# -- evolve: what records say of a step ------------------------------------------------------------


def _evolve_attempt_started(plan: Plan, saga: Saga, record: AttemptStarted) -> Saga:
    step = saga.steps[record.step]
    executing = record.verb is _EXECUTE
    goes_on = step.verb is record.verb and step.round == record.round
    if (
        step.open
        or (goes_on and record.attempt <= step.attempt)
        or (executing and saga.phase is _BACKWARD)
    ):
        raise illegal(saga, record)
    if step.verb is not record.verb:
        step = _replace(step, failures=0, spent_ms=0, misconfigured=0)
    step = _replace(
        step,
        status=_EXECUTING if executing else _COMPENSATING,
        verb=record.verb,
        round=record.round,
        attempt=record.attempt,
        open=True,
        retry_at_ms=0,
        began_at_ms=step.began_at_ms if goes_on and step.began_at_ms else record.at_ms,
    )
    if not executing:
        return with_step(saga, record, step)
    return _replace(
        saga,
        steps=steps_with(saga, record.step, step),
        updated_at_ms=record.at_ms,
        past_no_return=saga.past_no_return or _is_no_return(plan, record.step),
    )


def _evolve_step_executed(_: Plan, saga: Saga, record: StepExecuted) -> Saga:
    step = _replace(
        step_ending(saga, record),
        status=_EXECUTED,
        open=False,
        executed=True,
        result=record.result,
        running_until_ms=0,
    )
    return _replace(
        saga,
        steps=steps_with(saga, record.step, step),
        updated_at_ms=record.at_ms,
        payload_bytes=saga.payload_bytes + len(record.result.data),
    )


def _evolve_step_rejected(_: Plan, saga: Saga, record: StepRejected) -> Saga:
    step = _replace(
        step_ending(saga, record),
        status=_REJECTED,
        open=False,
        refused=True,
        failure=record.failure,
        running_until_ms=0,
    )
    return with_step(saga, record, step)


def _evolve_step_compensated(_: Plan, saga: Saga, record: StepCompensated) -> Saga:
    step = _replace(step_ending(saga, record), status=StepStatus.COMPENSATED, open=False)
    return with_step(saga, record, step)


def _evolve_attempt_failed(plan: Plan, saga: Saga, record: AttemptFailed) -> Saga:
    step = step_ending(saga, record)
    executing = record.verb is _EXECUTE
    timing = record.timing
    wait_ms = max(0, record.retry_at_ms - record.at_ms) if record.retry_at_ms else 0
    since_ms = step.misconfigured_since_ms if step.misconfigured else timing.answered_at_ms
    took = took_ms(plan, record.step, timing, record.failure.reason)
    step = _replace(
        step,
        open=False,
        unknown=step.unknown or executing,
        failures=step.failures + (not record.probe),
        spent_ms=step.spent_ms + (0 if record.probe else took + wait_ms),
        retry_at_ms=record.retry_at_ms,
        misconfigured=step.misconfigured + 1 if record.misconfigured else 0,
        misconfigured_since_ms=since_ms,
        failure=record.failure,
    )
    if executing and saga.phase is _BACKWARD:
        step = _forward_over(step)
    return with_step(saga, record, step)


def _evolve_attempt_lost(plan: Plan, saga: Saga, record: AttemptLost) -> Saga:
    step = step_ending(saga, record)
    if record.verb is _COMPENSATE:
        return with_step(saga, record, _replace(step, open=False, retry_at_ms=record.at_ms))
    running_until_ms = step.running_until_ms
    if plan.steps[record.step].kind is _COMPENSATABLE:
        # It was sent before the runtime died, if it was; nobody knows when.
        running_until_ms = record.at_ms + plan.steps[record.step].timeout_ms
    step = _replace(
        step,
        open=False,
        unknown=True,
        retry_at_ms=record.at_ms,
        running_until_ms=running_until_ms,
    )
    if saga.phase is _BACKWARD:
        step = _forward_over(step)
    return with_step(saga, record, step)


def _evolve_attempt_withdrawn(_: Plan, saga: Saga, record: AttemptWithdrawn) -> Saga:
    step = step_ending(saga, record)
    if record.verb is _EXECUTE and saga.phase is _BACKWARD:
        step = _forward_over(step)
    else:
        step = _replace(step, open=False, retry_at_ms=record.at_ms)
    return with_step(saga, record, step)


def _evolve_step_given_up(_: Plan, saga: Saga, record: StepGivenUp) -> Saga:
    step = _replace(step_without_attempt(saga, record), status=StepStatus.UNKNOWN, retry_at_ms=0)
    return with_step(saga, record, step)


def _evolve_step_stuck(_: Plan, saga: Saga, record: StepStuck) -> Saga:
    step = _replace(
        step_without_attempt(saga, record),
        status=_STUCK,
        failure=record.failure,
        retry_at_ms=0,
        stuck_since_ms=record.at_ms,
    )
    return with_step(saga, record, step)


_EVOLVE_RULES: dict[type[Any], Callable[[Plan, Saga, Any], Saga]] = {
    AttemptStarted: _evolve_attempt_started,
    StepExecuted: _evolve_step_executed,
    StepRejected: _evolve_step_rejected,
    StepCompensated: _evolve_step_compensated,
    AttemptFailed: _evolve_attempt_failed,
    AttemptLost: _evolve_attempt_lost,
    AttemptWithdrawn: _evolve_attempt_withdrawn,
    StepGivenUp: _evolve_step_given_up,
    StepStuck: _evolve_step_stuck,
    CancelRequested: _evolve_cancel_requested,
    SagaTurnedBack: _evolve_turned_back,
    SagaEnded: _evolve_ended,
    OperatorActed: _evolve_operated,
}
"""What may follow a start; a second start may not."""


# -- small pure parts ------------------------------------------------------------------------------

_replace = msgspec.structs.replace


def _is_no_return(plan: Plan, number: int) -> bool:
    if plan.pivot is not None:
        return number == plan.pivot
    return plan.steps[number].kind is _RETRIABLE
