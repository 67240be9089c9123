"""Attempts: what both machines know of them, whatever the mode.

Which attempt a message or a record is about, what it counts for, and where its step is put back.
"""

from __future__ import annotations

from typing import Final

import msgspec

from amends_runtime.core.backoff import backoff_ms
from amends_runtime.core.definition import Plan, RetryPolicy
from amends_runtime.core.effects import PollParticipant
from amends_runtime.core.messages import Answered, InProgress, NotSent, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    Failure,
    HeuristicReported,
    Record,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    Timing,
    Verb,
    VoteRefused,
)
from amends_runtime.core.state import Saga, StepState
from amends_runtime.errors import IllegalMessage, IllegalRecord

__all__ = [
    "IN_PROGRESS",
    "MAX_SAGA_PAYLOAD_BYTES",
    "MISCONFIGURED_ATTEMPTS",
    "MISCONFIGURED_FOR_MS",
    "PROGRESS_LIMIT_MS",
    "exhausted",
    "failed",
    "illegal",
    "is_misconfigured",
    "is_open",
    "next_wait_ms",
    "policy_of",
    "poll_of",
    "rejected_compensation",
    "step_ending",
    "step_failed",
    "step_of",
    "step_without_attempt",
    "steps_with",
    "timing_of",
    "too_large",
    "took_ms",
    "with_step",
]

PROGRESS_LIMIT_MS: Final = 24 * 3600 * 1000  # what takes longer is better a signal wait
IN_PROGRESS: Final = "IN_PROGRESS"  # the reason of an attempt that was in progress for too long
MISCONFIGURED_ATTEMPTS: Final = 3  # one may be a rolling deployment,
MISCONFIGURED_FOR_MS: Final = 60_000  # and so may three within a minute
MAX_SAGA_PAYLOAD_BYTES: Final = 3 * 1024 * 1024  # a call with all of them fits gRPC's 4 MiB message

_COMPENSATE: Final = Verb.COMPENSATE  # bound once: see `saga`

EndOfAttempt = (
    StepExecuted
    | StepRejected
    | StepCompensated
    | StepPrepared
    | VoteRefused
    | HeuristicReported
    | AttemptFailed
    | AttemptLost
    | AttemptWithdrawn
)


# -- what a message is about -------------------------------------------------------------------


def step_of(saga: Saga, message: Answered | NotSent) -> StepState:
    """The step of an answer. Raises IllegalMessage for a number that the saga does not have."""
    if 0 <= message.step < len(saga.steps):
        return saga.steps[message.step]
    name = f"{type(message).__name__} of step {message.step}"
    raise IllegalMessage(saga.saga_id, saga.state.name, name)


def is_open(step: StepState, message: Answered | NotSent | PollParticipant) -> bool:
    """Whether a message is about the attempt that is open; all others are echoes."""
    return (
        step.open
        and step.attempt == message.attempt
        and step.verb is message.verb
        and step.round == message.round
    )


# -- what an attempt counts for ------------------------------------------------------------------


def policy_of(plan: Plan, number: int, verb: Verb) -> RetryPolicy:
    """The retry policy of a step's attempts: one for Prepare and Execute, one for Compensate."""
    step = plan.steps[number]
    policy = step.compensation_retry if verb is _COMPENSATE else step.retry
    assert policy is not None, "a plan is normalised"
    return policy


def next_wait_ms(saga: Saga, number: int, policy: RetryPolicy) -> int:
    """How long the step waits for its next attempt, if the one that it has now has failed."""
    step = saga.steps[number]
    return backoff_ms(
        policy, step.failures + 1, saga.saga_id, number, step.verb, step.round, step.attempt
    )


def took_ms(plan: Plan, number: int, timing: Timing, reason: str) -> int:
    """What an attempt counts for on the give-up clock: no more than its own time-out.

    One that was in progress for an hour cost no retry until its last poll was lost. Only one that
    was in progress for too long counts in full, or it would be tried for weeks.
    """
    took = max(0, timing.answered_at_ms - timing.sent_at_ms)
    return took if reason == IN_PROGRESS else min(took, plan.steps[number].timeout_ms)


def timing_of(message: Answered) -> Timing:
    """When an attempt was on the wire, for its record."""
    return Timing(
        message.sent_at_ms,
        message.answered_at_ms,
        message.status,
        message.polls,
        message.held_ms,
        message.sent_us,
        message.answered_us,
    )


def exhausted(
    plan: Plan,
    step: StepState,
    message: Answered,
    outcome: Unknown,
    *,
    wait_ms: int,
    budget_ms: int,
) -> bool:
    """Whether a wait of `wait_ms` after this attempt would go beyond the give-up clock's budget."""
    took = took_ms(plan, message.step, timing_of(message), outcome.reason)
    return step.spent_ms + took + wait_ms > budget_ms


