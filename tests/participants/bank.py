"""A bank with reservations, on each database: accounts in it, and votes asked as a runtime asks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import anyio

from amends import Call, Hold, Participant, Reservations, SqliteBarrier, Verb
from amends.barrier.postgres import Driver, PostgresBarrier
from amends.outcomes import InProgress, Outcome
from amends.reservations import OnHold
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from amends.wire import call_from_wire, outcome_to_wire
from tests.participants.asking import call_message, json_payload, words
from tests.postgres import Postgres

PREPARE, EXECUTE, COMPENSATE = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE

ACCOUNTS = """
CREATE TABLE IF NOT EXISTS accounts (
    account TEXT PRIMARY KEY,
    balance_cents BIGINT NOT NULL CHECK (balance_cents >= 0)
);
CREATE TABLE IF NOT EXISTS journal (saga_id TEXT NOT NULL, line TEXT NOT NULL, cents BIGINT);
"""

START = {"a": 100, "b": 50, "c": 0}

Look = Callable[[str], Sequence[tuple[Any, ...]]]
"""Runs a statement from outside, as somebody else would, and gives its rows."""

INSERT_LINE = {
    "sqlite": "INSERT INTO journal VALUES (?, ?, ?)",
    "asyncpg": "INSERT INTO journal VALUES ($1, $2, $3)",
    "psycopg": "INSERT INTO journal VALUES (%s, %s, %s)",
}


def vote_call(
    verb: Verb,
    action: str = "debit",
    *,
    saga_id: str = "t-1",
    account: object = "a",
    cents: object = 30,
    round: int = 1,  # noqa: A002  # the contract's word
    executed: bool = False,
    attempt: int = 1,
    store_id: str = "store",
) -> pb.Call:
    """Make a call of a two-phase commit; the step has the action's name."""
    call = call_message(
        verb,
        action=action,
        step=action,
        saga_id=saga_id,
        round=round,
        executed=executed,
        attempt=attempt,
        store_id=store_id,
    )
    call.mode = types_pb2.MODE_TWO_PHASE_COMMIT
    call.incarnation = "first"
    call.input.CopyFrom(json_payload({"account": account, "cents": cents}))
    return call


def hold_of(call: Call) -> Hold:
    """Say what a transfer wants of its account."""
    wanted = call.json()
    return Hold(wanted["account"], wanted["cents"])


