"""Reservations in PostgreSQL: what several connections at once and its types make of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import psycopg
import pytest

from amends import BarrierError, Decision, InvalidReservation, Participant, Reservations
from amends.barrier.postgres import Driver, PostgresBarrier
from tests.participants.bank import (
    ACCOUNTS,
    COMPENSATE,
    EXECUTE,
    PREPARE,
    Bank,
    Look,
    filled,
    hold_of,
    postgres_bank,
)
from tests.participants.transfers import Courses, Deed
from tests.postgres import Postgres

DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@contextmanager
def somebody_at(postgres: Postgres, account: str) -> Iterator[psycopg.Connection[Any]]:
    """Lock an account's row, as other code of the author's does."""
    with psycopg.connect(postgres.dsn) as connection:
        connection.execute("SELECT 1 FROM accounts WHERE account = %s FOR UPDATE", (account,))
        yield connection
        connection.rollback()


@DRIVERS
@pytest.mark.parametrize("lock_timeout_s", [0, 0.02], ids=["at once", "soon"])
async def test_a_row_that_is_locked_is_a_no_and_in_phase_2_not_yet(
    postgres: Postgres, driver: Driver, lock_timeout_s: float
) -> None:
    """A vote says LOCKED and holds nothing; who has promised asks again until the row is free."""
    async with postgres_bank(postgres, driver, lock_timeout_s=lock_timeout_s) as bank:
        assert await bank.say(PREPARE) == "done"
        with somebody_at(postgres, "a"):
            assert await bank.say(PREPARE, saga_id="t-2") == "rejected LOCKED"
            assert await bank.say(PREPARE, account="b", saga_id="t-3") == "done"
            assert await bank.say(EXECUTE) == "in_progress"
            (vote, _) = await bank.holds.in_doubt(0)
            assert not await bank.holds.resolve(vote, Decision.COMMIT)
            assert await bank.say(COMPENSATE, account="b", saga_id="t-3") == "done"
        assert await bank.say(EXECUTE) == "done"
        assert await bank.say(PREPARE, saga_id="t-2") == "rejected LOCKED", "the no is stored"
        assert await bank.say(PREPARE, saga_id="t-2", round=2) == "done"
        assert bank.balances()["a"] == 70


@DRIVERS
async def test_the_books_balance_over_many_connections(postgres: Postgres, driver: Driver) -> None:
    """Transfers in all directions at the same time, in any order: votes never count twice."""
    async with postgres_bank(postgres, driver) as bank:
        courses = Courses(bank)
        chance = random.Random(7)  # noqa: S311  # the same course each time
        everything = [
            Deed(transfer, action, does)
            for transfer in range(len(Courses.WANTS))
            for action in ("debit", "credit")
            for does in ("prepare", "end", "resolve")
        ]
        for _ in range(12):
            await asyncio.gather(*map(courses.do, chance.sample(everything, 8)))
            courses.check()
        await courses.finish()


@DRIVERS
async def test_a_hundred_votes_on_one_account_hold_what_is_there(
    postgres: Postgres, driver: Driver
) -> None:
    """All at once: yes, insufficient or LOCKED, and the yeses are never more than there is."""
    async with postgres_bank(postgres, driver) as bank:
        said = await asyncio.gather(
            *(bank.until_said(PREPARE, saga_id=f"t-{number}", cents=9) for number in range(100))
        )
        assert 1 <= said.count("done") <= 11
        assert set(said) <= {"done", "rejected insufficient", "rejected LOCKED"}
        assert sum(amount for *_, amount in bank.held()) == 9 * said.count("done")


async def test_code_outside_of_sagas_locks_what_it_looks_at(postgres: Postgres) -> None:
    """What is available stays so until its transaction ends; one that only looks locks nothing."""
    async with postgres_bank(postgres, "asyncpg", lock_timeout_s=0) as bank:
        await bank.say(PREPARE, cents=60)

        async def look(connection: Any) -> str:
            assert await bank.holds.available(connection, "nobody") is None
            assert await bank.holds.available(connection, "a", lock=False) == 40
            assert await bank.say(PREPARE, saga_id="t-2", cents=1) == "done"
            assert await bank.holds.available(connection, "a") == 39
            return await bank.say(PREPARE, saga_id="t-3", cents=1)

        write: Any = bank.barrier.write
        assert await write(look) == "rejected LOCKED"


async def test_a_transaction_of_old_snapshots_is_refused(postgres: Postgres) -> None:
    """In repeatable read the sum of the holds is as old as the transaction."""
    async with (
        postgres_bank(postgres, "psycopg") as bank,
        await psycopg.AsyncConnection.connect(postgres.dsn) as connection,
    ):
        await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        with pytest.raises(InvalidReservation, match="repeatable read"):
            await bank.holds.available(connection, "a")


@dataclass(frozen=True)
class Kind:
    """What an author's columns are."""

    key: str
    quantity: str
    account: str | int
    most: int

    def __str__(self) -> str:
        return f"{self.key} and {self.quantity}"


