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

_Sent = tuple[Call, Callable[[Reply], None]]


class OneByOne:
    """Sends calls by a caller, each by itself. `open` comes first."""

    limit: int | None = None

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._tasks: TaskGroup | None = None
        self._idle: list[asyncio.Future[_Sent]] = []
        self._closed = False

    @property
    def name(self) -> str:
        return self._caller.name

    def open(self, tasks: TaskGroup, limit_changed: Callable[[], None]) -> None:
        """The workers live in `tasks`."""
        self._tasks = tasks

    def send(self, call: Call, answer: Callable[[Reply], None]) -> None:
        """Gives the call to a worker that is idle, or to a new one."""
        assert self._tasks is not None, "open() comes first"
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result((call, answer))
                return
        self._tasks.start_soon(self._work, call, answer, name=f"{self.name} {call.participant}")

    async def _work(self, call: Call, answer: Callable[[Reply], None]) -> None:
        """Carries calls, one after another, for as long as the runtime lives."""
        while True:
            reply = await self._caller.call(call)
            # Idle before it answers: the call that follows from the answer is its own, then.
            idle: asyncio.Future[_Sent] = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            if not self._closed:
                answer(reply)
            call, answer = await idle

    async def close(self) -> None:
        """Closes the caller. The workers end with their task group."""
        self._closed = True
        await self._caller.close()
