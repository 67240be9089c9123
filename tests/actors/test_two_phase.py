"""A two-phase commit goes through the engine: votes, decision, and who is told when.

What it decides is tested in `tests/core`; here is what the actors, the lanes and memory do with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import msgspec
import pytest

from amends_runtime.actors import recovery as recovery_module
from amends_runtime.actors.parking import AGE_STEP_MS
from amends_runtime.actors.supervisor import Limits, StartRequest, Supervisor
from amends_runtime.core.definition import Definition, Mode, RetryPolicy, Step, TwoPhase
from amends_runtime.core.messages import Done, InProgress, Outcome, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import AttemptStarted, CommitDecision, SagaState, Verb
from amends_runtime.core.saga import Answer, Saga
from amends_runtime.engine import Engine
from amends_runtime.ports import Call, LoadedSaga, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.testing.virtual_time import START_MS, VirtualClock, VirtualLoop
from tests.actors.virtual import Shop, a_runtime, in_virtual_time, start

AWAY = Unknown("UNAVAILABLE", "nobody is there")
SLOWER = RetryPolicy(first_ms=60_000, factor=1.0, max_ms=60_000, give_up_after_ms=150_000)
PREPARE, EXECUTE, COMPENSATE = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE


def transfer(*, ordered: bool = False, retry: RetryPolicy | None = None) -> Definition:
    """From one account to another, both at the shop."""
    return Definition(
        name="transfer",
        mode=Mode.TWO_PHASE_COMMIT,
        two_phase=TwoPhase(ordered=ordered),
        steps=tuple(
            Step(
                name=name,
                participant="shop",
                action=name,
                retry=retry,
                compensation_retry=retry,
            )
            for name in ("debit", "credit")
        ),
    )


class Bank(Shop):
    """Answers by step and verb what it is told to, at last Done; None: not before `answers`."""

    def __init__(self, script: dict[tuple[int, Verb], list[Outcome | None]] | None = None) -> None:
        super().__init__()
        self.script = script or {}
        self.asked: list[Call] = []

    async def call(self, call: Call) -> Reply:
        """Answers after ten milliseconds."""
        self.asked.append(call)
        outcomes = self.script.get((call.step, call.verb), [])
        outcome = outcomes.pop(0) if outcomes else Done()
        await anyio.sleep(0.01)
        if outcome is None:
            await self.answers.wait()
            outcome = Done()
        if isinstance(outcome, Unknown):
            return Reply(outcome, outcome.reason, healthy=outcome is not AWAY, away=False)
        return Reply(outcome, "OK", healthy=True)

    def verbs(self, step: int) -> list[str]:
        """What it was asked to do for a step."""
        return [call.verb.name for call in self.asked if call.step == step]


async def begin(engine: Engine, saga_id: str = "t-1", definition: Definition | None = None) -> None:
    """Starts a transfer."""
    definition = definition or transfer()
    await engine.definitions.register(definition)
    await engine.supervisor.start_saga(
        StartRequest(
            saga_id=saga_id,
            definition_name=definition.name,
            content_hash="c",
            input=Payload(b"in"),
        )
    )


async def the_saga(supervisor: Supervisor, saga_id: str = "t-1") -> Saga:
    """As it is durable."""
    return (await supervisor.view(saga_id)).saga


def test_each_call_says_that_it_belongs_to_a_two_phase_commit() -> None:
    """Of both phases; and whoever is rolled back learns whether its yes is known."""
    bank = Bank({(1, PREPARE): [Rejected("no_account")]})

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            await begin(engine)
            await anyio.sleep(1)
            assert (await the_saga(engine.supervisor)).state is SagaState.COMPENSATED
            await begin(engine, "t-2")
            await anyio.sleep(1)
            assert (await the_saga(engine.supervisor, "t-2")).state is SagaState.COMPLETED

    in_virtual_time(main)
    assert all(call.two_phase for call in bank.asked)
    assert [(call.saga_id, call.step, call.verb) for call in bank.asked] == [
        ("t-1", 0, PREPARE),
        ("t-1", 1, PREPARE),
        ("t-1", 0, COMPENSATE),
        ("t-2", 0, PREPARE),
        ("t-2", 1, PREPARE),
        ("t-2", 0, EXECUTE),
        ("t-2", 1, EXECUTE),
    ]
    [undone] = [call for call in bank.asked if call.verb is COMPENSATE]
    assert undone.executed
    assert undone.turn is not None
    assert (undone.turn.failure.reason, undone.turn_step_name) == ("no_account", "credit")


def test_a_vote_that_nobody_knows_is_rolled_back_without_claiming_it() -> None:
    """The participant may never have been reached: to have no row for it is no broken barrier."""
    script: dict[tuple[int, Verb], list[Outcome | None]] = {(0, PREPARE): [Unknown("INTERNAL")] * 9}
    bank = Bank(script)
    retry = RetryPolicy(first_ms=1, max_ms=1, give_up_after_ms=1)

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            await begin(engine, definition=transfer(retry=retry))
            await anyio.sleep(5)
            assert (await the_saga(engine.supervisor)).state is SagaState.COMPENSATED

    in_virtual_time(main)
    told = {call.step: call.executed for call in bank.asked if call.verb is COMPENSATE}
    assert told == {0: False, 1: True}


def test_nobody_holds_anything_for_a_participant_that_is_away() -> None:
    """Its breaker is open, so it is not asked, and what the other has prepared is rolled back."""
    bank = Bank({(0, EXECUTE): [AWAY] * 5})

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            await start(engine, *(f"s-{number}" for number in range(5)))
            await anyio.sleep(0.05)  # the breaker has opened
            asked = len(bank.asked)
            await begin(engine)
            await anyio.sleep(0.1)
            saga = await the_saga(engine.supervisor)
            assert saga.state is SagaState.COMPENSATED
            assert saga.turn is not None
            assert saga.turn.failure.reason == "BREAKER_OPEN"
            assert bank.asked[asked:] == []

    in_virtual_time(main)


@pytest.mark.parametrize("queued", [False, True], ids=["on the wire", "in the lane"])
def test_an_abandoned_vote_is_aborted_and_everybody_is_told(*, queued: bool) -> None:
    """It has not ended: what it has asked for and what it still has to ask is not forgotten."""
    bank = Bank({(1, PREPARE): [None]})

    async def main() -> None:
        limit = 1 if queued else 256
        async with a_runtime(MemoryStore(MemoryDisk()), bank, limit=limit) as engine:
            supervisor = engine.supervisor
            if queued:
                bank.script = {(0, EXECUTE): [None]}
                await start(engine, "s-1")
            await begin(engine)
            await anyio.sleep(1)
            view, answer = await supervisor.abandon_saga("t-1", "ann", "lost", force=True)
            assert answer is Answer.ABORTED
            assert view.saga.decision is CommitDecision.ABORT
            assert not view.saga.ended
            bank.answers.set()
            await anyio.sleep(1)
            saga = await the_saga(supervisor)
            assert saga.state is SagaState.COMPENSATED
            assert supervisor.counts().without_wake_up == 0

    in_virtual_time(main)
    of_transfer = [call for call in bank.asked if call.saga_id == "t-1"]
    undone = sorted(call.step for call in of_transfer if call.verb is COMPENSATE)
    assert undone == ([] if queued else [0, 1])


def test_an_abandoned_one_that_had_left_memory_is_told_first_what_it_has_lost() -> None:
    """Else it would tell everybody twice: what it begins would be lost at once."""
    disk = MemoryDisk()

    async def main() -> None:
        bank = Bank({(1, PREPARE): [None]})
        async with a_runtime(MemoryStore(disk), bank) as engine:
            await begin(engine)
            await anyio.sleep(1)
        bank = Bank({(1, PREPARE): [None]})
        async with a_runtime(MemoryStore(disk), bank) as engine:
            _, answer = await engine.supervisor.abandon_saga("t-1", "ann", "lost")
            assert answer is Answer.ABORTED
            bank.answers.set()
            await anyio.sleep(1)
            assert (await the_saga(engine.supervisor)).state is SagaState.COMPENSATED
        assert bank.verbs(0) == ["COMPENSATE"]

    in_virtual_time(main)
    assert attempts_of(disk, COMPENSATE) == [(0, 1), (1, 1)]


def attempts_of(disk: MemoryDisk, verb: Verb) -> list[tuple[int, int]]:
    """Step and number of each attempt of the transfer."""
    found: list[tuple[int, int]] = []

    async def main() -> None:
        loaded = (await MemoryStore(disk).load(["t-1"]))["t-1"]
        assert isinstance(loaded, LoadedSaga)
        found.extend(
            (record.step, record.attempt)
            for turn in loaded.turns
            for record in turn.records
            if isinstance(record, AttemptStarted) and record.verb is verb
        )

    in_virtual_time(main)
    return sorted(found)


def test_a_branch_that_does_not_acknowledge_rests_is_seen_and_goes_on_by_itself() -> None:
    """It leaves memory between two attempts like any other; what it holds is counted all the time.

    After its budget it is shown as stuck, and that stops nothing.
    """
    slow: list[Outcome | None] = [Unknown("INTERNAL")] * 5
    bank = Bank({(1, EXECUTE): slow})

    async def main() -> None:
        limits = Limits(park_after_ms=1_000)
        async with a_runtime(MemoryStore(MemoryDisk()), bank, limits=limits) as engine:
            supervisor = engine.supervisor
            await begin(engine, definition=transfer(retry=SLOWER))
            rested, shown, ages = 0, [], []
            for _ in range(100):
                await anyio.sleep(5)
                survey = await supervisor.survey()
                assert survey.without_wake_up == 0
                rested += sum(survey.parked.values())
                shown.append((survey.stuck, survey.branches_in_doubt))
                ages.append(survey.oldest_in_doubt_s)
            assert rested > 10
            # One branch is in doubt from the vote on, and nobody is needed before the budget is up.
            assert list(dict.fromkeys(shown)) == [(0, 1), (1, 1), (0, 0)]
            in_doubt = [age for age in ages if age]
            assert in_doubt == sorted(in_doubt)
            assert 100 < in_doubt[-1] < 400
            saga = await the_saga(supervisor)
            assert saga.state is SagaState.COMPLETED
            assert supervisor.counts().live == 0

    in_virtual_time(main)
    assert bank.verbs(1) == ["PREPARE", *["EXECUTE"] * 6]
    assert bank.verbs(0) == ["PREPARE", "EXECUTE"]


def test_a_vote_in_progress_that_rests_is_withdrawn_by_the_prepare_deadline() -> None:
    """It is asked for the last time when its attempt's own time is over, and then rolled back."""
    bank = Bank({(1, PREPARE): [InProgress(poll_after_ms=3_600_000)] * 3})

    async def main() -> None:
        limits = Limits(park_after_ms=0)
        async with a_runtime(MemoryStore(MemoryDisk()), bank, limits=limits) as engine:
            await begin(engine)
            await anyio.sleep(5)
            assert engine.supervisor.counts().parked == 1
            await anyio.sleep(60)
            saga = await the_saga(engine.supervisor)
            assert saga.state is SagaState.COMPENSATED
            assert saga.turn is not None
            assert saga.turn.failure.reason == "DEADLINE"

    in_virtual_time(main)
    assert bank.verbs(1) == ["PREPARE", "PREPARE", "COMPENSATE"]
    assert bank.asked[-1].verb is COMPENSATE


