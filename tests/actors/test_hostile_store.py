"""A store that fails, is damaged, or is full: no saga is forgotten, and none holds up another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

import amends
from amends_runtime.actors.turns import BATCH_BYTES
from amends_runtime.config import Limits
from amends_runtime.core import saga as core
from amends_runtime.core.messages import Answered
from amends_runtime.core.records import SagaStarted, SagaState
from amends_runtime.errors import CommitUnknown, StoreError
from amends_runtime.ports import OpenSaga, Transition
from amends_runtime.storage import SqliteStore
from tests.actors.runtimes import (
    NOWHERE,
    ONE_STEP,
    a_config,
    a_runtime,
    a_runtime_with,
    a_shop,
    damage,
    hook_store,
)

IDS = [f"s-{number}" for number in range(5)]


async def leave_open(folder: Path) -> None:
    """Starts sagas that cannot go on, and ends the runtime."""
    async with a_runtime(a_config(folder, NOWHERE)) as (_engine, client):
        await client.register(ONE_STEP)
        for saga_id in IDS:
            await client.start("one", saga_id=saga_id)


async def test_a_damaged_saga_holds_up_no_other_and_is_told_and_counted(tmp_path: Path) -> None:
    """The others complete; who asks for the damaged one hears why; it counts as not waking."""
    await leave_open(tmp_path)
    damage(tmp_path, "s-2")
    async with a_runtime_with(a_shop(), tmp_path) as (engine, client):
        for saga_id in IDS:
            if saga_id != "s-2":
                ended = await client.wait(saga_id, timeout_s=30)
                assert ended.state is amends.SagaState.COMPLETED
        with pytest.raises(amends.WrongState, match="cannot be read"):
            await client.get("s-2")
        with pytest.raises(amends.WrongState, match="cannot be read"):
            await client.cancel("s-2", reason="test", author="test")
        counts = engine.supervisor.counts()
        assert (counts.unreadable, counts.without_wake_up) == (1, 1)
        assert not engine.failed


async def test_recovery_waits_for_a_store_that_cannot_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a loop and not a list: the same page is asked for again."""
    await leave_open(tmp_path)
    hooks = hook_store(monkeypatch)
    failures = 2

    async def open_sagas(
        store: SqliteStore, state: SagaState, after_no: int, limit: int
    ) -> list[OpenSaga]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreError("it is being reopened")
        return await store.open_sagas(state, after_no, limit)

    hooks["open_sagas"] = open_sagas
    async with a_runtime_with(a_shop(), tmp_path) as (_engine, client):
        for saga_id in IDS:
            ended = await client.wait(saga_id, timeout_s=30)
            assert ended.state is amends.SagaState.COMPLETED


async def test_a_saga_whose_reading_again_fails_is_read_until_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed commit its actor is gone; a load that fails then must not make it nobody's."""
    hooks = hook_store(monkeypatch)
    commits = loads = 0
    here_again = anyio.Event()

    async def commit(store: SqliteStore, transitions: Sequence[Transition]) -> int:
        nonlocal commits
        commits += 1
        if commits == 2:
            raise CommitUnknown("the disk failed")
        seq = await store.commit(transitions)
        if any(t.summary and t.summary.ended_at_ms for t in transitions):
            here_again.set()
        return seq

    async def load(store: SqliteStore, ids: Sequence[str]) -> Any:
        nonlocal loads
        if commits == 2 and loads < 3:
            loads += 1
            raise StoreError("the disk failed")
        return await store.load(ids)

    hooks["commit"], hooks["load"] = commit, load
    async with a_runtime_with(a_shop(), tmp_path) as (_engine, client):
        await client.register(ONE_STEP)
        await client.start("one", saga_id="s")
        with anyio.fail_after(30):
            await here_again.wait()  # nobody asks for it meanwhile
        assert (await client.get("s")).state is amends.SagaState.COMPLETED
        assert loads == 3


