"""The only translation between the contract's messages and what handlers see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from amends.outcomes import (
    Broken,
    Call,
    Cause,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Reason,
    Rejected,
    Verb,
)
from amends.payload import Payload, from_wire
from amends.v1 import participant_pb2, types_pb2

VERBS: Final[dict[int, Verb]] = {
    types_pb2.VERB_PREPARE: Verb.PREPARE,
    types_pb2.VERB_EXECUTE: Verb.EXECUTE,
    types_pb2.VERB_COMPENSATE: Verb.COMPENSATE,
}

_WIRE_VERBS: Final = {
    Verb.PREPARE: types_pb2.VERB_PREPARE,
    Verb.EXECUTE: types_pb2.VERB_EXECUTE,
    Verb.COMPENSATE: types_pb2.VERB_COMPENSATE,
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


@dataclass(frozen=True, slots=True)
class Said:
    """What a stream says once for many calls, which then leave it out."""

    store_id: str
    epoch: int
    incarnation: str
    oldest_open_at_ms: int


def faults_in_call(
    message: participant_pb2.Call, verb: Verb | None, said: Said | None = None
) -> list[str]:
    """List everything that keeps a call from being understood as a call of `verb`.

    `said` is what its stream has said, whose calls need less; there `verb` is None if the message
    has none that is known.
    """
    if (
        message.saga_id
        and message.step
        and message.action
        and message.round >= 1
        and message.attempt >= 1
        and verb is not None
        and VERBS.get(message.verb) is verb
        and (said is not None or (message.idempotency_key and message.store_id))
    ):
        return []
    needed = [
        ("idempotency_key", said is not None or message.idempotency_key),
        ("store_id", said is not None or message.store_id),
        ("saga_id", message.saga_id),
        ("step", message.step),
        ("action", message.action),
    ]
    faults = [f"call.{name} is missing" for name, value in needed if not value]
    if verb is None or VERBS.get(message.verb) is not verb:
        names = types_pb2.Verb.DESCRIPTOR.values_by_number
        got = names[message.verb].name if message.verb in names else str(int(message.verb))
        wanted = "" if verb is None else f", but the method called is {verb.capitalize()}"
        faults.append(f"call.verb is {got}{wanted}")
    if message.round < 1:
        faults.append(f"call.round is {message.round}; rounds count from 1")
    if message.attempt < 1:
        faults.append(f"call.attempt is {message.attempt}; attempts count from 1")
    return faults


def call_from_wire(
    message: participant_pb2.Call, said: Said | None = None, deadline_at_ms: int = 0
) -> Call:
    """Translate a call that `faults_in_call` found nothing wrong with.

    `said` and `deadline_at_ms` stand for what a call of a stream leaves out.
    Read at once is what every call needs; the rest when the handler asks for it. Reading all of it
    here takes 5.5 µs, more than everything else that the SDK does for a call of a stream.
    """
    call = object.__new__(Call)
    _set(call, "verb", VERBS[message.verb])
    _set(call, "action", message.action)
    _set(call, "saga_id", message.saga_id)
    _set(call, "step", message.step)
    _set(call, "round", message.round)
    _set(call, "from_resolver", False)
    _set(call, "store_id", message.store_id or (said.store_id if said is not None else ""))
    if deadline_at_ms:
        _set(call, "deadline_at_ms", message.deadline_at_ms or deadline_at_ms)
    _set(call, "_rest", partial(_read, message, said))
    return call


def essentials_of(call: Call) -> bytes:
    """Give what phase 2 may ask of a vote's request, to be kept with what the vote has prepared.

    For `call_of_resolver`. All that an attempt has of its own is left out.
    """
    message = participant_pb2.Call(
        store_id=call.store_id,
        saga_id=call.saga_id,
        definition=call.definition,
        step=call.step,
        action=call.action,
        round=call.round,
        incarnation=call.incarnation,
        mode=types_pb2.MODE_TWO_PHASE_COMMIT,
    )
    message.input.data = call.input
    message.input.content_type = call.content_type
    for step, result in call.results.items():
        payload = types_pb2.Payload(data=result.data, content_type=result.content_type)
        message.results.add(step=step, result=payload)
    return message.SerializeToString()


def call_of_resolver(essentials: bytes, verb: Verb) -> Call:
    """Make the call by which a resolver carries a decision out; see `Call.from_resolver`."""
    message = participant_pb2.Call.FromString(essentials)
    message.verb = _WIRE_VERBS[verb]
    message.attempt = 1
    message.idempotency_key = (
        f"{message.store_id}/{message.saga_id}/{message.step}/{verb}/{message.round}"
    )
    call = call_from_wire(message)
    _set(call, "from_resolver", True)
    return call


# The call is frozen for its handler, not for who makes it.
_set: Final = object.__setattr__


def _read(message: participant_pb2.Call, said: Said | None, name: str) -> object:
    """Read one field of a call, by its name there."""
    value = _READ[name](message)
    if value or said is None:
        return value
    match name:
        case "idempotency_key":
            store_id = message.store_id or said.store_id
            verb = VERBS[message.verb]
            return f"{store_id}/{message.saga_id}/{message.step}/{verb}/{message.round}"
        case "epoch":
            return said.epoch
        case "incarnation":
            return said.incarnation
        case "oldest_open_at_ms":
            return said.oldest_open_at_ms
        case _:
            return value


def _results(message: participant_pb2.Call) -> Mapping[str, Payload]:
    return MappingProxyType({r.step: from_wire(r.result) for r in message.results})


def _own_result(message: participant_pb2.Call) -> Payload | None:
    compensation = message.compensation
    return from_wire(compensation.result) if compensation.HasField("result") else None


def _turn(message: participant_pb2.Call) -> Reason | None:
    compensation = message.compensation
    return _reason(compensation.turn) if compensation.HasField("turn") else None


_READ: Final[dict[str, Callable[[participant_pb2.Call], object]]] = {
    "idempotency_key": attrgetter("idempotency_key"),
    "input": attrgetter("input.data"),
    "content_type": attrgetter("input.content_type"),
    "results": _results,
    "executed": attrgetter("compensation.executed"),
    "own_result": _own_result,
    "reason": _turn,
    "attempt": attrgetter("attempt"),
    "poll": attrgetter("poll"),
    "deadline_at_ms": attrgetter("deadline_at_ms"),
    "epoch": attrgetter("epoch"),
    "definition": attrgetter("definition"),
    "two_phase": lambda message: message.mode == types_pb2.MODE_TWO_PHASE_COMMIT,
    "traceparent": attrgetter("traceparent"),
    "tracestate": attrgetter("tracestate"),
    "incarnation": attrgetter("incarnation"),
    "oldest_open_at_ms": attrgetter("oldest_open_at_ms"),
}


def _reason(turn: types_pb2.Turn) -> Reason:
    cause = _CAUSES.get(turn.cause, Cause.UNSPECIFIED)
    return Reason(cause, turn.step, turn.error.reason, turn.error.message)


def outcome_to_wire(outcome: Outcome) -> participant_pb2.Outcome:
    """Give the message of the contract; the barrier stores the same bytes."""
    message = participant_pb2.Outcome()
    put_outcome(outcome, message)
    return message


def put_outcome(outcome: Outcome, message: participant_pb2.Outcome) -> None:
    """Write an outcome into an empty message; filling it in place costs half of building it.

    Whatever it raises, the outcome is one that cannot be said, and the message is not to be sent.
    """
    match outcome:
        case Done(result=None):
            message.done.SetInParent()
        case Done(result=payload):
            assert payload is not None
            result = message.done.result
            result.SetInParent()  # of a payload without bytes, too, it is said that it is there
            result.data = payload.data
            result.content_type = payload.content_type
        case Rejected(reason=reason, message=text):
            rejected = message.rejected
            rejected.reason = reason
            rejected.message = text
            rejected.SetInParent()
        case InProgress(after_s=after_s):
            # Bounded before it is rounded: there are floats whose thousandfold is infinite.
            after_ms = max(round(min(after_s * 1000, MAX_POLL_MS)), MIN_POLL_MS)
            message.in_progress.poll_after_ms = after_ms
        case Broken(reason=reason, message=text):
            broken = message.broken
            broken.reason = reason
            broken.message = text
            broken.SetInParent()
        case Heuristic(committed=committed, reason=reason, message=text):
            heuristic = message.heuristic
            heuristic.committed = committed
            heuristic.reason = reason
            heuristic.message = text
            heuristic.SetInParent()
        case _:  # of an author's own kind, made without what its kind has
            raise TypeError(f"an outcome of type {type(outcome).__name__} says nothing")


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
        case "heuristic":
            said = message.heuristic
            return Heuristic(said.committed, said.reason, said.message)
        case _:
            raise ValueError(f"an outcome of kind {kind!r} is not one that the SDK writes")
