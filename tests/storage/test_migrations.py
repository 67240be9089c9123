"""Migrations: one transaction each, so that whatever happens a whole version is there."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from amends_runtime.core.records import SagaState
from amends_runtime.errors import StoreUnusable
from amends_runtime.ports import OperatorWords, Tombstone
from amends_runtime.storage import SqliteStore, migrations, open_sqlite_store
from amends_runtime.storage.queries import read_script
from tests.storage.samples import NOW_MS, loaded, start
from tests.storage.sqlite_file import execute

SECOND = "ALTER TABLE sagas ADD COLUMN owner INTEGER NOT NULL DEFAULT 0;"
BROKEN = "CREATE TABLE half_done (a INTEGER); SELECT no_such_function();"


def next_release(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """As if the program had one migration more."""
    name = "9999_next.sql"

    def read(engine: str, asked: str) -> str:
        return script if asked == f"migrations/{name}" else read_script(engine, asked)

    monkeypatch.setattr(migrations, "read_script", read)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, name))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", migrations.SCHEMA_VERSION + 1)


async def test_an_older_file_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays; a file that is new goes through all versions as well."""
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    async with open_sqlite_store(old) as store:
        [played] = await start(store)
    next_release(monkeypatch, SECOND)
    for path in (old, new):
        async with open_sqlite_store(path) as store:
            if path is old:
                assert (await loaded(store, played.saga_id)).version == 1
        assert execute(path, "PRAGMA user_version") == [[migrations.SCHEMA_VERSION]]
        assert execute(path, "SELECT count(*) FROM sagas WHERE owner = 0") == [[int(path is old)]]


async def test_an_older_program_refuses_the_newer_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back needs a backup, and the error says so."""
    path = tmp_path / "amends.db"
    with monkeypatch.context() as release:
        next_release(release, SECOND)
        async with open_sqlite_store(path):
            pass
    known = migrations.SCHEMA_VERSION
    words = rf"has schema version {known + 1}, and this program knows .* {known}:"
    with pytest.raises(StoreUnusable, match=words):
        await SqliteStore.open(path)


async def test_a_failing_migration_leaves_the_version_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it remains, and the older program goes on."""
    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        [played] = await start(store)
    with monkeypatch.context() as release:
        next_release(release, BROKEN)
        with pytest.raises(StoreUnusable, match="no_such_function") as caught:
            await SqliteStore.open(path)
        assert isinstance(caught.value.__cause__, sqlite3.Error)
    assert execute(path, "SELECT count(*) FROM sqlite_schema WHERE name = 'half_done'") == [[0]]
    async with open_sqlite_store(path) as store:
        assert (await loaded(store, played.saga_id)).version == 1


# -- those that have been released -----------------------------------------------------------------


def make_file(path: Path, version: int, rows: str) -> None:
    """A file as a program of that schema version left it."""
    scripts = (
        read_script("sqlite", f"migrations/{name}") for name in migrations.MIGRATIONS[:version]
    )
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("\n".join(scripts))
        connection.executescript(rows)
        connection.execute(f"PRAGMA application_id = {migrations.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")


RESTORED = """
INSERT INTO meta (only_row, store_id, incarnation, restored, epoch, created_at_ms)
VALUES (1, 's', 'i', 1, 3, 1);
INSERT INTO tombstones VALUES ('gone', 'c', 4, 7);
"""


async def test_a_file_of_the_time_before_two_phase_commits(tmp_path: Path) -> None:
    """Its tombstones are of sagas, and its restore can be confirmed: it had no votes to answer for.

    What it was before that restore it did not keep.
    """
    path = tmp_path / "amends.db"
    make_file(path, 4, RESTORED)
    note = '{"pid": 1, "store_id": "s", "incarnation": "i", "epoch": 3}'
    path.with_name("amends.db.lock").write_text(note)
    async with open_sqlite_store(path) as store:
        gone = Tombstone("gone", "c", SagaState.COMPLETED, 7)
        assert await store.load(["gone"]) == {"gone": gone}
        assert (gone.decision, gone.round) == (None, 0)
        assert (store.identity.incarnation, store.restored) == ("i", True)
        assert await store.confirm_restore(OperatorWords("ada", "looked at it", NOW_MS))
        assert not store.restored
        [entry] = await store.audit(9)
        assert entry.details == "with what it knows of nothing"
