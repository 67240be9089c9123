"""Admission: what waits to become durable is bounded, and who is refused is counted.

It is asked of every start, for nobody knows yet whether it is a repeated one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from amends_runtime.actors import refusals
from amends_runtime.errors import Overloaded

__all__ = ["Admission"]

STARTING_BYTES: Final = 64 * 1024 * 1024  # inputs of starts that are not durable yet


class Admission:
    """The way in. `waiting` says how many sagas wait to be read, to decide or to be committed."""

    def __init__(self, commit_queue: int, waiting: Callable[[], int]) -> None:
        self._commit_queue = commit_queue
        self._waiting = waiting
        self._bytes = 0
        self._refused: dict[str, int] = {}

    @property
    def room(self) -> int:
        """How many starts the commit queue takes now; those beyond it are `refuse`'s."""
        return max(0, self._commit_queue - self._waiting())

    def check(self, input_bytes: int) -> None:
        """Raises Overloaded where there is no room for one more start with such an input."""
        if not self.room:
            raise refusals.commit_queue_full(self._commit_queue)
        if self._bytes and self._bytes + input_bytes > STARTING_BYTES:
            raise refusals.starting_bytes_full(self._bytes, STARTING_BYTES)

    def begins(self, input_bytes: int) -> None:
        """A start with such an input is on its way, until it `ends`."""
        self._bytes += input_bytes

    def ends(self, input_bytes: int) -> None:
        """What had begun has its answer, or nobody waits for it."""
        self._bytes -= input_bytes

    def refuse(self, count: int) -> Overloaded:
        """The refusal of so many starts for which the commit queue has no room, counted."""
        refusal = refusals.commit_queue_full(self._commit_queue)
        self.note(refusal, count)
        return refusal

    def note(self, refusal: Overloaded, count: int = 1) -> None:
        """So many requests were refused."""
        self._refused[refusal.reason] = self._refused.get(refusal.reason, 0) + count

    @property
    def refused(self) -> dict[str, int]:
        """How many requests were refused because a limit is reached, by the error's reason."""
        return dict(self._refused)
