"""What the SQLite store does when it is killed, the disk refuses, or its log cannot be emptied."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.errors import (
    CommitUnknown,
    OwnershipLost,
    StoreError,
    StoreUnusable,
    UnreadableSaga,
)
from amends_runtime.ports import LoadedSaga, OperatorWords, SagaFilter
from amends_runtime.storage import (
    connection,
    open_sqlite_store,
    verify_read_model,
    write_ahead_log,
)
from amends_runtime.storage.connection import BUSY_TIMEOUT_S, pragma
from tests.storage.process import line, run, running
from tests.storage.samples import NOW_MS, ORDER, commit_rest, loaded, start
from tests.storage.sqlite_file import execute
from tests.storage.writer import GROUP


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the test's database is."""
    return tmp_path / "amends.db"


def can_trace() -> bool:
    """Whether system calls can be made to fail here."""
    strace = shutil.which("strace")
    if strace is None:
        return False
    tried = subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, check=False)
    return tried.returncode == 0


# -- kill -9 ---------------------------------------------------------------------------------------


async def test_a_killed_process_loses_nothing_that_it_acknowledged(path: Path) -> None:
    """Killed again and again in the middle of its commits.

    Every one that was acknowledged is there after each restart, none is there by half, and the read
    model fits the history.
    """
    acknowledged: dict[str, int] = {}
    for kill in range(1, 6):
        with running("writer", path, kill) as process:
            assert line(process) == f"ready {2 * kill - 1}"
            for _ in range(30 * kill):
                group, version = line(process).split()
                acknowledged[group] = int(version)
            process.kill()
            # What was acknowledged while we were not reading counts as well.
            assert process.stdout is not None
            for said in process.stdout.read().splitlines(keepends=True):
                if said.endswith("\n"):
                    group, version = said.split()
                    acknowledged[group] = int(version)
        stored = await stored_groups(path)
        for group, versions in stored.items():
            assert len(versions) == GROUP, f"a commit of {group} is there by half"
            assert len(set(versions)) == 1, f"a commit of {group} is there by half"
        assert acknowledged.items() <= {(g, v[0]) for g, v in stored.items()} | {
            (g, v[0] - 1) for g, v in stored.items()
        }, "an acknowledged commit is lost"
    assert len(acknowledged) >= 100


async def stored_groups(path: Path) -> dict[str, list[int]]:
    """The versions that a group's sagas are at."""
    groups = defaultdict(list)
    async with open_sqlite_store(path) as store:
        assert await verify_read_model(store) == []
        rows = await store.list_sagas(SagaFilter(), 1_000_000)
        for saga_id, saga in (await store.load([row.saga_id for row in rows])).items():
            assert isinstance(saga, LoadedSaga)
            groups[saga_id.rpartition(".")[0]].append(saga.version)
    return groups


# -- write errors ----------------------------------------------------------------------------------


async def test_a_commit_that_the_disk_refuses_is_unknown(path: Path) -> None:
    """After a failed write everything but reopening is refused.

    Once the disk takes writes again, so does the store, with all that it acknowledged, and with the
    failed batch whole or not at all.
    """
    done = run("full_disk", path, "lifted")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "may or may not have happened" in said["failed"]
    assert all("must be reopened" in refusal for refusal in said["refusals"])
    assert said["refusals"][2].startswith("CommitUnknown")
    assert said["reopening"] == ""
    await expect(path, said, after=["after"])


async def test_a_store_that_cannot_be_reopened_says_so(path: Path) -> None:
    """While the disk goes on refusing, so does the store; a later process finds it all."""
    done = run("full_disk", path, "kept")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["reopening"].startswith(f"StoreUnusable: {path} ")
    await expect(path, said, after=[])


@pytest.mark.skipif(not can_trace(), reason="needs strace and the right to trace")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_failed_system_call_never_loses_an_acknowledged_commit(
    path: Path, call: str, nth: int
) -> None:
    """EIO from the nth sync or write of the database or its log while a batch is committed."""
    done = run("one_fault", path, call, nth)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["fired"], "the fault did not fire"
    await expect(path, said, after=said["after"])


async def expect(path: Path, said: dict[str, list[str]], after: Sequence[str]) -> None:
    """All that was acknowledged is there, what is unknown is whole or not there."""
    async with open_sqlite_store(path) as store:
        assert not store.restored
        found = set(await store.load([*said["acknowledged"], *said["unknown"], *after]))
        assert found >= {*said["acknowledged"], *after}
        assert found & set(said["unknown"]) in (set(), set(said["unknown"]))
        assert await verify_read_model(store) == []
        assert store._file.writer is not None
        assert await pragma(store._file.writer, "integrity_check") == "ok"


# -- reopening -------------------------------------------------------------------------------------


