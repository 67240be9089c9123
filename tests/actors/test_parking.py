"""Sagas at rest leave memory, and are back when it is time, when somebody asks, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import anyio
import pytest

from amends_runtime.actors.supervisor import Limits, StartRequest
from amends_runtime.core.definition import Definition, RetryPolicy, Step
from amends_runtime.core.messages import Broken, Done, InProgress, Outcome, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState, StepExecuted
from amends_runtime.core.saga import Answer
from amends_runtime.engine import Engine
from amends_runtime.errors import NotFound, Overloaded
from amends_runtime.ports import Call, LoadedSaga, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.storage.read_model import verify_read_model
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop
from tests.actors.virtual import Shop, a_runtime, in_virtual_time

HOUR_MS = 3_600_000
SLOW = RetryPolicy(first_ms=HOUR_MS, max_ms=HOUR_MS, give_up_after_ms=1_000 * HOUR_MS)
FAILED = Unknown("UNAVAILABLE", "it is not well")


class Scripted(Shop):
    """A participant that answers each saga's calls in order, the last answer for ever."""

    def __init__(self, **answers: Sequence[Outcome]) -> None:
        super().__init__()
        self.script = {saga_id: list(outcomes) for saga_id, outcomes in answers.items()}
        self.at_s: list[tuple[str, int]] = []
        self.when_called: Callable[[], None] = lambda: None

    async def call(self, call: Call) -> Reply:
        """Answers at once."""
        await anyio.lowlevel.checkpoint()
        self.calls.append((call.saga_id, call.verb.name))
        self.when_called()
        self.at_s.append((call.saga_id, round(anyio.current_time())))
        outcomes = self.script.get(call.saga_id, [Done()])
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        return Reply(outcome, "OK", healthy=True)


async def start(
    engine: Engine,
    *saga_ids: str,
    deadline_ms: int = 0,
    steps: int = 1,
    retry: RetryPolicy = SLOW,
) -> None:
    """Starts sagas whose steps have no order, and are tried again after up to an hour."""
    numbers = range(steps)
    await engine.definitions.register(
        Definition(
            name="slow",
            steps=tuple(
                Step(name=f"s{number}", participant="shop", action="do", retry=retry, after=())
                for number in numbers
            ),
        )
    )
    for saga_id in saga_ids:
        await engine.supervisor.start_saga(
            StartRequest(
                saga_id=saga_id,
                definition_name="slow",
                content_hash="c",
                input=Payload(b""),
                deadline_ms=deadline_ms,
            )
        )


async def settle(engine: Engine) -> None:
    """Until what was decided is durable, and whoever lingered has left."""
    await anyio.sleep(5)
    await engine.supervisor.wait_idle()


def what_is_kept(engine: Engine) -> tuple[int, int, int]:
    """Live sagas, parked ones, and those of them of which memory has an entry."""
    counts = engine.supervisor.counts()
    assert counts.without_wake_up == 0
    return counts.live, counts.parked, counts.kept


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Runs a test's body in virtual time."""
    in_virtual_time(main)


def test_a_saga_that_waits_for_long_is_a_row_until_it_is_time() -> None:
    """Nothing of it stays in memory; its next attempt leaves when the history says."""

    async def main() -> None:
        store = MemoryStore(MemoryDisk())
        shop = Scripted(s=[FAILED, FAILED, Done()])
        async with a_runtime(store, shop) as engine:
            await start(engine, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 0)
            view = await engine.supervisor.view("s")
            due_ms = view.saga.steps[0].retry_at_ms
            ended = await engine.supervisor.wait("s", 4 * 3600)
            assert ended.saga.state is SagaState.COMPLETED
            assert what_is_kept(engine) == (0, 0, 0)
            [first, second, _] = [at_s for _, at_s in shop.at_s]
            waited_ms = due_ms - view.saga.updated_at_ms
            assert second - first == pytest.approx(waited_ms / 1000, abs=1.1)
        assert await verify_read_model(store) == []

    run(main)


