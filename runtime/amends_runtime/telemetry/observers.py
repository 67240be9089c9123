"""Observers: who is told of what became durable, and how several of them become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any, Final

import structlog

from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    Verb,
    VoteRefused,
)
from amends_runtime.core.saga import Phase, Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.ports import Observer

__all__ = ["HistoryLog", "Observers"]


class Observers:
    """Tells each of several observers. One that raises is logged and does not harm the others."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)
        self._turn_committed = tuple(one.turn_committed for one in observers)  # asked every turn
        self._log = structlog.get_logger(__name__)

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """These records are durable."""
        for number, tell in enumerate(self._turn_committed):
            try:
                tell(plan, before, saga, records)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(self._observers[number])

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """One commit of so many transitions took so long."""
        for observer in self._observers:
            try:
                observer.batch_committed(transitions, seconds)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(observer)

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """A participant's breaker is in another state now."""
        for observer in self._observers:
            try:
                observer.breaker_changed(participant, before, state)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(observer)

    def _failed(self, observer: Observer) -> None:
        self._log.exception("observer_failed", observer=type(observer).__name__)


class HistoryLog:
    """Writes down what sagas do: what a person has to see to, what they decided, and in detail all.

    Ids, states, numbers, and words for programs; never a payload, nor what a participant or a
    person said in words of their own. `in_detail` has each saga's course at debug; without, nothing
    is made ready for lines that nobody reads. docs/logs.md describes every line.
    """

    def __init__(self, tracing: Tracing, *, in_detail: bool = False) -> None:
        self._log = structlog.get_logger("amends_runtime.history")
        self._tracing = tracing
        self._lines = _IN_DETAIL if in_detail else _ALWAYS

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """Writes a line for each record that has one."""
        for record in records:
            make = self._lines.get(type(record))
            line = make(saga, record) if make is not None else None
            if line is not None:
                level, event, fields = line
                step = getattr(record, "step", None)
                if step is not None:
                    fields = {"step": plan.step_names[step], **fields}
                trace_id = self._tracing.trace_id(saga.saga_id, saga.traceparent)
                self._log.log(level, event, saga_id=saga.saga_id, trace_id=trace_id, **fields)

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """Commits are counted, not logged."""

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """The lane has logged it with what it knows besides."""


# -- the lines, by record --------------------------------------------------------------------------

_Fields = dict[str, object]
_Line = tuple[int, str, _Fields]  # its level, its event, and what it has besides the ids
_Answered = (
    StepExecuted
    | StepRejected
    | StepCompensated
    | StepPrepared
    | VoteRefused
    | HeuristicReported
    | AttemptFailed
)
_OfAttempt = _Answered | AttemptLost | AttemptWithdrawn
_Lines = Mapping[type, Callable[[Saga, Any], _Line | None]]


def _stuck(saga: Saga, record: StepStuck) -> _Line:
    fields: _Fields = {"verb": record.verb.name, "reason": record.failure.reason}
    if saga.round:
        hint = f"it goes on being asked; amends get {saga.saga_id} shows why it does not answer"
        return WARNING, "branch_needs_operator", {**fields, "hint": hint}
    return ERROR, "step_stuck", {**fields, "hint": _hint(saga, record.verb)}


def _given_up(saga: Saga, record: StepGivenUp) -> _Line:
    return WARNING, "step_given_up", {"spent_ms": record.spent_ms}


def _heuristic(saga: Saga, record: HeuristicReported) -> _Line:
    decision = "COMMIT" if record.verb is Verb.EXECUTE else "ABORT"
    fields: _Fields = {**_answered(record), "decision": decision, "did": _DID[record.committed]}
    fields |= {"reason": record.failure.reason}
    if fields["did"] == decision:
        return WARNING, "heuristic_reported", {**fields, "hint": "nothing to settle this time"}
    hint = f"settle it by hand; amends get {saga.saga_id} shows what the participant says"
    return ERROR, "heuristic_reported", {**fields, "hint": hint}


_DID: Final = {True: "COMMIT", False: "ABORT", None: "UNKNOWN"}


def _mixed(saga: Saga, record: SagaEnded) -> _Line | None:
    if record.state is not SagaState.MIXED:
        return None
    decision = None if saga.decision is None else saga.decision.name
    hint = "heuristic_reported names the branches that did something else: settle them by hand"
    return ERROR, "saga_mixed", {"decision": decision, "hint": hint}


def _turned_back(saga: Saga, record: SagaTurnedBack) -> _Line:
    fields: _Fields = {"cause": record.cause.name, "reason": record.failure.reason}
    return INFO, "saga_turned_back", fields


