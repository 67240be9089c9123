"""What a client sees: sagas, their steps and records, definitions, participants, breakers.

All of it is frozen and made of plain Python types. Instants are UTC milliseconds (`*_at_ms`), None
where there is none. Payloads are shown by size only.

A saga that a runtime told of reads each of its fields when it is first asked for: most callers look
at its state and leave, and to read all of one with three steps costs 15 µs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amends.definition import Definition
from amends.errors import Violation
from amends.in_doubt import Decision
from amends.outcomes import Cause, Verb
from amends.payload import EMPTY, Payload


class SagaState(enum.StrEnum):
    """Where a saga stands."""

    UNRECOGNISED = "UNRECOGNISED"
    """A state that this version of the SDK does not know: update amends."""
    RUNNING = "RUNNING"
    """Going forward."""
    COMPENSATING = "COMPENSATING"
    """Turned back; undoing."""
    STUCK = "STUCK"
    """At least one step needs an operator and nothing else can move. A two-phase commit goes on
    trying all the same: it needs somebody to look at a participant."""
    COMPLETED = "COMPLETED"
    """Ended: every step is done."""
    COMPENSATED = "COMPENSATED"
    """Ended: everything that may have taken effect was undone."""
    ABANDONED = "ABANDONED"
    """Ended by an operator, who gave a reason."""
    MIXED = "MIXED"
    """Ended two-phase commit in which a participant broke its vote."""


class StepState(enum.StrEnum):
    """Where a step stands."""

    UNRECOGNISED = "UNRECOGNISED"
    """A state that this version of the SDK does not know: update amends."""
    UNKNOWN = "UNKNOWN"
    """Given up or turned back with an outcome that nobody knows; it may have run."""
    PENDING = "PENDING"
    """Waits for others, or was never started because the saga turned back."""
    EXECUTING = "EXECUTING"
    """An attempt of Execute is under way or due."""
    EXECUTED = "EXECUTED"
    """Done."""
    REJECTED = "REJECTED"
    """Definitely refused: it has no effect."""
    COMPENSATING = "COMPENSATING"
    """An attempt of Compensate is under way or due."""
    COMPENSATED = "COMPENSATED"
    """Undone."""
    STUCK = "STUCK"
    """Nothing more is tried until an operator says so."""
    PREPARING = "PREPARING"
    """An attempt of Prepare is under way or due (two-phase commit)."""
    PREPARED = "PREPARED"
    """Voted yes (two-phase commit)."""
    BROKEN = "BROKEN"
    """Broke its vote, or decided alone against the decision (two-phase commit). Nothing follows."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A refusal or an error, for programs and for people."""

    reason: str
    """UPPER_SNAKE_CASE or the participant's own word; stable, for programs."""
    message: str = ""
    """For people."""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Ids, sizes and limits. Never payloads."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True, slots=True)
class Turn:
    """Why and when a saga turned back."""

    cause: Cause
    """The kind of cause."""
    step: str
    """The step that caused it; empty for a deadline or a cancellation."""
    failure: Failure | None
    """Details: the participant's refusal, the canceller's words."""
    at_ms: int
    """When."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a running or ended saga."""

    name: str
    """Its name in the definition."""
    state: StepState
    """Where it stands."""
    verb: Verb | None = None
    """What is, or was last, asked of its participant; None if nothing was."""
    round: int = 0
    """Life of the step, from 1; 0 if it never started."""
    attempt: int = 0
    """Number of the last attempt of `verb` in this round, from 1; 0 if there was none."""
    last_error: Failure | None = None
    """The last failed attempt's error."""
    next_attempt_at_ms: int | None = None
    """When the next attempt is due."""
    stuck_since_ms: int | None = None
    """Since when the step is stuck."""
    result: Payload | None = None
    """What its participant answered, when the step is done."""
    call_open: bool = False
    """A call of this step lies in its participant's lane or is on the wire."""
    prepared_at_ms: int | None = None
    """Two-phase commit: since when its participant holds what it voted yes for; None if it has not
    voted yes, or has acknowledged the decision."""


