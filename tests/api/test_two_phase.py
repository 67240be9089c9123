"""Two-phase commits over gRPC: registered, started, shown, ended, cancelled, abandoned.

The runtime, its file, both participants and their barriers are real.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypedDict

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

import amends
from amends.v1 import operator_pb2, operator_pb2_grpc, saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime import wire
from amends_runtime.config import Breaker, Participant
from amends_runtime.core.definition import Definition, Mode, Step, TwoPhase
from amends_runtime.core.saga import Saga
from amends_runtime.engine import Engine, run_engine
from tests.api.bank import TRANSFER, Bank, Branch, no_funds, open_bank
from tests.api.refusals import refused
from tests.api.stubs import Operator, Sagas

PATIENCE_S = 60.0
PREPARE, EXECUTE, COMPENSATE = amends.Verb.PREPARE, amends.Verb.EXECUTE, amends.Verb.COMPENSATE


class Words(TypedDict):
    """Who does it and why."""

    author: str
    reason: str


WHO: Words = {"author": "ada", "reason": "sent to the wrong branch"}


class Runtime:
    """A running runtime and its client."""

    def __init__(self, engine: Engine, client: amends.Client) -> None:
        self.engine = engine
        self.client = client

    async def start(self, deadline_s: float | None = None) -> amends.StartedSaga:
        """Starts the transfer t-1, of 30."""
        await self.client.register(TRANSFER)
        return await self.client.start("transfer", b"30", saga_id="t-1", deadline_s=deadline_s)

    async def run(self) -> amends.Saga:
        """The transfer t-1 once it has ended."""
        return await (await self.start()).result()

    async def until(self, holds: Callable[[Saga], bool]) -> amends.Saga:
        """The transfer t-1 once that holds for its durable state."""
        await self.engine.supervisor.wait("t-1", PATIENCE_S, holds)
        return await self.client.get("t-1")

    async def facts(self) -> list[amends.Record]:
        """The history of t-1."""
        return [record async for record in self.client.history("t-1")]


@asynccontextmanager
async def a_runtime(bank: Bank) -> AsyncIterator[Runtime]:
    """A runtime over the bank's file."""
    async with run_engine(bank.config) as engine, amends.Client(engine.address) as client:
        yield Runtime(engine, client)
        bank.let_go()  # so that the way down need not wait for replies


@pytest.fixture
async def bank(tmp_path: Path) -> AsyncIterator[Bank]:
    """Two branches, each with a database of its own."""
    async with open_bank(tmp_path) as bank:
        yield bank


def verbs(branch: Branch) -> list[amends.Verb]:
    """What a branch was asked to do."""
    return [call.verb for call in branch.calls]


# -- committed, rolled back ------------------------------------------------------------------------


async def test_a_transfer_is_committed_in_both_databases(bank: Bank) -> None:
    """Both vote, both commit; the saga says so, and its history how it came about."""
    async with a_runtime(bank) as runtime:
        saga = await runtime.run()
        kinds = [record.kind for record in await runtime.facts()]
    assert (saga.state, saga.decision, saga.round) == (
        amends.SagaState.COMPLETED,
        amends.Decision.COMMIT,
        1,
    )
    assert saga.past_no_return
    assert saga.turn is None
    for step in saga.steps:
        assert (step.state, step.prepared_at_ms) == (amends.StepState.EXECUTED, None)
    kind = amends.RecordKind
    assert kinds.count(kind.STEP_PREPARED) == kinds.count(kind.STEP_EXECUTED) == 2
    decided = kinds.index(kind.DECISION_MADE)
    assert kind.STEP_PREPARED not in kinds[decided:]
    assert kind.STEP_EXECUTED not in kinds[:decided]
    assert verbs(bank.east) == verbs(bank.west) == [PREPARE, EXECUTE]
    assert all(call.two_phase for call in bank.east.calls)
    assert bank.balances == (70, 130)
    assert bank.holds == 0


