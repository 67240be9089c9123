"""The write-ahead log beside the database: emptied at every opening, watched as it grows.

SQLite checkpoints by itself (`connection.CHECKPOINT_PAGES`); here is what it does not do. At an
opening nothing is believed that the log alone shows. And a reader that stays holds every checkpoint
back, so that the log grows: then somebody must be told, and it is to be cut once the reader has
gone.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import aiosqlite
import structlog

from amends_runtime.errors import StoreUnusable
from amends_runtime.storage.connection import BUSY_TIMEOUT_S, checkpoint, named, pragma

__all__ = ["WriteAheadLog"]

_log = structlog.get_logger(__name__)

MAX_WAL_BYTES = 64 * 1024 * 1024  # four checkpoints' worth: a reader is holding it back


class WriteAheadLog:
    """The log of the database at `path`. It is touched through the writer's connection alone."""

    def __init__(self, path: Path) -> None:
        self._database = path
        self._path = f"{path}-wal"
        self._tried_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Its size."""
        try:
            return os.stat(self._path).st_size  # noqa: PTH116  # three times as quick, per commit
        except FileNotFoundError:
            return 0

    async def empty(self, writer: aiosqlite.Connection) -> None:
        """What an earlier process committed comes into the database before anything else happens.

        After a failed sync the page cache may show commits that the disk does not have; what a
        checkpoint with its own sync has moved, it has. Raises StoreUnusable where it cannot.
        """
        if not await checkpoint(writer):
            raise StoreUnusable(
                f"{self._database} is in use by another program that has it open, so its log cannot"
                " be checkpointed: close that first"
            )

    async def watch(self, writer: aiosqlite.Connection) -> None:
        """Comes after each commit; speaks of a log that grew.

        It also tries to cut it, each time that it has grown by as much again. What is not cut here
        SQLite cuts when it begins the log anew, see `KEPT_CHECKPOINTS`.
        """
        size = self.size_bytes
        if size < MAX_WAL_BYTES:
            self._tried_bytes = 0
            return
        if size < self._tried_bytes + MAX_WAL_BYTES:
            return  # it was tried not long ago
        self._tried_bytes = size
        try:
            try:
                await pragma(writer, "busy_timeout = 0")  # commits must not wait for whoever reads
                emptied = await checkpoint(writer)
            finally:
                await pragma(writer, f"busy_timeout = {round(BUSY_TIMEOUT_S * 1000)}")
        except sqlite3.Error as error:  # what is committed is safe in the log
            _log.error(
                "checkpoint_failed", path=str(self._database), error=named(error), wal_bytes=size
            )
        else:
            _log.warning("log_was_large", path=str(self._database), wal_bytes=size, emptied=emptied)
