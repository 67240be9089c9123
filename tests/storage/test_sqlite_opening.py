"""Opening a SQLite store: what is refused and how, who owns it, what it is set to."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from amends_runtime.errors import StoreError, StoreInUse, StoreUnusable
from amends_runtime.ports import OperatorWords
from amends_runtime.storage import SqliteStore, connection, identity, open_sqlite_store
from amends_runtime.storage.connection import pragma
from amends_runtime.storage.migrations import SCHEMA_VERSION
from amends_runtime.storage.ownership import filesystem_of
from tests.storage.process import ENDS_WITHIN_S, line, run, running
from tests.storage.samples import NOW_MS, start
from tests.storage.sqlite_file import execute

NOBODY = 65534  # a user without rights on any system


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the test's database is."""
    return tmp_path / "amends.db"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are the tester's alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


# -- what is refused -------------------------------------------------------------------------------


async def newer_schema(path: Path) -> None:
    """A database of a later version of amends."""
    async with open_sqlite_store(path):
        pass
    execute(path, f"PRAGMA user_version = {SCHEMA_VERSION + 7}")


async def another_application(path: Path) -> None:
    """A database with somebody's tables."""
    execute(path, "CREATE TABLE invoices (amount INTEGER)")


async def another_application_without_tables(path: Path) -> None:
    """A database that somebody has claimed."""
    execute(path, "PRAGMA application_id = 77")


async def no_database(path: Path) -> None:
    """A file of another kind."""
    path.write_bytes(b"Dear diary, " * 1000)


async def cut_short(path: Path) -> None:
    """A database whose end is missing."""
    async with open_sqlite_store(path) as store:
        await start(store)
    os.truncate(path, 5000)


async def folder(path: Path) -> None:
    """A folder."""
    path.mkdir()


async def loop_of_links(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path)


async def two_names(path: Path) -> None:
    """A database with a second name."""
    async with open_sqlite_store(path):
        pass
    path.with_name("other.db").hardlink_to(path)


REFUSED: dict[Callable[[Path], Awaitable[None]], str] = {
    newer_schema: r"has schema version \d+, and this program knows versions up to \d+:",
    another_application: r"is another application's database: give the path of a new file",
    another_application_without_tables: r"is another application's database",
    no_database: r"is not a SQLite database: give another path",
    cut_short: r"is damaged: restore a backup",
    folder: r"is a folder: give the path of a file inside it",
    loop_of_links: r"cannot be opened: ",
    two_names: r"has 2 names \(hard links\).*copy it instead, or remove the other name "
    r"\(find DIR -samefile .*amends\.db shows it\)",
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
async def test_what_is_no_store_of_ours_is_refused(
    path: Path, prepare: Callable[[Path], Awaitable[None]]
) -> None:
    """One line that says what is there and what to do; all files stay as they were."""
    await prepare(path)
    before = {each.name: content(each) for each in path.parent.iterdir()}
    with pytest.raises(StoreUnusable, match=REFUSED[prepare]) as caught:
        await SqliteStore.open(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert {each.name: content(each) for each in path.parent.iterdir()} == before


def content(path: Path) -> bytes | None:
    """A file's bytes."""
    return path.read_bytes() if path.is_file() else None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing/amends.db", "its folder .*missing does not exist; make it first"),
        ("file/amends.db", "cannot be opened: its folder .*file does not exist|is not a folder"),
        ("/dev/null", "is not a file: give the path of a file"),
        ("/proc/amends.db", r"its lock file amends.db.lock cannot be written \(.*\)"),
        ("nul\0byte", "cannot be opened: "),
    ],
)
async def test_places_where_no_database_can_be(tmp_path: Path, given: str, said: str) -> None:
    """A wrong path is named with what is wrong with it."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match=said) as caught:
        await SqliteStore.open(tmp_path / given)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["folder", "file"])
async def test_what_may_not_be_written_is_refused(open_folder: Path, what: str) -> None:
    """A read-only folder or file is named at the opening, not at the first commit."""
    path = open_folder / "amends.db"
    async with open_sqlite_store(path):
        pass
    lock = path.with_name("amends.db.lock")
    path.chmod(0o444 if what == "file" else 0o666)
    lock.chmod(0o666)
    if what == "folder":
        lock.unlink()
        open_folder.chmod(0o555)
    user = NOBODY if os.getuid() == 0 else ""
    done = run("opener", path, "close", user)
    open_folder.chmod(0o777)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"StoreUnusable {path}")
    assert "writable" in done.stdout
    assert done.stdout.count("\n") == 1


async def test_a_network_file_system_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the table of mounts says NFS, the store does not open."""
    mounts = path.with_name("mountinfo")
    mounts.write_text(f"36 25 0:31 / {path.parent} rw,relatime - nfs4 server:/export rw\n")
    monkeypatch.setattr("amends_runtime.storage.ownership.MOUNTS", mounts)
    with pytest.raises(StoreUnusable, match=r"network file system \(nfs4\).*use a local disk"):
        await SqliteStore.open(path)


