"""Wake-ups: the near future of all sagas, in one heap and one task.

Instants are wall-clock milliseconds, for they come from records. The wait itself is monotonic and
short, so a wall clock that jumps is noticed within `RECHECK_S`; what falls due at once is fired
`PACE` at a time with other work in between, so that a jump forward is paced like a recovery and a
jump backward loses nothing.

A saga that ended leaves dead timers behind; the heap is rebuilt when they are the greater part.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import anyio
import anyio.lowlevel

from amends_runtime.ports import Clock

__all__ = ["Timer", "Timers"]

RECHECK_S = 5.0  # a jump of the wall clock is noticed after so long at the latest
PACE = 256  # as many wake-ups as one batch of turns takes in its stride
MIN_DEAD = 10_000  # rebuilding a smaller heap saves nothing worth the while


class Timer:
    """One wake-up of one saga. Dead once `saga_id` is None."""

    __slots__ = ("at_ms", "saga_id")

    def __init__(self, at_ms: int, saga_id: str) -> None:
        self.at_ms = at_ms
        self.saga_id: str | None = saga_id

    def __lt__(self, other: Timer) -> bool:
        return self.at_ms < other.at_ms


class Timers:
    """All wake-ups.

    `wake` is called with a saga's id, never earlier than asked, never not at all.
    """

    def __init__(self, clock: Clock, wake: Callable[[str, int], None]) -> None:
        self._clock = clock
        self._wake = wake
        self._heap: list[Timer] = []
        self._dead = 0
        self._changed = anyio.Event()

    def set(self, saga_id: str, at_ms: int) -> Timer:
        """Wakes the saga at `at_ms`. The answer is what `forget` takes."""
        timer = Timer(at_ms, saga_id)
        heapq.heappush(self._heap, timer)
        if self._heap[0] is timer:
            self._changed.set()
        return timer

    def forget(self, timers: list[Timer]) -> None:
        """These wake nobody any more."""
        for timer in timers:
            if timer.saga_id is not None:
                timer.saga_id = None
                self._dead += 1
        timers.clear()
        if self._dead > MIN_DEAD and self._dead * 2 > len(self._heap):
            self._heap = [timer for timer in self._heap if timer.saga_id is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    @property
    def held(self) -> int:
        """Timers in memory, dead ones included."""
        return len(self._heap)

    async def run(self) -> None:
        """Fires what is due, for as long as the runtime lives."""
        while True:
            self._changed = anyio.Event()
            due = self.fire()
            if due:
                await anyio.lowlevel.checkpoint()
                continue
            wait_s = RECHECK_S
            if self._heap:
                wait_s = min(
                    wait_s, max(0.001, (self._heap[0].at_ms - self._clock.now_ms()) / 1000)
                )
            with anyio.move_on_after(wait_s):
                await self._changed.wait()

    def fire(self) -> int:
        """Wakes whom it is time to wake, at most `PACE`; answers how many timers it took up."""
        now_ms = self._clock.now_ms()
        fired = 0
        while self._heap and self._heap[0].at_ms <= now_ms and fired < PACE:
            timer = heapq.heappop(self._heap)
            fired += 1
            if timer.saga_id is None:
                self._dead -= 1
            else:
                saga_id, timer.saga_id = timer.saga_id, None
                self._wake(saga_id, timer.at_ms)
        return fired
