"""Calls out, outcomes in. Nonsense from a participant is an unknown outcome."""

from __future__ import annotations

from typing import Final

from amends.v1 import participant_pb2, types_pb2
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Unknown,
)
from amends_runtime.core.records import Failure, Verb
from amends_runtime.core.saga import PROGRESS_LIMIT_MS
from amends_runtime.ports import Call, StoreIdentity
from amends_runtime.wire.nouns import VERBS_OUT, turn_to_proto
from amends_runtime.wire.payloads import (
    MAX_CONTENT_TYPE_BYTES,
    MAX_PAYLOAD_BYTES,
    payload_from_proto,
    payload_to_proto,
)

__all__ = [
    "MAX_OUTCOME_MESSAGE_CHARS",
    "MAX_OUTCOME_REASON_CHARS",
    "add_exchange_call",
    "call_to_proto",
    "idempotency_key",
    "outcome_from_proto",
    "put_call",
]

UNSAID_POLL_MS: Final = 1000
"""When to ask again who says InProgress and not when, or a time that has passed."""
MAX_OUTCOME_REASON_CHARS: Final = 128
"""What a program compares. With the message it lands in the history at every failed attempt."""
MAX_OUTCOME_MESSAGE_CHARS: Final = 1024
"""A few sentences for people; a stack trace belongs into the participant's own log."""


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


_SAGA: Final = types_pb2.MODE_SAGA  # bound once, for they are read for every call
_TWO_PHASE: Final = types_pb2.MODE_TWO_PHASE_COMMIT


def _put_attempt(message: participant_pb2.Call, call: Call) -> None:
    # Field by field, which takes a third of what nested constructors take: this is a hot path.
    message.saga_id = call.saga_id
    message.definition = call.definition_name
    message.step = call.step_name
    message.action = call.action
    message.verb = VERBS_OUT[call.verb]
    message.round = call.round
    message.attempt = call.attempt
    message.mode = _TWO_PHASE if call.two_phase else _SAGA
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
        turn=None if call.turn is None else turn_to_proto(call.turn, call.turn_step_name),
    )


def outcome_from_proto(
    message: participant_pb2.Outcome,
    verb: Verb,
    max_result_bytes: int = MAX_PAYLOAD_BYTES,
    *,
    two_phase: bool = False,
) -> Outcome:
    """What a participant says of an attempt of `verb`. Never fails: nonsense is an unknown outcome.

    Foreign texts are cut to the limits above and rid of control characters, for they end up in
    histories, logs and terminals. A result of Compensate has no reader and is dropped. One of a
    commit that is too large is left out, and that is said: it is committed, and would be said again
    for ever.
    """
    kind = message.WhichOneof("outcome")
    if kind == "done":
        if verb is Verb.COMPENSATE:
            return Done()
        done = _done(message.done.result, max_result_bytes)
        is_commit = two_phase and verb is Verb.EXECUTE
        if is_commit and isinstance(done, Unknown):
            return Done(left_out=Failure(done.reason, done.message))
        return done
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
        "the participant answered OK without an outcome: it must set done, rejected, in_progress,"
        " broken or heuristic",
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
