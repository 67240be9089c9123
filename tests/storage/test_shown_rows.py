"""A saga's row in lists follows the saga, in every store."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.ports import SagaFilter, Store
from amends_runtime.storage import open_memory_store, open_sqlite_store
from tests.storage.samples import start

LATER = {
    "state": SagaState.COMPENSATING,
    "version": 2,
    "updated_at_ms": 11,
    "ended_at_ms": 12,
    "deadline_at_ms": 13,
    "wake_at_ms": 14,
    "past_no_return": True,
}
"""Everything in a row that can change, and is another value in the second turn."""


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_row_is_the_last_one_that_was_written(tmp_path: Path, kind: str) -> None:
    """All that a later turn says of a saga is shown, and what is fixed at its start stays."""
    opened: AbstractAsyncContextManager[Store] = (
        open_memory_store() if kind == "memory" else open_sqlite_store(tmp_path / "amends.db")
    )
    async with opened as store:
        [saga] = await start(store, labels={"city": "Ulm"})
        [row] = await store.list_sagas(SagaFilter(), 10)
        assert all(getattr(row, field) != value for field, value in LATER.items())
        later = msgspec.structs.replace(row, **LATER)
        await store.commit([msgspec.structs.replace(saga.done(), summary=later)])
        assert await store.list_sagas(SagaFilter(), 10) == [later]
