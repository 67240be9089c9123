"""Sessions over psycopg 3.

For `async def` handlers there is ``psycopg.AsyncConnection``, and for `def` handlers
``psycopg.Connection``, which is used in threads.

The connections are in autocommit mode, so that a transaction begins where we begin it. A handler
runs inside ``connection.transaction()``: psycopg then refuses the handler's own ``commit()`` and
``rollback()``, and lets it nest its own.
"""

# ruff: noqa: D102  # a method is documented once, at its port

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from amends.barrier.postgres_port import (
    ANSWER_WITHIN_S,
    APPLICATION_NAME,
    COMMIT_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    Session,
    StatementFailed,
    answered_within,
    give_up_after,
    literal,
    missing,
    named,
    rolled_back,
    translated,
    unasked,
    unreachable,
)
from amends.barrier.postgres_sockets import LIBPQ_OPTIONS, hang_up
from amends.handler import Handler, thread_context
from amends.outcomes import Call, Outcome

if TYPE_CHECKING:
    import psycopg

SAVEPOINT: Final = "amends_effect"

BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"


class AsyncPsycopgSession:
    """One ``psycopg.AsyncConnection``; see `postgres_port.Session`."""

    is_async = True

    def __init__(self, connection: psycopg.AsyncConnection[Any], driver: Any) -> None:
        self.connection = connection
        self._driver = driver
        self._effect: Any = None
        self._at_work = 0
        self._is_discarded = False

    @property
    def is_usable(self) -> bool:
        return not (self._is_discarded or self.connection.closed)

    @property
    def in_transaction(self) -> bool:
        return self.is_usable and _in_transaction(self.connection)

    @property
    def running(self) -> asyncio.Future[Any] | None:
        return None

    async def run(self, script: str, *, within_s: float | None = ANSWER_WITHIN_S) -> None:
        await self._command(script, within_s)

    async def rows(
        self, statement: str, *values: object, within_s: float | None = ANSWER_WITHIN_S
    ) -> list[tuple[Any, ...]]:
        with self._asked(within_s):
            cursor = self._driver.AsyncRawCursor(
                self.connection, row_factory=self._driver.rows.tuple_row
            )
            async with cursor:
                await cursor.execute(statement, values)
                return list(await cursor.fetchall()) if cursor.description else []

    async def begin(self, settings: str = "") -> None:
        await self._command(f"{BEGIN};{settings}")

    async def set_savepoint(self) -> None:
        effect = self.connection.transaction(savepoint_name=SAVEPOINT)
        with self._asked():
            await effect.__aenter__()
        self._effect = effect

    async def keep(self) -> None:
        effect, self._effect = self._effect, None
        with self._asked():
            await effect.__aexit__(None, None, None)

    async def undo(self) -> None:
        effect, self._effect = self._effect, None
        rollback = self._driver.Rollback()
        with self._asked():
            await effect.__aexit__(type(rollback), rollback, None)

    async def commit(self) -> None:
        await self._end("COMMIT", "COMMIT")

    async def prepare(self, global_id: str) -> None:
        await self._end(f"PREPARE TRANSACTION {literal(global_id)}", "PREPARE TRANSACTION")

    async def finish(self, command: str) -> None:
        await self._command(command, COMMIT_TIMEOUT_S, commits=named(command))

    async def roll_back(self) -> None:
        with self._asked(ends=True):
            if self._effect is not None:
                # Or psycopg would believe for ever that it is open, and count the next one wrongly.
                with contextlib.suppress(self._driver.Error):
                    await self.undo()
            if self.in_transaction:
                await self.connection.execute("ROLLBACK")

    async def answer(self, handler: Handler, call: Call) -> Outcome:
        if handler.is_async:
            with self._used():
                return await handler.answer_async(call, self.connection)
        # It takes the call alone: `serve` has seen to that.
        context = thread_context()
        return await asyncio.get_running_loop().run_in_executor(
            None, context.run, handler.answer, call, None
        )

    async def in_own_way(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        with self._used():
            return await work(self.connection)

    def discard(self) -> None:
        self._is_discarded = True
        if self._at_work:
            # Its socket's number must not become another's while the event loop watches it.
            _hang_up(self.connection)
        else:
            # Of libpq's own: it is never async, and says farewell without waiting for an answer.
            self.connection.pgconn.finish()

    async def aclose(self) -> None:
        with contextlib.suppress(Exception):
            await self.connection.close()

    async def _end(self, command: str, answer: str) -> None:
        said = await self._command(command, COMMIT_TIMEOUT_S, commits=answer)
        if said != answer:
            raise rolled_back(answer)

    async def _command(
        self, command: str, within_s: float | None = ANSWER_WITHIN_S, *, commits: str = ""
    ) -> str | None:
        with self._asked(within_s, commits=commits):
            # Its own text is no template: without values psycopg leaves % alone.
            executing = self.connection.execute(command)
            cursor = await (unasked(self, executing) if commits else executing)
            return cursor.statusmessage

    @contextlib.contextmanager
    def _asked(
        self, within_s: float | None = ANSWER_WITHIN_S, *, commits: str = "", ends: bool = False
    ) -> Iterator[None]:
        with (
            self._used(),
            answered_within(self, within_s),
            translated(self, (OSError, self._driver.Error), commits=commits, ends=ends),
        ):
            yield

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            if self._is_discarded and not self._at_work:
                self.connection.pgconn.finish()


class PsycopgSession:
    """One ``psycopg.Connection``, used in threads; see `postgres_port.Session`.

    What a thread has begun ends there, whoever leaves meanwhile: `roll_back` comes after it, and
    `discard` takes the connection from it. The server's time limits bound it, and ours.
    """

    is_async = False

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        driver: Any,
        threads: concurrent.futures.Executor,
    ) -> None:
        self.connection = connection
        self._driver = driver
        self._threads = threads
        self._effect: Any = None
        self._running: asyncio.Future[Any] | None = None
        self._is_discarded = False

    @property
    def is_usable(self) -> bool:
        return not (self._is_discarded or self.connection.closed)

    @property
    def in_transaction(self) -> bool:
        return self.is_usable and _in_transaction(self.connection)

    @property
    def running(self) -> asyncio.Future[Any] | None:
        running = self._running
        return running if running is not None and not running.done() else None

    async def run(self, script: str, *, within_s: float | None = ANSWER_WITHIN_S) -> None:
        await self._in_thread(within_s, self._command, script)

    async def rows(
        self, statement: str, *values: object, within_s: float | None = ANSWER_WITHIN_S
    ) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = await self._in_thread(within_s, self._rows, statement, values)
        return rows

    async def begin(self, settings: str = "") -> None:
        await self._in_thread(ANSWER_WITHIN_S, self._command, f"{BEGIN};{settings}")

    async def set_savepoint(self) -> None:
        await self._in_thread(ANSWER_WITHIN_S, self._set_savepoint)

    async def keep(self) -> None:
        await self._in_thread(ANSWER_WITHIN_S, self._exit)

    async def undo(self) -> None:
        await self._in_thread(ANSWER_WITHIN_S, self._exit, self._driver.Rollback())

    async def commit(self) -> None:
        await self._in_thread(COMMIT_TIMEOUT_S, self._end, "COMMIT", "COMMIT")

    async def prepare(self, global_id: str) -> None:
        command = f"PREPARE TRANSACTION {literal(global_id)}"
        await self._in_thread(COMMIT_TIMEOUT_S, self._end, command, "PREPARE TRANSACTION")

    async def finish(self, command: str) -> None:
        work = functools.partial(self._command, commits=named(command))
        await self._in_thread(COMMIT_TIMEOUT_S, work, command)

    async def roll_back(self) -> None:
        await self._in_thread(ANSWER_WITHIN_S, self._roll_back)

    async def answer(self, handler: Handler, call: Call) -> Outcome:
        if handler.is_async:
            # It takes the call alone: `serve` has seen to that.
            return await handler.answer_async(call, None)
        context = thread_context()
        outcome: Outcome = await self._in_thread(
            None, context.run, handler.answer, call, self.connection
        )
        return outcome

    async def in_own_way(self, work: Callable[[Any], Any]) -> Any:
        return await self._in_thread(None, thread_context().run, work, self.connection)

    def discard(self) -> None:
        self._is_discarded = True
        if (running := self.running) is not None:
            _hang_up(self.connection)
            # libpq's memory must not go away under a thread that uses it.
            running.add_done_callback(lambda _: self.connection.pgconn.finish())
        else:
            self.connection.pgconn.finish()

    async def aclose(self) -> None:
        with contextlib.suppress(Exception):
            await self._in_thread(ANSWER_WITHIN_S, self.connection.close)

    # --- in a thread

    def _set_savepoint(self) -> None:
        effect = self.connection.transaction(savepoint_name=SAVEPOINT)
        with self._translated():
            effect.__enter__()
        self._effect = effect

    def _exit(self, error: BaseException | None = None) -> None:
        effect, self._effect = self._effect, None
        with self._translated():
            effect.__exit__(type(error) if error is not None else None, error, None)

    def _roll_back(self) -> None:
        with self._translated(ends=True):
            if self._effect is not None:
                # Or psycopg would believe for ever that it is open, and count the next one wrongly.
                with contextlib.suppress(StatementFailed):
                    self._exit(self._driver.Rollback())
            if self.in_transaction:
                self.connection.execute("ROLLBACK")

    def _rows(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with (
            self._translated(),
            self._driver.RawCursor(
                self.connection, row_factory=self._driver.rows.tuple_row
            ) as cursor,
        ):
            cursor.execute(statement, values)
            return list(cursor.fetchall()) if cursor.description else []

    def _end(self, command: str, answer: str) -> None:
        if self._command(command, commits=answer) != answer:
            raise rolled_back(answer)

    def _command(self, command: str, *, commits: str = "") -> str | None:
        with self._translated(commits=commits):
            return self.connection.execute(command).statusmessage

    # --- between

    async def _in_thread(
        self, within_s: float | None, work: Callable[..., Any], *arguments: Any
    ) -> Any:
        if (running := self.running) is not None:
            # Somebody was cancelled while his statement ran: it ends first.
            await asyncio.wait([running])
        loop = asyncio.get_running_loop()
        self._running = running = loop.run_in_executor(self._threads, work, *arguments)
        running.add_done_callback(_look)
        if within_s is not None:
            timer = give_up_after(self, within_s)
            running.add_done_callback(lambda _: timer.cancel())
        # Shielded: a future that is cancelled no longer says when its thread has ended.
        return await asyncio.shield(running)

    def _translated(
        self, *, commits: str = "", ends: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        return translated(self, (OSError, self._driver.Error), commits=commits, ends=ends)


class PsycopgSessions:
    """Opens connections with psycopg, from a DSN or with an author's own function.

    From a DSN both kinds come; a function that is `async def` gives ``AsyncConnection`` for
    `async def` handlers, another one ``Connection`` for `def` handlers, and then the other kind of
    handler can have no transaction.
    """

    def __init__(
        self,
        dsn_or_connect: str | Callable[[], Any],
        threads: Callable[[], concurrent.futures.Executor],
    ) -> None:
        self._dsn_or_connect = dsn_or_connect
        self._threads = threads

    @property
    def transaction_types(self) -> tuple[type[Any], type[Any]]:
        driver = _driver()
        for_def, for_async = driver.Connection, driver.AsyncConnection
        if not callable(self._dsn_or_connect):
            return for_def, for_async
        if inspect.iscoroutinefunction(self._dsn_or_connect):
            return NoneType, for_async
        return for_def, NoneType

    async def connect(self, *, is_async: bool) -> Session:
        driver = _driver()
        if callable(self._dsn_or_connect):
            is_async = inspect.iscoroutinefunction(self._dsn_or_connect)
        try:
            if is_async:
                return AsyncPsycopgSession(await self._connect_async(driver), driver)
            threads = self._threads()
            loop = asyncio.get_running_loop()
            connecting = loop.run_in_executor(threads, self._connect, driver)
            try:
                # Shielded: the thread connects to the end, and somebody must close what it made.
                connection = await asyncio.shield(connecting)
            except asyncio.CancelledError:
                connecting.add_done_callback(_close)
                raise
            return PsycopgSession(connection, driver, threads)
        except (ValueError, OSError, TimeoutError, driver.Error) as error:
            failed = unreachable(error, by_dsn=not callable(self._dsn_or_connect))
        raise failed  # here, where it has no cause: that may quote the DSN

    async def _connect_async(self, driver: Any) -> Any:
        if callable(self._dsn_or_connect):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = await self._dsn_or_connect()
            try:
                await connection.set_autocommit(True)
            except BaseException:
                connection.pgconn.finish()
                raise
            return connection
        options = _options(driver, self._dsn_or_connect)
        return await driver.AsyncConnection.connect(self._dsn_or_connect, **options)

    def _connect(self, driver: Any) -> Any:
        if callable(self._dsn_or_connect):
            connection = self._dsn_or_connect()
            connection.set_autocommit(True)
            return connection
        options = _options(driver, self._dsn_or_connect)
        return driver.Connection.connect(self._dsn_or_connect, **options)


def _options(driver: Any, dsn: str) -> dict[str, Any]:
    """Give the settings of our connections; what a DSN says of its network stays."""
    try:
        named = driver.conninfo.conninfo_to_dict(dsn)
    except driver.ProgrammingError:
        named = None
    if named is None:
        raise ValueError("it is no DSN")  # here, where it has no cause: that may quote the DSN
    return {name: value for name, value in LIBPQ_OPTIONS.items() if name not in named} | {
        "autocommit": True,
        "connect_timeout": int(CONNECT_TIMEOUT_S),
        "fallback_application_name": APPLICATION_NAME,
    }


def _driver() -> Any:
    try:
        import psycopg  # noqa: PLC0415  # only participants that use it need it
        import psycopg.conninfo  # noqa: PLC0415
        import psycopg.rows  # noqa: PLC0415
    except ImportError as error:
        raise missing("psycopg", "psycopg") from error
    return psycopg


def _hang_up(connection: Any) -> None:
    with contextlib.suppress(Exception):  # psycopg says in many ways that it has no socket any more
        hang_up(connection.pgconn.socket)


def _in_transaction(connection: Any) -> bool:
    # 0 is idle and 4 unknown; 1 to 3 are a statement or a transaction, be it a failed one.
    return int(connection.info.transaction_status) in {1, 2, 3}


def _look(future: asyncio.Future[Any]) -> None:
    """Look at what a future holds: nobody else does if its caller has left."""
    if not future.cancelled():
        future.exception()


def _close(connecting: asyncio.Future[Any]) -> None:
    """Close a connection that nobody waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().pgconn.finish()
