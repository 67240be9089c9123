"""What the rows of the database say, in the words of the ports; and what a row is to say.

Nothing here asks the database: whoever does hands over what it answered. The order of the columns
is that of the queries, each of which is named where its rows are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from amends_runtime.core.records import CommitDecision, Record, SagaState
from amends_runtime.errors import UnreadableSaga
from amends_runtime.ports import (
    LoadedSaga,
    OpenSaga,
    RestingSaga,
    SagaSummary,
    StoredTurn,
    Tombstone,
)
from amends_runtime.storage.batches import stored_definition
from amends_runtime.storage.codec import RecordCodec, decode_labels, encode_labels
from amends_runtime.storage.definitions import StoredDefinitions
from amends_runtime.storage.read_model import AfterTurn

__all__ = ["Rows"]

_log = structlog.get_logger(__name__)


class Rows:
    """Takes rows apart. `path` is the database's, for errors."""

    def __init__(self, path: Path, codec: RecordCodec, definitions: StoredDefinitions) -> None:
        self._path = path
        self._codec = codec
        self._definitions = definitions

    def loaded(self, rows: Iterable[Any]) -> dict[str, LoadedSaga | Tombstone]:
        """The rows of `load`, a saga's turns in order. Raises UnreadableSaga."""
        found: dict[str, LoadedSaga | Tombstone] = {}
        turns: dict[str, list[StoredTurn]] = {}
        sagas: dict[str, tuple[int, int, int]] = {}
        for saga_id, saga_no, definition_no, wake_at_ms, *turn_or_tombstone in rows:
            seq, version, row_format, data, *tombstone = turn_or_tombstone
            if saga_no is not None:
                self._check_history(saga_id, seq)
                sagas[saga_id] = (saga_no, definition_no, wake_at_ms)
                records = self._codec.decode(row_format, data, saga_id, version)
                turns.setdefault(saga_id, []).append(StoredTurn(seq, version, records))
            elif tombstone[0] is not None:
                hashed, state, ended_at_ms, decision, round_ = tombstone
                found[saga_id] = Tombstone(
                    saga_id,
                    hashed,
                    SagaState(state),
                    ended_at_ms,
                    CommitDecision(decision) if decision else None,
                    round_,
                )
        for saga_id, (saga_no, definition_no, wake_at_ms) in sagas.items():
            hashed = self._definitions.by_no[definition_no].content_hash
            found[saga_id] = LoadedSaga(saga_no, saga_id, hashed, tuple(turns[saga_id]), wake_at_ms)
        return found

    def open_sagas(self, rows: Iterable[Any]) -> list[OpenSaga]:
        """The rows of `open_sagas`."""
        return [
            OpenSaga(saga_no, saga_id, self._definitions.by_no[definition_no].content_hash)
            for saga_no, saga_id, definition_no in rows
        ]

    def resting_sagas(self, rows: Iterable[Any]) -> list[RestingSaga]:
        """The rows of `resting_sagas`."""
        return [
            RestingSaga(
                wake_at_ms,
                SagaState(state),
                saga_no,
                saga_id,
                self._definitions.by_no[definition_no].content_hash,
            )
            for wake_at_ms, state, saga_no, saga_id, definition_no in rows
        ]

    def summary(self, row: Sequence[Any]) -> SagaSummary:
        """A row of the read model, as lists have it."""
        registered = self._definitions.by_no[row[2]]
        return SagaSummary(
            saga_no=row[0],
            saga_id=row[1],
            definition_name=registered.definition.name,
            definition_hash=registered.content_hash,
            state=SagaState(row[3]),
            version=row[4],
            started_at_ms=row[5],
            updated_at_ms=row[6],
            ended_at_ms=row[7],
            deadline_at_ms=row[8],
            wake_at_ms=row[9],
            past_no_return=bool(row[10]),
            labels=decode_labels(row[11]),
        )

    def of_summary(self, summary: SagaSummary) -> tuple[Any, ...]:
        """The row that `insert_summaries` makes of this."""
        return (
            summary.saga_no,
            summary.version,
            summary.saga_id,
            stored_definition(summary, self._definitions.nos),
            int(summary.state),
            summary.started_at_ms,
            summary.updated_at_ms,
            summary.ended_at_ms,
            summary.deadline_at_ms,
            summary.wake_at_ms,
            int(summary.past_no_return),
            encode_labels(summary.labels),
        )

    def turns_by_no(self, rows: Iterable[Any]) -> dict[int, tuple[StoredTurn, ...]]:
        """The rows of `turns_of`, by the saga's number. Raises UnreadableSaga."""
        turns: dict[int, list[StoredTurn]] = {}
        for saga_no, seq, version, row_format, data in rows:
            records = self._codec.decode(row_format, data, f"no. {saga_no}", version)
            turns.setdefault(saga_no, []).append(StoredTurn(seq, version, records))
        return {saga_no: tuple(found) for saga_no, found in turns.items()}

    def after_turns(self, rows: Iterable[Any]) -> dict[int, tuple[AfterTurn, ...]]:
        """The rows of `after_turns`, by the saga's number."""
        kept: dict[int, list[AfterTurn]] = {}
        for saga_no, version, state, past in rows:
            after = AfterTurn(version, SagaState(state) if state else None, bool(past))
            kept.setdefault(saga_no, []).append(after)
        return {saga_no: tuple(found) for saga_no, found in kept.items()}

    def readable(
        self, row_format: int, data: bytes, saga_id: str, version: int
    ) -> tuple[Record, ...]:
        """The records of a turn; none where its row is damaged, for whoever watches goes on."""
        try:
            return self._codec.decode(row_format, data, saga_id, version)
        except UnreadableSaga as error:
            _log.error("turn_cannot_be_read", saga_id=saga_id, version=version, error=str(error))
            return ()

    def _check_history(self, saga_id: str, history: object) -> None:
        if history is None:
            raise UnreadableSaga(
                f"saga {saga_id} is in the read model of {self._path} and has no history:"
                " the database is damaged, restore a backup"
            )
