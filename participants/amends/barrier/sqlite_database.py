"""The barrier's side of a SQLite database: one connection and the transaction that is open in it.

Everything here is synchronous and is called from one thread, the writer of `sqlite.py`.

A transaction belongs to one call or to several of different lives, which come one after another:
`begin`, then for each `enter`, its handler, and `settle` or `leave`, then `commit`. What a handler
writes lies in a savepoint, so that its refusal or failure takes back its own alone; the rows of all
are written together at the end. One that has no row keeps no effect.

A connection that has failed us is not used again. After a failed COMMIT nobody knows whether it
happened, and after a failed fsync not even the operating system's cache can be believed; so the
connection is closed, and before the next call is answered from the file a checkpoint must have
written and synced it.
"""

from __future__ import annotations

import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from google.protobuf.message import DecodeError

from amends.barrier.statements import load_statements
from amends.barrier.verdict import (
    Answer,
    Question,
    Replay,
    Row,
    RowState,
    Run,
    Write,
    has_no_rows,
    held_rows,
    judge,
    question_of,
    settle,
)
from amends.errors import BarrierError, CommitUnknown, TransactionMisused
from amends.handler import Handler
from amends.outcomes import Call, Outcome, Verb
from amends.v1 import participant_pb2
from amends.wire import outcome_from_wire, outcome_to_wire

logger = logging.getLogger(__name__)

SQL: Final = load_statements("sqlite.sql")

SYNCHRONOUS_FULL: Final = 2

STEPS_BETWEEN_OVERDUE_CHECKS: Final = 100_000
"""Instructions of SQLite's machine between two looks at the clock: well under 10 ms of work."""

CLOCK_SKEW_MS: Final = 10 * 60 * 1000
"""How far the runtime's clock may be ahead of ours, when its word allows a purge."""

OPEN_STEP_MS: Final = 60 * 1000
"""How far a store's oldest open saga moves before it is written down: not with every call. A purge
that knows less keeps more."""

PURGE_PAGE: Final = 1000
"""Rows that a purge reads and deletes in one transaction, so that calls get in between."""

SIZES: Final = (64, 32, 16, 8, 4, 2, 1)
"""Lives or rows in one statement. Few sizes: each is a text of its own in the connection's cache of
statements, in which those of the author must find room, too."""

READ_ROWS: Final = {
    size: SQL["read-rows"].format(lives=", ".join(["(?, ?, ?, ?)"] * size)) for size in SIZES
}

ROW_VALUES: Final = 9
"""Values of one row of ``amends_barrier``."""

WRITE_ROWS: Final = {
    size: SQL["write-rows"].format(rows=", ".join([f"({', '.join('?' * ROW_VALUES)})"] * size))
    for size in SIZES
}

Parameters: TypeAlias = Sequence[Any] | Mapping[str, Any]
"""Values for ``?`` or ``:name`` in a statement."""

Life: TypeAlias = tuple[str, str, str, int]
"""Store, saga, step and round."""


class DatabaseBusy(BarrierError):
    """Somebody else holds the database's write lock."""


class Rows:
    """What a statement gave: all of its rows, already fetched.

    Has the fetching methods of `sqlite3.Cursor`, so that a `def` and an `async def` handler read
    alike: ``tx.execute(…).fetchone()``, ``(await tx.execute(…)).fetchone()``.
    """

    __slots__ = ("_rest", "lastrowid", "rowcount")

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        # Fetched at once: a statement that is still running (INSERT … RETURNING) would make the
        # COMMIT fail, and a cursor belongs to the writer thread.
        self._rest: Iterator[Any] = iter(cursor.fetchall() if cursor.description else ())
        self.rowcount = cursor.rowcount
        """Rows that the statement changed; -1 if it was none that changes."""
        self.lastrowid = cursor.lastrowid
        """The rowid of the last insert."""

    def fetchone(self) -> Any:
        """Give the next row, or ``None`` if there is no further one."""
        return next(self._rest, None)

    def fetchall(self) -> list[Any]:
        """Give the rows that are left."""
        return list(self._rest)

    def __iter__(self) -> Iterator[Any]:
        return self._rest


