"""The participants over PostgreSQL of docs/participants.md are run as they stand there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from amends import Verb, serve
from amends.v1 import participant_pb2 as pb
from tests.participants.asking import asking, call_message, json_payload
from tests.postgres import Postgres

PAGE = Path(__file__).parents[2] / "docs" / "participants.md"


def module(name: str, folder: Path) -> ModuleType:
    """Import a file of the page."""
    (code,) = re.findall(rf"```python\n(# {name}.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(f"page_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


async def test_the_page_takes_money_gives_it_back_and_closes_an_account(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per key, never below zero; over both drivers."""
    monkeypatch.setenv("ACCOUNTS_DSN", postgres.dsn)

    def call(verb: Verb, cents: int, *, action: str = "charge", saga_id: str = "a") -> pb.Call:
        message = call_message(verb, action=action, saga_id=saga_id)
        message.input.CopyFrom(json_payload({"account": "ann", "cents": cents}))
        return message

    def cents() -> list[tuple[int]]:
        return postgres.execute("SELECT cents FROM accounts")

    page = module("accounts", tmp_path)
    async with serve(page.accounts) as server, asking(server.address) as asker:
        postgres.execute("INSERT INTO accounts VALUES ('ann', 100)")
        for _ in range(2):
            assert await asker.say(call(Verb.EXECUTE, 60)) == "done"
            assert cents() == [(40,)]
        too_much = call(Verb.EXECUTE, 60, saga_id="b")
        assert await asker.say(too_much) == "rejected insufficient_funds"
        for _ in range(2):
            assert await asker.say(call(Verb.COMPENSATE, 60)) == "done"
            assert cents() == [(100,)]
    page = module("accounts_psycopg", tmp_path)
    async with serve(page.accounts) as server, asking(server.address) as asker:
        closing = call(Verb.EXECUTE, 0, action="close", saga_id="c")
        assert await asker.say(closing) == "done"
        assert cents() == []
