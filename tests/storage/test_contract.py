"""The contract of Store and Insights, promise by promise, for every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import msgspec
import pytest

from amends_runtime.core.definition import Definition, Plan, RetryPolicy, content_hash, normalise
from amends_runtime.core.records import CommitDecision, SagaState
from amends_runtime.core.saga import fold
from amends_runtime.errors import CommitUnknown, OwnershipLost, StoreError, VersionConflict
from amends_runtime.ports import (
    AuditEntry,
    LoadedSaga,
    OpenSaga,
    OperatorWords,
    ParticipantAddress,
    RegisteredDefinition,
    SagaFilter,
    SagaSummary,
    Tombstone,
)
from amends_runtime.storage import (
    MemoryDisk,
    MemoryStore,
    SqliteStore,
    open_memory_store,
    open_sqlite_store,
)
from tests.storage.samples import (
    NOW_MS,
    ORDER,
    PLAN,
    Played,
    commit_rest,
    loaded,
    start,
)
from tests.storage.sqlite_file import execute

AnyStore = SqliteStore | MemoryStore

BY = OperatorWords("ada", "moved to the new rack", NOW_MS)


class Place:
    """Where stores of one kind are kept: opened, opened again, and looked into."""

    def open(self) -> AbstractAsyncContextManager[AnyStore]:
        """The store; a later opening of the same place finds what was committed."""
        raise NotImplementedError

    def bury(self, tombstone: Tombstone) -> None:
        """What a purge leaves behind. The store is closed."""
        raise NotImplementedError

    def restore(self) -> None:
        """From here on it is what came from a backup. The store is closed."""
        raise NotImplementedError

    def usurp(self) -> None:
        """Another runtime takes the next epoch."""
        raise NotImplementedError


class MemoryPlace(Place):
    def __init__(self, folder: Path) -> None:
        self.disk = MemoryDisk()

    def open(self) -> AbstractAsyncContextManager[AnyStore]:
        return open_memory_store(self.disk)

    def bury(self, tombstone: Tombstone) -> None:
        self.disk.tombstones[tombstone.saga_id] = tombstone

    def restore(self) -> None:
        self.disk.mark_restored()

    def usurp(self) -> None:
        MemoryStore(self.disk)


class SqlitePlace(Place):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "amends.db"

    def open(self) -> AbstractAsyncContextManager[AnyStore]:
        return open_sqlite_store(self.path)

    def bury(self, tombstone: Tombstone) -> None:
        execute(
            self.path,
            "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?)",
            tombstone.saga_id,
            tombstone.content_hash,
            tombstone.state,
            tombstone.ended_at_ms,
            tombstone.decision or 0,
            tombstone.round,
        )

    def restore(self) -> None:
        self.path.with_name(self.path.name + ".lock").unlink()

    def usurp(self) -> None:
        # The lock keeps a well-behaved runtime out; this is one whose lock file was removed.
        execute(self.path, "UPDATE meta SET epoch = epoch + 1")


@pytest.fixture(params=[MemoryPlace, SqlitePlace], ids=["memory", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Somewhere to keep a store of each kind."""
    kind: Callable[[Path], Place] = request.param
    return kind(tmp_path)


@pytest.fixture
async def store(place: Place) -> AsyncIterator[AnyStore]:
    """A new store of each kind."""
    async with place.open() as opened:
        yield opened


# -- committing ------------------------------------------------------------------------------------


async def test_what_is_committed_is_read_back_whole(store: AnyStore) -> None:
    """A history comes back record for record, payloads included, and folds to the same saga."""
    [played] = await start(store)
    played.done()
    played.unknown()
    played.cancel()
    await commit_rest(store, [played])
    found = await loaded(store, played.saga_id)
    assert found.saga_no == played.saga_no
    assert found.saga_id == played.saga_id
    assert found.definition_hash == PLAN.content_hash
    assert [turn.version for turn in found.turns] == [1, 2, 3, 4]
    assert [turn.records for turn in found.turns] == [t.records for t in played.transitions]
    assert found.version == 4
    assert fold(PLAN, [r for turn in found.turns for r in turn.records]) == played.saga


