"""Virtual time: an event loop that never waits, and the clock that goes with it.

How to think about it. A loop sleeps for one of two reasons: something outside may happen, or a
timer is not due yet. This loop has no outside, no sockets and no threads, so when nothing is ready
the next timer's instant is *now*: an hour of waits takes as long as what happens in it. The order
of everything is the order in which it was asked for, so the same program takes the same course
each time.

When neither anything is ready nor a timer set, nothing can ever happen again: that is a deadlock of
what runs on the loop, and raised as `Stalled`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

__all__ = ["START_MS", "Stalled", "VirtualClock", "VirtualLoop"]

START_MS: Final = 1_767_225_600_000
"""Where the wall clock starts, by default: 2026-01-01 00:00 UTC."""


class Stalled(RuntimeError):
    """Everything waits for something that cannot happen in virtual time: a deadlock, or I/O."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in virtual time, which starts at 0 seconds.

    Give it to `asyncio.Runner(loop_factory=VirtualLoop)`, or drive it by `run_until_complete`.
    """

    def __init__(self) -> None:
        self._virtual_s = 0.0
        super().__init__(_NoOutside(self))

    def time(self) -> float:
        """Seconds since the loop was made, in virtual time."""
        return self._virtual_s

    def advance(self, seconds: float) -> None:
        """Time passes, and no timer fires before the loop runs on."""
        self._virtual_s += seconds


class VirtualClock:
    """The clocks of a machine whose time is a loop's.

    The wall clock can be set, in either direction; the monotonic one cannot.
    """

    def __init__(self, loop: VirtualLoop, start_ms: int = START_MS) -> None:
        self._loop = loop
        self._offset_ms = start_ms

    def now_ms(self) -> int:
        """UTC milliseconds."""
        return self._offset_ms + round(self._loop.time() * 1000)

    def now_us(self) -> int:
        """The same in microseconds, as whole milliseconds: virtual time is no finer."""
        return self.now_ms() * 1000

    def monotonic_s(self) -> float:
        """Seconds that never jump."""
        return self._loop.time()

    def jump(self, ms: int) -> None:
        """Somebody sets the wall clock: forward, or back."""
        self._offset_ms += ms


class _NoOutside(selectors.BaseSelector):
    """What the loop asks whether anything has happened outside: never, but time has passed."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stalled(
                "everything waits, and nothing is left that could wake it: in virtual time there is"
                " no input or output and there are no threads"
            )
        self._loop.advance(max(0.0, timeout))
        return []

    # The loop registers the pipe by which threads and signals would wake it.

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return selectors.SelectorKey(fileobj, number, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self.register(fileobj, 0)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return {}
