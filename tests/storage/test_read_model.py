"""The read model is a function of the history: proving it, and making it anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from amends_runtime.core.definition import Plan
from amends_runtime.core.records import SagaState
from amends_runtime.errors import StoreError
from amends_runtime.ports import SagaFilter
from amends_runtime.storage import (
    MemoryDisk,
    MemoryStore,
    SqliteStore,
    open_memory_store,
    open_sqlite_store,
    read_model,
    rebuild_read_model,
    verify_read_model,
)
from tests.storage.samples import NOW_MS, ORDER, TRANSFER, Played, commit_rest, loaded, start
from tests.storage.sqlite_file import execute

AnyStore = SqliteStore | MemoryStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyStore]:
    """A new store of each kind."""
    if request.param == "memory":
        async with open_memory_store() as memory:
            yield memory
    else:
        async with open_sqlite_store(tmp_path / "amends.db") as sqlite:
            yield sqlite


async def all_sorts(store: AnyStore) -> list[Played]:
    """Sagas at every stage and in every state that one turn after another comes to."""
    begun = await start(store, 12, labels={"tenant": "a"})
    begun[0].to_completion()
    begun[1].rejected()
    begun[2].done()
    begun[2].rejected()
    begun[3].done()
    begun[3].cancel()
    begun[4].done()
    begun[4].unknown()
    begun[5].cancel()
    begun[6].done()
    begun[6].rejected()
    begun[6].done()
    await commit_rest(store, begun)
    return [*begun, *await all_sorts_of_commits(store)]


async def all_sorts_of_commits(store: AnyStore) -> list[Played]:
    """Two-phase commits at every stage: votes, another round, both decisions, every end."""
    begun = await start(store, 8, TRANSFER, labels={"tenant": "a"})
    begun[0].to_completion()
    begun[1].done()
    begun[2].done()
    begun[2].done()
    begun[3].done()
    begun[3].rejected()
    begun[4].done()
    begun[4].rejected()
    begun[4].done()
    begun[5].done()
    begun[5].locked()
    begun[5].done()
    for _ in range(2):
        begun[6].done()
    begun[6].alone()
    begun[6].done()
    begun[7].done()
    begun[7].done()
    begun[7].unknown()
    await commit_rest(store, begun)
    assert [played.state for played in begun] == [
        SagaState.COMPLETED,
        *[SagaState.RUNNING] * 2,
        SagaState.COMPENSATING,
        SagaState.COMPENSATED,
        SagaState.RUNNING,
        SagaState.MIXED,
        SagaState.RUNNING,
    ]
    return begun


async def test_what_the_turns_wrote_equals_the_history(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing differs, whatever the sagas went through, and however many pages they take."""
    begun = await all_sorts(store)
    assert {played.state for played in begun} >= {
        SagaState.RUNNING,
        SagaState.COMPENSATING,
        SagaState.COMPENSATED,
        SagaState.COMPLETED,
        SagaState.MIXED,
    }
    assert await verify_read_model(store) == []
    monkeypatch.setattr(read_model, "PAGE", 5)
    assert await verify_read_model(store) == []