HELD_UP: dict[str, Callable[[], Bank]] = {
    "voting": lambda: Bank({(1, PREPARE): [None]}),
    "committing": lambda: Bank({(1, EXECUTE): [None]}),
    "rolling back": lambda: Bank({(0, PREPARE): [Rejected("no")], (1, COMPENSATE): [None]}),
}


@pytest.mark.parametrize("phase", HELD_UP)
def test_two_phase_commits_are_recovered_before_all_others(
    monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Though it is the youngest of many, and they come page by page; and it is counted once."""
    monkeypatch.setattr(recovery_module, "RECOVERY_PAGE", 2)
    disk = MemoryDisk()

    async def main() -> None:
        shop = HELD_UP[phase]()
        shop.script[0, EXECUTE] = [None] * 9
        if phase == "committing":
            shop.script[0, EXECUTE] = [None] * 10
        async with a_runtime(MemoryStore(disk), shop) as engine:
            await start(engine, *(f"s-{number}" for number in range(9)))
            await begin(engine)
            await anyio.sleep(1)
        again = Bank()
        async with a_runtime(MemoryStore(disk), again, limit=1) as engine:
            await anyio.sleep(5)
            assert engine.supervisor.recovery.sagas == 10
            assert not engine.supervisor.recovery.running
            assert engine.supervisor.counts().live == 0
        assert again.asked[0].saga_id == "t-1"

    in_virtual_time(main)


def test_the_oldest_two_phase_commit_is_recovered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its participants have waited longest; of whatever definition it is, and page by page."""
    monkeypatch.setattr(recovery_module, "RECOVERY_PAGE", 2)
    disk = MemoryDisk()
    ids = [f"t-{number}" for number in range(7)]

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Bank({(1, PREPARE): [None] * 7})) as engine:
            for number, saga_id in enumerate(ids):
                definition = msgspec.structs.replace(transfer(), name=f"transfer-{number % 2}")
                await begin(engine, saga_id, definition)
            await anyio.sleep(1)
        again = Bank()
        async with a_runtime(MemoryStore(disk), again, limit=1) as engine:
            await anyio.sleep(5)
            assert engine.supervisor.counts().live == 0
        assert list(dict.fromkeys(call.saga_id for call in again.asked)) == ids

    in_virtual_time(main)


