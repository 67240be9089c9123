"""Lends sessions: a bounded number of connections, each to one call at a time.

How to think about it
---------------------

A place is the right to have a connection. Whoever takes a session has a place, and has it until the
connection is clean again or gone; so there are never more connections than places, and nobody is
lent a session in which something is still open.

1. `take` waits for a place, in turn. It gives a connection that lies idle, or opens one.
2. `give_back` never waits. A session that is clean goes back to the idle ones at once; one that was
   left in the middle (its call was cancelled, or failed) is rolled back by a task of the pool's
   own, and one for which that fails or takes too long is dropped: the server rolls back for it.
3. When one connection is lost, so are those that lie idle, most likely: the server was restarted.
   They are dropped, and not found out one failed call after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from amends.barrier.postgres_port import CHECK_CLIENT_EVERY_MS, Session, Sessions, StatementFailed
from amends.errors import BarrierError, CommitUnknown

T = TypeVar("T")

MEND_TIMEOUT_S: Final = 10.0
"""For a rollback after a call that was left in the middle; a connection that takes longer is gone,
or its server is."""

IN_RECOVERY: Final = "SELECT pg_catalog.pg_is_in_recovery()"

CHECK_CLIENT: Final = (
    "SELECT pg_catalog.set_config('client_connection_check_interval', $1::text, false)"
)


class PoolBusy(BarrierError):
    """All connections were in use for as long as the caller would wait; nothing was done."""


class Pool:
    """The connections of one barrier. Belongs to the event loop that runs when it is made.

    `name` stands in errors and holds no password.
    """

    def __init__(self, sessions: Sessions, *, max_connections: int, name: str) -> None:
        self._sessions = sessions
        self._name = name
        self._places = asyncio.Semaphore(max_connections)
        self._max_connections = max_connections
        self._idle: deque[Session] = deque()
        self._open = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def in_use(self) -> int:
        """How many sessions are lent or being mended."""
        return self._open - len(self._idle)

    @asynccontextmanager
    async def lent(self, *, is_async: bool = True) -> AsyncIterator[Session]:
        """Lend a session for a block, for as long as it takes to get one. Raises `BarrierError`."""
        session = await self.take(is_async=is_async)
        try:
            yield session
        except Exception:
            self.give_back(session)
            raise
        except BaseException:
            self.give_back(session, was_cut=True)
            raise
        self.give_back(session)

    async def take(self, *, is_async: bool = True, timeout_s: float | None = None) -> Session:
        """Lend a session; `give_back` must follow. Raises `PoolBusy`, and `BarrierError`.

        `is_async` says for which kind of handlers it is to be. `timeout_s` bounds the wait for a
        place; opening a connection has a limit of its own.
        """
        if self._is_closed:
            raise BarrierError(f"{self._name} is closed")
        try:
            async with asyncio.timeout(timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise PoolBusy(
                f"{self._name}: all {self._max_connections} connections are in use"
            ) from None
        try:
            return await self._idle_or_new(is_async=is_async)
        except BaseException:
            self._places.release()
            raise

    def give_back(self, session: Session, *, was_cut: bool = False) -> None:
        """Take a session back; see the rules above.

        `was_cut` says that the work with it was cancelled: what it had sent may still be answered.
        """
        if not session.is_usable:
            self._lose(session)
        elif was_cut or self._is_closed or session.in_transaction:
            _ = self._spawn(self._mend(session))
        else:
            self._idle.append(session)
            self._places.release()

    async def uncancelled(
        self, work: Coroutine[Any, Any, T], session: Session, *, timeout_s: float
    ) -> T:
        """Let work on a lent session go on to its end, although its caller may leave meanwhile.

        The session is given back when the work has ended, however it does: not by the caller.
        Raises `CommitUnknown` if it takes too long.
        """

        async def to_its_end() -> T:
            was_cut = True
            try:
                async with asyncio.timeout(timeout_s):
                    value = await work
                was_cut = False
                return value
            except TimeoutError as error:
                session.discard()
                raise CommitUnknown(
                    f"{self._name} has not answered a COMMIT for {timeout_s:g} s: it may happen "
                    "all the same; the next attempt finds out"
                ) from error
            finally:
                self.give_back(session, was_cut=was_cut)

        return await asyncio.shield(self._spawn(to_its_end()))

    async def aclose(self) -> None:
        """Wait for the sessions that are lent, and close all connections."""
        self._is_closed = True
        for _ in range(self._max_connections):
            await self._places.acquire()
        while self._idle:
            session = self._idle.popleft()
            await session.aclose()
            self._open -= 1
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _idle_or_new(self, *, is_async: bool) -> Session:
        for session in reversed(self._idle):  # the last used first: its caches are warm
            if session.is_async == is_async and session.is_usable:
                self._idle.remove(session)
                return session
        # Those that broke while they lay there, and then one of the other kind, make room.
        for session in [one for one in self._idle if not one.is_usable]:
            self._idle.remove(session)
            self._open -= 1
        if self._idle and self._open >= self._max_connections:
            other = self._idle.popleft()
            self._open -= 1
            await other.aclose()
        session = await self._connect(is_async=is_async)
        self._open += 1
        return session

    async def _connect(self, *, is_async: bool) -> Session:
        session = await self._sessions.connect(is_async=is_async)
        try:
            if await session.rows(IN_RECOVERY) != [(False,)]:
                raise BarrierError(
                    f"{self._name} is a standby (it is in recovery) and takes no writes; connect "
                    "to the primary, for example with target_session_attrs=read-write in the DSN"
                )
            with contextlib.suppress(StatementFailed):  # not every system can do it
                await session.rows(CHECK_CLIENT, str(CHECK_CLIENT_EVERY_MS))
        except BaseException:
            session.discard()
            raise
        return session

    async def _mend(self, session: Session) -> None:
        try:
            async with asyncio.timeout(MEND_TIMEOUT_S):
                await session.roll_back()
        except (BarrierError, TimeoutError):
            session.discard()
        except BaseException:
            session.discard()
            self._lose(session)
            raise
        if not session.is_usable:
            self._lose(session)
        elif session.in_transaction:
            session.discard()
            self._lose(session)
        else:
            self._idle.append(session)
            self._places.release()

    def _lose(self, session: Session) -> None:
        session.discard()
        self._open -= 1
        while self._idle:
            self._idle.popleft().discard()
            self._open -= 1
        self._places.release()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: nobody else does if its caller has left
