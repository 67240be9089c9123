"""A runtime and a shop for the tests of this folder, and a store that fails where one says so."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import amends
from amends_runtime import engine as engine_module
from amends_runtime.config import Config, Limits, Participant, Server
from amends_runtime.engine import Engine, run_engine
from amends_runtime.ports import Transition
from amends_runtime.storage import SqliteStore, open_sqlite_store

NOWHERE = "127.0.0.1:1"
"""An address at which nobody listens: sagas that call it stay open."""

QUICK = amends.Retry(first_s=0.01, max_s=0.05, give_up_after_s=86_400)

ONE_STEP = amends.Definition("one").step("a", "shop", "do", retry=QUICK)


Hooks = dict[str, Callable[..., Awaitable[Any]]]


class HookedStore:
    """A real store, but for the calls that a test has put something before."""

    def __init__(self, store: SqliteStore, hooks: Hooks) -> None:
        self._store = store
        self._hooks = hooks

    def __getattr__(self, name: str) -> Any:
        hook = self._hooks.get(name)
        if hook is None:
            return getattr(self._store, name)

        async def hooked(*arguments: Any) -> Any:
            return await hook(self._store, *arguments)

        return hooked

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commits, after the hook, if there is one."""
        hook = self._hooks.get("commit")
        if hook is None:
            return await self._store.commit(transitions)
        seq: int = await hook(self._store, transitions)
        return seq


def hook_store(monkeypatch: pytest.MonkeyPatch) -> Hooks:
    """Every store of a runtime from here on: put a coroutine function under a method's name."""
    hooks: Hooks = {}

    @asynccontextmanager
    async def open_store(path: str, **options: bool) -> AsyncIterator[HookedStore]:
        async with open_sqlite_store(path, **options) as store:
            yield HookedStore(store, hooks)

    monkeypatch.setattr(engine_module, "open_sqlite_store", open_store)
    return hooks


def a_config(folder: Path, shop: str, limits: Limits | None = None) -> Config:
    """A runtime on a free port, with one participant."""
    return Config(
        server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
        participants={"shop": Participant(address=shop)},
        limits=limits or Limits(),
    )


@asynccontextmanager
async def a_runtime(config: Config) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime and a client of it."""
    async with (
        run_engine(config) as engine,
        amends.Client(engine.address, timeout_s=30) as client,
    ):
        yield engine, client


@asynccontextmanager
async def a_runtime_with(
    participant: amends.Participant, folder: Path
) -> AsyncIterator[tuple[Engine, amends.Client]]:
    """A runtime whose participant `shop` is this one, and a client of it."""
    async with (
        amends.serve(participant, listen="127.0.0.1:0") as server,
        a_runtime(a_config(folder, server.address)) as (engine, client),
    ):
        yield engine, client


def a_shop() -> amends.Participant:
    """A participant that does at once whatever it is asked."""
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("do")
    async def do(call: amends.Call) -> None:
        """Nothing to do."""

    @shop.compensate("do")
    async def undo(call: amends.Call) -> None:
        """Nothing to undo."""

    return shop


def damage(folder: Path, saga_id: str) -> None:
    """Spoils the first turn of a saga in a database that nobody has open."""
    connection = sqlite3.connect(folder / "amends.db")
    [(trigger,)] = connection.execute(
        "SELECT sql FROM sqlite_master WHERE name = 'history_is_append_only'"
    )
    connection.execute("DROP TRIGGER history_is_append_only")
    connection.execute(
        "UPDATE history SET records = x'c1' WHERE version = 1"
        " AND saga_no = (SELECT saga_no FROM sagas WHERE saga_id = ?)",
        (saga_id,),
    )
    connection.execute(trigger)
    connection.commit()
    connection.close()
