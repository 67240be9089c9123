"""What is looked at: the sagas in memory in all their states, the loop's lag, recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
import structlog.testing

from amends_runtime.actors.supervisor import StartRequest
from amends_runtime.actors.survey import SLICE, Survey, in_doubt
from amends_runtime.core.definition import Definition, Mode, RetryPolicy, Step
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Unknown,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import StepState, StepStatus
from amends_runtime.engine import Engine
from amends_runtime.ports import Call, Reply, Transition
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.gauges import LAG_EVERY_S, LOOK_EVERY_S, SHARE, Gauges, Sources
from amends_runtime.telemetry.meters import HistogramValue
from amends_runtime.telemetry.metrics import Metrics
from amends_runtime.testing.virtual_time import VirtualLoop
from tests.actors.virtual import Shop, a_runtime, in_virtual_time, start

NO_ANSWER = Unknown("DEADLINE_EXCEEDED", "no answer")
Look = Callable[[], Awaitable[object]]


async def nothing() -> None:
    """Looks at nothing."""


class LookedAtStore(MemoryStore):
    """A store that looks while turns are decided and not durable, and when they just are."""

    look: Look = staticmethod(nothing)

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commits, between two looks."""
        await self.look()
        seq = await super().commit(transitions)
        await self.look()
        return seq


class ScriptedShop(Shop):
    """Answers each call with the next outcome of its saga, at last Done; looks while it is asked.

    An outcome None: nobody is there.
    """

    def __init__(self, script: dict[str, list[Outcome | None]]) -> None:
        super().__init__()
        self.script = script
        self.look: Look = nothing

    async def call(self, call: Call) -> Reply:
        """Answers after a millisecond."""
        await self.look()
        await anyio.sleep(0.001)
        await self.look()
        outcomes = self.script.get(call.saga_id, [])
        outcome = outcomes.pop(0) if outcomes else Done()
        if outcome is None:
            return Reply(Unknown("UNAVAILABLE", "gone"), "UNAVAILABLE", healthy=False, away=True)
        status = outcome.reason if isinstance(outcome, Unknown) else "OK"
        return Reply(outcome, status, healthy=not isinstance(outcome, Unknown))


class WellShop(ScriptedShop):
    """One whose breaker stays closed whatever it answers."""

    async def call(self, call: Call) -> Reply:
        """Answers as scripted."""
        return msgspec.structs.replace(await super().call(call), healthy=True)


TWO_STEPS = Definition(
    name="two",
    steps=(
        Step(name="a", participant="shop", action="do"),
        Step(name="b", participant="shop", action="do"),
    ),
)


async def begin(engine: Engine, saga_id: str, deadline_ms: int = 0) -> None:
    """Starts a saga of the definition `two`."""
    await engine.supervisor.start_saga(
        StartRequest(
            saga_id=saga_id,
            definition_name="two",
            content_hash="c",
            input=Payload(b""),
            deadline_ms=deadline_ms,
        )
    )


# -- the survey ------------------------------------------------------------------------------------