async def test_commit_answers_with_the_highest_position(store: AnyStore) -> None:
    """Positions in the history of all sagas grow by turn, in the order of the batch."""
    first, second = await start(store, 2)
    position = await store.commit([second.done(), first.done()])
    assert (await loaded(store, first.saga_id)).turns[-1].seq == position
    assert (await loaded(store, second.saga_id)).turns[-1].seq == position - 1
    assert await store.commit([first.done()]) > position


async def test_an_empty_commit_changes_nothing(store: AnyStore) -> None:
    """Nothing to commit is no error, and the answer is the position so far."""
    assert await store.commit([]) == 0
    [played] = await start(store)
    assert await store.commit([]) == (await loaded(store, played.saga_id)).turns[-1].seq


@pytest.mark.parametrize("count", [1, 2, 5, 100, 1024, 1025, 3000])
async def test_batches_of_any_size(store: AnyStore, count: int) -> None:
    """A batch is all there, whatever its size."""
    begun = await start(store, count)
    await store.commit([played.done() for played in begun])
    found = await store.load([played.saga_id for played in begun])
    assert len(found) == count
    assert all(isinstance(one, LoadedSaga) and one.version == 2 for one in found.values())
    assert await store.count_by_state() == {SagaState.RUNNING: count}


async def test_several_turns_of_one_saga_in_one_batch(store: AnyStore) -> None:
    """A batch may hold consecutive turns of a saga, its start among them."""
    await store.put_definition(ORDER, NOW_MS)
    played = Played(store.next_saga_no()).to_completion()
    await store.commit(played.transitions)
    assert (await loaded(store, played.saga_id)).version == 4
    assert await store.count_by_state() == {SagaState.COMPLETED: 1}


async def test_a_version_is_written_once(store: AnyStore) -> None:
    """Whoever comes second with a version is refused, and nothing of the batch is written."""
    begun = await start(store, 3)
    await store.commit([begun[1].done()])
    stale = begun[1].transitions[1]
    with pytest.raises(VersionConflict) as caught:
        await store.commit([begun[0].done(), stale, begun[2].done()])
    assert caught.value.saga_nos == (begun[1].saga_no,)
    assert (await loaded(store, begun[0].saga_id)).version == 1
    assert (await loaded(store, begun[1].saga_id)).version == 2
    assert (await loaded(store, begun[2].saga_id)).version == 1


async def test_a_version_may_not_be_left_out(store: AnyStore) -> None:
    """A turn that does not follow the stored one is refused, for an unknown saga too."""
    [played] = await start(store)
    played.done()
    with pytest.raises(VersionConflict) as caught:
        await store.commit([played.done()])
    assert caught.value.saga_nos == (played.saga_no,)
    unborn = store.next_saga_no()
    with pytest.raises(VersionConflict):
        await store.commit([msgspec.structs.replace(played.transitions[1], saga_no=unborn)])
    assert (await loaded(store, played.saga_id)).version == 1


async def test_a_conflict_names_all_sagas_concerned(store: AnyStore) -> None:
    """One answer is enough to leave out everything that is stale; what remains can be committed."""
    begun = await start(store, 10)
    turns = [played.done() for played in begun]
    await store.commit(turns[2:5])
    skipping = begun[7].done()
    with pytest.raises(VersionConflict) as caught:
        await store.commit([*turns[:7], skipping, *turns[8:]])
    stale = [played.saga_no for played in (*begun[2:5], begun[7])]
    assert list(caught.value.saga_nos) == stale
    await store.commit([turn for turn in turns if turn.saga_no not in stale])
    assert (await loaded(store, begun[9].saga_id)).version == 2


@pytest.mark.parametrize("count", [10, 1500])
async def test_a_conflict_in_a_batch_of_any_size_undoes_it_all(store: AnyStore, count: int) -> None:
    """All or none holds for a batch that takes several statements too, wherever the conflict is."""
    begun = await start(store, count)
    turns = [played.done() for played in begun]
    await store.commit([turns[-1]])
    with pytest.raises(VersionConflict):
        await store.commit(turns)
    found = await store.load([played.saga_id for played in begun[:-1]])
    assert {one.version for one in found.values() if isinstance(one, LoadedSaga)} == {1}
    await store.commit(turns[:-1])


