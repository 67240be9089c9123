"""A batch as one row: what is packed comes out again, and what does not fit is never written."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from amends_runtime.ports import SagaFilter, SagaSummary, Transition
from amends_runtime.storage import SqliteStore, open_sqlite_store
from tests.storage.samples import NOW_MS, ORDER, Played

LARGEST = 2**63 - 1


def changed(turn: Transition, **fields: object) -> Transition:
    """The same turn with another row of the read model."""
    assert turn.summary is not None
    return msgspec.structs.replace(turn, summary=msgspec.structs.replace(turn.summary, **fields))


async def rows(store: SqliteStore, *turns: Transition) -> dict[str, SagaSummary]:
    """Commits the turns in one batch and answers the rows of the read model, by saga."""
    await store.put_definition(ORDER, NOW_MS)
    await store.commit(turns)
    return {row.saga_id: row for row in await store.list_sagas(SagaFilter(), 100)}


@pytest.mark.parametrize("wake_at_ms", [0, 1, NOW_MS, 10**18 - 2, LARGEST])
async def test_every_instant_comes_back(tmp_path: Path, wake_at_ms: int) -> None:
    """None, the first, the usual, the last that has its digits, and never."""
    async with open_sqlite_store(tmp_path / "amends.db") as store:
        turn = changed(Played(store.next_saga_no(), "one").transitions[0], wake_at_ms=wake_at_ms)
        assert (await rows(store, turn))["one"] == turn.summary


async def test_text_of_any_language_beside_none(tmp_path: Path) -> None:
    """Sagas with and without labels in one batch: bytes and characters are not mixed up."""
    labels = [{}, {"größe": "XL"}, {}, {"名前": "値", "a": ""}]
    async with open_sqlite_store(tmp_path / "amends.db") as store:
        turns = [
            Played(store.next_saga_no(), f"ö{number}", labels=each).transitions[0]
            for number, each in enumerate(labels)
        ]
        found = await rows(store, *turns)
        assert [found[f"ö{number}"].labels for number in range(len(labels))] == labels
        matching = await store.list_sagas(SagaFilter(labels={"名前": "値"}), 10)
        assert [row.saga_id for row in matching] == ["ö3"]


@pytest.mark.parametrize("deadline_at_ms", [-1, 10**18, 9 * 10**18])
async def test_a_number_that_does_not_fit_is_refused(tmp_path: Path, deadline_at_ms: int) -> None:
    """Before anything is written: it would move every number behind it."""
    async with open_sqlite_store(tmp_path / "amends.db") as store:
        turn = Played(store.next_saga_no(), "one").transitions[0]
        with pytest.raises(AssertionError, match="numbers are"):
            await rows(store, changed(turn, deadline_at_ms=deadline_at_ms))
        assert set(await rows(store, turn)) == {"one"}
