"""The whole example of docs/two-phase-commit.md is run as it stands there; its links lead on."""

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
from amends_runtime.config import Config, Server
from amends_runtime.config import Participant as Registered
from amends_runtime.engine import run_engine
from tests.postgres import Postgres

PAGE = Path(__file__).parents[2] / "docs" / "two-phase-commit.md"

FILES = ("bank", "bank_east", "transfer")


@pytest.fixture
def page(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> dict[str, ModuleType]:
    """Import the page's three programs, in a folder of their own."""
    monkeypatch.setenv("BANK_EAST", postgres.dsn)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    modules = {}
    for name in FILES:
        (code,) = re.findall(rf"```python\n(# {name}\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        modules[name] = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    return modules


def said_on_the_page() -> str:
    """Give what the page says that the example prints."""
    (said,) = re.findall(r"```\n(COMPLETED\n.*?)```", PAGE.read_text(), re.DOTALL)
    return str(said)


async def test_the_whole_example(
    page: dict[str, ModuleType],
    tmp_path: Path,
    postgres: Postgres,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One transfer commits at both banks, two are refused by one; a repeat moves nothing."""
    async with (
        amends.serve(page["bank_east"].bank) as east,
        amends.serve(page["bank"].bank) as west,
    ):
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={
                "bank-east": Registered(address=east.address),
                "bank": Registered(address=west.address),
            },
        )
        async with run_engine(config) as engine:
            for _ in range(2):
                capsys.readouterr()
                await page["transfer"].main(engine.address)
                assert capsys.readouterr().out.endswith(said_on_the_page())
            async with amends.Client(engine.address) as client:
                decisions = [
                    (await client.get(name)).decision
                    for name in ("rent-may", "rent-june", "rent-july")
                ]
    assert decisions == [amends.Decision.COMMIT, amends.Decision.ABORT, amends.Decision.ABORT]
    assert postgres.execute("SELECT account, cents FROM accounts ORDER BY account") == [
        ("alice", 100_00 - 7_00),
        ("bob", 0),
    ]
    assert postgres.execute("SELECT gid FROM pg_prepared_xacts") == []
    with closing(sqlite3.connect(tmp_path / "bank.db")) as connection:
        balances = connection.execute("SELECT account, balance_cents FROM accounts").fetchall()
        held = connection.execute("SELECT count(*) FROM amends_reservations").fetchone()
    assert dict(balances) == {"alice": 100_00, "bob": 7_00}
    assert held == (0,)


def test_every_link_of_the_page_leads_somewhere() -> None:
    """Its own sections, and other pages with theirs."""
    text = PAGE.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "#reservations-tcc" in links
    for link in links:
        path, _, section = link.partition("#")
        page = (PAGE.parent / path).resolve() if path else PAGE
        assert page.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert section in {_anchor(title) for title in titles}, link


def _anchor(title: str) -> str:
    """Give a title's anchor as the usual viewers make it."""
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")