async def test_a_rebuilt_read_model_answers_as_before(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists, counts, and what recovery reads; only the version that a row names is newer."""
    monkeypatch.setattr(read_model, "PAGE", 5)
    begun = await all_sorts(store)
    counts = await store.count_by_state()
    opened = await store.open_sagas(SagaState.RUNNING, 0, 100)
    assert await rebuild_read_model(store) == len(begun)
    assert await verify_read_model(store) == []
    assert await store.count_by_state() == counts
    assert await store.open_sagas(SagaState.RUNNING, 0, 100) == opened
    for where in (SagaFilter(labels={"tenant": "a"}), SagaFilter()):
        rows = await store.list_sagas(where, 100)
        assert [row.saga_no for row in rows] == [p.saga_no for p in reversed(begun)]
        assert [row.version for row in rows] == [len(p.transitions) for p in reversed(begun)]
    turn = begun[4].cancel()
    await store.commit([turn])
    assert await verify_read_model(store) == []


async def test_a_rebuild_that_fails_changes_nothing(store: AnyStore) -> None:
    """Half a read model would hide sagas from recovery."""
    begun = await all_sorts(store)
    rows = await store.list_sagas(SagaFilter(), 100)

    class Unreadable(Exception):
        pass

    async def pages() -> AsyncIterator[list[object]]:
        yield rows[:3]  # type: ignore[misc]
        raise Unreadable

    with pytest.raises(Unreadable):
        await store.replace_read_model(pages())  # type: ignore[arg-type]
    assert await store.list_sagas(SagaFilter(), 100) == rows
    await store.commit([begun[4].cancel()])


WRONG = {
    "state": SagaState.COMPLETED,
    "past_no_return": True,
    "ended_at_ms": 7,
    "started_at_ms": 7,
    "updated_at_ms": 7,
    "deadline_at_ms": 7,
    "wake_at_ms": 7,
    "labels": {"tenant": "b"},
    "saga_id": "somebody",
    "version": 2,
}


@pytest.mark.parametrize("field", WRONG)
async def test_every_difference_is_found(field: str) -> None:
    """Whatever is wrong in a row is named with both values."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        [played, _] = await start(store, 2)
        await store.commit([played.done()])
        row = disk.sagas[played.saga_no]
        disk.sagas[played.saga_no] = msgspec.structs.replace(row, **{field: WRONG[field]})
        found = await verify_read_model(store)
        assert {difference.saga_no for difference in found} == {played.saga_no}
        named = {difference.field: difference for difference in found}
        if field == "version":
            assert set(named) == {"updated_at_ms"}  # the row claims to be of a later turn
        else:
            assert (named[field].row, named[field].history) == (WRONG[field], getattr(row, field))


async def test_what_is_kept_beside_a_turn_is_proved_too(store: AnyStore) -> None:
    """A state or a point of no return that the saga did not have after the turn is named."""
    begun = await all_sorts(store)
    ends = msgspec.structs.replace(begun[3].done(), state=SagaState.COMPENSATED)
    passed = msgspec.structs.replace(begun[4].cancel(), past_no_return=True)
    await store.commit([ends, passed])
    found = [d for d in await verify_read_model(store) if d.field == "turn"]
    assert [difference.saga_no for difference in found] == [begun[3].saga_no, begun[4].saga_no]


async def test_a_row_that_was_not_written_again_is_found() -> None:
    """A saga that has ended and still shows as running, as its row once rightly did."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        [played] = await start(store)
        stale = disk.sagas[played.saga_no]
        played.to_completion()
        await commit_rest(store, [played])
        disk.sagas[played.saga_no] = stale
        fields = {difference.field for difference in await verify_read_model(store)}
        assert fields == {"state", "ended_at_ms"}


async def test_what_has_no_counterpart_is_found_and_mended(tmp_path: Path) -> None:
    """A row without history is named and goes; a history without row is named and gets one."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        lost, extra, sound = await start(store, 3)
    execute(path, "DELETE FROM sagas WHERE saga_no = ?", lost.saga_no)
    execute(path, "DELETE FROM history WHERE saga_no = ?", extra.saga_no)
    async with open_sqlite_store(path) as store:
        found = {(d.saga_no, d.field) for d in await verify_read_model(store)}
        assert found == {(lost.saga_no, "row"), (extra.saga_no, "history")}
        assert await rebuild_read_model(store) == 2
        assert await verify_read_model(store) == []
        assert (await loaded(store, lost.saga_id)).saga_no == lost.saga_no
        assert await store.load([extra.saga_id]) == {}
        assert (await loaded(store, sound.saga_id)).version == 1


async def test_a_history_that_does_not_fold_is_named(store: AnyStore) -> None:
    """Records that cannot follow each other are a difference of their own, no reason to stop."""
    [played, other] = await start(store, 2)
    turn = played.transitions[0]
    await store.commit([msgspec.structs.replace(turn, version=2)])
    [difference] = await verify_read_model(store)
    assert (difference.saga_no, difference.field) == (played.saga_no, "history")
    assert other.saga_no != played.saga_no


async def test_a_missing_definition_stops_a_rebuild() -> None:
    """A saga that nobody can fold is not dropped from the lists in silence."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        renamed = msgspec.structs.replace(ORDER, name="refund")
        await store.put_definition(renamed, NOW_MS)
        await start(store)
        played = Played(store.next_saga_no(), plan=Plan(renamed))
        await store.commit(played.transitions)
        del disk.definitions[played.plan.content_hash]
        with pytest.raises(StoreError, match=f"saga {played.saga_id}: its definition .* is not"):
            await rebuild_read_model(store)
        assert len(await store.list_sagas(SagaFilter(), 10)) == 2
