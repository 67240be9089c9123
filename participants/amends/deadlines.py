"""Time limits of many callers at once, without a timer for each.

A timer of asyncio costs some 5 µs to set and to cancel, and nearly all of them are cancelled. Those
that are due within the same `TICK_S` share one here: so each strikes up to `TICK_S` late, never
early, and costs less than 1 µs among many.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final, Protocol

TICK_S: Final = 1 / 64
"""How late a limit may strike: no caller who waits for the network sees it."""
MAX_TICK: Final = 2**53
"""Beyond it ticks are not told apart: that is, never."""


class Limited(Protocol):
    """Something whose time can be over."""

    def expire(self) -> None:
        """Its time is over. Called once; must not raise."""
        ...


class Deadlines:
    """Monotonic instants, and what expires at them. Made inside the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ticks: dict[int, tuple[dict[Limited, None], asyncio.TimerHandle]] = {}

    def add(self, limited: Limited, until: float) -> int:
        """Let it expire at a monotonic instant; the answer is for `discard`."""
        tick = math.ceil(min(until / TICK_S, MAX_TICK))
        shared = self._ticks.get(tick)
        if shared is None:
            due_s = tick * TICK_S - time.monotonic()
            shared = self._ticks[tick] = {}, self._loop.call_later(due_s, self._strike, tick)
        shared[0][limited] = None
        return tick

    def discard(self, limited: Limited, tick: int) -> None:
        """It is not to expire any more; nothing happens if it has."""
        shared = self._ticks.get(tick)
        if shared is None:
            return
        shared[0].pop(limited, None)
        if not shared[0]:
            shared[1].cancel()
            del self._ticks[tick]

    def __len__(self) -> int:
        """Give how many timers there are."""
        return len(self._ticks)

    def _strike(self, tick: int) -> None:
        limited, _ = self._ticks.pop(tick)
        for one in limited:
            one.expire()
