"""The machine's clocks, behind the port that tests and simulations replace."""

from __future__ import annotations

import time

__all__ = ["SystemClock"]


class SystemClock:
    """Wall time in UTC milliseconds for records, monotonic seconds for waits."""

    def now_ms(self) -> int:
        """UTC milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()
