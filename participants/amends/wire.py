"""The only translation between the contract's messages and what handlers see."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from amends.outcomes import (
    Broken,
    Call,
    Cause,
    Done,
    InProgress,
    Outcome,
    Reason,
    Rejected,
    Verb,
)
from amends.payload import from_wire, to_wire
from amends.v1 import participant_pb2, types_pb2

VERBS: Final[dict[int, Verb]] = {
    types_pb2.VERB_PREPARE: Verb.PREPARE,
    types_pb2.VERB_EXECUTE: Verb.EXECUTE,
    types_pb2.VERB_COMPENSATE: Verb.COMPENSATE,
}

_CAUSES: Final[dict[int, Cause]] = {
    types_pb2.TURN_CAUSE_REJECTED: Cause.REJECTED,
    types_pb2.TURN_CAUSE_GAVE_UP: Cause.GAVE_UP,
    types_pb2.TURN_CAUSE_DEADLINE: Cause.DEADLINE,
    types_pb2.TURN_CAUSE_CANCELLED: Cause.CANCELLED,
    types_pb2.TURN_CAUSE_WAIT_TIMED_OUT: Cause.WAIT_TIMED_OUT,
    types_pb2.TURN_CAUSE_CHILD_COMPENSATED: Cause.CHILD_COMPENSATED,
}

MIN_POLL_MS: Final = 1
MAX_POLL_MS: Final = 24 * 60 * 60 * 1000
"""A day: the runtime takes longer progress for unknown."""


def faults_in_call(message: participant_pb2.Call, verb: Verb) -> list[str]:
    """List everything that keeps a call from being understood as a call of `verb`."""
    faults = [
        f"call.{name} is missing"
        for name, value in [
            ("idempotency_key", message.idempotency_key),
            ("store_id", message.store_id),
            ("saga_id", message.saga_id),
            ("step", message.step),
            ("action", message.action),
        ]
        if not value
    ]
    if VERBS.get(message.verb) is not verb:
        names = types_pb2.Verb.DESCRIPTOR.values_by_number
        got = names[message.verb].name if message.verb in names else str(int(message.verb))
        faults.append(f"call.verb is {got}, but the method called is {verb.capitalize()}")
    if message.round < 1:
        faults.append(f"call.round is {message.round}; rounds count from 1")
    if message.attempt < 1:
        faults.append(f"call.attempt is {message.attempt}; attempts count from 1")
    return faults


def call_from_wire(message: participant_pb2.Call) -> Call:
    """Translate a call that `faults_in_call` found nothing wrong with."""
    compensation = message.compensation
    return Call(
        verb=VERBS[message.verb],
        action=message.action,
        saga_id=message.saga_id,
        step=message.step,
        round=message.round,
        idempotency_key=message.idempotency_key,
        store_id=message.store_id,
        input=message.input.data,
        content_type=message.input.content_type,
        results=MappingProxyType({r.step: from_wire(r.result) for r in message.results}),
        executed=compensation.executed,
        own_result=from_wire(compensation.result) if compensation.HasField("result") else None,
        reason=_reason(compensation.turn) if compensation.HasField("turn") else None,
        attempt=message.attempt,
        poll=message.poll,
        deadline_at_ms=message.deadline_at_ms,
        epoch=message.epoch,
        definition=message.definition,
        two_phase=message.mode == types_pb2.MODE_TWO_PHASE_COMMIT,
        traceparent=message.traceparent,
        tracestate=message.tracestate,
        incarnation=message.incarnation,
        oldest_open_at_ms=message.oldest_open_at_ms,
    )


def _reason(turn: types_pb2.Turn) -> Reason:
    cause = _CAUSES.get(turn.cause, Cause.UNSPECIFIED)
    return Reason(cause, turn.step, turn.error.reason, turn.error.message)


def outcome_to_wire(outcome: Outcome) -> participant_pb2.Outcome:
    """Give the message of the contract; the barrier stores the same bytes."""
    match outcome:
        case Done(result=result):
            message = None if result is None else to_wire(result)
            return participant_pb2.Outcome(done=participant_pb2.Done(result=message))
        case Rejected(reason=reason, message=message):
            return participant_pb2.Outcome(
                rejected=participant_pb2.Rejected(reason=reason, message=message)
            )
        case InProgress(after_s=after_s):
            after_ms = min(max(round(after_s * 1000), MIN_POLL_MS), MAX_POLL_MS)
            return participant_pb2.Outcome(
                in_progress=participant_pb2.InProgress(poll_after_ms=after_ms)
            )
        case Broken(reason=reason, message=message):
            return participant_pb2.Outcome(
                broken=participant_pb2.Broken(reason=reason, message=message)
            )


def outcome_from_wire(message: participant_pb2.Outcome) -> Outcome:
    """Read an outcome that `outcome_to_wire` wrote."""
    kind = message.WhichOneof("outcome")
    match kind:
        case "done":
            done = message.done
            return Done(from_wire(done.result) if done.HasField("result") else None)
        case "rejected":
            return Rejected(message.rejected.reason, message.rejected.message)
        case "in_progress":
            return InProgress(message.in_progress.poll_after_ms / 1000)
        case "broken":
            return Broken(message.broken.reason, message.broken.message)
        case _:
            raise ValueError(f"an outcome of kind {kind!r} is not one that the SDK writes")
