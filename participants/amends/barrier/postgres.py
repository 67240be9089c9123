"""The barrier for participants whose effects live in a PostgreSQL database."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

from google.protobuf.message import DecodeError

from amends.barrier import postgres_rows
from amends.barrier.postgres_asyncpg import AsyncpgSessions
from amends.barrier.postgres_pool import Pool, PoolBusy
from amends.barrier.postgres_port import (
    HELD_UP,
    IN_FAILED_TRANSACTION,
    INVALID_SAVEPOINT,
    PLAIN_DSN,
    ConnectionLost,
    Session,
    Sessions,
    StatementFailed,
    sqlstate_of,
)
from amends.barrier.postgres_psycopg import PsycopgSessions
from amends.barrier.postgres_rows import Life, Tables, is_ours, life_of, open_tables, unreadable
from amends.barrier.verdict import (
    POLL_AFTER_S,
    Answer,
    Question,
    Replay,
    Rows,
    has_no_rows,
    held_rows,
    judge,
    question_of,
    settle,
)
from amends.errors import BarrierError, HandlerFailed, NotCompensatable, TransactionMisused
from amends.handler import Handler, is_async
from amends.outcomes import Broken, Call, InProgress, Outcome
from amends.v1 import participant_pb2
from amends.wire import outcome_from_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

Driver: TypeAlias = Literal["asyncpg", "psycopg"]
"""By which library the database is reached."""

DEFAULT_BUSY_TIMEOUT_S: Final = 1.0
"""Longer than a transaction should take; shorter than an attempt's deadline."""

DEFAULT_MAX_HOLD_S: Final = 30.0
"""What a handler holds others may wait for; three times the default deadline."""

DEFAULT_MAX_CONNECTIONS: Final = 10
"""Of one process. A server takes 100 by default, and each costs it a process."""

IDLE_MARGIN_S: Final = 2.0
"""The event loop ends a handler that takes too long; only if it does not come to it in this time
(the handler blocks it, or is a `def` that waits for something else) does the server."""