@DRIVERS
@pytest.mark.parametrize(
    "kind",
    [
        Kind("text", "smallint", "a", 2**15 - 1),
        Kind("integer", "integer", 7, 2**31 - 1),
        Kind("uuid", "bigint", "0190a2f0-0000-7000-8000-000000000001", 2**63 - 1),
    ],
    ids=str,
)
async def test_columns_of_all_kinds(postgres: Postgres, driver: Driver, kind: Kind) -> None:
    """The key is of the column's own type, and no sum is promised that the column cannot hold."""
    schema = (
        f"CREATE TABLE accounts (account {kind.key} PRIMARY KEY, "
        f"balance_cents {kind.quantity} NOT NULL);"
    )
    account, most = kind.account, kind.most
    barrier = PostgresBarrier(
        postgres.dsn, driver=driver, schema=filled(schema, {str(account): most - 5})
    )
    bank = Bank(barrier, cast("Look", postgres.execute))
    async with barrier:
        assert await bank.say(PREPARE, "credit", account=account, cents=5) == "done"
        assert await bank.say(PREPARE, "credit", account=account, cents=1, saga_id="t-2") == (
            "rejected too_much"
        )
        assert await bank.say(PREPARE, "debit", account="no such", cents=1) == (
            "rejected unknown_key"
        )
        assert await bank.say(PREPARE, "debit", account=account, cents=6, saga_id="t-3") == "done"
        assert await bank.say(EXECUTE, "credit", account=account, cents=5) == "done"
        assert await bank.say(EXECUTE, "debit", account=account, cents=6, saga_id="t-3") == "done"
    assert list(bank.balances().values()) == [most - 6]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"table": "acounts"}, "acounts"),
        ({"table": "nowhere.accounts"}, "nowhere"),
        ({"key": "acount"}, "acount"),
        ({"quantity": "balance"}, "balance"),
        ({"quantity": "rate"}, "numeric: make it a bigint"),
    ],
    ids=["table", "schema", "key", "quantity", "kind"],
)
async def test_a_table_that_is_not_so_is_found_at_the_opening_of_postgresql(
    postgres: Postgres, names: dict[str, str], said: str
) -> None:
    """The same, and it also knows that a column is none for whole numbers."""
    good = {"table": "public.accounts", "key": "account", "quantity": "balance_cents"} | names
    schema = f"{ACCOUNTS}; ALTER TABLE accounts ADD COLUMN IF NOT EXISTS rate NUMERIC"
    barrier = PostgresBarrier(postgres.dsn, schema=schema)
    holds = Reservations(good["table"], key=good["key"], quantity=good["quantity"])
    holds.takes(Participant("bank", barrier=barrier), "debit", hold_of)
    with pytest.raises(BarrierError, match=said):
        await barrier.open()


@DRIVERS
async def test_one_table_spelled_in_two_ways_is_one_table(
    postgres: Postgres, driver: Driver
) -> None:
    """With its schema and without: holds made by both spellings count on the same money."""
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=filled())
    bank = Bank(barrier, cast("Look", postgres.execute))
    whole = Reservations("public.accounts", key="account", quantity="balance_cents")
    whole.takes(bank.participant, "fee", hold_of)
    bank.handlers = bank.participant.handlers()
    async with barrier:
        assert await bank.say(PREPARE, cents=60) == "done"
        assert await bank.say(PREPARE, "fee", cents=41) == "rejected insufficient"
        assert await bank.say(PREPARE, "fee", cents=40, saga_id="t-2") == "done"
        assert len(await bank.holds.in_doubt(0)) == len(await whole.in_doubt(0)) == 2
        assert await bank.say(EXECUTE, "fee", cents=40, saga_id="t-2") == "done"
        assert await bank.say(EXECUTE, cents=60) == "done"
    assert bank.balances()["a"] == 0


PARTITIONED = """
CREATE TABLE accounts (account TEXT PRIMARY KEY, balance_cents BIGINT) PARTITION BY HASH (account);
CREATE TABLE rich PARTITION OF accounts FOR VALUES WITH (MODULUS 1, REMAINDER 0);
INSERT INTO accounts VALUES ('a', 100)
"""


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (ACCOUNTS + "CREATE VIEW rich AS TABLE accounts", "rich is no table: name the table"),
        (ACCOUNTS + "CREATE TABLE rich () INHERITS (accounts)", "child of another table: name the"),
        (PARTITIONED, "rich is a partition .* name the topmost one"),
    ],
    ids=["view", "child", "partition"],
)
async def test_a_part_of_a_table_is_refused_at_the_opening(
    postgres: Postgres, schema: str, said: str
) -> None:
    """Its rows are another table's: its holds and those on that table would not see each other."""
    barrier = PostgresBarrier(postgres.dsn, schema=schema)
    holds = Reservations("rich", key="account", quantity="balance_cents")
    holds.takes(Participant("bank", barrier=barrier), "debit", hold_of)
    with pytest.raises(BarrierError, match=said):
        await barrier.open()


