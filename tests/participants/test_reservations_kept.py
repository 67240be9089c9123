"""What a vote has held is confirmed exactly or let go of, and is never left behind."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from amends import (
    Broken,
    Decision,
    HandlerFailed,
    SqliteBarrier,
    VoteNotSettled,
)
from tests.participants.bank import (
    COMPENSATE,
    EXECUTE,
    PREPARE,
    START,
    Bank,
    postgres_bank,
    sqlite_bank,
    vote_call,
)

HOUR_MS = 3_600_000


@pytest.fixture(params=["sqlite", "asyncpg", "psycopg"])
async def bank(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bank]:
    """Give a bank on SQLite, and on PostgreSQL by both drivers."""
    if request.param != "sqlite":
        postgres = request.getfixturevalue("postgres")
        async with postgres_bank(postgres, request.param, journal=True) as bank:
            yield bank
        return
    async with sqlite_bank(tmp_path / "bank.db", journal=True) as bank:
        yield bank


# ------------------------------------------------------- a Confirm that did not move what was held

MEDDLER = "CREATE TRIGGER meddler {} UPDATE ON accounts "

FUNCTION = "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;"

ONE_MORE = "UPDATE accounts SET balance_cents = balance_cents + 1 WHERE account = NEW.account;"

IN_THE_WAY = {
    "sqlite skips": (
        MEDDLER.format("BEFORE") + "BEGIN SELECT RAISE(IGNORE); END",
        "DROP TRIGGER meddler",
    ),
    "sqlite changes": (
        MEDDLER.format("AFTER") + f"BEGIN {ONE_MORE} END",
        "DROP TRIGGER meddler",
    ),
    "postgres skips": (
        FUNCTION.format("RETURN NULL;")
        + MEDDLER.format("BEFORE")
        + "FOR EACH ROW EXECUTE FUNCTION meddle()",
        "DROP TRIGGER meddler ON accounts",
    ),
    "postgres changes": (
        FUNCTION.format("NEW.balance_cents := NEW.balance_cents + 1; RETURN NEW;")
        + MEDDLER.format("BEFORE")
        + "FOR EACH ROW EXECUTE FUNCTION meddle()",
        "DROP TRIGGER meddler ON accounts",
    ),
    "postgres does instead": (
        "CREATE RULE meddler AS ON UPDATE TO accounts DO INSTEAD NOTHING",
        "DROP RULE meddler ON accounts",
    ),
}


@pytest.mark.parametrize("way", ["skips", "changes", "does instead"])
async def test_a_confirm_that_did_not_move_the_amount_is_no_confirm(bank: Bank, way: str) -> None:
    """A trigger or a rule is in the way: that is said, nothing is kept, and it is asked again."""
    database = "sqlite" if bank.driver == "sqlite" else "postgres"
    if (names := f"{database} {way}") not in IN_THE_WAY:
        return  # SQLite has no rules
    comes, goes = IN_THE_WAY[names]
    assert await bank.say(PREPARE) == "done"
    bank.look(comes)
    for _ in range(2):
        with pytest.raises(HandlerFailed, match=r"was to be moved .* trigger, rule or policy"):
            await bank.say(EXECUTE)
        (vote,) = await bank.holds.in_doubt(0)
        with pytest.raises(HandlerFailed, match="was to be moved"):
            await bank.holds.resolve(vote, Decision.COMMIT)
    assert bank.balances() == START
    assert bank.held() == [("t-1", "takes", "a", 30)]
    assert bank.rows() == [("debit", "prepare", "done")]
    bank.look(goes)
    if way == "does instead":
        # PostgreSQL does not look again at a prepared statement of which a rule has left nothing.
        await bank.barrier.aclose()
        await bank.barrier.open()
    assert await bank.say(EXECUTE) == "done"
    assert bank.balances()["a"] == 70
    assert bank.held() == []


# --------------------------------------------------------------- a hold whose vote's row is gone


async def test_a_purge_keeps_the_rows_of_what_is_held(bank: Bank) -> None:
    """However old they are, and whatever the runtime says of its sagas: the vote is not told."""
    for saga_id in ("t-1", "t-2"):
        await bank.say(PREPARE, saga_id=saga_id)
    await bank.say(EXECUTE, saga_id="t-2")
    bank.look("UPDATE amends_barrier SET written_at_ms = 1000")
    later = vote_call(PREPARE, saga_id="t-3", cents=1)
    later.oldest_open_at_ms = time.time_ns() // 1_000_000
    await bank.outcome(later)
    assert await bank.barrier.purge(HOUR_MS) == 2
    assert bank.rows("t-1") == [("debit", "prepare", "done")]
    assert bank.rows("t-2") == []
    assert await bank.say(EXECUTE) == "done"
    bank.look("UPDATE amends_barrier SET written_at_ms = 1000")
    assert await bank.barrier.purge(HOUR_MS) == 2
    assert bank.rows("t-3") == [("debit", "prepare", "done")]
    assert bank.balances()["a"] == 40


async def test_a_purge_by_a_barrier_without_reservations_keeps_them_too(tmp_path: Path) -> None:
    """Such as in a program that does nothing but purge."""
    path = tmp_path / "bank.db"
    async with sqlite_bank(path) as bank:
        later = vote_call(PREPARE)
        later.oldest_open_at_ms = time.time_ns() // 1_000_000
        await bank.outcome(later)
    bank.look("UPDATE amends_barrier SET written_at_ms = 1000")
    async with SqliteBarrier(path) as barrier:
        assert await barrier.purge(HOUR_MS) == 0


@pytest.mark.parametrize("executed", [True, False], ids=["yes heard", "perhaps"])
async def test_a_hold_without_a_row_is_let_go_of(bank: Bank, executed: bool) -> None:  # noqa: FBT001
    """The barrier's rows are gone, the hold is there: Done means that it is not, any more."""
    await bank.say(PREPARE)
    await bank.say(PREPARE, saga_id="t-2")
    bank.look("DELETE FROM amends_barrier")
    for _ in range(2):
        assert await bank.say(COMPENSATE, executed=executed) == "done"
        assert [saga_id for saga_id, *_ in bank.held()] == ["t-2"]
    assert await bank.say(PREPARE) == "rejected fenced"
    assert await bank.say(EXECUTE) == "rejected fenced"
    assert bank.balances() == START
    assert bank.journal().count(("t-1", "on_cancel", 30)) == 1


