"""Lends sessions: a bounded number of connections, each to one call at a time.

How to think about it
---------------------

A place is the right to have a connection. Whoever takes a session has a place, and has it until the
connection is clean again or gone, and no thread is at work with it any more; so there are never
more connections than places, a thread for each, and nobody is lent a session in which something is
still open.

1. `take` waits for a place, in turn. It gives a connection that lies idle, or opens one. Opening
   goes on if its caller leaves, and keeps his place until it has ended: a thread may be at it. Who
   leaves a place to others (`kept`) is counted until his connection is clean or gone, too: it is
   not enough that he has left.
2. `give_back` never waits. A session that is clean goes back to the idle ones at once; one that was
   left in the middle (its call was cancelled, or failed) is rolled back by a task of the pool's
   own, and one for which that fails or takes too long is dropped: the server rolls back for it.
3. When one connection is lost, so are those that lie idle, most likely: the server was restarted.
   They are dropped, and not found out one failed call after the other.
4. A server that is gone for good sends no word of that, and one whose place another has taken may
   live on and take no writes. So a connection that has lain idle for `PROBE_AFTER_S`, or with which
   the last call failed, is asked first, and is lost unless it says at once that it takes writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from amends.barrier.postgres_port import CHECK_CLIENT_EVERY_MS, Session, Sessions, StatementFailed
from amends.errors import BarrierError

T = TypeVar("T")

MEND_TIMEOUT_S: Final = 10.0
"""For a rollback after a call that was left in the middle; a connection that takes longer is gone,
or its server is."""

PROBE_AFTER_S: Final = 1.0
"""What was used a moment ago need not be asked whether it is still there."""

PROBE_TIMEOUT_S: Final = 2.0
"""For an answer that costs the server nothing; shorter than an attempt's deadline."""

TAKES_NO_WRITES: Final = (
    "SELECT pg_catalog.pg_is_in_recovery()"
    " OR pg_catalog.current_setting('default_transaction_read_only')::bool"
)
"""Of a standby, and of a server that somebody has fenced off so that another can take its place."""

CHECK_CLIENT: Final = (
    "SELECT pg_catalog.set_config('client_connection_check_interval', $1::text, false)"
)


class PoolBusy(BarrierError):
    """All connections were in use for as long as the caller would wait; nothing was done."""