async def test_one_no_rolls_all_back(bank: Bank) -> None:
    """It ends COMPENSATED and says who refused and why; who refused is told nothing more."""
    bank.west.says[PREPARE] = no_funds
    async with a_runtime(bank) as runtime:
        saga = await runtime.run()
        facts = await runtime.facts()
    assert (saga.state, saga.decision) == (amends.SagaState.COMPENSATED, amends.Decision.ABORT)
    assert not saga.past_no_return
    assert saga.turn is not None
    assert (saga.turn.cause, saga.turn.step) == (amends.Cause.REJECTED, "credit")
    assert saga.step("credit").state is amends.StepState.REJECTED
    [refusal] = [fact for fact in facts if fact.kind is amends.RecordKind.STEP_REJECTED]
    assert (refusal.step, refusal.verb) == ("credit", PREPARE)
    [decided] = [fact for fact in facts if fact.kind is amends.RecordKind.DECISION_MADE]
    assert (decided.decision, decided.round) == (amends.Decision.ABORT, 1)
    assert decided.turn is not None
    assert decided.turn.step == "credit"
    assert verbs(bank.west) == [PREPARE]
    assert bank.balances == (100, 100)
    assert bank.holds == 0


async def test_while_votes_are_collected_the_saga_shows_who_holds_what(bank: Bank) -> None:
    """Since when a branch has been holding is shown for as long as it does."""
    hanging = bank.west.hang(PREPARE)
    async with a_runtime(bank) as runtime:
        started = await runtime.start()
        await hanging.begun.wait()
        saga = await runtime.until(lambda saga: saga.steps[0].prepared_at_ms > 0)
        debit, credit = saga.steps
        assert (saga.decision, saga.round) == (amends.Decision.PENDING, 1)
        assert debit.state is amends.StepState.PREPARED
        assert debit.prepared_at_ms is not None
        assert saga.started_at_ms <= debit.prepared_at_ms <= saga.updated_at_ms
        assert (credit.state, credit.prepared_at_ms) == (amends.StepState.PREPARING, None)
        assert (credit.verb, credit.call_open) == (PREPARE, True)
        committing = bank.west.hang(EXECUTE)
        hanging.let_go.set()
        await committing.begun.wait()
        saga = await runtime.until(lambda saga: saga.steps[0].executed)
        debit, credit = saga.steps
        assert (debit.state, debit.prepared_at_ms) == (amends.StepState.EXECUTED, None)
        assert credit.state is amends.StepState.EXECUTING
        assert credit.prepared_at_ms is not None
        committing.let_go.set()
        await started.result()


async def test_a_commit_goes_on_after_a_restart(bank: Bank) -> None:
    """Decided is decided: the next runtime finds who has not acknowledged, and tells it again."""
    committing = bank.west.hang(EXECUTE)
    async with a_runtime(bank) as runtime:
        await runtime.start()
        await committing.begun.wait()
        runtime.engine.fail(RuntimeError("it dies here, with the commit on the wire"))
    async with a_runtime(bank) as runtime:
        saga = await runtime.client.wait("t-1")
    assert saga.state is amends.SagaState.COMPLETED
    assert bank.balances == (70, 130)


# -- deadlines -------------------------------------------------------------------------------------


async def test_votes_have_half_a_minute_unless_somebody_says_otherwise(bank: Bank) -> None:
    """Participants hold locks meanwhile: one that names no deadline has one all the same."""
    async with a_runtime(bank) as runtime:
        saga = (await runtime.start()).saga
        assert saga.deadline_at_ms is not None
        assert 30_000 - 1_000 < saga.deadline_at_ms - saga.started_at_ms <= 30_000 + 1_000
        longer = await runtime.client.start("transfer", b"1", saga_id="t-2", deadline_s=3600)
        assert longer.saga.deadline_at_ms is not None
        assert longer.saga.deadline_at_ms - longer.saga.started_at_ms > 3_000_000
        with pytest.raises(amends.AlreadyExists):
            await runtime.client.start("transfer", b"1", saga_id="t-2", deadline_s=7200)


