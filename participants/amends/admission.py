"""Who may come in: so many handlers at once, so many calls waiting, none while draining.

gRPC's own `maximum_concurrent_rpcs` has been ignored in several releases. One `Admission` counts
the calls of a whole server, however they come: by the unary verbs or over any stream.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

DEFAULT_MAX_CONCURRENT: Final = 256
"""Handlers at once; the runtime keeps as many calls live per participant."""

MAX_QUEUED: Final = 4096
"""Calls that wait for a place, each within its own deadline: 16 runtimes with full lanes."""


class Admission:
    """Places for calls, and one line of those that wait for a place: first come, first served.

    A call that has come in either holds a place or stands in the line. So the line is empty as long
    as there is a free place, and counting is all that a call costs that needs not wait.
    """

    def __init__(self, max_concurrent: int) -> None:
        self.max_concurrent = max_concurrent
        self.is_draining = False
        self._inside = 0
        self._line: OrderedDict[int, Callable[[], bool]] = OrderedDict()
        self._last_number = 0
        self._idle: asyncio.Future[None] | None = None

    @property
    def inside(self) -> int:
        """How many calls are under way or wait for a place."""
        return self._inside

    def is_full(self) -> bool:
        """Tell whether one more call would wait behind too many."""
        return self._inside >= self.max_concurrent + MAX_QUEUED

    def enter(self) -> bool:
        """Take a free place; False if there is none, and then nothing has changed.

        Who has a place gives it back by `leave`.
        """
        if self._inside >= self.max_concurrent:
            return False
        self._inside += 1
        return True

    def line_up(self, begin: Callable[[], bool]) -> int:
        """Stand in the line; give the number there, for `step_out`.

        `begin` is called when a place is free. It takes the place and says True, or says False if
        nobody waits for it any more.
        """
        self._inside += 1
        self._last_number += 1
        self._line[self._last_number] = begin
        return self._last_number

    def step_out(self, number: int) -> None:
        """Leave the line without a place. Only who still stands in it may do so."""
        del self._line[number]
        self._inside -= 1
        self._tell_if_idle()

    def leave(self) -> None:
        """Give the place back: to the first in the line who takes it."""
        self._inside -= 1
        while self._line:
            _, begin = self._line.popitem(last=False)
            if begin():
                return
            self._inside -= 1
        self._tell_if_idle()

    async def wait_entered(self) -> None:
        """Wait for a place; the caller's own deadline bounds the wait."""
        if self.enter():
            return
        place = asyncio.get_running_loop().create_future()
        number = self.line_up(partial(_hand_over, place))
        try:
            await place
        except asyncio.CancelledError:
            if number in self._line:
                self.step_out(number)
            elif not place.cancelled():
                self.leave()  # it came together with the cancellation
            raise

    async def wait_idle(self) -> None:
        """Wait until no call is inside."""
        while self._inside:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    def _tell_if_idle(self) -> None:
        if not self._inside and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None


def _hand_over(place: asyncio.Future[None]) -> bool:
    if place.cancelled():  # and its task has not run since
        return False
    place.set_result(None)
    return True