class _Read:
    """What may have a source instead of some of its fields, and reads them when they are needed."""

    __slots__ = ("_source",)

    _source: Callable[[str], Any]

    if not TYPE_CHECKING:  # or every name would be taken for a field's

        def __getattr__(self, name: str) -> Any:  # called for what is not there, only
            if name not in type(self).__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
            value = self._source(name)
            object.__setattr__(self, name, value)
            return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Saga(_Read):
    """A saga as it stood when the runtime answered."""

    saga_id: str
    """Its id."""
    definition: str
    """Name of its definition."""
    definition_hash: str
    """The content of the definition that it is pinned to."""
    state: SagaState
    """Where it stands."""
    version: int
    """Number of its last turn; grows by one with each."""
    started_at_ms: int
    """When it was started."""
    updated_at_ms: int
    """When it last changed."""
    ended_at_ms: int | None = None
    """When it ended."""
    deadline_at_ms: int | None = None
    """When it turns back by itself."""
    turn: Turn | None = None
    """Why, once it turned back. Of a two-phase commit that is the first refusal that came: it may
    be ``LOCKED`` where another branch said the real no, which then stands in its ``last_error``."""
    steps: tuple[Step, ...] = ()
    """Its steps, in the order of the definition. Empty in lists."""
    input: Payload = EMPTY
    """What it was started with. Empty in lists."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The caller's labels."""
    paused: bool = False
    """An operator paused it."""
    past_no_return: bool = False
    """The pivot's (without one: a retriable step's) first attempt has begun."""
    parent_saga_id: str | None = None
    """The parent saga's id, for a child."""
    decision: Decision | None = None
    """The decision of a two-phase commit's running round; ``PENDING`` while votes are collected.
    None in mode ``SAGA``, and in lists."""
    round: int = 0
    """The running round of a two-phase commit, from 1; 0 in mode ``SAGA``, and in lists."""

    @property
    def ended(self) -> bool:
        """Whether it has ended, in whatever way. A stuck saga has not."""
        return self.ended_at_ms is not None

    @property
    def completed(self) -> bool:
        """Whether it has ended with every step done."""
        return self.state is SagaState.COMPLETED

    def step(self, name: str) -> Step:
        """Give the step of that name. Raises `KeyError`, which names the steps that there are."""
        for step in self.steps:
            if step.name == name:
                return step
        there_are = ", ".join(step.name for step in self.steps) or "none (lists leave them out)"
        raise KeyError(f"saga {self.saga_id} has no step {name!r}; its steps: {there_are}")


