"""The only translation between the contract's messages and the core's values.

Out goes what is true already, so nothing on the way out can fail. What comes in is somebody else's
and may be anything: `definition_from_proto` refuses, naming everything that is wrong, and
`outcome_from_proto` never does, because nonsense from a participant is only an unknown outcome.

In a definition a zero in a duration or limit means "the default", and becomes the default here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final, Protocol, assert_never

import msgspec

from amends.v1 import operator_pb2, participant_pb2, types_pb2
from amends_runtime.core import definition as core_definition
from amends_runtime.core.breaker import Breaker, BreakerState
from amends_runtime.core.definition import Definition, Kind, Mode, Plan, RetryPolicy, Step
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Unknown,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    Failure,
    OperatorActed,
    OperatorAction,
    Record,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepRejected,
    StepStuck,
    Timing,
    TurnCause,
    Verb,
)
from amends_runtime.core.saga import PROGRESS_LIMIT_MS, Saga, StepState, StepStatus
from amends_runtime.errors import FieldViolation, InvalidRequest
from amends_runtime.ports import Call, RegisteredDefinition, SagaSummary, StoreIdentity

__all__ = [
    "MAX_CONTENT_TYPE_BYTES",
    "MAX_OUTCOME_MESSAGE_CHARS",
    "MAX_OUTCOME_REASON_CHARS",
    "MAX_PAYLOAD_BYTES",
    "LaneView",
    "SagaView",
    "breaker_to_proto",
    "call_to_proto",
    "definition_from_proto",
    "definition_to_proto",
    "idempotency_key",
    "outcome_from_proto",
    "participant_to_proto",
    "payload_from_proto",
    "payload_to_proto",
    "put_call",
    "put_contents",
    "put_saga",
    "read_definition",
    "record_to_proto",
    "registered_to_proto",
    "saga_state_from_proto",
    "saga_to_proto",
    "start_content_hash",
    "summary_to_proto",
]

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""One payload. Three of them, with all that a call says besides, fit gRPC's 4 MiB message."""
UNSAID_POLL_MS: Final = 1000
"""When to ask again who says InProgress and not when, or a time that has passed."""
MAX_CONTENT_TYPE_BYTES: Final = 256
"""A content type with parameters; a payload's bytes must not hide where no limit looks."""
MAX_OUTCOME_REASON_CHARS: Final = 128
"""What a program compares. With the message it lands in the history at every failed attempt."""
MAX_OUTCOME_MESSAGE_CHARS: Final = 1024
"""A few sentences for people; a stack trace belongs into the participant's own log."""


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


class LaneView(Protocol):
    """A participant's lane: what `participant_to_proto` shows."""

    @property
    def name(self) -> str:
        """The participant's registered name."""
        ...

    @property
    def address(self) -> str:
        """Where it is called."""
        ...

    @property
    def by_operator(self) -> bool:
        """Registered at run time, not by the configuration."""
        ...

    @property
    def breaker(self) -> Breaker:
        """Its breaker."""
        ...

    @property
    def in_flight(self) -> int:
        """Calls on the wire."""
        ...

    @property
    def waiting(self) -> int:
        """Calls in the lane."""
        ...

    @property
    def limit(self) -> int:
        """Upper bound of calls on the wire."""
        ...

    @property
    def transport(self) -> str:
        """How it is called: "unary" or "exchange"."""
        ...

    @property
    def last_error(self) -> str:
        """The last error status seen; empty if none."""
        ...


# -- payloads --------------------------------------------------------------------------------------


def payload_to_proto(payload: Payload) -> types_pb2.Payload:
    """The message of the contract."""
    return types_pb2.Payload(data=payload.data, content_type=payload.content_type)


def payload_from_proto(message: types_pb2.Payload) -> Payload:
    """The payload that a message carries; an absent one is empty."""
    return Payload(message.data, message.content_type)


def start_content_hash(
    definition_name: str,
    definition_hash: str,
    input_: Payload,
    labels: Mapping[str, str],
    deadline_ms: int,
) -> str:
    """SHA-256, in lower-case hex, of all that makes a repeated start the same start.

    `definition_hash` is the one that the caller named, empty if none: a repeat after a new version
    was registered is still the same start. How long the caller waits and its trace context are no
    content. msgpack writes each value's length before it, so no two contents run into each other.
    """
    content = (
        "amends.start.1",
        definition_name,
        definition_hash,
        input_.data,
        input_.content_type,
        sorted(labels.items()),
        deadline_ms,
    )
    return hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest()


