"""The fold of a two-phase commit: `evolve`, what each record makes of its state.

The rules are those of `two_phase`, and this is where they are kept: a record that cannot follow is
refused, whoever wrote it. Nothing is decided here. What a state says by itself, and deciding looks
at just as much, stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from amends_runtime.core.attempts import (
    illegal,
    policy_of,
    step_ending,
    step_failed,
    step_without_attempt,
    steps_with,
    with_step,
)
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
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
from amends_runtime.core.state import Phase, Saga, StepState, StepStatus, begun
from amends_runtime.errors import IllegalRecord

__all__ = [
    "LOCKED",
    "all_prepared",
    "can_be_retried",
    "end_of",
    "evolve",
    "is_held",
    "is_left",
    "is_next",
    "may_have_gone_on",
    "may_try_again",
]

LOCKED: Final = "LOCKED"
"""The reason of a vote whose participant would have had to wait for a lock."""

_replace = msgspec.structs.replace

_PREPARE: Final = Verb.PREPARE  # bound once: see `saga`
_EXECUTE: Final = Verb.EXECUTE
_COMPENSATE: Final = Verb.COMPENSATE
_COMMIT: Final = CommitDecision.COMMIT
_ABORT: Final = CommitDecision.ABORT


def evolve(plan: Plan, saga: Saga | None, record: Record) -> Saga:
    """The state of a two-phase commit after one more record.

    `saga` is None only before SagaStarted. Raises IllegalRecord for a record that cannot follow.
    """
    if saga is None:
        return begun(plan, record, _NEW_BRANCH, round_=1)
    rule = _EVOLVE_RULES.get(type(record))
    if rule is None or saga.ended:
        raise illegal(saga, record)
    return rule(plan, saga, record)


_NEW_BRANCH: Final = StepState(verb=_PREPARE)


def _evolve_attempt_started(plan: Plan, saga: Saga, record: AttemptStarted) -> Saga:
    step = saga.steps[record.step]
    goes_on = step.verb is record.verb and step.round == record.round
    if step.open or record.round != saga.round or (goes_on and record.attempt <= step.attempt):
        raise illegal(saga, record)
    if record.verb is not _VERB_AFTER[saga.decision]:
        raise illegal(saga, record)  # nobody is told what was not decided
    if record.verb is _PREPARE:
        due = step.status in _ASKABLE and is_next(plan, saga, record.step)
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
    budget_ms = policy_of(plan, record.step, record.verb).give_up_after_ms
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
        if not all_prepared(saga) or 0 < saga.deadline_at_ms <= record.at_ms:
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
    voting = record.verb is _PREPARE
    if not voting and not record.retry_at_ms:
        raise illegal(saga, record)  # the second phase gives up nothing
    step = step_failed(plan, saga, record, unknown=voting)
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
    if record.action is OperatorAction.CONFIRM_RESTORE:
        return _evolve_restore_confirmed(saga, record)
    number, steps = record.step, saga.steps
    abandons = record.action is OperatorAction.ABANDON
    if abandons and saga.decision is _COMMIT:
        raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(ABANDON)")
    if record.action is OperatorAction.RETRY and number is not None:
        if not can_be_retried(steps[number]):
            raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(RETRY)")
        steps = steps_with(saga, number, _step_retried(plan, number, steps[number], record.at_ms))
    return _replace(
        saga,
        steps=steps,
        cancel_requested=saga.cancel_requested or abandons,
        operator_request=record.request_id,
        updated_at_ms=record.at_ms,
    )


def _evolve_restore_confirmed(saga: Saga, record: OperatorActed) -> Saga:
    """Any branch that this history has not asked may have voted all the same; see rule 11."""
    if saga.history_lost:
        raise IllegalRecord(saga.saga_id, saga.state.name, "OperatorActed(CONFIRM_RESTORE)")
    steps = tuple(
        _replace(step, unknown=True) if step.status in _ASKABLE else step for step in saga.steps
    )
    if saga.decision is _ABORT:
        steps = tuple(map(_vote_not_awaited, steps))
    return _replace(saga, history_lost=True, steps=steps, updated_at_ms=record.at_ms)


def _step_retried(plan: Plan, number: int, step: StepState, at_ms: int) -> StepState:
    """A branch with a fresh budget: its attempt is due, if none is under way."""
    mark_at_ms = 0  # its next attempt says it
    if step.open:
        mark_at_ms = at_ms + policy_of(plan, number, step.verb).give_up_after_ms
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
    follows = may_try_again(plan, saga) or may_have_gone_on(plan, saga)
    due = follows and not any(map(is_left, saga.steps))
    if not due or record.round != saga.round + 1 or record.starts_at_ms <= 0:
        raise illegal(saga, record)
    steps = tuple(
        StepState(
            verb=_PREPARE,
            unknown=saga.history_lost,
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
    left = any(map(is_left, saga.steps))
    if saga.decision is None or left or record.state is not end_of(saga):
        raise IllegalRecord(saga.saga_id, saga.state.name, f"SagaEnded({record.state.name})")
    return _replace(
        saga,
        phase=Phase.ENDED,
        end=record.state,
        ended_at_ms=record.at_ms,
        updated_at_ms=record.at_ms,
    )


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


# -- what a state says, for `decide` and `evolve` alike --------------------------------------------


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


def is_left(step: StepState) -> bool:
    """Whether anything of this branch is held, or under way, that an end would leave behind."""
    return step.open or is_held(step)


def all_prepared(saga: Saga) -> bool:
    """Whether all have voted yes, in this round; see rule 2."""
    return all(step.status is StepStatus.PREPARED for step in saga.steps)


def is_next(plan: Plan, saga: Saga, number: int) -> bool:
    """Whether all those before it have voted yes; see rule 1."""
    return all(saga.steps[n].status is StepStatus.PREPARED for n in plan.waits_for[number])


def can_be_retried(step: StepState) -> bool:
    """Whether it waits for its next attempt, or is told the decision."""
    return step.status in _TOLD or (not step.open and step.retry_at_ms > 0)


def end_of(saga: Saga) -> SagaState:
    """How it ends, when nothing of it is left; see rule 10."""
    if any(step.status is StepStatus.BROKEN for step in saga.steps):
        return SagaState.MIXED
    return SagaState.COMPLETED if saga.decision is _COMMIT else SagaState.COMPENSATED


def may_try_again(plan: Plan, saga: Saga) -> bool:
    """Whether another round may follow what is aborted and has not ended; see rule 7."""
    assert plan.two_phase is not None, "two-phase commit"
    return (
        saga.round <= plan.two_phase.locked_retries
        and not saga.ended
        and not saga.cancel_requested
        and saga.turn is not None
        and saga.turn.cause is TurnCause.REJECTED
        and any(step.refused for step in saga.steps)  # not that of the round before, see rule 11
        and all(step.locked for step in saga.steps if step.refused)
        and all(step.status is not StepStatus.BROKEN for step in saga.steps)
    )


def may_have_gone_on(plan: Plan, saga: Saga) -> bool:
    """Whether lost history may have followed what is aborted here by another round; see rule 11."""
    assert plan.two_phase is not None, "two-phase commit"
    return (
        saga.history_lost
        and saga.decision is _ABORT
        and not saga.ended
        and saga.round <= plan.two_phase.locked_retries
        and all(step.status is not StepStatus.BROKEN for step in saga.steps)
    )
