"""A branch's books: its accounts, and the append-only list of what has moved on them.

A movement is written in the transaction that changes the balance. So it is there exactly if the
money has moved, whatever was killed when.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import amends
from shop.bank import EAST, FEES, OPENINGS_CENTS, WEST

_SQL_FOLDER: Final = Path(__file__).parent / "sql"

_SCHEMAS: Final = {
    EAST: ("bank_postgres",),
    WEST: ("bank_sqlite",),
    FEES: ("bank_sqlite", "bank_fees"),
}

COLUMNS: Final = "at_ms, clock_ns, saga_id, step, action, key, account, amount_cents"
"""Of a movement, as `movement` gives them."""

_APPEND: Final = f"INSERT INTO movements ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants

_MOVE: Final = "UPDATE accounts SET balance_cents = balance_cents + ? WHERE account = ?"


def schema(branch: str) -> str:
    """Give the SQL that makes a branch's tables where they are missing.

    In PostgreSQL with their openings, so that nothing is asked of tables that exist: what is in
    doubt may have locked them.
    """
    text = "".join(
        (_SQL_FOLDER / f"{name}.sql").read_text(encoding="utf-8") for name in _SCHEMAS[branch]
    )
    return text.replace("{openings}", json.dumps(OPENINGS_CENTS[branch]))


def movement(
    call: amends.Call, account: str, amount_cents: int
) -> tuple[int, int, str, str, str, str, str, int]:
    """Make the line of what `call` moves; taking has a minus."""
    return (
        time.time_ns() // 1_000_000,
        # One clock for all processes of a machine, and it never goes back.
        time.monotonic_ns(),
        call.saga_id,
        call.step,
        call.action,
        call.idempotency_key,
        account,
        amount_cents,
    )


def append(
    transaction: amends.Transaction, call: amends.Call, account: str, amount_cents: int
) -> None:
    """Write down what `call` moves, in the SQLite transaction in which it does."""
    transaction.execute(_APPEND, movement(call, account, amount_cents))


def move(
    transaction: amends.Transaction, call: amends.Call, account: str, amount_cents: int
) -> None:
    """Change the balance of an account that is there, and write it down."""
    changed = transaction.execute(_MOVE, (amount_cents, account)).rowcount
    assert changed == 1, "whoever has voted has seen the account"
    append(transaction, call, account, amount_cents)


def open_accounts(transaction: amends.Transaction, branch: str) -> None:
    """Open the accounts of a branch on SQLite; those that exist keep what they have."""
    transaction.executemany(
        "INSERT OR IGNORE INTO accounts (account, opening_cents, balance_cents) VALUES (?, ?, ?)",
        [(name, cents, cents) for name, cents in OPENINGS_CENTS[branch].items()],
    )