# -- definitions -----------------------------------------------------------------------------------

_MODES: Final[dict[int, Mode]] = {
    types_pb2.MODE_UNSPECIFIED: Mode.SAGA,
    types_pb2.MODE_SAGA: Mode.SAGA,
    types_pb2.MODE_TWO_PHASE_COMMIT: Mode.TWO_PHASE_COMMIT,
}
_MODES_OUT: Final = {
    Mode.SAGA: types_pb2.MODE_SAGA,
    Mode.TWO_PHASE_COMMIT: types_pb2.MODE_TWO_PHASE_COMMIT,
}
_KINDS: Final[dict[int, Kind]] = {
    types_pb2.STEP_KIND_UNSPECIFIED: Kind.COMPENSATABLE,
    types_pb2.STEP_KIND_COMPENSATABLE: Kind.COMPENSATABLE,
    types_pb2.STEP_KIND_PIVOT: Kind.PIVOT,
    types_pb2.STEP_KIND_RETRIABLE: Kind.RETRIABLE,
    types_pb2.STEP_KIND_READ_ONLY: Kind.READ_ONLY,
}
_KINDS_OUT: Final = {
    Kind.COMPENSATABLE: types_pb2.STEP_KIND_COMPENSATABLE,
    Kind.PIVOT: types_pb2.STEP_KIND_PIVOT,
    Kind.RETRIABLE: types_pb2.STEP_KIND_RETRIABLE,
    Kind.READ_ONLY: types_pb2.STEP_KIND_READ_ONLY,
}
_WORK_TO_COME: Final = {
    "sleep": "durable timers",
    "wait_signal": "signals",
    "saga": "sub-sagas",
}
_ANY_NAME: Final = "unnamed"  # stands in for work that cannot be read, so that the rest still can


def definition_from_proto(message: types_pb2.Definition) -> Definition:
    """The definition that a message describes, not normalised.

    Raises InvalidRequest for what the core has no words for (no work, work of a later version,
    unknown enum values); it then names everything else that is wrong with it, too. What the core
    can say but would refuse is left to `core.definition.violations`.
    """
    definition, found = read_definition(message)
    if not found:
        return definition
    told = {violation.field for violation in found}
    found += [
        FieldViolation(v.field, v.message)
        for v in core_definition.violations(definition)
        if v.field not in told  # the core judges what was put in its place
    ]
    raise InvalidRequest(
        "INVALID_DEFINITION",
        [FieldViolation(f"definition.{v.field}", v.message) for v in found],
        {"definition": definition.name[:64], "violations": str(len(found))},
    )


def read_definition(message: types_pb2.Definition) -> tuple[Definition, list[FieldViolation]]:
    """The definition as far as the core can say it, and everything that it has no words for."""
    found: list[FieldViolation] = []
    mode = _MODES.get(message.mode)
    if mode is None:
        found.append(_unknown_enum("mode", message.mode, types_pb2.Mode.keys()))
    if message.HasField("two_phase") and mode is not Mode.TWO_PHASE_COMMIT:
        found.append(
            FieldViolation(
                "two_phase", "it has a meaning only with mode TWO_PHASE_COMMIT: leave it out"
            )
        )
    if len(message.steps) > core_definition.MAX_STEPS:
        # The rest is not even read: a request has room for hundreds of thousands.
        found.append(
            FieldViolation(
                "steps",
                f"{len(message.steps)} steps, and {core_definition.MAX_STEPS} are the most:"
                " split it into several sagas",
            )
        )
    definition = Definition(
        name=message.name,
        steps=tuple(
            _read_step(f"steps[{number}]", step, found)
            for number, step in enumerate(message.steps[: core_definition.MAX_STEPS])
        ),
        mode=mode or Mode.SAGA,
        deadline_ms=message.deadline_ms,
        retention_ms=message.retention_ms,
    )
    return definition, found


