"""What a role needs that is not the owner of everything, and what it is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import psycopg
import pytest

from amends import BarrierError, PostgresBarrier, PreparedTransactions, Verb
from amends.barrier.postgres import Driver
from tests.participants.branch import SCHEMA, Branch, said
from tests.postgres import Postgres

Make: TypeAlias = type[PostgresBarrier] | type[PreparedTransactions]

makes = pytest.mark.parametrize("make", [PostgresBarrier, PreparedTransactions])
drivers = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@pytest.fixture
def teller(postgres: Postgres) -> Iterator[str]:
    """Give the DSN of a role that may connect, and nothing else."""
    postgres.execute("CREATE ROLE teller LOGIN PASSWORD 'teller'")
    postgres.execute("GRANT USAGE ON SCHEMA public TO teller")
    try:
        yield re.sub(r"//[^@]*@", "//teller:teller@", postgres.dsn)
    finally:
        with psycopg.connect(postgres.dsn, autocommit=True) as connection:
            connection.execute("DROP OWNED BY teller")
            connection.execute("DROP ROLE teller")


async def refusal(barrier: PostgresBarrier | PreparedTransactions) -> str:
    """Say why it does not open."""
    with pytest.raises(BarrierError) as caught:
        await barrier.open()
    return str(caught.value)


def grants_in(text: str) -> list[Any]:
    """Give the commands that a refusal names."""
    return re.findall(r"GRANT .* TO \"teller\"", text.replace(", or start", "\n"))


@makes
@drivers
async def test_who_may_not_make_the_tables_is_told_the_grant(
    postgres: Postgres, teller: str, make: Make, driver: Driver
) -> None:
    """Both ways: the right to make them, or what another role has made."""
    told = await refusal(make(teller, driver=driver))
    may_create, may_use = grants_in(told)
    assert may_create == 'GRANT CREATE ON SCHEMA "public" TO "teller"'
    async with make(postgres.dsn, driver=driver):
        pass
    told = await refusal(make(teller, driver=driver))
    assert grants_in(told) == [may_use]
    postgres.connection.execute(may_use)
    async with make(teller, driver=driver) as barrier:
        assert await barrier.purge(0) == 0
    postgres.execute("DROP SCHEMA public CASCADE")
    postgres.execute("CREATE SCHEMA public")
    postgres.execute("GRANT USAGE ON SCHEMA public TO teller")
    postgres.connection.execute(may_create)
    async with make(teller, driver=driver):
        pass


@makes
async def test_a_schema_wants_a_right_of_its_own(
    postgres: Postgres, teller: str, make: Make
) -> None:
    """CREATE TABLE IF NOT EXISTS is refused, too, where the table is there."""
    async with make(postgres.dsn, schema=SCHEMA):
        pass
    names = postgres.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
    for (name,) in names:
        postgres.connection.execute(f"GRANT ALL ON {name} TO teller")
    told = await refusal(make(teller, schema=SCHEMA))
    assert "a statement of your `schema`: " in told
    assert "permission denied for schema public" in told
    assert "leave it out here" in told
    async with make(teller):
        pass


async def test_a_right_that_is_taken_away_is_named(postgres: Postgres, teller: str) -> None:
    """A purge wants one that no call does."""
    async with PostgresBarrier(postgres.dsn):
        pass
    postgres.execute(
        "GRANT SELECT, INSERT, UPDATE ON amends_barrier, amends_barrier_stores TO teller"
    )
    async with PostgresBarrier(teller) as barrier:
        with pytest.raises(BarrierError, match="needs SELECT, INSERT, UPDATE and DELETE"):
            await barrier.purge(0)


async def test_votes_want_no_more_than_that(postgres: Postgres, teller: str) -> None:
    """A role with the page's rights votes, commits, rolls back and says what is in doubt."""
    async with PreparedTransactions(postgres.dsn, schema=SCHEMA):
        pass
    postgres.execute("GRANT SELECT, UPDATE ON accounts TO teller")
    postgres.execute(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON amends_votes, amends_votes_stores TO teller"
    )
    branch = Branch(postgres, dsn=teller, options={"schema": ""})
    async with branch.barrier:
        assert said(await branch.ask(Verb.PREPARE, oldest_open_at_ms=1)) == "Done"
        assert len(await branch.barrier.in_doubt()) == 1
        assert said(await branch.ask(Verb.EXECUTE, oldest_open_at_ms=2)) == "Done"
        assert said(await branch.ask(Verb.PREPARE, saga_id="ben")) == "Done"
        assert said(await branch.ask(Verb.COMPENSATE, saga_id="ben")) == "Done"
        assert await branch.barrier.purge(0) == 0
    assert branch.cents == 95
