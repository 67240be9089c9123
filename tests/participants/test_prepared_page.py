"""The branch of docs/two-phase-commit.md on PostgreSQL is run as it stands there."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from amends import Participant, PreparedTransactions, Verb, serve
from tests.participants.asking import asking, json_payload
from tests.participants.branch import message
from tests.postgres import Postgres

PAGE = Path(__file__).parents[2] / "docs" / "two-phase-commit.md"


@pytest.fixture
def page(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the page's code; its database is the test's."""
    monkeypatch.setenv("BANK_EAST", postgres.dsn)
    (code,) = re.findall(r"```python\n(# bank_east.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "bank_east.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("page_bank_east", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_pages_branch_moves_money(page: ModuleType, postgres: Postgres) -> None:
    """Debit and credit are held until they are committed; too much is refused."""
    bank = page.bank
    assert isinstance(bank, Participant)
    assert isinstance(page.votes, PreparedTransactions)
    balances = "SELECT account, cents FROM accounts ORDER BY account"

    async with serve(bank) as server, asking(server.address) as asker:

        async def say(verb: Verb, action: str, saga_id: str, cents: int) -> str:
            call = message(verb, action=action, step=action, saga_id=saga_id)
            call.input.CopyFrom(json_payload({"from": "alice", "to": "bob", "cents": cents}))
            return await asker.say(call)

        assert await say(Verb.PREPARE, "debit", "too-much", 10_001) == "rejected insufficient"
        for action in ("debit", "credit"):
            assert await say(Verb.PREPARE, action, "t-1", 700) == "done"
        assert await say(Verb.PREPARE, "debit", "t-2", 1) == "rejected LOCKED"
        held = await page.votes.in_doubt(older_than_s=0)
        assert [one.what for one in held] == ["locks in accounts"] * 2
        assert postgres.execute(balances) == [("alice", 10_000), ("bob", 0)]
        for action in ("debit", "credit"):
            assert await say(Verb.EXECUTE, action, "t-1", 700) == "done"
    assert postgres.execute(balances) == [("alice", 9_300), ("bob", 700)]


def test_the_pages_query_runs(postgres: Postgres) -> None:
    """It names what is prepared."""
    (query,) = re.findall(r"```sql\n(SELECT gid.*?)```", PAGE.read_text(), re.DOTALL)
    assert postgres.connection.execute(query).fetchall() == []
