"""Observers: who is told of what became durable, and how several of them become one."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.records import (
    AttemptFailed,
    OperatorActed,
    Record,
    SagaEnded,
    SagaStarted,
    SagaTurnedBack,
    StepStuck,
    Verb,
)
from amends_runtime.ports import Observer

__all__ = ["HistoryLog", "Observers"]


class Observers:
    """Tells each of several observers. One that raises is logged and does not harm the others."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)
        self._log = structlog.get_logger(__name__)

    def turn_committed(
        self, saga_id: str, version: int, records: Sequence[Record], steps: Sequence[str]
    ) -> None:
        """These records are durable."""
        for observer in self._observers:
            try:
                observer.turn_committed(saga_id, version, records, steps)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(observer)

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """One commit of so many transitions took so long."""
        for observer in self._observers:
            try:
                observer.batch_committed(transitions, seconds)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(observer)

    def breaker_changed(self, participant: str, state: BreakerState) -> None:
        """A participant's breaker is in another state now."""
        for observer in self._observers:
            try:
                observer.breaker_changed(participant, state)
            except Exception:  # noqa: BLE001  # an onlooker's bug is not the saga's
                self._failed(observer)

    def _failed(self, observer: Observer) -> None:
        self._log.exception("observer_failed", observer=type(observer).__name__)


class HistoryLog:
    """Writes what an operator would want to have read: stuck steps as errors, the rest at debug."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("amends_runtime.history")

    def turn_committed(
        self, saga_id: str, version: int, records: Sequence[Record], steps: Sequence[str]
    ) -> None:
        """Logs the facts that change what a saga does; ids and reasons only."""
        for record in records:
            if isinstance(record, StepStuck):
                self._log.error(
                    "step_stuck",
                    saga_id=saga_id,
                    step=steps[record.step],
                    verb=record.verb.name,
                    reason=record.failure.reason,
                    hint=_hint(saga_id, record.verb),
                )
            elif isinstance(record, SagaTurnedBack):
                self._log.info(
                    "saga_turned_back",
                    saga_id=saga_id,
                    cause=record.cause.name,
                    step=None if record.step is None else steps[record.step],
                    reason=record.failure.reason,
                )
            elif isinstance(record, OperatorActed):
                self._log.info(
                    "operator_acted",
                    saga_id=saga_id,
                    action=record.action.name,
                    step=None if record.step is None else steps[record.step],
                    author=record.author,
                )
            elif isinstance(record, AttemptFailed):
                self._log.debug(
                    "attempt_failed",
                    saga_id=saga_id,
                    step=steps[record.step],
                    verb=record.verb.name,
                    attempt=record.attempt,
                    reason=record.failure.reason,
                )
            elif isinstance(record, SagaEnded):
                self._log.debug("saga_ended", saga_id=saga_id, state=record.state.name)
            elif isinstance(record, SagaStarted):
                self._log.debug("saga_started", saga_id=saga_id, definition=record.definition_name)

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """Commits are counted, not logged."""

    def breaker_changed(self, participant: str, state: BreakerState) -> None:
        """The lane has logged it with what it knows besides."""


def _hint(saga_id: str, verb: Verb) -> str:
    """What whoever reads the log can do about a stuck step."""
    shows = f"amends get {saga_id} shows why"
    retries = f"amends retry {saga_id} tries again"
    if verb is Verb.COMPENSATE:
        return f"{shows}; {retries}"
    return f"{shows}; {retries}, and amends cancel {saga_id} turns it back before its pivot"
