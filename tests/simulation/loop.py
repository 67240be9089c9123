"""The simulation's event loop: virtual time, and processes that can be stopped and go on later.

Every callback on an asyncio loop has a context. A simulated process puts itself into its context as
the owner, and all that it schedules inherits that. So a virtual machine that is paused is a loop
that lays this owner's callbacks aside, due timers included, while everybody else's time passes;
when it goes on they follow in the order in which they became due.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from contextvars import Context, ContextVar

from amends_runtime.testing.virtual_time import Stalled, VirtualLoop

__all__ = ["OWNER", "Livelock", "SimulatedLoop"]

OWNER: ContextVar[object] = ContextVar("OWNER", default=None)
"""Whose callback this is; None: the world's."""

MAX_STEPS = 3_000_000  # callbacks; a large schedule takes some tens of thousands


class Livelock(RuntimeError):
    """Something goes round and round: no schedule has so many callbacks."""


class SimulatedLoop(VirtualLoop):
    """An event loop in virtual time whose processes can be held."""

    # What asyncio's own loop keeps; CPython has had these since 3.4.
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _clock_resolution: float
    _timer_cancelled_count: int
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._held: dict[object, list[asyncio.Handle]] = {}

    def hold(self, owner: object) -> None:
        """None of the owner's callbacks runs until `release`."""
        self._held.setdefault(owner, [])

    def release(self, owner: object) -> None:
        """The owner goes on, with all that became due meanwhile."""
        self._ready.extend(self._held.pop(owner, ()))

    def _run_once(self) -> None:
        """One round: what is ready runs; if nothing is, the next timer's instant is now."""
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            _taken(heapq.heappop(scheduled))
        if not ready and not self._stopping:
            if not scheduled:
                raise Stalled("everything waits, and nothing is left that could wake it")
            self.advance(max(0.0, scheduled[0].when() - self.time()))
        due_before = self.time() + self._clock_resolution
        while scheduled and scheduled[0].when() < due_before:
            ready.append(_taken(heapq.heappop(scheduled)))
        self.steps += len(ready)
        if self.steps > MAX_STEPS:
            self.steps = 0
            raise Livelock(f"more than {MAX_STEPS} callbacks in one schedule")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            if self._held:
                context: Context = handle._context  # type: ignore[attr-defined]
                held = self._held.get(context.get(OWNER))
                if held is not None:
                    held.append(handle)
                    continue
            handle._run()


def _taken(handle: asyncio.TimerHandle) -> asyncio.TimerHandle:
    """Tell a timer that it is in the heap no more, as asyncio's own loop does."""
    handle._scheduled = False  # type: ignore[attr-defined]
    return handle