async def test_the_resolver_lets_go_of_a_hold_without_a_row(bank: Bank) -> None:
    """What it has settled is settled; and the runtime, which comes later, hears Done."""
    await bank.say(PREPARE)
    bank.look("DELETE FROM amends_barrier")
    (vote,) = await bank.holds.in_doubt(0)
    assert await bank.holds.resolve(vote, Decision.ABORT)
    assert bank.held() == []
    assert await bank.holds.resolve(vote, Decision.ABORT)
    assert await bank.say(COMPENSATE, executed=True) == "done"
    assert bank.journal().count(("t-1", "on_cancel", 30)) == 1


async def test_a_rollback_of_a_lost_yes_says_where_to_look(bank: Bank) -> None:
    """Neither a row nor a hold of what the runtime knows to be prepared: never a silent Done."""
    outcome = await bank.outcome(vote_call(COMPENSATE, executed=True))
    assert isinstance(outcome, Broken)
    assert outcome.reason == "vote_lost"
    assert "here nothing is held; look whether the hold is in another database" in outcome.message
    assert bank.rows() == []
    assert await bank.say(COMPENSATE, saga_id="t-2") == "done", "nobody has heard a yes"


COLUMNS = (
    "store_id, saga_id, step, round, participant, action, pool, key, direction, amount,"
    " incarnation, request, since_ms"
)


@pytest.mark.parametrize("decision", [Decision.ABORT, Decision.COMMIT])
async def test_a_hold_that_somebody_put_back_is_not_said_to_be_settled(
    bank: Bank, decision: Decision
) -> None:
    """Rolled back before: it is let go of. Confirmed before: a person has to look."""
    await bank.say(PREPARE)
    (vote,) = await bank.holds.in_doubt(0)
    bank.look(f"CREATE TABLE saved AS SELECT {COLUMNS} FROM amends_reservations")  # noqa: S608
    await bank.say(EXECUTE if decision is Decision.COMMIT else COMPENSATE)
    bank.look(f"INSERT INTO amends_reservations ({COLUMNS}) SELECT * FROM saved")  # noqa: S608
    before = bank.balances()
    if decision is Decision.ABORT:
        assert await bank.holds.resolve(vote, decision)
        assert bank.held() == []
    else:
        with pytest.raises(VoteNotSettled, match="was confirmed before, and there is a hold"):
            await bank.holds.resolve(vote, decision)
    assert bank.balances() == before