def is_misconfigured(step: StepState, message: Answered, outcome: Unknown) -> bool:
    """Whether answers that a retry won't mend have come for long enough to believe them."""
    return (
        outcome.misconfigured
        and step.misconfigured + 1 >= MISCONFIGURED_ATTEMPTS
        and message.answered_at_ms - step.misconfigured_since_ms >= MISCONFIGURED_FOR_MS
    )


def rejected_compensation(outcome: Rejected) -> Unknown:
    """What a refusal to undo is taken for: a contract violation, and a failed attempt."""
    return Unknown(
        "COMPENSATION_REJECTED",
        "a compensation must not be rejected; the participant said"
        f" {outcome.reason}: {outcome.message}",
    )


def too_large(saga: Saga, result: Payload) -> Unknown | None:
    """Why a result is not taken in, if it would make the saga's payloads too large together."""
    total = saga.payload_bytes + len(result.data)
    if total <= MAX_SAGA_PAYLOAD_BYTES:
        return None
    return Unknown(
        "PAYLOADS_TOO_LARGE",
        f"with this result the saga's payloads would be {total} bytes, and {MAX_SAGA_PAYLOAD_BYTES}"
        " are the most: return a reference instead of the content",
        misconfigured=True,
    )


# -- records and effects of an attempt -------------------------------------------------------------


def failed(
    now_ms: int,
    message: Answered,
    failure: Failure,
    *,
    misconfigured: bool = False,
    retry_at_ms: int,
) -> AttemptFailed:
    """The record of an attempt whose outcome nobody knows. `retry_at_ms` 0: none follows."""
    return AttemptFailed(
        now_ms,
        message.step,
        message.verb,
        message.round,
        message.attempt,
        timing_of(message),
        failure,
        misconfigured,
        retry_at_ms,
        message.probe,
    )


def poll_of(
    message: Answered, outcome: InProgress, now_ms: int, limit_at_ms: int
) -> PollParticipant:
    """The next question to an attempt in progress, at `limit_at_ms` at the latest."""
    return PollParticipant(
        step=message.step,
        verb=message.verb,
        round=message.round,
        attempt=message.attempt,
        at_ms=min(now_ms + max(1, outcome.poll_after_ms), limit_at_ms),
        sent_at_ms=message.sent_at_ms,
        polls=message.polls + 1,
        held_ms=message.held_ms,
        sent_us=message.sent_us,
    )


# -- putting steps back ----------------------------------------------------------------------------


def illegal(saga: Saga, record: Record) -> IllegalRecord:
    """The error for a record that cannot follow."""
    return IllegalRecord(saga.saga_id, saga.state.name, type(record).__name__)


def step_ending(saga: Saga, record: EndOfAttempt) -> StepState:
    """The step whose open attempt the record ends. Raises IllegalRecord for any other one's."""
    step = saga.steps[record.step]
    if (
        step.open
        and step.attempt == record.attempt
        and step.verb is record.verb
        and step.round == record.round
    ):
        return step
    raise illegal(saga, record)


def step_failed(plan: Plan, saga: Saga, record: AttemptFailed, *, unknown: bool) -> StepState:
    """The step after an attempt whose outcome nobody knows, with what it counts for.

    `unknown`: from now on nobody knows, either, whether the step has run.
    """
    step = step_ending(saga, record)
    timing = record.timing
    waits_ms = max(0, record.retry_at_ms - record.at_ms) if record.retry_at_ms else 0
    since_ms = step.misconfigured_since_ms if step.misconfigured else timing.answered_at_ms
    took = took_ms(plan, record.step, timing, record.failure.reason)
    return msgspec.structs.replace(
        step,
        open=False,
        unknown=step.unknown or unknown,
        failures=step.failures + (not record.probe),
        spent_ms=step.spent_ms + (0 if record.probe else took + waits_ms),
        retry_at_ms=record.retry_at_ms,
        misconfigured=step.misconfigured + 1 if record.misconfigured else 0,
        misconfigured_since_ms=since_ms,
        failure=record.failure,
    )


def step_without_attempt(saga: Saga, record: StepGivenUp | StepStuck) -> StepState:
    """The step that the record is about. Raises IllegalRecord if an attempt of it is open."""
    step = saga.steps[record.step]
    if step.open:
        raise illegal(saga, record)
    return step


def with_step(
    saga: Saga, record: AttemptStarted | EndOfAttempt | StepGivenUp | StepStuck, step: StepState
) -> Saga:
    """The saga with another state of the step that the record is about."""
    steps = steps_with(saga, record.step, step)
    return msgspec.structs.replace(saga, steps=steps, updated_at_ms=record.at_ms)


def steps_with(saga: Saga, number: int, step: StepState) -> tuple[StepState, ...]:
    """The saga's steps with one of them replaced."""
    steps = [*saga.steps]
    steps[number] = step
    return tuple(steps)
