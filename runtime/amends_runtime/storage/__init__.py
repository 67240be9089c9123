"""The durable truth: a Store in a SQLite file, and one in memory under the same contract."""

from __future__ import annotations

from amends_runtime.storage.memory import MemoryDisk, MemoryStore, open_memory_store
from amends_runtime.storage.read_model import Difference, rebuild_read_model, verify_read_model
from amends_runtime.storage.sqlite import SqliteStore, open_sqlite_store

__all__ = [
    "Difference",
    "MemoryDisk",
    "MemoryStore",
    "SqliteStore",
    "open_memory_store",
    "open_sqlite_store",
    "rebuild_read_model",
    "verify_read_model",
]