async def test_an_id_belongs_to_one_saga(store: AnyStore) -> None:
    """A second saga of the same id is refused, in another batch and in the same one."""
    [played] = await start(store, saga_id="mine")
    thief = Played(store.next_saga_no(), "mine")
    with pytest.raises(VersionConflict) as caught:
        await store.commit(thief.transitions)
    assert caught.value.saga_nos == (thief.saga_no,)
    assert (await loaded(store, "mine")).saga_no == played.saga_no
    twins = [Played(store.next_saga_no(), "twin") for _ in range(2)]
    with pytest.raises(VersionConflict) as caught:
        await store.commit([twin.transitions[0] for twin in twins])
    assert caught.value.saga_nos == (twins[1].saga_no,)
    assert "twin" not in await store.load(["twin"])


async def test_an_unregistered_definition_is_refused(store: AnyStore) -> None:
    """A saga whose definition the store does not have would be one that no restart could read."""
    played = Played(store.next_saga_no())
    with pytest.raises(StoreError, match="is not registered"):
        await store.commit(played.transitions)
    assert await store.load([played.saga_id]) == {}
    await start(store)


# -- ownership -------------------------------------------------------------------------------------


async def test_each_opening_is_a_new_epoch_of_the_same_store(place: Place) -> None:
    """The ids stay, the epoch grows."""
    async with place.open() as first:
        before = first.identity
    async with place.open() as second:
        after = second.identity
        assert not second.restored
    assert (after.store_id, after.incarnation) == (before.store_id, before.incarnation)
    assert after.epoch == before.epoch + 1


async def test_a_later_owner_ends_every_write_of_an_earlier_one(
    place: Place, store: AnyStore
) -> None:
    """When the epoch has moved on nothing more is written, whatever kind of write it is."""
    first, second = await start(store, 2)
    stale = first.done()
    await store.commit([stale])
    place.usurp()
    with pytest.raises(OwnershipLost):
        await store.commit([second.done()])
    with pytest.raises(OwnershipLost):
        await store.commit([stale])
    with pytest.raises(OwnershipLost):
        await store.commit([Played(store.next_saga_no()).transitions[0]])
    with pytest.raises(OwnershipLost):
        await store.put_definition(changed(1), NOW_MS)
    with pytest.raises(OwnershipLost):
        await store.put_participant("mail", "127.0.0.1:7001", BY)
    with pytest.raises(OwnershipLost):
        await store.reopen()


async def test_a_later_owner_ends_a_confirmation(place: Place) -> None:
    """Whoever confirms must still own what is confirmed."""
    async with place.open():
        pass
    place.restore()
    async with place.open() as store:
        place.usurp()
        with pytest.raises(OwnershipLost):
            await store.confirm_restore(BY)
        assert store.restored


# -- after a restore -------------------------------------------------------------------------------

LOOKED = OperatorWords("ada", "the backup of last night, looked at", NOW_MS, "r-1")


async def test_a_store_believes_in_itself_alone(store: AnyStore) -> None:
    """Without a restore there is nothing before it, and nothing to confirm."""
    assert store.believes(store.identity.incarnation)
    assert not store.believes("another")
    assert not store.believes("")
    assert not store.restored
    assert not await store.confirm_restore(BY)
    assert await store.audit(9) == []


