"""What waits in a lane, first things first, where any may leave before its turn.

A heap lets only its first go. What leaves out of turn therefore stays in it, marked, until it comes
to the front; and behind one that waits for long it never does. So once more than half of the heap
has gone, the heap is made anew of the rest: it never keeps more of what has gone than of what
waits, and each that leaves pays for looking at two at most, since as many must leave again before
the next time.
"""

from __future__ import annotations

import heapq
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Queue", "Queued"]


class Queued(Protocol):
    """Can wait in a queue, once in its life or again after its turn, but not after `remove`."""

    queued: bool
    """Whether it waits; the queue's to set."""

    def __lt__(self, other: Any, /) -> bool:
        """Whether its turn is before the other's."""
        ...


_Item = TypeVar("_Item", bound=Queued)


class Queue(Generic[_Item]):
    """A priority queue. Its length is that of what waits."""

    __slots__ = ("_gone", "_heap")

    def __init__(self) -> None:
        self._heap: list[_Item] = []
        self._gone = 0  # how many in the heap do not wait any more

    def __len__(self) -> int:
        return len(self._heap) - self._gone

    def push(self, item: _Item) -> None:
        """It waits from now on."""
        item.queued = True
        heapq.heappush(self._heap, item)

    def first(self) -> _Item | None:
        """Whose turn is next, or None when nothing waits."""
        heap = self._heap
        while heap and not heap[0].queued:
            heapq.heappop(heap)
            self._gone -= 1
        return heap[0] if heap else None

    def pop(self) -> _Item:
        """Takes out what `first` has just answered."""
        item = heapq.heappop(self._heap)
        item.queued = False
        return item

    def remove(self, item: _Item) -> None:
        """One that waits here leaves out of turn."""
        item.queued = False
        self._gone += 1
        if self._gone * 2 > len(self._heap):
            self._heap = [each for each in self._heap if each.queued]
            heapq.heapify(self._heap)
            self._gone = 0

    def clear(self) -> list[_Item]:
        """Takes out all that waits, in order."""
        items = sorted(each for each in self._heap if each.queued)
        for item in items:
            item.queued = False
        self._heap, self._gone = [], 0
        return items
