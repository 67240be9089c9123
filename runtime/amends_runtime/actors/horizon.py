"""The horizon: which wake-ups of resting sagas lie near enough to have a timer.

The others stand in the store's index and cost no memory. Every `LOOK_EVERY_S` it is read on, page
by page, up to `AHEAD_MS` from now, which is longer than a look away: so no instant comes unseen.

1. `through_ms` moves on before the pages up to it are read. A saga that is parked meanwhile and is
   due before it keeps its own timers; one that is due after it is found by a later look, because
   its row is durable by then.
2. At most `MAX_NEAR` of those that it brought near are kept at once; what memory keeps of other
   sagas, for a poll or for somebody who waits, does not count. More than that fall due together
   only after a long stop, or when the wall clock jumps ahead: they follow as the first of them
   leave.
3. A row that was written at an instant which is still to come was written before the wall clock
   was set back. Its wake-up is reckoned by the time that it was written in, which goes on here as
   if nobody had touched the clock: a retry is not held up for as long as the clock was wrong.
   One that was written before, at an instant which has passed by the new time, too, cannot be told
   from one that was written since. It is late by as much as the clock was set back, at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio
import structlog

from amends_runtime.errors import StoreError
from amends_runtime.ports import Clock, RestingSaga, Store

__all__ = ["Horizon"]

_log = structlog.get_logger(__name__)

AHEAD_MS: Final = 60_000  # a minute's worth of timers: some thousands, where a saga rests an hour
LOOK_EVERY_S: Final = 20.0  # so each instant is looked at twice before it comes
PAGE: Final = 500  # rows; the loop goes on between two pages
MAX_NEAR: Final = 100_000  # about 40 MB of entries
SLACK_MS: Final = 1_000  # two clocks of one machine differ by less when nobody has set one
PAUSE_S: Final = 0.1  # until there is room for more, or the store is back


class Horizon:
    """Reads what comes near, and hands each saga to `near`.

    `near(saga, within_ms)` is told of one whose instant is at most `within_ms` away; it may be told
    again of one that it has. `room` says whether it takes more.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        near: Callable[[RestingSaga, int], None],
        room: Callable[[], bool],
    ) -> None:
        self._store = store
        self._clock = clock
        self._near = near
        self._room = room
        self.through_ms = 0
        """Up to here every instant is looked after in memory."""
        self._last: RestingSaga | None = None  # of those that were read by the wall clock
        self._untouched_ms = 0  # the time of the rows, had nobody set the clock back; see rule 3
        self._read_at_s = 0.0  # monotonic

    def begin(self, updated_at_ms: int) -> None:
        """The rows were written up to this instant, by whatever clock."""
        self._untouched_ms = updated_at_ms
        self._read_at_s = self._clock.monotonic_s()

    async def run(self) -> None:
        """Looks, for as long as the runtime lives."""
        while True:
            try:
                await self.look()
            except StoreError as error:
                _log.warning("horizon_waits_for_the_store", error=str(error))
                await anyio.sleep(PAUSE_S)
            else:
                await anyio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Reads on. Raises StoreError when the store cannot be read; the next look goes on."""
        now_ms = self._clock.now_ms()
        await self._read_on(now_ms)
        ahead_ms = self._untouched(now_ms) - now_ms
        if ahead_ms > SLACK_MS:
            await self._read_untouched(now_ms, ahead_ms)

    async def _read_on(self, now_ms: int) -> None:
        self.through_ms = max(self.through_ms, now_ms + AHEAD_MS)
        while True:
            await self._wait_for_room()
            page = await self._store.resting_sagas(self._last, self.through_ms, PAGE)
            for saga in page:
                self._last = saga
                self._near(saga, max(0, saga.wake_at_ms - now_ms))
            if len(page) < PAGE:
                return

    async def _read_untouched(self, now_ms: int, ahead_ms: int) -> None:
        last: RestingSaga | None = None
        until_ms = now_ms + ahead_ms + AHEAD_MS
        while True:
            await self._wait_for_room()
            page = await self._store.resting_sagas(last, until_ms, PAGE, now_ms)
            for last in page:
                within_ms = max(0, last.wake_at_ms - ahead_ms - now_ms)
                self._near(last, within_ms)
            if len(page) < PAGE:
                return

    def _untouched(self, now_ms: int) -> int:
        now_s = self._clock.monotonic_s()
        passed_ms = int((now_s - self._read_at_s) * 1000)
        self._untouched_ms = max(now_ms, self._untouched_ms + passed_ms)
        self._read_at_s = now_s
        return self._untouched_ms

    async def _wait_for_room(self) -> None:
        while not self._room():  # noqa: ASYNC110  # a pace, not a condition
            await anyio.sleep(PAUSE_S)