async def test_what_was_before_a_restore_is_believed_once_somebody_confirms_it(
    place: Place,
) -> None:
    """Of a restored store nothing is taken for the truth that others were told before, until then.

    It is one act, however often it is asked for, and lasts over restarts.
    """
    async with place.open() as store:
        before = store.identity.incarnation
    place.restore()
    async with place.open() as store:
        now = store.identity.incarnation
        assert now != before
        assert store.restored
        assert [store.believes(one) for one in (now, before, "another")] == [True, False, False]
    async with place.open() as store:
        assert store.restored, "a restart is no confirmation"
    async with place.open() as store:
        assert await store.confirm_restore(LOOKED)
        assert await store.confirm_restore(LOOKED)
        assert not await store.confirm_restore(BY)
        assert not store.restored
        assert [store.believes(one) for one in (now, before, "another")] == [True, True, False]
    async with place.open() as store:
        assert store.identity.incarnation == now
        assert [store.believes(one) for one in (now, before, "another")] == [True, True, False]
        assert await store.confirm_restore(LOOKED)
        assert await store.audit(9) == [
            AuditEntry("confirm_restore", now, f"with what it knows of {before}", LOOKED)
        ]


async def test_which_sagas_are_from_before_a_restore_is_known_until_it_is_confirmed(
    place: Place,
) -> None:
    """All that it came with; what starts later is not, also after a restart or the next restore."""
    async with place.open() as store:
        assert store.unconfirmed_through_no == 0
        [saga] = await start(store)
        assert store.unconfirmed_through_no == store.restored_through_no == 0
    place.restore()
    async with place.open() as store:
        assert store.unconfirmed_through_no == saga.saga_no
        [later] = await start(store, saga_id="later")
    async with place.open() as store:
        assert store.unconfirmed_through_no == saga.saga_no < later.saga_no
    place.restore()
    async with place.open() as store:
        assert store.unconfirmed_through_no == later.saga_no
        await store.confirm_restore(BY)
        assert store.unconfirmed_through_no == 0
        assert store.restored_through_no == later.saga_no
    async with place.open() as store:
        assert store.unconfirmed_through_no == 0
        assert store.restored_through_no == later.saga_no


async def test_a_confirmation_is_for_one_restore(place: Place) -> None:
    """The next one may have lost what the first had: all that was before is open again."""
    seen = []
    for _ in range(3):
        async with place.open() as store:
            seen.append(store.identity.incarnation)
            await store.confirm_restore(BY)
        place.restore()
    async with place.open() as store:
        assert [store.believes(one) for one in seen] == [False] * 3
        # It was confirmed before, but not as this one.
        assert await store.confirm_restore(LOOKED)
        assert [store.believes(one) for one in seen] == [True] * 3
        assert len(await store.audit(9)) == 3


# -- after a failure, after a restart --------------------------------------------------------------


async def test_reopening_a_sound_store_loses_nothing(store: AnyStore) -> None:
    """A store may be reopened at any time; numbers go on where they were."""
    [played] = await start(store)
    before, number = store.identity, store.next_saga_no()
    await store.reopen()
    assert store.identity == before
    assert store.next_saga_no() > number
    await store.commit([played.done()])
    assert (await loaded(store, played.saga_id)).version == 2


async def test_a_restart_finds_everything_that_was_committed(place: Place) -> None:
    """Histories, rows and definitions are there; numbers and positions are not used again."""
    async with place.open() as store:
        [played] = await start(store, labels={"tenant": "a"})
        position = await store.commit([played.done()])
        before = await loaded(store, played.saga_id)
        rows = await store.list_sagas(SagaFilter(), 10)
        definitions = await store.definitions()
    async with place.open() as store:
        assert await loaded(store, played.saga_id) == before
        assert await store.list_sagas(SagaFilter(), 10) == rows
        assert await store.list_sagas(SagaFilter(labels={"tenant": "a"}), 10) == rows
        assert await store.definitions() == definitions
        assert store.next_saga_no() > played.saga_no
        assert await store.commit([played.done()]) > position


async def test_a_closed_store_refuses_everything(store: AnyStore) -> None:
    """After close every call says so; closing again does nothing."""
    [played] = await start(store)
    await store.close()
    await store.close()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.commit([played.done()]),
        lambda: store.put_definition(changed(1), NOW_MS),
        lambda: store.put_participant("mail", "127.0.0.1:7001", BY),
        lambda: store.remove_participant("mail", BY),
        store.participants,
        lambda: store.audit(1),
        lambda: store.turns_after(0, SagaFilter(), turns=1, looked_at=1, size=1),
        lambda: store.wait_beyond(9),
        lambda: store.load(["a"]),
        lambda: store.open_sagas(SagaState.RUNNING, 0, 1),
        lambda: store.resting_sagas(None, 1, 1),
        store.count_resting,
        lambda: store.list_sagas(SagaFilter(), 1),
        store.count_by_state,
        store.definitions,
        store.reopen,
    ]
    for call in calls:
        with pytest.raises(StoreError, match="closed") as caught:
            await call()
        assert not isinstance(caught.value, CommitUnknown)