class RecordKind(enum.StrEnum):
    """What a record of a saga's history says."""

    UNRECOGNISED = "Unrecognised"
    """Something that this version of the SDK does not know: update amends."""
    SAGA_STARTED = "SagaStarted"
    """The saga exists: `definition`, `definition_hash`, `input`, `deadline_at_ms`, `labels`."""
    ATTEMPT_STARTED = "AttemptStarted"
    """An attempt is about to leave, written before the call: `epoch`."""
    STEP_EXECUTED = "StepExecuted"
    """A participant said Done to Execute: `result`, `timing`."""
    STEP_REJECTED = "StepRejected"
    """A participant refused Execute or Prepare: `failure`, `timing`."""
    STEP_COMPENSATED = "StepCompensated"
    """A participant said Done to Compensate: `timing`."""
    ATTEMPT_FAILED = "AttemptFailed"
    """An attempt ended without a deciding outcome: `failure`, `timing`, `retry_at_ms`,
    `probe`."""
    ATTEMPT_LOST = "AttemptLost"
    """An attempt was in flight when its runtime died: `epoch`, of the runtime that found it."""
    ATTEMPT_WITHDRAWN = "AttemptWithdrawn"
    """An attempt never left its lane."""
    STEP_GIVEN_UP = "StepGivenUp"
    """Retries of a step are used up: `spent_s`."""
    STEP_STUCK = "StepStuck"
    """A step needs an operator: `failure`."""
    CANCEL_REQUESTED = "CancelRequested"
    """Somebody asked to cancel: `author`, `reason`."""
    SAGA_TURNED_BACK = "SagaTurnedBack"
    """The saga turned back: `turn`."""
    SAGA_ENDED = "SagaEnded"
    """The saga ended: `state`."""
    STEP_PREPARED = "StepPrepared"
    """A participant voted yes (two-phase commit): `result`, `timing`."""
    DECISION_MADE = "DecisionMade"
    """The decision of a two-phase commit: `decision`, `round`, and `turn` for an abort."""
    HEURISTIC_REPORTED = "HeuristicReported"
    """A participant decided alone, or broke its vote (two-phase commit): `committed`, `failure`,
    `timing`."""
    ROUND_PLANNED = "RoundPlanned"
    """All is rolled back, and the whole is tried again (two-phase commit): `round`,
    `starts_at_ms`."""
    TIMER_CHANGED = "TimerChanged"
    """A durable timer of a step began or fired: `detail` is ``fired`` or empty."""
    SIGNAL_RECEIVED = "SignalReceived"
    """A signal was received: `detail`, its name; `result`, its payload."""
    OPERATOR_ACTED = "OperatorActed"
    """An operator acted: `detail`, the verb; `step`, `round`, `author`, `reason`, `result`."""
    CHILD_CHANGED = "ChildChanged"
    """A child saga was recorded, or ended: `detail`, its id; `state`, its state."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When an attempt was on the wire, and what the wire said."""

    sent_at_ms: int | None
    """When it was sent, if known."""
    answered_at_ms: int | None
    """When it was answered or timed out."""
    status: str
    """Name of the gRPC status, for example ``OK`` or ``UNAVAILABLE``."""
    polls: int
    """How often the same attempt was asked again after InProgress."""
    held_ms: int = 0
    """How long the participant's breaker kept it from being sent, before `sent_at_ms`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One persisted fact of a saga's history.

    `RecordKind` says which of the fields a kind fills; the others are None or empty.
    """

    seq: int
    """Position in the store's history; grows over all sagas. Records of one turn share it."""
    version: int
    """The saga's version that the record belongs to."""
    at_ms: int
    """When it was decided."""
    kind: RecordKind
    """What it says."""
    step: str = ""
    """The step that it is about; empty if it is about the saga."""
    verb: Verb | None = None
    """The verb of the attempt that it is about."""
    round: int = 0
    """The step's round, or a two-phase commit's, from 1; 0 if it is about neither."""
    attempt: int = 0
    """The attempt's number, from 1; 0 if it is not about an attempt."""
    timing: Timing | None = None
    """The attempt on the wire."""
    epoch: int | None = None
    """Epoch of a runtime."""
    failure: Failure | None = None
    """What was refused, or went wrong."""
    retry_at_ms: int | None = None
    """When the next attempt is due; None if none is planned."""
    probe: bool = False
    """The attempt was sent to see whether the participant is back, and nobody was there: it used up
    no retry."""
    spent_s: float | None = None
    """Time spent on attempts and the waits between them."""
    result: Payload | None = None
    """What a participant answered, or an operator gave instead."""
    turn: Turn | None = None
    """Why the saga turned back."""
    state: SagaState | None = None
    """How a saga ended."""
    author: str = ""
    """Who asked."""
    reason: str = ""
    """Why, in the author's words."""
    definition: str = ""
    """Name of the saga's definition."""
    definition_hash: str = ""
    """The content that the saga is pinned to."""
    input: Payload | None = None
    """What the saga was started with."""
    deadline_at_ms: int | None = None
    """When the saga turns back by itself."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The caller's labels."""
    detail: str = ""
    """A word more, as the kind says."""
    decision: Decision | None = None
    """``COMMIT`` or ``ABORT``."""
    committed: bool | None = None
    """What a participant did alone: True if it committed, False if it rolled back, None if nobody
    knows."""
    starts_at_ms: int | None = None
    """When a round begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A saga's trace, made from its history, whatever was exported before."""

    trace_id: str
    """32 hex digits, by which tracing systems find it."""
    sampled: bool
    """Whether the runtime exports this trace by itself, if it exports any."""
    traces_data: bytes = field(repr=False)
    """The runtime's spans, as OpenTelemetry's ``TracesData`` in protobuf; not the participants'."""
    spans: int
    """How many spans `traces_data` holds."""
    open_spans: int
    """How many spans of the saga have not ended."""


class CancelDisposition(enum.StrEnum):
    """What became of a request to cancel."""

    UNRECOGNISED = "UNRECOGNISED"
    """Something that this version of the SDK does not know: update amends."""
    TURNED_BACK = "TURNED_BACK"
    """The saga has turned back by this request."""
    ALREADY_TURNED_BACK = "ALREADY_TURNED_BACK"
    """It had turned back before, perhaps by an earlier attempt of this very request."""
    WAITS_FOR_PIVOT = "WAITS_FOR_PIVOT"
    """Recorded: the pivot is being tried, and its outcome decides."""


