"""A restored store that nobody has confirmed: its two-phase commits are held back, and seen.

They stand as the backup has them. Since then they may have been decided, and others told.
"""

from __future__ import annotations

import anyio
import pytest
from structlog.testing import capture_logs

from amends_runtime.actors import supervisor as supervisor_module
from amends_runtime.actors.supervisor import Limits
from amends_runtime.core.definition import RetryPolicy
from amends_runtime.core.messages import Outcome, Unknown
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import Answer
from amends_runtime.errors import CommitUnknown, NotFound, Unavailable, WrongState
from amends_runtime.ports import OperatorWords
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from tests.actors.test_two_phase import HELD_UP, Bank, begin, the_saga, transfer
from tests.actors.virtual import a_runtime, in_virtual_time, start

LOOKED = OperatorWords("ada", "compared", 1, "r-1")
HOURS_S = 2 * 3_600
RARE = RetryPolicy(first_ms=3_600_000, factor=1.0, max_ms=3_600_000, give_up_after_ms=10**9)


def rests() -> Bank:
    """One branch has not acknowledged COMMIT, and is told again an hour later."""
    script: dict[tuple[int, Verb], list[Outcome | None]] = {(1, Verb.EXECUTE): [Unknown("X")]}
    return Bank(script)


PHASES = {**HELD_UP, "resting": rests}


async def leave_open(disk: MemoryDisk, phase: str) -> None:
    """A transfer that is under way when the runtime ends; and then the disk comes from a backup."""
    limits = Limits(park_after_ms=0)
    async with a_runtime(MemoryStore(disk), PHASES[phase](), limits=limits) as engine:
        await begin(engine, definition=transfer(retry=RARE))
        await anyio.sleep(1)
        assert not (await the_saga(engine.supervisor)).ended
    disk.mark_restored()


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_decided_and_nobody_is_told_before_somebody_confirms(phase: str) -> None:
    """Deadlines and retries pass, runtimes come and go. Then it goes on as after any restart."""
    disk = MemoryDisk()

    async def main() -> None:
        await leave_open(disk, phase)
        known = {saga_no: list(turns) for saga_no, turns in disk.history.items()}
        for _ in range(2):
            bank = Bank()
            async with a_runtime(MemoryStore(disk), bank) as engine:
                await anyio.sleep(HOURS_S)
                assert not engine.supervisor.recovery.running
                survey = await engine.supervisor.survey()
                assert (survey.without_wake_up, sum(survey.active.values())) == (0, 1)
                assert survey.branches_in_doubt > 0
            assert bank.asked == []
        assert disk.history == known
        bank = Bank()
        async with a_runtime(MemoryStore(disk), bank) as engine:
            supervisor = engine.supervisor
            await anyio.sleep(HOURS_S)
            assert await supervisor.confirm_restore(LOOKED)
            await anyio.sleep(HOURS_S)
            assert (await the_saga(supervisor)).ended
            survey = await supervisor.survey()
            assert not any(survey.active.values())
            assert (survey.parked, survey.in_doubt, survey.branches_in_doubt) == ({}, 0, 0)
            assert supervisor.counts().live == 0
        assert bank.asked

    in_virtual_time(main)


def test_it_can_be_read_and_waited_for_and_not_be_moved() -> None:
    """Whoever waits is told its end, which comes after the confirmation."""
    disk = MemoryDisk()

    async def refused(asked: object) -> WrongState:
        with pytest.raises(WrongState) as raised:
            await asked  # type: ignore[misc]
        return raised.value

    async def main() -> None:
        await leave_open(disk, "committing")
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            supervisor = engine.supervisor
            refusals = [
                await refused(supervisor.cancel_saga("t-1", "ann", "")),
                await refused(supervisor.retry_saga("t-1", None, "ann", "now")),
                await refused(supervisor.abandon_saga("t-1", "ann", "lost", force=True)),
            ]
            assert {refusal.reason for refusal in refusals} == {"RESTORE_UNCONFIRMED"}
            assert {refusal.metadata["incarnation"] for refusal in refusals} == {disk.incarnation}
            assert (await supervisor.wait("t-1", 60)).saga.state is SagaState.RUNNING
            assert (await supervisor.bring_in("t-1")).view.saga.state is SagaState.RUNNING
            left, waiter = supervisor.waiter_for("t-1"), supervisor.waiter_for("t-1")
            assert left is not None
            assert waiter is not None
            supervisor.forget_waiter("t-1", left)
            await begin(engine, definition=transfer(retry=RARE))  # again: it is there, and stays so
            ends: list[SagaState] = []

            async def wait() -> None:
                ends.append((await supervisor.wait("t-1", HOURS_S)).saga.state)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.sleep(60)
                assert not waiter.done()
                assert not ends
                assert await supervisor.confirm_restore(LOOKED)
            view = await waiter
            assert view is not None
            assert [view.saga.state, *ends] == [SagaState.COMPLETED] * 2
            _, answer = await supervisor.cancel_saga("t-1", "ann", "")
            assert answer is Answer.COMPLETED

    in_virtual_time(main)