@pytest.mark.parametrize("kind", ["anyio", "asyncio"])
async def test_a_cancelled_commit_happens_whole_or_not_at_all(store: AnyStore, kind: str) -> None:
    """Cancelled at any moment, a commit is all there or not at all, and the store goes on.

    Both ways of cancelling: a scope of anyio, and the task itself as gRPC's server does it.
    """
    begun = await start(store, 40)
    for checkpoints in range(20):
        pair = begun[2 * checkpoints : 2 * checkpoints + 2]
        turns = [played.done() for played in pair]
        if kind == "anyio":
            async with anyio.create_task_group() as group:
                group.start_soon(store.commit, turns)
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        else:
            task = asyncio.create_task(store.commit(turns))
            for _ in range(checkpoints):
                await anyio.lowlevel.checkpoint()
            task.cancel()
            await asyncio.wait([task])
        found = await store.load([played.saga_id for played in pair])
        versions = {one.version for one in found.values() if isinstance(one, LoadedSaga)}
        assert len(versions) == 1, "half of a batch was written"
        if versions == {1}:
            await store.commit(turns)


async def test_concurrent_commits_all_arrive(store: AnyStore) -> None:
    """Callers need not take turns: the store does it for them."""
    begun = await start(store, 30)
    async with anyio.create_task_group() as group:
        for played in begun:
            group.start_soon(store.commit, [played.done()])
            group.start_soon(store.load, [played.saga_id])
    found = await store.load([played.saga_id for played in begun])
    assert {one.version for one in found.values() if isinstance(one, LoadedSaga)} == {2}


# -- reading ---------------------------------------------------------------------------------------


async def test_reads_include_every_acknowledged_commit(store: AnyStore) -> None:
    """What was acknowledged before the question is in the answer, every time."""
    [played] = await start(store)
    while played.calls:
        turn = played.done()
        await store.commit([turn])
        assert (await loaded(store, played.saga_id)).version == turn.version
        [row] = await store.list_sagas(SagaFilter(), 10)
        assert row.state is played.state
        assert await store.count_by_state() == {played.state: 1}


async def test_load_answers_for_known_ids_only(store: AnyStore) -> None:
    """An unknown id is absent; an id asked for twice is answered once."""
    first, second = await start(store, 2)
    found = await store.load(["nobody", first.saga_id, second.saga_id, first.saga_id, "'; --"])
    assert set(found) == {first.saga_id, second.saga_id}
    assert await store.load([]) == {}


async def test_tombstones_answer_for_purged_sagas(place: Place) -> None:
    """A purged saga is remembered by its end, and its id can never be used again."""
    tombstone = Tombstone("gone", "c" * 64, SagaState.COMPENSATED, NOW_MS)
    async with place.open() as store:
        [played] = await start(store)
    place.bury(tombstone)
    async with place.open() as store:
        found = await store.load(["gone", played.saga_id])
        assert found["gone"] == tombstone
        assert isinstance(found[played.saga_id], LoadedSaga)
        again = Played(store.next_saga_no(), "gone")
        with pytest.raises(VersionConflict) as caught:
            await store.commit([again.transitions[0], played.done()])
        assert caught.value.saga_nos == (again.saga_no,)


@pytest.mark.parametrize("decision", [CommitDecision.COMMIT, CommitDecision.ABORT])
async def test_a_tombstone_keeps_the_decision(place: Place, decision: CommitDecision) -> None:
    """A participant may still be in doubt when the saga's history is gone."""
    tombstone = Tombstone("gone", "c" * 64, SagaState.MIXED, NOW_MS, decision, 3)
    async with place.open():
        pass
    place.bury(tombstone)
    async with place.open() as store:
        assert await store.load(["gone"]) == {"gone": tombstone}