def test_file_systems_by_the_table_of_mounts() -> None:
    """The deepest mount counts, of two on one place the later, and names may hold spaces."""
    mounts = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:40 / /data rw - nfs server:/data rw\n"
        "31 30 0:41 / /data/my\\040disk rw master:2 - xfs /dev/sdb rw\n"
        "32 22 0:42 / /mnt rw - nfs4 server:/mnt rw\n"
        "33 22 0:43 / /mnt rw - tmpfs tmpfs rw\n"
        "nonsense\n"
    )
    assert filesystem_of(Path("/home/a.db"), mounts) == "ext4"
    assert filesystem_of(Path("/data/a.db"), mounts) == "nfs"
    assert filesystem_of(Path("/database/a.db"), mounts) == "ext4"
    assert filesystem_of(Path("/data/my disk/a.db"), mounts) == "xfs"
    assert filesystem_of(Path("/mnt/a.db"), mounts) == "tmpfs"
    assert filesystem_of(Path("/a.db"), "") == ""


async def test_a_file_that_another_program_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell with an open transaction is waited for a while and then named; nothing hangs."""
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", 0.05)
    async with open_sqlite_store(path):
        pass
    other = sqlite3.connect(
        path, isolation_level=None
    )  # closed before anything else opens the file
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnusable, match="is in use by another program that has it open"):
            await SqliteStore.open(path)
    finally:
        other.close()
    async with open_sqlite_store(path) as store:
        assert store.identity.epoch == 2


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    """A file without content, as some tools make them in advance, is as good as none."""
    path.touch()
    async with open_sqlite_store(path) as store:
        assert store.identity.epoch == 1
        assert not store.restored


@pytest.mark.parametrize(
    "name", ["with space.db", "100%.db", "a?mode=ro&x#y.db", "größe.db", ":memory:"]
)
async def test_any_file_name(tmp_path: Path, name: str) -> None:
    """A file's name is a name and nothing else, whatever it looks like to SQLite."""
    async with open_sqlite_store(tmp_path / name):
        pass
    assert {each.name for each in tmp_path.iterdir()} == {name, f"{name}.lock"}


# -- who owns it -----------------------------------------------------------------------------------


async def test_a_second_process_is_refused(path: Path) -> None:
    """It is told which file, which process holds it, and what to do; afterwards it may have it."""
    async with open_sqlite_store(path):
        done = run("opener", path, "close")
        assert done.returncode == 3
        assert done.stdout.startswith(f"StoreInUse {path} is in use: process {os.getpid()} holds")
    assert run("opener", path, "close").stdout == "open 2\n"


async def test_a_second_store_in_one_process_is_refused(path: Path, tmp_path: Path) -> None:
    """Under any of the file's names."""
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with open_sqlite_store(path):
        for name in (path, link, tmp_path / "." / "amends.db"):
            with pytest.raises(StoreInUse, match=f"process {os.getpid()}"):
                await SqliteStore.open(name)
    async with open_sqlite_store(link) as store:
        assert store.identity.epoch == 2


async def test_the_lock_of_a_killed_owner_is_free(path: Path) -> None:
    """A lock dies with its process; what it left behind is in nobody's way."""
    with running("opener", path, "hang") as process:
        assert line(process) == "open 1"
        with pytest.raises(StoreInUse, match=f"process {process.pid} holds"):
            await SqliteStore.open(path)
        process.kill()
        process.wait()
        async with open_sqlite_store(path) as store:
            assert store.identity.epoch == 2
            assert not store.restored


@pytest.mark.parametrize("what", ["close", "raise", "hang"])
def test_the_process_ends(path: Path, what: str) -> None:
    """However it ends: at once, by an error inside the block, by Ctrl-C. No thread keeps it."""
    with running("opener", path, what) as process:
        assert line(process) == "open 1"
        if what == "hang":
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=ENDS_WITHIN_S)
    assert (process.returncode == 0) == (what == "close")
    assert not path.with_name("amends.db-wal").exists()