async def test_the_deadline_is_a_no(bank: Bank) -> None:
    """Who has not voted by then is not waited for; the start's own deadline counts."""
    hanging = bank.west.hang(PREPARE)
    async with a_runtime(bank) as runtime:
        started = await runtime.start(deadline_s=0.2)
        saga = await runtime.until(lambda saga: saga.decision is not None)
        assert saga.decision is amends.Decision.ABORT
        hanging.let_go.set()
        saga = await started.result()
    assert saga.state is amends.SagaState.COMPENSATED
    assert saga.turn is not None
    assert saga.turn.cause is amends.Cause.DEADLINE
    assert bank.balances == (100, 100)
    assert bank.holds == 0


async def test_the_deadline_is_a_no_of_who_has_not_finished_yet(bank: Bank) -> None:
    """One that answers InProgress again and again is told ABORT like all others; it never votes."""
    answered = 0

    async def not_yet(call: amends.Call) -> amends.InProgress:
        nonlocal answered
        answered += 1
        return amends.InProgress(0.01)

    bank.west.says[PREPARE] = not_yet
    async with a_runtime(bank) as runtime:
        await runtime.client.register(TRANSFER)
        for deadline_s in (0.3, 3, 30):  # the first is enough unless this machine stands still
            saga = await runtime.client.start("transfer", b"30", deadline_s=deadline_s)
            ended = await saga.result()
            assert (ended.state, ended.decision) == (
                amends.SagaState.COMPENSATED,
                amends.Decision.ABORT,
            )
            assert ended.turn is not None
            assert ended.turn.cause is amends.Cause.DEADLINE
            if answered:
                break
    assert answered
    assert bank.balances == (100, 100)
    assert bank.holds == 0
    assert verbs(bank.west).count(EXECUTE) == 0


# -- cancelled, abandoned --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "abandon"])
async def test_before_the_decision_it_is_aborted(bank: Bank, how: str) -> None:
    """Cancelled or abandoned: everybody is told, so that nothing stays behind."""
    hanging = bank.west.hang(PREPARE)
    async with a_runtime(bank) as runtime:
        started = await runtime.start()
        await hanging.begun.wait()
        await runtime.until(lambda saga: saga.steps[0].prepared_at_ms > 0)
        if how == "cancel":
            cancelled = await runtime.client.cancel("t-1", **WHO)
            assert cancelled.disposition is amends.CancelDisposition.TURNED_BACK
            saga = cancelled.saga
        else:
            abandoned = await runtime.client.abandon("t-1", **WHO)
            assert abandoned.remaining_steps == ()
            saga = abandoned.saga
        assert (saga.state, saga.decision) == (
            amends.SagaState.COMPENSATING,
            amends.Decision.ABORT,
        )
        assert saga.turn is not None
        assert saga.turn.cause is amends.Cause.CANCELLED
        hanging.let_go.set()
        assert (await started.result()).state is amends.SagaState.COMPENSATED
        again = await runtime.client.cancel("t-1", **WHO)
        assert again.disposition is amends.CancelDisposition.ALREADY_TURNED_BACK
    assert bank.balances == (100, 100)
    assert bank.holds == 0


async def test_a_commit_is_not_taken_back(bank: Bank) -> None:
    """Neither cancelled nor abandoned, by force neither: the refusal says who is waited for."""
    committing = bank.west.hang(EXECUTE)
    async with a_runtime(bank) as runtime:
        started = await runtime.start()
        await committing.begun.wait()
        await runtime.until(lambda saga: saga.steps[0].executed)
        with pytest.raises(amends.WrongState) as raised:
            await runtime.client.cancel("t-1", **WHO)
        assert raised.value.reason == "PAST_NO_RETURN"
        assert raised.value.metadata["decision"] == "COMMIT"
        assert raised.value.metadata["waits_for"] == "credit"
        assert "has decided COMMIT" in raised.value.message
        for force in (False, True):
            with pytest.raises(amends.WrongState) as raised:
                await runtime.client.abandon("t-1", force=force, **WHO)
            assert raised.value.reason == "DECIDED"
            assert raised.value.metadata["waits_for"] == "credit"
            for said in ("has decided COMMIT", "waits for credit", "amends retry t-1", "MIXED"):
                assert said in raised.value.message
        committing.let_go.set()
        assert (await started.result()).state is amends.SagaState.COMPLETED
        with pytest.raises(amends.WrongState) as raised:
            await runtime.client.cancel("t-1", **WHO)
        assert raised.value.reason == "SAGA_COMPLETED"
        with pytest.raises(amends.WrongState) as raised:
            await runtime.client.abandon("t-1", **WHO)
        assert raised.value.reason == "SAGA_ENDED"