def _read_step(path: str, message: types_pb2.Step, found: list[FieldViolation]) -> Step:
    kind = _KINDS.get(message.kind)
    if kind is None:
        found.append(_unknown_enum(f"{path}.kind", message.kind, types_pb2.StepKind.keys()))
    work = message.WhichOneof("work")
    if work is None:
        found.append(
            FieldViolation(
                f"{path}.call", f"step {_shown(message.name)} does nothing: give it a call"
            )
        )
    elif work != "call":
        found.append(
            FieldViolation(
                f"{path}.{work}",
                f"step {_shown(message.name)} needs {_WORK_TO_COME[work]}, which are not available"
                " in this version: use a call",
            )
        )
    call = message.call
    return Step(
        name=message.name,
        participant=call.participant if work == "call" else _ANY_NAME,
        action=call.action if work == "call" else _ANY_NAME,
        kind=kind or Kind.COMPENSATABLE,
        after=tuple(message.after.names) if message.HasField("after") else None,
        uses=tuple(message.uses.names) if message.HasField("uses") else None,
        timeout_ms=call.timeout_ms or _DEFAULT_TIMEOUT_MS,
        retry=_read_policy(call.retry, _forward_retry(kind)) if call.HasField("retry") else None,
        compensation_retry=_read_policy(call.compensation_retry, core_definition.COMPENSATION_RETRY)
        if call.HasField("compensation_retry")
        else None,
    )


_DEFAULT_TIMEOUT_MS: Final = Step(name="", participant="", action="").timeout_ms


def _forward_retry(kind: Kind | None) -> RetryPolicy:
    if kind in {Kind.PIVOT, Kind.RETRIABLE}:
        return core_definition.MUST_SUCCEED_RETRY
    return core_definition.FORWARD_RETRY


def _read_policy(message: types_pb2.RetryPolicy, default: RetryPolicy) -> RetryPolicy:
    return RetryPolicy(
        first_ms=message.first_ms or default.first_ms,
        factor=message.factor or default.factor,
        max_ms=message.max_ms or default.max_ms,
        give_up_after_ms=message.give_up_after_ms or default.give_up_after_ms,
    )


def _unknown_enum(field: str, value: int, names: Iterable[str]) -> FieldViolation:
    return FieldViolation(field, f"{value} is not a value of it: the values are {', '.join(names)}")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")


def definition_to_proto(definition: Definition) -> types_pb2.Definition:
    """The message that says the same; what is `None` here is absent there."""
    return types_pb2.Definition(
        name=definition.name,
        mode=_MODES_OUT[definition.mode],
        steps=map(_step_to_proto, definition.steps),
        deadline_ms=definition.deadline_ms,
        retention_ms=definition.retention_ms,
    )


def _step_to_proto(step: Step) -> types_pb2.Step:
    return types_pb2.Step(
        name=step.name,
        kind=_KINDS_OUT[step.kind],
        after=None if step.after is None else types_pb2.StepNames(names=step.after),
        uses=None if step.uses is None else types_pb2.StepNames(names=step.uses),
        call=types_pb2.CallStep(
            participant=step.participant,
            action=step.action,
            timeout_ms=step.timeout_ms,
            retry=_policy_to_proto(step.retry),
            compensation_retry=_policy_to_proto(step.compensation_retry),
        ),
    )


def _policy_to_proto(policy: RetryPolicy | None) -> types_pb2.RetryPolicy | None:
    if policy is None:
        return None
    return types_pb2.RetryPolicy(
        first_ms=policy.first_ms,
        factor=policy.factor,
        max_ms=policy.max_ms,
        give_up_after_ms=policy.give_up_after_ms,
    )


def registered_to_proto(
    registered: RegisteredDefinition, *, latest: bool
) -> types_pb2.RegisteredDefinition:
    """A registered definition. `latest`: a start that names no version gets this one."""
    return types_pb2.RegisteredDefinition(
        definition=definition_to_proto(registered.definition),
        content_hash=registered.content_hash,
        version=registered.version,
        registered_at_ms=registered.registered_at_ms,
        latest=latest,
    )


# -- sagas -----------------------------------------------------------------------------------------