class Pool:
    """The connections of one barrier. Belongs to the event loop that runs when it is made.

    `name` stands in errors and holds no password. `kept` places are never given to who leaves them
    to others; see `take`.
    """

    def __init__(
        self, sessions: Sessions, *, max_connections: int, name: str, kept: int = 0
    ) -> None:
        self._sessions = sessions
        self._name = name
        self._places = asyncio.Semaphore(max_connections)
        self._unkept = asyncio.Semaphore(max_connections - kept)
        self._max_connections = max_connections
        self._idle: dict[Session, float] = {}  # when it was given back; the longest idle first
        self._open = 0  # also while they are being opened
        self._leaving: set[Session] = set()  # lent to those who leave the kept places to others
        self._unattended: dict[asyncio.Task[Session], bool] = {}  # being opened, and nobody waits
        self._stuck: set[Session] = set()  # lost, and their threads still at work
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def in_use(self) -> int:
        """How many sessions are lent, being opened or being mended."""
        return self._open - len(self._idle)

    @asynccontextmanager
    async def lent(self, *, is_async: bool = True) -> AsyncIterator[Session]:
        """Lend a session for a block, for as long as it takes to get one. Raises `BarrierError`."""
        session = await self.take(is_async=is_async)
        try:
            yield session
        except Exception:
            self.give_back(session, has_failed=True)
            raise
        except BaseException:
            self.give_back(session, was_cut=True)
            raise
        self.give_back(session)

    async def take(
        self,
        *,
        is_async: bool = True,
        timeout_s: float | None = None,
        leaves_kept: bool = False,
    ) -> Session:
        """Lend a session; `give_back` must follow. Raises `PoolBusy`, and `BarrierError`.

        `is_async` says for which kind of handlers it is to be. `timeout_s` bounds the wait for a
        place; opening a connection has a limit of its own. `leaves_kept` says to leave the kept
        places to others.
        """
        if self._is_closed:
            raise BarrierError(f"{self._name} is closed")
        while True:
            await self._acquire(timeout_s, leaves_kept=leaves_kept)
            idle = self._take_idle(is_async=is_async)
            if idle is None:
                break
            session, idle_s = idle
            if leaves_kept:
                self._leaving.add(session)
            if idle_s < PROBE_AFTER_S or await self._answers(session):
                return session
            # It is lost, and its place may be, too; all the others that lay idle are gone with it.
        opening = self._spawn(self._new(is_async=is_async))
        try:
            await asyncio.wait([opening])
        except BaseException:
            self._unattended[opening] = leaves_kept
            opening.add_done_callback(self._attend)
            raise
        return self._opened(opening, leaves_kept=leaves_kept)

    def give_back(
        self, session: Session, *, was_cut: bool = False, has_failed: bool = False
    ) -> None:
        """Take a session back; see the rules above.

        `was_cut` says that the work with it was cancelled: what it had sent may still be answered;
        `has_failed` that it is asked before it is used again.
        """
        if not session.is_usable:
            self._lose(session)
        elif was_cut or self._is_closed or session.in_transaction:
            _ = self._spawn(self._mend(session))
        else:
            self._lay_down(session, has_failed=has_failed)

    async def uncancelled(self, work: Coroutine[Any, Any, T], session: Session) -> T:
        """Let work on a lent session go on to its end, although its caller may leave meanwhile.

        The session is given back when the work has ended, however it does: not by the caller.
        """

        async def to_its_end() -> T:
            was_cut = True
            try:
                value = await work
                was_cut = False
                return value
            finally:
                self.give_back(session, was_cut=was_cut)

        return await asyncio.shield(self._spawn(to_its_end()))

    async def aclose(self) -> None:
        """Wait for the sessions that are lent, and close all connections.

        Threads that are still at work with a connection that is lost are not waited for.
        """
        self._is_closed = True
        for opening in self._unattended:
            opening.cancel()
        for session in list(self._stuck):
            self._unstick(session)
        for _ in range(self._max_connections):
            await self._places.acquire()
        while self._idle:
            session, _ = self._idle.popitem()
            await session.aclose()
            self._open -= 1
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _acquire(self, timeout_s: float | None, *, leaves_kept: bool) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if leaves_kept:
                    await self._unkept.acquire()
                try:
                    await self._places.acquire()
                except BaseException:
                    if leaves_kept:
                        self._unkept.release()
                    raise
        except TimeoutError:
            raise PoolBusy(
                f"{self._name}: all {self._max_connections} connections are in use"
            ) from None

    def _release(self, *, leaves_kept: bool) -> None:
        if leaves_kept:
            self._unkept.release()
        self._places.release()

    def _take_idle(self, *, is_async: bool) -> tuple[Session, float] | None:
        """Take a session that lies idle, and say for how long it has."""
        for session in reversed(self._idle):  # the last used first: its caches are warm
            if session.is_async == is_async and session.is_usable:
                since_s = self._idle.pop(session)
                return session, asyncio.get_running_loop().time() - since_s
        return None

    async def _answers(self, session: Session) -> bool:
        """Tell whether a session that is lent still has a server; if not, it is lost."""
        probe = self._spawn(session.rows(TAKES_NO_WRITES, within_s=PROBE_TIMEOUT_S))
        try:
            await asyncio.wait([probe])
        except BaseException:
            # Answered or not, it tells the next one.
            probe.add_done_callback(lambda _: self._judge(probe, session))
            raise
        if probe.exception() is None and probe.result() == [(False,)]:
            return True
        self._lose(session)
        return False

    def _judge(self, probe: asyncio.Task[Any], session: Session) -> None:
        """Take back a session whose probe has ended after its caller had left."""
        if probe.cancelled() or probe.exception() is not None or probe.result() != [(False,)]:
            self._lose(session)
        else:
            self.give_back(session)

    def _attend(self, opening: asyncio.Task[Session]) -> None:
        """Take in a session whose opening has ended after its caller had left."""
        leaves_kept = self._unattended.pop(opening)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            self.give_back(self._opened(opening, leaves_kept=leaves_kept))

    def _opened(self, opening: asyncio.Task[Session], *, leaves_kept: bool) -> Session:
        """Give what was opened, to whoever has the place; else the place is free."""
        try:
            session = opening.result()
        except BaseException:
            self._release(leaves_kept=leaves_kept)
            raise
        if leaves_kept:
            self._leaving.add(session)
        return session

    async def _new(self, *, is_async: bool) -> Session:
        # Those that broke while they lay there, and then one of the other kind, make room.
        for session in [one for one in self._idle if not one.is_usable]:
            del self._idle[session]
            self._open -= 1
        other: Session | None = None
        if self._idle and self._open >= self._max_connections:
            other = next(iter(self._idle))
            del self._idle[other]
            self._open -= 1
        # Counted from here on: or two that come at once would both see room for one.
        self._open += 1
        try:
            if other is not None:
                try:
                    await other.aclose()
                except BaseException:
                    other.discard()
                    raise
            return await self._connect(is_async=is_async)
        except BaseException:
            self._open -= 1
            raise

    async def _connect(self, *, is_async: bool) -> Session:
        session = await self._sessions.connect(is_async=is_async)
        try:
            if await session.rows(TAKES_NO_WRITES) != [(False,)]:
                raise BarrierError(
                    f"{self._name} takes no writes: it is a standby (in recovery), or "
                    "default_transaction_read_only is on; connect to the primary, for example "
                    "with target_session_attrs=read-write in the DSN"
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
            self._lose(session)
            return
        except BaseException:
            self._lose(session)
            raise
        if session.is_usable and not session.in_transaction:
            self._lay_down(session, has_failed=True)
        else:
            self._lose(session)

    def _lay_down(self, session: Session, *, has_failed: bool) -> None:
        self._idle[session] = -math.inf if has_failed else asyncio.get_running_loop().time()
        self._end_lease(session)

    def _lose(self, session: Session) -> None:
        self._drop_idle()
        self._gone(session)

    def _drop_idle(self) -> None:
        while self._idle:
            idle, _ = self._idle.popitem()
            idle.discard()
            self._open -= 1

    def _gone(self, session: Session) -> None:
        """Drop a connection; its place is free when nothing works with it any more."""
        running = session.running
        session.discard()
        if running is None or self._is_closed:
            self._open -= 1
            self._end_lease(session)
        else:
            # Its place goes with its thread: there are as many threads as places.
            self._stuck.add(session)
            running.add_done_callback(lambda _: self._unstick(session))

    def _unstick(self, session: Session) -> None:
        if session in self._stuck:
            self._stuck.remove(session)
            self._open -= 1
            self._end_lease(session)

    def _end_lease(self, session: Session) -> None:
        leaves_kept = session in self._leaving
        self._leaving.discard(session)
        self._release(leaves_kept=leaves_kept)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: nobody else does if its caller has left