async def test_open_sagas_in_pages(store: AnyStore) -> None:
    """Those that have not ended, by name, lowest number first; and when the oldest was started."""
    assert await store.oldest_open_ms() is None
    begun = await start(store, 12)
    for played in begun[::3]:
        played.to_completion()
    begun[1].rejected()  # turns back and, with nothing to undo, ends compensated
    await commit_rest(store, begun)
    expected = [
        OpenSaga(p.saga_no, p.saga_id, PLAN.content_hash)
        for p in begun
        if p.state is SagaState.RUNNING
    ]
    assert len(expected) == 7
    pages, after_no = [], 0
    while page := await store.open_sagas(SagaState.RUNNING, after_no, 3):
        pages.append(page)
        after_no = page[-1].saga_no
    assert pages == [expected[:3], expected[3:6], expected[6:]]
    started = [p.transitions[0].summary for p in begun if p.state is SagaState.RUNNING]
    assert await store.oldest_open_ms() == min(row.started_at_ms for row in started if row)


async def test_lists_are_newest_first_and_in_pages(store: AnyStore) -> None:
    """Each page begins below the number that the one before ended with."""
    begun = await start(store, 5)
    numbers = sorted((played.saga_no for played in begun), reverse=True)
    first = await store.list_sagas(SagaFilter(), 3)
    second = await store.list_sagas(SagaFilter(), 3, before_no=first[-1].saga_no)
    assert [row.saga_no for row in (*first, *second)] == numbers


async def test_rows_show_the_saga(store: AnyStore) -> None:
    """A row has everything that its summary had, also after it has changed."""
    [played] = await start(store, labels={"tenant": "a", "größe": "XL"})
    assert await store.list_sagas(SagaFilter(), 1) == [played.transitions[0].summary]
    played.to_completion()
    await commit_rest(store, [played])
    last = played.transitions[-1].summary
    assert last is not None
    assert last.state is SagaState.COMPLETED
    assert await store.list_sagas(SagaFilter(), 1) == [last]


async def sample_rows(store: AnyStore) -> list[SagaSummary]:
    """Sagas of two definitions, three states, different starts and labels."""
    other = Plan(changed(1, name="refund"))
    await store.put_definition(other.definition, NOW_MS)
    await store.put_definition(ORDER, NOW_MS)
    tenants = ("a", "b")
    begun = [
        Played(
            store.next_saga_no(),
            plan=other if number % 4 == 0 else PLAN,
            at_ms=NOW_MS + number * 1000,
            labels={"tenant": tenants[number % 2], "n": str(number % 3)} if number % 5 else {},
        )
        for number in range(20)
    ]
    for played in begun[::3]:
        played.to_completion()
    for played in begun[1::3]:
        played.rejected()
    await store.commit([played.transitions[0] for played in begun])
    await commit_rest(store, begun)
    rows = []
    for played in reversed(begun):
        [last, *_] = [t.summary for t in reversed(played.transitions) if t.summary is not None]
        rows.append(last)
    return rows


FILTERS = {
    "all": SagaFilter(),
    "state": SagaFilter(states=(SagaState.COMPLETED,)),
    "states": SagaFilter(states=(SagaState.RUNNING, SagaState.COMPENSATED)),
    "states_twice": SagaFilter(states=(SagaState.RUNNING, SagaState.RUNNING)),
    "no_such_state": SagaFilter(states=(SagaState.MIXED,)),
    "definition": SagaFilter(definition_name="refund"),
    "unknown_definition": SagaFilter(definition_name="nothing"),
    "from": SagaFilter(started_from_ms=NOW_MS + 5005),
    "before": SagaFilter(started_before_ms=NOW_MS + 5005),
    "between": SagaFilter(started_from_ms=NOW_MS + 3000, started_before_ms=NOW_MS + 9000),
    "label": SagaFilter(labels={"tenant": "a"}),
    "labels": SagaFilter(labels={"tenant": "b", "n": "1"}),
    "unknown_label": SagaFilter(labels={"tenant": "c"}),
    "everything": SagaFilter(
        states=(SagaState.COMPLETED, SagaState.RUNNING),
        definition_name="order",
        started_from_ms=NOW_MS + 1000,
        started_before_ms=NOW_MS + 19_000,
        labels={"tenant": "a"},
    ),
}


