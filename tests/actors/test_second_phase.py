"""The second phase of a two-phase commit, for as long as it takes: who is told what, who is shown.

A branch that does not acknowledge holds what others may need, whatever keeps it: its participant is
away, is not registered, or is at it. Once its budget is over an operator sees it.
"""

from __future__ import annotations

import asyncio

import anyio

from amends_runtime.core.messages import Done, InProgress, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Answer
from amends_runtime.ports import Call, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop
from tests.actors.test_two_phase import (
    AWAY,
    EXECUTE,
    SLOWER,
    Bank,
    begin,
    the_saga,
    transfer,
)
from tests.actors.virtual import a_runtime, in_virtual_time

HOURS_6_MS = 6 * 3_600_000


class Vanishing(Bank):
    """Votes, and is gone with all commits on the wire once `answers` is set."""

    async def call(self, call: Call) -> Reply:
        """As a host that dies."""
        if call.verb is not EXECUTE:
            return await super().call(call)
        self.asked.append(call)
        await self.answers.wait()
        return Reply(AWAY, "UNAVAILABLE", healthy=False, away=True)


def test_all_that_wait_for_a_participant_that_is_away_are_shown() -> None:
    """Its breaker probes it with one of them; the others wait in its lane, and are shown too."""
    bank = Vanishing()

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            for number in range(20):
                await begin(engine, f"t-{number}")
            await anyio.sleep(0.1)
            bank.answers.set()
            await anyio.sleep(290)
            assert (await engine.supervisor.survey()).stuck == 0
            await anyio.sleep(20)
            survey = await engine.supervisor.survey()
            assert (survey.stuck, survey.branches_in_doubt) == (20, 40)

    in_virtual_time(main)


def test_one_whose_participant_is_not_registered_any_more_is_shown() -> None:
    """Nothing is ever sent, so nothing is ever answered."""
    bank = Vanishing()

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            await begin(engine)
            await anyio.sleep(0.05)
            engine.lanes.remove("shop")
            await anyio.sleep(301)
            saga = await the_saga(engine.supervisor)
            assert saga.state is SagaState.STUCK
            assert [step.stuck_since_ms > 0 for step in saga.steps] == [True, True]

    in_virtual_time(main)


def test_one_in_progress_is_shown_and_a_retry_asks_it_at_once() -> None:
    """It rests until its poll, which is hours away; to be shown it comes in for a moment."""
    bank = Bank({(1, EXECUTE): [InProgress(HOURS_6_MS), InProgress(HOURS_6_MS)]})

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            supervisor = engine.supervisor
            await begin(engine)
            await anyio.sleep(60)
            assert supervisor.counts().live == 0
            _, answer = await supervisor.retry_saga("t-1", None, "ann", "not marked yet")
            assert answer is Answer.RETRIED
            await anyio.sleep(1)
            assert len(bank.verbs(1)) == 3
            await anyio.sleep(3600)
            assert (await supervisor.survey()).stuck == 1
            assert supervisor.counts().live == 0
            _, answer = await supervisor.retry_saga("t-1", None, "ann", "it is done by now")
            assert answer is Answer.RETRIED
            await anyio.sleep(1)
            assert (await the_saga(supervisor)).state is SagaState.COMPLETED

    in_virtual_time(main)
    assert bank.verbs(1) == ["PREPARE", *["EXECUTE"] * 3]


def test_a_clock_set_back_while_the_runtime_is_down_brings_no_mark_early_and_none_late() -> None:
    """By the old clock it is an hour away; after the restart it is as far away as a budget is."""
    disk = MemoryDisk()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        bank = Bank({(1, EXECUTE): [None] * 2})
        definition = transfer(retry=SLOWER)
        async with a_runtime(MemoryStore(disk), bank, clock=clock) as engine:
            await begin(engine, definition=definition)
            await anyio.sleep(1)
        clock.jump(-3_600_000)
        began_s = loop.time()
        async with a_runtime(MemoryStore(disk), bank, clock=clock) as engine:
            await engine.supervisor.wait("t-1", 86_400, lambda saga: saga.state is SagaState.STUCK)
            assert 145 < loop.time() - began_s <= 151

    in_virtual_time(main)


def test_what_a_branch_says_when_it_commits_is_handed_to_nobody() -> None:
    """The next one was handed its vote: a call under the same key must say the same for ever."""

    class Talking(Bank):
        async def call(self, call: Call) -> Reply:
            reply = await super().call(call)
            if not isinstance(reply.outcome, Done):
                return reply
            said = Payload(f"{call.step_name} {call.verb.name}".encode())
            return Reply(Done(said), "OK", healthy=True)

    bank = Talking({(1, EXECUTE): [Unknown("INTERNAL"), Unknown("INTERNAL")]})

    async def main() -> None:
        async with a_runtime(MemoryStore(MemoryDisk()), bank) as engine:
            await begin(engine, definition=transfer(ordered=True))
            await anyio.sleep(60)
            saga = await the_saga(engine.supervisor)
            assert saga.state is SagaState.COMPLETED
            shown = [step.result.data for step in saga.steps if step.result is not None]
            assert shown == [b"debit EXECUTE", b"credit EXECUTE"]

    in_virtual_time(main)
    handed = [call.results for call in bank.asked if call.step == 1]
    assert handed == [(("debit", Payload(b"debit PREPARE")),)] * 4