_STATES_OUT: Final = {
    SagaState.RUNNING: types_pb2.SAGA_STATE_RUNNING,
    SagaState.COMPENSATING: types_pb2.SAGA_STATE_COMPENSATING,
    SagaState.STUCK: types_pb2.SAGA_STATE_STUCK,
    SagaState.COMPLETED: types_pb2.SAGA_STATE_COMPLETED,
    SagaState.COMPENSATED: types_pb2.SAGA_STATE_COMPENSATED,
    SagaState.ABANDONED: types_pb2.SAGA_STATE_ABANDONED,
    SagaState.MIXED: types_pb2.SAGA_STATE_MIXED,
}
_STATES: Final[dict[int, SagaState]] = {number: state for state, number in _STATES_OUT.items()}
_STEP_STATES_OUT: Final = {
    StepStatus.PENDING: types_pb2.STEP_STATE_PENDING,
    StepStatus.EXECUTING: types_pb2.STEP_STATE_EXECUTING,
    StepStatus.EXECUTED: types_pb2.STEP_STATE_EXECUTED,
    StepStatus.REJECTED: types_pb2.STEP_STATE_REJECTED,
    StepStatus.UNKNOWN: types_pb2.STEP_STATE_UNKNOWN,
    StepStatus.COMPENSATING: types_pb2.STEP_STATE_COMPENSATING,
    StepStatus.COMPENSATED: types_pb2.STEP_STATE_COMPENSATED,
    StepStatus.STUCK: types_pb2.STEP_STATE_STUCK,
}
_VERBS_OUT: Final = {
    Verb.PREPARE: types_pb2.VERB_PREPARE,
    Verb.EXECUTE: types_pb2.VERB_EXECUTE,
    Verb.COMPENSATE: types_pb2.VERB_COMPENSATE,
}
_CAUSES_OUT: Final = {
    TurnCause.REJECTED: types_pb2.TURN_CAUSE_REJECTED,
    TurnCause.GAVE_UP: types_pb2.TURN_CAUSE_GAVE_UP,
    TurnCause.DEADLINE: types_pb2.TURN_CAUSE_DEADLINE,
    TurnCause.CANCELLED: types_pb2.TURN_CAUSE_CANCELLED,
}


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
    message.state = _STATES_OUT[SagaState.STUCK if view.quarantined else saga.state]
    message.version = view.version
    message.started_at_ms = saga.started_at_ms
    message.updated_at_ms = saga.updated_at_ms
    if saga.ended_at_ms:
        message.ended_at_ms = saga.ended_at_ms
    if saga.deadline_at_ms:
        message.deadline_at_ms = saga.deadline_at_ms
    if saga.turn is not None:
        message.turn.CopyFrom(_turn_to_proto(saga.turn, _turn_step(view.plan, saga.turn)))
    if saga.labels:
        message.labels.update(saga.labels)
    if saga.past_no_return:
        message.past_no_return = True


def put_contents(message: types_pb2.Saga, view: SagaView) -> None:
    """Fills in the rest: its input, and its steps with their results."""
    saga = view.saga
    _put_payload(message.input, saga.input)
    for step, state in zip(view.plan.steps, saga.steps, strict=True):
        _put_step(message.steps.add(), step.name, state)


def _put_step(message: types_pb2.StepStatus, name: str, step: StepState) -> None:
    message.name = name
    message.state = _STEP_STATES_OUT[step.status]
    message.verb = _VERBS_OUT[step.verb]
    if step.round:
        message.round = step.round
        message.attempt = step.attempt
    if step.failure is not None:
        message.last_error.CopyFrom(_failure_to_proto(step.failure))
    if step.retry_at_ms:
        message.next_attempt_at_ms = step.retry_at_ms
    if step.stuck_since_ms:
        message.stuck_since_ms = step.stuck_since_ms
    if step.result is not None:
        _put_payload(message.result, step.result)
    if step.open:
        message.call_open = True


def _put_payload(message: types_pb2.Payload, payload: Payload) -> None:
    message.data = payload.data
    message.content_type = payload.content_type


def summary_to_proto(summary: SagaSummary) -> types_pb2.Saga:
    """A saga's row in a list: no payloads, nothing per step."""
    return types_pb2.Saga(
        saga_id=summary.saga_id,
        definition=summary.definition_name,
        definition_hash=summary.definition_hash,
        state=_STATES_OUT[summary.state],
        version=summary.version,
        started_at_ms=summary.started_at_ms,
        updated_at_ms=summary.updated_at_ms,
        ended_at_ms=summary.ended_at_ms,
        deadline_at_ms=summary.deadline_at_ms,
        labels=summary.labels,
        past_no_return=summary.past_no_return,
    )


def _failure_to_proto(failure: Failure) -> types_pb2.Error:
    return types_pb2.Error(reason=failure.reason, message=failure.message)


