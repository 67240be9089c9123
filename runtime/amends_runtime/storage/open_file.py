"""An open database file: its connections, and whether what they say can be believed.

A write that failed may have happened, and after a failed sync what the file shows may not be on
the disk. So from then on everything is refused, reads too, until the file was closed and opened
anew. Writing and reading both ask here first; which failure is one of those, and how the file is
opened, is `sqlite.py`'s to say.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import structlog

from amends_runtime.errors import CommitUnknown, StoreError
from amends_runtime.storage.connection import (
    Readers,
    close,
    is_open_here,
    named,
    open_writer,
)
from amends_runtime.storage.queries import read_queries

__all__ = ["OpenFile"]

_log = structlog.get_logger(__name__)

_SQL = read_queries("sqlite")


class OpenFile:
    """One file, by its real path. It is opened by `open_writer`, then `open_readers`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: aiosqlite.Connection | None = None
        self.readers: Readers | None = None
        self.failed = ""
        """Why nothing is to be believed until it was opened anew; empty: it is."""
        self.closed = False
        """Closed for good."""

    @property
    def size_bytes(self) -> int:
        """The size of the database file, which is never opened to learn it."""
        try:
            return os.stat(self.path).st_size  # noqa: PTH116  # as in `write_ahead_log`
        except FileNotFoundError:
            return 0

    async def open_writer(self) -> aiosqlite.Connection:
        """The connection that writes. Raises sqlite3.Error; see `connection.explained`."""
        writer = self.writer = await open_writer(self.path)
        return writer

    async def open_readers(self) -> None:
        """Those that read, once the file is what it is to be."""
        self.readers = await Readers.open(self.path)

    def usable_writer(self) -> aiosqlite.Connection:
        """The connection that writes, where it may. Raises CommitUnknown or StoreError."""
        if self.failed and not self.closed:
            # Of this commit nothing is written, but whoever commits is the one who must reopen.
            raise CommitUnknown(f"{self.path}: {self.failed}; the store must be reopened first")
        if self.writer is None:
            raise self.not_usable()
        return self.writer

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Readers]:
        """The connections that read, where they may. Raises StoreError."""
        if self.readers is None or self.failed:
            raise self.not_usable()
        try:
            yield self.readers
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be read: {named(error)}") from error

    async def read(self, query: str, parameters: dict[str, Any]) -> list[Any]:
        """The rows of one query, by its name."""
        async with self.reading() as readers, readers.one() as reader:
            return list(await reader.execute_fetchall(_SQL[query], parameters))

    def commit_unknown(self, error: Exception) -> CommitUnknown:
        """A write has failed in a way that says nothing: nothing is believed from now on."""
        self.failed = f"a commit failed ({named(error)})"
        _log.error("commit_failed", path=str(self.path), error=named(error))
        return CommitUnknown(
            f"a commit to {self.path} failed ({named(error)}) and may or may not have happened:"
            " the store must be reopened and read before anything else"
        )

    def not_usable(self) -> StoreError:
        """The refusal of a file that is closed, or not to be believed."""
        if self.closed:
            return StoreError(f"{self.path} is closed")
        return StoreError(f"{self.path}: {self.failed}; the store must be reopened first")

    async def close_readers(self) -> None:
        """Waits for the reads that are under way."""
        if self.readers is not None:
            await self.readers.close()
            self.readers = None

    async def close_to_reopen(self) -> None:
        """Closes all connections, and sees that they are. Raises StoreError where they are not."""
        if self.closed:
            raise self.not_usable()
        self.failed = self.failed or "it is being reopened"
        await self.disconnect()
        if is_open_here(self.path):
            raise StoreError(
                f"{self.path} could not be closed after a failed commit, so what it shows cannot"
                " be believed: this process must end"
            )

    async def disconnect(self) -> None:
        """Closes all connections. A failure to close is logged; the thread ends all the same."""
        readers, self.readers = self.readers, None
        writer, self.writer = self.writer, None
        for connections in (readers, writer):
            if connections is not None:
                try:
                    if isinstance(connections, Readers):
                        await connections.close()
                    else:
                        await close(connections)
                except Exception as error:  # noqa: BLE001  # `is_open_here` says whether it matters
                    _log.warning("closing_failed", path=str(self.path), error=named(error))