async def test_a_branch_that_waits_for_an_operator_is_named(bank: Bank) -> None:
    """It is tried again all the same; the saga shows as stuck until it works."""

    async def fails(call: amends.Call) -> None:
        raise RuntimeError("the disk is full")

    bank.west.says[EXECUTE] = fails
    impatient = amends.Retry(first_s=0.001, max_s=0.001, give_up_after_s=0.001)
    transfer = (
        amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT)
        .step("debit", "east", "debit")
        .step("credit", "west", "credit", retry=impatient)
    )
    async with a_runtime(bank) as runtime:
        await runtime.client.register(transfer)
        started = await runtime.client.start("transfer", b"30", saga_id="t-1")
        saga = await runtime.until(lambda saga: saga.steps[1].stuck_since_ms > 0)
        assert saga.state is amends.SagaState.STUCK
        with pytest.raises(amends.WrongState) as raised:
            await runtime.client.cancel("t-1", **WHO)
        assert raised.value.metadata["stuck"] == "credit"
        del bank.west.says[EXECUTE]
        assert (await started.result()).state is amends.SagaState.COMPLETED
    assert bank.balances == (70, 130)


# -- a broken vote ---------------------------------------------------------------------------------


async def test_a_broken_vote_ends_the_saga_mixed(bank: Bank) -> None:
    """The others are told all the same; it is an end, for waiters, lists, counts and operators."""

    async def alone(call: amends.Call) -> None:
        raise amends.Heuristic(False, "let_go_by_hand", "nobody knew")

    bank.west.says[EXECUTE] = alone
    async with a_runtime(bank) as runtime:
        saga = await runtime.run()
        assert (saga.state, saga.ended) == (amends.SagaState.MIXED, True)
        assert saga.step("debit").state is amends.StepState.EXECUTED
        credit = saga.step("credit")
        assert (credit.state, credit.prepared_at_ms) == (amends.StepState.BROKEN, None)
        assert credit.last_error is not None
        assert credit.last_error.reason == "let_go_by_hand"
        heuristic = amends.RecordKind.HEURISTIC_REPORTED
        [report] = [fact for fact in await runtime.facts() if fact.kind is heuristic]
        assert (report.step, report.verb, report.committed) == ("credit", EXECUTE, False)
        mixed = [one.saga_id async for one in runtime.client.list(state=amends.SagaState.MIXED)]
        assert mixed == ["t-1"]
        assert (await runtime.client.runtime()).sagas == {"MIXED": 1}
        with pytest.raises(amends.WrongState) as raised:
            await runtime.client.cancel("t-1", **WHO)
        assert raised.value.reason == "SAGA_MIXED"
        with pytest.raises(amends.WrongState, match="broke its vote") as raised:
            await runtime.client.abandon("t-1", **WHO)
        assert raised.value.reason == "SAGA_ENDED"
        assert (await runtime.client.start("transfer", b"30", saga_id="t-1")).existed
        async with grpc.aio.insecure_channel(runtime.engine.address) as channel:
            sagas: Sagas = saga_pb2_grpc.SagaServiceStub(channel)
            waited = await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="t-1"))
            assert (waited.ended, waited.saga.state) == (True, types_pb2.SAGA_STATE_MIXED)
    async with a_runtime(bank) as runtime:
        assert (await runtime.client.wait("t-1")).state is amends.SagaState.MIXED
    assert bank.east.balance == 70


# -- registration ----------------------------------------------------------------------------------


