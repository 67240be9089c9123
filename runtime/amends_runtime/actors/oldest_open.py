"""Since when there have been open sagas: what participants may forget lies before that."""

from __future__ import annotations

import anyio
import structlog

from amends_runtime.errors import StoreError
from amends_runtime.ports import Clock, Insights

__all__ = ["OldestOpen"]

_log = structlog.get_logger(__name__)

REFRESH_S = 10.0  # barriers are purged by the day; an older answer only keeps more


class OldestOpen:
    """Keeps `at_ms`: when the oldest saga that has not ended was started, 0 until that is known.

    An answer may be old. It is never too young: a saga that starts later is younger than it.
    """

    def __init__(self, insights: Insights, clock: Clock) -> None:
        self._insights = insights
        self._clock = clock
        self.at_ms = 0

    async def run(self) -> None:
        """Asks the store, again and again, for as long as the runtime lives."""
        while True:
            now_ms = self._clock.now_ms()  # before the question: what starts meanwhile is younger
            try:
                oldest_ms = await self._insights.oldest_open_ms()
            except StoreError as error:
                _log.warning("oldest_open_unknown", error=str(error))
            else:
                self.at_ms = now_ms if oldest_ms is None else oldest_ms
            await anyio.sleep(REFRESH_S)
