"""Wake-ups: the near future of all sagas, in one heap and one task.

Instants are wall-clock milliseconds, for they come from records. The wait itself is monotonic: how
far an instant lies ahead is asked once, when its timer is set, and a wall clock that jumps
afterwards, in whichever direction, neither fires a timer early nor holds one up.

What falls due at once is fired `PACE` at a time, so that a thousand timers are paced like a
recovery. While the turns do not keep up it is `SHARE` for about each commit, and never none: under
a load that does not end a retry or a deadline is late by its place among those that are due, and
not by the load.

A saga that ended leaves dead timers behind; the heap is rebuilt when they are the greater part.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import anyio

from amends_runtime.ports import Clock

__all__ = ["Timer", "Timers"]

RECHECK_S = 5.0  # the event loop's own clock may stand still while the machine sleeps
PAUSE_S = 0.01  # about one commit
PACE = 256  # as many wake-ups as one batch of turns takes in its stride
SHARE = 32  # a small part of one, where the turns do not keep up
MIN_DEAD = 10_000  # rebuilding a smaller heap saves nothing worth the while


class Timer:
    """One wake-up of one saga. Dead once `saga_id` is None."""

    __slots__ = ("at_ms", "due_s", "saga_id")

    def __init__(self, at_ms: int, due_s: float, saga_id: str) -> None:
        self.at_ms = at_ms
        self.due_s = due_s  # monotonic
        self.saga_id: str | None = saga_id

    def __lt__(self, other: Timer) -> bool:
        return self.due_s < other.due_s


class Timers:
    """All wake-ups.

    `wake` is called with a saga's id and the instant, never earlier than asked, never not at all.
    """

    def __init__(
        self,
        clock: Clock,
        wake: Callable[[str, int], None],
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self._clock = clock
        self._wake = wake
        self._backlog = backlog
        self._heap: list[Timer] = []
        self._dead = 0
        self._changed = anyio.Event()

    def set(self, saga_id: str, at_ms: int, within_ms: int | None = None) -> Timer:
        """Wakes the saga at `at_ms`. The answer is what `forget` takes.

        An instant that was written down before the clock was set back seems further away than it
        can be: `within_ms` is how far that is.
        """
        ahead_ms = max(0, at_ms - self._clock.now_ms())
        ahead_s = (ahead_ms if within_ms is None else min(ahead_ms, within_ms)) / 1000
        timer = Timer(at_ms, self._clock.monotonic_s() + ahead_s, saga_id)
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
            keeps_up = self._backlog() <= PACE
            if self.fire(PACE if keeps_up else SHARE):
                await anyio.sleep(0 if keeps_up else PAUSE_S)
                continue
            wait_s = RECHECK_S
            if self._heap:
                ahead_s = self._heap[0].due_s - self._clock.monotonic_s()
                wait_s = min(wait_s, max(0.001, ahead_s))
            with anyio.move_on_after(wait_s):
                await self._changed.wait()

    def fire(self, at_most: int = PACE) -> int:
        """Wakes whom it is time to wake, at most so many; answers how many timers it took up."""
        now_s = self._clock.monotonic_s()
        fired = 0
        while self._heap and self._heap[0].due_s <= now_s and fired < at_most:
            timer = heapq.heappop(self._heap)
            fired += 1
            if timer.saga_id is None:
                self._dead -= 1
            else:
                saga_id, timer.saga_id = timer.saga_id, None
                self._wake(saga_id, timer.at_ms)
        return fired
