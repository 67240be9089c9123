"""What branches say in a two-phase commit: the votes' results are handed on, the commits' are not.

The runtime, its file, both participants and their barriers are real. A branch that is told its
decision twice must be told the same, or its barrier says that it was asked for something else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

import amends
from amends.errors import BarrierError
from amends.handler import Handler
from amends.outcomes import Outcome
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core.saga import Saga, StepStatus
from amends_runtime.engine import run_engine
from tests.api.bank import Branch, no_funds

PATIENCE_S = 60.0
PREPARE, EXECUTE, COMPENSATE = amends.Verb.PREPARE, amends.Verb.EXECUTE, amends.Verb.COMPENSATE

SOON = amends.Retry(first_s=0.001, max_s=0.001)

ORDERED = (
    amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT, ordered=True)
    .step("debit", "east", "debit", retry=SOON, compensation_retry=SOON)
    .step("credit", "west", "credit", retry=SOON, compensation_retry=SOON)
)


class LosingBarrier(amends.SqliteBarrier):
    """Answers as a barrier does; but the first reply to one verb is lost, when it is durable."""

    def __init__(self, path: Path, loses: amends.Verb | None) -> None:
        super().__init__(str(path))
        self.loses = loses
        self.has_lost = anyio.Event()
        self.goes_on = anyio.Event()

    async def run(self, call: amends.Call, handler: Handler | None) -> Outcome:
        """Answer, or be lost; only once somebody says so."""
        outcome = await super().run(call, handler)
        if call.verb is self.loses:
            self.loses = None
            self.has_lost.set()
            await self.goes_on.wait()
            raise BarrierError("the reply is lost, and what was done stays")
        return outcome


class Talker(Branch):
    """A branch that says something each time, and never the same of two verbs."""

    loses: amends.Verb | None = None

    def participant(self) -> amends.Participant:
        """The participant to be served."""
        self.barrier = LosingBarrier(self.path, self.loses)
        participant = amends.Participant(self.name, barrier=self.barrier)
        for action in ("debit", "credit"):
            participant.prepare(action)(self._talking_prepare)
            participant.execute(action)(self._talking_commit)
            participant.compensate(action)(self._roll_back)
        return participant

    async def _talking_prepare(self, call: amends.Call, tx: amends.AsyncTransaction) -> object:
        await self._prepare(call, tx)
        return {"held_by": self.name}

    async def _talking_commit(self, call: amends.Call, tx: amends.AsyncTransaction) -> object:
        await self._commit(call, tx)
        return {"receipt_of": self.name}


@dataclass
class Talkers:
    """Both branches, served, and the configuration of a runtime that calls them."""

    east: Talker
    west: Talker
    config: Config

    @property
    def balances(self) -> tuple[int, int]:
        """East's and west's."""
        return self.east.balance, self.west.balance


@asynccontextmanager
async def open_talkers(
    folder: Path, *, east_loses: amends.Verb | None = None, west_loses: amends.Verb | None = None
) -> AsyncIterator[Talkers]:
    """Serve both, and lose a branch's first reply to a verb."""
    east, west = Talker("east", folder), Talker("west", folder)
    east.loses, west.loses = east_loses, west_loses
    async with (
        amends.serve(east.participant(), grace_s=5) as east_server,
        amends.serve(west.participant(), grace_s=5) as west_server,
    ):
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(folder / "amends.db")),
            participants={
                "east": Participant(address=east_server.address),
                "west": Participant(address=west_server.address),
            },
        )
        yield Talkers(east, west, config)
        for branch in (east, west):
            branch.barrier.goes_on.set()


def debit_is_committed(saga: Saga) -> bool:
    """Tell whether the first branch has committed, durably: what it said is known from now on."""
    return saga.steps[0].status is StepStatus.EXECUTED


async def test_a_commit_that_is_told_again_is_the_same_request(tmp_path: Path) -> None:
    """What the first branch said when it committed changes nothing for the second: COMPLETED."""
    async with (
        open_talkers(tmp_path, west_loses=EXECUTE) as bank,
        run_engine(bank.config) as engine,
        amends.Client(engine.address) as client,
    ):
        await client.register(ORDERED)
        started = await client.start("transfer", b"30", saga_id="t-1")
        await bank.west.barrier.has_lost.wait()
        await engine.supervisor.wait("t-1", PATIENCE_S, debit_is_committed)
        bank.west.barrier.goes_on.set()
        saga = await started.result()
    assert saga.state is amends.SagaState.COMPLETED
    assert [step.attempt for step in saga.steps] == [1, 2]
    shown = [step.result.json() for step in saga.steps if step.result is not None]
    assert shown == [{"receipt_of": "east"}, {"receipt_of": "west"}]
    assert bank.balances == (70, 130)
    # The handler of a commit runs once: the second time its barrier answers.
    assert [call.verb for call in bank.west.calls] == [PREPARE, EXECUTE]
    for call in bank.west.calls:
        assert call.result_json("debit") == {"held_by": "east"}


async def test_a_rollback_that_is_told_again_is_the_same_request(tmp_path: Path) -> None:
    """A branch that rolls back is handed what its own vote brought, each time: COMPENSATED."""
    async with (
        open_talkers(tmp_path, east_loses=COMPENSATE) as bank,
        run_engine(bank.config) as engine,
        amends.Client(engine.address) as client,
    ):
        bank.west.says[PREPARE] = no_funds
        bank.east.barrier.goes_on.set()
        await client.register(ORDERED)
        saga = await (await client.start("transfer", b"30", saga_id="t-1")).result()
    assert saga.state is amends.SagaState.COMPENSATED
    assert saga.step("debit").attempt == 2
    assert bank.balances == (100, 100)
    assert [call.verb for call in bank.east.calls] == [PREPARE, COMPENSATE]
    assert bank.east.calls[-1].own_result_json() == {"held_by": "east"}
