"""Connections to one SQLite file: one writer, a few readers, each with the settings it must have.

The writer is also the only checkpointer: SQLite up to 3.51.2 can corrupt the file when two
connections write or checkpoint at once. Nothing here opens the database, its `-wal` or its `-shm`
by other means than SQLite's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiosqlite
import anyio

from amends_runtime.errors import StoreError, StoreUnusable

__all__ = [
    "Readers",
    "checkpoint",
    "close",
    "configure_writer",
    "explained",
    "is_open_here",
    "named",
    "open_writer",
    "pragma",
    "to_the_end",
]

T = TypeVar("T")

OLDEST_SQLITE = (3, 38)  # STRICT tables, RETURNING, the ->> operator

BUSY_TIMEOUT_S = 5.0  # somebody looks into the file with a shell; a runtime never gets this far
PAGE_BYTES = 4096  # the file system's block: a commit writes whole pages, and most touch few rows
CACHE_KIB = 16 * 1024  # the hot ends of tables and indexes, however large the file
CHECKPOINT_PAGES = 4000  # 16 MiB of log: then one commit waits some 10 ms for a checkpoint
KEPT_CHECKPOINTS = 2  # of log, when it begins anew: one of its usual size is never cut
READERS = 2  # reads are short, and each reader is a thread
STATEMENTS = 256  # prepared ones kept by a connection; there are fewer


async def open_writer(path: Path) -> aiosqlite.Connection:
    """The connection that writes. Raises sqlite3.Error; see `explained`."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise StoreUnusable(
            f"this Python has SQLite {sqlite3.sqlite_version}, and amends needs"
            f" {'.'.join(map(str, OLDEST_SQLITE))} or newer: use a newer Python"
        )
    return await _connect(path, "rwc")


async def configure_writer(connection: aiosqlite.Connection, path: Path) -> None:
    """Settings of the writer, those that durability rests on read back.

    Changes the file to WAL mode.
    """
    await pragma(connection, f"page_size = {PAGE_BYTES}")  # counts only for a new file
    mode = await pragma(connection, "journal_mode = WAL")
    await pragma(connection, "synchronous = FULL")
    await pragma(connection, "fullfsync = ON")  # on macOS a plain fsync stops at the disk's cache
    await pragma(connection, "checkpoint_fullfsync = ON")
    await pragma(connection, "foreign_keys = ON")
    await pragma(connection, "mmap_size = 0")  # an I/O error through a mapping would be a signal
    await pragma(connection, "temp_store = MEMORY")
    await pragma(connection, "trusted_schema = OFF")
    await pragma(connection, "cell_size_check = ON")
    await pragma(connection, f"cache_size = -{CACHE_KIB}")
    await pragma(connection, f"wal_autocheckpoint = {CHECKPOINT_PAGES}")
    # Once a reader has let go, the commit that begins the log anew cuts what has grown meanwhile.
    kept_bytes = KEPT_CHECKPOINTS * CHECKPOINT_PAGES * PAGE_BYTES
    await pragma(connection, f"journal_size_limit = {kept_bytes}")
    full = 2
    if (
        mode != "wal"
        or await pragma(connection, "synchronous") != full
        or await pragma(connection, "foreign_keys") != 1
    ):
        raise StoreUnusable(
            f"{path}: SQLite refuses the settings that durability needs (journal mode {mode}):"
            " use a local disk"
        )


async def pragma(connection: aiosqlite.Connection, text: str) -> object:
    """Sets or reads a pragma; the answer is its first value, if it has one."""
    rows = list(await connection.execute_fetchall(f"PRAGMA {text}"))
    return rows[0][0] if rows else None


async def checkpoint(connection: aiosqlite.Connection) -> bool:
    """Brings all of the log into the database, synced, and empties it.

    False: a reader is in the way.
    """
    rows = list(await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)"))
    return bool(rows) and rows[0][0] == 0


