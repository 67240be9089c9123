"""Starts that never cease: what waits for its time has its share of every commit all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from amends_runtime.actors import entering
from amends_runtime.actors import timers as timers_module
from amends_runtime.actors.supervisor import Limits
from amends_runtime.core.definition import RetryPolicy
from amends_runtime.core.messages import Done, Outcome
from amends_runtime.core.records import SagaState
from amends_runtime.engine import Engine
from amends_runtime.ports import Transition
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors import virtual
from tests.actors.test_parking import FAILED, Scripted, run, settle, start
from tests.actors.virtual import Shop, a_runtime

BATCH = 4
CLIENTS = 20  # as many starts are under way at any moment: five batches' worth


class SlowStore(MemoryStore):
    """A commit takes fifty milliseconds."""

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commits."""
        await anyio.sleep(0.05)
        return await super().commit(transitions)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog of a handful is one with which nothing keeps up."""
    monkeypatch.setattr(entering, "ARRIVE_BACKLOG", BATCH)
    monkeypatch.setattr(entering, "ARRIVE_SHARE", 2)
    monkeypatch.setattr(timers_module, "PACE", BATCH)
    monkeypatch.setattr(timers_module, "SHARE", 2)


@asynccontextmanager
async def under_load(engine: Engine) -> AsyncIterator[list[int]]:
    """For the length of the block, clients start one saga after the other; the backlogs seen."""
    backlogs: list[int] = []

    async def client(name: int) -> None:
        number = 0
        while True:
            await virtual.start(engine, f"load-{name}-{number}")
            backlogs.append(engine.supervisor.counts().backlog)
            number += 1

    async with anyio.create_task_group() as tasks:
        for name in range(CLIENTS):
            tasks.start_soon(client, name)
        await anyio.sleep(1)
        yield backlogs
        tasks.cancel_scope.cancel()


LIMITS = Limits(commit_batch=BATCH)


def test_recovery_is_over_before_the_load_is() -> None:
    """What was under way before the restart comes in, a few with each commit."""
    disk, ids = MemoryDisk(), [f"old-{number}" for number in range(50)]

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Shop()) as engine:
            await virtual.start(engine, *ids)
        shop = Scripted()
        async with (
            a_runtime(SlowStore(disk), shop, limits=LIMITS) as engine,
            under_load(engine) as backlogs,
        ):
            await anyio.sleep(5)
            assert min(backlogs[CLIENTS:]) > BATCH, "else nothing was held back"
            recovery = engine.supervisor.recovery
            assert (recovery.running, recovery.sagas) == (False, 50)
            for saga_id in ids:
                view = await engine.supervisor.view(saga_id)
                assert view.saga.state is SagaState.COMPLETED

    run(main)


@pytest.mark.parametrize("first_ms", [1_000, 12_000])
def test_retries_leave_while_the_load_goes_on(first_ms: int) -> None:
    """Of sagas that wait in memory, and of those that are parked: both are asked again."""
    ids = [f"s-{number}" for number in range(20)]
    retry = RetryPolicy(first_ms=first_ms, max_ms=first_ms, give_up_after_ms=86_400_000)

    async def main() -> None:
        script: dict[str, list[Outcome]] = {one: [FAILED, FAILED, Done()] for one in ids}
        shop = Scripted(**script)
        async with a_runtime(SlowStore(MemoryDisk()), shop, limits=LIMITS) as engine:
            await start(engine, *ids, retry=retry)
            await settle(engine)
            async with under_load(engine) as backlogs:
                await anyio.sleep(first_ms * 2 / 1000 + 5)
                assert min(backlogs[CLIENTS:]) > BATCH, "else nothing was held back"
                for saga_id in ids:
                    view = await engine.supervisor.view(saga_id)
                    assert view.saga.state is SagaState.COMPLETED

    run(main)