def test_no_healthy_saga_is_ever_without_something_that_wakes_it() -> None:
    """At every moment at which anybody can look: between turns, on the wire, in a backoff."""
    seen: list[Survey] = []
    script: dict[str, list[Outcome | None]] = {
        "done": [],
        "retried": [NO_ANSWER, NO_ANSWER],
        "polled": [InProgress(poll_after_ms=50), InProgress(poll_after_ms=50)],
        "refused": [Done(), Rejected("no")],
        "in doubt, then undone": [Done(), NO_ANSWER, Rejected("no"), NO_ANSWER],
        "deadline": [InProgress(poll_after_ms=60_000)],
        "away": [None] * 12,
        "broken": [Done(), Broken("lost")],
    }

    async def main() -> None:
        store, shop = LookedAtStore(MemoryDisk()), ScriptedShop(script)
        async with a_runtime(store, shop) as engine:

            async def look() -> None:
                seen.append(await engine.supervisor.survey())

            store.look = shop.look = look
            await engine.definitions.register(TWO_STEPS)
            async with anyio.create_task_group() as tasks:
                for saga_id in script:
                    deadline_ms = 5_000 if saga_id == "deadline" else 0
                    tasks.start_soon(begin, engine, saga_id, deadline_ms)
            for _ in range(200):
                await anyio.sleep(0.5)
                await look()

    in_virtual_time(main)
    assert len(seen) > 250
    assert {survey.without_wake_up for survey in seen} == {0}
    assert max(survey.in_doubt for survey in seen) > 0
    assert max(survey.active[SagaState.COMPENSATING] for survey in seen) > 0
    assert max(survey.active[SagaState.RUNNING] for survey in seen) == len(script)
    last = seen[-1]
    assert last.active == {SagaState.RUNNING: 0, SagaState.COMPENSATING: 0, SagaState.STUCK: 1}
    assert (last.stuck, last.in_doubt, last.backlog, last.messages) == (1, 1, 0, 0)


def test_no_two_phase_commit_is_ever_without_something_that_wakes_it() -> None:
    """Nor does one look as if it held something before a vote, or after the last acknowledgement.

    One whose participant is told for longer than its budget is stuck for whoever counts, and ends.
    """
    seen: list[Survey] = []
    script: dict[str, list[Outcome | None]] = {
        "done": [],
        "refused": [Done(), Rejected("no")],
        "polled": [InProgress(poll_after_ms=50), InProgress(poll_after_ms=50)],
        "deadline": [InProgress(poll_after_ms=60_000)],
        "unknown": [NO_ANSWER, NO_ANSWER],
        "told for long": [Done(), Done(), *[NO_ANSWER] * 9],
        "undone for long": [Done(), Rejected("no"), *[NO_ANSWER] * 9],
        "mixed": [Done(), Done(), Broken("vote_lost"), Heuristic(True, "by_hand")],
    }
    policy = RetryPolicy(first_ms=1_000, factor=1.0, max_ms=1_000, give_up_after_ms=2_000)
    steps = tuple(
        Step(name=name, participant="shop", action="do", retry=policy, compensation_retry=policy)
        for name in "ab"
    )

    async def main() -> None:
        store, shop = LookedAtStore(MemoryDisk()), WellShop(script)
        async with a_runtime(store, shop) as engine:

            async def look() -> None:
                seen.append(await engine.supervisor.survey())

            store.look = shop.look = look
            await engine.definitions.register(
                Definition(name="two", mode=Mode.TWO_PHASE_COMMIT, steps=steps)
            )
            async with anyio.create_task_group() as tasks:
                for saga_id in script:
                    deadline_ms = 5_000 if saga_id == "deadline" else 0
                    tasks.start_soon(begin, engine, saga_id, deadline_ms)
            for _ in range(300):
                await anyio.sleep(0.5)
                await look()

    in_virtual_time(main)
    assert {survey.without_wake_up for survey in seen} == {0}
    assert seen[0].branches_in_doubt == 0
    assert max(survey.branches_in_doubt for survey in seen) > 2
    assert max(survey.stuck for survey in seen) == 2
    assert max(survey.in_doubt for survey in seen) > 1
    last = seen[-1]
    assert last.active == {SagaState.RUNNING: 0, SagaState.COMPENSATING: 0, SagaState.STUCK: 0}
    assert (last.stuck, last.in_doubt, last.branches_in_doubt) == (0, 0, 0)
    assert last.oldest_in_doubt_s == 0


def test_a_stuck_branch_counts_while_the_other_goes_on() -> None:
    """The saga is RUNNING for lists, and somebody is needed all the same."""

    async def main() -> None:
        shop = ScriptedShop({"s": [Broken("lost"), InProgress(poll_after_ms=3_600_000)]})
        async with a_runtime(MemoryStore(MemoryDisk()), shop) as engine:
            left, right = (
                Step(name=name, participant="shop", action="do", after=()) for name in "ab"
            )
            await engine.definitions.register(Definition(name="two", steps=(left, right)))
            await begin(engine, "s")
            await anyio.sleep(1)
            survey = await engine.supervisor.survey()
            assert survey.active[SagaState.RUNNING] == 1
            assert (survey.stuck, survey.in_doubt) == (1, 1)

    in_virtual_time(main)


