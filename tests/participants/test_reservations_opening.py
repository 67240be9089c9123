"""Reservations look at the author's table when the barrier is opened: a vote is a promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from amends import BarrierError, Participant, Reservations, SqliteBarrier
from amends.barrier.postgres import PostgresBarrier
from tests.participants.bank import ACCOUNTS, EXECUTE, PREPARE, Bank, Look, filled, hold_of, look_at
from tests.postgres import Postgres

UNIQUE = "is not unique: the key of a reservation must be"

TABLES_OF_SQLITE = {
    "no index": ("CREATE TABLE accounts (account TEXT, balance_cents INTEGER)", UNIQUE),
    "an index that is not unique": (
        (
            "CREATE TABLE accounts (account TEXT, balance_cents INTEGER);"
            "CREATE INDEX some ON accounts (account)"
        ),
        UNIQUE,
    ),
    "unique with another": (
        (
            "CREATE TABLE accounts (account TEXT, currency TEXT, balance_cents INTEGER,"
            " PRIMARY KEY (account, currency))"
        ),
        UNIQUE,
    ),
    "unique in part": (
        (
            "CREATE TABLE accounts (account TEXT, balance_cents INTEGER);"
            "CREATE UNIQUE INDEX some ON accounts (account) WHERE balance_cents > 0"
        ),
        UNIQUE,
    ),
    "unique by an expression": (
        (
            "CREATE TABLE accounts (account TEXT, balance_cents INTEGER);"
            "CREATE UNIQUE INDEX some ON accounts (lower(account))"
        ),
        UNIQUE,
    ),
    "another column is the key": (
        "CREATE TABLE accounts (no INTEGER PRIMARY KEY, account TEXT, balance_cents INTEGER)",
        UNIQUE,
    ),
    "a number with a point": (
        "CREATE TABLE accounts (account REAL PRIMARY KEY, balance_cents INTEGER)",
        "neither as a text nor as a whole number",
    ),
    "bytes": (
        "CREATE TABLE accounts (account BLOB PRIMARY KEY, balance_cents INTEGER)",
        "neither as a text nor as a whole number",
    ),
    "a generated key": (
        (
            "CREATE TABLE accounts (name TEXT, balance_cents INTEGER,"
            " account TEXT AS (lower(name)) STORED UNIQUE)"
        ),
        "generated column",
    ),
    "a generated quantity": (
        (
            "CREATE TABLE accounts (account TEXT PRIMARY KEY, euros INTEGER,"
            " balance_cents INTEGER AS (100 * euros))"
        ),
        "generated column",
    ),
    "a TEMP table": (
        "CREATE TEMP TABLE accounts (account TEXT PRIMARY KEY, balance_cents INTEGER)",
        "hidden by a TEMP table",
    ),
    "a TEMP table before another": (
        (
            "CREATE TABLE accounts (account TEXT PRIMARY KEY, balance_cents INTEGER);"
            "CREATE TEMP TABLE Accounts (account TEXT PRIMARY KEY, balance_cents INTEGER)"
        ),
        "hidden by a TEMP table",
    ),
    "a virtual table": (
        "CREATE VIRTUAL TABLE accounts USING fts5 (account, balance_cents)",
        "is a virtual table",
    ),
    "holds of another version": (
        ACCOUNTS + "CREATE TABLE amends_reservations (pool TEXT, key TEXT)",
        "made by another version of amends",
    ),
}


@pytest.mark.parametrize("kind", list(TABLES_OF_SQLITE))
async def test_a_table_of_sqlite_that_cannot_be_reserved_from_is_refused(
    tmp_path: Path, kind: str
) -> None:
    """It is said what is wrong with it, before anything is voted on."""
    schema, said = TABLES_OF_SQLITE[kind]
    barrier = SqliteBarrier(tmp_path / "bank.db", schema=schema)
    Bank(barrier, look_at(tmp_path / "bank.db"))
    with pytest.raises(BarrierError, match=said):
        await barrier.open()


@pytest.mark.parametrize(
    ("schema", "account"),
    [
        ("CREATE TABLE accounts (account INTEGER PRIMARY KEY, balance_cents INTEGER)", 7),
        ("CREATE TABLE accounts (account INT UNIQUE, balance_cents INTEGER)", 7),
        (
            "CREATE TABLE accounts (no INTEGER PRIMARY KEY, account VARCHAR UNIQUE, balance_cents)",
            7,
        ),
        (
            (
                "CREATE TABLE accounts (Account UUID, balance_cents INT, PRIMARY KEY (account))"
                " WITHOUT ROWID"
            ),
            "0190a2f0-0000-7000-8000-000000000001",
        ),
        (
            (
                "CREATE TABLE accounts (account TEXT NOT NULL, balance_cents INT) STRICT;"
                "CREATE UNIQUE INDEX some ON accounts (account)"
            ),
            "a",
        ),
    ],
)
async def test_a_table_of_sqlite_that_can_be_reserved_from(
    tmp_path: Path, schema: str, account: object
) -> None:
    """However its key has come to be unique, and opened again and again."""
    path = tmp_path / "bank.db"
    once = schema.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS").replace(
        "UNIQUE INDEX", "UNIQUE INDEX IF NOT EXISTS"
    )
    look = look_at(path)
    insert = f"INSERT INTO accounts (account, balance_cents) VALUES ('{account}', 9)"  # noqa: S608
    for opening in range(2):
        barrier = SqliteBarrier(path, schema=once)
        bank = Bank(barrier, look)
        async with barrier:
            if opening == 0:
                look(insert)
            saga_id = f"t-{opening}"
            assert await bank.say(PREPARE, account=account, cents=4, saga_id=saga_id) == "done"
            assert await bank.say(EXECUTE, account=account, cents=4, saga_id=saga_id) == "done"
    assert look("SELECT balance_cents FROM accounts") == [(1,)]


TABLES_OF_POSTGRESQL = {
    "no index": ("CREATE TABLE accounts (account text, balance_cents bigint)", UNIQUE),
    "an index that is not unique": (
        (
            "CREATE TABLE accounts (account text, balance_cents bigint);"
            "CREATE INDEX ON accounts (account)"
        ),
        UNIQUE,
    ),
    "unique with another": (
        (
            "CREATE TABLE accounts (account text, currency text, balance_cents bigint,"
            " PRIMARY KEY (account, currency))"
        ),
        UNIQUE,
    ),
    "unique in part": (
        (
            "CREATE TABLE accounts (account text, balance_cents bigint);"
            "CREATE UNIQUE INDEX ON accounts (account) WHERE balance_cents > 0"
        ),
        UNIQUE,
    ),
    "unique by an expression": (
        (
            "CREATE TABLE accounts (account text, balance_cents bigint);"
            "CREATE UNIQUE INDEX ON accounts (lower(account))"
        ),
        UNIQUE,
    ),
    "another column is the key": (
        "CREATE TABLE accounts (no int PRIMARY KEY, account text, balance_cents bigint)",
        UNIQUE,
    ),
    "a number with a point": (
        "CREATE TABLE accounts (account float8 PRIMARY KEY, balance_cents bigint)",
        "account of accounts is double precision",
    ),
    "a time": (
        "CREATE TABLE accounts (account timestamptz PRIMARY KEY, balance_cents bigint)",
        "account of accounts is timestamp with time zone",
    ),
    "a generated key": (
        (
            "CREATE TABLE accounts (name text, balance_cents bigint,"
            " account text GENERATED ALWAYS AS (lower(name)) STORED UNIQUE)"
        ),
        "generated column",
    ),
    "a generated quantity": (
        (
            "CREATE TABLE accounts (account text PRIMARY KEY, euros bigint,"
            " balance_cents bigint GENERATED ALWAYS AS (100 * euros) STORED)"
        ),
        "generated column, which no reservation can change",
    ),
    "an identity for a quantity": (
        (
            "CREATE TABLE accounts (account text PRIMARY KEY,"
            " balance_cents bigint GENERATED ALWAYS AS IDENTITY)"
        ),
        "GENERATED ALWAYS, which no reservation can change",
    ),
    "a TEMP table": (
        "CREATE TEMP TABLE accounts (account text PRIMARY KEY, balance_cents bigint)",
        "a TEMP table, which forgets",
    ),
    "an UNLOGGED table": (
        "CREATE UNLOGGED TABLE accounts (account text PRIMARY KEY, balance_cents bigint)",
        "UNLOGGED, so that a crash empties it",
    ),
    "a part that is UNLOGGED": (
        (
            "CREATE TABLE accounts (account text PRIMARY KEY, balance_cents bigint)"
            " PARTITION BY HASH (account);"
            "CREATE UNLOGGED TABLE rich PARTITION OF accounts"
            " FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        ),
        "UNLOGGED, so that a crash empties it",
    ),
    "holds of another version": (
        ACCOUNTS + "CREATE TABLE amends_reservations (pool text, key text)",
        "public.amends_reservations was made by another version of amends",
    ),
}


@pytest.mark.parametrize("kind", list(TABLES_OF_POSTGRESQL))
async def test_a_table_of_postgresql_that_cannot_be_reserved_from_is_refused(
    postgres: Postgres, kind: str
) -> None:
    """The same, and what only PostgreSQL has."""
    schema, said = TABLES_OF_POSTGRESQL[kind]
    barrier = PostgresBarrier(postgres.dsn, schema=schema)
    Bank(barrier, cast("Look", postgres.execute))
    with pytest.raises(BarrierError, match=said):
        await barrier.open()
    assert postgres.execute("SELECT to_regclass('accounts')") == [(None,)], "nothing is half made"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("schema", ['we"ird', "50%s", "what?", "{lock}{key}", "Ümlaut x"])
async def test_a_schema_may_have_any_name(postgres: Postgres, schema: str, driver: Any) -> None:
    """It is found by the search path, and what lies beside the table is named with it."""
    quoted = '"' + schema.replace('"', '""') + '"'
    execute: Any = postgres.execute
    execute(f"CREATE SCHEMA {quoted}")
    execute(f"ALTER DATABASE {postgres.database} SET search_path = {quoted}")
    barrier = PostgresBarrier(postgres.dsn, driver=driver, schema=filled())
    bank = Bank(barrier, lambda text: execute(text.replace("FROM ", f"FROM {quoted}.")))
    async with barrier:
        assert await bank.say(PREPARE) == "done"
        assert bank.held() == [("t-1", "takes", "a", 30)]
        (vote,) = await bank.holds.in_doubt(0)
        assert vote.saga_id == "t-1"
        assert await bank.say(EXECUTE) == "done"
        assert bank.balances()["a"] == 70


# ------------------------------------------------------------------------------- one row, one key

TWO_KEYS = (
    "CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, iban TEXT NOT NULL UNIQUE,"
    " balance_cents BIGINT NOT NULL);"
    "INSERT INTO accounts VALUES ('a', 'XX01', 100) ON CONFLICT DO NOTHING;"
)


def barrier_of(kind: str, path: Path, request: pytest.FixtureRequest) -> Any:
    """Make a barrier on either database."""
    if kind == "sqlite":
        return SqliteBarrier(path / "bank.db", schema=TWO_KEYS)
    return PostgresBarrier(request.getfixturevalue("postgres").dsn, schema=TWO_KEYS)


def reserving(barrier: Any, key: str) -> Participant:
    """Make a participant that knows the accounts by a column."""
    participant = Participant("bank", barrier=barrier)
    holds = Reservations("accounts", key=key, quantity="balance_cents")
    holds.takes(participant, f"debit_{key}", hold_of)
    return participant


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_row_is_known_by_one_key(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Now, and by whoever opens later: by two keys the same money would be held twice."""
    first = barrier_of(kind, tmp_path, request)
    reserving(first, "account")
    async with first:
        pass
    second = barrier_of(kind, tmp_path, request)
    reserving(second, "iban")
    with pytest.raises(
        BarrierError, match=r"one row that is known by two keys would be held twice"
    ):
        await second.open()
    third = barrier_of(kind, tmp_path, request)
    reserving(third, "account")
    async with third:
        pass


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_two_keys_of_one_row_in_one_program_are_refused(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Two actions of one participant are as bad as two participants."""
    barrier = barrier_of(kind, tmp_path, request)
    participant = reserving(barrier, "account")
    holds = Reservations("accounts", key="iban", quantity="balance_cents")
    holds.takes(participant, "direct_debit", hold_of)
    with pytest.raises(BarrierError, match="the same key everywhere"):
        await barrier.open()
