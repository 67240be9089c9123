"""The SQLite store: one file, one writer, everything synced.

How a batch gets in. All writes go through one connection, one at a time. A batch is one INSERT of
one row into a temporary view (see `batches.py`) and therefore its own transaction: the epoch is
compared, every turn is appended under the unique index that is the compare-and-set, the read model
follows, one sync. Only a batch larger than `MAX_TURNS` needs an explicit transaction.

What a failure means. A violated constraint is certain: nothing was written. Anything else is not:
the connection is not used again, `commit` raises CommitUnknown, and every call but `reopen` and
`close` is refused, reads too, because what they would see may not be on the disk.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import anyio
import msgspec
import structlog

from amends_runtime.core.definition import Definition, content_hash
from amends_runtime.core.records import CommitDecision, Record, SagaState
from amends_runtime.errors import (
    CommitUnknown,
    OwnershipLost,
    StoreError,
    StoreUnusable,
    UnreadableSaga,
    VersionConflict,
)
from amends_runtime.ports import (
    AuditEntry,
    LoadedSaga,
    OpenSaga,
    OperatorWords,
    ParticipantAddress,
    RegisteredDefinition,
    Resting,
    RestingSaga,
    SagaFilter,
    SagaSummary,
    StoredTurn,
    StoreIdentity,
    Tombstone,
    Transition,
    WatchedTurn,
    WatchedTurns,
    summary_after,
)
from amends_runtime.storage.batches import MAX_TURNS, pack, stored_definition
from amends_runtime.storage.codec import (
    RECORDS,
    RecordCodec,
    decode_definition,
    decode_labels,
    encode_definition,
    encode_labels,
)
from amends_runtime.storage.connection import (
    BUSY_TIMEOUT_S,
    Readers,
    checkpoint,
    close,
    configure_writer,
    explained,
    is_open_here,
    open_writer,
    pragma,
    to_the_end,
)
from amends_runtime.storage.migrations import migrate, schema_version
from amends_runtime.storage.ownership import LockNote, Ownership, usable_path
from amends_runtime.storage.queries import read_queries
from amends_runtime.storage.read_model import AfterTurn

__all__ = ["SqliteStore", "open_sqlite_store"]

_log = structlog.get_logger(__name__)

MAX_WAL_BYTES = 64 * 1024 * 1024  # four checkpoints' worth: a reader is holding it back
ABOVE_ALL = 2**63 - 1  # for conditions that hold always; a NULL would keep SQLite from its index
_TEMPORARY = (
    *("places", "batch_view", "batch_trigger", "batch_labels_trigger"),
    *("participant_view", "participant_trigger"),
    *("confirmation_view", "confirmation_trigger"),
)
NOTE_EVERY_S = 10.0  # of turns: a backup that misses fewer is noticed after an orderly stop alone
LOAD_CHUNK = 256  # sagas read by one statement: bounds what lies in memory twice

_SQL = read_queries("sqlite")
_APPEND = _SQL["append"]

T = TypeVar("T")


@asynccontextmanager
async def open_sqlite_store(
    path: str | os.PathLike[str], *, restored: bool = False
) -> AsyncIterator[SqliteStore]:
    """Opens the store for the length of a block; see `SqliteStore.open`."""
    store = await SqliteStore.open(path, restored=restored)
    try:
        yield store
    finally:
        await store.close()


class SqliteStore:
    """A Store in one SQLite file. Made by `open_sqlite_store`; must be closed, or its threads stay.

    restored    the file is not the one that was last open here: it came from a backup or from
    elsewhere; until an operator confirms it
    """

    def __init__(self, path: Path, ownership: Ownership, codec: RecordCodec) -> None:
        self._path = path
        self._ownership = ownership
        self._codec = codec
        self._write_lock = anyio.Lock(fast_acquire=True)
        self._writer: aiosqlite.Connection | None = None
        self._readers: Readers | None = None
        self._identity = StoreIdentity("", "", 0)
        self._seq = 0
        self._saga_no = 0
        self._failed = ""  # why nothing but `reopen` and `close` may be called
        self._closed = False
        self._wal_tried_bytes = 0
        self._moved = anyio.Event()  # something was committed, or the store is closed
        self._definitions: dict[int, RegisteredDefinition] = {}
        self._definition_nos: dict[str, int] = {}
        self._note_due_s = 0.0  # when the lock file is told again how far the history goes
        self._noted_seq = 0  # what it was told last
        self.restored = False
        self._restored_through_no = 0  # the last saga from before a restore
        self._earlier: frozenset[str] = frozenset()  # incarnations, before it was restored
        self._lost = anyio.Event()

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        codec: RecordCodec = RECORDS,
        restored: bool = False,
    ) -> SqliteStore:
        """Takes the file over, making it if it does not exist, and begins the next epoch.

        `restored`: somebody knows that it came from a backup together with its lock file, which
        then cannot tell; such a file must exist. Raises StoreInUse where another runtime has it,
        StoreUnusable where it cannot be used; both in one line that says what to do. A file that is
        refused is left as it is.
        """
        database = usable_path(path)
        ownership = Ownership.take(database)
        store = cls(database, ownership, codec)
        try:
            await to_the_end(store._begin(by_hand=restored))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await store._disconnect()
            ownership.abandon()
            raise
        return store

    # -- what it is ----------------------------------------------------------------------------

    @property
    def identity(self) -> StoreIdentity:
        return self._identity

    @property
    def path(self) -> Path:
        """The database's real path."""
        return self._path

    @property
    def wal_bytes(self) -> int:
        """The size of the write-ahead log."""
        try:
            return os.stat(f"{self._path}-wal").st_size  # noqa: PTH116  # three times as quick, per commit
        except FileNotFoundError:
            return 0

    @property
    def file_bytes(self) -> int:
        """The size of the database file, which is never opened to learn it."""
        try:
            return os.stat(self._path).st_size  # noqa: PTH116  # as above
        except FileNotFoundError:
            return 0

    def next_saga_no(self) -> int:
        self._saga_no += 1
        return self._saga_no

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, transitions: Sequence[Transition]) -> int:
        async with self._write_lock:
            writer = self._usable_writer()
            if not transitions:
                return self._seq
            batches = self._packed(transitions)
            await to_the_end(self._append(writer, transitions, batches))
            return self._seq

    async def put_definition(
        self, definition: Definition, now_ms: int
    ) -> tuple[RegisteredDefinition, bool]:
        """Registers a normalised definition; its content becomes the latest of its name.

        A content that is the latest already is a no-op. One that was replaced by another since
        becomes the latest again, under its old version: so a definition can be rolled back by
        registering it.

        After CommitUnknown the store has reopened itself if it could, because the caller is not the
        one who commits turns; registering once more is safe.
        """
        async with self._write_lock:
            writer = self._usable_writer()
            return await to_the_end(
                self._or_reopen(lambda: self._put_definition(writer, definition, now_ms))
            )

    async def put_participant(
        self, name: str, address: str, words: OperatorWords, *, tls: bool = False
    ) -> None:
        """Registers a participant by hand, or points it elsewhere; with its audit entry.

        After CommitUnknown the store has reopened itself if it could, as for a definition; asking
        once more is safe.
        """
        async with self._write_lock:
            writer = self._usable_writer()
            await to_the_end(
                self._or_reopen(lambda: self._change_participant(writer, name, address, words, tls))
            )

    async def remove_participant(self, name: str, words: OperatorWords) -> bool:
        """Takes back what `put_participant` did; with its audit entry. False: there was nothing."""
        async with self._write_lock:
            writer = self._usable_writer()
            return await to_the_end(
                self._or_reopen(lambda: self._change_participant(writer, name, "", words, False))
            )

    async def confirm_restore(self, words: OperatorWords) -> bool:
        """Takes a restored store for the truth; with its audit entry. False: it is not restored.

        After CommitUnknown the store has reopened itself if it could, as for a definition; asking
        once more is safe.
        """
        async with self._write_lock:
            writer = self._usable_writer()
            return await to_the_end(self._or_reopen(lambda: self._confirm_restore(writer, words)))

    async def replace_read_model(self, pages: AsyncIterator[Sequence[SagaSummary]]) -> None:
        """The read model becomes these rows, in one transaction.

        `pages` may read but not write the store.
        """
        async with self._write_lock:
            writer = self._usable_writer()
            await to_the_end(self._replace_read_model(writer, pages))

    async def _append(
        self,
        writer: aiosqlite.Connection,
        transitions: Sequence[Transition],
        batches: Sequence[Sequence[Any]],
    ) -> None:
        """One transaction, or none of it. Advances `_seq` only after the sync."""
        try:
            if len(batches) == 1:
                await writer.execute_fetchall(_APPEND, batches[0])
            else:
                await writer.execute_fetchall("BEGIN IMMEDIATE")
                for batch in batches:
                    await writer.execute_fetchall(_APPEND, batch)
                await writer.execute_fetchall("COMMIT")
        except sqlite3.IntegrityError as error:
            raise await self._refused(writer, transitions, error) from error
        except Exception as error:
            raise self._unknown(error) from error
        self._seq += len(transitions)
        self._note_move()
        if time.monotonic() >= self._note_due_s:  # else `keep_noted` will, also if no other follows
            await anyio.to_thread.run_sync(self._note_position)
        await self._watch_log(writer)

    def _note_position(self) -> None:
        """Tells the lock file how far the history goes; see `_take_epoch`.

        A note that cannot be written is missed at the next opening at most, so a commit that is
        durable does not fail for it.
        """
        self._note_due_s = time.monotonic() + NOTE_EVERY_S
        identity, seq = self._identity, self._seq
        try:
            self._ownership.write(
                LockNote(os.getpid(), identity.store_id, identity.incarnation, identity.epoch, seq)
            )
        except StoreUnusable as error:
            _log.error("position_not_noted", path=str(self._path), error=str(error))
        else:
            self._noted_seq = seq

    def _packed(self, transitions: Sequence[Transition]) -> list[Sequence[Any]]:
        """The parameters of `append`, once for each `MAX_TURNS` transitions."""
        return [
            (
                self._identity.epoch,
                self._codec.format,
                self._seq + start,
                *pack(transitions[start : start + MAX_TURNS], self._codec, self._definition_nos),
            )
            for start in range(0, len(transitions), MAX_TURNS)
        ]

    def _summary_row(self, summary: SagaSummary) -> tuple[Any, ...]:
        return (
            summary.saga_id,
            stored_definition(summary, self._definition_nos),
            int(summary.state),
            summary.started_at_ms,
            summary.updated_at_ms,
            summary.ended_at_ms,
            summary.deadline_at_ms,
            summary.wake_at_ms,
            int(summary.past_no_return),
            encode_labels(summary.labels),
        )

    async def _refused(
        self,
        writer: aiosqlite.Connection,
        transitions: Sequence[Transition],
        error: sqlite3.IntegrityError,
    ) -> StoreError:
        """What a violated constraint means. Nothing was written, and that is certain."""
        lowest: dict[int, Transition] = {}
        for transition in transitions:
            before = lowest.get(transition.saga_no)
            if before is None or transition.version < before.version:
                lowest[transition.saga_no] = transition
        wanted = [
            (t.saga_no, t.version, t.summary.saga_id if t.summary else None)
            for t in lowest.values()
        ]
        try:
            if writer.in_transaction:
                await writer.execute_fetchall("ROLLBACK")
            await self._check_epoch(writer)
            found = await writer.execute_fetchall(
                _SQL["conflicts"], {"wanted": msgspec.json.encode(wanted).decode()}
            )
        except OwnershipLost as lost:
            return lost
        except Exception as failure:  # noqa: BLE001  # whatever it was, the connection is not to be trusted
            return self._unknown(failure)
        offenders = {row[0] for row in found} | _at_odds(transitions)
        if not offenders:
            return self._unknown(error)
        return VersionConflict(sorted(offenders))

    async def _check_epoch(self, writer: aiosqlite.Connection) -> None:
        rows = list(await writer.execute_fetchall(_SQL["epoch"]))
        if not rows or rows[0][0] != self._identity.epoch:
            raise OwnershipLost(
                f"{self._path} is at epoch {rows[0][0] if rows else 'none'} and this runtime at"
                f" {self._identity.epoch}: another runtime owns it now, and this one writes no more"
            )

    def _unknown(self, error: Exception) -> CommitUnknown:
        self._failed = f"a commit failed ({_named(error)})"
        _log.error("commit_failed", path=str(self._path), error=_named(error))
        return CommitUnknown(
            f"a commit to {self._path} failed ({_named(error)}) and may or may not have happened:"
            " the store must be reopened and read before anything else"
        )

    async def _or_reopen(self, write: Callable[[], Awaitable[T]]) -> T:
        try:
            return await write()
        except CommitUnknown:
            try:
                await self._reopen()
            except StoreError as error:  # and without it nothing goes on: see `wait_lost`
                self._lost.set()
                _log.error("store_not_reopened", path=str(self._path), error=str(error))
            raise

    async def _put_definition(
        self, writer: aiosqlite.Connection, definition: Definition, now_ms: int
    ) -> tuple[RegisteredDefinition, bool]:
        wanted = content_hash(definition)
        known = self._definitions.get(self._definition_nos.get(wanted, 0))
        if known is not None and known.activated == max(
            other.activated
            for other in self._definitions.values()
            if other.definition.name == definition.name
        ):
            return known, True
        parameters: dict[str, Any] = {"content_hash": wanted, "epoch": self._identity.epoch}
        if known is None:
            query = _SQL["insert_definition"]
            parameters |= {
                "name": definition.name,
                "content": encode_definition(definition),
                "now_ms": now_ms,
            }
        else:
            query = _SQL["activate_definition"]
        try:
            rows = list(await writer.execute_fetchall(query, parameters))
        except Exception as error:
            raise self._unknown(error) from error
        if not rows:
            await self._check_epoch(writer)
        await self._read_definitions(writer)
        return self._definitions[self._definition_nos[wanted]], known is not None

    async def _change_participant(
        self,
        writer: aiosqlite.Connection,
        name: str,
        address: str,
        words: OperatorWords,
        tls: bool,  # noqa: FBT001  # the row's columns, in their order
    ) -> bool:
        """Whether there was a row before, or this very request. An empty address removes it."""
        parameters = {"epoch": self._identity.epoch, "name": name, "address": address, "tls": tls}
        parameters |= msgspec.structs.asdict(words)
        verb = "put_participant" if address else "remove_participant"
        request = {"request_id": words.request_id, "verb": verb, "subject": name}
        try:
            if list(await writer.execute_fetchall(_SQL["find_request"], request)):
                return True
            rows = await writer.execute_fetchall(_SQL["participants"])
            existed = name in {row[0] for row in rows}
            if not address and not existed:
                return False
            await writer.execute_fetchall(_SQL["change_participant"], parameters)
        except sqlite3.IntegrityError as error:
            await self._check_epoch(writer)  # the only thing that the statement refuses
            raise self._unknown(error) from error
        except Exception as error:
            raise self._unknown(error) from error
        return existed

    async def _confirm_restore(self, writer: aiosqlite.Connection, words: OperatorWords) -> bool:
        """Whether it was restored, or this very request has confirmed it before."""
        parameters = {"epoch": self._identity.epoch, **msgspec.structs.asdict(words)}
        request = {
            "request_id": words.request_id,
            "verb": "confirm_restore",
            "subject": self._identity.incarnation,
        }
        try:
            if list(await writer.execute_fetchall(_SQL["find_request"], request)):
                return True
            if not self.restored:
                return False
            await writer.execute_fetchall(_SQL["confirm_restore"], parameters)
        except sqlite3.IntegrityError as error:
            await self._check_epoch(writer)  # the only thing that the statement refuses
            raise self._unknown(error) from error
        except Exception as error:
            raise self._unknown(error) from error
        self.restored = False
        return True

    async def _replace_read_model(
        self, writer: aiosqlite.Connection, pages: AsyncIterator[Sequence[SagaSummary]]
    ) -> None:
        try:
            await writer.execute_fetchall("BEGIN IMMEDIATE")
            await self._check_epoch(writer)
            await writer.execute_fetchall(_SQL["clear_sagas"])
            await writer.execute_fetchall(_SQL["clear_labels"])
            async for page in pages:
                rows = [(s.saga_no, s.version, *self._summary_row(s)) for s in page]
                await writer.execute_fetchall(_SQL["insert_summaries"], {"rows": _json(rows)})
            await writer.execute_fetchall(_SQL["insert_labels"])
            await writer.execute_fetchall("COMMIT")
        except sqlite3.Error as error:
            raise self._unknown(error) from error
        except BaseException:
            await writer.execute_fetchall("ROLLBACK")
            raise

    async def _watch_log(self, writer: aiosqlite.Connection) -> None:
        """SQLite checkpoints by itself, see `CHECKPOINT_PAGES`; this speaks of a log that grew.

        It also tries to cut it, each time that it has grown by as much again. What is not cut here
        SQLite cuts when it begins the log anew, see `KEPT_CHECKPOINTS`.
        """
        size = self.wal_bytes
        if size < MAX_WAL_BYTES:
            self._wal_tried_bytes = 0
            return
        if size < self._wal_tried_bytes + MAX_WAL_BYTES:
            return  # it was tried not long ago
        self._wal_tried_bytes = size
        try:
            try:
                await pragma(writer, "busy_timeout = 0")  # commits must not wait for whoever reads
                emptied = await checkpoint(writer)
            finally:
                await pragma(writer, f"busy_timeout = {round(BUSY_TIMEOUT_S * 1000)}")
        except sqlite3.Error as error:  # what is committed is safe in the log
            _log.error(
                "checkpoint_failed", path=str(self._path), error=_named(error), wal_bytes=size
            )
        else:
            _log.warning("log_was_large", path=str(self._path), wal_bytes=size, emptied=emptied)

    # -- reading -------------------------------------------------------------------------------

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        found: dict[str, LoadedSaga | Tombstone] = {}
        for chunk in _chunks(list(dict.fromkeys(saga_ids))):
            rows = await self._read("load", {"saga_ids": _json(chunk)})
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
                found[saga_id] = self._loaded(
                    saga_no, saga_id, definition_no, turns[saga_id], wake_at_ms
                )
        return found

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        parameters = {"state": int(state), "after_no": after_no, "limit": limit}
        return [
            OpenSaga(saga_no, saga_id, self._definitions[definition_no].content_hash)
            for saga_no, saga_id, definition_no in await self._read("open_sagas", parameters)
        ]

    async def resting_sagas(
        self,
        after: RestingSaga | None,
        until_ms: int,
        limit: int,
        updated_after_ms: int = 0,
    ) -> list[RestingSaga]:
        parameters = {
            "after_ms": after.wake_at_ms if after else 0,
            "after_state": int(after.state) if after else ABOVE_ALL,
            "after_no": after.saga_no if after else 0,
            "until_ms": until_ms,
            "updated_after_ms": updated_after_ms,
            "limit": limit,
        }
        return [
            RestingSaga(
                wake_at_ms,
                SagaState(state),
                saga_no,
                saga_id,
                self._definitions[definition_no].content_hash,
            )
            for wake_at_ms, state, saga_no, saga_id, definition_no in await self._read(
                "resting_sagas", parameters
            )
        ]

    async def count_resting(self) -> Resting:
        rows = list(await self._read("count_resting", {}))
        by_state = {SagaState(state): count for state, count, _ in rows}
        return Resting(by_state, max((updated_at_ms for *_, updated_at_ms in rows), default=0))

    async def oldest_open_ms(self) -> int | None:
        [(started_at_ms,)] = await self._read("oldest_open", {})
        return None if started_at_ms is None else int(started_at_ms)

    async def list_sagas(
        self, where: SagaFilter, limit: int, before_no: int | None = None
    ) -> list[SagaSummary]:
        parameters: dict[str, Any] = {
            "limit": limit,
            "before_no": ABOVE_ALL if before_no is None else before_no,
            "definition_name": where.definition_name or None,
            "started_from_ms": where.started_from_ms,
            "started_before_ms": where.started_before_ms or ABOVE_ALL,
        }
        if where.labels:
            key, value = next(iter(where.labels.items()))
            parameters |= {
                "label_key": key,
                "label_value": value,
                "labels": encode_labels(where.labels),
                "states": _json(where.states) if where.states else None,
            }
            rows = await self._read("list_sagas_with_label", parameters)
        elif where.states:
            # State by state, because each has its own newest at the end of its part of the index.
            rows = []
            async with self._reading() as readers, readers.snapshot() as reader:
                for state in dict.fromkeys(where.states):
                    parameters["state"] = state
                    query = _SQL["list_sagas_in_state"]
                    rows += await reader.execute_fetchall(query, parameters)
            rows.sort(key=lambda row: row[0], reverse=True)
            del rows[limit:]
        else:
            rows = await self._read("list_sagas", parameters)
        return [self._summary(row) for row in rows]

    async def count_by_state(self) -> dict[SagaState, int]:
        return {SagaState(state): count for state, count in await self._read("count_by_state", {})}

    async def definitions(self) -> list[RegisteredDefinition]:
        async with self._reading():
            return sorted(
                self._definitions.values(),
                key=lambda registered: (registered.definition.name, registered.version),
            )

    async def participants(self) -> list[ParticipantAddress]:
        return [
            ParticipantAddress(name, address, by_operator=True, tls=bool(tls))
            for name, address, tls in await self._read("participants", {})
        ]

    async def audit(self, limit: int) -> list[AuditEntry]:
        return [
            AuditEntry(verb, subject, details, OperatorWords(author, reason, at_ms, request_id))
            for verb, subject, details, author, reason, at_ms, request_id in await self._read(
                "audit", {"limit": limit}
            )
        ]

    @property
    def unconfirmed_through_no(self) -> int:
        return self._restored_through_no if self.restored else 0

    def believes(self, incarnation: str) -> bool:
        if incarnation == self._identity.incarnation:
            return True
        return not self.restored and incarnation in self._earlier

    # -- watching ------------------------------------------------------------------------------

    @property
    def head_seq(self) -> int:
        return self._seq

    async def turns_after(
        self, after_seq: int, where: SagaFilter, *, turns: int, looked_at: int, size: int
    ) -> WatchedTurns:
        # Not what another connection may see already: what is told must have been acknowledged, or
        # a watcher could come back with a position that this store does not know yet.
        head_seq = self._seq
        parameters: dict[str, Any] = {
            "after_seq": after_seq,
            "head_seq": head_seq,
            "turns": turns,
            "looked_at": looked_at,
            "size": size,
            "states": _json(where.states) if where.states else None,
            "labels": encode_labels(where.labels) or None,
            "before_no": ABOVE_ALL,
            "definition_name": where.definition_name or None,
            "started_from_ms": where.started_from_ms,
            "started_before_ms": where.started_before_ms or ABOVE_ALL,
        }
        rows = await self._read("turns_after", parameters)
        [(through_seq, seen, matches)] = [row[:3] for row in rows if row[2] is not None]
        found = sorted((row for row in rows if row[2] is None), key=lambda row: row[0])
        if len(found) < matches:  # a limit has cut them short: the stretch ends with the last
            through_seq, seen = found[-1][0], found[-1][1]
        elif seen < looked_at:  # there is nothing more up to the head
            through_seq = max(head_seq, after_seq)
        told: list[WatchedTurn] = []
        last_seq, last_nth = after_seq, 0
        for seq, nth, _, state, past, version, row_format, data, *columns in found:
            row = self._summary(columns)
            records = self._readable(row_format, data, row.saga_id, version)
            told.append(
                WatchedTurn(
                    seq,
                    summary_after(
                        row,
                        version,
                        records,
                        SagaState(state) if state else row.state,
                        past_no_return=bool(past) if state else row.past_no_return,
                    ),
                    records,
                    purged_before=(seq - last_seq) - (nth - last_nth),
                )
            )
            last_seq, last_nth = seq, nth
        purged_after = (through_seq - last_seq) - (seen - last_nth)
        return WatchedTurns(tuple(told), through_seq, head_seq, purged_after)

    async def wait_beyond(self, seq: int) -> None:
        while self._seq <= seq:
            if self._closed:
                raise self._not_usable()
            await self._moved.wait()

    def _note_move(self) -> None:
        """Wakes whoever waits for the next commit: one event for all of them."""
        self._moved.set()
        self._moved = anyio.Event()

    def _readable(
        self, row_format: int, data: bytes, saga_id: str, version: int
    ) -> tuple[Record, ...]:
        """The records of a turn; none where its row is damaged, for whoever watches goes on."""
        try:
            return self._codec.decode(row_format, data, saga_id, version)
        except UnreadableSaga as error:
            _log.error("turn_cannot_be_read", saga_id=saga_id, version=version, error=str(error))
            return ()

    # -- the read model, for its proof ---------------------------------------------------------

    async def saga_numbers(self, after_no: int, limit: int) -> list[int]:
        """A page of the numbers of all sagas that have a history or a row, or only one of them."""
        rows = await self._read("saga_numbers", {"after_no": after_no, "limit": limit})
        return [row[0] for row in rows]

    async def stored(
        self, saga_nos: Sequence[int]
    ) -> tuple[dict[int, tuple[StoredTurn, ...]], dict[int, SagaSummary]]:
        """Histories and read-model rows of these sagas, as of one moment."""
        histories: dict[int, tuple[StoredTurn, ...]] = {}
        summaries: dict[int, SagaSummary] = {}
        async with self._reading() as readers, readers.snapshot() as reader:
            for chunk in _chunks(list(saga_nos)):
                turns = await self._turns(reader, chunk)
                histories |= {saga_no: tuple(found) for saga_no, found in turns.items()}
                rows = await reader.execute_fetchall(
                    _SQL["summaries_of"], {"saga_nos": _json(chunk)}
                )
                summaries |= {row[0]: self._summary(row) for row in rows}
        return histories, summaries

    async def after_turns(self, saga_nos: Sequence[int]) -> dict[int, tuple[AfterTurn, ...]]:
        """What is kept beside the turns of these sagas, by version."""
        kept: dict[int, list[AfterTurn]] = {}
        for saga_no, version, state, past in await self._read(
            "after_turns", {"saga_nos": _json(saga_nos)}
        ):
            after = AfterTurn(version, SagaState(state) if state else None, bool(past))
            kept.setdefault(saga_no, []).append(after)
        return {saga_no: tuple(found) for saga_no, found in kept.items()}

    async def _turns(
        self, reader: aiosqlite.Connection, saga_nos: Sequence[int]
    ) -> dict[int, list[StoredTurn]]:
        turns: dict[int, list[StoredTurn]] = {}
        rows = await reader.execute_fetchall(_SQL["turns_of"], {"saga_nos": _json(saga_nos)})
        for saga_no, seq, version, row_format, data in rows:
            records = self._codec.decode(row_format, data, f"no. {saga_no}", version)
            turns.setdefault(saga_no, []).append(StoredTurn(seq, version, records))
        return turns

    async def _read(self, query: str, parameters: dict[str, Any]) -> list[Any]:
        async with self._reading() as readers, readers.one() as reader:
            return list(await reader.execute_fetchall(_SQL[query], parameters))

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Readers]:
        if self._readers is None or self._failed:
            raise self._not_usable()
        try:
            yield self._readers
        except sqlite3.Error as error:
            raise StoreError(f"{self._path} cannot be read: {_named(error)}") from error

    def _check_history(self, saga_id: str, history: object) -> None:
        if history is None:
            raise UnreadableSaga(
                f"saga {saga_id} is in the read model of {self._path} and has no history:"
                " the database is damaged, restore a backup"
            )

    def _loaded(
        self,
        saga_no: int,
        saga_id: str,
        definition_no: int,
        turns: list[StoredTurn],
        wake_at_ms: int,
    ) -> LoadedSaga:
        hashed = self._definitions[definition_no].content_hash
        return LoadedSaga(saga_no, saga_id, hashed, tuple(turns), wake_at_ms)

    def _summary(self, row: Any) -> SagaSummary:
        registered = self._definitions[row[2]]
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

    # -- opening and closing -------------------------------------------------------------------

    async def reopen(self) -> None:
        async with self._write_lock:
            await to_the_end(self._reopen())

    async def wait_lost(self) -> None:
        """Returns never. Raises StoreError once it has failed and could not reopen itself."""
        await self._lost.wait()
        raise StoreError(f"{self._path} could not be reopened after a failed commit")

    async def keep_noted(self) -> None:
        """Returns never. The lock file's note is at most `NOTE_EVERY_S` behind the last commit.

        A commit notes by itself, but only where the last note is that old; the last one before a
        quiet night, and a power cut, would be missed.
        """
        while True:
            await self.wait_beyond(self._noted_seq)
            await anyio.sleep(max(0.0, self._note_due_s - time.monotonic()))
            async with self._write_lock:
                if self._writer is not None and self._seq > self._noted_seq:
                    await to_the_end(anyio.to_thread.run_sync(self._note_position))

    async def close(self) -> None:
        async with self._write_lock:
            await to_the_end(self._close())

    async def _begin(self, *, by_hand: bool) -> None:
        """The first opening: what the file is, its schema, its epoch.

        `by_hand`: it was restored, as somebody says.
        """
        existed = self._path.exists()
        if by_hand and not existed:
            raise StoreUnusable(
                f"{self._path} does not exist, so it was not restored: is the path right?"
            )
        try:
            writer = self._writer = await open_writer(self._path)
            version = await schema_version(writer, self._path)
            await configure_writer(writer, self._path)
            await self._empty_log(writer)
            await migrate(writer, version)
            await self._take_epoch(writer, by_hand=by_hand)
            await self._make_ready(writer)
        except (sqlite3.Error, StoreError) as error:
            raise explained(self._path, error) from error
        _log.info(
            "store_opened",
            path=str(self._path),
            created=not existed,
            sqlite=sqlite3.sqlite_version,
            **msgspec.structs.asdict(self._identity),
        )

    async def _empty_log(self, writer: aiosqlite.Connection) -> None:
        """What an earlier process committed comes into the database before anything else happens.

        After a failed sync the page cache may show commits that the disk does not have; what a
        checkpoint with its own sync has moved, it has.
        """
        if not await checkpoint(writer):
            raise StoreUnusable(
                f"{self._path} is in use by another program that has it open, so its log cannot be"
                " checkpointed: close that first"
            )

    async def _take_epoch(self, writer: aiosqlite.Connection, *, by_hand: bool) -> None:
        """Begins the next epoch, in the database and beside it, and finds out about a restore.

        The lock file knows what was last open here. Another store or incarnation, an earlier epoch,
        or a history that ends before what it has seen on the disk: the file is a copy. Where the
        lock file came back with it, only somebody can tell (`by_hand`).
        """
        if not list(await writer.execute_fetchall(_SQL["identity"])):
            await self._make_identity(writer)
        store_id, incarnation, _, epoch, _ = await self._read_identity(writer)
        beside = self._ownership.before
        [(seq, saga_no)] = await writer.execute_fetchall(_SQL["highest_numbers"])
        if (
            not by_hand
            and beside is not None
            and (beside.store_id, beside.incarnation) == (store_id, incarnation)
            and beside.epoch <= epoch
            and beside.seq <= seq
        ):
            await writer.execute_fetchall(_SQL["take_ownership"])
        else:
            _log.warning(
                "store_restored",
                path=str(self._path),
                why="somebody says so: it was started with --restored"
                if by_hand
                else "its lock file does not know it: it came from a backup or from elsewhere",
                lock_file=str(self._ownership.path),
                store_id=store_id,
                epoch=epoch,
                store_id_beside=beside.store_id if beside else None,
                epoch_beside=beside.epoch if beside else None,
                seq=seq,
                seq_beside=beside.seq if beside else None,
            )
            same_store = beside is not None and beside.store_id == store_id
            parameters = {
                "incarnation": str(uuid.uuid4()),
                "incarnation_beside": beside.incarnation if beside and same_store else None,
                "epoch_beside": beside.epoch if beside and same_store else 0,
                "saga_no": saga_no,
            }
            await writer.execute_fetchall("BEGIN IMMEDIATE")
            await writer.execute_fetchall(_SQL["keep_incarnations"], parameters)
            await writer.execute_fetchall(_SQL["mark_restored"], parameters)
            await writer.execute_fetchall("COMMIT")
        store_id, incarnation, _, epoch, _ = await self._read_identity(writer)
        self._identity = StoreIdentity(store_id, incarnation, epoch)
        self._ownership.write(LockNote(os.getpid(), store_id, incarnation, epoch, seq))
        self._noted_seq = seq
        self._note_due_s = time.monotonic() + NOTE_EVERY_S

    async def _make_identity(self, writer: aiosqlite.Connection) -> None:
        """A new store gets its ids, or one whose first opening was cut short.

        The lock file has them first: killed in between, the next opening makes others; in the other
        order it would take the file for a restored one.
        """
        note = LockNote(os.getpid(), str(uuid.uuid4()), str(uuid.uuid4()), 0)
        self._ownership.write(note)
        self._ownership.before = note
        parameters = {
            "store_id": note.store_id,
            "incarnation": note.incarnation,
            "now_ms": time.time_ns() // 1_000_000,
        }
        await writer.execute_fetchall(_SQL["create_meta"], parameters)

    async def _read_identity(self, writer: aiosqlite.Connection) -> tuple[str, str, int, int, int]:
        rows = list(await writer.execute_fetchall(_SQL["identity"]))
        if not rows:
            raise StoreUnusable(
                f"{self._path} has sagas and does not say which store it is: restore a backup"
            )
        store_id, incarnation, restored, epoch, through_no = rows[0]
        return store_id, incarnation, restored, epoch, through_no

    async def _make_ready(self, writer: aiosqlite.Connection) -> None:
        """What every connection to the file begins with, at the first opening and later."""
        for name in _TEMPORARY:
            await writer.execute_fetchall(_SQL[name])
        await writer.execute_fetchall(_SQL["fill_places"], {"places": MAX_TURNS})
        rows = list(await writer.execute_fetchall(_SQL["highest_numbers"]))
        self._seq = rows[0][0]
        self._note_move()  # a commit whose outcome was unknown may have happened
        self._saga_no = max(self._saga_no, rows[0][1])
        await self._read_definitions(writer)
        _, _, restored, _, through_no = await self._read_identity(writer)
        self.restored = bool(restored)
        self._restored_through_no = through_no
        rows = list(await writer.execute_fetchall(_SQL["earlier_incarnations"]))
        self._earlier = frozenset(row[0] for row in rows)
        self._readers = await Readers.open(self._path)

    async def _read_definitions(self, writer: aiosqlite.Connection) -> None:
        rows = await writer.execute_fetchall(_SQL["definitions"])
        self._definitions = {
            definition_no: RegisteredDefinition(
                decode_definition(hashed, content), hashed, version, registered_at_ms, activated
            )
            for definition_no, version, hashed, content, registered_at_ms, activated in rows
        }
        self._definition_nos = {
            registered.content_hash: definition_no
            for definition_no, registered in self._definitions.items()
        }

    async def _reopen(self) -> None:
        if self._closed:
            raise self._not_usable()
        self._failed = self._failed or "it is being reopened"
        await self._disconnect()
        if is_open_here(self._path):
            raise StoreError(
                f"{self._path} could not be closed after a failed commit, so what it shows cannot"
                " be believed: this process must end"
            )
        try:
            writer = self._writer = await open_writer(self._path)
            if await schema_version(writer, self._path) == 0:
                raise StoreUnusable(f"{self._path} is empty: it was removed or replaced")
            await configure_writer(writer, self._path)
            await self._empty_log(writer)
            store_id, incarnation, _, epoch, _ = await self._read_identity(writer)
            if StoreIdentity(store_id, incarnation, epoch) != self._identity:
                raise OwnershipLost(
                    f"{self._path} is at epoch {epoch} of store {store_id}, and this runtime at"
                    f" epoch {self._identity.epoch} of {self._identity.store_id}:"
                    " another one owns it now"
                )
            await self._make_ready(writer)
        except (sqlite3.Error, StoreError) as error:
            raise explained(self._path, error) from error
        self._failed = ""
        _log.warning("store_reopened", path=str(self._path), seq=self._seq)

    async def _close(self) -> None:
        if self._writer is not None and not self._failed:
            if self._readers is not None:
                await self._readers.close()
                self._readers = None
            self._note_position()
            try:
                await checkpoint(self._writer)
            except sqlite3.Error as error:  # what is committed is safe in the log
                _log.warning("checkpoint_failed", path=str(self._path), error=_named(error))
        await self._disconnect()
        self._closed = True
        self._note_move()
        self._ownership.release()

    async def _disconnect(self) -> None:
        """Closes all connections. A failure to close is logged; the thread ends all the same."""
        readers, self._readers = self._readers, None
        writer, self._writer = self._writer, None
        for connections in (readers, writer):
            if connections is not None:
                try:
                    if isinstance(connections, Readers):
                        await connections.close()
                    else:
                        await close(connections)
                except Exception as error:  # noqa: BLE001  # `is_open_here` says whether it matters
                    _log.warning("closing_failed", path=str(self._path), error=_named(error))

    def _usable_writer(self) -> aiosqlite.Connection:
        if self._failed and not self._closed:
            # Of this commit nothing is written, but whoever commits is the one who must reopen.
            raise CommitUnknown(f"{self._path}: {self._failed}; the store must be reopened first")
        if self._writer is None:
            raise self._not_usable()
        return self._writer

    def _not_usable(self) -> StoreError:
        if self._closed:
            return StoreError(f"{self._path} is closed")
        return StoreError(f"{self._path}: {self._failed}; the store must be reopened first")


def _at_odds(transitions: Iterable[Transition]) -> set[int]:
    """Sagas whose turns in one batch do not follow each other, or whose id is another's in it."""
    last: dict[int, int] = {}
    holders: dict[str, int] = {}
    found = set()
    for transition in transitions:
        saga_no, summary = transition.saga_no, transition.summary
        if transition.version != last.get(saga_no, transition.version - 1) + 1:
            found.add(saga_no)
        last[saga_no] = transition.version
        if summary is not None and holders.setdefault(summary.saga_id, saga_no) != saga_no:
            found.add(saga_no)
    return found


def _chunks(items: list[Any]) -> Iterable[list[Any]]:
    return (items[start : start + LOAD_CHUNK] for start in range(0, len(items), LOAD_CHUNK))


def _json(items: Sequence[Any]) -> str:
    return msgspec.json.encode(items).decode()


def _named(error: BaseException) -> str:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return f"{name}: {error}"
