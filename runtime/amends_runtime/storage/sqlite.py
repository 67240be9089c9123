"""The SQLite store: one file, one writer, everything synced.

How a batch gets in. All writes go through one connection, one at a time. A batch is one INSERT of
one row into a temporary view (see `batches.py`) and therefore its own transaction: the epoch is
compared, every turn is appended under the unique index that is the compare-and-set, the read model
follows, one sync. Only a batch larger than `MAX_TURNS` needs an explicit transaction.

What a failure means. A violated constraint is certain: nothing was written. Anything else is not:
the connection is not used again, `commit` raises CommitUnknown, and every call but `reopen` and
`close` is refused, reads too, because what they would see may not be on the disk.

What it is made of, each beside this file: `open_file` (the connections, and whether they are
believed), `identity` (which store the file is, and whether it was restored), `write_ahead_log`,
`definitions` (held in memory), `by_hand` (what operators write), `rows` (what the answers say) and
`watching` (the history by its positions). Here is what they have in common: the one writer at a
time, what a write's failure means, and the order in which a file is opened and closed.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import anyio
import msgspec
import structlog

from amends_runtime.core.definition import Definition, content_hash
from amends_runtime.core.records import SagaState
from amends_runtime.errors import (
    CommitUnknown,
    OwnershipLost,
    StoreError,
    StoreUnusable,
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
    WatchedTurns,
)
from amends_runtime.storage.batches import MAX_TURNS, pack
from amends_runtime.storage.by_hand import change_participant, confirm_restore
from amends_runtime.storage.codec import RECORDS, RecordCodec, encode_definition, encode_labels
from amends_runtime.storage.connection import (
    checkpoint,
    configure_writer,
    explained,
    named,
    to_the_end,
)
from amends_runtime.storage.definitions import StoredDefinitions
from amends_runtime.storage.identity import (
    PositionNote,
    check_epoch,
    check_identity,
    read_identity,
    take_epoch,
)
from amends_runtime.storage.migrations import migrate, schema_version
from amends_runtime.storage.open_file import OpenFile
from amends_runtime.storage.ownership import Ownership, usable_path
from amends_runtime.storage.queries import read_queries
from amends_runtime.storage.read_model import AfterTurn
from amends_runtime.storage.rows import Rows
from amends_runtime.storage.watching import Head, watched_turns
from amends_runtime.storage.write_ahead_log import WriteAheadLog

__all__ = ["SqliteStore", "open_sqlite_store"]

_log = structlog.get_logger(__name__)

ABOVE_ALL = 2**63 - 1  # for conditions that hold always; a NULL would keep SQLite from its index
_TEMPORARY = (
    *("places", "batch_view", "batch_trigger", "batch_labels_trigger"),
    *("participant_view", "participant_trigger"),
    *("confirmation_view", "confirmation_trigger"),
)
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
        self._file = OpenFile(path)
        self._wal = WriteAheadLog(path)
        self._note = PositionNote(path, ownership)
        self._definitions = StoredDefinitions()
        self._rows = Rows(path, codec, self._definitions)
        self._head = Head()
        self._identity = StoreIdentity("", "", 0)
        self._saga_no = 0
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
                await store._file.disconnect()
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
        return self._wal.size_bytes

    @property
    def file_bytes(self) -> int:
        """The size of the database file."""
        return self._file.size_bytes

    def next_saga_no(self) -> int:
        self._saga_no += 1
        return self._saga_no

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, transitions: Sequence[Transition]) -> int:
        async with self._write_lock:
            writer = self._file.usable_writer()
            if not transitions:
                return self._head.seq
            batches = self._packed(transitions)
            await to_the_end(self._append(writer, transitions, batches))
            return self._head.seq

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
            writer = self._file.usable_writer()
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
        await self._by_hand(
            lambda writer: change_participant(writer, self._identity, name, address, words, tls=tls)
        )

    async def remove_participant(self, name: str, words: OperatorWords) -> bool:
        """Takes back what `put_participant` did; with its audit entry. False: there was nothing."""
        return await self._by_hand(
            lambda writer: change_participant(writer, self._identity, name, "", words)
        )

    async def confirm_restore(self, words: OperatorWords) -> bool:
        """Takes a restored store for the truth; with its audit entry. False: it is not restored.

        After CommitUnknown the store has reopened itself if it could, as for a definition; asking
        once more is safe.
        """
        return await self._by_hand(lambda writer: self._confirm_restore(writer, words))

    async def replace_read_model(self, pages: AsyncIterator[Sequence[SagaSummary]]) -> None:
        """The read model becomes these rows, in one transaction.

        `pages` may read but not write the store.
        """
        async with self._write_lock:
            writer = self._file.usable_writer()
            await to_the_end(self._replace_read_model(writer, pages))

    async def _append(
        self,
        writer: aiosqlite.Connection,
        transitions: Sequence[Transition],
        batches: Sequence[Sequence[Any]],
    ) -> None:
        """One transaction, or none of it. Moves the head only after the sync."""
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
            raise self._file.commit_unknown(error) from error
        self._head.move(self._head.seq + len(transitions))
        if time.monotonic() >= self._note.due_s:  # else `keep_noted` will, also if no other follows
            await self._note_position()
        await self._wal.watch(writer)

    async def _note_position(self) -> None:
        await anyio.to_thread.run_sync(self._note.renew, self._identity, self._head.seq)

    def _packed(self, transitions: Sequence[Transition]) -> list[Sequence[Any]]:
        """The parameters of `append`, once for each `MAX_TURNS` transitions."""
        return [
            (
                self._identity.epoch,
                self._codec.format,
                self._head.seq + start,
                *pack(transitions[start : start + MAX_TURNS], self._codec, self._definitions.nos),
            )
            for start in range(0, len(transitions), MAX_TURNS)
        ]

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
            return self._file.commit_unknown(failure)
        offenders = {row[0] for row in found} | _at_odds(transitions)
        if not offenders:
            return self._file.commit_unknown(error)
        return VersionConflict(sorted(offenders))

    async def _check_epoch(self, writer: aiosqlite.Connection) -> None:
        await check_epoch(writer, self._path, self._identity)

    async def _by_hand(self, write: Callable[[aiosqlite.Connection], Awaitable[bool]]) -> bool:
        async with self._write_lock:
            writer = self._file.usable_writer()
            return await to_the_end(self._or_reopen(lambda: self._certainly(writer, write)))

    async def _certainly(
        self,
        writer: aiosqlite.Connection,
        write: Callable[[aiosqlite.Connection], Awaitable[bool]],
    ) -> bool:
        """One write whose trigger refuses nothing but the epoch, and what its failure means."""
        try:
            return await write(writer)
        except sqlite3.IntegrityError as error:
            await self._check_epoch(writer)
            raise self._file.commit_unknown(error) from error
        except Exception as error:
            raise self._file.commit_unknown(error) from error

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
        known = self._definitions.find(wanted)
        if known is not None and self._definitions.is_latest(known):
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
            raise self._file.commit_unknown(error) from error
        if not rows:
            await self._check_epoch(writer)
        await self._definitions.read(writer)
        return self._definitions.by_no[self._definitions.nos[wanted]], known is not None

    async def _confirm_restore(self, writer: aiosqlite.Connection, words: OperatorWords) -> bool:
        confirmed = await confirm_restore(writer, self._identity, words, restored=self.restored)
        if confirmed:
            self.restored = False
        return confirmed

    async def _replace_read_model(
        self, writer: aiosqlite.Connection, pages: AsyncIterator[Sequence[SagaSummary]]
    ) -> None:
        try:
            await writer.execute_fetchall("BEGIN IMMEDIATE")
            await self._check_epoch(writer)
            await writer.execute_fetchall(_SQL["clear_sagas"])
            await writer.execute_fetchall(_SQL["clear_labels"])
            async for page in pages:
                rows = [self._rows.of_summary(summary) for summary in page]
                await writer.execute_fetchall(_SQL["insert_summaries"], {"rows": _json(rows)})
            await writer.execute_fetchall(_SQL["insert_labels"])
            await writer.execute_fetchall("COMMIT")
        except sqlite3.Error as error:
            raise self._file.commit_unknown(error) from error
        except BaseException:
            await writer.execute_fetchall("ROLLBACK")
            raise

    # -- reading -------------------------------------------------------------------------------

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        found: dict[str, LoadedSaga | Tombstone] = {}
        for chunk in _chunks(list(dict.fromkeys(saga_ids))):
            found |= self._rows.loaded(await self._file.read("load", {"saga_ids": _json(chunk)}))
        return found

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        parameters = {"state": int(state), "after_no": after_no, "limit": limit}
        return self._rows.open_sagas(await self._file.read("open_sagas", parameters))

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
        return self._rows.resting_sagas(await self._file.read("resting_sagas", parameters))

    async def count_resting(self) -> Resting:
        rows = list(await self._file.read("count_resting", {}))
        by_state = {SagaState(state): count for state, count, _ in rows}
        return Resting(by_state, max((updated_at_ms for *_, updated_at_ms in rows), default=0))

    async def oldest_open_ms(self) -> int | None:
        [(started_at_ms,)] = await self._file.read("oldest_open", {})
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
            rows = await self._file.read("list_sagas_with_label", parameters)
        elif where.states:
            # State by state, because each has its own newest at the end of its part of the index.
            rows = []
            async with self._file.reading() as readers, readers.snapshot() as reader:
                for state in dict.fromkeys(where.states):
                    parameters["state"] = state
                    query = _SQL["list_sagas_in_state"]
                    rows += await reader.execute_fetchall(query, parameters)
            rows.sort(key=lambda row: row[0], reverse=True)
            del rows[limit:]
        else:
            rows = await self._file.read("list_sagas", parameters)
        return [self._rows.summary(row) for row in rows]

    async def count_by_state(self) -> dict[SagaState, int]:
        return {
            SagaState(state): count for state, count in await self._file.read("count_by_state", {})
        }

    async def definitions(self) -> list[RegisteredDefinition]:
        async with self._file.reading():
            return self._definitions.in_order()

    async def participants(self) -> list[ParticipantAddress]:
        return [
            ParticipantAddress(name, address, by_operator=True, tls=bool(tls))
            for name, address, tls in await self._file.read("participants", {})
        ]

    async def audit(self, limit: int) -> list[AuditEntry]:
        return [
            AuditEntry(verb, subject, details, OperatorWords(author, reason, at_ms, request_id))
            for verb, subject, details, author, reason, at_ms, request_id in await self._file.read(
                "audit", {"limit": limit}
            )
        ]

    @property
    def restored_through_no(self) -> int:
        return self._restored_through_no

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
        return self._head.seq

    async def turns_after(
        self, after_seq: int, where: SagaFilter, *, turns: int, looked_at: int, size: int
    ) -> WatchedTurns:
        # Not what another connection may see already: what is told must have been acknowledged, or
        # a watcher could come back with a position that this store does not know yet.
        head_seq = self._head.seq
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
        return watched_turns(
            await self._file.read("turns_after", parameters),
            self._rows,
            after_seq=after_seq,
            head_seq=head_seq,
            looked_at=looked_at,
        )

    async def wait_beyond(self, seq: int) -> None:
        while self._head.seq <= seq:
            if self._file.closed:
                raise self._file.not_usable()
            await self._head.wait_moved()

    # -- the read model, for its proof ---------------------------------------------------------

    async def saga_numbers(self, after_no: int, limit: int) -> list[int]:
        """A page of the numbers of all sagas that have a history or a row, or only one of them."""
        rows = await self._file.read("saga_numbers", {"after_no": after_no, "limit": limit})
        return [row[0] for row in rows]

    async def stored(
        self, saga_nos: Sequence[int]
    ) -> tuple[dict[int, tuple[StoredTurn, ...]], dict[int, SagaSummary]]:
        """Histories and read-model rows of these sagas, as of one moment."""
        histories: dict[int, tuple[StoredTurn, ...]] = {}
        summaries: dict[int, SagaSummary] = {}
        async with self._file.reading() as readers, readers.snapshot() as reader:
            for chunk in _chunks(list(saga_nos)):
                parameters = {"saga_nos": _json(chunk)}
                rows = await reader.execute_fetchall(_SQL["turns_of"], parameters)
                histories |= self._rows.turns_by_no(rows)
                rows = await reader.execute_fetchall(_SQL["summaries_of"], parameters)
                summaries |= {row[0]: self._rows.summary(row) for row in rows}
        return histories, summaries

    async def after_turns(self, saga_nos: Sequence[int]) -> dict[int, tuple[AfterTurn, ...]]:
        """What is kept beside the turns of these sagas, by version."""
        return self._rows.after_turns(
            await self._file.read("after_turns", {"saga_nos": _json(saga_nos)})
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
            await self.wait_beyond(self._note.seq)
            await anyio.sleep(max(0.0, self._note.due_s - time.monotonic()))
            async with self._write_lock:
                if self._file.writer is not None and self._head.seq > self._note.seq:
                    await to_the_end(self._note_position())

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
            writer = await self._file.open_writer()
            version = await schema_version(writer, self._path)
            await configure_writer(writer, self._path)
            await self._wal.empty(writer)
            await migrate(writer, version)
            self._identity = await take_epoch(
                writer, self._path, self._ownership, self._note, by_hand=by_hand
            )
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

    async def _make_ready(self, writer: aiosqlite.Connection) -> None:
        """What every connection to the file begins with, at the first opening and later."""
        for name in _TEMPORARY:
            await writer.execute_fetchall(_SQL[name])
        await writer.execute_fetchall(_SQL["fill_places"], {"places": MAX_TURNS})
        [(seq, saga_no)] = await writer.execute_fetchall(_SQL["highest_numbers"])
        self._head.move(seq)  # a commit whose outcome was unknown may have happened
        self._saga_no = max(self._saga_no, saga_no)
        await self._definitions.read(writer)
        _, self.restored, self._restored_through_no = await read_identity(writer, self._path)
        rows = await writer.execute_fetchall(_SQL["earlier_incarnations"])
        self._earlier = frozenset(row[0] for row in rows)
        await self._file.open_readers()

    async def _reopen(self) -> None:
        await self._file.close_to_reopen()
        try:
            writer = await self._file.open_writer()
            if await schema_version(writer, self._path) == 0:
                raise StoreUnusable(f"{self._path} is empty: it was removed or replaced")
            await configure_writer(writer, self._path)
            await self._wal.empty(writer)
            await check_identity(writer, self._path, self._identity)
            await self._make_ready(writer)
        except (sqlite3.Error, StoreError) as error:
            raise explained(self._path, error) from error
        self._file.failed = ""
        _log.warning("store_reopened", path=str(self._path), seq=self._head.seq)

    async def _close(self) -> None:
        writer = self._file.writer
        if writer is not None and not self._file.failed:
            await self._file.close_readers()
            self._note.renew(self._identity, self._head.seq)
            try:
                await checkpoint(writer)
            except sqlite3.Error as error:  # what is committed is safe in the log
                _log.warning("checkpoint_failed", path=str(self._path), error=named(error))
        await self._file.disconnect()
        self._file.closed = True
        self._head.move(self._head.seq)
        self._ownership.release()


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
