"""What recovery is told: every saga that has not ended, whatever its state, in every store."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import TRANSITIONS
from amends_runtime.ports import SagaFilter, Store
from amends_runtime.storage import open_memory_store, open_sqlite_store
from tests.storage.samples import start

OPEN = {state for state, following in TRANSITIONS.items() if following}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_every_state_that_is_no_end_is_open(tmp_path: Path, kind: str) -> None:
    """A stuck saga, too: its deadline or an operator will move it."""
    opened: AbstractAsyncContextManager[Store] = (
        open_memory_store() if kind == "memory" else open_sqlite_store(tmp_path / "amends.db")
    )
    async with opened as store:
        sagas = await start(store, len(SagaState))
        rows = {row.saga_no: row for row in await store.list_sagas(SagaFilter(), 100)}
        for saga, state in zip(sagas, SagaState, strict=True):
            row = msgspec.structs.replace(rows[saga.saga_no], state=state, version=2)
            await store.commit([msgspec.structs.replace(saga.done(), summary=row)])
        expected = [
            (saga.saga_no, saga.saga_id)
            for saga, state in zip(sagas, SagaState, strict=True)
            if state in OPEN
        ]
        assert await store.open_sagas(0, 100) == expected
        assert len(expected) == len(OPEN) == 3
