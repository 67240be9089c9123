"""Reservations: what a vote promises about an author's number, and that it is kept exactly."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amends import (
    BarrierError,
    Broken,
    Call,
    Hold,
    InvalidParticipant,
    InvalidReservation,
    Participant,
    PreparedTransactions,
    Rejected,
    Reservations,
    SqliteBarrier,
    Transaction,
)
from tests.participants.asking import call_of
from tests.participants.bank import (
    ACCOUNTS,
    COMPENSATE,
    EXECUTE,
    PREPARE,
    START,
    Bank,
    filled,
    hold_of,
    look_at,
    postgres_bank,
    sqlite_bank,
    vote_call,
)
from tests.participants.transfers import Courses, Deed, deeds

MAX = 2**63 - 1


@pytest.fixture(params=["sqlite", "asyncpg", "psycopg"])
async def bank(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bank]:
    """Give a bank on SQLite, and on PostgreSQL by both drivers."""
    if request.param != "sqlite":
        postgres = request.getfixturevalue("postgres")
        async with postgres_bank(postgres, request.param, journal=True) as bank:
            yield bank
        return
    async with sqlite_bank(tmp_path / "bank.db", share_commits=True, journal=True) as bank:
        yield bank


async def test_a_vote_holds_and_moves_nothing(bank: Bank) -> None:
    """Try writes a hold; the quantity stays, and less of it is available."""
    assert await bank.say(PREPARE, cents=30) == "done"
    assert bank.balances() == START
    assert bank.held() == [("t-1", "takes", "a", 30)]
    assert bank.free()["a"] == 70
    assert await bank.say(PREPARE, cents=70, saga_id="t-2") == "done"
    assert await bank.say(PREPARE, cents=1, saga_id="t-3") == "rejected insufficient"


async def test_confirm_moves_exactly_what_was_held(bank: Bank) -> None:
    """The hold is gone and the quantity is moved, once, however often it is asked."""
    await bank.say(PREPARE, "debit", cents=30)
    await bank.say(PREPARE, "credit", account="b", cents=30)
    for _ in range(3):
        assert await bank.say(EXECUTE, "debit", cents=30) == "done"
        assert await bank.say(EXECUTE, "credit", account="b", cents=30) == "done"
    assert bank.balances() == {"a": 70, "b": 80, "c": 0}
    assert bank.held() == []


async def test_cancel_lets_go(bank: Bank) -> None:
    """Everything is as it was, and the same amount can be held by others."""
    await bank.say(PREPARE, cents=100)
    assert await bank.say(PREPARE, cents=100, saga_id="t-2") == "rejected insufficient"
    for _ in range(2):
        assert await bank.say(COMPENSATE, cents=100, executed=True) == "done"
    assert bank.held() == []
    assert bank.balances() == START
    assert await bank.say(PREPARE, cents=100, saga_id="t-3") == "done"


async def test_what_is_given_is_not_available_before_it_is_confirmed(bank: Bank) -> None:
    """A credit that may still be rolled back cannot be spent."""
    assert await bank.say(PREPARE, "credit", account="c", cents=40) == "done"
    assert await bank.say(PREPARE, account="c", cents=1, saga_id="t-2") == "rejected insufficient"
    assert await bank.say(EXECUTE, "credit", account="c", cents=40) == "done"
    assert await bank.say(PREPARE, account="c", cents=40, saga_id="t-3") == "done"


async def test_a_vote_that_comes_after_its_rollback_holds_nothing(bank: Bank) -> None:
    """The fence refuses it, and there is no hold that nobody would ever lift."""
    assert await bank.say(COMPENSATE) == "done"
    assert await bank.say(PREPARE) == "rejected fenced"
    assert await bank.say(EXECUTE) == "rejected fenced"
    assert bank.held() == []


async def test_a_commit_without_a_vote_is_broken(bank: Bank) -> None:
    """Nothing is made up: neither of a vote that never came nor of one that was refused."""
    assert await bank.say(EXECUTE) == "broken vote_lost"
    assert await bank.say(PREPARE, cents=101, saga_id="t-2") == "rejected insufficient"
    assert await bank.say(EXECUTE, cents=101, saga_id="t-2") == "broken vote_lost"
    assert bank.balances() == START


async def test_a_rollback_of_what_was_committed_says_so(bank: Bank) -> None:
    """A runtime that was restored and decides otherwise must not hear Done."""
    await bank.say(PREPARE)
    await bank.say(EXECUTE)
    for _ in range(2):
        assert await bank.say(COMPENSATE, executed=True) == "heuristic"
    assert await bank.say(EXECUTE) == "done"
    assert bank.balances()["a"] == 70


async def test_a_hold_that_somebody_deleted_is_broken(bank: Bank) -> None:
    """The vote cannot be kept, and that is said; to roll it back there is nothing to do."""
    await bank.say(PREPARE)
    await bank.say(PREPARE, saga_id="t-2")
    bank.look("DELETE FROM amends_reservations")
    assert await bank.say(EXECUTE) == "broken hold_lost"
    assert await bank.say(COMPENSATE, saga_id="t-2", executed=True) == "done"
    assert bank.balances() == START


async def test_a_row_that_was_deleted_is_waited_for(bank: Bank) -> None:
    """Whoever promised tries until the row is there again; nothing is decided meanwhile."""
    await bank.say(PREPARE)
    bank.look("DELETE FROM accounts WHERE account = 'a'")
    with pytest.raises(Exception, match="put it back"):
        await bank.say(EXECUTE)
    assert bank.held() == [("t-1", "takes", "a", 30)]
    bank.look("INSERT INTO accounts VALUES ('a', 31)")
    assert await bank.say(EXECUTE) == "done"
    assert bank.balances()["a"] == 1


NONSENSE = [
    ("nobody", 1, "unknown_key"),
    (7, 1, "unknown_key"),
    ("a", 0, "invalid_amount"),
    ("a", -5, "invalid_amount"),
    ("a", 1.0, "invalid_amount"),
    ("a", True, "invalid_amount"),
    ("a", "5", "invalid_amount"),
    ("a", None, "invalid_amount"),
    ("a", MAX + 1, "invalid_amount"),
    ("a", MAX, "insufficient"),
    ("a\0", 1, "invalid_key"),
    ("\ud800", 1, "invalid_key"),
    ("k" * 513, 1, "invalid_key"),
    (True, 1, "invalid_key"),
    (None, 1, "invalid_key"),
    (["a"], 1, "invalid_key"),
    (2**63, 1, "invalid_key"),
]


async def test_what_cannot_be_wanted_is_a_no(bank: Bank) -> None:
    """A caller's nonsense is refused at once, and the refusal is stored."""
    for number, (account, cents, reason) in enumerate(NONSENSE):
        details: dict[str, Any] = {"account": account, "cents": cents, "saga_id": f"t-{number}"}
        for _ in range(2):
            assert await bank.say(PREPARE, **details) == f"rejected {reason}", (account, cents)
        assert bank.rows(f"t-{number}") == [("debit", "prepare", "rejected")]
    assert bank.held() == []


