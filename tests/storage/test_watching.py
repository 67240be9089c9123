"""Turns in the order of their commit, for whoever watches: what every store promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.errors import CommitUnknown, StoreError
from amends_runtime.ports import SagaFilter, WatchedTurns
from amends_runtime.storage import (
    MemoryDisk,
    MemoryStore,
    SqliteStore,
    open_memory_store,
    open_sqlite_store,
)
from tests.storage.samples import Played, commit_rest, start
from tests.storage.sqlite_file import execute

AnyStore = SqliteStore | MemoryStore

MIB = 1024 * 1024


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyStore]:
    """A new store of each kind."""
    if request.param == "memory":
        async with open_memory_store() as memory:
            yield memory
    else:
        async with open_sqlite_store(tmp_path / "amends.db") as sqlite:
            yield sqlite


async def after(
    store: AnyStore, seq: int, *, turns: int = 100, looked_at: int = 100, size: int = MIB
) -> WatchedTurns:
    """Whatever was committed after a position."""
    return await store.turns_after(seq, SagaFilter(), turns=turns, looked_at=looked_at, size=size)


async def test_a_turn_is_told_as_the_saga_was_after_it(store: AnyStore) -> None:
    """Not as it is now: a turn of its life does not look like its end."""
    [played] = await start(store)
    played.to_completion()
    await commit_rest(store, [played])
    answer = await after(store, 0)
    assert [turn.records for turn in answer.turns] == [t.records for t in played.transitions]
    assert [turn.saga.version for turn in answer.turns] == [1, 2, 3, 4]
    states = [turn.saga.state for turn in answer.turns]
    assert states == [SagaState.RUNNING] * 3 + [SagaState.COMPLETED]
    assert [bool(turn.saga.ended_at_ms) for turn in answer.turns] == [False] * 3 + [True]
    assert [turn.saga.updated_at_ms for turn in answer.turns] == [
        t.records[-1].at_ms for t in played.transitions
    ]


async def test_a_state_is_found_that_did_not_last(store: AnyStore) -> None:
    """However late somebody reads: the turn that turned back, after the saga has ended."""
    [played] = await start(store)
    played.done()
    played.rejected()
    played.done()
    await commit_rest(store, [played])
    assert played.state is SagaState.COMPENSATED
    where = SagaFilter(states=(SagaState.COMPENSATING,))
    answer = await store.turns_after(0, where, turns=9, looked_at=9, size=MIB)
    assert [(turn.seq, turn.saga.state) for turn in answer.turns] == [(3, SagaState.COMPENSATING)]
    assert (answer.through_seq, answer.head_seq) == (4, 4)


async def test_nothing_new_is_an_answer(store: AnyStore) -> None:
    """An empty store, the head, and beyond it: no turn, and nowhere to go on from but here."""
    assert store.head_seq == 0
    assert await after(store, 0) == WatchedTurns((), 0, 0)
    await start(store, 3)
    assert store.head_seq == 3
    assert await after(store, 3) == WatchedTurns((), 3, 3)
    assert await after(store, 7) == WatchedTurns((), 7, 3)


async def test_an_answer_is_bounded_by_turns_by_what_it_looks_at_and_by_bytes(
    store: AnyStore,
) -> None:
    """Each bound for itself; one turn always fits, or nobody would get past a large one."""
    await start(store, 10)
    answer = await after(store, 0, turns=4)
    assert ([t.seq for t in answer.turns], answer.through_seq) == ([1, 2, 3, 4], 4)
    answer = await after(store, 4, looked_at=3)
    assert ([t.seq for t in answer.turns], answer.through_seq) == ([5, 6, 7], 7)
    answer = await after(store, 7, size=1)
    assert ([t.seq for t in answer.turns], answer.through_seq) == ([8], 8)
    rare = SagaFilter(labels={"tenant": "nobody"})
    stretch = await store.turns_after(0, rare, turns=4, looked_at=6, size=1)
    assert stretch == WatchedTurns((), 6, 10)


async def test_a_wait_ends_with_the_commit_that_it_waits_for(store: AnyStore) -> None:
    """One that has what it wants does not wait at all."""
    begun = await start(store, 2)
    await store.wait_beyond(1)
    seen: list[int] = []

    async def watch() -> None:
        await store.wait_beyond(2)
        seen.append(store.head_seq)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            tasks.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            assert seen == []
            await store.commit([played.done() for played in begun])
    assert seen == [4, 4]


async def test_a_wait_ends_when_the_store_is_closed(store: AnyStore) -> None:
    """By an error: nothing will be committed here any more."""

    async def watch() -> None:
        with pytest.raises(StoreError, match="closed"):
            await store.wait_beyond(0)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            await store.close()


async def test_a_wait_outlives_a_failed_commit(tmp_path: Path) -> None:
    """What the commit wrote after all is seen when the store is back, without another commit."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        [played] = await start(store)
        assert store._file.writer is not None
        # The turn's row is there and the commit's answer is lost: committed by somebody else's
        # hand, as far as this store can tell.
        turn = played.done()
        seq = store.head_seq + 1
        await store._file.writer.execute("CREATE TEMP VIEW history AS SELECT 1")
        with pytest.raises(CommitUnknown):
            await store.commit([turn])
        seen: list[int] = []

        async def watch() -> None:
            await store.wait_beyond(1)
            seen.append(store.head_seq)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(StoreError, match="reopened"):
                    await after(store, 1)
                execute(
                    path,
                    "INSERT INTO history (seq, saga_no, version, format, records, state)"
                    " SELECT ?, saga_no, 2, format, records, state FROM history",
                    seq,
                )
                await store.reopen()
        assert seen == [2]


