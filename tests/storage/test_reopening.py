"""Rule 7: after a failed commit nothing is believed that was not checkpointed to the disk."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from amends_runtime.errors import CommitUnknown
from amends_runtime.storage import open_sqlite_store
from tests.storage.samples import loaded, start

_HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT * FROM meta").fetchall()
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """Another process has the database open and reads nothing.

    So the log outlives our own connections: SQLite would empty it when the last one is closed.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        yield
        assert holder.stdin is not None
        holder.stdin.close()


async def test_what_a_reopened_store_shows_was_checkpointed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is emptied into the database, and synced, before anything is read again."""
    execute = aiosqlite.Connection.execute_fetchall

    async def fails(connection: aiosqlite.Connection, *arguments: Any) -> None:
        await execute(connection, *arguments)
        raise sqlite3.OperationalError("disk I/O error")

    path = tmp_path / "amends.db"
    async with open_sqlite_store(path) as store:
        [saga] = await start(store)
        with held_open(path):
            monkeypatch.setattr(aiosqlite.Connection, "execute_fetchall", fails)
            with pytest.raises(CommitUnknown):
                await store.commit([saga.done()])
            monkeypatch.undo()
            assert store.wal_bytes > 0
            await store.reopen()
            assert store.wal_bytes == 0
            assert (await loaded(store, saga.saga_id)).version == 2
