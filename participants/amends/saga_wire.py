"""The only translation between the contract's messages and what a client sees."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from amends.definition import Definition
from amends.errors import InvalidDefinition, Violation
from amends.in_doubt import Decision
from amends.outcomes import Cause
from amends.payload import Payload, from_wire
from amends.sagas import (
    Abandoned,
    BreakerInfo,
    BreakerState,
    CancelDisposition,
    CancelResult,
    DefinitionDiff,
    Failure,
    ParticipantInfo,
    Record,
    RecordKind,
    RegisteredDefinition,
    RuntimeInfo,
    Saga,
    SagaState,
    Step,
    StepState,
    Timing,
    Trace,
    Turn,
    WatchEvent,
)
from amends.v1 import operator_pb2, saga_pb2, types_pb2
from amends.wire import VERBS

_Member = TypeVar("_Member", bound=enum.StrEnum)


def _by_number(names: Mapping[str, int], prefix: str, kind: type[_Member]) -> dict[int, _Member]:
    """Pair the contract's numbers with our members, by their common names."""
    return {
        number: kind[name.removeprefix(prefix)]
        for name, number in names.items()
        if name.removeprefix(prefix) in kind.__members__
    }


_SAGA_STATES: Final = _by_number(dict(types_pb2.SagaState.items()), "SAGA_STATE_", SagaState)
_STEP_STATES: Final = _by_number(dict(types_pb2.StepState.items()), "STEP_STATE_", StepState)
_CAUSES: Final = _by_number(dict(types_pb2.TurnCause.items()), "TURN_CAUSE_", Cause)
_ANSWERS: Final[dict[int, Decision]] = {
    types_pb2.COMMIT_DECISION_UNSPECIFIED: Decision.NOT_TWO_PHASE,
    types_pb2.COMMIT_DECISION_PENDING: Decision.PENDING,
    types_pb2.COMMIT_DECISION_COMMIT: Decision.COMMIT,
    types_pb2.COMMIT_DECISION_ABORT: Decision.ABORT,
    types_pb2.COMMIT_DECISION_UNKNOWN: Decision.UNKNOWN,
}
_BREAKER_STATES: Final = _by_number(
    dict(operator_pb2.BreakerState.items()), "BREAKER_STATE_", BreakerState
)
_DISPOSITIONS: Final = _by_number(
    dict(saga_pb2.CancelDisposition.items()), "CANCEL_DISPOSITION_", CancelDisposition
)
_KINDS: Final = {
    kind.name.lower(): kind for kind in RecordKind if kind is not RecordKind.UNRECOGNISED
}


def state_to_wire(state: SagaState) -> types_pb2.SagaState.ValueType:
    """Give a state's number, for a filter. Raises `ValueError` for `SagaState.UNRECOGNISED`."""
    return types_pb2.SagaState.Value(f"SAGA_STATE_{state}")


def saga_from_wire(message: types_pb2.Saga) -> Saga:
    """Give a saga, which is read as its fields are asked for; one of a list has no steps and input.

    It keeps a copy of the message: the message itself would keep all that arrived with it, such as
    a thousand other sagas and their payloads.
    """
    copied = types_pb2.Saga()
    copied.CopyFrom(message)
    saga = object.__new__(Saga)
    object.__setattr__(saga, "_source", partial(_read_field, copied))
    return saga


def with_input(saga: Saga, payload: Payload) -> Saga:
    """Let a saga that was just made by `saga_from_wire` have the input that was not told again."""
    object.__setattr__(saga, "input", payload)
    return saga


def _read_field(message: types_pb2.Saga, name: str) -> Any:  # of the field's type
    return SAGA_FIELDS[name](message)