async def test_a_sum_that_the_column_cannot_hold_is_a_no(bank: Bank) -> None:
    """What is promised to be given is counted too; SQLite would make a float of the sum."""
    assert await bank.say(PREPARE, "credit", cents=MAX - 100) == "done"
    assert await bank.say(PREPARE, "credit", cents=1, saga_id="t-2") == "rejected too_much"
    assert await bank.say(EXECUTE, "credit", cents=MAX - 100) == "done"
    assert bank.balances()["a"] == MAX
    assert await bank.say(PREPARE, "debit", cents=MAX, saga_id="t-3") == "done"


async def test_one_key_written_in_two_ways_is_one_row(tmp_path: Path) -> None:
    """SQLite finds the row 5 of a text column by the number 5: both holds are on that row."""
    path = tmp_path / "bank.db"
    barrier = SqliteBarrier(path, schema=filled(start={"5": 10}))
    bank = Bank(barrier, look_at(path))
    async with barrier:
        assert await bank.say(PREPARE, account=5, cents=6) == "done"
        assert await bank.say(PREPARE, account="5", cents=6, saga_id="t-2") == (
            "rejected insufficient"
        )
        assert bank.held() == [("t-1", "takes", "5", 6)]


async def test_one_table_spelled_in_two_ways_is_one_table(tmp_path: Path) -> None:
    """SQLite's names have no case: holds made by both spellings count on the same money."""
    path = tmp_path / "bank.db"
    bank = Bank(SqliteBarrier(path, schema=filled()), look_at(path))
    shouted = Reservations("ACCOUNTS", key="Account", quantity="Balance_Cents")
    shouted.takes(bank.participant, "fee", hold_of)
    bank.handlers = bank.participant.handlers()
    async with bank.barrier:
        assert await bank.say(PREPARE, cents=60) == "done"
        assert await bank.say(PREPARE, "fee", cents=41) == "rejected insufficient"
        assert await bank.say(PREPARE, "fee", cents=40, saga_id="t-2") == "done"
        assert await bank.say(EXECUTE, "fee", cents=40, saga_id="t-2") == "done"
        assert await bank.say(EXECUTE, cents=60) == "done"
    assert bank.balances()["a"] == 0


