"""The saga's fold: `evolve`, what each record makes of a saga's state.

The rules are those of `saga`, and this is where they are kept: a record that cannot follow is
refused, whoever wrote it. Nothing is decided here. What a state says by itself, and deciding looks
at just as much, stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from amends_runtime.core.attempts import (
    illegal,
    step_ending,
    step_failed,
    step_without_attempt,
    steps_with,
    with_step,
)
from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    OperatorActed,
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
    Verb,
)
from amends_runtime.core.state import Phase, Saga, StepState, StepStatus, begun
from amends_runtime.errors import IllegalRecord

__all__ = ["all_executed", "can_be_retried", "evolve", "owes_compensation", "unsettled_steps"]

_replace = msgspec.structs.replace

_FORWARD: Final = Phase.FORWARD  # bound once: see `saga`
_BACKWARD: Final = Phase.BACKWARD
_ENDED: Final = Phase.ENDED
_EXECUTING: Final = StepStatus.EXECUTING
_EXECUTED: Final = StepStatus.EXECUTED
_REJECTED: Final = StepStatus.REJECTED
_COMPENSATING: Final = StepStatus.COMPENSATING
_STUCK: Final = StepStatus.STUCK
_EXECUTE: Final = Verb.EXECUTE
_COMPENSATE: Final = Verb.COMPENSATE
_COMPENSATABLE: Final = Kind.COMPENSATABLE
_RETRIABLE: Final = Kind.RETRIABLE
_COMPLETED: Final = SagaState.COMPLETED


def evolve(plan: Plan, saga: Saga | None, record: Record) -> Saga:
    """The state of a saga after one more record. Raises IllegalRecord for one that cannot follow.

    `saga` is None only before SagaStarted.
    """
    if saga is None:
        return begun(plan, record, _NEW_STEP)
    rule = _EVOLVE_RULES.get(type(record))
    if rule is None or saga.phase is _ENDED:
        raise illegal(saga, record)
    return rule(plan, saga, record)


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
        if not can_be_retried(steps[number]):
            raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(RETRY)")
        steps = steps_with(saga, number, _step_retried(steps[number], record))
    return _replace(
        saga,
        steps=steps,
        abandoned=record.action is OperatorAction.ABANDON,
        operator_request=record.request_id,
        updated_at_ms=record.at_ms,
    )


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
        due = saga.phase is _FORWARD and all_executed(saga)
    elif record.state is SagaState.COMPENSATED:
        due = saga.phase is _BACKWARD and not unsettled_steps(plan, saga.steps)
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


def _is_no_return(plan: Plan, number: int) -> bool:
    if plan.pivot is not None:
        return number == plan.pivot
    return plan.steps[number].kind is _RETRIABLE


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
    executing = record.verb is _EXECUTE
    step = step_failed(plan, saga, record, unknown=executing)
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


# -- what a state says, for `decide` and `evolve` alike --------------------------------------------


def all_executed(saga: Saga) -> bool:
    """Whether nothing is left to do forward."""
    for step in reversed(saga.steps):  # noqa: SIM110  # as in `saga`; the last one is usually left
        if step.status is not _EXECUTED:
            return False
    return True


def unsettled_steps(plan: Plan, steps: tuple[StepState, ...]) -> int:
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


def can_be_retried(step: StepState) -> bool:
    """Whether it is stuck, or waits for its next attempt.

    One whose lost attempt may still be running waits for that, and must.
    """
    if step.status in (StepStatus.EXECUTING, StepStatus.COMPENSATING):
        return not step.open
    return step.status is StepStatus.STUCK