async def test_reopening_finds_another_owner(path: Path) -> None:
    """A store that was taken over while it was failing is not written again."""
    async with open_sqlite_store(path) as store:
        await start(store)
        execute(path, "UPDATE meta SET epoch = epoch + 1")
        with pytest.raises(OwnershipLost, match="another one owns it now"):
            await store.reopen()
        with pytest.raises(CommitUnknown):
            await store.commit([])


async def test_reopening_finds_no_file(path: Path) -> None:
    """A database that was removed meanwhile is not begun anew under the runtime's feet."""
    async with open_sqlite_store(path) as store:
        await start(store)
        for each in path.parent.glob("amends.db*"):
            if each.suffix != ".lock":
                each.unlink()
        with pytest.raises(StoreUnusable, match="it was removed or replaced"):
            await store.reopen()


async def test_a_failed_registration_reopens_the_store_by_itself(path: Path) -> None:
    """Whoever registers a definition commits no turns, and must not leave them a failed store."""
    async with open_sqlite_store(path) as store:
        refund = msgspec.structs.replace(ORDER, name="refund")
        [played] = await start(store)
        assert store._file.writer is not None
        # A real failure of SQLite's: the table is gone for this one connection.
        await store._file.writer.execute("CREATE TEMP VIEW definitions AS SELECT 1")
        with pytest.raises(CommitUnknown):
            await store.put_definition(refund, NOW_MS)
        registered, existed = await store.put_definition(refund, NOW_MS)
        assert (registered.version, existed) == (1, False)
        await store.commit([played.done()])


async def test_a_failed_change_of_a_participant_reopens_the_store_by_itself(path: Path) -> None:
    """As a registration does; and nothing of the change is half done."""
    words = OperatorWords("ada", "test", NOW_MS)
    async with open_sqlite_store(path) as store:
        [played] = await start(store)
        assert store._file.writer is not None
        await store._file.writer.execute("CREATE TEMP VIEW audit AS SELECT 1")
        with pytest.raises(CommitUnknown):
            await store.put_participant("mail", "127.0.0.1:7001", words)
        assert await store.participants() == []
        await store.put_participant("mail", "127.0.0.1:7001", words)
        assert [one.name for one in await store.participants()] == ["mail"]
        await store.commit([played.done()])


async def test_a_failed_confirmation_reopens_the_store_by_itself(path: Path) -> None:
    """It is confirmed whole or not at all, and asking once more is safe."""
    words = OperatorWords("ada", "test", NOW_MS, "r-1")
    async with open_sqlite_store(path) as store:
        before = store.identity.incarnation
    path.with_name("amends.db.lock").unlink()
    async with open_sqlite_store(path) as store:
        assert store._file.writer is not None
        await store._file.writer.execute("CREATE TEMP VIEW audit AS SELECT 1 AS request_id")
        with pytest.raises(CommitUnknown):
            await store.confirm_restore(words)
        assert store.restored
        assert not store.believes(before)
        assert await store.confirm_restore(words)
        assert store.believes(before)


@pytest.mark.parametrize("what", ["participant", "definition"])
async def test_a_store_that_cannot_reopen_by_itself_says_so(path: Path, what: str) -> None:
    """To whoever waits for that: the caller of the write only learns that nobody knows."""
    lost: list[StoreError] = []

    async def wait_lost() -> None:
        with pytest.raises(StoreError) as error:
            await store.wait_lost()
        lost.append(error.value)

    async with open_sqlite_store(path) as store, anyio.create_task_group() as tasks:
        tasks.start_soon(wait_lost)
        await anyio.wait_all_tasks_blocked()
        assert store._file.writer is not None
        await store._file.writer.execute("CREATE TEMP VIEW audit AS SELECT 1")
        await store._file.writer.execute("CREATE TEMP VIEW definitions AS SELECT 1")
        for each in path.parent.glob("amends.db*"):
            if each.suffix != ".lock":
                each.unlink()
        words = OperatorWords("ada", "test", NOW_MS)
        refund = msgspec.structs.replace(ORDER, name="refund")
        write: Coroutine[Any, Any, object] = (
            store.put_participant("mail", "127.0.0.1:7001", words)
            if what == "participant"
            else store.put_definition(refund, NOW_MS)
        )
        with pytest.raises(CommitUnknown):
            await write
    assert "could not be reopened after a failed commit" in str(lost[0])


# -- the log ---------------------------------------------------------------------------------------