@pytest.mark.parametrize("table", ["rich", "RICH"])
async def test_a_view_is_refused_at_the_opening(tmp_path: Path, table: str) -> None:
    """Its rows are another table's: its holds and those on that table would not see each other."""
    schema = ACCOUNTS + "CREATE VIEW IF NOT EXISTS rich AS SELECT * FROM accounts;"  # noqa: S608  # a constant
    barrier = SqliteBarrier(tmp_path / "bank.db", schema=schema)
    holds = Reservations(table, key="account", quantity="balance_cents")
    holds.takes(Participant("bank", barrier=barrier), "debit", hold_of)
    for _ in range(2):
        with pytest.raises(BarrierError, match=f"{table} is no table .* name the table itself"):
            await barrier.open()


def test_a_table_of_an_attached_database_is_refused(tmp_path: Path) -> None:
    """What lies in another file is not committed with the hold; ``main.`` is another spelling."""
    participant = Participant("bank", barrier=SqliteBarrier(tmp_path / "bank.db"))
    holds = Reservations("main.accounts", key="account", quantity="balance_cents")
    with pytest.raises(InvalidReservation, match="without a schema"):
        holds.takes(participant, "debit", hold_of)


async def test_the_author_writes_in_the_same_transaction(bank: Bank) -> None:
    """His lines are there exactly where the hold was made, confirmed or cancelled."""
    await bank.say(PREPARE)
    await bank.say(PREPARE)
    await bank.say(EXECUTE)
    await bank.say(EXECUTE)
    await bank.say(PREPARE, saga_id="t-2")
    await bank.say(COMPENSATE, saga_id="t-2")
    await bank.say(PREPARE, saga_id="t-3", cents=1000)
    await bank.say(COMPENSATE, saga_id="t-3", cents=1000)
    await bank.say(COMPENSATE, saga_id="t-4")
    assert bank.journal() == [
        ("t-1", "on_confirm", 30),
        ("t-1", "on_try", 30),
        ("t-2", "on_cancel", 30),
        ("t-2", "on_try", 30),
    ]


async def test_an_author_may_refuse_in_try(tmp_path: Path) -> None:
    """The hold that was made before his refusal is taken back."""
    barrier = SqliteBarrier(tmp_path / "bank.db", schema=filled())

    def no(call: Call, tx: Transaction, hold: Hold) -> None:
        raise Rejected("frozen")

    participant = Participant("bank", barrier=barrier)
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    holds.takes(participant, "debit", hold_of, on_try=no)
    look = look_at(tmp_path / "bank.db")
    async with barrier:
        call = call_of(PREPARE, action="debit")
        call = dataclasses.replace(call, input=b'{"account":"a","cents":1}', two_phase=True)
        outcome = await barrier.run(call, participant.handlers()["debit", PREPARE])
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "frozen"
    assert look("SELECT count(*) FROM amends_reservations") == [(0,)]


async def test_available_is_for_code_outside_of_sagas(tmp_path: Path) -> None:
    """Whoever takes no more than that never takes what a vote has promised."""
    async with sqlite_bank(tmp_path / "bank.db") as bank:
        await check_available(bank)


async def check_available(bank: Bank) -> None:
    """Take what is free by other code than a saga's."""
    await bank.say(PREPARE, cents=60)

    def withdraw(tx: Transaction, cents: int) -> bool:
        available = bank.holds.available(tx, "a")
        assert available is not None
        if available < cents:
            return False
        tx.execute(
            "UPDATE accounts SET balance_cents = balance_cents - ? WHERE account = 'a'", (cents,)
        )
        return True

    assert isinstance(bank.barrier, SqliteBarrier)
    write = bank.barrier.write
    assert not await write(lambda tx: withdraw(tx, 41))
    assert await write(lambda tx: withdraw(tx, 40))
    assert await bank.say(EXECUTE, cents=60) == "done"
    assert bank.balances()["a"] == 0

    def of_nobody(tx: Transaction) -> list[int | None]:
        return [bank.holds.available(tx, key) for key in ("nobody", "\0", 2**64)]

    assert await write(of_nobody) == [None, None, None]