class PostgresBarrier:
    """Keeps the barrier's rows in the author's own PostgreSQL database, in his transactions.

    `database` is a DSN (``postgresql://…``), or a function that opens and returns a connection of
    the driver (for codecs, TLS or passwords of your own): `async def` for asyncpg and for
    ``psycopg.AsyncConnection``, `def` for ``psycopg.Connection``. The barrier makes its tables
    ``amends_barrier`` and ``amends_barrier_stores`` in the first schema of the search path.
    `schema` is SQL for tables of your own, run in one transaction at each opening, so write
    ``CREATE TABLE IF NOT EXISTS``. It waits for locks in short turns, so that it holds up nobody's
    calls: an opening that finds a table locked runs it anew, for about a minute.

    A handler that takes a second argument is given the driver's own connection, inside the
    barrier's transaction (READ COMMITTED), and no other connection may have its effects:

    =============  ======================  ========================
    `driver`       ``async def`` handler   ``def`` handler
    =============  ======================  ========================
    ``"asyncpg"``  `asyncpg.Connection`    none: `serve` refuses it
    ``"psycopg"``  `AsyncConnection`       `Connection`, in a thread
    =============  ======================  ========================

    What it asks of you:

    - Leave the transaction open: return to commit, raise `Rejected` to roll back. Savepoints and
      the driver's own nested ``transaction()`` are fine. A handler that sends a COMMIT or ROLLBACK
      all the same is found out and answered ``Broken("transaction_ended")``: what it wrote may be
      there without the barrier's row, and must be looked at by a person.
    - Let go of the connection when the handler ends: it is another call's then. Await all that was
      begun with it. What you set for a session stays for other calls: write ``SET LOCAL``.
    - After a statement that failed, nothing of the transaction can be kept; wrap one that may fail
      in a ``transaction()`` of its own.

    Calls of different lives run at the same time, at most `max_connections` of them, each on a
    connection of its own; your own row locks order them where they meet. A call that is held up (no
    connection free, or a lock of another transaction not free for `busy_timeout_s`, a deadlock, a
    serialization failure) is answered `InProgress`, and nothing of it is kept: asking again costs
    no retry. Calls of one life exclude each other, also between processes, by an advisory lock.

    A handler that takes longer than `max_hold_s` is cancelled; a `def` handler, which cannot be,
    loses its transaction. The server must sync its commits: ``synchronous_commit`` is set to
    ``on`` in each transaction unless it is ``remote_apply``. A standby is refused.

    Raises `BarrierError` if the driver is not installed.
    """

    transaction_types: tuple[type[Any], type[Any]]

    def __init__(
        self,
        database: str | Callable[[], Any],
        *,
        driver: Driver = "asyncpg",
        schema: str = "",
        busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S,
        max_hold_s: float = DEFAULT_MAX_HOLD_S,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
    ) -> None:
        if max_connections < 1:
            raise ValueError(f"max_connections is {max_connections}; a call needs one")
        self.driver: Driver = driver
        self._name = name_of(database)
        self._schemas = [schema]
        self._busy_timeout_s = busy_timeout_s
        self._max_hold_s = max_hold_s
        self._max_connections = max_connections
        self._connect = Connecting(database, driver, max_connections)
        self.transaction_types = self._connect.sessions.transaction_types
        self._openings = 0
        self._opening = asyncio.Lock()
        self._open: _Open | None = None
        self._running: set[Life] = set()

    def __repr__(self) -> str:
        return f"<PostgresBarrier {self._name} over {self.driver}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    def add_schema(self, schema: str) -> None:
        """Have SQL run at each opening, after `schema`; for what comes with tables of its own.

        The same text again changes nothing. Raises `RuntimeError` if the barrier is open.
        """
        if self._open is not None:
            raise RuntimeError(f"{self._name} is open: it takes no further schema")
        if schema not in self._schemas:
            self._schemas.append(schema)

    async def open(self) -> None:
        """Connect, and make the barrier's tables and yours. Raises `BarrierError`.

        May be called again while it is open; each `open` wants its `aclose`.
        """
        async with self._opening:
            if self._open is None:
                self._open = await self._opened_anew()
            self._openings += 1

    async def aclose(self) -> None:
        """Let the calls under way end, then close all connections."""
        async with self._opening:
            self._openings = max(0, self._openings - 1)
            if self._openings == 0 and self._open is not None:
                opened, self._open = self._open, None
                await opened.pool.aclose()
                self._connect.aclose()

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        """Answer one call; see `amends.barrier.Barrier.run` and the rules in `verdict.py`."""
        opened = self._opened()
        life = life_of(call)
        if life in self._running:
            return InProgress(POLL_AFTER_S)
        self._running.add(life)
        try:
            return await self._run(opened, call, handler)
        finally:
            # A cancelled call's transaction may still be open: then the advisory lock is held.
            self._running.discard(life)

    async def write(self, work: Callable[[Any], T] | Callable[[Any], Awaitable[T]]) -> T:
        """Run ``work(connection)`` in a transaction of its own, and commit it.

        For what the participant writes without being called. `work` is a `def` (psycopg) or an
        `async def` function. Raises what `work` raises (nothing is kept then), and `BarrierError`,
        also if no connection is free for `busy_timeout_s`.
        """
        pool = self._opened().pool
        session = await pool.take(is_async=is_async(work), timeout_s=self._busy_timeout_s)
        has_ended = False
        try:
            try:
                await self._begin(session)
                await session.set_savepoint()
                value = await session.in_own_way(work)
                if not session.in_transaction or not await is_ours(session):
                    raise TransactionMisused(
                        "the function has ended its transaction; return to commit, raise to roll "
                        "back"
                    )
                await session.keep()
                await postgres_rows.make_commit_safe(session)
            except Exception:
                await _let_go(session)
                has_ended = True
                raise
        except BaseException:
            pool.give_back(session, was_cut=not has_ended, has_failed=True)
            raise
        await self._commit(pool, session)
        return value  # type: ignore[no-any-return]

    async def purge(self, older_than_ms: int) -> int:
        """Delete rows that were written more than `older_than_ms` ago; give how many.

        The rules are those of `SqliteBarrier.purge`. Raises `BarrierError`.
        """
        if older_than_ms < 0:
            raise ValueError(f"older_than_ms is an age, and {older_than_ms} is negative")
        opened = self._opened()
        async with opened.pool.lent() as session:
            return await opened.tables.purge(session, older_than_ms)

    # -------------------------------------------------------------------------------- a call

    async def _run(self, opened: _Open, call: Call, handler: Handler | None) -> Outcome:
        pool = opened.pool
        for_async = handler is None or handler.is_async
        try:
            session = await pool.take(is_async=for_async, timeout_s=self._busy_timeout_s)
        except PoolBusy:
            return InProgress(POLL_AFTER_S)
        decided: tuple[Outcome, bool] | None = None
        try:
            try:
                decided = await self._decide(opened.tables, session, call, handler)
            except Exception as error:
                await _let_go(session)
                if not _is_held_up(error):
                    raise
                decided = InProgress(POLL_AFTER_S), False
            outcome, must_commit = decided
            if not must_commit:
                # Before the answer: whoever has it may ask again at once, and finds the lock free.
                await _let_go(session)
        except BaseException as error:
            pool.give_back(session, was_cut=not isinstance(error, Exception), has_failed=True)
            raise
        if not must_commit:
            pool.give_back(session)
            return outcome
        try:
            await self._commit(pool, session)
        except StatementFailed as error:
            if not error.is_held_up:
                raise
            return InProgress(POLL_AFTER_S)
        return outcome

    async def _decide(
        self, tables: Tables, session: Session, call: Call, handler: Handler | None
    ) -> tuple[Outcome, bool]:
        """Do all up to the COMMIT; give the answer, and whether it needs that COMMIT."""
        await self._begin(session)
        life = life_of(call)
        if not await tables.hold(session, life):
            return InProgress(POLL_AFTER_S), False
        rows = await tables.read(session, life)
        question = question_of(call)
        if has_no_rows(question, rows) and await _holds(session, call, handler):
            rows = held_rows()
        match judge(question, rows):
            case Replay(reply=reply):
                outcome = _stored(reply)
                await postgres_rows.make_seen_safe(session)
                return outcome, True
            case Answer(outcome=outcome, writes=writes):
                if isinstance(outcome, InProgress):
                    return outcome, False
                if writes:
                    await tables.write(session, call, question, writes, outcome)
                else:
                    await postgres_rows.make_seen_safe(session)
                return outcome, True
            case _:
                pass
        if handler is None:
            raise NotCompensatable(action=call.action, step=call.step, saga_id=call.saga_id)
        if handler.takes_transaction:
            await session.set_savepoint()
        outcome = await self._handled(session, call, handler)
        return await self._settle(
            tables, session, call, outcome, handler=handler, question=question, rows=rows
        )

    async def _handled(self, session: Session, call: Call, handler: Handler) -> Outcome:
        try:
            # A TimeoutError of the handler's own has become HandlerFailed inside.
            async with asyncio.timeout(self._max_hold_s):
                return await session.answer(handler, call)
        except TimeoutError as error:
            raise HandlerFailed(
                f"the handler of {call.verb} {call.action!r} held its transaction for more than "
                f"{self._max_hold_s:g} s; it is rolled back",
                cause_type="TimeoutError",
                where=handler.where,
            ) from error
        except HandlerFailed:
            if handler.takes_transaction and await _has_ended(session):
                return _ended(call)
            raise

    async def _settle(
        self,
        tables: Tables,
        session: Session,
        call: Call,
        outcome: Outcome,
        *,
        handler: Handler,
        question: Question,
        rows: Rows,
    ) -> tuple[Outcome, bool]:
        """Settle what a handler said, if its transaction is still the one that it was given."""
        settlement = settle(question, rows, outcome)
        if handler.takes_transaction:
            if not session.is_usable:
                raise ConnectionLost("the connection to PostgreSQL was lost while the handler ran")
            if not session.in_transaction:
                return _ended(call), False
            is_undone = False
            try:
                ours = await is_ours(session)
            except StatementFailed as error:
                if error.sqlstate != IN_FAILED_TRANSACTION:
                    raise
                if settlement.keeps_effect:
                    raise TransactionMisused(
                        "a statement of the handler failed, and it went on regardless: PostgreSQL "
                        "keeps nothing of such a transaction. Let the error pass, or wrap the "
                        "statement in a transaction() of its own"
                    ) from error
                if await _has_ended(session):
                    return _ended(call), False
                ours = is_undone = True
            if not ours:
                return _ended(call), False
            await _end_savepoint(session, keeps=settlement.keeps_effect, is_undone=is_undone)
        if isinstance(outcome, InProgress):
            return outcome, False
        if settlement.writes:
            await tables.write(session, call, question, settlement.writes, outcome)
        else:
            await postgres_rows.make_seen_safe(session)
        return outcome, True

    async def _begin(self, session: Session) -> None:
        await postgres_rows.begin(
            session,
            statement_s=self._max_hold_s,
            lock_s=self._busy_timeout_s,
            idle_s=self._max_hold_s + IDLE_MARGIN_S,
        )

    async def _commit(self, pool: Pool, session: Session) -> None:
        await pool.uncancelled(session.commit(), session)

    # ------------------------------------------------------------------------------ opening

    async def _opened_anew(self) -> _Open:
        pool = Pool(self._connect.sessions, max_connections=self._max_connections, name=self._name)
        try:
            async with pool.lent() as session:
                tables = await open_tables(session, self._schemas[0], self._schemas[1:])
                if not await postgres_rows.is_durable(session):
                    logger.warning(
                        "%s has fsync = off: a power cut loses acknowledged calls", self._name
                    )
        except BaseException as error:
            await pool.aclose()
            self._connect.aclose()
            if isinstance(error, BarrierError):
                # Of the schema, too: it has no payload to quote.
                raise BarrierError(f"{self._name} cannot be used as a barrier: {error}") from error
            raise
        return _Open(pool, tables)

    def _opened(self) -> _Open:
        if self._open is None:
            raise BarrierError(f"the barrier on {self._name} is not open")
        return self._open


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is while a barrier is open."""

    pool: Pool
    tables: Tables


class Connecting:
    """How connections are made: the driver, and the threads in which `def` code waits for it."""

    def __init__(
        self, database: str | Callable[[], Any], driver: Driver, max_connections: int
    ) -> None:
        self.sessions: Sessions
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        if isinstance(database, str) and not database.strip():
            raise ValueError(
                "the DSN is empty: is the variable set that it comes from? Write "
                "postgresql://user:password@host:5432/database"
            )
        match driver:
            case "asyncpg":
                self.sessions = AsyncpgSessions(database)
            case "psycopg":
                self.sessions = PsycopgSessions(database, self._threads_now)
                self._max_threads = max_connections
            case _:
                raise ValueError(f"driver is {driver!r}; there are 'asyncpg' and 'psycopg'")

    def aclose(self) -> None:
        """Let the threads end, when what they do has ended."""
        if self._threads is not None:
            threads, self._threads = self._threads, None
            threads.shutdown(wait=False, cancel_futures=True)

    def _threads_now(self) -> concurrent.futures.Executor:
        if self._threads is None:
            self._threads = concurrent.futures.ThreadPoolExecutor(
                self._max_threads, "amends postgres"
            )
        return self._threads


def name_of(database: str | Callable[[], Any]) -> str:
    """Name a database for errors and logs, without user or password.

    Nothing is told of a DSN that can be read in two ways, as one with a ``/``, ``?``, ``#`` or
    ``@`` that is not escaped in its password.
    """
    if callable(database):
        return "the PostgreSQL database of the connection function"
    parts = PLAIN_DSN.fullmatch(database)
    if parts is None:
        return "the PostgreSQL database of the DSN"
    return f"PostgreSQL at {parts['hosts'] or 'its default'}{parts['path'] or ''}"


async def _let_go(session: Session) -> None:
    """Roll back; a connection that cannot even do that is lost, and the server rolls back."""
    with contextlib.suppress(BarrierError):
        await session.roll_back()


async def _holds(session: Session, call: Call, handler: Handler | None) -> bool:
    """Ask a handler that knows it whether something is held for a call's life."""
    if handler is None or handler.finds_held is None:
        return False
    if not handler.is_async:
        return bool(await session.in_own_way(partial(handler.holds, call)))
    return bool(await session.in_own_way(partial(handler.holds_async, call)))


