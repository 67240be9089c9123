"""Rows are purged by age, oldest first, and never those of a saga that may still be open."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from amends import BarrierError, Verb
from amends.barrier import sqlite_database
from tests.participants.asking import call_of
from tests.participants.ledger import Ledger, read_rows

HOUR_MS = 3_600_000


def make_older(path: Path, saga_id: str, by_ms: int) -> None:
    """Move rows into the past, as if they had been written then."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE amends_barrier SET written_at_ms = written_at_ms - ? WHERE saga_id = ?",
            (by_ms, saga_id),
        )


async def execute(ledger: Ledger, saga_id: str, **changes: object) -> None:
    """Charge once."""
    handler = ledger.participant.handlers()["charge", Verb.EXECUTE]
    await ledger.barrier.run(call_of(Verb.EXECUTE, saga_id=saga_id, **changes), handler)


async def test_old_rows_go_and_young_ones_stay(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page after page up to the first row that is too young; effects are not touched."""
    monkeypatch.setattr(sqlite_database, "PURGE_PAGE", 2)
    async with ledger.barrier as barrier:
        for number in range(7):
            await execute(ledger, f"saga-{number}")
            if number < 5:
                make_older(ledger.path, f"saga-{number}", 2 * HOUR_MS)
        assert await barrier.purge(older_than_ms=HOUR_MS) == 5
        assert await barrier.purge(older_than_ms=HOUR_MS) == 0
    assert read_rows(ledger.path, "saga-4") == []
    assert read_rows(ledger.path, "saga-5") == [("execute", "done")]
    assert ledger.entries("saga-4") == [("charge", 5)]


async def test_rows_that_may_belong_to_an_open_saga_stay(ledger: Ledger) -> None:
    """The runtime's calls say since when its oldest open saga runs; its rows since then stay."""
    now_ms = time.time_ns() // 1_000_000
    async with ledger.barrier as barrier:
        await execute(ledger, "finished")
        make_older(ledger.path, "finished", 4 * HOUR_MS)
        await execute(ledger, "perhaps-open")
        make_older(ledger.path, "perhaps-open", 2 * HOUR_MS)
        await execute(ledger, "another-store", store_id="silent")
        make_older(ledger.path, "another-store", 2 * HOUR_MS)
        await execute(ledger, "now", oldest_open_at_ms=now_ms - 3 * HOUR_MS)
        assert await barrier.purge(older_than_ms=HOUR_MS) == 2
    assert read_rows(ledger.path, "finished") == []
    assert read_rows(ledger.path, "another-store") == []
    assert read_rows(ledger.path, "perhaps-open") == [("execute", "done")]


async def test_an_age_is_not_negative(ledger: Ledger) -> None:
    """A negative age would purge the future."""
    async with ledger.barrier as barrier:
        with pytest.raises(ValueError, match="is an age"):
            await barrier.purge(older_than_ms=-1)


async def test_a_closed_barrier_says_so(ledger: Ledger) -> None:
    """One line instead of a hang."""
    with pytest.raises(BarrierError, match="is not open"):
        await ledger.barrier.purge(older_than_ms=0)
