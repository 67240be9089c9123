"""A branch of a bank on PreparedTransactions: its one action moves money, its accounts add up."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import asyncpg
import psycopg

from amends import (
    Call,
    Done,
    InProgress,
    Participant,
    PreparedTransactions,
    Rejected,
    Verb,
    serve,
)
from amends.outcomes import Outcome
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from amends.wire import call_from_wire
from tests.participants.asking import Asker, asking, call_message
from tests.postgres import Postgres

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (account text PRIMARY KEY, cents bigint CHECK (cents >= 0));
INSERT INTO accounts VALUES ('ann', 100), ('ben', 100) ON CONFLICT DO NOTHING
"""

STORE = str(uuid.UUID(int=1))
INCARNATION = str(uuid.UUID(int=2))

Kind: TypeAlias = Literal["asyncpg", "psycopg", "psycopg def"]
"""Which driver, and which kind of handler."""

KINDS: tuple[Kind, ...] = ("asyncpg", "psycopg", "psycopg def")

MOVE = "UPDATE accounts SET cents = cents - {0} WHERE account = {1} AND cents >= {0}"
MOVE_1 = MOVE.format("$1", "$2")
MOVE_P = MOVE.format("%(cents)s", "%(account)s")


def message(
    verb: Verb,
    *,
    saga_id: str = "transfer-1",
    step: str = "debit",
    executed: bool = False,
    two_phase: bool = True,
    store_id: str = STORE,
    incarnation: str = INCARNATION,
    oldest_open_at_ms: int = 0,
    attempt: int = 1,
    round: int = 1,  # noqa: A002  # the contract's word
    amount: int = 5,
    action: str = "debit",
) -> pb.Call:
    """Make a call of a two-phase commit, as the runtime sends it."""
    call = call_message(
        verb,
        action=action,
        saga_id=saga_id,
        step=step,
        executed=executed,
        store_id=store_id,
        oldest_open_at_ms=oldest_open_at_ms,
        attempt=attempt,
        round=round,
        amount=amount,
    )
    call.incarnation = incarnation
    if two_phase:
        call.mode = types_pb2.MODE_TWO_PHASE_COMMIT
    return call


def call_of(verb: Verb, **changes: Any) -> Call:
    """Make the same as the barrier sees it."""
    return call_from_wire(message(verb, **changes))


@dataclass
class Branch:
    """The participant ``bank``, with the action ``debit``, which takes an amount from ``ann``.

    Sagas whose id begins with ``ben`` take it from him.
    """

    postgres: Postgres
    kind: Kind = "asyncpg"
    options: dict[str, Any] = field(default_factory=dict)
    ran: int = 0
    """How often a handler has begun."""
    before: Callable[[Call, Any], Awaitable[object]] | None = None
    """What an `async def` handler does first, and gives if it is not None."""
    dsn: str = ""
    """How it connects, if not as everybody does."""

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"schema": SCHEMA, "max_connections": 4, **self.options}
        driver: Literal["asyncpg", "psycopg"] = "asyncpg" if self.kind == "asyncpg" else "psycopg"
        self.barrier = PreparedTransactions(self.dsn or self.postgres.dsn, driver=driver, **options)
        self.participant = Participant("bank", barrier=self.barrier)
        handlers: dict[str, Callable[[Call, Any], object]] = {
            "asyncpg": self.debit_asyncpg,
            "psycopg": self.debit_psycopg,
            "psycopg def": self.debit_def,
        }
        self.participant.prepare("debit")(handlers[self.kind])

    async def debit_asyncpg(self, call: Call, connection: asyncpg.Connection[Any]) -> object:
        """Take the money, with asyncpg."""
        self.ran += 1
        if self.before is not None and (answer := await self.before(call, connection)) is not None:
            return answer
        status = await connection.execute(MOVE_1, call.json()["amount"], _account(call))
        _enough(is_enough=status == "UPDATE 1")
        return None

    async def debit_psycopg(self, call: Call, connection: psycopg.AsyncConnection[Any]) -> object:
        """Take the money, with psycopg."""
        self.ran += 1
        if self.before is not None and (answer := await self.before(call, connection)) is not None:
            return answer
        values = {"cents": call.json()["amount"], "account": _account(call)}
        cursor = await connection.execute(MOVE_P, values)
        _enough(is_enough=cursor.rowcount == 1)
        return None

    def debit_def(self, call: Call, connection: psycopg.Connection[Any]) -> None:
        """Take the money, with psycopg in a thread."""
        self.ran += 1
        values = {"cents": call.json()["amount"], "account": _account(call)}
        _enough(is_enough=connection.execute(MOVE_P, values).rowcount == 1)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Asker]:
        """Serve it, and connect."""
        async with serve(self.participant) as server, asking(server.address) as asker:
            yield asker

    async def ask(self, verb: Verb, **changes: Any) -> Outcome:
        """Ask the barrier itself, which must be open."""
        handler = self.participant.handlers().get(("debit", verb))
        return await self.barrier.run(call_of(verb, **changes), handler)

    @property
    def cents(self) -> int:
        """What is committed in ann's account."""
        [(cents,)] = self.postgres.execute("SELECT cents FROM accounts WHERE account = 'ann'")
        return int(cents)

    @property
    def listed(self) -> list[str]:
        """What is prepared in the database."""
        return [
            gid
            for (gid,) in self.postgres.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid"
            )
        ]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The sagas and states of the rows that can be seen."""
        return [
            (saga_id, state)
            for saga_id, state in self.postgres.execute(
                "SELECT saga_id, state FROM amends_votes ORDER BY saga_id, round"
            )
        ]


def said(outcome: Outcome) -> str:
    """Say an outcome in a word or two."""
    match outcome:
        case Done() | InProgress():
            return type(outcome).__name__
        case _:
            return f"{type(outcome).__name__} {outcome.reason}"


def _account(call: Call) -> str:
    return "ben" if call.saga_id.startswith("ben") else "ann"


def _enough(*, is_enough: bool) -> None:
    if not is_enough:
        raise Rejected("insufficient", "there is not as much")