# -- restored --------------------------------------------------------------------------------------


async def test_a_restored_file_says_so(path: Path) -> None:
    """A copy of an earlier day: a new incarnation, an epoch above both, and the mark stays."""
    async with open_sqlite_store(path) as store:
        await start(store)
        original = store.identity
    copy = path.with_name("backup")
    shutil.copy(path, copy)
    async with open_sqlite_store(path) as store:
        assert not store.restored
        later = store.identity
    copy.replace(path)
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.store_id == original.store_id
        assert store.identity.incarnation != original.incarnation
        assert store.identity.epoch > later.epoch
        restored = store.identity
    async with open_sqlite_store(path) as store:
        assert store.restored, "until an operator confirms"
        assert store.identity.incarnation == restored.incarnation


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
async def test_a_backup_of_the_last_opening_counts_as_restored(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,  # noqa: FBT001
) -> None:
    """A runtime may run for months: its nightly backups are all of one epoch, and are noticed.

    The lock file knows of turns that the backup has not got; after a crash, but for the last ones.
    """
    monkeypatch.setattr(identity, "NOTE_EVERY_S", 0.0 if killed else 1e9)
    backup, note = path.with_name("backup"), path.with_name("amends.db.lock")
    async with open_sqlite_store(path) as store:
        [saga] = await start(store)
        execute(path, "VACUUM INTO ?", str(backup))
        await store.commit([saga.done()])
        original, noted = store.identity, note.read_bytes()
    if killed:
        note.write_bytes(noted)
    backup.replace(path)
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.incarnation != original.incarnation
        assert store.identity.epoch > original.epoch


async def test_what_was_open_here_is_one_of_its_earlier_selves(path: Path) -> None:
    """Restored twice from one backup, the second knows of the first by its lock file alone."""
    words = OperatorWords("ada", "looked at it", NOW_MS)
    copy = path.with_name("backup")
    async with open_sqlite_store(path) as store:
        original = store.identity.incarnation
    shutil.copy(path, copy)
    async with open_sqlite_store(path):
        pass
    shutil.copy(copy, path)
    async with open_sqlite_store(path) as store:
        first = store.identity.incarnation
        await store.confirm_restore(words)
        assert [store.believes(one) for one in (original, first)] == [True, True]
    shutil.copy(copy, path)
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.incarnation not in (original, first)
        assert [store.believes(one) for one in (original, first)] == [False, False]
        await store.confirm_restore(words)
        assert [store.believes(one) for one in (original, first)] == [True, True]


async def test_another_stores_incarnation_is_not_believed(path: Path) -> None:
    """It stood here before, and has nothing to do with the one that is here now."""
    async with open_sqlite_store(path) as store:
        there = store.identity.incarnation
    other = path.with_name("other.db")
    async with open_sqlite_store(other) as store:
        here = store.identity.incarnation
    other.replace(path)
    async with open_sqlite_store(path) as store:
        assert await store.confirm_restore(OperatorWords("ada", "it is meant", NOW_MS))
        assert [store.believes(one) for one in (here, there)] == [True, False]


async def test_a_file_without_its_lock_file_counts_as_restored(path: Path) -> None:
    """Nothing tells it from a copy of an earlier day."""
    async with open_sqlite_store(path) as store:
        incarnation = store.identity.incarnation
    path.with_name("amends.db.lock").unlink()
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.incarnation != incarnation


@pytest.mark.parametrize("quiet", [False, True], ids=["noted by a commit", "noted in time"])
async def test_the_last_commit_before_a_quiet_night_is_noted(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: bool,  # noqa: FBT001
) -> None:
    """No other commit follows it, and then the power fails: a backup from before it is noticed."""
    monkeypatch.setattr(identity, "NOTE_EVERY_S", 0.0)
    backup, note = path.with_name("backup"), path.with_name("amends.db.lock")
    async with open_sqlite_store(path) as store, anyio.create_task_group() as tasks:
        [saga] = await start(store)
        execute(path, "VACUUM INTO ?", str(backup))
        if quiet:
            store._note.due_s = time.monotonic() + 0.2  # it was noted not long ago
        tasks.start_soon(store.keep_noted)
        await store.commit([saga.done()])
        with anyio.fail_after(30):
            while b'"seq":2' not in (noted := note.read_bytes()):  # noqa: ASYNC110
                await anyio.sleep(0.001)  # a file has no event to wait for
        tasks.cancel_scope.cancel()
    note.write_bytes(noted)
    backup.replace(path)
    async with open_sqlite_store(path) as store:
        assert store.restored


