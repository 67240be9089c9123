"""Reads the bank's books as they are in its databases, and nothing of the runtime's.

Nothing is written, and the participants may be stopped: two files of SQLite and a PostgreSQL that
runs are all that it takes. Each branch is read in one snapshot of its own; the three together are
one only when nothing is under way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from amends.barrier.prepared_id import GlobalId
from shop.bank import EAST, FEES, WEST

POSTGRES_FOLDER: Final = "postgres"
"""Of the PostgreSQL that `Processes` starts, in its folder."""

_ACCOUNTS: Final = "SELECT account, opening_cents, balance_cents FROM accounts"

_MOVEMENTS: Final = (
    "SELECT seq, at_ms, clock_ns, saga_id, step, action, key, account, amount_cents"
    " FROM movements ORDER BY seq"
)

_HELD: Final = {
    WEST: "SELECT saga_id, action || ' of ' || amount || ' cents' FROM amends_reservations",
    FEES: "SELECT saga_id, 'a fee of ' || amount_cents || ' cents' FROM pending",
}


@dataclass(frozen=True, slots=True)
class Movement:
    """Money that has moved at a branch."""

    branch: str
    seq: int
    at_ms: int
    clock_ns: int
    saga_id: str
    step: str
    action: str
    key: str
    account: str
    amount_cents: int


@dataclass(frozen=True, slots=True)
class Held:
    """A vote that has not been told whether to commit."""

    saga_id: str
    """Empty for a prepared transaction that is none of ours."""
    what: str


@dataclass(frozen=True, slots=True)
class Books:
    """What one branch's database says."""

    openings: Mapping[str, int]
    """Cents, by account, when it was made."""
    balances: Mapping[str, int]
    """Cents, by account, now."""
    movements: Sequence[Movement]
    held: Sequence[Held]

    @property
    def opening_cents(self) -> int:
        """All that was there when it was made."""
        return sum(self.openings.values())

    @property
    def total_cents(self) -> int:
        """All that is there now."""
        return sum(self.balances.values())


def read_bank(folder: Path, dsn: str) -> dict[str, Books]:
    """Read the three branches: the files in a folder of `Processes`, and a PostgreSQL.

    Raises `FileNotFoundError`, `sqlite3.Error` and `psycopg.Error`.
    """
    return {
        EAST: read_postgres(EAST, dsn),
        WEST: read_sqlite(WEST, folder / f"{WEST}.db"),
        FEES: read_sqlite(FEES, folder / f"{FEES}.db"),
    }


def read_sqlite(branch: str, path: Path) -> Books:
    """Read a branch that is on SQLite, in one snapshot."""
    if not path.exists():
        raise FileNotFoundError(f"there is no database {path}")
    address = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        accounts = connection.execute(_ACCOUNTS).fetchall()
        movements = connection.execute(_MOVEMENTS).fetchall()
        held = connection.execute(_HELD[branch]).fetchall()
    return _books(branch, accounts, movements, [Held(*row) for row in held])


def read_postgres(branch: str, dsn: str) -> Books:
    """Read a branch that is on PostgreSQL, in one snapshot; what is prepared a moment later."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        accounts = connection.execute(_ACCOUNTS).fetchall()
        movements = connection.execute(_MOVEMENTS).fetchall()
        # All of them, ours or not: nobody else prepares anything here.
        names = connection.execute(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            " ORDER BY prepared"
        ).fetchall()
    return _books(branch, accounts, movements, [_held(name) for (name,) in names])


def _held(name: str) -> Held:
    read = GlobalId.parse(name)
    if read is None:
        return Held("", f"the prepared transaction {name}")
    return Held(read.life.saga_id, f"the prepared {read.life.step} of round {read.life.round}")


def _books(
    branch: str,
    accounts: Sequence[tuple[str, int, int]],
    movements: Sequence[tuple[int, int, int, str, str, str, str, str, int]],
    held: Sequence[Held],
) -> Books:
    return Books(
        openings={account: opening for account, opening, _ in accounts},
        balances={account: balance for account, _, balance in accounts},
        movements=[Movement(branch, *row) for row in movements],
        held=held,
    )
