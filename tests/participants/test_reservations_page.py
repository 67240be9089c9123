"""The page's bank runs as it is printed there: transfers, a counter beside them, and a resolver."""

from __future__ import annotations

import importlib
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

import amends
from amends.v1 import saga_pb2, types_pb2
from tests.participants.asking import Asker, asking, json_payload
from tests.participants.bank import COMPENSATE, EXECUTE, PREPARE, vote_call
from tests.participants.scripted_runtime import scripted_runtime

PAGE = Path(__file__).parents[2] / "docs" / "two-phase-commit.md"

MODULES = ("bank", "withdraw", "look")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Import the page's code, in a folder of its own."""
    for name in MODULES:
        (code,) = re.findall(rf"```python\n(# {name}\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    modules = {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, modules[name])
    return modules


def balances(folder: Path) -> dict[str, int]:
    """Read the accounts."""
    with closing(sqlite3.connect(folder / "bank.db")) as connection:
        return dict(connection.execute("SELECT account, balance_cents FROM accounts"))


async def say(asker: Asker, verb: amends.Verb, action: str, saga_id: str, cents: int) -> str:
    """Ask for one branch of a transfer from alice to bob."""
    call = vote_call(verb, action, saga_id=saga_id, executed=verb is COMPENSATE)
    call.input.CopyFrom(json_payload({"from": "alice", "to": "bob", "cents": cents}))
    return await asker.say(call)


async def test_the_pages_bank(page: dict[str, ModuleType], tmp_path: Path) -> None:
    """One transfer commits, one rolls back; the counter pays out what is free, and no more."""
    bank = page["bank"]
    pay_out = page["withdraw"].at_the_counter
    async with amends.serve(bank.bank) as server, asking(server.address) as asker:
        for action in ("debit", "credit"):
            assert await say(asker, PREPARE, action, "t-1", 6000) == "done"
        assert not await pay_out("alice", 4001)
        assert not await pay_out("bob", 1)
        assert await pay_out("alice", 1000)
        for action in ("debit", "credit"):
            assert await say(asker, EXECUTE, action, "t-1", 6000) == "done"
        assert await say(asker, PREPARE, "debit", "t-2", 3001) == "rejected insufficient"
        assert await say(asker, PREPARE, "debit", "t-3", 3000) == "done"
        assert await say(asker, COMPENSATE, "debit", "t-3", 3000) == "done"
        assert await pay_out("alice", 3000)
        assert not await pay_out("nobody", 1)
    assert balances(tmp_path) == {"alice": 0, "bob": 6000}
    with closing(sqlite3.connect(tmp_path / "bank.db")) as connection:
        lines = connection.execute("SELECT * FROM journal ORDER BY cents").fetchall()
    assert lines == [("t-1", "alice", -6000), ("t-1", "bob", 6000)]


async def test_the_pages_look_at_what_is_in_doubt(
    page: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each vote in a line, with what the runtime says of it."""
    holds = page["bank"].holds
    async with (
        scripted_runtime() as runtime,
        amends.serve(page["bank"].bank) as server,
        asking(server.address) as asker,
    ):
        runtime.answer(
            "GetDecision",
            saga_pb2.GetDecisionResponse(decision=types_pb2.COMMIT_DECISION_PENDING),
        )
        assert await say(asker, PREPARE, "debit", "t-1", 6000) == "done"
        assert await page["look"].in_doubt(holds, runtime.address) == []
        now_ms = amends.barrier.holds.now_ms
        monkeypatch.setattr("amends.reservations.now_ms", lambda: now_ms() + 61_000)
        assert await page["look"].in_doubt(holds, runtime.address) == [
            "t-1 debit: debit: a hold that takes accounts.balance_cents: PENDING"
        ]
