"""Rule 7: a failed commit is an unknown commit, and nothing is lost or doubled by it.

The store is a real one on a real file; between it and the engine stands one that makes a chosen
commit fail: before it was written, after it was written (the answer is lost), or as somebody
else's write would.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

import amends
from amends_runtime import engine as engine_module
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import Record
from amends_runtime.core.saga import Saga, fold
from amends_runtime.engine import run_engine
from amends_runtime.errors import CommitUnknown, OwnershipLost, VersionConflict
from amends_runtime.ports import Transition
from amends_runtime.storage import SqliteStore, open_sqlite_store
from amends_runtime.telemetry.observers import Observers


class StoreWithOneFailure:
    """A real store, but for its `nth` commit of sagas, which fails in the way `how` says."""

    def __init__(self, store: SqliteStore, nth: int, how: str) -> None:
        self._store = store
        self._left = nth
        self._how = how
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commits, or fails in its way."""
        self._left -= 1
        if self._left:
            return await self._store.commit(transitions)
        self.failed = True
        if self._how == "written, answer lost":
            await self._store.commit(transitions)
        if self._how == "version conflict":
            raise VersionConflict([transitions[0].saga_no])
        if self._how == "ownership lost":
            raise OwnershipLost("another runtime owns the store now")
        raise CommitUnknown(f"the disk failed ({self._how})")


def a_shop(folder: Path) -> amends.Participant:
    """A participant whose effects are rows of a ledger, behind a real barrier."""
    shop = amends.Participant("shop", barrier=amends.SqliteBarrier(folder / "shop.db"))

    def note(call: amends.Call, tx: amends.Transaction, sign: int) -> None:
        tx.execute("CREATE TABLE IF NOT EXISTS ledger (saga TEXT, step TEXT, sign INTEGER)")
        tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, call.step, sign))

    @shop.execute("do")
    def do(call: amends.Call, tx: amends.Transaction) -> None:
        note(call, tx, 1)

    @shop.compensate("do")
    def undo(call: amends.Call, tx: amends.Transaction) -> None:
        note(call, tx, -1)

    @shop.execute("refuse", compensatable=False)
    def refuse(call: amends.Call) -> None:
        raise amends.Rejected("not_today")

    for action in ("move", "refuse_to_move"):
        vote_for(shop, action, note)
    return shop


def vote_for(
    shop: amends.Participant,
    action: str,
    note: Callable[[amends.Call, amends.Transaction, int], None],
) -> None:
    """The three verbs of a branch: it notes a vote as 0, and then what it was told."""

    @shop.prepare(action)
    def ask(call: amends.Call, tx: amends.Transaction) -> None:
        if action == "refuse_to_move":
            raise amends.Rejected("not_today")
        note(call, tx, 0)

    @shop.execute(action)
    def commit(call: amends.Call, tx: amends.Transaction) -> None:
        note(call, tx, 1)

    @shop.compensate(action)
    def roll_back(call: amends.Call, tx: amends.Transaction) -> None:
        note(call, tx, -1)


@asynccontextmanager
async def a_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nth: int, how: str
) -> AsyncIterator[tuple[amends.Client, StoreWithOneFailure]]:
    """A runtime, a shop and a client; the runtime's store has one failure."""
    stores: list[StoreWithOneFailure] = []

    @asynccontextmanager
    async def open_store(path: str, **options: bool) -> AsyncIterator[StoreWithOneFailure]:
        async with open_sqlite_store(path, **options) as store:
            stores.append(StoreWithOneFailure(store, nth, how))
            yield stores[-1]

    monkeypatch.setattr(engine_module, "open_sqlite_store", open_store)
    async with amends.serve(a_shop(folder), listen="127.0.0.1:0") as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
            participants={"shop": Participant(address=server.address)},
        )
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(
                amends.Definition("good").step("a", "shop", "do").step("b", "shop", "do")
            )
            await client.register(
                amends.Definition("bad")
                .step("a", "shop", "do")
                .step("b", "shop", "do")
                .pivot("c", "shop", "refuse")
            )
            for name, last in (("commit", "move"), ("abort", "refuse_to_move")):
                await client.register(
                    amends.Definition(name, mode=amends.Mode.TWO_PHASE_COMMIT, ordered=True)
                    .step("a", "shop", "move")
                    .step("b", "shop", "move")
                    .step("c", "shop", last)
                )
            yield client, stores[-1]


class Told(Observers):
    """What the runtime's observers are told, too."""

    records: ClassVar[dict[str, list[Record]]] = {}

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """Notes them down, and checks that nothing is missing in between."""
        so_far = Told.records.setdefault(saga.saga_id, [])
        assert fold(plan, so_far) == before
        so_far += records
        super().turn_committed(plan, before, saga, records)