async def test_memory_sees_what_a_failed_commit_wrote() -> None:
    """The memory store wakes those who watch, too."""
    disk = MemoryDisk()
    async with open_memory_store(disk) as store:
        [played] = await start(store)
        disk.fail_next_commit(written=True)
        with pytest.raises(CommitUnknown):
            await store.commit([played.done()])
        await store.reopen()
        await store.wait_beyond(1)


# -- SQLite alone ----------------------------------------------------------------------------------


async def test_purged_turns_are_counted_where_they_are_missing(tmp_path: Path) -> None:
    """Positions are given out without gaps, so a gap is a purge, to the turn."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        await start(store, 10)
    for gone in (1, 2, 5, 9, 10):
        execute(path, "DELETE FROM history WHERE seq = ?", gone)
    execute(path, "UPDATE meta SET seq_floor = 10")
    async with open_sqlite_store(path) as store:
        answer = await after(store, 0)
        assert [(turn.seq, turn.purged_before) for turn in answer.turns] == [
            (3, 2),
            (4, 0),
            (6, 1),
            (7, 0),
            (8, 0),
        ]
        assert (answer.through_seq, answer.head_seq, answer.purged_after) == (10, 10, 2)
        answer = await after(store, 4, turns=2)
        assert [turn.purged_before for turn in answer.turns] == [1, 0]
        assert (answer.through_seq, answer.purged_after) == (7, 0)
        answer = await after(store, 8)
        assert answer == WatchedTurns((), 10, 10, purged_after=2)
        rare = SagaFilter(definition_name="other")
        answer = await store.turns_after(0, rare, turns=9, looked_at=4, size=MIB)
        assert answer == WatchedTurns((), 7, 10, purged_after=3)


async def test_a_damaged_turn_holds_up_no_watcher(tmp_path: Path) -> None:
    """It is told without its records, and those after it with theirs."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        begun = await start(store, 3)
    execute(path, "DROP TRIGGER history_is_append_only")
    execute(path, "UPDATE history SET records = x'c1' WHERE seq = 2")
    async with open_sqlite_store(path) as store:
        answer = await after(store, 0)
        assert [bool(turn.records) for turn in answer.turns] == [True, False, True]
        assert [turn.saga.saga_id for turn in answer.turns] == [p.saga_id for p in begun]


async def test_turns_from_before_states_were_kept_show_the_present_one(tmp_path: Path) -> None:
    """A file of an older version is watched all the same."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        [played] = await start(store)
        played.to_completion()
        await commit_rest(store, [played])
    execute(path, "DROP TRIGGER history_is_append_only")
    execute(path, "UPDATE history SET state = 0")
    async with open_sqlite_store(path) as store:
        where = SagaFilter(states=(SagaState.COMPLETED,))
        answer = await store.turns_after(0, where, turns=9, looked_at=9, size=MIB)
        assert [turn.saga.version for turn in answer.turns] == [1, 2, 3, 4]


async def test_watching_leaves_the_log_to_the_checkpoints(tmp_path: Path) -> None:
    """Reads are short: between two of them nothing of the log is held."""
    async with open_sqlite_store(tmp_path / "amends.db") as store:
        [played] = await start(store)
        await after(store, 0)
        assert store._file.writer is not None
        rows = list(await store._file.writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)"))
        assert rows[0][0] == 0
        assert store.wal_bytes == 0
        await store.commit([Played(store.next_saga_no()).transitions[0], played.done()])
