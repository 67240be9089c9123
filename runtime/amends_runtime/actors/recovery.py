"""How far recovery is: the sagas that had not ended when the store was opened, and are brought in.

Recovery names them, page by page, and each arrives when it has been read; it is over when all are
named and none is awaited. Bringing them in is the supervisor's.
"""

from __future__ import annotations

import msgspec

from amends_runtime.ports import Clock

__all__ = ["Recovering", "Recovery"]


class Recovery(msgspec.Struct, frozen=True):
    """How far it is.

    `sagas` have been brought in so far, `duration_s` is how long it has taken. One whose history is
    damaged counts as brought in: nothing more is tried.
    """

    running: bool
    sagas: int
    duration_s: float


class Recovering:
    """What is still awaited, and since when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s: float | None = None
        self._ended_s: float | None = None
        self._all_named = False
        self._awaited = 0
        self._sagas = 0

    def begin(self) -> None:
        """The first page is asked for."""
        self._began_s = self._clock.monotonic_s()

    def named(self) -> None:
        """One more is awaited."""
        self._awaited += 1

    def all_named(self) -> None:
        """There was no further page."""
        self._all_named = True
        self._note_end()

    def arrived(self) -> None:
        """One that was awaited is here, or never will be."""
        self._awaited -= 1
        self._sagas += 1
        self._note_end()

    def _note_end(self) -> None:
        if self._all_named and not self._awaited and self._ended_s is None:
            self._ended_s = self._clock.monotonic_s()

    def now(self) -> Recovery:
        """How far it is now."""
        if self._began_s is None:
            return Recovery(running=True, sagas=0, duration_s=0.0)  # it is about to begin
        until_s = self._clock.monotonic_s() if self._ended_s is None else self._ended_s
        return Recovery(self._ended_s is None, self._sagas, until_s - self._began_s)
