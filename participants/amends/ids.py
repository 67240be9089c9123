"""Ids of sagas: UUIDs of version 7 (RFC 9562), made before anything is sent.

The layout, from the left::

    48 bits  Unix time in milliseconds
     4 bits  version, 7
    12 bits  counter, upper part
     2 bits  variant, 10
    30 bits  counter, lower part
    32 bits  random

The counter is the RFC's method 1: it starts at a random value whose highest bit is 0 and grows by
one within a millisecond, so that the ids of a process grow strictly, in text as in number, even
when the clock stands still or is put back. Ids that grow keep the store's index compact.
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

COUNTER_BITS: Final = 42
TAIL_BITS: Final = 32


class SagaIds:
    """A source of ids that grow strictly. May be used by several threads."""

    def __init__(
        self,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._now_ms = now_ms
        self._random_bits = random_bits
        self._lock = threading.Lock()
        self._last_ms = -1
        self._counter = 0

    def next(self) -> uuid.UUID:
        """Make the next id."""
        return uuid.UUID(int=self.next_number())

    def next_number(self) -> int:
        """Make the next id, as the number that it is."""
        with self._lock:
            now_ms = self._now_ms()
            if now_ms > self._last_ms:
                self._begin(now_ms)
            elif self._counter + 1 < 1 << COUNTER_BITS:
                self._counter += 1
            else:
                self._begin(self._last_ms + 1)
            return _uuid7(self._last_ms, self._counter, self._random_bits(TAIL_BITS))

    def _begin(self, at_ms: int) -> None:
        self._last_ms = at_ms
        # One bit less than there is room for: 2^41 ids may follow before the counter is full.
        self._counter = self._random_bits(COUNTER_BITS - 1)


def _uuid7(at_ms: int, counter: int, tail: int) -> int:
    upper, lower = counter >> 30, counter & (1 << 30) - 1
    return at_ms << 80 | 0x7 << 76 | upper << 64 | 0b10 << 62 | lower << TAIL_BITS | tail


_IDS: Final = SagaIds()


def new_saga_id() -> str:
    """Make an id for a saga: 36 characters, growing strictly within this process."""
    digits = f"{_IDS.next_number():032x}"  # a UUID object on the way would cost as much again
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