async def close(connection: aiosqlite.Connection) -> None:
    """Closes a connection and ends its thread, also if closing fails."""
    with anyio.CancelScope(shield=True):
        await connection.close()


def is_open_here(path: Path) -> bool:
    """Whether this process still has the file or its log open.

    Only Linux says so; elsewhere False.
    """
    try:
        descriptors = list(Path("/proc/self/fd").iterdir())
    except OSError:
        return False
    names = {str(path), f"{path}-wal", f"{path}-shm"}
    for descriptor in descriptors:
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.removesuffix(" (deleted)") in names:
            return True
    return False


async def to_the_end(work: Awaitable[T]) -> T:
    """Awaits `work` to its end; a cancelled caller gets its cancellation after that.

    A shielded scope holds off anyio's cancellation but not asyncio's own, with which gRPC ends a
    handler whose client left.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        task.exception()  # is seen by nobody any more, and must not be reported as forgotten
        raise cancelled
    return task.result()


def named(error: BaseException) -> str:
    """An error in a few words, by SQLite's name for it where it has one."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return f"{name}: {error}"


def explained(path: Path, error: Exception) -> StoreError:
    """One clear line for what SQLite says when a file cannot be opened."""
    if isinstance(error, StoreError):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    reason = _REASONS.get(code)
    if reason is None:
        return StoreUnusable(f"{path} cannot be opened: {error} ({name})")
    return StoreUnusable(f"{path} {reason} ({name})")


_REASONS = {
    sqlite3.SQLITE_BUSY: "is in use by another program that has it open: close that first",
    sqlite3.SQLITE_CANTOPEN: (
        "cannot be opened: the file and its folder must be readable and writable for this user"
    ),
    sqlite3.SQLITE_CORRUPT: "is damaged: restore a backup",
    sqlite3.SQLITE_FULL: "cannot be written: the disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk reports an error",
    sqlite3.SQLITE_NOTADB: "is not a SQLite database: give another path",
    sqlite3.SQLITE_PERM: "cannot be opened: this user may not",
    sqlite3.SQLITE_READONLY: (
        "is read-only: the file and its folder must be writable for this user"
    ),
}


class Readers:
    """A few connections that cannot write; each read has one for itself, and is short."""

    def __init__(self, connections: list[aiosqlite.Connection]) -> None:
        self._all = connections
        self._free = list(connections)
        self._slots = anyio.Semaphore(len(connections), fast_acquire=True)

    @classmethod
    async def open(cls, path: Path) -> Readers:
        """Opens them. The writer must be there already, because a reader cannot make the log."""
        connections: list[aiosqlite.Connection] = []
        try:
            for _ in range(READERS):
                connection = await _connect(path, "ro")
                connections.append(connection)
                await pragma(connection, "query_only = ON")
                await pragma(connection, "mmap_size = 0")
                await pragma(connection, "trusted_schema = OFF")
        except BaseException:
            for connection in connections:
                await close(connection)
            raise
        return cls(connections)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[aiosqlite.Connection]:
        """A connection for one statement, or for what lies in one `snapshot`."""
        async with self._slots:
            connection = self._free.pop()
            try:
                yield connection
            finally:
                self._free.append(connection)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[aiosqlite.Connection]:
        """A connection on which all statements see the same state.

        Short: the log grows meanwhile.
        """
        async with self.one() as connection:
            try:
                await connection.execute_fetchall("BEGIN")
                yield connection
            finally:
                # Without a transaction, for example after a failed BEGIN, there is nothing to end.
                with anyio.CancelScope(shield=True), contextlib.suppress(sqlite3.OperationalError):
                    await connection.execute_fetchall("ROLLBACK")

    async def close(self) -> None:
        """Waits for the reads that are under way, and closes all."""
        for _ in self._all:
            await self._slots.acquire()
        for connection in self._all:
            await close(connection)


async def _connect(path: Path, mode: str) -> aiosqlite.Connection:
    return await aiosqlite.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,  # no transaction begins but by our own words
        cached_statements=STATEMENTS,
    )
