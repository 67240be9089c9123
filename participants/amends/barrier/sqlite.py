"""The barrier for participants whose effects live in a SQLite database."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from amends.barrier.sqlite_calls import DefCall, Transactions
from amends.barrier.sqlite_database import Database, Life, Parameters, Rows, life_of
from amends.barrier.sqlite_held import Held
from amends.barrier.sqlite_writer import Task, Writer
from amends.barrier.verdict import POLL_AFTER_S
from amends.errors import BarrierError, HandlerFailed, TransactionMisused
from amends.handler import Handler
from amends.outcomes import Call, Done, InProgress, Outcome

T = TypeVar("T")

DEFAULT_BUSY_TIMEOUT_S: Final = 1.0
"""Longer than a transaction should take, here or in another process; shorter than an attempt's
deadline."""

DEFAULT_MAX_HOLD_S: Final = 30.0
"""While one handler holds the transaction all others wait; three times the default deadline."""


class Transaction:
    """The open transaction, as a `def` handler sees it.

    What is written here is committed together with the barrier's row when the handler returns, and
    rolled back when it raises. It ends with its handler and stays in its thread.
    """

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database: Database | None = database

    def execute(self, statement: str, parameters: Parameters = ()) -> Rows:
        """Run one statement and give all of its rows.

        Raises what `sqlite3` raises, and `TransactionMisused` for statements that would end the
        transaction or change the barrier's table.
        """
        return self._lent().execute(statement, parameters)

    def executemany(self, statement: str, parameters: Iterable[Parameters]) -> Rows:
        """Run one statement for each set of parameters. Raises as `execute` does."""
        return self._lent().executemany(statement, parameters)

    def end(self) -> None:
        """Refuse every further use; the SDK calls it when the handler returns."""
        self._database = None

    def _lent(self) -> Database:
        if self._database is None:
            raise TransactionMisused("the transaction has ended; it lives as long as its handler")
        return self._database


class AsyncTransaction:
    """The open transaction, as an `async def` handler sees it: the same methods, to be awaited.

    While the handler awaits, the transaction stays open and the barrier's other calls wait: keep
    slow calls out of it. A statement whose `await` was cancelled may or may not have run; after
    that the transaction can only be rolled back. So it is if the handler returns Done while a
    statement is not awaited to its end.
    """

    __slots__ = ("_held", "_is_doomed", "_not_ended")

    def __init__(self, held: Held) -> None:
        self._held = held
        self._is_doomed = False
        self._not_ended = 0

    # Plain functions that give coroutines: what is called and never awaited must be counted.

    def execute(self, statement: str, parameters: Parameters = ()) -> Coroutine[Any, Any, Rows]:
        """Run one statement and give all of its rows. Raises as `Transaction.execute` does."""
        return self._counted(lambda database: database.execute(statement, parameters))

    def executemany(
        self, statement: str, parameters: Iterable[Parameters]
    ) -> Coroutine[Any, Any, Rows]:
        """Run one statement for each set of parameters. Raises as `execute` does."""
        # A list: the author's generator must not run in the writer's thread.
        sets = list(parameters)
        return self._counted(lambda database: database.executemany(statement, sets))

    async def settle(self, outcome: Outcome) -> Outcome:
        """End the transaction with an outcome; the SDK calls it when the handler returns."""
        self._check_not_doomed()
        if isinstance(outcome, Done):
            self._check_all_ended()
        return await asyncio.wrap_future(self._held.settle(outcome))

    def _counted(self, work: Callable[[Database], Rows]) -> Coroutine[Any, Any, Rows]:
        self._not_ended += 1
        return self._statement(work)

    async def _statement(self, work: Callable[[Database], Rows]) -> Rows:
        try:
            self._check_not_doomed()
            return await asyncio.wrap_future(self._held.submit(work))
        except asyncio.CancelledError:
            self._is_doomed = True
            raise
        finally:
            self._not_ended -= 1

    def _check_all_ended(self) -> None:
        """Refuse Done for what may not have happened: a statement without `await` never ran."""
        if self._not_ended:
            raise TransactionMisused(
                f"the handler returned before {self._not_ended} of its statements had ended: "
                "put await before each tx.execute and tx.executemany"
            )

    def _check_not_doomed(self) -> None:
        if self._is_doomed:
            raise TransactionMisused(
                "a statement of this transaction was cancelled, so nobody knows whether it ran; "
                "let the cancellation pass, and the transaction is rolled back"
            )


class SqliteBarrier:
    """Keeps the barrier's rows in the author's own SQLite database, in the author's transactions.

    `database` is a path, or a function that opens and returns a connection (for row factories, SQL
    functions or pragmas of your own); the function is called in the barrier's thread, at the start
    and after a failure. The barrier makes its tables ``amends_barrier`` and
    ``amends_barrier_stores`` there, sets WAL and ``synchronous=FULL`` and reads both back. `schema`
    is SQL for tables of your own, run at each opening, so write ``CREATE TABLE IF NOT EXISTS``.

    A handler that takes a second argument is given the open transaction: `Transaction` for `def`,
    `AsyncTransaction` for `async def`. A `def` handler runs whole in the barrier's thread and
    cannot be interrupted, except in a statement that takes longer than `max_hold_s`; an `async def`
    handler is cancelled when its caller leaves and after `max_hold_s`. Handlers run one at a time:
    it is one database. A handler that takes only the call runs inside the transaction, too, but
    what it does elsewhere is not rolled back with it: pass `Call.idempotency_key` on there.

    Calls that another process, or the handlers before them in this one, hold up for
    `busy_timeout_s` are answered `InProgress`, and have not run: asking again costs them no retry.
    Choose it shorter than the time that your steps give an attempt.

    With `share_commits`, calls of `def` handlers that wait when a transaction begins run one after
    another in it, and one commit, with one sync, makes all of them durable: at most 64 calls, and
    none joins after 20 ms. Each still has its own row and its own answer, which comes after the
    commit; a refusal or an exception takes back what its own handler wrote and nothing else. What
    it asks of you:

    - A handler sees what those before it wrote, although it is not committed yet; so leave in its
      database what it writes, or be ready for it to run again: a neighbour may cost it its commit.
    - A commit that fails leaves all of its calls unknown. So does one call's deferred constraint
      (``DEFERRABLE INITIALLY DEFERRED``), which SQLite checks then: once, for when they are asked
      again each of them has a transaction of its own.
    - An error for which SQLite rolls back everything (``OR ROLLBACK``, a full disk, a write that
      was interrupted) fails the call that met it; those before it are answered `InProgress`.
    - Handlers should be short: those that have run wait for those that run. One that has taken more
      than 20 ms begins a transaction of its own the next time.

    An `async def` handler always has a transaction of its own: nobody may wait for what it awaits.

    SQLite before 3.51.3 has a rare fault that can damage a database into which two connections
    write at once; so write into it through this barrier alone where you can (`write`), and read
    through connections of your own that are opened with ``mode=ro``.
    """

    transaction_types: tuple[type[Any], type[Any]] = (Transaction, AsyncTransaction)

    def __init__(
        self,
        database: str | os.PathLike[str] | Callable[[], sqlite3.Connection],
        *,
        schema: str = "",
        busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S,
        max_hold_s: float = DEFAULT_MAX_HOLD_S,
        share_commits: bool = False,
    ) -> None:
        if callable(database):
            connect, name = database, "the database of the connection factory"
        else:
            if os.fspath(database) in {"", ":memory:"}:
                raise ValueError("a barrier in memory forgets; give it the path of a file")
            # Absolute now: the thread opens it again later, wherever the process is then.
            path = Path(database).absolute()
            connect, name = partial(_connect, path), str(path)
        self._name = name
        self._busy_timeout_s = busy_timeout_s
        self._max_hold_s = max_hold_s
        self._database = Database(
            connect,
            name=name,
            schema=schema,
            busy_timeout_s=busy_timeout_s,
            max_hold_s=max_hold_s,
        )
        self._writer: Writer | None = None
        self._openings = 0
        self._transactions = Transactions(are_shared=share_commits)
        self._running: set[Life] = set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    def add_schema(self, schema: str) -> None:
        """Have SQL run at each opening, after `schema`; for what comes with tables of its own.

        The same text again changes nothing. Raises `RuntimeError` if the barrier is open.
        """
        if self._writer is not None:
            raise RuntimeError(f"the barrier on {self._name} is open: it takes no further schema")
        self._database.add_schema(schema)

    async def open(self) -> None:
        """Open the database and make the barrier's table and yours. Raises `BarrierError`.

        May be called again while it is open; each `open` wants its `aclose`.
        """
        self._openings += 1
        if self._writer is None:
            self._writer = Writer(self._database, self._name)
        try:
            await self._in_thread(Database.open)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Let the calls under way and queued end, then close the database."""
        self._openings = max(0, self._openings - 1)
        if self._openings == 0 and self._writer is not None:
            writer, self._writer = self._writer, None
            await asyncio.wrap_future(writer.stop())

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        """Answer one call; see `amends.barrier.Barrier.run` and the rules in `verdict.py`."""
        writer = self._opened()
        life = life_of(call)
        if life in self._running:
            return InProgress(POLL_AFTER_S)
        # Released by the thread when the transaction has ended, not when the caller leaves.
        self._running.add(life)
        release = partial(self._running.discard, life)
        until_s = writer.loop.time() + self._busy_timeout_s
        if handler is not None and handler.is_async:
            held = Held(call, until_s=until_s, max_hold_s=self._max_hold_s, release=release)
            return await self._run_held(writer, call, handler, held)
        job = DefCall(
            call,
            handler,
            future=writer.loop.create_future(),
            until_s=until_s,
            transactions=self._transactions,
            lend=Transaction,
            release=release,
        )
        writer.submit(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            writer.withdraw(job)
            raise

    async def _run_held(self, writer: Writer, call: Call, handler: Handler, held: Held) -> Outcome:
        try:
            writer.submit(held)
            answer = await asyncio.wrap_future(held.begun)
            if answer is not None:
                return answer
            transaction = AsyncTransaction(held)
            outcome = await self._bounded(call, handler, transaction)
            return await transaction.settle(outcome)
        except Exception:
            held.abandon()
            await asyncio.wrap_future(held.ended)
            raise
        except BaseException:  # cancelled, or the event loop ends: the thread must not be kept
            writer.withdraw(held)
            held.abandon()
            raise

    async def _bounded(self, call: Call, handler: Handler, tx: AsyncTransaction) -> Outcome:
        try:
            # A TimeoutError of the handler's own has become HandlerFailed inside.
            async with asyncio.timeout(self._max_hold_s):
                return await handler.answer_async(call, tx)
        except TimeoutError as error:
            raise HandlerFailed(
                f"the handler of {call.verb} {call.action!r} held its transaction for more than "
                f"{self._max_hold_s:g} s; it was rolled back",
                cause_type="TimeoutError",
                where=handler.where,
            ) from error

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction of its own, in the barrier's thread, and commit it.

        For what the participant writes without being called, so that one connection writes into the
        database. Raises what `work` raises (nothing is kept then) and `BarrierError`.
        """

        def transact(database: Database) -> T:
            database.begin_write()
            transaction = Transaction(database)
            try:
                value = work(transaction)
            finally:
                transaction.end()
            database.commit_write()
            return value

        return await self._in_thread(transact)

    async def purge(self, older_than_ms: int) -> int:
        """Delete rows that were written more than `older_than_ms` ago; give how many.

        Choose an age beyond the oldest backup that could ever be restored, the runtime's or this
        database's: a row that is gone no longer recognises a repeated call. Rows that may belong to
        a saga that is still open stay, however old they are. The runtime says in its calls when its
        oldest open saga was started; the last word of each runtime's store is kept in the database,
        so a purge needs no call before it, and rows of a store that has never said stay.
        Raises `BarrierError`.
        """
        if older_than_ms < 0:
            raise ValueError(f"older_than_ms is an age, and {older_than_ms} is negative")
        written_before_ms = time.time_ns() // 1_000_000 - older_than_ms
        deleted = 0
        position: int | None = 0
        while position is not None:
            page = partial(
                Database.purge_page,
                after_seq=position,
                written_before_ms=written_before_ms,
            )
            count, position = await self._in_thread(page)
            deleted += count
        return deleted

    async def _in_thread(self, work: Callable[[Database], T]) -> T:
        task = Task(work)
        self._opened().submit(task)
        return await asyncio.wrap_future(task.future)

    def _opened(self) -> Writer:
        if self._writer is None:
            raise BarrierError(f"the barrier on {self._name} is not open")
        return self._writer


def _connect(path: Path) -> sqlite3.Connection:
    if not path.parent.is_dir():
        raise BarrierError(
            f"{path} cannot be used as a barrier: there is no folder {path.parent}; make it with "
            f"`mkdir -p {path.parent}`, or give another path"
        )
    return sqlite3.connect(path)