@pytest.mark.parametrize("where", FILTERS.values(), ids=FILTERS.keys())
async def test_lists_by_filter(store: AnyStore, where: SagaFilter) -> None:
    """A list holds exactly the rows for which all conditions hold, in pages of any size."""
    rows = await sample_rows(store)
    expected = [
        row
        for row in rows
        if (not where.states or row.state in where.states)
        and (not where.definition_name or row.definition_name == where.definition_name)
        and row.started_at_ms >= where.started_from_ms
        and (not where.started_before_ms or row.started_at_ms < where.started_before_ms)
        and where.labels.items() <= row.labels.items()
    ]
    assert await store.list_sagas(where, 100) == expected
    paged: list[SagaSummary] = []
    while page := await store.list_sagas(where, 2, paged[-1].saga_no if paged else None):
        assert len(page) <= 2
        paged += page
    assert paged == expected


async def test_counts_by_state(store: AnyStore) -> None:
    """The counts are those of the rows; a state that none has is absent."""
    rows = await sample_rows(store)
    counts = await store.count_by_state()
    assert sum(counts.values()) == len(rows)
    assert counts[SagaState.COMPLETED] == sum(row.state is SagaState.COMPLETED for row in rows)
    assert SagaState.MIXED not in counts


# -- definitions -----------------------------------------------------------------------------------


def changed(number: int, name: str = "order") -> Definition:
    """Another content under a name."""
    retry = RetryPolicy(first_ms=100 + number)
    steps = (msgspec.structs.replace(ORDER.steps[0], retry=retry), *ORDER.steps[1:])
    return normalise(msgspec.structs.replace(ORDER, name=name, steps=steps))


async def test_contents_of_a_name_are_counted(store: AnyStore) -> None:
    """A new content is the next version of its name; every one is kept as it was registered."""
    first, existed = await store.put_definition(ORDER, NOW_MS)
    assert not existed
    assert first.version == 1
    assert first.registered_at_ms == NOW_MS
    assert first.definition == ORDER
    assert first.content_hash == content_hash(ORDER)
    second, existed = await store.put_definition(changed(1), NOW_MS + 1)
    assert not existed
    assert second.version == 2
    other, _ = await store.put_definition(changed(1, name="other"), NOW_MS + 2)
    assert other.version == 1
    assert await store.definitions() == [first, second, other]


async def test_the_same_content_again_is_a_no_op(store: AnyStore) -> None:
    """Registering what is the latest already changes nothing, not even its time."""
    first, _ = await store.put_definition(ORDER, NOW_MS)
    again, existed = await store.put_definition(ORDER, NOW_MS + 1)
    assert existed
    assert again == first
    assert await store.definitions() == [first]


async def test_an_older_content_registered_again_becomes_the_latest(place: Place) -> None:
    """So a definition is rolled back: the old version, by its number, is what new sagas get."""
    async with place.open() as store:
        first, _ = await store.put_definition(ORDER, NOW_MS)
        second, _ = await store.put_definition(changed(1), NOW_MS + 1)
        await store.put_definition(changed(1, name="other"), NOW_MS + 2)
        assert second.activated > first.activated
        back, existed = await store.put_definition(ORDER, NOW_MS + 3)
        assert existed
        assert (back.version, back.registered_at_ms) == (1, NOW_MS)
        assert latest(await store.definitions()) == back
    async with place.open() as store:
        assert latest(await store.definitions()) == back
        third, _ = await store.put_definition(changed(2), NOW_MS + 4)
        assert third.version == 3
        assert latest(await store.definitions()) == third


def latest(registered: list[RegisteredDefinition]) -> RegisteredDefinition:
    """What a new saga of ORDER's name gets."""
    of_name = [one for one in registered if one.definition.name == "order"]
    return max(of_name, key=lambda one: one.activated)


