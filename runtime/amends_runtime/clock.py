"""The machine's clocks, behind the port that tests and simulations replace."""

from __future__ import annotations

import time

__all__ = ["SystemClock"]

# Linux stops CLOCK_MONOTONIC while a machine is suspended, and a deadline would be late by that.
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """Wall time in UTC milliseconds for records, monotonic seconds for waits."""

    def now_ms(self) -> int:
        """UTC milliseconds."""
        return time.time_ns() // 1_000_000

    def now_us(self) -> int:
        """UTC microseconds."""
        return time.time_ns() // 1_000

    def monotonic_s(self) -> float:
        """Seconds that never jump, and that pass while the machine sleeps, too."""
        return time.clock_gettime(_ELAPSED)