async def test_two_rounds_of_one_step_are_two_votes(bank: Bank) -> None:
    """The second round's hold is another one."""
    assert await bank.say(PREPARE, cents=100) == "done"
    assert await bank.say(COMPENSATE, cents=100, executed=True) == "done"
    assert await bank.say(PREPARE, cents=100, round=2) == "done"
    assert await bank.say(EXECUTE, cents=100, round=2) == "done"
    assert await bank.say(PREPARE, cents=100) == "rejected fenced"
    assert bank.balances()["a"] == 0


async def test_it_takes_part_in_two_phase_commits_alone(bank: Bank) -> None:
    """Execute of a saga, without a vote, is refused for good, and there is nothing to undo."""
    execute = vote_call(EXECUTE)
    execute.ClearField("mode")
    outcome = await bank.outcome(execute)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "two_phase_only"
    undo = vote_call(COMPENSATE)
    undo.ClearField("mode")
    assert not isinstance(await bank.outcome(undo), Broken)
    assert bank.balances() == START


# ----------------------------------------------------------------------- tables that are not so

NAMES = {"table": "accounts", "key": "account", "quantity": "balance_cents"}


@pytest.mark.parametrize(
    "names",
    [
        {"table": "accounts; DROP TABLE accounts"},
        {"table": 'acc"ounts'},
        {"table": "[accounts]"},
        {"table": ""},
        {"table": "a.b.c"},
        {"table": "1st"},
        {"table": "amends_barrier"},
        {"table": "main.amends_reservations"},
        {"key": "account, balance_cents"},
        {"key": ""},
        {"key": "x" * 64},
        {"quantity": "balance_cents + 1"},
        {"quantity": "größe"},
    ],
)
def test_names_that_are_none_are_refused(names: dict[str, str]) -> None:
    """They come from code; a wrong one is a mistake that is told at once."""
    good = NAMES | names
    with pytest.raises(InvalidReservation):
        Reservations(good["table"], key=good["key"], quantity=good["quantity"])


@pytest.mark.parametrize(
    "names",
    [
        {"table": "acounts"},
        {"key": "acount"},
        {"quantity": "balance"},
    ],
)
async def test_a_table_that_is_not_there_is_found_at_the_opening(
    tmp_path: Path, names: dict[str, str]
) -> None:
    """SQLite takes a quoted name that it does not know for a text: not here."""
    good = NAMES | names
    barrier = SqliteBarrier(tmp_path / "bank.db", schema=ACCOUNTS)
    holds = Reservations(good["table"], key=good["key"], quantity=good["quantity"])
    holds.takes(Participant("bank", barrier=barrier), "debit", hold_of)
    with pytest.raises(BarrierError, match=next(iter(names.values()))):
        await barrier.open()


@pytest.mark.parametrize("quantity", ["1.5", "'7'", "NULL", "x'07'"])
async def test_a_quantity_that_is_no_whole_number_fails_the_vote(
    tmp_path: Path, quantity: str
) -> None:
    """Nobody reserves parts of a float; the error says what to change."""
    schema = (
        "CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, balance_cents);"
        "INSERT INTO accounts VALUES ('a', WANTED)"
    ).replace("WANTED", quantity)
    path = tmp_path / "bank.db"
    barrier = SqliteBarrier(path, schema=schema)
    bank = Bank(barrier, look_at(path))
    async with barrier:
        with pytest.raises(Exception, match="whole numbers"):
            await bank.say(PREPARE)
    assert bank.held() == []


async def test_an_authors_row_factory_changes_nothing(tmp_path: Path) -> None:
    """Rows as dictionaries, texts as bytes: the author's taste."""
    path = tmp_path / "bank.db"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path)
        connection.row_factory = lambda cursor, row: dict(
            zip([column[0] for column in cursor.description], row, strict=True)
        )
        return connection

    barrier = SqliteBarrier(connect, schema=filled())
    bank = Bank(barrier, look_at(path))
    async with barrier:
        assert await bank.say(PREPARE) == "done"
        assert await bank.say(PREPARE, saga_id="t-2", cents=71) == "rejected insufficient"
        assert len(await bank.holds.in_doubt(0)) == 1
        assert await bank.say(EXECUTE) == "done"
    assert bank.balances()["a"] == 70