def test_a_two_phase_commit_that_rested_comes_in_before_others() -> None:
    """Their time has come together, and those that are in do not leave: its line has a reserve."""
    disk = MemoryDisk()
    rare = RetryPolicy(first_ms=3_600_000, factor=1.0, max_ms=3_600_000, give_up_after_ms=10**8)
    one = Definition(
        name="one", steps=(Step(name="a", participant="shop", action="do", retry=rare),)
    )
    failed = [Unknown("INTERNAL")]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock, limits = VirtualClock(loop), Limits(live_sagas=1)
        bank = Bank({(1, EXECUTE): [*failed], (0, EXECUTE): [Done(), *failed * 9]})
        async with a_runtime(MemoryStore(disk), bank, clock=clock, limits=limits) as engine:
            await begin(engine, definition=transfer(retry=rare))
            await anyio.sleep(1)
            for number in range(9):
                await begin(engine, f"s-{number}", one)
                await anyio.sleep(1)
            assert engine.supervisor.counts().live == 0
        clock.jump(2 * 3_600_000)
        bank = Bank({(0, EXECUTE): [None] * 9})
        async with a_runtime(MemoryStore(disk), bank, clock=clock, limits=limits) as engine:
            await anyio.sleep(60)
            assert engine.supervisor.counts().live == 2
            assert (await the_saga(engine.supervisor)).state is SagaState.COMPLETED

    in_virtual_time(main)