def test_a_survey_lets_the_loop_go_on_between_its_slices() -> None:
    """However many sagas are alive, replies and requests wait for one slice only."""
    sagas = SLICE * 5

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Shop()) as engine:
            await start(engine, *(f"s-{number}" for number in range(sagas)))
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await anyio.lowlevel.checkpoint()
                    turns += 1

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(count)
                survey = await engine.supervisor.survey()
                tasks.cancel_scope.cancel()
            assert survey.active[SagaState.RUNNING] == sagas
            assert turns >= sagas // SLICE - 1

    in_virtual_time(main)


def test_recovery_is_over_when_every_saga_is_here() -> None:
    """It counts those that had not ended, and how long it took to bring them in."""

    async def main() -> None:
        disk, shop = MemoryDisk(), Shop()
        async with a_runtime(MemoryStore(disk), shop) as first:
            assert first.supervisor.recovery.running is True
            await start(first, *(f"s-{number}" for number in range(30)))
            assert first.supervisor.recovery.sagas == 0
        shop = Shop()
        async with a_runtime(MemoryStore(disk), shop) as second:
            assert (second.supervisor.recovery.running, second.supervisor.recovery.sagas) == (
                True,
                0,
            )
            await anyio.sleep(1)
            recovery = second.supervisor.recovery
            assert (recovery.running, recovery.sagas) == (False, 30)
            assert 0 <= recovery.duration_s <= 1
            survey = await second.supervisor.survey()
            assert survey.active[SagaState.RUNNING] == 30

    in_virtual_time(main)


@pytest.mark.parametrize(
    ("step", "doubted"),
    [
        (StepState(), False),
        (StepState(StepStatus.EXECUTING, open=True), False),
        (StepState(StepStatus.EXECUTING, open=True, unknown=True), True),
        (StepState(StepStatus.EXECUTED, executed=True, unknown=True), False),
        (StepState(StepStatus.REJECTED, refused=True, unknown=True), False),
        (StepState(StepStatus.UNKNOWN, unknown=True), True),
        (StepState(StepStatus.STUCK, unknown=True), True),
        (StepState(StepStatus.STUCK, refused=True), False),
        (StepState(StepStatus.COMPENSATING, Verb.COMPENSATE, unknown=True), True),
        (StepState(StepStatus.COMPENSATING, Verb.COMPENSATE, executed=True), False),
        (StepState(StepStatus.COMPENSATING, Verb.COMPENSATE, executed=True, failures=1), True),
        (StepState(StepStatus.COMPENSATED, Verb.COMPENSATE, unknown=True, failures=1), False),
        (StepState(StepStatus.PREPARING, Verb.PREPARE, unknown=True), True),
        (StepState(StepStatus.PREPARED, Verb.PREPARE, unknown=True, prepared_at_ms=1), False),
        (StepState(StepStatus.EXECUTING, unknown=True, prepared_at_ms=1), False),
        (StepState(StepStatus.EXECUTING, prepared_at_ms=1, failures=1), True),
        (StepState(StepStatus.BROKEN, unknown=True, prepared_at_ms=1, failures=1), False),
    ],
    ids=[
        *("pending", "asked", "asked-again", "executed-at-last", "refused-at-last", "given-up"),
        *("stuck-unknown", "stuck-refused", "undoing-unknown", "undoing", "undoing-again"),
        *("undone", "vote-unknown", "voted-at-last", "committing", "committing-again", "broken"),
    ],
)
def test_a_step_is_in_doubt_until_something_definite_is_known(
    step: StepState, *, doubted: bool
) -> None:
    """In either direction: it may have an effect, or may have been undone."""
    assert in_doubt(step) is doubted


