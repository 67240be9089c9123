"""What was in memory and is not to be believed: all of it comes back, and nothing of it stays."""

from __future__ import annotations

import anyio
import pytest

from amends_runtime.actors import recovery as recovery_module
from amends_runtime.errors import Unavailable
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors.virtual import FailingStore, Shop, a_runtime, in_virtual_time, start


def test_all_pages_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten open sagas, pages of three: after a restart each is asked again, once."""
    monkeypatch.setattr(recovery_module, "RECOVERY_PAGE", 3)
    disk = MemoryDisk()
    sagas = [f"s-{number}" for number in range(10)]

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Shop()) as engine:
            await start(engine, *sagas)
        shop = Shop()
        async with a_runtime(MemoryStore(disk), shop) as engine:
            await anyio.sleep(1)
            assert engine.supervisor.counts().live == len(sagas)
            assert sorted(shop.calls) == sorted((saga, "EXECUTE") for saga in sagas)

    in_virtual_time(main)


def test_a_participant_gets_no_more_calls_at_once_after_a_restart_than_before() -> None:
    """All sagas come in, and nobody waits for the slow one; of their calls as many leave as may."""
    disk = MemoryDisk()
    sagas = [f"s-{number}" for number in range(1_000)]

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Shop()) as engine:
            await start(engine, *sagas)
        shop = Shop()
        async with a_runtime(MemoryStore(disk), shop, limit=16) as engine:
            await anyio.sleep(5)
            assert not engine.supervisor.recovery.running
            assert engine.supervisor.counts().live == len(sagas)
            assert len(shop.calls) == 14  # two places are kept for compensations
            shop.answers.set()
            await anyio.sleep(5)
            assert engine.supervisor.counts().live == 0
            assert sorted(shop.calls) == sorted((saga, "EXECUTE") for saga in sagas)

    in_virtual_time(main)


def test_a_request_that_waits_while_a_commit_fails_is_answered() -> None:
    """The one whose write failed is told so; the one behind it goes on where the saga is then."""
    told: list[object] = []

    async def main() -> None:
        store = FailingStore(MemoryDisk())
        async with a_runtime(store, Shop()) as engine:

            async def cancel() -> None:
                try:
                    await engine.supervisor.cancel_saga("s-1", "ann", "changed her mind")
                except Unavailable as error:
                    told.append(type(error))

            async def start_again() -> None:
                told.extend(await start(engine, "s-1"))

            await start(engine, "s-1")
            store.failing = failing = anyio.Event()
            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel)
                    await anyio.sleep(1)  # of virtual time: its commit is under way
                    tasks.start_soon(start_again)
                    await anyio.sleep(1)
                    failing.set()

    in_virtual_time(main)
    assert told == [Unavailable, True]


def test_a_call_of_a_state_that_was_dropped_never_leaves() -> None:
    """A saga turns back by a commit that fails, though written, while its call waits in the lane.

    It is read again, and only its compensation leaves.
    """

    async def main() -> None:
        store, shop = FailingStore(MemoryDisk()), Shop()
        store.written = True
        async with a_runtime(store, shop, limit=1) as engine:
            await start(engine, "s-1", "s-2")
            store.failing = anyio.Event()
            store.failing.set()
            with pytest.raises(Unavailable):
                await engine.supervisor.cancel_saga("s-2", "ann", "changed her mind")
            await anyio.sleep(60)  # its call can no longer be running anywhere
            shop.answers.set()
            await anyio.sleep(60)
            assert engine.supervisor.counts().live == 0
        assert shop.calls == [("s-1", "EXECUTE"), ("s-2", "COMPENSATE")]

    in_virtual_time(main)
