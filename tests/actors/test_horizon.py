"""The horizon: it reads on whatever memory keeps for others, and what it has seen comes."""

from __future__ import annotations

import anyio
import pytest

from amends_runtime.actors import horizon as horizon_module
from amends_runtime.actors import supervisor as supervisor_module
from amends_runtime.actors.horizon import AHEAD_MS
from amends_runtime.core.messages import Broken, Done, InProgress, Outcome
from amends_runtime.core.records import SagaState
from amends_runtime.engine import Engine
from amends_runtime.errors import StoreError, Unavailable
from amends_runtime.ports import LoadedSaga, RestingSaga, Tombstone
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors.test_parking import (
    FAILED,
    HOUR_MS,
    Scripted,
    run,
    settle,
    start,
    what_is_kept,
)
from tests.actors.virtual import a_runtime

MANY = 20


@pytest.fixture(autouse=True)
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the tests have sagas are as many as may be near at once."""
    monkeypatch.setattr(supervisor_module, "MAX_NEAR", MANY)
    monkeypatch.setattr(horizon_module, "PAGE", 30)


async def until_due_s(engine: Engine, saga_id: str) -> float:
    """How long until the saga's first step is tried again."""
    due_ms = (await engine.supervisor.view(saga_id)).saga.steps[0].retry_at_ms
    return (due_ms - engine.supervisor._clock.now_ms()) / 1000


def test_polls_that_are_kept_do_not_stop_it() -> None:
    """They have timers of their own, and are no matter of the horizon's."""

    async def main() -> None:
        ids = [f"p{number}" for number in range(MANY)]
        script: dict[str, list[Outcome]] = {one: [InProgress(20 * HOUR_MS), Done()] for one in ids}
        async with a_runtime(
            MemoryStore(MemoryDisk()), Scripted(s=[FAILED, Done()], **script)
        ) as engine:
            await start(engine, *ids, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, MANY + 1, MANY)
            view = await engine.supervisor.wait("s", 3660)
            assert view.saga.state is SagaState.COMPLETED

    run(main)


def test_who_waits_for_stuck_sagas_does_not_stop_it() -> None:
    """Whether they still wait or have left; of whom nobody waits for any more nothing is kept."""

    async def main() -> None:
        ids = [f"w{number}" for number in range(MANY)]
        script: dict[str, list[Outcome]] = {one: [Broken("B")] for one in ids}
        shop = Scripted(s=[FAILED, Done()], t=[FAILED, Done()], **script)
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, *ids, "s")
            await settle(engine)
            waiters = []
            for one in ids:
                await engine.supervisor.bring_in(one)
                waiters.append((one, engine.supervisor.waiter_for(one)))
            await settle(engine)
            assert what_is_kept(engine) == (0, MANY + 1, MANY)
            await anyio.sleep(3660)
            assert (await engine.supervisor.view("s")).saga.state is SagaState.COMPLETED
            for one, waiter in waiters:
                assert waiter is not None
                engine.supervisor.forget_waiter(one, waiter)
            assert what_is_kept(engine) == (0, MANY, 0)

    run(main)


def test_more_than_may_be_near_follow_as_the_first_of_them_leave() -> None:
    """All are due after a stop of hours; never more than the bound are kept, and all come."""
    disk, ids = MemoryDisk(), [f"s{number}" for number in range(300)]
    near: list[int] = []

    async def main() -> None:
        async with a_runtime(
            MemoryStore(disk), Scripted(**{one: [FAILED] for one in ids})
        ) as engine:
            await start(engine, *ids)
            await settle(engine)
        await anyio.sleep(2 * 3600)
        shop = Scripted()
        async with a_runtime(MemoryStore(disk), shop) as engine:
            shop.when_called = lambda: near.append(engine.supervisor._parking.near)
            await anyio.sleep(600)
            assert await engine.store.count_by_state() == {SagaState.COMPLETED: 300}
            assert engine.supervisor._parking.near == 0

    run(main)
    assert max(near) < MANY + 30, "a page of rows is taken whole"


def test_a_saga_that_it_has_seen_on_its_way_in_comes_though_who_asked_has_left() -> None:
    """The read fails while a look goes by: who asked is told so, and the retry is on time."""

    class Store(MemoryStore):
        failing: anyio.Event | None = None

        async def load(self, saga_ids: object) -> dict[str, LoadedSaga | Tombstone]:
            failing, self.failing = self.failing, None
            if failing is not None:
                await failing.wait()
                raise StoreError("the store is being reopened")
            return await super().load(saga_ids)  # type: ignore[arg-type]

    async def main() -> None:
        store, shop = Store(MemoryDisk()), Scripted(s=[FAILED, Done()])
        async with a_runtime(store, shop) as engine:
            await start(engine, "s")
            await settle(engine)
            await anyio.sleep(await until_due_s(engine, "s") - AHEAD_MS / 1000 - 2)
            store.failing = failing = anyio.Event()
            asked = engine.supervisor.bring_in("s")
            await anyio.sleep(25)  # a look, after which the horizon has its instant behind it
            failing.set()
            with pytest.raises(Unavailable):
                await asked
            await anyio.sleep(60)
            assert (await engine.supervisor.view("s")).saga.state is SagaState.COMPLETED

    run(main)


def test_a_page_that_is_older_than_a_sagas_end_is_not_counted() -> None:
    """The row is read, the saga comes in and ends, and then the page is gone through."""

    class Store(MemoryStore):
        held: anyio.Event | None = None

        async def resting_sagas(self, *where: object) -> list[RestingSaga]:
            page = await super().resting_sagas(*where)  # type: ignore[arg-type]
            if page and self.held is not None:
                held, self.held = self.held, None
                await held.wait()
            return page

    async def main() -> None:
        store, shop = Store(MemoryDisk()), Scripted(s=[FAILED, Done()])
        async with a_runtime(store, shop) as engine:
            await start(engine, "s")
            await settle(engine)
            store.held = held = anyio.Event()
            await anyio.sleep(await until_due_s(engine, "s") - 30)
            await engine.supervisor.abandon_saga("s", "ann", "hopeless", force=True)
            held.set()
            await anyio.sleep(120)
            survey = await engine.supervisor.survey()
            assert (survey.parked, survey.in_doubt) == ({}, 0)
            assert what_is_kept(engine) == (0, 0, 0)

    run(main)
