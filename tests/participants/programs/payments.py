"""A participant in a process of its own, which can be told to stop where a crash would hurt.

Usage: payments.py DATABASE WHERE [LISTEN]. It prints its address; where it is told to stop it
prints ``here`` and stands until it is killed or a line comes in on stdin. WHERE is one of

- ``nowhere``
- ``before-commit``: the effect is written, its transaction is open
- ``before-reply``: the transaction is committed, the reply has not left
- ``disk-full``: the first commit finds that no file may grow any more
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import sys
import threading

from amends import Call, Participant, Server, SqliteBarrier, Transaction, run
from amends.handler import Handler
from amends.outcomes import Outcome

SCHEMA = "CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT, entry TEXT, amount INTEGER)"

database, where = sys.argv[1:3]
listen = sys.argv[3] if len(sys.argv) > 3 else "127.0.0.1:0"


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stop_here() -> None:
    """Say so, and wait to be killed or let go."""
    tell("here")
    sys.stdin.readline()


def connect() -> sqlite3.Connection:
    """Open the database; a disk that was full has room again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return sqlite3.connect(database)


class StoppingBarrier(SqliteBarrier):
    """Stops between its commit and the reply."""

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        outcome = await super().run(call, handler)
        if where == "before-reply":
            tell("here")
            threading.Event().wait()
        return outcome


payments = Participant(
    "payments", barrier=StoppingBarrier(connect, schema=SCHEMA, busy_timeout_s=30.0)
)


def write_effect(call: Call, tx: Transaction, entry: str) -> None:
    """Write one effect, then stop if that is the place."""
    amount = call.json()["amount"]
    tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, entry, amount))
    if where == "before-commit":
        stop_here()
    if where == "disk-full" and call.attempt == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))


@payments.execute("charge")
def charge(call: Call, tx: Transaction) -> dict[str, int]:
    """Take the money."""
    write_effect(call, tx, "charge")
    return {"charged": call.json()["amount"]}


@payments.compensate("charge")
def refund(call: Call, tx: Transaction) -> None:
    """Give it back."""
    write_effect(call, tx, "refund")


@payments.execute("hang", compensatable=False)
async def hang(call: Call) -> None:
    """Never answer."""
    tell("here")
    await asyncio.Event().wait()


def print_address(server: Server) -> None:
    """Tell the test where to ask."""
    tell(server.address)


if __name__ == "__main__":
    run(payments, listen, on_ready=print_address, grace_s=30.0)
