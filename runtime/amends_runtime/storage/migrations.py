"""The schema's versions: what a file is, and how it becomes what this program knows.

`PRAGMA user_version` holds the schema's number, `PRAGMA application_id` says that the file is ours.
Each migration is one transaction that also sets the number, so that a crash leaves a whole version
behind.
"""

from __future__ import annotations

from pathlib import Path

import aiosqlite

from amends_runtime.errors import StoreUnusable
from amends_runtime.storage.connection import pragma
from amends_runtime.storage.queries import read_queries, read_script

__all__ = ["APPLICATION_ID", "MIGRATIONS", "SCHEMA_VERSION", "migrate", "schema_version"]

APPLICATION_ID = 0x616D6E64  # "amnd"

MIGRATIONS = (
    "0001_initial.sql",
    "0002_watches_and_operators.sql",
    "0003_resting_sagas.sql",
    "0004_gaps_by_batch.sql",
    "0005_two_phase_commits.sql",
)

SCHEMA_VERSION = len(MIGRATIONS)

_COUNT_TABLES = read_queries("sqlite")["count_tables"]


async def schema_version(connection: aiosqlite.Connection, path: Path) -> int:
    """The schema's number in this file; 0 for an empty one. Changes nothing.

    Raises StoreUnusable for another application's database and for one of a newer schema.
    """
    application_id = await pragma(connection, "application_id")
    version = await pragma(connection, "user_version")
    rows = list(await connection.execute_fetchall(_COUNT_TABLES))
    assert isinstance(version, int), "SQLite keeps it as an integer"
    if application_id != APPLICATION_ID:
        if application_id or version or rows[0][0]:
            raise StoreUnusable(
                f"{path} is another application's database: give the path of a new file,"
                " or of one that amends made"
            )
        return 0
    if version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{path} has schema version {version}, and this program knows versions up to"
            f" {SCHEMA_VERSION}: run the newer amends that wrote it, or restore an older backup"
        )
    return version


async def migrate(connection: aiosqlite.Connection, version: int) -> None:
    """Brings a file from `version` to the newest schema, one transaction for each step."""
    for number, name in enumerate(MIGRATIONS[version:], start=version + 1):
        script = read_script("sqlite", f"migrations/{name}")
        try:
            await connection.executescript(
                "BEGIN IMMEDIATE;\n"
                f"{script}\n"
                f"PRAGMA application_id = {APPLICATION_ID};\n"
                f"PRAGMA user_version = {number};\n"
                "COMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                await connection.execute_fetchall("ROLLBACK")
            raise