async def test_a_definition_comes_back_as_it_was_registered(bank: Bank) -> None:
    """With its settings; the same again is no new version, other settings are one."""
    ordered = amends.Definition(
        "transfer", mode=amends.Mode.TWO_PHASE_COMMIT, ordered=True, steps=TRANSFER.steps
    )
    async with a_runtime(bank) as runtime:
        first = await runtime.client.register(TRANSFER)
        again = await runtime.client.register(TRANSFER)
        assert (first.version, first.existed, again.existed) == (1, False, True)
        second = await runtime.client.register(ordered)
        assert (second.version, second.existed) == (2, False)


async def test_what_a_two_phase_commit_has_not_is_refused(bank: Bank) -> None:
    """A point of no return, an order of its own: all of it at once, each with its mend."""
    steps = tuple(Step(name=name, participant="east", action="debit") for name in ("a", "b"))
    message = wire.definition_to_proto(
        Definition(
            name="transfer",
            mode=Mode.TWO_PHASE_COMMIT,
            steps=steps,
            two_phase=TwoPhase(locked_retries=-1),
        )
    )
    message.steps[0].kind = types_pb2.STEP_KIND_PIVOT
    message.steps[1].after.names.append("a")
    async with (
        run_engine(bank.config) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        operator: Operator = operator_pb2_grpc.OperatorServiceStub(channel)
        request = operator_pb2.RegisterDefinitionRequest(definition=message)
        refusal = await refused(operator.RegisterDefinition(request))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_DEFINITION",
        )
        assert set(refusal.violations) == {
            "definition.steps[0].kind",
            "definition.steps[1].after",
            "definition.two_phase.locked_retries",
        }
        request.definition.mode = types_pb2.MODE_SAGA
        refusal = await refused(operator.RegisterDefinition(request))
        assert "definition.two_phase" in refusal.violations


# -- a participant that is away, and back ----------------------------------------------------------


async def waits_for_the_breaker(runtime: Runtime, name: str) -> bool:
    """Whether a call lies in the participant's lane, whose breaker is open."""
    for each in await runtime.client.participants():
        if each.name == name and each.breaker.state is amends.BreakerState.OPEN:
            return each.calls_waiting == 1
    return False


async def retried(runtime: Runtime) -> amends.Saga:
    """The transfer once it has ended after a retry, or as it is a little later."""
    with suppress(amends.WrongState):  # it is at it already, or has ended
        await runtime.client.retry("t-1", **WHO)
    with suppress(amends.WaitTimeout):
        return await runtime.client.wait("t-1", timeout_s=0.3)
    return await runtime.client.get("t-1")


async def test_a_retry_does_not_wait_for_the_breaker(bank: Bank, tmp_path: Path) -> None:
    """East is away when COMMIT is decided, and its breaker is open for an hour.

    It is back, and somebody says so by `retry`: it is asked at once, also if its call lies in the
    lane and waits for the breaker.
    """
    address = f"unix:{tmp_path}/east.sock"
    hanging = bank.west.hang(PREPARE)
    participants = {**bank.config.participants, "east": Participant(address=address)}
    breaker = Breaker(failures_to_open=1, open_s=3600, max_open_s=3600)
    bank.config = bank.config.model_copy(update={"participants": participants, "breaker": breaker})
    async with a_runtime(bank) as runtime:
        async with amends.serve(bank.east.participant(), listen=address, grace_s=0):
            await runtime.start(deadline_s=3_600)
            await runtime.until(lambda saga: saga.steps[0].prepared_at_ms > 0)
            await hanging.begun.wait()
        hanging.let_go.set()
        with anyio.fail_after(PATIENCE_S):
            while not await waits_for_the_breaker(runtime, "east"):
                await anyio.lowlevel.checkpoint()
        async with amends.serve(bank.east.participant(), listen=address, grace_s=0):
            # Each asks at once; the connection itself may notice within a second only.
            with anyio.fail_after(PATIENCE_S):
                while not (saga := await retried(runtime)).ended:
                    assert saga.decision is amends.Decision.COMMIT
            assert saga.state is amends.SagaState.COMPLETED
    assert bank.balances == (70, 130)