SAGA_FIELDS: Final[Mapping[str, Callable[[types_pb2.Saga], Any]]] = {
    "saga_id": lambda message: message.saga_id,
    "definition": lambda message: message.definition,
    "definition_hash": lambda message: message.definition_hash,
    "state": lambda message: _SAGA_STATES.get(message.state, SagaState.UNRECOGNISED),
    "version": lambda message: message.version,
    "started_at_ms": lambda message: message.started_at_ms,
    "updated_at_ms": lambda message: message.updated_at_ms,
    "ended_at_ms": lambda message: message.ended_at_ms or None,
    "deadline_at_ms": lambda message: message.deadline_at_ms or None,
    "turn": lambda message: _turn(message.turn) if message.HasField("turn") else None,
    "steps": lambda message: tuple(_step(step) for step in message.steps),
    "input": lambda message: from_wire(message.input),
    "labels": lambda message: dict(message.labels),
    "paused": lambda message: message.paused,
    "past_no_return": lambda message: message.past_no_return,
    "parent_saga_id": lambda message: message.parent_saga_id or None,
    "decision": lambda message: _decided(message.decision) if message.decision else None,
    "round": lambda message: message.round,
}
"""How each field of `Saga` is read."""


def _step(message: types_pb2.StepStatus) -> Step:
    return Step(
        name=message.name,
        state=_STEP_STATES.get(message.state, StepState.UNRECOGNISED),
        verb=VERBS.get(message.verb),
        round=message.round,
        attempt=message.attempt,
        last_error=_failure(message.last_error) if message.HasField("last_error") else None,
        next_attempt_at_ms=message.next_attempt_at_ms or None,
        stuck_since_ms=message.stuck_since_ms or None,
        result=from_wire(message.result) if message.HasField("result") else None,
        call_open=message.call_open,
        prepared_at_ms=message.prepared_at_ms or None,
    )


def _turn(message: types_pb2.Turn) -> Turn:
    return Turn(
        cause=_CAUSES.get(message.cause, Cause.UNSPECIFIED),
        step=message.step,
        failure=_failure(message.error) if message.HasField("error") else None,
        at_ms=message.at_ms,
    )


def _failure(message: types_pb2.Error) -> Failure:
    return Failure(message.reason, message.message, dict(message.metadata))


def record_from_wire(message: types_pb2.Record) -> Record:
    """Read one record of a history."""
    name = message.WhichOneof("fact")
    if name is None or name not in _KINDS:
        fields: dict[str, Any] = {}
        kind = RecordKind.UNRECOGNISED
    else:
        fields = _fact(getattr(message, name))
        kind = _KINDS[name]
    return Record(
        seq=message.seq, version=message.version, at_ms=message.at_ms, kind=kind, **fields
    )


def _fact(fact: Any) -> dict[str, Any]:  # any of the oneof's messages
    """Read whatever fields of a fact are there; equal names have equal meanings in all facts."""
    fields: dict[str, Any] = {}
    for descriptor, value in fact.ListFields():
        match descriptor.name:
            case "key":
                fields |= {
                    "step": value.step,
                    "verb": VERBS.get(value.verb),
                    "round": value.round,
                    "attempt": value.attempt,
                }
            case "timing":
                fields["timing"] = _timing(value)
            case "error":
                fields["failure"] = _failure(value)
            case "turn":
                fields["turn"] = _turn(value)
            case "verb":
                fields["verb"] = VERBS.get(value)
            case "state":
                fields["state"] = _SAGA_STATES.get(value, SagaState.UNRECOGNISED)
            case "input":
                fields["input"] = from_wire(value)
            case "result" | "payload":
                fields["result"] = from_wire(value)
            case "labels":
                fields["labels"] = dict(value)
            case "spent_ms":
                fields["spent_s"] = value / 1000
            case "action" | "signal" | "child_saga_id":
                fields["detail"] = value
            case "decision":
                fields["decision"] = _decided(value)
            case "fired":
                fields["detail"] = descriptor.name  # proto3 lists only what is true
            case "committed" | "starts_at_ms":
                fields[descriptor.name] = value
            case "step" | "round" | "epoch" | "retry_at_ms" | "probe" | "author" | "reason":
                fields[descriptor.name] = value
            case "definition" | "definition_hash" | "deadline_at_ms":
                fields[descriptor.name] = value
            case _:
                pass
    return fields


def _timing(message: types_pb2.AttemptTiming) -> Timing:
    return Timing(
        message.sent_at_ms or None,
        message.answered_at_ms or None,
        message.status,
        message.polls,
        message.held_ms,
    )