def ledger_of(folder: Path) -> list[tuple[str, str, int]]:
    """What the participant did, in order."""
    connection = sqlite3.connect(folder / "shop.db")
    try:
        return connection.execute("SELECT saga, step, sign FROM ledger ORDER BY rowid").fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("how", ["not written", "written, answer lost", "version conflict"])
@pytest.mark.parametrize("nth", range(1, 10))  # 3 of the good, 6 of the bad
async def test_a_saga_ends_as_it_should_whichever_of_its_commits_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, how: str
) -> None:
    """The n-th commit of two sagas fails, and their effects are still exact.

    So is what metrics and traces are told: each turn that is durable, once and in order.
    """
    monkeypatch.setattr(engine_module, "Observers", Told)
    monkeypatch.setattr(Told, "records", {})
    async with a_runtime(tmp_path, monkeypatch, nth, how) as (client, store):
        # Below the runtime's own bound of a wait: who waits across the failure is told.
        with anyio.fail_after(20):
            good = await client.start("good", saga_id="good-1")
            assert (await good.result()).state is amends.SagaState.COMPLETED
            bad = await client.start("bad", saga_id="bad-1")
            assert (await bad.result()).state is amends.SagaState.COMPENSATED
        assert store.failed
        for saga_id, saga in (await store.load(["good-1", "bad-1"])).items():
            stored = [record for turn in saga.turns for record in turn.records]
            assert Told.records[saga_id] == stored
    assert ledger_of(tmp_path) == [
        ("good-1", "a", 1),
        ("good-1", "b", 1),
        ("bad-1", "a", 1),
        ("bad-1", "b", 1),
        ("bad-1", "b", -1),
        ("bad-1", "a", -1),
    ]


@pytest.mark.parametrize("how", ["not written", "written, answer lost", "version conflict"])
@pytest.mark.parametrize("nth", range(1, 14))  # 7 of the one that commits, 6 of the other
async def test_a_two_phase_commit_is_atomic_whichever_of_its_commits_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, how: str
) -> None:
    """Votes in order, so that each turn is one commit: the decision's and every acknowledgement's.

    Nobody is told what is not durable: each branch has one end, and all the same one.
    """
    monkeypatch.setattr(engine_module, "Observers", Told)
    monkeypatch.setattr(Told, "records", {})
    async with a_runtime(tmp_path, monkeypatch, nth, how) as (client, store):
        with anyio.fail_after(20):
            committed = await client.start("commit", saga_id="commit-1")
            assert (await committed.result()).state is amends.SagaState.COMPLETED
            aborted = await client.start("abort", saga_id="abort-1")
            assert (await aborted.result()).state is amends.SagaState.COMPENSATED
        assert store.failed
        for saga_id, saga in (await store.load(["commit-1", "abort-1"])).items():
            stored = [record for turn in saga.turns for record in turn.records]
            assert Told.records[saga_id] == stored
    entries = ledger_of(tmp_path)
    votes = [(saga, step) for saga, step, sign in entries if sign == 0]
    ends = [entry for entry in entries if entry[2] != 0]
    steps = {"commit-1": "abc", "abort-1": "ab"}
    assert votes == [(saga, step) for saga, all_steps in steps.items() for step in all_steps]
    assert sorted(ends) == sorted(
        (saga, step, 1 if saga == "commit-1" else -1) for saga, step in votes
    )


async def test_a_runtime_that_lost_its_store_to_another_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not go on deciding: what it would send was never its to decide."""
    with pytest.raises(OwnershipLost):  # noqa: PT012  # what raises is the end of the block
        async with amends.serve(a_shop(tmp_path), listen="127.0.0.1:0") as server:
            stores: list[StoreWithOneFailure] = []

            @asynccontextmanager
            async def open_store(path: str, **options: bool) -> AsyncIterator[StoreWithOneFailure]:
                async with open_sqlite_store(path, **options) as store:
                    stores.append(StoreWithOneFailure(store, 1, "ownership lost"))
                    yield stores[-1]

            monkeypatch.setattr(engine_module, "open_sqlite_store", open_store)
            config = Config(
                server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
                participants={"shop": Participant(address=server.address)},
            )
            async with run_engine(config) as engine, amends.Client(engine.address) as client:
                await client.register(amends.Definition("good").step("a", "shop", "do"))
                with pytest.raises(amends.AmendsError):
                    await client.start("good", timeout_s=1)
                await engine.wait_stopped()
