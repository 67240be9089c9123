"""What the other files all say: states, verbs, decisions, errors, and why a saga turned back."""

from __future__ import annotations

from typing import Final

from amends.v1 import types_pb2
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    CommitDecision,
    Failure,
    SagaState,
    SagaTurnedBack,
    TurnCause,
    Verb,
)

__all__ = [
    "CAUSES_OUT",
    "DECISIONS_OUT",
    "STATES_OUT",
    "VERBS_OUT",
    "failure_to_proto",
    "turn_step",
    "turn_to_proto",
]

STATES_OUT: Final = {
    SagaState.RUNNING: types_pb2.SAGA_STATE_RUNNING,
    SagaState.COMPENSATING: types_pb2.SAGA_STATE_COMPENSATING,
    SagaState.STUCK: types_pb2.SAGA_STATE_STUCK,
    SagaState.COMPLETED: types_pb2.SAGA_STATE_COMPLETED,
    SagaState.COMPENSATED: types_pb2.SAGA_STATE_COMPENSATED,
    SagaState.ABANDONED: types_pb2.SAGA_STATE_ABANDONED,
    SagaState.MIXED: types_pb2.SAGA_STATE_MIXED,
}
VERBS_OUT: Final = {
    Verb.PREPARE: types_pb2.VERB_PREPARE,
    Verb.EXECUTE: types_pb2.VERB_EXECUTE,
    Verb.COMPENSATE: types_pb2.VERB_COMPENSATE,
}
CAUSES_OUT: Final = {
    TurnCause.REJECTED: types_pb2.TURN_CAUSE_REJECTED,
    TurnCause.GAVE_UP: types_pb2.TURN_CAUSE_GAVE_UP,
    TurnCause.DEADLINE: types_pb2.TURN_CAUSE_DEADLINE,
    TurnCause.CANCELLED: types_pb2.TURN_CAUSE_CANCELLED,
}
DECISIONS_OUT: Final = {
    CommitDecision.PENDING: types_pb2.COMMIT_DECISION_PENDING,
    CommitDecision.COMMIT: types_pb2.COMMIT_DECISION_COMMIT,
    CommitDecision.ABORT: types_pb2.COMMIT_DECISION_ABORT,
    CommitDecision.UNKNOWN: types_pb2.COMMIT_DECISION_UNKNOWN,
}


def failure_to_proto(failure: Failure) -> types_pb2.Error:
    """A refusal or an error."""
    return types_pb2.Error(reason=failure.reason, message=failure.message)


def turn_to_proto(turn: SagaTurnedBack, step_name: str) -> types_pb2.Turn:
    """Why a saga turned back; `step_name` is that of its step, empty if there is none."""
    return types_pb2.Turn(
        cause=CAUSES_OUT[turn.cause],
        step=step_name,
        error=failure_to_proto(turn.failure),
        at_ms=turn.at_ms,
    )


def turn_step(plan: Plan, turn: SagaTurnedBack) -> str:
    """The name of the step for which it turned back; empty for a deadline or a cancellation."""
    return "" if turn.step is None else plan.steps[turn.step].name
