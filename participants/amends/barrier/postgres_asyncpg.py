"""Sessions over asyncpg: for `async def` handlers, which are given an ``asyncpg.Connection``.

asyncpg keeps account of the transactions that it began itself, and refuses to nest its own in
others; so the outermost is made with ``connection.transaction()``, too, and a handler can nest its
own in it. It prepares what it is given with values, and caches that by its text; where a table has
changed since, the server refuses the cached statement once, asyncpg forgets it, and the next
attempt works.
"""

# ruff: noqa: D102  # a method is documented once, at its port

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from amends.barrier.postgres_port import (
    ANSWER_WITHIN_S,
    APPLICATION_NAME,
    COMMIT_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    PLAIN_DSN,
    answered_within,
    literal,
    missing,
    named,
    rolled_back,
    translated,
    unasked,
    unreachable,
)
from amends.barrier.postgres_sockets import end_in_silence
from amends.handler import Handler, thread_context
from amends.outcomes import Call, Outcome

if TYPE_CHECKING:
    import asyncpg
    from asyncpg.transaction import Transaction

HOST_AND_PORT: Final = re.compile(r"(.+?)(?::(\d+))?")

CLOSE_TIMEOUT_S: Final = 5.0
"""For a word of farewell; after that the connection is dropped."""


class AsyncpgSession:
    """One connection of asyncpg; see `postgres_port.Session`."""

    is_async = True

    def __init__(self, connection: asyncpg.Connection[Any], errors: tuple[type[Exception], ...]):
        self.connection = connection
        self._errors = errors
        self._transaction: Transaction | None = None

    @property
    def is_usable(self) -> bool:
        return not self.connection.is_closed()

    @property
    def in_transaction(self) -> bool:
        return self.is_usable and self.connection.is_in_transaction()

    @property
    def running(self) -> asyncio.Future[Any] | None:
        return None

    async def run(self, script: str, *, within_s: float | None = ANSWER_WITHIN_S) -> None:
        with self._asked(within_s):
            await self.connection.execute(script)

    async def rows(
        self, statement: str, *values: object, within_s: float | None = ANSWER_WITHIN_S
    ) -> list[tuple[Any, ...]]:
        with self._asked(within_s):
            return [tuple(row.values()) for row in await self.connection.fetch(statement, *values)]

    async def begin(self, settings: str = "") -> None:
        self._transaction = self.connection.transaction(isolation="read_committed")
        with self._asked():
            await self._transaction.start()
        if settings:
            await self.run(settings)

    async def set_savepoint(self) -> None:
        await self.run("SAVEPOINT amends_effect")

    async def keep(self) -> None:
        await self.run("RELEASE SAVEPOINT amends_effect")

    async def undo(self) -> None:
        await self.run("ROLLBACK TO SAVEPOINT amends_effect; RELEASE SAVEPOINT amends_effect")

    async def commit(self) -> None:
        # What asyncpg hides is the server's word ROLLBACK for a transaction that had failed. There
        # is none: the statement before has worked, and asyncpg lets no other begin while we wait.
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        with self._asked(COMMIT_TIMEOUT_S, commits="COMMIT"):
            await unasked(self, transaction.commit())

    async def prepare(self, global_id: str) -> None:
        with self._asked(COMMIT_TIMEOUT_S, commits="PREPARE TRANSACTION"):
            said = await unasked(
                self, self.connection.execute(f"PREPARE TRANSACTION {literal(global_id)}")
            )
        # asyncpg does not know that its transaction has ended; this tells it, and changes nothing.
        await self.roll_back()
        if said != "PREPARE TRANSACTION":
            raise rolled_back("PREPARE TRANSACTION")

    async def finish(self, command: str) -> None:
        with self._asked(COMMIT_TIMEOUT_S, commits=named(command)):
            await unasked(self, self.connection.execute(command))

    async def roll_back(self) -> None:
        transaction, self._transaction = self._transaction, None
        with self._asked(ends=True):
            if transaction is not None:
                await transaction.rollback()
            if self.in_transaction:
                await self.connection.execute("ROLLBACK")

    async def answer(self, handler: Handler, call: Call) -> Outcome:
        if handler.is_async:
            return await handler.answer_async(call, self.connection)
        # It takes the call alone: `serve` has seen to that.
        context = thread_context()
        return await asyncio.get_running_loop().run_in_executor(
            None, context.run, handler.answer, call, None
        )

    async def in_own_way(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        return await work(self.connection)

    def discard(self) -> None:
        self.connection.terminate()

    async def aclose(self) -> None:
        try:
            await self.connection.close(timeout=CLOSE_TIMEOUT_S)
        except self._errors:
            self.connection.terminate()

    @contextlib.contextmanager
    def _asked(
        self, within_s: float | None = ANSWER_WITHIN_S, *, commits: str = "", ends: bool = False
    ) -> Iterator[None]:
        with (
            answered_within(self, within_s),
            translated(self, self._errors, commits=commits, ends=ends),
        ):
            yield


class AsyncpgSessions:
    """Opens connections with asyncpg, from a DSN or with an author's own function."""

    def __init__(self, dsn_or_connect: str | Callable[[], Awaitable[Any]]) -> None:
        self._dsn_or_connect = dsn_or_connect
        self._hosts = [] if callable(dsn_or_connect) else hosts_of(dsn_or_connect)

    @property
    def transaction_types(self) -> tuple[type[Any], type[Any]]:
        return NoneType, _driver().Connection

    async def connect(self, *, is_async: bool) -> AsyncpgSession:
        driver = _driver()
        # Its own mistakes of use are no PostgresError, and a broken one is no OSError.
        errors = (
            OSError,
            TimeoutError,
            driver.PostgresError,
            driver.InterfaceError,
            driver.InternalClientError,  # a connection that ends between two of its states
        )
        try:
            return AsyncpgSession(await self._connect(driver), errors)
        except (ValueError, OverflowError, *errors) as error:
            failed = unreachable(error, by_dsn=not callable(self._dsn_or_connect))
        raise failed  # here, where it has no cause: that may quote the DSN

    async def _connect(self, driver: Any) -> Any:
        if callable(self._dsn_or_connect):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._dsn_or_connect()
        connection = await self._connect_one(driver)
        # It has no setting for this, and no public way to its socket.
        end_in_silence(connection._transport.get_extra_info("socket"))  # noqa: SLF001
        return connection

    async def _connect_one(self, driver: Any) -> Any:
        """Connect to the first host that lets us, beginning with the one that did last.

        asyncpg has one limit for all of them together, so that a host which is silent would take
        the time of those behind it; here each has its share.
        """
        hosts: list[dict[str, Any]] = [*self._hosts] or [{}]
        for number, host in enumerate(hosts, 1):
            try:
                connection = await driver.connect(
                    self._dsn_or_connect,
                    timeout=CONNECT_TIMEOUT_S / len(hosts),
                    server_settings={"application_name": APPLICATION_NAME},
                    **host,
                )
            except (OSError, TimeoutError, driver.PostgresError, driver.InternalClientError):
                if number == len(hosts):
                    raise
            else:
                if len(hosts) > 1:
                    self._hosts = [host, *(other for other in self._hosts if other != host)]
                return connection
        raise AssertionError("unreachable: the last host's error is raised")


def hosts_of(dsn: str) -> list[dict[str, Any]]:
    """Give host and port of each, for `connect`, if a DSN names several; else none.

    Nor of a DSN that can be read in two ways: that is the driver's alone.
    """
    parts = PLAIN_DSN.fullmatch(dsn)
    named = parts["hosts"].split(",") if parts is not None else []
    hosts: list[dict[str, Any]] = []
    for one in named if len(named) > 1 else ():
        address = HOST_AND_PORT.fullmatch(one)
        assert address is not None, "or the DSN would not be plain"
        port = {"port": int(address[2])} if address[2] else {}
        hosts.append({"host": address[1].strip("[]")} | port)
    return hosts


def _driver() -> Any:
    try:
        import asyncpg  # noqa: PLC0415  # only participants that use it need it
    except ImportError as error:
        raise missing("asyncpg", "postgres") from error
    return asyncpg