@DRIVERS
async def test_a_table_of_many_parts_is_one_table(postgres: Postgres, driver: Driver) -> None:
    """Reservations name the topmost one."""
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=PARTITIONED)
    bank = Bank(barrier, cast("Look", postgres.execute))
    async with barrier:
        assert await bank.say(PREPARE, cents=60) == "done"
        assert await bank.say(PREPARE, cents=41, saga_id="t-2") == "rejected insufficient"
        assert await bank.say(EXECUTE, cents=60) == "done"
    assert bank.balances() == {"a": 40}


@DRIVERS
async def test_a_yes_can_be_confirmed_whatever_the_width(
    postgres: Postgres, driver: Driver
) -> None:
    """The amount is wider than the column, and the sum fits: what was promised is done."""
    schema = (
        "CREATE TABLE accounts (account text PRIMARY KEY, balance_cents smallint NOT NULL);"
        "INSERT INTO accounts VALUES ('a', -32000)"
    )
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=schema)
    bank = Bank(barrier, cast("Look", postgres.execute))
    async with barrier:
        assert await bank.say(PREPARE, "credit", cents=64_000) == "done"
        assert await bank.say(EXECUTE, "credit", cents=64_000) == "done"
    assert bank.balances() == {"a": 32_000}


@DRIVERS
async def test_opening_needs_no_right_to_make_what_is_there(
    postgres: Postgres, driver: Driver
) -> None:
    """A migration has made the tables; the participant's role may read and write them."""
    async with postgres_bank(postgres, driver):
        pass
    postgres.execute("CREATE ROLE teller LOGIN PASSWORD 'x'")
    try:
        postgres.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        postgres.execute("GRANT USAGE ON SCHEMA public TO teller")
        postgres.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO teller")
        postgres.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO teller")
        _, _, where = postgres.dsn.partition("@")
        barrier = PostgresBarrier(f"postgresql://teller:x@{where}", driver=driver)
        bank = Bank(barrier, cast("Look", postgres.execute))
        async with barrier:
            assert await bank.say(PREPARE) == "done"
            assert await bank.say(EXECUTE) == "done"
    finally:
        postgres.execute("DROP OWNED BY teller")
        postgres.execute("DROP ROLE teller")


async def test_opening_is_in_no_votes_way(postgres: Postgres) -> None:
    """A rolling restart: a vote is at work, a second process opens, others vote meanwhile."""
    async with postgres_bank(postgres, "asyncpg") as bank:
        with psycopg.connect(postgres.dsn) as other:
            other.execute("LOCK TABLE amends_reservations IN ROW EXCLUSIVE MODE")
            second = Bank(PostgresBarrier(postgres.dsn), cast("Look", postgres.execute))
            async with second.barrier:
                assert await second.say(PREPARE, account="b", cents=1) == "done"
            other.rollback()
        assert await bank.say(EXECUTE, account="b", cents=1) == "done"


@DRIVERS
async def test_who_refers_to_a_row_is_in_nobodys_way(postgres: Postgres, driver: Driver) -> None:
    """A foreign key locks the row's key alone, which no reservation changes."""
    async with postgres_bank(postgres, driver, lock_timeout_s=0) as bank:
        postgres.execute("CREATE TABLE lines (account text REFERENCES accounts)")
        with psycopg.connect(postgres.dsn) as other:
            other.execute("INSERT INTO lines VALUES ('a')")
            assert await bank.say(PREPARE) == "done"
            assert await bank.say(EXECUTE) == "done"
            other.rollback()


@DRIVERS
async def test_what_is_available_is_of_one_moment(postgres: Postgres, driver: Driver) -> None:
    """100, of which 30 are held: 70 are free, before, during and after the confirmation."""
    async with postgres_bank(postgres, driver) as bank:
        assert await bank.say(PREPARE, cents=30) == "done"
        holds = bank.holds._bound()[0]

        async def look(connection: Any) -> int | None:
            steps = holds.available("a", lock=False)
            ask = next(steps)
            rows = await holds.dialect.fetch(connection, ask)
            assert await bank.say(EXECUTE, cents=30) == "done"  # by another connection
            while True:
                try:
                    ask = steps.send(rows)
                except StopIteration as end:
                    free: int | None = end.value
                    return free
                rows = await holds.dialect.fetch(connection, ask)

        write: Any = bank.barrier.write
        assert await write(look) == 70
