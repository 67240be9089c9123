"""What a saga is at an instant: the fold of its records, in either mode.

`saga.py` and `two_phase.py` say how it comes about; both machines share these shapes, so that
whoever shows, parks or counts sagas need not ask for the mode.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import Effect
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    CommitDecision,
    Failure,
    Record,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    Verb,
)
from amends_runtime.errors import IllegalRecord

__all__ = ["Answer", "Decision", "Phase", "Saga", "StepState", "StepStatus", "begun"]


class Phase(enum.IntEnum):
    """Which way a saga goes."""

    FORWARD = 1
    BACKWARD = 2
    ENDED = 3


class StepStatus(enum.IntEnum):
    """Where a step stands in its round."""

    PENDING = 1
    EXECUTING = 2
    EXECUTED = 3
    REJECTED = 4
    UNKNOWN = 5
    COMPENSATING = 6
    COMPENSATED = 7
    STUCK = 8
    PREPARING = 9
    PREPARED = 10
    BROKEN = 11


_FORWARD: Final = Phase.FORWARD  # bound once: see `saga`
_ENDED: Final = Phase.ENDED
_STUCK: Final = StepStatus.STUCK
_RUNNING: Final = SagaState.RUNNING


class StepState(msgspec.Struct, frozen=True, gc=False):
    """A step in its round. `round`, `attempt`, `failures`, `spent_ms` are those of `verb`.

    open              an attempt lies in a lane or is on the wire
    unknown           an attempt to execute ended, or was lost, without a definite outcome
    refused           a definite refusal ended the round
    locked            that refusal was a vote of LOCKED
    retry_at_ms       when the next attempt is due; 0: none is planned
    began_at_ms       when the first attempt began, of this verb, round and operator's retry
    running_until_ms  until when a lost attempt to execute may still be running; 0: none may
    prepared_at_ms    when it voted yes; 0: it has not, in this round
    vote              what that yes brought; `result` shows what its commit says instead, if it does
    stuck_since_ms    since when an operator should look; in a two-phase commit attempts go on
    mark_at_ms        when an operator should, of a branch that is told a decision; 0: not by time
    """

    status: StepStatus = StepStatus.PENDING
    verb: Verb = Verb.EXECUTE
    round: int = 0
    attempt: int = 0
    open: bool = False
    unknown: bool = False
    refused: bool = False
    executed: bool = False
    result: Payload | None = None
    failures: int = 0
    spent_ms: int = 0
    retry_at_ms: int = 0
    running_until_ms: int = 0
    misconfigured: int = 0
    misconfigured_since_ms: int = 0
    failure: Failure | None = None
    stuck_since_ms: int = 0
    began_at_ms: int = 0
    prepared_at_ms: int = 0
    locked: bool = False
    vote: Payload | None = None
    mark_at_ms: int = 0


class Saga(msgspec.Struct, frozen=True, gc=False):
    """A saga's state: the fold of its records.

    `round` and `decision` are those of a two-phase commit, else 0 and None. In one, `phase` is
    FORWARD until ABORT is decided, `past_no_return` says that COMMIT was, and `turn` why ABORT was;
    `cancel_requested` that somebody cancelled or abandoned it, and no further round follows;
    `history_lost` that it may have gone on in another history, which a restored store has lost.
    """

    saga_id: str
    definition_name: str
    definition_hash: str
    content_hash: str
    input: Payload
    started_at_ms: int
    updated_at_ms: int
    deadline_at_ms: int
    labels: dict[str, str]
    traceparent: str
    steps: tuple[StepState, ...]
    phase: Phase = Phase.FORWARD
    past_no_return: bool = False
    cancel_requested: bool = False
    abandoned: bool = False
    operator_request: str = ""
    turn: SagaTurnedBack | None = None
    payload_bytes: int = 0
    ended_at_ms: int = 0
    end: SagaState | None = None
    round: int = 0
    decision: CommitDecision | None = None
    history_lost: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing follows any more."""
        return self.phase is _ENDED

    @property
    def state(self) -> SagaState:
        """Where the saga stands, as everybody outside sees it.

        STUCK shows when a step is and nothing else can move; a waiting deadline is no movement. In
        a two-phase commit it shows as soon as an operator should look, and attempts go on.
        """
        if self.end is not None:
            return self.end
        if self.round and any(step.stuck_since_ms for step in self.steps):
            return SagaState.STUCK
        for step in self.steps:
            if step.open:
                break
            if step.status is _STUCK and not self._is_moving():
                return SagaState.STUCK
        return _RUNNING if self.phase is _FORWARD else SagaState.COMPENSATING

    def handed(self, number: int) -> Payload | None:
        """What others, and its own compensation, are handed of this step; None: nothing.

        The same in every call under one key: a participant refuses one whose content has changed.
        So of a branch it is what it voted with, whatever it says when it commits.
        """
        step = self.steps[number]
        return step.vote if self.round else step.result

    def _is_moving(self) -> bool:
        return any(step.open or step.retry_at_ms > 0 for step in self.steps)


def begun(plan: Plan, record: Record, new_step: StepState, round_: int = 0) -> Saga:
    """The state that a history begins with: each step a `new_step`, a two-phase commit in a round.

    Raises IllegalRecord for any other record than SagaStarted.
    """
    if type(record) is not SagaStarted:
        raise IllegalRecord("(none)", "(not started)", type(record).__name__)
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
        steps=(new_step,) * len(plan.steps),
        payload_bytes=len(record.input.data),
        round=round_,
    )


class Answer(enum.Enum):
    """What the sender of a request is told once the turn is durable."""

    STARTED = "STARTED"
    EXISTED = "EXISTED"
    OTHER_CONTENT = "OTHER_CONTENT"
    TURNED_BACK = "TURNED_BACK"
    ALREADY_TURNED_BACK = "ALREADY_TURNED_BACK"
    WAITS_FOR_PIVOT = "WAITS_FOR_PIVOT"
    PAST_NO_RETURN = "PAST_NO_RETURN"
    COMPLETED = "COMPLETED"
    RETRIED = "RETRIED"
    NOTHING_STUCK = "NOTHING_STUCK"
    ABANDONED = "ABANDONED"
    ALREADY_ABANDONED = "ALREADY_ABANDONED"
    NOT_STUCK = "NOT_STUCK"
    ABORTED = "ABORTED"
    DECIDED = "DECIDED"
    ENDED = "ENDED"


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What one message comes to: records to persist, the state after them, effects for *then*.

    The caller must have `records` durable before it performs any of `effects` or gives `answer`.
    """

    records: tuple[Record, ...]
    saga: Saga
    effects: tuple[Effect, ...]
    answer: Answer | None = None