class Bank:
    """A participant with the actions ``debit`` and ``credit``, and what lies in its database."""

    def __init__(
        self,
        barrier: SqliteBarrier | PostgresBarrier,
        look: Look,
        *,
        journal: bool = False,
        lock_timeout_s: float = 0.1,
        name: str = "bank",
        aliases: Sequence[str] = (),
        table: str = "accounts",
    ) -> None:
        self.barrier = barrier
        self.look = look
        self.driver = "sqlite" if isinstance(barrier, SqliteBarrier) else barrier.driver
        self.participant = Participant(name, barrier=barrier, aliases=aliases)
        self.holds = Reservations(
            table, key="account", quantity="balance_cents", lock_timeout_s=lock_timeout_s
        )
        on = {name: self.line(name) for name in ("on_try", "on_confirm", "on_cancel")}
        if not journal:
            on = {}
        self.holds.takes(self.participant, "debit", hold_of, **on)
        self.holds.gives(self.participant, "credit", hold_of, **on)
        self.handlers = self.participant.handlers()

    def line(self, name: str) -> OnHold:
        """Make a function that writes a line into the journal."""
        statement = INSERT_LINE[self.driver]

        def values(call: Call, hold: Hold) -> tuple[object, ...]:
            assert call.json()["cents"] == hold.amount
            return call.saga_id, name, hold.amount

        def write(call: Call, tx: Any, hold: Hold) -> None:
            tx.execute(statement, values(call, hold))

        async def write_async(call: Call, connection: Any, hold: Hold) -> None:
            if self.driver == "asyncpg":
                await connection.execute(statement, *values(call, hold))
            else:
                await connection.execute(statement, values(call, hold))

        return write if self.driver == "sqlite" else write_async

    async def outcome(self, message: pb.Call) -> Outcome:
        """Ask the barrier, as the server does."""
        call = call_from_wire(message)
        return await self.barrier.run(call, self.handlers.get((call.action, call.verb)))

    async def say(self, verb: Verb, action: str = "debit", **details: Any) -> str:
        """Ask, and give the outcome in a word or two."""
        return words(outcome_to_wire(await self.outcome(vote_call(verb, action, **details))))

    async def until_said(self, verb: Verb, action: str = "debit", **details: Any) -> str:
        """Ask until the answer is not ``in_progress``, as a runtime does."""
        while True:
            outcome = await self.outcome(vote_call(verb, action, **details))
            if not isinstance(outcome, InProgress):
                return words(outcome_to_wire(outcome))
            await anyio.sleep(outcome.after_s / 10)

    # ---------------------------------------------------------------- what is in the database

    def balances(self) -> dict[str, int]:
        """Read the quantities."""
        return dict(self.look("SELECT account, balance_cents FROM accounts ORDER BY account"))

    def held(self) -> list[tuple[str, str, str, int]]:
        """Read the holds: saga, direction, key and amount."""
        rows = self.look(
            "SELECT saga_id, direction, key, amount FROM amends_reservations ORDER BY seq"
        )
        return [(saga, direction, json.loads(key), amount) for saga, direction, key, amount in rows]

    def free(self) -> dict[str, int]:
        """Work out what is available, by other means than the code that is tested."""
        taken = [(key, amount) for _, kind, key, amount in self.held() if kind == "takes"]
        return {
            account: cents - sum(amount for key, amount in taken if key == account)
            for account, cents in self.balances().items()
        }

    def journal(self) -> list[tuple[str, str, int]]:
        """Read the author's own lines."""
        return list(self.look("SELECT saga_id, line, cents FROM journal ORDER BY saga_id, line"))

    def rows(self, saga_id: str = "t-1") -> list[tuple[str, str, str]]:
        """Read the barrier's rows: step, verb and state."""
        rows = self.look("SELECT saga_id, step, verb, state FROM amends_barrier")
        return sorted((step, verb, state) for saga, step, verb, state in rows if saga == saga_id)


def filled(schema: str = ACCOUNTS, start: dict[str, int] = START) -> str:  # read only
    """Give the schema with accounts in it."""
    rows = ", ".join(f"('{account}', {cents})" for account, cents in start.items())
    return f"{schema}\nINSERT INTO accounts VALUES {rows} ON CONFLICT DO NOTHING;"


def look_at(path: Path) -> Look:
    """Look at a SQLite database from outside."""

    def look(statement: str) -> Sequence[tuple[Any, ...]]:
        with closing(sqlite3.connect(path)) as connection, connection:
            return connection.execute(statement).fetchall()

    return look


@asynccontextmanager
async def sqlite_bank(
    path: Path, *, share_commits: bool = False, journal: bool = False
) -> AsyncIterator[Bank]:
    """Open a bank on SQLite."""
    barrier = SqliteBarrier(path, schema=filled(), share_commits=share_commits, busy_timeout_s=30.0)
    bank = Bank(barrier, look_at(path), journal=journal)
    async with barrier:
        yield bank


@asynccontextmanager
async def postgres_bank(
    postgres: Postgres, driver: Driver, *, journal: bool = False, lock_timeout_s: float = 0.1
) -> AsyncIterator[Bank]:
    """Open a bank on PostgreSQL."""
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=filled(), busy_timeout_s=30.0)
    # Any text: what a test looks at and does is its own.
    look = cast("Look", postgres.execute)
    bank = Bank(barrier, look, journal=journal, lock_timeout_s=lock_timeout_s)
    async with barrier:
        yield bank