async def test_one_crash_in_deciding_loses_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thrown away, the reply would leave its attempt open for ever."""
    decide, crashed = core.decide, False

    def decide_with_one_crash(
        plan: Any, saga: core.Saga | None, message: Any, now_ms: int, epoch: int
    ) -> core.Decision:
        nonlocal crashed
        if isinstance(message, Answered) and not crashed:
            crashed = True
            raise ZeroDivisionError
        return decide(plan, saga, message, now_ms, epoch)

    monkeypatch.setattr(core, "decide", decide_with_one_crash)
    async with a_runtime_with(a_shop(), tmp_path) as (_engine, client):
        await client.register(ONE_STEP)
        handle = await client.start("one")
        assert (await handle.result(timeout_s=30)).state is amends.SagaState.COMPLETED
        assert crashed


async def test_what_a_page_of_recovery_said_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saga that ends while recovery holds a page stays ended for whoever asks."""
    await leave_open(tmp_path)
    hooks = hook_store(monkeypatch)
    read, go_on = asyncio.Event(), asyncio.Event()

    async def open_sagas(
        store: SqliteStore, state: SagaState, after_no: int, limit: int
    ) -> list[OpenSaga]:
        page = await store.open_sagas(state, after_no, limit)
        read.set()
        await go_on.wait()
        return page

    hooks["open_sagas"] = open_sagas
    async with a_runtime_with(a_shop(), tmp_path) as (_engine, client):
        await read.wait()
        ended = await client.wait("s-0", timeout_s=30)
        assert ended.state is amends.SagaState.COMPLETED
        go_on.set()
        for saga_id in IDS[1:]:
            await client.wait(saga_id, timeout_s=30)
        assert (await client.get("s-0")).version == ended.version
        assert (await client.get("s-0")).state is amends.SagaState.COMPLETED


async def test_a_repeated_start_is_answered_although_no_new_saga_is_taken(tmp_path: Path) -> None:
    """The limit is one of sagas under way; a caller's retry of a lost reply makes none."""
    called, go_on = anyio.Event(), anyio.Event()
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("do", compensatable=False)
    async def do(call: amends.Call) -> None:
        """Under way for as long as the test asks; one at rest would make room."""
        called.set()
        await go_on.wait()

    async with (
        amends.serve(shop, listen="127.0.0.1:0") as server,
        a_runtime(a_config(tmp_path, server.address, Limits(live_sagas=1))) as (_, client),
    ):
        await client.register(amends.Definition("one").read_only("a", "shop", "do"))
        await client.start("one", saga_id="s")
        await called.wait()
        assert (await client.start("one", saga_id="s")).existed
        with pytest.raises(amends.Overloaded, match="live_sagas"):
            await client.start("one", saga_id="other", timeout_s=0.5)
        with pytest.raises(amends.NotFound):
            await client.get("other")
        go_on.set()


async def test_a_commit_is_bounded_by_bytes_as_well_as_by_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts that wait behind a slow commit go into several, not into one of all their bytes.

    Each from a client of its own: those of one client wait for each other.
    """
    hooks = hook_store(monkeypatch)
    gate, sizes = asyncio.Event(), []
    payload = b"x" * 1_000_000

    async def commit(store: SqliteStore, transitions: Sequence[Transition]) -> int:
        records = [record for t in transitions for record in t.records]
        sizes.append(sum(len(r.input.data) for r in records if isinstance(r, SagaStarted)))
        await gate.wait()
        return await store.commit(transitions)

    hooks["commit"] = commit
    async with a_runtime(a_config(tmp_path, NOWHERE)) as (engine, client):
        await client.register(ONE_STEP)

        async def start() -> None:
            async with amends.Client(engine.address, timeout_s=60) as own:
                await own.start("one", payload)

        async with anyio.create_task_group() as tasks:
            for number in range(24):
                tasks.start_soon(start, name=str(number))
            with anyio.fail_after(30):
                # One commit is held, the slot is full, and the others wait to be decided.
                while engine.supervisor.counts().live < 24:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            gate.set()
    assert sum(sizes) == 24 * len(payload)
    assert max(sizes) < BATCH_BYTES + len(payload)