def _turn_to_proto(turn: SagaTurnedBack, step_name: str) -> types_pb2.Turn:
    return types_pb2.Turn(
        cause=_CAUSES_OUT[turn.cause],
        step=step_name,
        error=_failure_to_proto(turn.failure),
        at_ms=turn.at_ms,
    )


def _turn_step(plan: Plan, turn: SagaTurnedBack) -> str:
    return "" if turn.step is None else plan.steps[turn.step].name


# -- history ---------------------------------------------------------------------------------------


def record_to_proto(plan: Plan, seq: int, version: int, record: Record) -> types_pb2.Record:
    """One persisted fact. `seq` and `version` are those of the turn that it belongs to."""
    message = types_pb2.Record(seq=seq, version=version, at_ms=record.at_ms)
    match record:
        case SagaStarted():
            message.saga_started.CopyFrom(_saga_started(record))
        case AttemptStarted():
            message.attempt_started.CopyFrom(
                types_pb2.AttemptStarted(key=_attempt_key(plan, record), epoch=record.epoch)
            )
        case StepExecuted():
            message.step_executed.CopyFrom(
                types_pb2.StepExecuted(
                    key=_key(plan, record, Verb.EXECUTE),
                    timing=_timing_to_proto(record.timing),
                    result=payload_to_proto(record.result),
                )
            )
        case StepRejected():
            message.step_rejected.CopyFrom(
                types_pb2.StepRejected(
                    key=_key(plan, record, Verb.EXECUTE),
                    timing=_timing_to_proto(record.timing),
                    error=_failure_to_proto(record.failure),
                )
            )
        case StepCompensated():
            message.step_compensated.CopyFrom(
                types_pb2.StepCompensated(
                    key=_key(plan, record, Verb.COMPENSATE),
                    timing=_timing_to_proto(record.timing),
                )
            )
        case AttemptFailed():
            message.attempt_failed.CopyFrom(_attempt_failed(plan, record))
        case AttemptLost():
            message.attempt_lost.CopyFrom(
                types_pb2.AttemptLost(key=_attempt_key(plan, record), epoch=record.epoch)
            )
        case AttemptWithdrawn():
            message.attempt_withdrawn.CopyFrom(
                types_pb2.AttemptWithdrawn(key=_attempt_key(plan, record))
            )
        case StepGivenUp():
            message.step_given_up.CopyFrom(
                types_pb2.StepGivenUp(step=plan.steps[record.step].name, spent_ms=record.spent_ms)
            )
        case StepStuck():
            message.step_stuck.CopyFrom(
                types_pb2.StepStuck(
                    step=plan.steps[record.step].name,
                    verb=_VERBS_OUT[record.verb],
                    error=_failure_to_proto(record.failure),
                )
            )
        case CancelRequested():
            message.cancel_requested.CopyFrom(
                types_pb2.CancelRequested(author=record.author, reason=record.reason)
            )
        case SagaTurnedBack():
            message.saga_turned_back.CopyFrom(
                types_pb2.SagaTurnedBack(turn=_turn_to_proto(record, _turn_step(plan, record)))
            )
        case SagaEnded():
            message.saga_ended.CopyFrom(types_pb2.SagaEnded(state=_STATES_OUT[record.state]))
        case OperatorActed():
            message.operator_acted.CopyFrom(
                types_pb2.OperatorActed(
                    action=_ACTIONS_OUT[record.action],
                    step="" if record.step is None else plan.steps[record.step].name,
                    author=record.author,
                    reason=record.reason,
                    round=record.round,
                )
            )
        case _:
            assert_never(record)
    return message


_ACTIONS_OUT: Final = {OperatorAction.RETRY: "retry", OperatorAction.ABANDON: "abandon"}


def _saga_started(record: SagaStarted) -> types_pb2.SagaStarted:
    return types_pb2.SagaStarted(
        definition=record.definition_name,
        definition_hash=record.definition_hash,
        input=payload_to_proto(record.input),
        deadline_at_ms=record.deadline_at_ms,
        labels=record.labels,
        traceparent=record.traceparent,
    )


def _attempt_failed(plan: Plan, record: AttemptFailed) -> types_pb2.AttemptFailed:
    error = _failure_to_proto(record.failure)
    if record.misconfigured:
        error.metadata["misconfigured"] = "true"
    return types_pb2.AttemptFailed(
        key=_attempt_key(plan, record),
        timing=_timing_to_proto(record.timing),
        error=error,
        retry_at_ms=record.retry_at_ms,
        probe=record.probe,
    )


