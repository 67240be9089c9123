"""A saga's history, record by record."""

from __future__ import annotations

from typing import Final, Protocol, assert_never

from amends.v1 import types_pb2
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    Timing,
    Verb,
    VoteRefused,
)
from amends_runtime.wire.nouns import (
    DECISIONS_OUT,
    STATES_OUT,
    VERBS_OUT,
    failure_to_proto,
    turn_step,
    turn_to_proto,
)
from amends_runtime.wire.payloads import payload_to_proto

__all__ = ["record_to_proto"]


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
                    error=None if record.failure is None else failure_to_proto(record.failure),
                )
            )
        case StepRejected():
            message.step_rejected.CopyFrom(
                types_pb2.StepRejected(
                    key=_key(plan, record, Verb.EXECUTE),
                    timing=_timing_to_proto(record.timing),
                    error=failure_to_proto(record.failure),
                )
            )
        case StepPrepared():
            message.step_prepared.CopyFrom(
                types_pb2.StepPrepared(
                    key=_attempt_key(plan, record),
                    timing=_timing_to_proto(record.timing),
                    result=payload_to_proto(record.result),
                )
            )
        case VoteRefused():
            message.step_rejected.CopyFrom(
                types_pb2.StepRejected(
                    key=_attempt_key(plan, record),
                    timing=_timing_to_proto(record.timing),
                    error=failure_to_proto(record.failure),
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
                    verb=VERBS_OUT[record.verb],
                    error=failure_to_proto(record.failure),
                )
            )
        case CancelRequested():
            message.cancel_requested.CopyFrom(
                types_pb2.CancelRequested(author=record.author, reason=record.reason)
            )
        case SagaTurnedBack():
            message.saga_turned_back.CopyFrom(
                types_pb2.SagaTurnedBack(turn=turn_to_proto(record, turn_step(plan, record)))
            )
        case DecisionMade():
            message.decision_made.CopyFrom(_decision_made(plan, record))
        case HeuristicReported():
            message.heuristic_reported.CopyFrom(
                types_pb2.HeuristicReported(
                    key=_attempt_key(plan, record),
                    timing=_timing_to_proto(record.timing),
                    committed=record.committed,
                    error=failure_to_proto(record.failure),
                )
            )
        case RoundPlanned():
            message.round_planned.CopyFrom(
                types_pb2.RoundPlanned(round=record.round, starts_at_ms=record.starts_at_ms)
            )
        case SagaEnded():
            message.saga_ended.CopyFrom(types_pb2.SagaEnded(state=STATES_OUT[record.state]))
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


_ACTIONS_OUT: Final = {action: action.name.lower() for action in OperatorAction}


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
    error = failure_to_proto(record.failure)
    if record.misconfigured:
        error.metadata["misconfigured"] = "true"
    return types_pb2.AttemptFailed(
        key=_attempt_key(plan, record),
        timing=_timing_to_proto(record.timing),
        error=error,
        retry_at_ms=record.retry_at_ms,
        probe=record.probe,
    )


def _decision_made(plan: Plan, record: DecisionMade) -> types_pb2.DecisionMade:
    message = types_pb2.DecisionMade(decision=DECISIONS_OUT[record.decision], round=record.round)
    if record.cause is not None:
        turn = SagaTurnedBack(record.at_ms, record.cause, record.step, record.failure)
        message.turn.CopyFrom(turn_to_proto(turn, turn_step(plan, turn)))
    return message


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
        verb=VERBS_OUT[verb],
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
