"""What a restart is told: every saga that has not ended, whatever its state, in every store."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import TRANSITIONS
from amends_runtime.core.waking import NEVER_MS
from amends_runtime.ports import LoadedSaga, OpenSaga, RestingSaga, SagaFilter, Store
from amends_runtime.storage import open_memory_store, open_sqlite_store
from tests.storage.samples import PLAN, start

OPEN = {state for state, following in TRANSITIONS.items() if following}


def open_store(kind: str, folder: Path) -> AbstractAsyncContextManager[Store]:
    """A new store of this kind."""
    return open_memory_store() if kind == "memory" else open_sqlite_store(folder / "amends.db")


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_every_state_that_is_no_end_is_open(tmp_path: Path, kind: str) -> None:
    """A stuck saga, too: its deadline or an operator will move it."""
    async with open_store(kind, tmp_path) as store:
        sagas = await start(store, len(SagaState))
        rows = {row.saga_no: row for row in await store.list_sagas(SagaFilter(), 100)}
        for saga, state in zip(sagas, SagaState, strict=True):
            row = msgspec.structs.replace(rows[saga.saga_no], state=state, version=2)
            await store.commit([msgspec.structs.replace(saga.done(), summary=row)])
        expected = [
            OpenSaga(saga.saga_no, saga.saga_id, PLAN.content_hash)
            for saga, state in zip(sagas, SagaState, strict=True)
            if state in OPEN
        ]
        found = [row for state in OPEN for row in await store.open_sagas(state, 0, 100)]
        assert sorted(found) == expected
        assert len(expected) == len(OPEN) == 3


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_what_rests_is_found_by_its_instant_alone(tmp_path: Path, kind: str) -> None:
    """Earliest first, in pages, those of one instant too; ends and what does not rest are not."""
    instants = [30, 10, 20, 20, 20, 0, NEVER_MS]
    async with open_store(kind, tmp_path) as store:
        sagas = await start(store, len(instants) + 1)
        rows = {row.saga_no: row for row in await store.list_sagas(SagaFilter(), 100)}
        for number, (saga, wake_at_ms) in enumerate(zip(sagas, instants, strict=False)):
            row = msgspec.structs.replace(
                rows[saga.saga_no],
                state={0: SagaState.STUCK, 3: SagaState.COMPENSATING}.get(
                    number, SagaState.RUNNING
                ),
                version=2,
                updated_at_ms=100 + number,
                wake_at_ms=wake_at_ms,
            )
            await store.commit([msgspec.structs.replace(saga.done(), summary=row)])
        ended = msgspec.structs.replace(rows[sagas[-1].saga_no], version=2, wake_at_ms=15)
        ended = msgspec.structs.replace(ended, state=SagaState.COMPLETED, ended_at_ms=9)
        await store.commit([msgspec.structs.replace(sagas[-1].done(), summary=ended)])

        found: list[RestingSaga] = []
        while page := await store.resting_sagas(found[-1] if found else None, 30, 2):
            assert len(page) <= 2
            found += page
        numbers = [saga.saga_no for saga in sagas]
        in_order = [numbers[1], numbers[2], numbers[4], numbers[3], numbers[0]]
        assert [row.saga_no for row in found] == in_order
        assert [row.wake_at_ms for row in found] == [10, 20, 20, 20, 30]
        assert [row.saga_id for row in found[:2]] == [sagas[1].saga_id, sagas[2].saga_id]
        assert {row.definition_hash for row in found} == {PLAN.content_hash}
        assert await store.resting_sagas(None, 9, 10) == []
        late = await store.resting_sagas(None, 30, 10, 102)
        assert [row.saga_no for row in late] == [numbers[4], numbers[3]]

        resting = await store.count_resting()
        one_each = {SagaState.COMPENSATING: 1, SagaState.STUCK: 1}
        assert resting.by_state == {SagaState.RUNNING: 4, **one_each}
        assert resting.updated_at_ms == 106
        [opened] = await store.open_sagas(SagaState.RUNNING, 0, 10)
        assert (opened.saga_no, opened.definition_hash) == (numbers[5], PLAN.content_hash)
        loaded = (await store.load([sagas[1].saga_id]))[sagas[1].saga_id]
        assert isinstance(loaded, LoadedSaga)
        assert loaded.wake_at_ms == 10


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_nothing_rests_in_a_new_store(tmp_path: Path, kind: str) -> None:
    """And nothing was written at any instant."""
    async with open_store(kind, tmp_path) as store:
        resting = await store.count_resting()
        assert (resting.by_state, resting.updated_at_ms) == ({}, 0)