class _OfAttempt(Protocol):
    """A record that is about one attempt."""

    @property
    def step(self) -> int: ...
    @property
    def round(self) -> int: ...
    @property
    def attempt(self) -> int: ...


class _OfVerb(_OfAttempt, Protocol):
    """A record that is about one attempt and says of which verb."""

    @property
    def verb(self) -> Verb: ...


def _attempt_key(plan: Plan, record: _OfVerb) -> types_pb2.AttemptKey:
    return _key(plan, record, record.verb)


def _key(plan: Plan, record: _OfAttempt, verb: Verb) -> types_pb2.AttemptKey:
    return types_pb2.AttemptKey(
        step=plan.steps[record.step].name,
        verb=_VERBS_OUT[verb],
        round=record.round,
        attempt=record.attempt,
    )


def _timing_to_proto(timing: Timing) -> types_pb2.AttemptTiming:
    return types_pb2.AttemptTiming(
        held_ms=timing.held_ms,
        sent_at_ms=timing.sent_at_ms,
        answered_at_ms=timing.answered_at_ms,
        status=timing.status,
        polls=timing.polls,
    )


# -- calls and outcomes ----------------------------------------------------------------------------


def idempotency_key(identity: StoreIdentity, call: Call) -> str:
    """Same for every attempt of this verb, step and round, and different from every other."""
    verb = call.verb.name.lower()
    return f"{identity.store_id}/{call.saga_id}/{call.step_name}/{verb}/{call.round}"


def call_to_proto(
    call: Call, identity: StoreIdentity, deadline_at_ms: int, oldest_open_at_ms: int = 0
) -> participant_pb2.Call:
    """One attempt by itself; see `put_call`."""
    message = participant_pb2.Call()
    put_call(message, call, identity, deadline_at_ms, oldest_open_at_ms)
    return message


def put_call(
    message: participant_pb2.Call,
    call: Call,
    identity: StoreIdentity,
    deadline_at_ms: int,
    oldest_open_at_ms: int = 0,
) -> None:
    """Writes one attempt into a new message of a request.

    `deadline_at_ms` is when the runtime stops waiting for this attempt's reply; `oldest_open_at_ms`
    when the oldest saga that is still open was started, 0 if unknown.
    """
    _put_attempt(message, call)
    message.idempotency_key = idempotency_key(identity, call)
    message.store_id = identity.store_id
    message.epoch = identity.epoch
    message.deadline_at_ms = deadline_at_ms
    message.oldest_open_at_ms = oldest_open_at_ms
    message.incarnation = identity.incarnation
    message.participant = call.participant


def add_exchange_call(
    request: participant_pb2.ExchangeRequest, call_number: int, call: Call, left_ms: int
) -> participant_pb2.ExchangeCall:
    """One attempt more in a batch; what the stream has said once is left out.

    `left_ms` is how long its reply is waited for from now.
    """
    added = request.calls.add(call_number=call_number, timeout_ms=left_ms)
    _put_attempt(added.call, call)
    return added


def _put_attempt(message: participant_pb2.Call, call: Call) -> None:
    # Field by field, which takes a third of what nested constructors take: this is a hot path.
    message.saga_id = call.saga_id
    message.definition = call.definition_name
    message.step = call.step_name
    message.action = call.action
    message.verb = _VERBS_OUT[call.verb]
    message.round = call.round
    message.attempt = call.attempt
    message.mode = types_pb2.MODE_SAGA
    if call.traceparent:
        message.traceparent = call.traceparent
    if call.poll:
        message.poll = True
    payload, source = message.input, call.input
    payload.data = source.data
    payload.content_type = source.content_type
    for name, result in call.results:
        payload = message.results.add(step=name).result
        payload.data = result.data
        payload.content_type = result.content_type
    if call.verb is Verb.COMPENSATE:
        message.compensation.CopyFrom(_compensation(call))


def _compensation(call: Call) -> participant_pb2.Compensation:
    return participant_pb2.Compensation(
        executed=call.executed,
        result=None if call.own_result is None else payload_to_proto(call.own_result),
        turn=None if call.turn is None else _turn_to_proto(call.turn, call.turn_step_name),
    )