# -- looking ---------------------------------------------------------------------------------------


def sources_of(engine: Engine, **others: Any) -> Sources:
    """A runtime's, but for these."""
    given: dict[str, Any] = {
        "survey": engine.supervisor.survey,
        "recovery": lambda: engine.supervisor.recovery,
        "refused": lambda: engine.supervisor.refused,
        "lanes": engine.lanes.status,
        "sizes": lambda: (4096, 0),
        "spans": dict,
        "identity": lambda: engine.store.identity,
        "version": "1.0",
    }
    return Sources(**{**given, **others})


def test_a_look_that_fails_is_logged_and_the_next_one_comes() -> None:
    """A bug of an onlooker costs a reading, and no runtime."""

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Shop()) as engine:
            failures = [ZeroDivisionError("secret"), None]

            def sizes() -> tuple[int, int]:
                failure = failures.pop(0) if failures else None
                if failure is not None:
                    raise failure
                return 4096, 17

            metrics = Metrics()
            gauges = Gauges(metrics, sources_of(engine, sizes=sizes))
            async with anyio.create_task_group() as tasks:
                with structlog.testing.capture_logs() as logged:
                    tasks.start_soon(gauges.run)
                    await anyio.sleep(LOOK_EVERY_S / 2)
                    assert metrics.snapshot == {}
                    await anyio.sleep(LOOK_EVERY_S)
                shown = {one.metric.name: one.values for one in metrics.readings()}
                assert shown["amends.store.wal.size"] == {(): 17}
                events = [entry["event"] for entry in logged]
                assert events.count("gauges_failed") == 1
                tasks.cancel_scope.cancel()

    in_virtual_time(main)


def test_looking_takes_a_small_share_of_the_time() -> None:
    """A look that held the loop for a second is followed by the next one much later."""

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Shop()) as engine:
            looks: list[float] = []

            async def survey() -> Survey:
                looks.append(asyncio.get_running_loop().time())
                one = await engine.supervisor.survey()
                return msgspec.structs.replace(one, held_s=1.0 if len(looks) == 2 else 0.01)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Gauges(Metrics(), sources_of(engine, survey=survey)).run)
                await anyio.sleep(LOOK_EVERY_S * 1.5 + 1 / SHARE)
                tasks.cancel_scope.cancel()
            waits = [after - before for before, after in pairwise(looks)]
            assert waits == pytest.approx([LOOK_EVERY_S, 1 / SHARE])

    in_virtual_time(main)


def test_a_snapshot_is_never_changed() -> None:
    """A reader in another thread keeps the one that it took, whole."""

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), Shop()) as engine:
            metrics = Metrics()
            gauges = Gauges(metrics, sources_of(engine))
            await gauges.look()
            before = metrics.snapshot
            copy = {metric: dict(values) for metric, values in before.items()}
            await start(engine, "s-1")
            await gauges.look()
            assert metrics.snapshot is not before
            assert before == copy
            shown = {one.metric.name: one.values for one in metrics.readings()}
            assert shown["amends.saga.active"] == {
                ("running",): 1,
                ("compensating",): 0,
                ("stuck",): 0,
            }
            assert shown["amends.lane.in_flight"] == {("shop",): 1}

    in_virtual_time(main)


def test_the_lag_is_what_a_timer_is_late() -> None:
    """Something holds the loop for 0.3 s, once; all other timers go off in time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with a_runtime(MemoryStore(MemoryDisk()), Shop()) as engine:
            metrics = Metrics()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Gauges(metrics, sources_of(engine)).run_lag)
                await anyio.sleep(LAG_EVERY_S * 4.5)
                loop.advance(LAG_EVERY_S / 2 + 0.3)
                await anyio.sleep(LAG_EVERY_S * 2)
                tasks.cancel_scope.cancel()
            [lag] = metrics.loop_lag.values().values()
            assert isinstance(lag, HistogramValue)
            assert round(lag.total, 3) == 0.3
            assert lag.count == 7

    in_virtual_time(main)
