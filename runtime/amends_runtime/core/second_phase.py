"""The second phase: branches are told the decision until each has acknowledged it.

Rules 3, 5, 6, 7, 10 and 11 of `two_phase`. Everything here takes the turn, and adds to it what
follows.
"""

from __future__ import annotations

from typing import Final

from amends_runtime.core.attempts import (
    failed,
    is_misconfigured,
    next_wait_ms,
    policy_of,
    rejected_compensation,
    timing_of,
    too_large,
)
from amends_runtime.core.backoff import backoff_ms
from amends_runtime.core.messages import Answered, Broken, Done, Heuristic, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    CommitDecision,
    DecisionMade,
    Failure,
    HeuristicReported,
    RoundPlanned,
    SagaEnded,
    StepCompensated,
    StepExecuted,
    StepStuck,
    Verb,
)
from amends_runtime.core.state import StepState
from amends_runtime.core.turn import Turn, start_attempt
from amends_runtime.core.two_phase_fold import (
    end_of,
    is_left,
    may_have_gone_on,
    may_try_again,
)

__all__ = ["acknowledged", "tell_decision"]

UNACKNOWLEDGED: Final = "UNACKNOWLEDGED"
"""The reason of a mark on a branch of which no failure is known: it has not answered."""

_EXECUTE: Final = Verb.EXECUTE  # bound once: see `saga`
_COMPENSATE: Final = Verb.COMPENSATE


# -- telling ---------------------------------------------------------------------------------------


def tell_decision(turn: Turn) -> None:
    """Tells whoever holds anything and waits for no later instant; ends it if nobody does.

    Only after the decision.
    """
    verb = _EXECUTE if turn.saga.decision is CommitDecision.COMMIT else _COMPENSATE
    if not turn.fresh:  # what passed while no runtime was there, is told once more first
        _mark_overdue(turn, verb)
    left = False
    for number, step in enumerate(turn.saga.steps):
        if is_left(step):
            left = True
            if _is_due(turn, number, step):
                start_attempt(turn, number, verb, turn.saga.round)
    if not left:
        _finish(turn)


def _is_due(turn: Turn, number: int, step: StepState) -> bool:
    if step.open or step.retry_at_ms > turn.now_ms:
        return False
    if not turn.saga.history_lost:
        return True
    # One that this history never asked is handed the votes before it, too, and always the same.
    used = (turn.saga.steps[each] for each in turn.plan.uses[number])
    return not any(each.open and each.verb is Verb.PREPARE for each in used)


def _mark_overdue(turn: Turn, verb: Verb) -> None:
    """Marks what has been told for as long as its budget, under way or not; see rule 5."""
    for number, step in enumerate(turn.saga.steps):
        if 0 < step.mark_at_ms <= turn.now_ms:
            failure = step.failure if step.failures or step.prepared_at_ms else None
            if failure is None:
                what = "commit" if verb is _EXECUTE else "roll back"
                budget_s = policy_of(turn.plan, number, verb).give_up_after_ms / 1000
                message = f"told to {what} for {budget_s:g} s, and nothing is known of it"
                failure = Failure(UNACKNOWLEDGED, message)
            turn.record(StepStuck(turn.now_ms, number, verb, failure))


# -- what an acknowledgement comes to --------------------------------------------------------------


def acknowledged(
    turn: Turn, message: Answered, outcome: Done | Rejected | Broken | Heuristic | Unknown
) -> None:
    """Takes in what a branch says to the decision: it is done, to be told again, or broken."""
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


def _committed(turn: Turn, message: Answered, outcome: Done) -> StepExecuted:
    """It is committed, whatever it says of it: what is too large is left out, and that is said."""
    failure = outcome.left_out
    oversize = too_large(turn.saga, outcome.result)
    if oversize is not None:
        failure = Failure(oversize.reason, oversize.message)
    attempt = (message.step, message.round, message.attempt, timing_of(message))
    return StepExecuted(turn.now_ms, *attempt, Payload() if failure else outcome.result, failure)


def _repeat(turn: Turn, message: Answered, outcome: Unknown) -> None:
    """Tells the branch again, for as long as it takes; see rule 5."""
    number, step = message.step, turn.saga.steps[message.step]
    failure = Failure(outcome.reason, outcome.message)
    wait_ms = 0  # of a probe: its lane paces it
    if not message.probe:
        policy = policy_of(turn.plan, number, message.verb)
        wait_ms = next_wait_ms(turn.saga, number, policy)
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


# -- when nothing is left --------------------------------------------------------------------------


def _finish(turn: Turn) -> None:
    saga = turn.saga
    if may_try_again(turn.plan, saga):
        starts_at_ms = turn.now_ms + _wait_for_round_ms(turn)
        if not 0 < saga.deadline_at_ms <= starts_at_ms:
            turn.record(RoundPlanned(turn.now_ms, saga.round + 1, starts_at_ms))
            return
    if may_have_gone_on(turn.plan, saga):
        _abort_next_round(turn)
    else:
        turn.record(SagaEnded(turn.now_ms, end_of(saga)))


def _abort_next_round(turn: Turn) -> None:
    """Fences a round that lost history may have had, for the reason of the one before."""
    made, round_ = turn.saga.turn, turn.saga.round + 1
    assert made is not None, "aborted"
    turn.record(RoundPlanned(turn.now_ms, round_, turn.now_ms))
    why = (made.cause, made.step, made.failure)
    turn.record(DecisionMade(turn.now_ms, CommitDecision.ABORT, round_, *why))
    tell_decision(turn)


def _wait_for_round_ms(turn: Turn) -> int:
    saga = turn.saga
    assert saga.turn is not None, "aborted"
    number = saga.turn.step
    assert number is not None, "by a refusal"
    key = (saga.saga_id, number, Verb.PREPARE, saga.round, 0)
    return backoff_ms(policy_of(turn.plan, number, Verb.PREPARE), saga.round, *key)
