"""Several participants reserve from one table: they share its holds, and each settles its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from amends import (
    Call,
    Decision,
    HandlerFailed,
    Hold,
    Participant,
    Reservations,
    SqliteBarrier,
    Transaction,
    VoteNotSettled,
)
from amends.barrier.postgres import PostgresBarrier
from tests.participants.bank import (
    COMPENSATE,
    EXECUTE,
    PREPARE,
    Bank,
    Look,
    filled,
    hold_of,
    look_at,
)
from tests.postgres import Postgres


class Service:
    """A participant of one name, over the database that all of a test share."""

    def __init__(self, kind: str, path: Path, request: pytest.FixtureRequest) -> None:
        self.path = path / "bank.db"
        self.postgres: Postgres | None = None
        if kind == "postgres":
            self.postgres = request.getfixturevalue("postgres")

    def bank(self, name: str, *, aliases: tuple[str, ...] = ()) -> Bank:
        """Make one that has its own barrier."""
        if self.postgres is None:
            barrier = SqliteBarrier(self.path, schema=filled())
            return Bank(barrier, look_at(self.path), name=name, aliases=aliases)
        look = cast("Look", self.postgres.execute)
        barrier_there = PostgresBarrier(self.postgres.dsn, schema=filled())
        return Bank(barrier_there, look, name=name, aliases=aliases)


@pytest.fixture(params=["sqlite", "postgres"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    """Give what makes participants, on either database."""
    return Service(request.param, tmp_path, request)


async def test_a_strangers_hold_counts_and_is_left_alone(service: Service) -> None:
    """Two participants with one table and the same actions: the money is one, the votes are not."""
    payments, payouts = service.bank("payments"), service.bank("payouts")
    async with payments.barrier, payouts.barrier:
        assert await payouts.say(PREPARE, cents=60) == "done"
        assert await payments.say(PREPARE, cents=41, saga_id="t-2") == "rejected insufficient"
        assert await payments.holds.in_doubt(0) == []
        (vote,) = await payouts.holds.in_doubt(0)
        for decision in (Decision.COMMIT, Decision.ABORT):
            with pytest.raises(VoteNotSettled, match=r"'debit' of participant payouts"):
                await payments.holds.resolve(vote, decision)
        assert await payouts.holds.resolve(vote, Decision.COMMIT)
        assert payouts.balances()["a"] == 40


async def test_who_was_renamed_settles_what_it_held_before(service: Service) -> None:
    """The old name is an alias, as it is for the runtime's calls."""
    before = service.bank("till")
    async with before.barrier:
        assert await before.say(PREPARE) == "done"
    after = service.bank("bank", aliases=("till",))
    async with after.barrier:
        (vote,) = await after.holds.in_doubt(0)
        assert await after.holds.resolve(vote, Decision.COMMIT)
        assert after.balances()["a"] == 70


async def test_two_participants_of_one_program_have_handlers_of_their_own(tmp_path: Path) -> None:
    """One `Reservations`, one barrier, one action name: what is written is of whose vote it was."""
    path = tmp_path / "bank.db"
    barrier = SqliteBarrier(path, schema=filled())
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    written: list[str] = []
    handlers = {}
    for name in ("payments", "payouts"):
        participant = Participant(name, barrier=barrier)

        def note(call: Call, tx: Transaction, hold: Hold, name: str = name) -> None:
            written.append(f"{name} {call.saga_id}")

        holds.takes(participant, "debit", hold_of, on_confirm=note)
        handlers[name] = participant.handlers()
    bank = Bank(SqliteBarrier(tmp_path / "other.db"), look_at(path))
    bank.barrier = barrier
    async with barrier:
        for name, bank.handlers in handlers.items():
            assert await bank.say(PREPARE, saga_id=f"of-{name}", cents=1) == "done"
        for vote in await holds.in_doubt(0):
            assert await holds.resolve(vote, Decision.COMMIT)
    assert written == ["payments of-payments", "payouts of-payouts"]


# ------------------------------------------------------------------------- schemas of PostgreSQL


def service_of_schema(postgres: Postgres, schema: str, *, table: str = "public.accounts") -> Bank:
    """Make a participant whose role has a schema of its own, as ``"$user", public`` leads there."""
    execute: Any = postgres.execute
    execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")

    async def connect() -> asyncpg.Connection[asyncpg.Record]:
        path = {"search_path": f"{schema}, public"}
        return await asyncpg.connect(postgres.dsn, server_settings=path)

    return Bank(PostgresBarrier(connect), cast("Look", execute), name=schema, table=table)


@pytest.mark.parametrize("table", ["accounts", "public.accounts"])
async def test_holds_lie_beside_the_table_whoever_makes_them(
    postgres: Postgres, table: str
) -> None:
    """Two services with schemas of their own, and one table in a third: the money is held once."""
    execute: Any = postgres.execute
    execute(filled())
    first = service_of_schema(postgres, "svc1", table=table)
    second = service_of_schema(postgres, "svc2")
    async with first.barrier, second.barrier:
        assert await first.say(PREPARE, cents=60) == "done"
        assert await second.say(PREPARE, cents=41, saga_id="t-2") == "rejected insufficient"
        assert await second.say(PREPARE, cents=40, saga_id="t-3") == "done"
        assert await first.say(EXECUTE, cents=60) == "done"
        assert await second.say(COMPENSATE, cents=40, saga_id="t-3", executed=True) == "done"
    assert first.balances()["a"] == 40
    made = "SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname = '{}' ORDER BY 1"
    assert execute(made.format("amends_reservations")) == [("public",)]
    assert execute(made.format("amends_barrier")) == [("svc1",), ("svc2",)]


async def test_what_is_free_is_told_to_another_connection(postgres: Postgres) -> None:
    """One whose search path leads elsewhere: it looks there, and changes nothing for the others."""
    execute: Any = postgres.execute
    execute("CREATE SCHEMA elsewhere")
    execute(f"SET search_path = elsewhere; {filled(start={'a': 7})}; RESET search_path")
    bank = Bank(PostgresBarrier(postgres.dsn, schema=filled()), cast("Look", execute))
    other = Bank(PostgresBarrier(postgres.dsn), cast("Look", execute), table="elsewhere.accounts")
    async with bank.barrier, other.barrier:
        connection = await asyncpg.connect(
            postgres.dsn, server_settings={"search_path": "elsewhere"}
        )
        try:
            assert await bank.holds.available(connection, "a") == 7
        finally:
            await connection.close()
        assert await bank.say(PREPARE, cents=100) == "done"
        assert await other.say(PREPARE, cents=8, saga_id="t-2") == "rejected insufficient"


@pytest.mark.parametrize("verb", [EXECUTE, COMPENSATE])
async def test_a_hold_on_another_table_is_not_lost(postgres: Postgres, verb: Any) -> None:
    """Somebody has changed what an action reserves: it is asked again until that is mended."""
    execute: Any = postgres.execute
    execute(filled())
    execute("CREATE SCHEMA moved")
    execute(f"SET search_path = moved; {filled()}; RESET search_path")
    before = Bank(PostgresBarrier(postgres.dsn), cast("Look", execute))
    async with before.barrier:
        assert await before.say(PREPARE) == "done"
    after = Bank(PostgresBarrier(postgres.dsn), cast("Look", execute), table="moved.accounts")
    async with after.barrier:
        with pytest.raises(HandlerFailed, match=r"holds public\.accounts\.balance_cents, and"):
            await after.say(verb, executed=verb is COMPENSATE)
    async with before.barrier:
        assert await before.say(verb, executed=verb is COMPENSATE) == "done"
        assert before.held() == []