def test_after_a_restart_what_rests_is_not_loaded_and_wakes_on_time() -> None:
    """The restart reads its name when its time comes near, and not before."""
    disk = MemoryDisk()

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Scripted(s=[FAILED])) as engine:
            await start(engine, "s")
            await settle(engine)
            due_ms = (await engine.supervisor.view("s")).saga.steps[0].retry_at_ms
        shop = Scripted()
        store = MemoryStore(disk)
        async with a_runtime(store, shop) as engine:
            now_ms = engine.supervisor._clock.now_ms()
            await anyio.sleep((due_ms - now_ms) / 1000 - 70)
            assert what_is_kept(engine) == (0, 1, 0)
            await anyio.sleep(40)
            assert what_is_kept(engine) == (0, 1, 1)
            assert shop.calls == []
            await anyio.sleep(31)
            assert (await engine.supervisor.view("s")).saga.state is SagaState.COMPLETED
            assert shop.calls == [("s", "EXECUTE")]
            assert what_is_kept(engine) == (0, 0, 0)

    run(main)


def test_a_poll_that_is_far_away_is_kept_without_the_saga() -> None:
    """It is the same attempt, asked again when the participant said; nothing counts as lost."""

    async def main() -> None:
        store = MemoryStore(MemoryDisk())
        shop = Scripted(s=[InProgress(HOUR_MS), InProgress(HOUR_MS), Done()])
        async with a_runtime(store, shop) as engine:
            await start(engine, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 1)
            ended = await engine.supervisor.wait("s", 5 * 3600)
            assert ended.saga.state is SagaState.COMPLETED
            begun = shop.at_s[0][1]
            assert shop.at_s == [("s", begun), ("s", begun + 3600), ("s", begun + 7200)]
            assert what_is_kept(engine) == (0, 0, 0)
        [loaded] = (await MemoryStore(store.disk).load(["s"])).values()
        assert isinstance(loaded, LoadedSaga)
        records = [record for turn in loaded.turns for record in turn.records]
        assert [type(record).__name__ for record in records] == [
            "SagaStarted",
            "AttemptStarted",
            "StepExecuted",
            "SagaEnded",
        ]
        assert isinstance(records[2], StepExecuted)
        assert records[2].timing.polls == 2

    run(main)


def test_two_polls_of_one_saga_are_asked_each_at_its_time() -> None:
    """The one that comes first does not take the other with it."""

    async def main() -> None:
        shop = Scripted(s=[InProgress(HOUR_MS), InProgress(2 * HOUR_MS), Done()])
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, "s", steps=2)
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 1)
            await anyio.sleep(3600)
            assert what_is_kept(engine) == (0, 1, 1)
            ended = await engine.supervisor.wait("s", 5 * 3600)
            assert ended.saga.state is SagaState.COMPLETED
            begun = shop.at_s[0][1]
            assert [at_s - begun for _, at_s in shop.at_s] == [0, 0, 3600, 7200]

    run(main)


def test_a_stuck_saga_costs_nothing_until_somebody_retries_it() -> None:
    """A person's word brings it in; a client's question is answered from the store."""

    async def main() -> None:
        shop = Scripted(s=[Broken("B"), Done()], t=[Broken("B")])
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, "s", "t")
            await settle(engine)
            assert what_is_kept(engine) == (0, 2, 0)
            survey = await engine.supervisor.survey()
            assert (survey.stuck, survey.parked) == (2, {SagaState.STUCK: 2})
            assert (await engine.supervisor.view("s")).saga.state is SagaState.STUCK
            assert what_is_kept(engine) == (0, 2, 0)
            _, answer = await engine.supervisor.retry_saga("s", None, "ann", "mended")
            assert answer is Answer.RETRIED
            _, answer = await engine.supervisor.abandon_saga("t", "ann", "hopeless")
            assert answer is Answer.ABANDONED
            await settle(engine)
            assert (await engine.supervisor.view("s")).saga.state is SagaState.COMPLETED
            assert what_is_kept(engine) == (0, 0, 0)

    run(main)