def test_who_waits_is_told_when_the_runtime_stops() -> None:
    """As for any saga."""
    disk = MemoryDisk()

    async def main() -> None:
        await leave_open(disk, "voting")
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            await engine.supervisor.bring_in("t-1")
            waiter = engine.supervisor.waiter_for("t-1")
            assert waiter is not None
            engine.supervisor.stop_accepting()
            with pytest.raises(Unavailable):
                await waiter

    in_virtual_time(main)


def test_what_starts_after_the_restore_goes_on() -> None:
    """The new incarnation has seen all of it: also after a restart that finds it under way."""
    disk = MemoryDisk()

    async def main() -> None:
        await leave_open(disk, "voting")
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            await begin(engine, "t-2", definition=transfer(retry=RARE))
            await start(engine, "s-1")
            await anyio.sleep(1)
            assert (await the_saga(engine.supervisor, "t-2")).state is SagaState.COMPLETED
            assert (await the_saga(engine.supervisor, "s-1")).state is SagaState.COMPLETED
        async with a_runtime(MemoryStore(disk), HELD_UP["voting"]()) as engine:
            await begin(engine, "t-3", definition=transfer(retry=RARE))
            await anyio.sleep(1)
        bank = Bank()
        async with a_runtime(MemoryStore(disk), bank) as engine:
            await anyio.sleep(60)
            assert (await the_saga(engine.supervisor, "t-3")).state is SagaState.COMPLETED
        assert {call.saga_id for call in bank.asked} == {"t-3"}

    in_virtual_time(main)


def test_the_log_says_how_many_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that rest among them; and later that they go on."""
    monkeypatch.setattr(supervisor_module, "RECOVERY_PAGE", 2)
    disk = MemoryDisk()

    async def main() -> None:
        limits = Limits(park_after_ms=0)
        script: dict[tuple[int, Verb], list[Outcome | None]] = {
            (1, Verb.EXECUTE): [Unknown("X"), None, None]
        }
        async with a_runtime(MemoryStore(disk), Bank(script), limits=limits) as engine:
            for number in range(4):
                await begin(engine, f"t-{number}", transfer(retry=RARE))
                await anyio.sleep(1)
            assert (await the_saga(engine.supervisor, "t-3")).ended
        disk.mark_restored()
        with capture_logs() as log:
            async with a_runtime(MemoryStore(disk), Bank()) as engine:
                await anyio.sleep(HOURS_S)
                [entry] = [e for e in log if e["event"] == "two_phase_commits_held_back"]
                assert (entry["sagas"], entry["log_level"]) == (3, "warning")
                assert entry["incarnation"] == disk.incarnation
                assert "nothing about them is decided" in entry["hint"]
                await engine.supervisor.confirm_restore(LOOKED)
                await anyio.sleep(60)
                [entry] = [e for e in log if e["event"] == "held_back_go_on"]
                assert entry["sagas"] == 3
                assert engine.supervisor.counts().live == 0
                assert not any((await engine.supervisor.survey()).active.values())

    in_virtual_time(main)


@pytest.mark.parametrize("sagas", [0, 1])
def test_the_log_says_that_a_confirmation_is_due_where_none_is_held_back(sagas: int) -> None:
    """Participants may hold what the backup knows nothing of, also if it knows of no saga."""
    disk = MemoryDisk()

    async def main() -> None:
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            for number in range(sagas):
                await begin(engine, f"t-{number}")
                await anyio.sleep(60)
        disk.mark_restored()
        with capture_logs() as log:
            async with a_runtime(MemoryStore(disk), Bank()):
                await anyio.sleep(60)
        [entry] = [e for e in log if e["event"] == "two_phase_commits_held_back"]
        assert (entry["sagas"], entry["log_level"]) == (0, "warning")
        assert "amends confirm-restore is still due" in entry["hint"]

    in_virtual_time(main)


@pytest.mark.parametrize("written", [True, False])
def test_a_confirmation_that_failed_counts_if_it_was_written(*, written: bool) -> None:
    """Nobody may ask a second time."""
    disk = MemoryDisk()

    async def main() -> None:
        await leave_open(disk, "committing")
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            await anyio.sleep(1)
            disk.fail_next_commit(written=written)
            with pytest.raises(CommitUnknown):
                await engine.supervisor.confirm_restore(LOOKED)
            await anyio.sleep(60)
            assert (await the_saga(engine.supervisor)).ended is written

    in_virtual_time(main)


def test_what_the_backup_does_not_know_is_unknown() -> None:
    """It is not held back, for there is nothing to hold."""
    disk = MemoryDisk()

    async def main() -> None:
        await leave_open(disk, "voting")
        async with a_runtime(MemoryStore(disk), Bank()) as engine:
            with pytest.raises(NotFound):
                await engine.supervisor.cancel_saga("t-9", "ann", "")

    in_virtual_time(main)
