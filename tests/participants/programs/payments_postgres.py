"""A participant over PostgreSQL in a process of its own, which stops where a crash would hurt.

Usage: payments_postgres.py DSN KIND WHERE. It prints its address; where it is told to stop it
prints ``here`` and stands until it is killed or a line comes in on stdin. KIND is one of
`postgres_ledger.KINDS`, and WHERE one of

- ``before-commit``: the effect is written, its transaction is open
- ``before-reply``: the transaction is committed, the reply has not left
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import asyncpg
import psycopg

from amends import Call, Participant, PostgresBarrier, Server, run
from amends.handler import Handler
from amends.outcomes import Outcome

dsn, kind, where = sys.argv[1:4]


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stop_if(place: str) -> None:
    """Say so, and wait to be killed or let go."""
    if where == place:
        tell("here")
        sys.stdin.readline()


class StoppingBarrier(PostgresBarrier):
    """Stops between its commit and the reply."""

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        outcome = await super().run(call, handler)
        if where == "before-reply":
            tell("here")
            threading.Event().wait()
        return outcome


barrier = StoppingBarrier(dsn, driver="asyncpg" if kind == "asyncpg" else "psycopg")
payments = Participant("payments", barrier=barrier)
INSERT = "INSERT INTO ledger (saga_id, entry, amount) VALUES ({}, 'charge', 5)"


async def charge_asyncpg(call: Call, connection: asyncpg.Connection[Any]) -> dict[str, int]:
    """Take the money."""
    await connection.execute(INSERT.format("$1"), call.saga_id)
    stop_if("before-commit")
    return {"charged": 5}


async def charge_psycopg(call: Call, connection: psycopg.AsyncConnection) -> dict[str, int]:
    """Take the money."""
    await connection.execute(INSERT.format("%s"), [call.saga_id])
    stop_if("before-commit")
    return {"charged": 5}


def charge_in_thread(call: Call, connection: psycopg.Connection) -> dict[str, int]:
    """Take the money."""
    connection.execute(INSERT.format("%s"), [call.saga_id])
    stop_if("before-commit")
    return {"charged": 5}


HANDLERS: dict[str, Any] = {
    "asyncpg": charge_asyncpg,
    "psycopg": charge_psycopg,
    "psycopg in threads": charge_in_thread,
}
payments.execute("charge", compensatable=False)(HANDLERS[kind])


def print_address(server: Server) -> None:
    """Tell the test where to ask."""
    tell(server.address)


if __name__ == "__main__":
    run(payments, on_ready=print_address, grace_s=30.0)