def test_a_clock_set_back_while_the_runtime_is_down_does_not_stretch_the_prepare_deadline() -> None:
    """Others hold locks meanwhile: after the restart it is at most as far away as it ever was."""
    disk = MemoryDisk()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        async with a_runtime(MemoryStore(disk), HELD_UP["voting"](), clock=clock) as engine:
            await begin(engine)
            await anyio.sleep(1)
        clock.jump(-3_600_000)
        began_s = loop.time()
        async with a_runtime(MemoryStore(disk), HELD_UP["voting"](), clock=clock) as engine:
            view = await engine.supervisor.wait("t-1", 86_400, lambda saga: saga.turn is not None)
            assert view.saga.decision is CommitDecision.ABORT
            assert 29 < loop.time() - began_s <= 30

    in_virtual_time(main)


def test_what_rests_of_two_phase_commits_is_counted_as_it_goes_and_comes() -> None:
    """Two in doubt outside memory: the older one's age is shown, about, then the other one's."""
    bank = Bank({(1, EXECUTE): [Unknown("INTERNAL")] * 2})
    hourly = RetryPolicy(first_ms=600_000, factor=1.0, max_ms=600_000, give_up_after_ms=10**8)
    seen: set[tuple[int, int]] = set()

    async def main() -> None:
        limits = Limits(park_after_ms=0)
        async with a_runtime(MemoryStore(MemoryDisk()), bank, limits=limits) as engine:
            supervisor = engine.supervisor
            for number in range(2):
                await begin(engine, f"t-{number}", transfer(retry=hourly))
                await anyio.sleep(1)
            while (0, 0) not in seen:
                survey = await supervisor.survey()
                sagas = [await the_saga(supervisor, f"t-{number}") for number in range(2)]
                held = [saga.steps[1].prepared_at_ms for saga in sagas if not saga.ended]
                assert survey.branches_in_doubt == len(held)
                seen.add((len(held), supervisor.counts().live))
                now_ms = START_MS + anyio.current_time() * 1000
                age_s = (now_ms - min(held)) / 1000 if held else 0
                assert age_s - 0.01 <= survey.oldest_in_doubt_s <= age_s + AGE_STEP_MS / 1000
                await anyio.sleep(10)

    in_virtual_time(main)
    assert {(2, 0), (1, 0), (0, 0)} <= seen