class Database:
    """One connection, opened when it is needed and replaced when it has failed."""

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        *,
        name: str,
        schema: str,
        busy_timeout_s: float,
        max_hold_s: float,
    ) -> None:
        self._connect = connect
        self._name = name
        self._schema = schema
        self._busy_timeout_s = busy_timeout_s
        self._max_hold_s = max_hold_s
        self._connection: sqlite3.Connection | None = None
        self._must_checkpoint = False
        self._found: dict[Life, list[_Stored]] = {}
        self._open_call: tuple[Call, Question, dict[Verb, Row]] | None = None
        self._has_savepoint = False
        self._handler_runs = False
        self._overdue_at_s = 0.0
        self._to_write: list[Any] = []
        self._oldest_open_at_ms: dict[str, int] = {}
        self.reply_bytes = 0
        """Size of the replies that the open transaction will store."""

    def add_schema(self, schema: str) -> None:
        """Run more SQL at each opening, after what there is; nothing if it is there already."""
        if schema not in self._schema:
            self._schema = f"{self._schema.rstrip().rstrip(';')};\n{schema}"

    # ------------------------------------------------------------------------------- a call

    def begin(self, calls: Sequence[Call]) -> None:
        """Open a transaction for calls of different lives, and read the rows that they have.

        Raises `DatabaseBusy` if another process has the lock, `BarrierError` if the database fails.
        """
        connection = self._begin_immediate()
        try:
            self._found = _read_rows(connection, [life_of(call) for call in calls])
        except sqlite3.Error as error:
            raise self._drop(error) from error

    def enter(self, call: Call, handler: Handler | None = None) -> Outcome | None:
        """Answer one of the transaction's calls, or give ``None``: run its handler, then `settle`.

        An answer holds when `commit` has returned. A `def` handler is given, for it may know
        whether something is held. Raises `BarrierError`; then the call is left.
        """
        assert self._open_call is None
        assert self._connection is not None
        question = question_of(call)
        try:
            rows = {
                Verb(_text(verb)): Row(RowState(_text(state)), request_hash, reply)
                for verb, state, request_hash, reply in self._found.get(life_of(call), ())
            }
            if (
                handler is not None
                and has_no_rows(question, rows)
                and handler.holds(call, _plain(self._connection))
            ):
                rows = held_rows()
            match judge(question, rows):
                case Run():
                    self._set_savepoint(self._connection)
                    self._open_call = call, question, rows
                    self._overdue_at_s = time.monotonic() + self._max_hold_s
                    self._handler_runs = True
                    return None
                case Replay(reply=reply):
                    return outcome_from_wire(participant_pb2.Outcome.FromString(reply))
                case Answer(outcome=outcome, writes=writes):
                    self._note(call, *_values_of(call, question, writes, outcome))
                    return outcome
        except sqlite3.Error as error:
            raise self._drop(error) from error
        except (ValueError, DecodeError) as error:
            raise BarrierError(
                f"{self._name} has a row of amends_barrier that cannot be read "
                f"({type(error).__name__}): it was written by another version, or by hand"
            ) from error

    def settle(self, outcome: Outcome) -> Outcome:
        """End the call that was entered as its handler's outcome asks; it holds after `commit`.

        Whatever it raises, the call is left, and nothing of it is kept: `BarrierError` if the
        database fails, `TransactionMisused` if SQLite has ended the transaction by itself, and what
        comes from an outcome that cannot be written down.
        """
        try:
            self._settle(outcome)
        except BaseException:
            self.leave()
            raise
        return outcome

    def _settle(self, outcome: Outcome) -> None:
        assert self._open_call is not None
        assert self._connection is not None
        call, question, rows = self._open_call
        settlement = settle(question, rows, outcome)
        # Before anything is decided: an effect must not stay whose row cannot be made.
        values, reply_bytes = _values_of(call, question, settlement.writes, outcome)
        if values:
            self._check_open(self._connection)
        if not settlement.keeps_effect:
            self.leave()
            if values and not self.in_transaction:  # taking back failed
                raise BarrierError(f"{self._name} failed; it is opened anew with the next call")
        self._note(call, values, reply_bytes)
        self._open_call = None
        self._handler_runs = False

    def leave(self) -> None:
        """Take back what the handler of the entered call wrote; nothing if none is entered."""
        was_entered = self._open_call is not None
        self._open_call = None
        self._handler_runs = False
        connection = self._connection
        if not was_entered or connection is None or not connection.in_transaction:
            return
        try:
            connection.execute(SQL["roll-back-effect"])
        except sqlite3.Error as error:
            # Closing rolls back, too: the whole transaction.
            logger.warning("%s", self._drop(error))

    def commit(self) -> None:
        """Make durable what the calls of the transaction left; all of it or nothing.

        Raises `CommitUnknown` if the COMMIT failed, `BarrierError` if the database fails before,
        `TransactionMisused` if SQLite has ended the transaction by itself.
        """
        assert self._open_call is None
        connection = self._connection
        if not self._to_write:
            self.roll_back()
            return
        assert connection is not None
        self._check_open(connection)
        try:
            _write_rows(connection, self._to_write)
            for store_id, oldest_open_at_ms in self._oldest_open_at_ms.items():
                connection.execute(
                    SQL["write-oldest-open"], (store_id, oldest_open_at_ms, OPEN_STEP_MS)
                )
        except sqlite3.Error as error:
            raise self._drop(error) from error
        self._commit(connection)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; SQLite ends one by itself after some errors."""
        return self._connection is not None and self._connection.in_transaction

    def roll_back(self) -> None:
        """End the open transaction, if one is open, and keep nothing of it."""
        self._forget()
        connection = self._connection
        if connection is None or not connection.in_transaction:
            return
        try:
            connection.execute(SQL["roll-back"])
        except sqlite3.Error as error:
            # Closing rolls back, too.
            logger.warning("%s", self._drop(error))

    def _set_savepoint(self, connection: sqlite3.Connection) -> None:
        # The one before is ended as late as this: COMMIT ends the last, and most are alone.
        if self._has_savepoint:
            connection.execute(SQL["keep-effect"])
        connection.execute(SQL["set-savepoint"])
        self._has_savepoint = True

    def _note(self, call: Call, values: Sequence[Any], reply_bytes: int) -> None:
        """Note the values of rows that `commit` is to write; none of them or all."""
        if not values:
            return
        self._to_write += values
        self.reply_bytes += reply_bytes
        if call.oldest_open_at_ms > 0:  # else the runtime does not know
            self._oldest_open_at_ms[call.store_id] = call.oldest_open_at_ms

    def _forget(self) -> None:
        """Forget the calls of a transaction that has ended, and their payloads."""
        self._found = {}
        self._open_call = None
        self._has_savepoint = False
        self._handler_runs = False
        self._to_write = []
        self._oldest_open_at_ms = {}
        self.reply_bytes = 0

    # ------------------------------------------------------ statements of authors, in a transaction

    def execute(self, statement: str, parameters: Parameters) -> Rows:
        """Run one statement of the author's in the open transaction."""
        try:
            return Rows(self._guarded().execute(statement, parameters))
        except sqlite3.DatabaseError as error:
            raise _explained(error) from error

    def executemany(self, statement: str, parameters: Iterable[Parameters]) -> Rows:
        """Run one statement for each set of parameters in the open transaction."""
        try:
            return Rows(self._guarded().executemany(statement, parameters))
        except sqlite3.DatabaseError as error:
            raise _explained(error) from error

    def begin_write(self) -> None:
        """Open a transaction that belongs to no call. Raises as `begin` does."""
        self._begin_immediate()
        self._overdue_at_s = time.monotonic() + self._max_hold_s
        self._handler_runs = True

    def commit_write(self) -> None:
        """Commit what `begin_write` began. Raises `CommitUnknown`, `TransactionMisused`."""
        assert self._connection is not None
        self._handler_runs = False
        self._check_open(self._connection)
        self._commit(self._connection)

    def _guarded(self) -> sqlite3.Connection:
        assert self._connection is not None
        self._check_open(self._connection)
        return self._connection

    def _check_open(self, connection: sqlite3.Connection) -> None:
        # After some errors (disk full, interrupt) SQLite rolls back by itself; what a handler that
        # caught the error wrote then would be committed at once, without the barrier's row.
        if not connection.in_transaction:
            raise TransactionMisused(
                "SQLite ended the transaction because of an earlier error; let that error pass"
            )

    # ------------------------------------------------------------------------------ purging

    def purge_page(self, after_seq: int, written_before_ms: int) -> tuple[int, int | None]:
        """Delete old rows among the next page; give how many, and where the next page begins.

        The position is ``None`` when there is no further page. A row stays if its saga may still be
        open: if it is not older than the oldest saga that its store had open when it last said so,
        or if the store has never said; or if its life holds a reservation. Raises as `begin` does.
        """
        connection = self._begin_immediate()
        try:
            open_since_ms = {
                _text(store_id): oldest_open_at_ms
                for store_id, oldest_open_at_ms in _plain(connection).execute(
                    SQL["read-oldest-open"]
                )
            }
            page = (
                _plain(connection).execute(SQL["read-oldest"], (after_seq, PURGE_PAGE)).fetchall()
            )
            held = _read_held(connection)
            doomed = []
            last_seq: int | None = None
            for seq, store_id, written_at_ms in page:
                if written_at_ms >= written_before_ms:
                    break
                last_seq = seq
                since_ms = open_since_ms.get(_text(store_id))
                is_over = since_ms is not None and written_at_ms < since_ms - CLOCK_SKEW_MS
                if is_over and seq not in held:
                    doomed.append((seq,))
            connection.executemany(SQL["delete-row"], doomed)
        except sqlite3.Error as error:
            raise self._drop(error) from error
        self._commit(connection)
        ended = len(page) < PURGE_PAGE or last_seq != page[-1][0]
        return len(doomed), None if ended else last_seq

    # --------------------------------------------------------------------------- connection

    def open(self) -> None:
        """Open the database if it is not open. Raises `BarrierError`."""
        if self._connection is not None:
            return
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            self._prepare(connection)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, BarrierError):
                raise
            # Of the schema or the author's factory, too: neither has a payload to quote.
            raise BarrierError(
                f"{self._name} cannot be used as a barrier: {type(error).__name__}: {error}"
            ) from error
        self._connection = connection
        self._must_checkpoint = False

    def close(self) -> None:
        """Close the connection; what is not committed is rolled back."""
        connection, self._connection = self._connection, None
        self._forget()
        if connection is not None:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.isolation_level = None  # the transactions are ours alone
        if sys.version_info >= (3, 12):
            connection.autocommit = sqlite3.LEGACY_TRANSACTION_CONTROL
        connection.execute(f"PRAGMA busy_timeout = {round(self._busy_timeout_s * 1000)}")
        journal_mode = _pragma(connection, "PRAGMA journal_mode = WAL")
        if journal_mode != "wal":
            raise BarrierError(
                f"{self._name} cannot be used as a barrier: its journal mode is {journal_mode!r} "
                "and SQLite does not change it to WAL (a database in memory forgets; a network "
                "file system cannot share it). Use a file on a local disk"
            )
        connection.execute("PRAGMA synchronous = FULL")
        synchronous = _pragma(connection, "PRAGMA synchronous")
        if synchronous != SYNCHRONOUS_FULL:
            raise BarrierError(
                f"{self._name} cannot be used as a barrier: synchronous = FULL was set, and "
                f"{synchronous} was read back; without it a power cut loses acknowledged calls"
            )
        # Its first column: it could not be completed because others read or write.
        if _pragma(connection, "PRAGMA wal_checkpoint(TRUNCATE)") and self._must_checkpoint:
            raise BarrierError(
                f"{self._name} is in use by others, and after a failed commit it must be "
                "checkpointed before its contents can be believed; trying again with the next call"
            )
        connection.execute(SQL["create-table"])
        connection.execute(SQL["create-stores-table"])
        for check, table in ("check-table", _ROWS), ("check-stores-table", _STORES):
            try:
                connection.execute(SQL[check])
            except sqlite3.OperationalError as error:
                raise BarrierError(
                    f"{self._name} has a table {table} that this version of amends cannot use "
                    f"({error}): it was made by another version; upgrade the SDK"
                ) from error
        if self._schema:
            connection.executescript(self._schema)
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._is_overdue, STEPS_BETWEEN_OVERDUE_CHECKS)
        logger.debug("%s is open, SQLite %s", self._name, sqlite3.sqlite_version)

    def _begin_immediate(self) -> sqlite3.Connection:
        self.open()
        assert self._connection is not None
        try:
            self._connection.execute(SQL["begin"])
        except sqlite3.OperationalError as error:
            if is_busy(error):
                raise DatabaseBusy(f"{self._name} is locked by another process") from error
            raise self._drop(error) from error
        except sqlite3.Error as error:
            raise self._drop(error) from error
        return self._connection

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute(SQL["commit"])
        except sqlite3.Error as error:
            self._must_checkpoint = True
            self._drop(error)
            raise CommitUnknown(
                f"a COMMIT in {self._name} failed ({error}) and may have happened all the same; "
                "the database is opened anew, and the next attempt finds out"
            ) from error
        self._forget()

    def _drop(self, error: sqlite3.Error) -> BarrierError:
        """Give up the connection that failed with `error`; the next call opens another."""
        try:
            self.close()
        except sqlite3.Error:
            logger.exception("the failed connection to %s cannot be closed", self._name)
        return BarrierError(f"{self._name} failed: {error}; it is opened anew with the next call")

    def _authorize(
        self,
        action: int,
        argument: str | None,
        name: str | None,
        _database: str | None,
        _trigger: str | None,
    ) -> int:
        """Refuse what would end the transaction under the handler, or forge the barrier's rows."""
        if not self._handler_runs:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_TRANSACTION:
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_SAVEPOINT and (name or "").lower() == "amends_effect":
            return sqlite3.SQLITE_DENY
        if action in _CHANGES and {_ROWS, _STORES} & {
            (argument or "").lower(),
            (name or "").lower(),
        }:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _is_overdue(self) -> bool:
        """Interrupt a statement of a handler that has held the transaction for too long."""
        return self._handler_runs and time.monotonic() > self._overdue_at_s


