"""What the memory store has beyond the contract: a disk that can be made to fail."""

from __future__ import annotations

import pytest

from amends_runtime.errors import CommitUnknown, OwnershipLost, StoreError
from amends_runtime.ports import LoadedSaga, OperatorWords, SagaFilter
from amends_runtime.storage import MemoryDisk, MemoryStore, open_memory_store
from tests.storage.samples import start


@pytest.mark.parametrize("written", [True, False])
async def test_a_commit_that_fails_may_have_happened(written: bool) -> None:  # noqa: FBT001
    """Until it is reopened everything is refused; then the store shows whether it happened."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        [played] = await start(store)
        disk.fail_next_commit(written=written)
        with pytest.raises(CommitUnknown):
            await store.commit([played.done()])
        with pytest.raises(CommitUnknown, match="reopened"):
            await store.commit([])
        for call in (lambda: store.load(["a"]), lambda: store.list_sagas(SagaFilter(), 1)):
            with pytest.raises(StoreError, match="reopened"):
                await call()
        await store.reopen()
        saga = (await store.load([played.saga_id]))[played.saga_id]
        assert isinstance(saga, LoadedSaga)
        assert saga.version == (2 if written else 1)
        if not written:
            await store.commit(played.transitions[1:])


async def test_a_disk_outlives_its_stores() -> None:
    """A process that dies closes nothing; the next one finds all that it had committed."""
    disk = MemoryDisk()
    died = MemoryStore(disk)
    [played] = await start(died)
    async with open_memory_store(disk) as store:
        assert store.identity.epoch == died.identity.epoch + 1
        await store.commit([played.done()])
        with pytest.raises(OwnershipLost):
            await died.commit([played.done()])


async def test_a_store_that_cannot_reopen_itself_is_lost() -> None:
    """A lone write failed, and so did the reopening: nothing can be asked, and it is said."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        disk.fail_next_commit(written=False, reopens=False)
        with pytest.raises(CommitUnknown):
            await store.put_participant("shop", "localhost:1", OperatorWords("a", "b", 1))
        assert store.lost
        with pytest.raises(StoreError, match="reopened"):
            await store.wait_lost()
        with pytest.raises(StoreError, match="reopened"):
            await store.participants()
