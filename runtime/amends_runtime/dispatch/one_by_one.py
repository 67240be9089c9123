"""A transport of a caller: each call has a task for as long as it is on the wire.

Workers are tasks that take the next call when one ends, so that under load no task is made per
call. There are as many as were ever on the wire at once, which the lane bounds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from anyio.abc import TaskGroup

from amends_runtime.ports import Call, Caller, Reply

__all__ = ["OneByOne"]

_Answer = Callable[[Reply | None], None]
_Sent = tuple[Call, _Answer]

_UNBOUNDED = 2**31  # the lane's own limit is the bound


class OneByOne:
    """Sends calls by a caller, each by itself. `open` comes first."""

    limit: int | None = None
    room = _UNBOUNDED

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._tasks: TaskGroup | None = None
        self._idle: list[asyncio.Future[_Sent | None]] = []
        self._closed = False

    @property
    def name(self) -> str:
        return self._caller.name

    def open(self, tasks: TaskGroup, room_changed: Callable[[], None]) -> None:
        """The workers live in `tasks`."""
        self._tasks = tasks

    def send(self, call: Call, answer: _Answer) -> None:
        """Gives the call to a worker that is idle, or to a new one."""
        assert self._tasks is not None, "open() comes first"
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result((call, answer))
                return
        self._tasks.start_soon(self._work, call, answer, name=f"{self.name} {call.participant}")

    async def _work(self, call: Call, answer: _Answer) -> None:
        """Carries calls, one after another, until the transport is closed."""
        while True:
            reply = await self._caller.call(call)
            # Idle before it answers: the call that follows from the answer is its own, then.
            idle: asyncio.Future[_Sent | None] = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            if not self._closed:
                answer(reply)
            del call, answer, reply  # or their payloads stay for as long as it is idle
            following = None if self._closed else await idle
            if following is None:
                return
            call, answer = following
            del following

    async def close(self) -> None:
        """Closes the caller; workers end when they have no call."""
        self._closed = True
        for idle in self._idle:
            if not idle.done():
                idle.set_result(None)
        await self._caller.close()
