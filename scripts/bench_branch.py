"""A participant of two-phase commits for the benchmarks, which does nothing but a row.

`bench_branch.py NAME KIND WHERE READY_FILE` is a process of its own. Of the KINDs

    row         has one action, `row`, over the SQLite file WHERE: for sagas and for two-phase
                commits. A vote writes the row, the commit marks it
    prepared    the same action over the PostgreSQL of the environment variable BENCH_DSN: what a
                vote has written is a prepared transaction until it is told
    reserved    its action takes one from a quantity in the SQLite file WHERE: a reservation, which
                the commit confirms, and a row then

How often each saga took effect is counted in the databases, when nothing runs any more: `effects`.
`lost` and `doubled` are faults to be planted: a benchmark must notice them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from scripts.bench_participant import PLANTED_AT, PLANTS
from scripts.bench_processes import announce

if TYPE_CHECKING:
    import asyncpg

KINDS: Final = ("row", "prepared", "reserved")
DSN_VARIABLE: Final = "BENCH_DSN"
KEYS: Final = 1000
QUANTITY: Final = 1_000_000_000

_SQLITE: Final = """
CREATE TABLE IF NOT EXISTS rows (saga_id TEXT, definition TEXT, step TEXT, is_done INTEGER);
CREATE INDEX IF NOT EXISTS rows_by_saga ON rows (saga_id, step);
"""

_POSTGRES: Final = """
DO $$
BEGIN
    IF to_regclass('rows') IS NULL THEN
        CREATE TABLE rows (saga_id text, definition text, step text);
    END IF;
END
$$
"""

_STOCK: Final = f"""
CREATE TABLE IF NOT EXISTS stock (key INTEGER PRIMARY KEY, quantity INTEGER NOT NULL);
INSERT OR IGNORE INTO stock
    WITH RECURSIVE keys(key) AS (SELECT 0 UNION ALL SELECT key + 1 FROM keys WHERE key < {KEYS - 1})
    SELECT key, {QUANTITY} FROM keys;
"""  # noqa: S608  # constants


class Plant:
    """Says how often each effect is written down: once, but for the one that is planted."""

    def __init__(self, plant: str) -> None:
        self._in = PLANTED_AT if plant else 0
        self._times = 0 if plant == "lost" else 2

    def times(self) -> int:
        """Count one effect."""
        if self._in:
            self._in -= 1
            if not self._in:
                return self._times
        return 1


def row_participant(name: str, path: str, plant: Plant) -> amends.Participant:
    """A row in SQLite, with all three verbs by hand."""
    bench = amends.Participant(name, barrier=amends.SqliteBarrier(path, schema=_SQLITE))
    insert = "INSERT INTO rows VALUES (?, ?, ?, ?)"

    def write(call: amends.Call, tx: amends.Transaction, *, is_done: bool) -> None:
        for _ in range(plant.times()):
            tx.execute(insert, (call.saga_id, call.definition, call.step, is_done))

    @bench.prepare("row")
    def vote(call: amends.Call, tx: amends.Transaction) -> None:
        write(call, tx, is_done=False)

    @bench.execute("row")
    def do(call: amends.Call, tx: amends.Transaction) -> None:
        if call.two_phase:
            tx.execute(
                "UPDATE rows SET is_done = 1 WHERE saga_id = ? AND step = ?",
                (call.saga_id, call.step),
            )
        else:
            write(call, tx, is_done=True)

    @bench.compensate("row")
    def undo(call: amends.Call, tx: amends.Transaction) -> None:
        tx.execute("DELETE FROM rows WHERE saga_id = ? AND step = ?", (call.saga_id, call.step))

    return bench


def prepared_participant(name: str, dsn: str, plant: Plant) -> amends.Participant:
    """A row in PostgreSQL, prepared."""
    bench = amends.Participant(name, barrier=amends.PreparedTransactions(dsn, schema=_POSTGRES))

    @bench.prepare("row")
    async def vote(call: amends.Call, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        for _ in range(plant.times()):
            await connection.execute(
                "INSERT INTO rows VALUES ($1, $2, $3)", call.saga_id, call.definition, call.step
            )

    return bench


def reserved_participant(name: str, path: str, plant: Plant) -> amends.Participant:
    """One of a quantity in SQLite, reserved."""
    bench = amends.Participant(name, barrier=amends.SqliteBarrier(path, schema=_SQLITE + _STOCK))
    stock = amends.Reservations("stock", key="key", quantity="quantity")

    def wanted(call: amends.Call) -> amends.Hold:
        return amends.Hold(int(call.saga_id.rpartition("-")[2]) % KEYS, 1)

    def write(call: amends.Call, tx: amends.Transaction, hold: amends.Hold) -> None:
        for _ in range(plant.times()):
            row = (call.saga_id, call.definition, call.step, True)
            tx.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", row)

    stock.takes(bench, "row", wanted, on_confirm=write)
    return bench


# -- seeing, when nothing runs any more ------------------------------------------------------------


def effects(path: Path) -> dict[str, tuple[int, int]]:
    """By definition: the rows that are done in a SQLite file, and of how many sagas they are.

    `""` are those that are not done: votes that nobody was told of.
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return _by_definition(
            connection.execute(
                "SELECT iif(is_done, definition, ''), count(*), count(DISTINCT saga_id) FROM rows"
                " GROUP BY 1"
            ).fetchall()
        )


def effects_of_postgres(dsn: str) -> dict[str, tuple[int, int]]:
    """The same of a PostgreSQL; `""` are its prepared transactions."""
    with psycopg.connect(dsn) as connection:
        found = _by_definition(
            connection.execute(
                "SELECT definition, count(*), count(DISTINCT saga_id) FROM rows GROUP BY 1"
            ).fetchall()
        )
        prepared = connection.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone()
    assert prepared is not None
    return found | ({"": (prepared[0], prepared[0])} if prepared[0] else {})


def version_of_postgres(dsn: str) -> str:
    """As it says it itself."""
    with psycopg.connect(dsn) as connection:
        return connection.info.parameter_status("server_version") or "unknown"


def stock_of(path: Path) -> tuple[int, int]:
    """What was taken from the quantities of a file, and how many reservations there still are."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        [[left]] = connection.execute("SELECT sum(quantity) FROM stock").fetchall()
        [[held]] = connection.execute("SELECT count(*) FROM amends_reservations").fetchall()
    return KEYS * QUANTITY - left, held


def _by_definition(rows: list[tuple[Any, ...]]) -> dict[str, tuple[int, int]]:
    return {name: (count, sagas) for name, count, sagas in rows}


# -- the program -----------------------------------------------------------------------------------


def make(name: str, kind: str, where: str, plant: Plant) -> amends.Participant:
    """Make a participant of this kind."""
    match kind:
        case "row":
            return row_participant(name, where, plant)
        case "prepared":
            return prepared_participant(name, os.environ[DSN_VARIABLE], plant)
        case _:
            return reserved_participant(name, where, plant)


async def serve(participant: amends.Participant, ready_file: Path) -> None:
    """Serve until it is ended."""
    async with amends.serve(participant, listen="127.0.0.1:0") as server:
        announce(ready_file, server.address)
        await server.wait_closed()


def main() -> None:
    """Serve as its arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plant", choices=PLANTS, default="", help="a fault to be noticed")
    parser.add_argument("name", help="what the runtime calls it")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("where", help="a SQLite file; of `prepared` nothing")
    parser.add_argument("ready_file", type=Path)
    options = parser.parse_args()
    participant = make(options.name, options.kind, options.where, Plant(options.plant))
    asyncio.run(serve(participant, options.ready_file))


if __name__ == "__main__":
    main()