async def test_a_log_that_a_reader_held_is_cut_afterwards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long read lets the log grow and stops nobody; after it the log becomes small again."""
    limit = 256 * 1024
    monkeypatch.setattr(write_ahead_log, "MAX_WAL_BYTES", limit)
    async with open_sqlite_store(path) as store:
        assert store._file.writer is not None
        await pragma(store._file.writer, "busy_timeout = 0")
        [first] = await start(store)
        assert store._file.readers is not None
        async with store._file.readers.snapshot() as reader:
            await reader.execute_fetchall("SELECT count(*) FROM history")
            while store.wal_bytes < 4 * limit:
                await start(store, 100)
        while store.wal_bytes >= limit:
            await start(store, 100)
        assert (await loaded(store, first.saga_id)).version == 1


async def test_the_log_is_cut_where_nothing_tries_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long read the log is used from its beginning, and never grows to the next try."""
    pages = 16
    monkeypatch.setattr(connection, "CHECKPOINT_PAGES", pages)
    kept = connection.KEPT_CHECKPOINTS * pages * connection.PAGE_BYTES
    monkeypatch.setattr(write_ahead_log, "MAX_WAL_BYTES", 4 * kept)
    async with open_sqlite_store(path) as store:
        [first] = await start(store)
        other = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        with closing(other):
            other.execute("BEGIN")
            other.execute("SELECT count(*) FROM history").fetchall()
            while store.wal_bytes < 10 * kept:  # tried at 4 and at 8; the next would be at 12
                await start(store, 10)
        for _ in range(3):  # one checkpoints, one begins anew
            await start(store)
        assert store.wal_bytes <= kept
        assert (await loaded(store, first.saga_id)).version == 1


async def test_a_checkpoint_that_fails_leaves_the_patience_of_commits(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for whoever holds the file for a moment, as before."""
    monkeypatch.setattr(write_ahead_log, "MAX_WAL_BYTES", 1)

    async def fail(writer: object) -> bool:
        raise sqlite3.OperationalError("disk I/O error")

    async with open_sqlite_store(path) as store:
        monkeypatch.setattr(write_ahead_log, "checkpoint", fail)
        await start(store)
        assert store._file.writer is not None
        assert await pragma(store._file.writer, "busy_timeout") == BUSY_TIMEOUT_S * 1000
        monkeypatch.undo()


# -- damage ----------------------------------------------------------------------------------------


async def test_a_damaged_turn_is_named(path: Path) -> None:
    """Bytes that are no records any more: the saga and the version, and not a byte of them."""
    async with open_sqlite_store(path) as store:
        damaged, sound = await start(store, 2)
        await store.commit([damaged.done()])
    execute(path, "DROP TRIGGER history_is_append_only")
    execute(path, "UPDATE history SET records = x'93c4067365637265' WHERE version = 2")
    async with open_sqlite_store(path) as store:
        with pytest.raises(StoreError, match=f"saga {damaged.saga_id}, version 2: its records"):
            await store.load([damaged.saga_id])
        assert (await loaded(store, sound.saga_id)).version == 1
        with pytest.raises(UnreadableSaga, match=f"saga {damaged.saga_id}"):
            await store.load([damaged.saga_id, sound.saga_id])


async def test_a_saga_without_history_is_named(path: Path) -> None:
    """A row of the read model alone is no saga."""
    async with open_sqlite_store(path) as store:
        [played] = await start(store)
    execute(path, "DELETE FROM history")
    async with open_sqlite_store(path) as store:
        with pytest.raises(StoreError, match=f"saga {played.saga_id} is in the read model"):
            await store.load([played.saga_id])
        assert [one.saga_id for one in await store.open_sagas(SagaState.RUNNING, 0, 10)] == [
            played.saga_id
        ]
        assert store.next_saga_no() > played.saga_no


async def test_history_cannot_be_changed(path: Path) -> None:
    """Not even by somebody with a shell, as long as they do not mean to."""
    async with open_sqlite_store(path) as store:
        await start(store)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        execute(path, "UPDATE history SET version = 7")
    assert "history is append-only" in caught.value.stderr


async def test_numbers_of_purged_sagas_are_not_used_again(path: Path) -> None:
    """Whatever is purged, positions and numbers go on above the floors that the purge leaves."""
    async with open_sqlite_store(path) as store:
        await start(store, 3)
    execute(path, "DELETE FROM history")
    execute(path, "DELETE FROM sagas")
    execute(path, "UPDATE meta SET seq_floor = 3, saga_no_floor = 3")
    async with open_sqlite_store(path) as store:
        [played] = await start(store, saga_id="again")
        assert played.saga_no == 4
        assert (await loaded(store, "again")).turns[0].seq == 4


async def test_readers_do_not_wait_for_a_commit(path: Path) -> None:
    """Reads go on while the writer is busy, and see what was committed before."""
    async with open_sqlite_store(path) as store:
        begun = await start(store, 500)
        async with anyio.create_task_group() as group:
            for _ in range(10):
                turns = [played.done() for played in begun if played.calls]
                group.start_soon(store.count_by_state)
                if turns:
                    await store.commit(turns)
        await commit_rest(store, begun, after_version=4)
        assert await store.count_by_state() == {SagaState.COMPLETED: 500}