def outcome_from_proto(
    message: participant_pb2.Outcome, verb: Verb, max_result_bytes: int = MAX_PAYLOAD_BYTES
) -> Outcome:
    """What a participant says of an attempt of `verb`. Never fails: nonsense is an unknown outcome.

    Foreign texts are cut to the limits above and rid of control characters, for they end up in
    histories, logs and terminals. A result of Compensate has no reader and is dropped.
    """
    kind = message.WhichOneof("outcome")
    if kind == "done":
        if verb is Verb.COMPENSATE:
            return Done()
        return _done(message.done.result, max_result_bytes)
    if kind == "rejected":
        return Rejected(_reason(message.rejected.reason), _message(message.rejected.message))
    if kind == "in_progress":
        after_ms = message.in_progress.poll_after_ms
        return InProgress(min(after_ms if after_ms > 0 else UNSAID_POLL_MS, PROGRESS_LIMIT_MS))
    if kind == "broken":
        return Broken(_reason(message.broken.reason), _message(message.broken.message))
    if kind == "heuristic":
        alone = message.heuristic
        return Heuristic(alone.committed, _reason(alone.reason), _message(alone.message))
    return Unknown(
        "NO_OUTCOME",
        "the participant answered OK without an outcome: it must set done, rejected, in_progress"
        " or broken",
        misconfigured=True,
    )


def _done(result: types_pb2.Payload, max_bytes: int) -> Done | Unknown:
    size = len(result.data)
    if size > max_bytes:
        return Unknown(
            "RESULT_TOO_LARGE",
            f"the participant's result has {size} bytes, and {max_bytes} are the most:"
            " return a reference instead of the content",
            misconfigured=True,
        )
    size = len(result.content_type.encode())
    if size > MAX_CONTENT_TYPE_BYTES:
        return Unknown(
            "CONTENT_TYPE_TOO_LONG",
            f"the content type of the participant's result has {size} bytes,"
            f" and {MAX_CONTENT_TYPE_BYTES} are the most",
            misconfigured=True,
        )
    return Done(payload_from_proto(result))


def _reason(text: str) -> str:
    return _bounded(text, MAX_OUTCOME_REASON_CHARS) or "UNSPECIFIED"


def _message(text: str) -> str:
    return _bounded(text, MAX_OUTCOME_MESSAGE_CHARS)


def _bounded(text: str, limit: int) -> str:
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if not text.isprintable():
        text = "".join(map(_printable, text))
    return text


def _printable(char: str) -> str:
    if char.isprintable() or char == "\n":
        return char
    return " " if char.isspace() else "\N{REPLACEMENT CHARACTER}"


# -- participants ----------------------------------------------------------------------------------

_BREAKER_STATES_OUT: Final = {
    BreakerState.CLOSED: operator_pb2.BREAKER_STATE_CLOSED,
    BreakerState.OPEN: operator_pb2.BREAKER_STATE_OPEN,
    BreakerState.HALF_OPEN: operator_pb2.BREAKER_STATE_HALF_OPEN,
}


def participant_to_proto(lane: LaneView, configured_address: str = "") -> operator_pb2.Participant:
    """A participant with its lane and breaker, and where the configuration has it."""
    if not lane.address:
        source = operator_pb2.PARTICIPANT_SOURCE_UNSPECIFIED
    elif lane.by_operator:
        source = operator_pb2.PARTICIPANT_SOURCE_OPERATOR
    else:
        source = operator_pb2.PARTICIPANT_SOURCE_CONFIGURATION
    return operator_pb2.Participant(
        name=lane.name,
        address=lane.address,
        configured_address=configured_address,
        source=source,
        breaker=breaker_to_proto(lane.name, lane.breaker),
        calls_in_flight=lane.in_flight,
        calls_waiting=lane.waiting,
        concurrency_limit=lane.limit,
        transport=lane.transport,
        last_error=lane.last_error,
    )


def breaker_to_proto(participant: str, breaker: Breaker) -> operator_pb2.Breaker:
    """A participant's breaker."""
    return operator_pb2.Breaker(
        participant=participant,
        state=_BREAKER_STATES_OUT[breaker.state],
        consecutive_failures=breaker.failures,
        since_ms=breaker.since_ms,
        next_probe_at_ms=breaker.probe_at_ms,
    )