def cancelled_from_wire(message: saga_pb2.CancelSagaResponse) -> CancelResult:
    """Read the answer to a request to cancel."""
    disposition = _DISPOSITIONS.get(message.disposition, CancelDisposition.UNRECOGNISED)
    return CancelResult(saga_from_wire(message.saga), disposition)


def decision_from_wire(message: saga_pb2.GetDecisionResponse) -> Decision:
    """Read the answer to a participant in doubt; what nobody knows here decides nothing."""
    return _decided(message.decision)


def _decided(number: int) -> Decision:
    return _ANSWERS.get(number, Decision.UNRECOGNISED)


def trace_from_wire(pages: Sequence[saga_pb2.GetTraceResponse]) -> Trace:
    """Read the pages of a saga's trace, at least one; their bytes joined are the whole."""
    first = pages[0]
    return Trace(
        trace_id=first.trace_id,
        sampled=first.sampled,
        traces_data=b"".join(page.traces_data for page in pages),
        spans=sum(page.spans for page in pages),
        open_spans=first.open_spans,
    )


def abandoned_from_wire(message: operator_pb2.AbandonSagaResponse) -> Abandoned:
    """Read the answer to abandoning a saga."""
    return Abandoned(saga_from_wire(message.saga), tuple(message.remaining_steps))


def watched_from_wire(message: saga_pb2.WatchSagasResponse) -> WatchEvent:
    """Read one event of a watch."""
    return WatchEvent(
        saga=saga_from_wire(message.saga) if message.HasField("saga") else None,
        records=tuple(map(record_from_wire, message.records)),
        resume_token=message.resume_token,
        lagged=message.lagged,
        purged_turns=message.purged_turns,
    )


def registered_from_wire(
    message: types_pb2.RegisteredDefinition, *, existed: bool = True
) -> RegisteredDefinition:
    """Read a registered definition; one that the SDK cannot express comes without content."""
    try:
        definition = Definition.from_proto(message.definition)
    except InvalidDefinition:
        definition = None
    return RegisteredDefinition(
        name=message.definition.name,
        content_hash=message.content_hash,
        version=message.version,
        registered_at_ms=message.registered_at_ms,
        latest=message.latest,
        definition=definition,
        existed=existed,
    )


def diff_from_wire(message: operator_pb2.DiffDefinitionResponse) -> DefinitionDiff:
    """Read how a definition differs."""
    return DefinitionDiff(
        same=message.same,
        differences=tuple(message.differences),
        violations=tuple(
            Violation(error.metadata.get("field", ""), error.message)
            for error in message.violations
        ),
    )


def participant_from_wire(message: operator_pb2.Participant) -> ParticipantInfo:
    """Read a participant."""
    return ParticipantInfo(
        name=message.name,
        address=message.address,
        by_operator=message.source == operator_pb2.PARTICIPANT_SOURCE_OPERATOR,
        breaker=breaker_from_wire(message.breaker),
        calls_in_flight=message.calls_in_flight,
        calls_waiting=message.calls_waiting,
        concurrency_limit=message.concurrency_limit,
        transport=message.transport,
        last_error=message.last_error,
        configured_address=message.configured_address,
    )


def breaker_from_wire(message: operator_pb2.Breaker) -> BreakerInfo:
    """Read a breaker."""
    return BreakerInfo(
        participant=message.participant,
        state=_BREAKER_STATES.get(message.state, BreakerState.UNRECOGNISED),
        consecutive_failures=message.consecutive_failures,
        since_ms=message.since_ms or None,
        next_probe_at_ms=message.next_probe_at_ms or None,
        held=message.held,
    )


def runtime_from_wire(message: operator_pb2.GetRuntimeResponse) -> RuntimeInfo:
    """Read what a runtime says of itself."""
    return RuntimeInfo(
        version=message.version,
        store_id=message.store_id,
        incarnation=message.incarnation,
        epoch=message.epoch,
        started_at_ms=message.started_at_ms,
        sagas=dict(message.sagas),
        without_wake_up=message.without_wake_up,
        restored=message.restored,
    )