async def test_a_folder_that_was_put_back_counts_as_restored_if_somebody_says_so(
    path: Path,
) -> None:
    """Its lock file came back with it, and tells nothing. Said once, it lasts until a confirmation.

    What was told since the backup was told by the same incarnation, which is believed only then.
    """
    async with open_sqlite_store(path) as store:
        [saga] = await start(store)
        original = store.identity
    async with open_sqlite_store(path, restored=True) as store:
        assert store.restored
        assert store.unconfirmed_through_no == saga.saga_no
        assert store.identity.store_id == original.store_id
        assert store.identity.incarnation != original.incarnation
        assert not store.believes(original.incarnation)
        said = store.identity.incarnation
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.incarnation == said
        await store.confirm_restore(OperatorWords("ada", "compared", NOW_MS))
        assert store.believes(original.incarnation)


async def test_what_is_not_there_was_not_restored(path: Path) -> None:
    """Somebody has mistyped the path: no new database must take its place."""
    with pytest.raises(StoreUnusable, match="does not exist"):
        await SqliteStore.open(path, restored=True)
    assert list(path.parent.iterdir()) == []


async def test_another_store_in_its_place_counts_as_restored(path: Path) -> None:
    """The lock file knows the one that was there."""
    async with open_sqlite_store(path) as store:
        there = store.identity
    other = path.with_name("other.db")
    async with open_sqlite_store(other) as store:
        here = store.identity
    other.replace(path)
    async with open_sqlite_store(path) as store:
        assert store.restored
        assert store.identity.store_id == here.store_id != there.store_id


# -- settings --------------------------------------------------------------------------------------


async def test_settings(path: Path) -> None:
    """Every commit is synced, readers cannot write, and SQLite does what the rest relies on."""
    async with open_sqlite_store(path) as store:
        writer, readers = store._file.writer, store._file.readers
        assert writer is not None
        assert readers is not None
        assert await pragma(writer, "journal_mode") == "wal"
        assert await pragma(writer, "synchronous") == 2
        assert await pragma(writer, "foreign_keys") == 1
        assert await pragma(writer, "integrity_check") == "ok"
        async with readers.one() as reader:
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                await reader.execute("DELETE FROM history")


async def test_a_failed_opening_leaves_nothing_open(path: Path) -> None:
    """The file can be mended and opened by the same process."""
    await newer_schema(path)
    with pytest.raises(StoreError):
        await SqliteStore.open(path)
    assert not connection.is_open_here(path)
    execute(path, f"PRAGMA user_version = {SCHEMA_VERSION}")
    async with open_sqlite_store(path) as store:
        assert connection.is_open_here(path)
        await start(store)
    assert not connection.is_open_here(path)


# -- a first opening that was cut short ------------------------------------------------------------


async def test_a_first_opening_that_was_killed_is_begun_again(path: Path) -> None:
    """An empty lock file, a schema, ids without an epoch: none of it is a restore."""
    path.with_name("amends.db.lock").touch()
    async with open_sqlite_store(path) as store:
        assert not store.restored
    execute(path, "DELETE FROM meta")
    async with open_sqlite_store(path) as store:
        assert (store.restored, store.identity.epoch) == (False, 1)
        made = store.identity
    execute(path, "UPDATE meta SET epoch = 0")
    note = path.with_name("amends.db.lock")
    note.write_text(note.read_text().replace('"epoch":1', '"epoch":0'))
    async with open_sqlite_store(path) as store:
        assert (store.restored, store.identity) == (False, made)


async def test_sagas_without_an_identity_are_refused(path: Path) -> None:
    """A new id would make every participant's barrier forget what it knows of these sagas."""
    async with open_sqlite_store(path) as store:
        await start(store)
    execute(path, "DELETE FROM meta")
    with pytest.raises(StoreUnusable, match="does not say which store it is: restore a backup"):
        await SqliteStore.open(path)


async def test_an_opening_that_fails_late_is_no_restore(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lock file says by then stays."""

    async def failing(path: Path) -> None:
        raise sqlite3.OperationalError("too many open files")

    with monkeypatch.context() as late:
        late.setattr(connection.Readers, "open", failing)
        with pytest.raises(StoreUnusable, match="too many open files"):
            await SqliteStore.open(path)
    async with open_sqlite_store(path) as store:
        assert not store.restored
