"""The first phase: branches are asked for their votes, and one record is the decision.

Rules 1, 2 and 4 of `two_phase`. Everything here takes the turn, and adds to it what follows.
"""

from __future__ import annotations

from amends_runtime.core.attempts import (
    MISCONFIGURED_ATTEMPTS,
    exhausted,
    failed,
    next_wait_ms,
    policy_of,
    timing_of,
    too_large,
)
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import Answered, Broken, Done, Heuristic, Rejected, Unknown
from amends_runtime.core.records import (
    CommitDecision,
    DecisionMade,
    Failure,
    StepGivenUp,
    StepPrepared,
    TurnCause,
    Verb,
    VoteRefused,
)
from amends_runtime.core.state import Saga, StepStatus
from amends_runtime.core.turn import Turn, start_attempt
from amends_runtime.core.two_phase_fold import all_prepared, is_next

__all__ = ["abort", "ask_for_votes", "count_votes", "voted"]


# -- asking ----------------------------------------------------------------------------------------


def ask_for_votes(turn: Turn) -> None:
    """Asks whoever may be asked now: all at once, or the next one in the list."""
    for number, step in enumerate(turn.saga.steps):
        if step.open or step.retry_at_ms > turn.now_ms:
            continue
        if step.status is StepStatus.PREPARING or (
            step.status is StepStatus.PENDING and is_next(turn.plan, turn.saga, number)
        ):
            start_attempt(turn, number, Verb.PREPARE, turn.saga.round)


# -- what a vote comes to --------------------------------------------------------------------------


def voted(
    turn: Turn, message: Answered, outcome: Done | Rejected | Broken | Heuristic | Unknown
) -> None:
    """Takes in what came of a vote. Before the decision a no, whatever kind of no, is ABORT."""
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
            abort(turn, TurnCause.REJECTED, number, failure)
    elif decided or not isinstance(outcome, Unknown):
        turn.record(failed(now_ms, message, failure, retry_at_ms=0))
        if not decided:
            abort(turn, TurnCause.GAVE_UP, number, failure)
    else:
        _vote_unknown(turn, message, outcome)


def _vote_unknown(turn: Turn, message: Answered, outcome: Unknown) -> None:
    """Asks again, or takes it for a no: the retries are used up, or nobody is there at all."""
    number, step = message.step, turn.saga.steps[message.step]
    policy = policy_of(turn.plan, number, Verb.PREPARE)
    wait_ms = next_wait_ms(turn.saga, number, policy)
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
        abort(turn, TurnCause.GAVE_UP, number, failure)


# -- the decision ----------------------------------------------------------------------------------


def count_votes(turn: Turn) -> None:
    """Decides if it is time to: the deadline has passed, or all have voted yes."""
    saga = turn.saga
    if saga.decision is None and 0 < saga.deadline_at_ms <= turn.now_ms:
        abort(turn, TurnCause.DEADLINE, *_vote_missing(turn.plan, saga))
    elif saga.decision is None and all_prepared(saga):
        turn.record(DecisionMade(turn.now_ms, CommitDecision.COMMIT, saga.round))


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


def abort(turn: Turn, cause: TurnCause, step: int | None, failure: Failure) -> None:
    """Decides on ABORT, for what has failed at a `step`, or None of it."""
    turn.record(
        DecisionMade(turn.now_ms, CommitDecision.ABORT, turn.saga.round, cause, step, failure)
    )
