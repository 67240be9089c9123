"""The page's program that settles by hand is run as it stands there, at both banks of the page."""

from __future__ import annotations

import asyncio
import importlib
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

import amends
from amends.resolver import ORPHANS
from tests.participants.asking import Asker, asking, json_payload
from tests.participants.bank import COMPENSATE, EXECUTE, PREPARE, vote_call
from tests.postgres import Postgres

PAGE = Path(__file__).parents[2] / "docs" / "two-phase-commit.md"


@pytest.fixture
def folder(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with the page's programs."""
    monkeypatch.setenv("BANK_EAST", postgres.dsn)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("bank", "bank_east", "settle"):
        (code,) = re.findall(rf"```python\n(# {name}\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a program of the folder's, for this test alone."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


async def vote(asker: Asker, saga_id: str, verb: amends.Verb = PREPARE) -> str:
    """Ask for the debit of a transfer from alice to bob."""
    call = vote_call(verb, saga_id=saga_id, executed=verb is COMPENSATE)
    call.input.CopyFrom(json_payload({"from": "alice", "to": "bob", "cents": 700}))
    return await asker.say(call)


async def run(folder: Path, *arguments: str) -> str:
    """Run the program as an operator does, and give what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "settle.py", *arguments, cwd=folder, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


async def test_reservations_are_settled_beside_the_participant_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is committed and one rolled back, and the runtime is answered in accordance."""
    bank = imported("bank", monkeypatch)
    async with amends.serve(bank.bank) as server, asking(server.address) as asker:
        for saga_id in ("t-1", "t-2", "t-3"):
            assert await vote(asker, saga_id) == "done"
        listed = await run(folder)
        assert re.findall(r"saga_id='([^']*)'", listed) == ["t-1", "t-2", "t-3"]
        assert (await run(folder, "t-1", "COMMIT")).endswith("COMMIT\n")
        assert (await run(folder, "t-2", "ABORT")).endswith("ABORT\n")
        assert await run(folder, "t-1", "COMMIT") == ""
        assert await vote(asker, "t-1", EXECUTE) == "done"
        assert await vote(asker, "t-2", COMPENSATE) == "done"
        assert [held.saga_id for held in await bank.holds.in_doubt()] == ["t-3"]
    with closing(sqlite3.connect(folder / "bank.db")) as connection:
        balances = dict(connection.execute("SELECT account, balance_cents FROM accounts"))
    assert balances == {"alice": 9300, "bob": 0}


async def test_prepared_transactions_are_settled_without_the_participant(
    folder: Path,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the two names that the page says; what decides nothing does nothing."""
    code = (folder / "settle.py").read_text()
    for old, new in (
        ("from bank import bank, holds", "from bank_east import votes"),
        ("bank.barrier, holds  # of prepared transactions: votes, votes", "votes, votes"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (folder / "settle.py").write_text(code)
    bank = imported("bank_east", monkeypatch)
    async with amends.serve(bank.bank) as server, asking(server.address) as asker:
        assert await vote(asker, "t-1") == "done"
    settle = imported("settle", monkeypatch)
    with pytest.raises(ValueError, match="no decision that can be carried out"):
        await settle.main("t-1", "PENDING")
    await settle.main("t-0", "COMMIT")
    assert capsys.readouterr().out == ""
    await settle.main("t-1", "COMMIT")
    assert capsys.readouterr().out == "debit locks in accounts COMMIT\n"
    assert postgres.execute("SELECT cents FROM accounts WHERE account = 'alice'") == [(9300,)]
    assert postgres.execute("SELECT gid FROM pg_prepared_xacts") == []


def test_the_resolvers_log_leads_to_the_section() -> None:
    """It is there under the name that the log says."""
    path, _, section = ORPHANS.partition("#")
    assert PAGE.match(path)
    titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert section in {title.lower().replace(":", "").replace(" ", "-") for title in titles}