def test_without_a_database_there_are_no_reservations() -> None:
    """They are told apart at registration, where the author looks."""
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    with pytest.raises(InvalidReservation, match="SqliteBarrier"):
        holds.takes(Participant("bank", barrier=None), "debit", hold_of)
    prepared = PreparedTransactions("postgresql://127.0.0.1/bank")
    with pytest.raises(InvalidReservation, match="nothing to reserve"):
        holds.takes(Participant("bank", barrier=prepared), "debit", hold_of)
    with pytest.raises(InvalidReservation, match="no action yet"):
        _ = holds.available(object(), "a")


def test_functions_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    """An `async def` would never run in SQLite's transaction."""
    participant = Participant("bank", barrier=SqliteBarrier(tmp_path / "bank.db"))
    holds = Reservations("accounts", key="account", quantity="balance_cents")

    async def late(call: Call, tx: Any, hold: Hold) -> None: ...

    with pytest.raises(InvalidReservation, match="async"):
        holds.takes(participant, "debit", hold_of, on_confirm=late)
    with pytest.raises(InvalidReservation, match="another participant"):
        holds.takes(
            Participant("other", barrier=SqliteBarrier(tmp_path / "other.db")), "debit", hold_of
        )


def test_faults_are_told_with_the_authors_line(tmp_path: Path) -> None:
    """The handlers are ours, and what is wrong with their action is his."""
    participant = Participant("bank", barrier=SqliteBarrier(tmp_path / "bank.db"))
    holds = Reservations("accounts", key="account", quantity="balance_cents")
    holds.takes(participant, "not a name", lambda call: Hold(call.saga_id, 1))
    holds.takes(participant, "debit", hold_of)
    holds.gives(participant, "debit", hold_of)
    with pytest.raises(InvalidParticipant) as caught:
        participant.handlers()
    problems = "\n".join(caught.value.problems)
    assert f"{__file__}:" in problems
    assert "bank.py:" in problems
    assert "registered twice" in problems
    assert "reservations.py:" not in problems.replace("test_reservations.py:", "")


async def test_holds_of_another_version_are_refused_at_the_opening(tmp_path: Path) -> None:
    """A table of that name with other columns is not guessed at."""
    schema = f"{ACCOUNTS}; CREATE TABLE IF NOT EXISTS amends_reservations (pool TEXT, key TEXT);"
    barrier = SqliteBarrier(tmp_path / "bank.db", schema=schema)
    Bank(barrier, look_at(tmp_path / "bank.db"))
    with pytest.raises(BarrierError, match="cannot be used as a barrier"):
        await barrier.open()


async def test_two_quantities_of_one_table_are_apart(tmp_path: Path) -> None:
    """Cents that are held are no points that are held."""
    schema = (
        "CREATE TABLE accounts (account TEXT PRIMARY KEY, balance_cents INTEGER, points INTEGER);"
        "INSERT INTO accounts VALUES ('a', 10, 10)"
    )
    path = tmp_path / "bank.db"
    barrier = SqliteBarrier(path, schema=schema)
    bank = Bank(barrier, look_at(path))
    points = Reservations("accounts", key="account", quantity="points")
    points.takes(bank.participant, "redeem", hold_of)
    bank.handlers = bank.participant.handlers()
    async with barrier:
        assert await bank.say(PREPARE, "debit", cents=10) == "done"
        assert await bank.say(PREPARE, "redeem", cents=10) == "done"
        assert await bank.say(PREPARE, "redeem", cents=1, saga_id="t-2") == "rejected insufficient"
        assert len(await bank.holds.in_doubt(0)) == len(await points.in_doubt(0)) == 1


# ------------------------------------------------------------------------------- properties


@given(st.lists(deeds, max_size=30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_books_balance_whatever_the_order(course: list[Deed]) -> None:
    """Duplicates, late votes, the resolver and the runtime: moved once, or not at all."""

    async def play(folder: Path) -> None:
        async with sqlite_bank(folder / "bank.db") as bank:
            courses = Courses(bank)
            for deed in course:
                await courses.do(deed)
                courses.check()
            await courses.finish()

    with tempfile.TemporaryDirectory() as folder:
        anyio.run(play, Path(folder))


@given(st.lists(st.lists(deeds, min_size=1, max_size=6), max_size=6))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_books_balance_at_once(waves: list[list[Deed]]) -> None:
    """The same with calls that are under way together, and commits that are shared."""

    async def play(folder: Path) -> None:
        async with sqlite_bank(folder / "bank.db", share_commits=True) as bank:
            courses = Courses(bank)
            for wave in waves:
                await asyncio.gather(*map(courses.do, wave))
                courses.check()
            await courses.finish()

    with tempfile.TemporaryDirectory() as folder:
        anyio.run(play, Path(folder))