def test_a_deadline_turns_a_parked_saga_back() -> None:
    """It is an instant like a retry's, and the earlier of the two counts."""

    async def main() -> None:
        shop = Scripted(s=[InProgress(20 * HOUR_MS), Done()], t=[FAILED, Done()])
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, "t", deadline_ms=5 * 60_000)
            await settle(engine)
            assert what_is_kept(engine)[:2] == (0, 1)
            view = await engine.supervisor.wait("t", 3600)
            assert view.saga.state is SagaState.COMPENSATED
            assert view.saga.ended_at_ms - view.saga.started_at_ms < 6 * 60_000

    run(main)


def test_a_saga_is_cancelled_while_its_poll_is_far_away() -> None:
    """It comes in, the attempt is asked once more at its deadline, and then it is compensated."""

    async def main() -> None:
        shop = Scripted(s=[InProgress(20 * HOUR_MS), InProgress(20 * HOUR_MS), Done()])
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            await start(engine, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 1)
            _, answer = await engine.supervisor.cancel_saga("s", "ann", "too slow")
            assert answer is Answer.TURNED_BACK
            view = await engine.supervisor.wait("s", 3600)
            assert view.saga.state is SagaState.COMPENSATED
            assert shop.calls[-1] == ("s", "COMPENSATE")
            assert what_is_kept(engine) == (0, 0, 0)

    run(main)


def test_who_waits_for_a_parked_saga_is_told_of_its_end() -> None:
    """By `wait`, and by the futures of a stream, whether they came before it left or after."""

    async def main() -> None:
        shop = Scripted(s=[FAILED, Done()])
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            supervisor = engine.supervisor
            await start(engine, "s")
            await settle(engine)
            assert supervisor.waiter_for("s") is None
            told = await supervisor.bring_in("s")
            assert told.view.saga.state is SagaState.RUNNING
            early, forgotten = supervisor.waiter_for("s"), supervisor.waiter_for("s")
            assert early is not None
            assert forgotten is not None
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 1)
            supervisor.forget_waiter("s", forgotten)
            short = await supervisor.wait("s", 1)
            assert short.saga.state is SagaState.RUNNING
            view = await early
            assert view is not None
            assert view.saga.state is SagaState.COMPLETED

    run(main)


def test_a_repeated_start_finds_a_parked_saga() -> None:
    """The same id and content is the same saga, wherever it is."""

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Scripted(s=[FAILED])) as engine:
            await start(engine, "s")
            await settle(engine)
            await start(engine, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 0)
            with pytest.raises(NotFound):
                await engine.supervisor.bring_in("nobody")
            assert what_is_kept(engine) == (0, 1, 0)

    run(main)


def test_sagas_at_rest_leave_when_others_need_the_room() -> None:
    """Only what is under way counts for the bound; the refusal names it."""

    async def main() -> None:
        shop = Scripted(a=[FAILED], b=[FAILED])
        limits = Limits(live_sagas=2, park_after_ms=1_000 * HOUR_MS)
        async with a_runtime(MemoryStore(MemoryDisk()), shop, limits=limits) as engine:
            await start(engine, "a", "b")
            await settle(engine)
            assert what_is_kept(engine) == (2, 0, 0)
            await start(engine, "c")
            await settle(engine)
            assert what_is_kept(engine) == (1, 1, 0)

    run(main)


def test_what_is_under_way_counts_for_the_bound() -> None:
    """Nothing at rest can make room for a start when all are called for."""

    async def main() -> None:
        limits = Limits(live_sagas=2, park_after_ms=0)
        async with a_runtime(MemoryStore(MemoryDisk()), Shop(), limits=limits) as engine:
            await start(engine, "a", "b")
            with pytest.raises(Overloaded, match="live_sagas"):
                await start(engine, "c")

    run(main)