_ROWS: Final = "amends_barrier"
_STORES: Final = "amends_barrier_stores"
_CHANGES: Final = frozenset(
    {
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_UPDATE,
        sqlite3.SQLITE_DELETE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_ALTER_TABLE,
    }
)


def is_busy(error: sqlite3.Error) -> bool:
    """Tell whether an error means that somebody else has the lock; extended codes count."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


def _explained(error: sqlite3.DatabaseError) -> Exception:
    """Say what the guard refused, in place of SQLite's "not authorized"."""
    if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_AUTH:
        return error
    return TransactionMisused(
        "a handler may not begin, commit or roll back its transaction, nor change amends_barrier: "
        "return to commit, raise Rejected to roll back; nested savepoints of your own are fine"
    )


def _plain(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Give a cursor whose rows are tuples, whatever row factory the author has set."""
    cursor = connection.cursor()
    cursor.row_factory = None
    return cursor


def _pragma(connection: sqlite3.Connection, statement: str) -> Any:
    """Give the first column of a pragma's row."""
    row = _plain(connection).execute(statement).fetchone()
    value = row[0] if row else None
    return _text(value) if isinstance(value, bytes) else value


def _read_rows(connection: sqlite3.Connection, lives: Sequence[Life]) -> dict[Life, list[_Stored]]:
    """Read the rows of lives, as they are stored: what is wrong with one is that call's affair."""
    found: dict[Life, list[_Stored]] = {}
    cursor = _plain(connection)
    for size, start in _parts(len(lives)):
        values = [value for life in lives[start : start + size] for value in life]
        for store_id, saga_id, step, round_, *stored in cursor.execute(READ_ROWS[size], values):
            life = _text(store_id), _text(saga_id), _text(step), round_
            found.setdefault(life, []).append(tuple(stored))
    return found


def _read_held(connection: sqlite3.Connection) -> set[int]:
    """Read which rows are of lives that hold a reservation."""
    cursor = _plain(connection)
    if cursor.execute(SQL["has-holds"]).fetchone() is None:
        return set()
    return {seq for (seq,) in cursor.execute(SQL["read-held"])}


def _write_rows(connection: sqlite3.Connection, values: Sequence[Any]) -> None:
    for size, start in _parts(len(values) // ROW_VALUES):
        part = values[start * ROW_VALUES : (start + size) * ROW_VALUES]
        connection.execute(WRITE_ROWS[size], part)


def _parts(count: int) -> Iterator[tuple[int, int]]:
    """Divide `count` into sizes that there are statements for; give each with where it starts."""
    start = 0
    for size in SIZES:
        while count - start >= size:
            yield size, start
            start += size


def _values_of(
    call: Call, question: Question, writes: Iterable[Write], outcome: Outcome
) -> tuple[list[Any], int]:
    """Give the values of a call's rows and the bytes of the reply in them.

    Raises what an outcome raises that cannot be written down.
    """
    now_ms = time.time_ns() // 1_000_000
    values: list[Any] = []
    reply_bytes = 0
    for write in writes:
        own = write.verb is question.verb
        request_hash = question.request_hash if own else None
        reply = outcome_to_wire(outcome).SerializeToString() if own else None
        reply_bytes += len(reply or b"")
        values += (
            *life_of(call),
            write.verb.value,
            write.state.value,
            request_hash,
            reply,
            now_ms,
        )
    return values, reply_bytes


def life_of(call: Call) -> Life:
    """Give the life that a call belongs to."""
    return call.store_id, call.saga_id, call.step, call.round


_Stored: TypeAlias = tuple[Any, ...]
"""Verb, state, request hash and reply, as the database gives them."""


def _text(value: str | bytes) -> str:
    """Undo a text factory of the author's that gives bytes."""
    return value.decode() if isinstance(value, bytes) else value
