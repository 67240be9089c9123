"""Rows are purged by age, oldest first, and never those of a saga that may still be open."""

import time

import pytest

from amends import BarrierError, Verb
from amends.barrier import postgres_rows, sqlite_database
from tests.participants.asking import call_of
from tests.participants.every_barrier import every_ledger
from tests.participants.ledger import Ledger

HOUR_MS = 3_600_000

ledger = every_ledger


async def execute(ledger: Ledger, saga_id: str, **changes: object) -> None:
    """Charge once. Unless a test says otherwise, no saga that was open before now is open."""
    handler = ledger.participant.handlers()["charge", Verb.EXECUTE]
    changes.setdefault("oldest_open_at_ms", time.time_ns() // 1_000_000)
    await ledger.barrier.run(call_of(Verb.EXECUTE, saga_id=saga_id, **changes), handler)


async def test_old_rows_go_and_young_ones_stay(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page after page up to the first row that is too young; effects are not touched."""
    monkeypatch.setattr(sqlite_database, "PURGE_PAGE", 2)
    monkeypatch.setattr(postgres_rows, "PURGE_PAGE", 2)
    async with ledger.barrier as barrier:
        for number in range(7):
            await execute(ledger, f"saga-{number}")
            if number < 5:
                ledger.make_older(f"saga-{number}", 2 * HOUR_MS)
        assert await barrier.purge(older_than_ms=HOUR_MS) == 5
        assert await barrier.purge(older_than_ms=HOUR_MS) == 0
    assert ledger.rows("saga-4") == []
    assert ledger.rows("saga-5") == [("execute", "done")]
    assert ledger.entries("saga-4") == [("charge", 5)]


async def test_rows_that_may_belong_to_an_open_saga_stay(ledger: Ledger) -> None:
    """The runtime's calls say since when its oldest open saga runs; its rows since then stay."""
    now_ms = time.time_ns() // 1_000_000
    async with ledger.barrier as barrier:
        await execute(ledger, "finished")
        ledger.make_older("finished", 4 * HOUR_MS)
        await execute(ledger, "perhaps-open")
        ledger.make_older("perhaps-open", 2 * HOUR_MS)
        await execute(ledger, "another-store", store_id="another")
        ledger.make_older("another-store", 2 * HOUR_MS)
        await execute(ledger, "now", oldest_open_at_ms=now_ms - 3 * HOUR_MS)
        assert await barrier.purge(older_than_ms=HOUR_MS) == 2
    assert ledger.rows("finished") == []
    assert ledger.rows("another-store") == []
    assert ledger.rows("perhaps-open") == [("execute", "done")]


async def test_rows_of_a_store_that_has_not_said_what_is_open_stay(ledger: Ledger) -> None:
    """0 is "unknown", and what is unknown may be open: another store's word is not its own."""
    async with ledger.barrier as barrier:
        await execute(ledger, "silent", store_id="silent", oldest_open_at_ms=0)
        await execute(ledger, "known")
        for saga_id in ("silent", "known"):
            ledger.make_older(saga_id, 2 * HOUR_MS)
        assert await barrier.purge(older_than_ms=0) == 1
        assert ledger.rows("silent") == [("execute", "done")]
        await execute(ledger, "later", store_id="silent")
        assert await barrier.purge(older_than_ms=HOUR_MS) == 1
    assert ledger.rows("silent") == []


async def test_what_a_store_has_said_is_remembered(ledger: Ledger) -> None:
    """Over a restart, and past calls that say nothing; so a purge needs no call before it."""
    now_ms = time.time_ns() // 1_000_000
    async with ledger.barrier:
        for saga_id, age_ms in (("older", 4 * HOUR_MS), ("younger", 2 * HOUR_MS)):
            await execute(ledger, saga_id, oldest_open_at_ms=now_ms - 3 * HOUR_MS)
            ledger.make_older(saga_id, age_ms)
        await execute(ledger, "silent", oldest_open_at_ms=0)
    async with ledger.barrier as barrier:
        assert await barrier.purge(older_than_ms=HOUR_MS) == 1
    assert ledger.rows("older") == []
    assert ledger.rows("younger") == [("execute", "done")]


async def test_what_a_store_says_last_counts(ledger: Ledger) -> None:
    """A store that was restored has older sagas open than it had before: their rows stay."""
    now_ms = time.time_ns() // 1_000_000
    async with ledger.barrier as barrier:
        await execute(ledger, "open-again")
        ledger.make_older("open-again", 2 * HOUR_MS)
        await execute(ledger, "restored", oldest_open_at_ms=now_ms - 3 * HOUR_MS)
        assert await barrier.purge(older_than_ms=HOUR_MS) == 0


async def test_what_is_said_is_not_written_with_every_call(ledger: Ledger) -> None:
    """While the oldest open saga gets younger by seconds, the stored instant stays as it is."""
    said_ms = time.time_ns() // 1_000_000
    async with ledger.barrier:
        for number, later_ms in enumerate((0, 1, 59_000, 61_000)):
            await execute(ledger, f"saga-{number}", oldest_open_at_ms=said_ms + later_ms)
            expected_ms = said_ms + (61_000 if later_ms > 60_000 else 0)
            assert ledger.stores() == [("store", expected_ms)]


async def test_an_age_is_not_negative(ledger: Ledger) -> None:
    """A negative age would purge the future."""
    async with ledger.barrier as barrier:
        with pytest.raises(ValueError, match="is an age"):
            await barrier.purge(older_than_ms=-1)


async def test_a_closed_barrier_says_so(ledger: Ledger) -> None:
    """One line instead of a hang."""
    with pytest.raises(BarrierError, match="is not open"):
        await ledger.barrier.purge(older_than_ms=0)
