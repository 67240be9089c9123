"""What waits in a lane: its order, and what it costs and keeps when others leave before it."""

from __future__ import annotations

import random

from amends_runtime.dispatch.queue import Queue


class Item:
    """Counts how often the queue looks whether anything still waits."""

    looks = 0

    def __init__(self, place: int) -> None:
        self.place = place
        self._queued = False

    @property
    def queued(self) -> bool:
        Item.looks += 1
        return self._queued

    @queued.setter
    def queued(self, queued: bool) -> None:
        self._queued = queued

    def __lt__(self, other: Item) -> bool:
        return self.place < other.place


def test_what_waits_comes_in_order_and_what_has_left_does_not_come() -> None:
    """As a sorted list would do it, whatever leaves out of turn."""
    rng = random.Random(1)  # noqa: S311  # a schedule, not a secret
    queue: Queue[Item] = Queue()
    waiting: list[Item] = []
    for place in rng.sample(range(10_000), 2_000):
        if waiting and rng.random() < 0.4:
            left = waiting.pop(rng.randrange(len(waiting)))
            queue.remove(left)
        elif waiting and rng.random() < 0.2:
            waiting.sort()
            assert queue.first() is waiting[0]
            assert queue.pop() is waiting.pop(0)
        item = Item(place)
        queue.push(item)
        waiting.append(item)
        assert len(queue) == len(waiting)
    waiting.sort()
    half = len(waiting) // 2
    for item in waiting[:half]:
        assert queue.first() is item
        assert queue.pop() is item
    assert queue.clear() == waiting[half:]
    assert len(queue) == 0
    assert queue.first() is None
    assert queue.clear() == []


def test_leaving_out_of_turn_costs_the_same_however_many_wait() -> None:
    """Each looks at two on average at most: not at all that waits, and not at all that has left."""
    for waiting in (0, 10, 1_000):
        queue: Queue[Item] = Queue()
        for place in range(waiting):
            queue.push(Item(place))
        Item.looks = 0
        for place in range(5_000):
            item = Item(10_000 + place)
            queue.push(item)
            queue.remove(item)
        assert Item.looks <= 2 * 5_000
        assert len(queue) == waiting
