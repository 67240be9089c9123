"""Time limits that share timers: none strikes early, and what is taken back never does."""

from __future__ import annotations

import asyncio
import math
import time

from amends.deadlines import Deadlines


class Limited:
    """Notes when its time was over."""

    def __init__(self) -> None:
        self.expired = asyncio.Event()
        self.at_s = math.nan

    def expire(self) -> None:
        """It is."""
        assert not self.expired.is_set(), "told once"
        self.at_s = time.monotonic()
        self.expired.set()


async def test_nothing_expires_early() -> None:
    """However near its instant is, and also if that has passed."""
    deadlines = Deadlines()
    now = time.monotonic()
    untils = [now + offset_s for offset_s in (-1.0, 0.0, 0.001, 0.01, 0.03)]
    limited = [Limited() for _ in untils]
    for one, until in zip(limited, untils, strict=True):
        deadlines.add(one, until)
    for one, until in zip(limited, untils, strict=True):
        await one.expired.wait()
        assert one.at_s >= until
    assert len(deadlines) == 0


async def test_limits_of_one_moment_share_a_timer() -> None:
    """Ten thousand callers with equal patience are no ten thousand timers."""
    deadlines = Deadlines()
    until = time.monotonic() + 3600
    limited = [Limited() for _ in range(10_000)]
    ticks = [deadlines.add(one, until) for one in limited]
    assert len(deadlines) == 1
    for one, tick in zip(limited, ticks, strict=True):
        deadlines.discard(one, tick)
    assert len(deadlines) == 0


async def test_what_is_taken_back_does_not_expire() -> None:
    """Also if the one beside it does; and to take it back again does nothing."""
    deadlines = Deadlines()
    until = time.monotonic() + 0.01
    stays, leaves = Limited(), Limited()
    tick = deadlines.add(stays, until)
    assert deadlines.add(leaves, until) == tick
    deadlines.discard(leaves, tick)
    deadlines.discard(leaves, tick)
    await stays.expired.wait()
    assert not leaves.expired.is_set()
    deadlines.discard(stays, tick)


async def test_a_limit_may_be_as_far_as_never() -> None:
    """It costs a timer that never strikes."""
    deadlines = Deadlines()
    never = Limited()
    deadlines.discard(never, deadlines.add(never, 1e300))
    assert len(deadlines) == 0
