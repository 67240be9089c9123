"""The files of `amends dev`: how it knows its own, and how it removes them.

1. Beside the database stands a note, `<database>.dev`. It is written before the database exists and
   gets the store's id as soon as there is one: no database that was there before ever gets a note.
2. A database without a note is nobody's to play with: it is neither used nor removed.
3. To remove, the runtime's own lock is held, and the database must be the store that the note
   names; where a crash came before its id was noted, one without a single saga.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.storage.ownership import Ownership, usable_path

__all__ = ["DevFiles"]

MADE_BY: Final = "amends dev"
SQLITE_SUFFIXES: Final = ("-wal", "-shm", "-journal", "")
"""The database itself last: its log, left behind, would be taken for that of the next one."""
MAX_NOTE_BYTES: Final = 4096  # a note is about 100 bytes; whatever is larger is none of ours


class DevFiles:
    """The database of `amends dev`, its note, and the ledger of its participant.

    Raises StoreUnusable where no database can be.
    """

    def __init__(self, database: str) -> None:
        self.database = usable_path(database)
        """The runtime's database."""
        self.ledger = self.database.with_name(f"{self.database.name}.demo")
        """The participant's database."""
        self.note = self.database.with_name(f"{self.database.name}.dev")
        """What says that they are ours."""

    def claim(self) -> None:
        """Makes sure that the database is ours, or will be. Ends the command if it is not."""
        if self.note.exists():
            self._read_note()
            return
        if self.database.exists():
            raise Exit(
                ExitCode.CONFLICT,
                f"{self.database}: was not made by amends dev, which plays only with its own: give "
                f"another --database, or use amends serve --database {self.database}",
            )
        self._write_note(None)

    def made(self, store_id: str) -> None:
        """Notes the store's id, once there is one."""
        if self._read_note() != store_id:
            self._write_note(store_id)

    def remove(self) -> bool:
        """Removes all of them, if they are ours and nobody uses them; says whether any was there.

        Raises StoreInUse while a runtime owns the database.
        """
        if not self.note.exists():
            if not self.database.exists():
                return False
            raise Exit(
                ExitCode.CONFLICT,
                f"--reset: {self.database} was not made by amends dev and is left alone; remove it "
                "yourself, or give another --database",
            )
        noted = self._read_note()
        lock = Ownership.take(self.database)
        try:
            if self.database.exists():
                self._check_is_ours(noted)
            for file in (self.database, self.ledger):
                for suffix in SQLITE_SUFFIXES:
                    file.with_name(file.name + suffix).unlink(missing_ok=True)
            # The note goes last but for the lock: what is left by a crash in between is still ours.
            self.note.unlink(missing_ok=True)
            lock.path.unlink(missing_ok=True)
        except OSError as error:
            raise Exit(
                ExitCode.UNAVAILABLE, f"--reset: {error.filename}: {error.strerror}"
            ) from None
        finally:
            lock.release()
        return True

    def _check_is_ours(self, noted: str | None) -> None:
        store_id, sagas = _look_into(self.database)
        if store_id == noted or (noted is None and sagas == 0):
            return
        raise Exit(
            ExitCode.CONFLICT,
            f"--reset: {self.database} is not the database that amends dev made here "
            f"({self.note.name} names another), and is left alone; remove it yourself, or give "
            "another --database",
        )

    def _read_note(self) -> str | None:
        """The store's id, or None if it was not known yet. Ends the command if it is no note."""
        try:
            with self.note.open("rb") as file:
                content: Any = json.loads(file.read(MAX_NOTE_BYTES))
            if content["made_by"] == MADE_BY:
                store_id = content["store_id"]
                return None if store_id is None else str(store_id)
            why = "is no note of amends dev"
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
        except (ValueError, TypeError, KeyError, RecursionError):
            why = "is no note of amends dev"
        raise Exit(ExitCode.CONFLICT, f"{self.note}: {why}; give another --database")

    def _write_note(self, store_id: str | None) -> None:
        """Writes the note as a whole, durably: the database is made after it."""
        content = json.dumps({"made_by": MADE_BY, "store_id": store_id})
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{self.note.name}.", dir=self.note.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(self.note)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()
                raise
        except OSError as error:
            raise Exit(
                ExitCode.UNAVAILABLE,
                f"{self.note}: cannot be written: {error.strerror}; give another --database",
            ) from None


def _look_into(database: Path) -> tuple[str | None, int]:
    """A store's id and how many sagas it has; (None, 0) of an empty file. Nobody has it open."""
    if database.stat().st_size == 0:
        return None, 0
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_schema").fetchall():
                return None, 0
            [(store_id, sagas)] = connection.execute(
                "SELECT store_id, (SELECT count(*) FROM sagas) FROM meta"
            ).fetchall()
    except (sqlite3.Error, ValueError) as error:
        raise Exit(
            ExitCode.CONFLICT,
            f"--reset: {database} cannot be read ({error}), so nobody knows whether it was made by "
            "amends dev; remove it yourself, or give another --database",
        ) from None
    return str(store_id), int(sagas)