async def _has_ended(session: Session) -> bool:
    """Tell whether a handler that failed, or whose statement did, has ended its transaction."""
    if not session.is_usable:
        return False  # lost, and so rolled back
    if not session.in_transaction:
        return True
    try:
        try:
            return not await is_ours(session)
        except StatementFailed as error:
            if error.sqlstate != IN_FAILED_TRANSACTION:
                raise
        await session.undo()
        return not await is_ours(session)
    except StatementFailed:
        return True  # it has failed, and our savepoint is not in it: nobody can tell any more
    except ConnectionLost:
        return False


async def _end_savepoint(session: Session, *, keeps: bool, is_undone: bool) -> None:
    try:
        if keeps:
            await session.keep()
        elif not is_undone:
            await session.undo()
    except StatementFailed as error:
        if error.sqlstate != INVALID_SAVEPOINT:
            raise
        raise TransactionMisused(
            "a handler may not release or roll back to the savepoint amends_effect; savepoints of "
            "your own are fine"
        ) from error


def _ended(call: Call) -> Broken:
    return Broken(
        "transaction_ended",
        f"the handler of {call.verb} {call.action!r} has ended its transaction by itself: what it "
        "wrote may be there without the barrier's row. Look, mend it by hand, and resolve the "
        "step; a handler returns to commit and raises Rejected to roll back",
    )


def _is_held_up(error: Exception) -> bool:
    return isinstance(error, StatementFailed | HandlerFailed) and sqlstate_of(error) in HELD_UP


def _stored(reply: bytes) -> Outcome:
    try:
        return outcome_from_wire(participant_pb2.Outcome.FromString(reply))
    except (ValueError, DecodeError) as error:
        raise unreadable(error) from error