@dataclass(frozen=True, slots=True)
class CancelResult:
    """The answer to a request to cancel; the request is durable."""

    saga: Saga
    """The saga as it stands."""
    disposition: CancelDisposition
    """What became of the request."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The answer to abandoning a saga; it is durable.

    A two-phase commit that is not decided is aborted instead, and rolled back: nothing of it
    remains.
    """

    saga: Saga
    """The saga as it stands: ``ABANDONED``; a two-phase commit ``COMPENSATING`` or
    ``COMPENSATED``."""
    remaining_steps: tuple[str, ...]
    """Steps that may have an effect which nobody undoes now, in the definition's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """The records of one saga's turn, or a notice that there are none."""

    saga: Saga | None
    """The saga as it was after the turn, without steps and payloads; None in a notice."""
    records: tuple[Record, ...]
    """All records of the turn; empty in a notice, and where the turn cannot be read any more."""
    resume_token: str
    """Where to go on: everything up to here has been told."""
    lagged: bool
    """More is committed than this watcher reads: it is far behind, and misses nothing by that."""
    purged_turns: int = 0
    """So many turns from between the event before and this one were purged, whatever they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredDefinition:
    """A definition as the runtime holds it."""

    name: str
    """Its name."""
    content_hash: str
    """SHA-256 of its content, lower-case hex: the name of this version."""
    version: int
    """1 for the first content of this name, 2 for the next, ..."""
    registered_at_ms: int
    """When this content was first registered."""
    latest: bool
    """Whether a start that names no version gets this one."""
    definition: Definition | None
    """Its content; None if it holds something that this version of the SDK cannot express."""
    existed: bool = True
    """False only in the answer to the registration that made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinitionDiff:
    """How a definition differs from the latest registered one of its name."""

    same: bool
    """The same content is registered."""
    differences: tuple[str, ...]
    """One line per difference, for people."""
    violations: tuple[Violation, ...]
    """What registration would refuse; empty if it would register it."""


class BreakerState(enum.StrEnum):
    """State of a circuit breaker."""

    UNRECOGNISED = "UNRECOGNISED"
    """A state that this version of the SDK does not know: update amends."""
    CLOSED = "CLOSED"
    """Calls pass."""
    OPEN = "OPEN"
    """Calls wait."""
    HALF_OPEN = "HALF_OPEN"
    """A few calls pass to see whether the participant is back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerInfo:
    """The circuit breaker in front of a participant."""

    participant: str
    """The participant."""
    state: BreakerState
    """Its state."""
    consecutive_failures: int
    """Failures running."""
    since_ms: int | None
    """Since when it is in this state."""
    next_probe_at_ms: int | None
    """When the next probe is let through; None if it is closed."""
    held: bool
    """An operator holds it in this state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantInfo:
    """A participant as the runtime knows it, with its lane."""

    name: str
    """Its registered name."""
    address: str
    """``host:port``, or ``unix:path``."""
    by_operator: bool
    """An operator registered it or pointed it here, over what the configuration says."""
    breaker: BreakerInfo
    """Its breaker."""
    calls_in_flight: int
    """Calls on the wire now."""
    calls_waiting: int
    """Calls that wait in the lane."""
    concurrency_limit: int
    """Upper bound of calls on the wire."""
    transport: str
    """How it is called: ``unary`` or ``exchange``."""
    last_error: str
    """The last error status seen; empty if none."""
    configured_address: str = ""
    """Where the configuration has it; empty if the configuration does not name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What a runtime is."""

    version: str
    """Its version."""
    store_id: str
    """Identity of its store."""
    incarnation: str
    """Incarnation of its store."""
    epoch: int
    """Grows with every start on the same store."""
    started_at_ms: int
    """When it started."""
    sagas: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Number of sagas, by state."""
    without_wake_up: int = 0
    """Sagas that nothing wakes and that no list shows as stuck. 0, or there is a bug in amends.

    The runtime's log names them (`decide_crashed`, or a history that cannot be read).
    """
    restored: bool = False
    """Its store was restored from a backup, and nobody has confirmed that yet."""
