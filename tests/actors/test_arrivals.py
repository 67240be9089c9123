"""Sagas that come by themselves: read ahead of the room for them, and never as they were once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from amends_runtime.actors.arrivals import Arrival, Arrivals
from amends_runtime.core.records import SagaState
from amends_runtime.ports import LoadedSaga, Tombstone
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors.virtual import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class NumberedStore(MemoryStore):
    """Every saga in it is purged, and ended at the instant of the reading: 1, 2, 3."""

    def __init__(self) -> None:
        super().__init__(MemoryDisk())
        self.readings = 0

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        self.readings += 1
        return {one: Tombstone(one, "h", SagaState.COMPLETED, self.readings) for one in saga_ids}


class Came:
    """Who has come, and by which reading."""

    def __init__(self) -> None:
        self.sagas: list[tuple[str, int]] = []
        self.when_came: Callable[[], object] = lambda: None

    def note(self, saga_id: str, _: Arrival, found: LoadedSaga | Tombstone | None) -> None:
        """One has come."""
        assert isinstance(found, Tombstone)
        self.sagas.append((saga_id, found.ended_at_ms))
        self.when_came()


@asynccontextmanager
async def arriving(came: Came, room: Callable[[bool], int]) -> AsyncIterator[Arrivals]:
    """Arrivals that are read for the length of the block, while there is room."""

    def unreadable(*_: object) -> None:
        raise AssertionError

    arrivals = Arrivals(NumberedStore(), room=room, arrived=came.note, unreadable=unreadable)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(arrivals.run)
        yield arrivals
        tasks.cancel_scope.cancel()


def test_what_comes_by_itself_is_read_before_there_is_room() -> None:
    """It waits for the room, so many at a time as there is, and not for the store any more."""
    came, room = Came(), [0, 0, 2, 0, 1]

    async def main() -> None:
        async with arriving(
            came, lambda compensates: 0 if compensates or not room else room.pop(0)
        ) as arrivals:
            for saga_id in ("a", "b", "c", "d"):
                arrivals.of(saga_id, at_leisure=True)
            await anyio.sleep(60)
            assert came.sagas == [("a", 1), ("b", 1), ("c", 1)]
            assert arrivals.waiting_at_leisure == 1
            arrivals.of("e", at_leisure=True)
            assert arrivals.waiting_at_leisure == 2

    in_virtual_time(main)


def test_who_is_asked_for_comes_at_once_and_once() -> None:
    """Also if it had come by itself, and was read ahead and waits for room."""
    came, room = Came(), [0]

    async def main() -> None:
        async with arriving(came, lambda _: room[0]) as arrivals:
            for saga_id in ("a", "b"):
                arrivals.of(saga_id, at_leisure=True)
            await anyio.sleep(1)
            arrivals.of("b")
            await anyio.sleep(1)
            assert came.sagas == [("b", 2)]
            room[0] = 10
            await anyio.sleep(1)
            assert came.sagas == [("b", 2), ("a", 1)]
            assert len(arrivals) == arrivals.waiting_at_leisure == 0

    in_virtual_time(main)


def test_nobody_comes_as_it_was_before_it_came_last() -> None:
    """One that was read ahead comes, goes, and is due again: what was read then is forgotten."""
    came, room = Came(), [0]

    async def main() -> None:
        async with arriving(came, lambda _: room[0]) as arrivals:
            arrivals.of("a", at_leisure=True)
            await anyio.sleep(1)
            arrivals.of("a")
            await anyio.sleep(1)
            arrivals.of("a", at_leisure=True)
            await anyio.sleep(1)
            room[0] = 10
            await anyio.sleep(1)
            assert came.sagas == [("a", 2), ("a", 3)]

    in_virtual_time(main)


def test_what_is_asked_for_never_keeps_out_what_comes_by_itself() -> None:
    """Somebody asks for one more each time that one has come; the others come all the same."""
    came = Came()

    async def main() -> None:
        async with arriving(came, lambda _: 1) as arrivals:
            came.when_came = lambda: arrivals.of(f"asked-{len(came.sagas)}")
            for saga_id in ("a", "b", "c"):
                arrivals.of(saga_id, at_leisure=True)
            arrivals.of("asked")
            with anyio.fail_after(60):
                while not {"a", "b", "c"} <= {saga_id for saga_id, _ in came.sagas}:
                    await anyio.lowlevel.checkpoint()
            assert len(came.sagas) < 40

    in_virtual_time(main)


def test_those_that_compensate_stand_in_a_line_of_their_own() -> None:
    """They come before others that came earlier, and have room where those have none."""
    came, room = Came(), {True: 1, False: 0}

    async def main() -> None:
        async with arriving(came, lambda compensates: room[compensates]) as arrivals:
            for saga_id in ("a", "b"):
                arrivals.of(saga_id, at_leisure=True)
            for saga_id in ("c", "d"):
                arrivals.of(saga_id, at_leisure=True, compensates=True)
            await anyio.sleep(1)
            assert [saga_id for saga_id, _ in came.sagas] == ["c", "d"]
            room[False] = 1
            await anyio.sleep(1)
            assert [saga_id for saga_id, _ in came.sagas] == ["c", "d", "a", "b"]

    in_virtual_time(main)
