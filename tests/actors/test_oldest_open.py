"""Since when sagas have been open: what participants keep their barriers' rows by."""

from __future__ import annotations

import anyio

from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors.virtual import Shop, a_runtime, in_virtual_time, start


def test_it_is_never_younger_than_an_open_saga() -> None:
    """An hour after its start an open saga is still the oldest; after its end a younger one is."""

    async def main() -> None:
        shop = Shop()
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, "old")
            old_ms = (await engine.supervisor.view("old")).saga.started_at_ms
            await anyio.sleep(3600)
            assert shop.oldest_open_ms() == old_ms
            shop.answers.set()
            await anyio.sleep(1)
            shop.answers = anyio.Event()
            await start(engine, "young")
            young_ms = (await engine.supervisor.view("young")).saga.started_at_ms
            await anyio.sleep(3600)
            assert shop.oldest_open_ms() == young_ms > old_ms

    in_virtual_time(main)


def test_after_a_restart_it_is_known_again() -> None:
    """It comes from the store, not from memory."""
    disk = MemoryDisk()

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Shop()) as engine:
            await start(engine, "old")
            old_ms = (await engine.supervisor.view("old")).saga.started_at_ms
        await anyio.sleep(3600)
        shop = Shop()
        async with a_runtime(MemoryStore(disk), shop):
            await anyio.sleep(60)
            assert shop.oldest_open_ms() == old_ms

    in_virtual_time(main)