def test_hundreds_that_are_due_together_come_in_within_the_bound() -> None:
    """After a stop of hours all are due: all come, and never more at once than there may be.

    That is a little above the bound at which starts are refused: they exist already.
    """
    disk, ids = MemoryDisk(), [f"s{number}" for number in range(300)]
    live: list[int] = []

    async def main() -> None:
        shop = Scripted(**{saga_id: [FAILED] for saga_id in ids})
        async with a_runtime(MemoryStore(disk), shop) as engine:
            await start(engine, *ids)
            await settle(engine)
        await anyio.sleep(2 * 3600)
        limits, shop = Limits(live_sagas=20), Scripted()
        async with a_runtime(MemoryStore(disk), shop, limits=limits) as engine:
            shop.when_called = lambda: live.append(engine.supervisor.counts().live)
            with anyio.fail_after(600):
                while sum(what_is_kept(engine)) or engine.supervisor.recovery.running:  # noqa: ASYNC110
                    await anyio.sleep(1)
            rows = await engine.store.count_by_state()
            assert rows == {SagaState.COMPLETED: 300}

    run(main)
    assert len(live) == 300
    assert max(live) == 22


@pytest.mark.parametrize("restart", [False, True])
def test_a_wall_clock_that_is_set_back_holds_no_retry_up(*, restart: bool) -> None:
    """A day back, while the runtime is up or while it is down: an hour's wait stays an hour's."""
    disk = MemoryDisk()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        shop = Scripted(s=[FAILED, Done()])
        async with a_runtime(MemoryStore(disk), shop, clock=clock) as engine:
            await start(engine, "s")
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 0)
            clock.jump(-24 * HOUR_MS)
            if not restart:
                await anyio.sleep(3600 + 60)
        if restart:
            async with a_runtime(MemoryStore(disk), shop, clock=clock) as engine:
                await anyio.sleep(3600 + 60)
        assert len(shop.calls) == 2

    run(main)


def test_a_wall_clock_that_jumps_ahead_wakes_all_and_loses_none() -> None:
    """What is due by it comes at once, paced; what was asked for meanwhile is answered."""
    ids = [f"s{number}" for number in range(50)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        script: dict[str, list[Outcome]] = {saga_id: [FAILED, Done()] for saga_id in ids}
        shop = Scripted(**script)
        async with a_runtime(MemoryStore(MemoryDisk()), shop, clock=clock) as engine:
            await start(engine, *ids)
            await settle(engine)
            clock.jump(24 * HOUR_MS)
            await anyio.sleep(120)
            assert await engine.store.count_by_state() == {SagaState.COMPLETED: 50}
            assert what_is_kept(engine) == (0, 0, 0)

    run(main)


def test_a_wall_clock_that_is_set_back_holds_no_poll_up_that_somebody_has_asked_after() -> None:
    """The saga comes in, and leaves again: its poll stays as far ahead as it was."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        shop = Scripted(s=[InProgress(HOUR_MS), Done()])
        async with a_runtime(MemoryStore(MemoryDisk()), shop, clock=clock) as engine:
            await start(engine, "s")
            await settle(engine)
            clock.jump(-10 * HOUR_MS)
            await engine.supervisor.wait("s", 1)
            await settle(engine)
            assert what_is_kept(engine) == (0, 1, 1)
            await anyio.sleep(3600)
            begun = shop.at_s[0][1]
            assert shop.at_s == [("s", begun), ("s", begun + 3600)]

    run(main)


def test_a_live_saga_keeps_no_timer_that_has_fired() -> None:
    """One that is tried every second or so for an hour holds as little at the end of it."""

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Scripted(s=[FAILED])) as engine:
            retry = RetryPolicy(first_ms=1_000, max_ms=1_000, give_up_after_ms=1_000 * HOUR_MS)
            await start(engine, "s", retry=retry)
            await anyio.sleep(3600)
            [actor] = engine.supervisor._actors.values()
            assert len(actor.timers) <= 2

    run(main)
