"""Real processes killed with SIGKILL while calls share a commit: all of it is there, or nothing."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.participants.ledger import read_ledger, read_rows
from tests.participants.processes import Program, program

SAGAS = ["a", "b", "c", "d", "e"]
ANSWERS_BEFORE_THE_KILL = 500


async def read_to_the_end(running: Program) -> list[str]:
    """Read its lines up to ``end``."""
    lines = []
    while (line := await running.line()) != "end":
        lines.append(line)
    return lines


async def kill_where_it_stops(database: Path, where: str) -> None:
    """Run it to where it stops, and kill it there: it has answered nobody."""
    async with program("sharing.py", database, where) as running:
        assert await running.line() == "here"
        await running.kill()


async def answers(database: Path) -> list[str]:
    """Give it the calls again, and what they are answered."""
    async with program("sharing.py", database, "nowhere") as running:
        return await read_to_the_end(running)


async def test_killed_in_the_middle_nothing_is_there(tmp_path: Path) -> None:
    """Two handlers had ended, the third had written: none of it stays, and all run again, once."""
    database = tmp_path / "payments.db"
    await kill_where_it_stops(database, "in-the-middle")
    assert [read_ledger(database, saga) for saga in SAGAS] == [[]] * 5
    assert [read_rows(database, saga) for saga in SAGAS] == [[]] * 5
    assert await answers(database) == [f"{saga} {saga}" for saga in SAGAS]
    assert [read_ledger(database, saga) for saga in SAGAS] == [[("charge", 5)]] * 5


async def test_killed_after_the_commit_all_of_it_is_there(tmp_path: Path) -> None:
    """Nobody was answered; asked again, each gets its own reply, and no effect is doubled."""
    database = tmp_path / "payments.db"
    await kill_where_it_stops(database, "before-answers")
    assert [read_ledger(database, saga) for saga in SAGAS] == [[("charge", 5)]] * 5
    assert await answers(database) == [f"{saga} {saga}" for saga in SAGAS]
    assert [read_ledger(database, saga) for saga in SAGAS] == [[("charge", 5)]] * 5


async def test_killed_under_load_what_was_answered_is_there(tmp_path: Path) -> None:
    """Whatever was in a transaction then: effects and rows agree, and no answer is missing."""
    database = tmp_path / "payments.db"
    async with program("sharing.py", database, "under-load") as running:
        answered = [(await running.line()).split()[0] for _ in range(ANSWERS_BEFORE_THE_KILL)]
        await running.kill()
    with closing(sqlite3.connect(database)) as connection:
        effects = [row[0] for row in connection.execute("SELECT saga_id FROM ledger")]
        rows = [row[0] for row in connection.execute("SELECT saga_id FROM amends_barrier")]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert sorted(effects) == sorted(rows)
    assert len(effects) == len(set(effects))
    assert set(answered) <= set(rows)


async def test_a_disk_that_is_full_at_the_commit_leaves_all_unknown(tmp_path: Path) -> None:
    """No file may grow: an error for each; with room again each runs, once."""
    database = tmp_path / "payments.db"
    async with program("sharing.py", database, "disk-full") as running:
        lines = await read_to_the_end(running)
    assert lines[:5] == [f"{saga} CommitUnknown" for saga in SAGAS]
    assert lines[5:] == [f"{saga} {saga}" for saga in SAGAS]
    assert [read_ledger(database, saga) for saga in SAGAS] == [[("charge", 5)]] * 5
