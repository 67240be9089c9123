"""Records: the facts of a saga's history, in the past tense.

A record is durable before anything that follows from it leaves the process. The fold of
`saga.evolve` over a saga's records *is* its state; nothing else is true of it.

Every record carries `at_ms`, the instant at which it was decided (UTC milliseconds), and what a
trace or a metric will want to know later: attempts, when they were sent and answered, the wire's
status. Steps are numbered as in the pinned definition.

The tag is the record's name on disk: never reuse one, and never change a field's place or meaning;
a new shape is a new format version with an upcast in `storage/codec.py`.
"""

from __future__ import annotations

import enum
from typing import ClassVar

import msgspec

from amends_runtime.core.payload import Payload

__all__ = [
    "AttemptFailed",
    "AttemptLost",
    "AttemptStarted",
    "AttemptWithdrawn",
    "CancelRequested",
    "CommitDecision",
    "DecisionMade",
    "Failure",
    "HeuristicReported",
    "OperatorActed",
    "OperatorAction",
    "Record",
    "RoundPlanned",
    "SagaEnded",
    "SagaStarted",
    "SagaState",
    "SagaTurnedBack",
    "StepCompensated",
    "StepExecuted",
    "StepGivenUp",
    "StepPrepared",
    "StepRejected",
    "StepStuck",
    "Timing",
    "TurnCause",
    "Verb",
    "VoteRefused",
]


class Verb(enum.IntEnum):
    """What a participant is asked to do."""

    PREPARE = 1
    EXECUTE = 2
    COMPENSATE = 3


class SagaState(enum.IntEnum):
    """Where a saga stands, as everybody outside the core sees it."""

    RUNNING = 1
    COMPENSATING = 2
    STUCK = 3
    COMPLETED = 4
    COMPENSATED = 5
    ABANDONED = 6
    MIXED = 7


class TurnCause(enum.IntEnum):
    """Why a saga turned back."""

    REJECTED = 1
    GAVE_UP = 2
    DEADLINE = 3
    CANCELLED = 4


class CommitDecision(enum.IntEnum):
    """How a two-phase commit goes on, or what is known of it."""

    PENDING = 1
    COMMIT = 2
    ABORT = 3
    UNKNOWN = 4


class OperatorAction(enum.IntEnum):
    """What an operator did to a saga."""

    RETRY = 1
    ABANDON = 2
    CONFIRM_RESTORE = 3


class Failure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A refusal or an error: a stable `reason` for programs, a `message` for people."""

    reason: str
    message: str = ""


class Timing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An attempt on the wire: when first sent, when answered, the gRPC status' name, the polls.

    `sent_us` and `answered_us` are the microseconds beyond those milliseconds: most calls take few
    of these. `held_ms` is how long the participant's breaker kept the attempt from being sent.
    """

    sent_at_ms: int
    answered_at_ms: int
    status: str = "OK"
    polls: int = 0
    held_ms: int = 0
    sent_us: int = 0
    answered_us: int = 0


class _Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    at_ms: int


class SagaStarted(_Record, frozen=True, array_like=True, gc=False, tag=1):
    """The saga exists. `content_hash` covers all that makes a repeated start the same start."""

    saga_id: str
    definition_name: str
    definition_hash: str
    content_hash: str
    input: Payload
    deadline_at_ms: int = 0
    labels: dict[str, str] = {}
    traceparent: str = ""


class AttemptStarted(_Record, frozen=True, array_like=True, gc=False, tag=2):
    """An attempt is about to leave. Committed before the call; see rule 1 of `saga`."""

    step: int
    verb: Verb
    round: int
    attempt: int
    epoch: int


class StepExecuted(_Record, frozen=True, array_like=True, gc=False, tag=3):
    """Done(result): the step took effect.

    `failure` says why the result of a commit is not here, if it was too large to be kept.
    """

    verb: ClassVar[Verb] = Verb.EXECUTE

    step: int
    round: int
    attempt: int
    timing: Timing
    result: Payload
    failure: Failure | None = None


class StepRejected(_Record, frozen=True, array_like=True, gc=False, tag=4):
    """Rejected(reason): this round's key has no effect and never will."""

    verb: ClassVar[Verb] = Verb.EXECUTE

    step: int
    round: int
    attempt: int
    timing: Timing
    failure: Failure


class StepCompensated(_Record, frozen=True, array_like=True, gc=False, tag=5):
    """Done to Compensate: the step is undone, or was found never to have run and is fenced."""

    verb: ClassVar[Verb] = Verb.COMPENSATE

    step: int
    round: int
    attempt: int
    timing: Timing


