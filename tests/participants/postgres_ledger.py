"""The ledger of `ledger.py` in PostgreSQL, written by each driver's handlers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import asyncpg
import psycopg

from amends import Call, Participant, PostgresBarrier, Rejected, serve
from tests.participants.asking import Asker, asking
from tests.participants.ledger import LIMIT, PATIENCE_S, Told
from tests.postgres import Postgres

SCHEMA = "CREATE TABLE IF NOT EXISTS ledger (n serial, saga_id text, entry text, amount integer)"

Kind: TypeAlias = Literal["asyncpg", "psycopg", "psycopg in threads"]
KINDS: tuple[Kind, ...] = ("asyncpg", "psycopg", "psycopg in threads")


@dataclass
class PostgresLedger:
    """A participant with the action ``charge``, and what its handlers were called."""

    database: Postgres
    kind: Kind
    ran: list[str] = field(default_factory=list)
    busy_timeout_s: float = PATIENCE_S
    max_hold_s: float = PATIENCE_S
    max_connections: int = 4
    port: int | None = None
    """Where its server is reached, if not directly."""

    def __post_init__(self) -> None:
        self.barrier = PostgresBarrier(
            self.database.dsn_by(self.port),
            driver="asyncpg" if self.kind == "asyncpg" else "psycopg",
            schema=SCHEMA,
            busy_timeout_s=self.busy_timeout_s,
            max_hold_s=self.max_hold_s,
            max_connections=self.max_connections,
        )
        self.participant = Participant("payments", barrier=self.barrier)
        self._register(self.participant.prepare("charge"))(self.reserve)
        self.execute("charge")(self.charge)
        self.compensate("charge")(self.refund)

    def reserve(self, call: Call, write: Callable[[str], None]) -> None:
        """Vote."""
        self.ran.append("prepare")
        write("reserve")
        if call.json()["amount"] > LIMIT:
            raise Rejected("card_declined")

    def charge(self, call: Call, write: Callable[[str], None]) -> dict[str, int]:
        """Take the money; above the limit it refuses after it has written its effect."""
        self.ran.append("execute")
        write("charge")
        if call.json()["amount"] > LIMIT:
            raise Rejected("card_declined", "the amount is above the limit")
        return {"charged": call.json()["amount"]}

    def refund(self, call: Call, write: Callable[[str], None]) -> None:
        """Give it back."""
        self.ran.append("compensate")
        write("refund")

    def execute(self, action: str, *, compensatable: bool = True) -> Callable[[Told], Told]:
        """Register a handler that writes by what it is given."""
        return self._register(self.participant.execute(action, compensatable=compensatable))

    def compensate(self, action: str) -> Callable[[Told], Told]:
        """Register one that undoes."""
        return self._register(self.participant.compensate(action))

    def entries(self, saga_id: str = "order-1") -> list[tuple[str, int]]:
        """Read what took effect."""
        return self._read("SELECT entry, amount FROM ledger WHERE saga_id = %s ORDER BY n", saga_id)

    def rows(self, saga_id: str = "order-1") -> list[tuple[str, str]]:
        """Read the verbs and states of the barrier's rows."""
        return self._read(
            "SELECT verb, state FROM amends_barrier WHERE saga_id = %s ORDER BY verb", saga_id
        )

    def stores(self) -> list[tuple[str, int]]:
        """Read what is stored of each store's word."""
        return self._read("SELECT store_id, oldest_open_at_ms FROM amends_barrier_stores")

    def make_older(self, saga_id: str, by_ms: int) -> None:
        """Move rows into the past, as if they had been written then."""
        self.database.execute(
            "UPDATE amends_barrier SET written_at_ms = written_at_ms - %s WHERE saga_id = %s",
            by_ms,
            saga_id,
        )

    def reborn(self) -> PostgresLedger:
        """Give the same participant as a new process would have it."""
        return PostgresLedger(self.database, self.kind)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Asker]:
        """Serve it, and connect."""
        async with serve(self.participant) as server, asking(server.address) as asker:
            yield asker

    def _read(self, statement: Any, *values: object) -> list[Any]:
        return self.database.execute(statement, *values)

    def _register(self, decorate: Callable[[Any], Any]) -> Callable[[Told], Told]:
        def register(told: Told) -> Told:
            decorate(HANDLERS[self.kind](told))
            return told

        return register


def for_asyncpg(told: Told) -> Callable[..., object]:
    """Make an `async def` handler for asyncpg of one that is the same for every database."""

    async def handler(call: Call, connection: asyncpg.Connection[Any]) -> object:
        entries: list[str] = []
        try:
            return told(call, entries.append)
        finally:
            for values in lines(call, entries):
                await connection.execute(
                    "INSERT INTO ledger (saga_id, entry, amount) VALUES ($1, $2, $3)", *values
                )

    return handler


def for_psycopg(told: Told) -> Callable[..., object]:
    """Make an `async def` handler for psycopg."""

    async def handler(call: Call, connection: psycopg.AsyncConnection) -> object:
        entries: list[str] = []
        try:
            return told(call, entries.append)
        finally:
            for values in lines(call, entries):
                await connection.execute(
                    "INSERT INTO ledger (saga_id, entry, amount) VALUES (%s, %s, %s)", values
                )

    return handler


def for_threads(told: Told) -> Callable[..., object]:
    """Make a `def` handler for psycopg."""

    def handler(call: Call, connection: psycopg.Connection) -> object:
        def write(entry: str) -> None:
            [values] = lines(call, [entry])
            connection.execute(
                "INSERT INTO ledger (saga_id, entry, amount) VALUES (%s, %s, %s)", values
            )

        return told(call, write)

    return handler


def lines(call: Call, entries: list[str]) -> Iterator[tuple[str, str, int]]:
    """Give the values of the ledger's lines."""
    for entry in entries:
        yield call.saga_id, entry, call.json()["amount"]


HANDLERS: dict[Kind, Callable[[Told], Callable[..., object]]] = {
    "asyncpg": for_asyncpg,
    "psycopg": for_psycopg,
    "psycopg in threads": for_threads,
}
