"""A participant with a ledger: each effect is a line in it, so that effects can be counted."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from amends import Call, Participant, Rejected, SqliteBarrier, Transaction, serve
from tests.participants.asking import Asker, asking

SCHEMA = "CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT, entry TEXT, amount INTEGER)"

PATIENCE_S = 60.0
"""How long a call waits for its turn; short where a test has somebody in its way."""

LIMIT = 100
"""Charges above it are declined."""


Write: TypeAlias = Callable[[str], None]
"""Writes one effect of a call."""

Told: TypeAlias = Callable[[Call, Write], object]
"""A handler that is the same for every database."""


def read_ledger(path: Path, saga_id: str = "order-1") -> list[tuple[str, int]]:
    """Read what took effect for a saga, in order."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(
            "SELECT entry, amount FROM ledger WHERE saga_id = ? ORDER BY rowid", (saga_id,)
        ).fetchall()


def read_rows(path: Path, saga_id: str = "order-1") -> list[tuple[str, str]]:
    """Read the verbs and states of the barrier's rows for a saga."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(
            "SELECT verb, state FROM amends_barrier WHERE saga_id = ? ORDER BY verb", (saga_id,)
        ).fetchall()


def write_entry(tx: Transaction, call: Call, entry: str) -> None:
    """Write one effect."""
    amount = call.json()["amount"]
    tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, entry, amount))


@dataclass
class Ledger:
    """A participant with the action ``charge`` in a database, and what its handlers were called."""

    path: Path
    ran: list[str] = field(default_factory=list)
    busy_timeout_s: float = PATIENCE_S
    share_commits: bool = False

    def __post_init__(self) -> None:
        self.barrier = SqliteBarrier(
            self.path,
            schema=SCHEMA,
            busy_timeout_s=self.busy_timeout_s,
            share_commits=self.share_commits,
        )
        self.participant = Participant("payments", barrier=self.barrier)
        self.participant.prepare("charge")(self.reserve)
        self.participant.execute("charge")(self.charge)
        self.participant.compensate("charge")(self.refund)

    def reserve(self, call: Call, tx: Transaction) -> None:
        """Vote."""
        self.ran.append("prepare")
        write_entry(tx, call, "reserve")
        if call.json()["amount"] > LIMIT:
            raise Rejected("card_declined")

    def charge(self, call: Call, tx: Transaction) -> dict[str, int]:
        """Take the money; above the limit it refuses after it has written its effect."""
        self.ran.append("execute")
        write_entry(tx, call, "charge")
        if call.json()["amount"] > LIMIT:
            raise Rejected("card_declined", "the amount is above the limit")
        return {"charged": call.json()["amount"]}

    def refund(self, call: Call, tx: Transaction) -> None:
        """Give it back."""
        self.ran.append("compensate")
        write_entry(tx, call, "refund")

    def execute(self, action: str, *, compensatable: bool = True) -> Callable[[Told], Told]:
        """Register a handler that writes by what it is given."""
        return self._register(self.participant.execute(action, compensatable=compensatable))

    def compensate(self, action: str) -> Callable[[Told], Told]:
        """Register one that undoes."""
        return self._register(self.participant.compensate(action))

    def _register(self, decorate: Callable[[Any], Any]) -> Callable[[Told], Told]:
        def register(told: Told) -> Told:
            def handler(call: Call, tx: Transaction) -> object:
                return told(call, lambda entry: write_entry(tx, call, entry))

            decorate(handler)
            return told

        return register

    def entries(self, saga_id: str = "order-1") -> list[tuple[str, int]]:
        """Read what took effect."""
        return read_ledger(self.path, saga_id)

    def rows(self, saga_id: str = "order-1") -> list[tuple[str, str]]:
        """Read the verbs and states of the barrier's rows."""
        return read_rows(self.path, saga_id)

    def stores(self) -> list[tuple[str, int]]:
        """Read what is stored of each store's word."""
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            return connection.execute(
                "SELECT store_id, oldest_open_at_ms FROM amends_barrier_stores"
            ).fetchall()

    def make_older(self, saga_id: str, by_ms: int) -> None:
        """Move rows into the past, as if they had been written then."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(
                "UPDATE amends_barrier SET written_at_ms = written_at_ms - ? WHERE saga_id = ?",
                (by_ms, saga_id),
            )

    def reborn(self) -> Ledger:
        """Give the same participant as a new process would have it."""
        return Ledger(self.path, share_commits=self.share_commits)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Asker]:
        """Serve it, and connect."""
        async with serve(self.participant) as server, asking(server.address) as asker:
            yield asker
