"""Sagas as they stand: whole, in a list, and what was decided of them."""

from __future__ import annotations

from typing import Final, Protocol

from amends.v1 import types_pb2
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import CommitDecision, SagaState
from amends_runtime.core.state import Saga, StepState, StepStatus
from amends_runtime.core.two_phase import is_held
from amends_runtime.ports import SagaSummary
from amends_runtime.wire.nouns import (
    DECISIONS_OUT,
    STATES_OUT,
    VERBS_OUT,
    failure_to_proto,
    turn_step,
    turn_to_proto,
)
from amends_runtime.wire.payloads import put_payload

__all__ = [
    "STEP_STATES_OUT",
    "SagaView",
    "decision_to_proto",
    "put_contents",
    "put_saga",
    "saga_state_from_proto",
    "saga_to_proto",
    "summary_to_proto",
]

_STATES: Final[dict[int, SagaState]] = {number: state for state, number in STATES_OUT.items()}
STEP_STATES_OUT: Final = {
    StepStatus.PENDING: types_pb2.STEP_STATE_PENDING,
    StepStatus.EXECUTING: types_pb2.STEP_STATE_EXECUTING,
    StepStatus.EXECUTED: types_pb2.STEP_STATE_EXECUTED,
    StepStatus.REJECTED: types_pb2.STEP_STATE_REJECTED,
    StepStatus.UNKNOWN: types_pb2.STEP_STATE_UNKNOWN,
    StepStatus.COMPENSATING: types_pb2.STEP_STATE_COMPENSATING,
    StepStatus.COMPENSATED: types_pb2.STEP_STATE_COMPENSATED,
    StepStatus.STUCK: types_pb2.STEP_STATE_STUCK,
    StepStatus.PREPARING: types_pb2.STEP_STATE_PREPARING,
    StepStatus.PREPARED: types_pb2.STEP_STATE_PREPARED,
    StepStatus.BROKEN: types_pb2.STEP_STATE_BROKEN,
}


class SagaView(Protocol):
    """A saga with its plan and version: what `saga_to_proto` shows."""

    @property
    def plan(self) -> Plan:
        """The pinned definition, worked out."""
        ...

    @property
    def saga(self) -> Saga:
        """The state."""
        ...

    @property
    def quarantined(self) -> bool:
        """Deciding failed too often: nothing moves until the runtime restarts."""
        ...

    @property
    def version(self) -> int:
        """Number of the last turn."""
        ...


def decision_to_proto(decision: CommitDecision | None) -> types_pb2.CommitDecision.ValueType:
    """What a participant in doubt is answered; None: the saga is no two-phase commit."""
    return types_pb2.COMMIT_DECISION_UNSPECIFIED if decision is None else DECISIONS_OUT[decision]


def saga_state_from_proto(number: int) -> SagaState | None:
    """The state of that number in the contract; None for "any" and for unknown numbers."""
    return _STATES.get(number)


def saga_to_proto(view: SagaView) -> types_pb2.Saga:
    """A saga as it stands, with its steps, its input and their results."""
    message = types_pb2.Saga()
    put_saga(message, view)
    put_contents(message, view)
    return message


def put_saga(message: types_pb2.Saga, view: SagaView) -> None:
    """Fills in what a list shows: no payloads, nothing per step.

    Field by field where the message lies, and only what is not nothing: it costs a third of what
    a message costs that is made of keywords and copied to its place.
    """
    saga = view.saga
    message.saga_id = saga.saga_id
    message.definition = saga.definition_name
    message.definition_hash = saga.definition_hash
    message.state = STATES_OUT[SagaState.STUCK if view.quarantined else saga.state]
    message.version = view.version
    message.started_at_ms = saga.started_at_ms
    message.updated_at_ms = saga.updated_at_ms
    if saga.ended_at_ms:
        message.ended_at_ms = saga.ended_at_ms
    if saga.deadline_at_ms:
        message.deadline_at_ms = saga.deadline_at_ms
    if saga.turn is not None:
        message.turn.CopyFrom(turn_to_proto(saga.turn, turn_step(view.plan, saga.turn)))
    if saga.labels:
        message.labels.update(saga.labels)
    if saga.past_no_return:
        message.past_no_return = True
    if saga.round:
        message.round = saga.round
        message.decision = DECISIONS_OUT[saga.decision or CommitDecision.PENDING]


def put_contents(message: types_pb2.Saga, view: SagaView) -> None:
    """Fills in the rest: its input, and its steps with their results."""
    saga = view.saga
    put_payload(message.input, saga.input)
    for step, state in zip(view.plan.steps, saga.steps, strict=True):
        _put_step(message.steps.add(), step.name, state)


def _put_step(message: types_pb2.StepStatus, name: str, step: StepState) -> None:
    message.name = name
    message.state = STEP_STATES_OUT[step.status]
    message.verb = VERBS_OUT[step.verb]
    if step.round:
        message.round = step.round
        message.attempt = step.attempt
    if step.failure is not None:
        message.last_error.CopyFrom(failure_to_proto(step.failure))
    if step.retry_at_ms:
        message.next_attempt_at_ms = step.retry_at_ms
    if step.stuck_since_ms:
        message.stuck_since_ms = step.stuck_since_ms
    if step.result is not None:
        put_payload(message.result, step.result)
    if step.open:
        message.call_open = True
    if step.prepared_at_ms and is_held(step):
        message.prepared_at_ms = step.prepared_at_ms


def summary_to_proto(summary: SagaSummary) -> types_pb2.Saga:
    """A saga's row in a list: no payloads, nothing per step."""
    return types_pb2.Saga(
        saga_id=summary.saga_id,
        definition=summary.definition_name,
        definition_hash=summary.definition_hash,
        state=STATES_OUT[summary.state],
        version=summary.version,
        started_at_ms=summary.started_at_ms,
        updated_at_ms=summary.updated_at_ms,
        ended_at_ms=summary.ended_at_ms,
        deadline_at_ms=summary.deadline_at_ms,
        labels=summary.labels,
        past_no_return=summary.past_no_return,
    )