class AttemptFailed(_Record, frozen=True, array_like=True, gc=False, tag=6):
    """An attempt ended and nobody knows its outcome. `retry_at_ms` 0: none follows by itself.

    A `probe` of an open breaker that found nobody there uses up no retry.
    """

    step: int
    verb: Verb
    round: int
    attempt: int
    timing: Timing
    failure: Failure
    misconfigured: bool = False
    retry_at_ms: int = 0
    probe: bool = False


class AttemptLost(_Record, frozen=True, array_like=True, gc=False, tag=7):
    """An attempt may have been in flight when its runtime died: its outcome is unknown."""

    step: int
    verb: Verb
    round: int
    attempt: int
    epoch: int


class AttemptWithdrawn(_Record, frozen=True, array_like=True, gc=False, tag=8):
    """An attempt never left its lane: it has no effect."""

    step: int
    verb: Verb
    round: int
    attempt: int


class StepGivenUp(_Record, frozen=True, array_like=True, gc=False, tag=9):
    """The step's retries are used up; its outcome stays unknown."""

    step: int
    spent_ms: int


class StepStuck(_Record, frozen=True, array_like=True, gc=False, tag=10):
    """Nothing more is tried for this step until an operator says so.

    In the second phase of a two-phase commit: an operator should look, and attempts go on.
    """

    step: int
    verb: Verb
    failure: Failure


class CancelRequested(_Record, frozen=True, array_like=True, gc=False, tag=11):
    """Somebody asked to cancel."""

    author: str
    reason: str


class SagaTurnedBack(_Record, frozen=True, array_like=True, gc=False, tag=12):
    """No new forward step starts from here on. `step` is None for a cancellation.

    A deadline names a step only in a two-phase commit: the first one whose vote is missing.
    """

    cause: TurnCause
    step: int | None
    failure: Failure


class SagaEnded(_Record, frozen=True, array_like=True, gc=False, tag=13):
    """The end: COMPLETED, COMPENSATED, ABANDONED or MIXED. Nothing follows it."""

    state: SagaState


class OperatorActed(_Record, frozen=True, array_like=True, gc=False, tag=14):
    """Somebody took a saga in hand.

    RETRY names the step and the round in which it is tried again; without a step it brought a saga
    back whose deciding had failed. ABANDON names none, and the end follows. CONFIRM_RESTORE is in
    the history of a two-phase commit that the store brought with it when it was restored.
    """

    action: OperatorAction
    step: int | None
    author: str
    reason: str
    round: int = 0
    request_id: str = ""


class StepPrepared(_Record, frozen=True, array_like=True, gc=False, tag=15):
    """Done to Prepare: the branch voted yes, and may not decide alone any more."""

    verb: ClassVar[Verb] = Verb.PREPARE

    step: int
    round: int
    attempt: int
    timing: Timing
    result: Payload


class VoteRefused(_Record, frozen=True, array_like=True, gc=False, tag=16):
    """Rejected to Prepare: the branch voted no and holds nothing."""

    verb: ClassVar[Verb] = Verb.PREPARE

    step: int
    round: int
    attempt: int
    timing: Timing
    failure: Failure


class DecisionMade(_Record, frozen=True, array_like=True, gc=False, tag=17):
    """The decision of a round, COMMIT or ABORT. Durable before any call of the second phase.

    An ABORT says why, as `SagaTurnedBack` does.
    """

    decision: CommitDecision
    round: int
    cause: TurnCause | None = None
    step: int | None = None
    failure: Failure = Failure("")


class HeuristicReported(_Record, frozen=True, array_like=True, gc=False, tag=18):
    """A branch decided alone, or broke its vote. `committed` is what it did; None: nobody knows."""

    step: int
    verb: Verb
    round: int
    attempt: int
    timing: Timing
    committed: bool | None
    failure: Failure


class RoundPlanned(_Record, frozen=True, array_like=True, gc=False, tag=19):
    """All branches of a round are rolled back, and the whole is tried again from `starts_at_ms`."""

    round: int
    starts_at_ms: int


Record = (
    SagaStarted
    | AttemptStarted
    | StepExecuted
    | StepRejected
    | StepCompensated
    | AttemptFailed
    | AttemptLost
    | AttemptWithdrawn
    | StepGivenUp
    | StepStuck
    | CancelRequested
    | SagaTurnedBack
    | SagaEnded
    | OperatorActed
    | StepPrepared
    | VoteRefused
    | DecisionMade
    | HeuristicReported
    | RoundPlanned
)
