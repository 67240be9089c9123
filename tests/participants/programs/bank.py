"""A bank with reservations in a process of its own, which asks a runtime about what is in doubt.

Usage: bank.py DATABASE RUNTIME. It prints its address, and ``confirmed`` or ``cancelled`` when a
hold is.
"""

from __future__ import annotations

import sys

from amends import (
    Call,
    Hold,
    InDoubtResolver,
    Participant,
    Reservations,
    Server,
    SqliteBarrier,
    Transaction,
    run,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, balance_cents INTEGER NOT NULL);
INSERT INTO accounts VALUES ('a', 100), ('b', 50) ON CONFLICT DO NOTHING;
"""

database, runtime = sys.argv[1:3]


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wanted(call: Call) -> Hold:
    """Say what a transfer wants."""
    return Hold(call.json()["account"], call.json()["cents"])


def confirmed(call: Call, tx: Transaction, hold: Hold) -> None:
    """Say so."""
    tell(f"confirmed {call.saga_id} {hold.amount} {call.from_resolver}")


def cancelled(call: Call, tx: Transaction, hold: Hold) -> None:
    """Say so."""
    tell(f"cancelled {call.saga_id} {hold.amount} {call.from_resolver}")


def print_address(server: Server) -> None:
    """Tell the test where to ask."""
    tell(server.address)


bank = Participant("bank", barrier=SqliteBarrier(database, schema=SCHEMA))
holds = Reservations("accounts", key="account", quantity="balance_cents")
holds.takes(bank, "debit", wanted, on_confirm=confirmed, on_cancel=cancelled)

if __name__ == "__main__":
    resolver = InDoubtResolver(holds, runtime, older_than_s=0, every_s=0.05)
    run(bank, resolver=resolver, on_ready=print_address)