def _cancel_requested(saga: Saga, record: CancelRequested) -> _Line:
    return INFO, "cancel_requested", {"author": record.author}


def _operated(saga: Saga, record: OperatorActed) -> _Line:
    return INFO, "operator_acted", {"action": record.action.name, "author": record.author}


def _started(saga: Saga, record: SagaStarted) -> _Line:
    return DEBUG, "saga_started", {"definition": record.definition_name}


def _ended(saga: Saga, record: SagaEnded) -> _Line:
    mixed = _mixed(saga, record)
    if mixed is not None:
        return mixed
    return DEBUG, "saga_ended", {"state": record.state.name}


def _executed(saga: Saga, record: StepExecuted) -> _Line | None:
    if record.failure is not None:
        return _left_out(saga, record)
    return DEBUG, "step_executed", _answered(record)


def _left_out(saga: Saga, record: StepExecuted) -> _Line | None:
    if record.failure is None:
        return None
    hint = f"it is committed; amends get {saga.saga_id} shows how large its result was"
    fields: _Fields = {**_answered(record), "reason": record.failure.reason, "hint": hint}
    return WARNING, "result_left_out", fields


def _rejected(saga: Saga, record: StepRejected) -> _Line:
    return DEBUG, "step_rejected", {**_answered(record), "reason": record.failure.reason}


def _compensated(saga: Saga, record: StepCompensated) -> _Line:
    return DEBUG, "step_compensated", _answered(record)


def _prepared(saga: Saga, record: StepPrepared) -> _Line:
    return DEBUG, "step_prepared", _answered(record)


def _vote_refused(saga: Saga, record: VoteRefused) -> _Line:
    return DEBUG, "vote_refused", {**_answered(record), "reason": record.failure.reason}


def _decided(saga: Saga, record: DecisionMade) -> _Line:
    fields: _Fields = {"decision": record.decision.name, "round": record.round}
    if record.decision is CommitDecision.ABORT:
        cause = None if record.cause is None else record.cause.name
        fields |= {"cause": cause, "reason": record.failure.reason}
    return DEBUG, "decision_made", fields


def _another_round(saga: Saga, record: RoundPlanned) -> _Line:
    wait_ms = record.starts_at_ms - record.at_ms
    return DEBUG, "round_planned", {"round": record.round, "wait_ms": wait_ms}


def _attempt_failed(saga: Saga, record: AttemptFailed) -> _Line:
    fields = {**_answered(record), "reason": record.failure.reason, "probe": record.probe}
    return DEBUG, "attempt_failed", fields


def _attempt_lost(saga: Saga, record: AttemptLost) -> _Line:
    return DEBUG, "attempt_lost", {**_attempt(record), "epoch": record.epoch}


def _attempt_withdrawn(saga: Saga, record: AttemptWithdrawn) -> _Line:
    return DEBUG, "attempt_withdrawn", _attempt(record)


_ALWAYS: Final[_Lines] = {
    StepStuck: _stuck,
    StepGivenUp: _given_up,
    SagaTurnedBack: _turned_back,
    CancelRequested: _cancel_requested,
    OperatorActed: _operated,
    HeuristicReported: _heuristic,
    StepExecuted: _left_out,
    SagaEnded: _mixed,
}
_IN_DETAIL: Final[_Lines] = {
    **_ALWAYS,
    SagaStarted: _started,
    SagaEnded: _ended,
    StepExecuted: _executed,
    StepRejected: _rejected,
    StepCompensated: _compensated,
    StepPrepared: _prepared,
    VoteRefused: _vote_refused,
    DecisionMade: _decided,
    RoundPlanned: _another_round,
    AttemptFailed: _attempt_failed,
    AttemptLost: _attempt_lost,
    AttemptWithdrawn: _attempt_withdrawn,
}


def _answered(record: _Answered) -> _Fields:
    timing = record.timing
    took_ms = timing.answered_at_ms - timing.sent_at_ms
    return {**_attempt(record), "status": timing.status, "took_ms": took_ms, "polls": timing.polls}


def _attempt(record: _OfAttempt) -> _Fields:
    return {"verb": record.verb.name, "round": record.round, "attempt": record.attempt}


def _hint(saga: Saga, verb: Verb) -> str:
    """What whoever reads the log can do about a stuck step: only what can work."""
    saga_id = saga.saga_id
    hint = f"amends get {saga_id} shows why; amends retry {saga_id} tries again"
    may_turn_back = saga.phase is Phase.FORWARD and not saga.past_no_return
    if verb is Verb.COMPENSATE or not may_turn_back:
        return hint
    return f"{hint}, and amends cancel {saga_id} turns it back"