# -- participants ----------------------------------------------------------------------------------


async def test_participants_by_hand_are_kept_with_who_and_why(place: Place) -> None:
    """Added, moved, taken back: the last word counts, also after a restart, and all are audited."""
    async with place.open() as store:
        assert await store.participants() == []
        await store.put_participant("mail", "127.0.0.1:7001", BY)
        await store.put_participant("bank", "unix:/run/bank.sock", BY)
        moved = OperatorWords("bob", "it burns", NOW_MS + 1)
        await store.put_participant("mail", "127.0.0.1:7002", moved)
    expected = [
        ParticipantAddress("bank", "unix:/run/bank.sock", by_operator=True),
        ParticipantAddress("mail", "127.0.0.1:7002", by_operator=True),
    ]
    async with place.open() as store:
        assert await store.participants() == expected
        back = OperatorWords("ada", "it is mended", NOW_MS + 2)
        assert await store.remove_participant("mail", back)
        assert await store.participants() == expected[:1]
        assert await store.audit(10) == [
            AuditEntry("remove_participant", "mail", "was at 127.0.0.1:7002", back),
            AuditEntry("put_participant", "mail", "at 127.0.0.1:7002", moved),
            AuditEntry("put_participant", "bank", "at unix:/run/bank.sock", BY),
            AuditEntry("put_participant", "mail", "at 127.0.0.1:7001", BY),
        ]
        assert len(await store.audit(2)) == 2


async def test_a_participant_of_tls_stays_one_until_somebody_says_otherwise(place: Place) -> None:
    """Whether it is called with TLS is kept beside its address, also through a restart."""
    async with place.open() as store:
        await store.put_participant("mail", "127.0.0.1:7001", BY, tls=True)
        await store.put_participant("bank", "127.0.0.1:7002", BY)
    async with place.open() as store:
        assert [(one.name, one.tls) for one in await store.participants()] == [
            ("bank", False),
            ("mail", True),
        ]
        await store.put_participant("mail", "127.0.0.1:7001", BY)
        assert not any(one.tls for one in await store.participants())
        assert [entry.details for entry in await store.audit(9)] == [
            "at 127.0.0.1:7001",
            "at 127.0.0.1:7002",
            "at 127.0.0.1:7001, with TLS",
        ]


async def test_a_repeated_request_changes_no_participant(place: Place) -> None:
    """It was carried out: once more it is neither an act nor undoes what came after it."""
    put = OperatorWords("ada", "moved", NOW_MS, "r-1")
    remove = OperatorWords("ada", "moved back", NOW_MS + 1, "r-2")
    async with place.open() as store:
        await store.put_participant("mail", "127.0.0.1:7001", put)
        await store.put_participant("mail", "127.0.0.1:7001", put)
        assert len(await store.audit(9)) == 1
    async with place.open() as store:
        await store.put_participant("mail", "127.0.0.1:7002", BY)
        await store.put_participant("mail", "127.0.0.1:7001", put)
        assert [one.address for one in await store.participants()] == ["127.0.0.1:7002"]
        assert await store.remove_participant("mail", remove)
        assert await store.remove_participant("mail", remove)
        assert not await store.remove_participant("mail", OperatorWords("ada", "-", 1, "r-3"))
        await store.put_participant("bank", "127.0.0.1:7003", put)  # another participant's
        assert [entry.words for entry in await store.audit(9)] == [put, remove, BY, put]
        assert [one.name for one in await store.participants()] == ["bank"]


async def test_requests_without_an_id_are_all_carried_out(store: AnyStore) -> None:
    """Older clients send none."""
    await store.put_participant("mail", "127.0.0.1:7001", BY)
    await store.put_participant("mail", "127.0.0.1:7001", BY)
    assert len(await store.audit(9)) == 2


async def test_removing_what_nobody_registered_is_no_act(store: AnyStore) -> None:
    """It is told, and leaves no entry behind."""
    assert not await store.remove_participant("mail", BY)
    assert await store.audit(10) == []
