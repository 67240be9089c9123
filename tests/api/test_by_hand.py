"""Stuck sagas get out: retried, in a new round where a refusal ended the last one, or abandoned.

The runtime, its file, the participant and its barrier are real; what makes a saga stuck is what the
participant says. The saga: reserve, then ship (the pivot), then notify (which must succeed).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

import amends
from amends.v1 import operator_pb2, operator_pb2_grpc
from amends_runtime.api.door import Context
from amends_runtime.api.operator import OperatorService
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core import saga as core
from amends_runtime.core.messages import Answered, RuntimeRestarted
from amends_runtime.engine import run_engine
from tests.api.refusals import refused
from tests.api.stubs import Operator

ORDER = (
    amends.Definition("order")
    .step("reserve", "shop", "reserve")
    .pivot("ship", "shop", "ship")
    .retriable("notify", "shop", "notify")
)
PATIENCE_S = 60.0


class Words(TypedDict):
    """Who does it and why."""

    author: str
    reason: str


WHO: Words = {"author": "ada", "reason": "the shelf was empty, and is full again"}

Answer = Callable[[amends.Call], object]


class Shop:
    """Does everything at once, but for what `says` has something else to say of."""

    def __init__(self, folder: Path) -> None:
        self.says: dict[tuple[str, amends.Verb], Answer] = {}
        self.calls: list[amends.Call] = []
        self.participant = amends.Participant(
            "shop", barrier=amends.SqliteBarrier(str(folder / "shop.db"))
        )
        for action in ("reserve", "ship", "notify"):
            self.participant.execute(action, compensatable=action == "reserve")(self._do)
        self.participant.compensate("reserve")(self._do)

    def _do(self, call: amends.Call, tx: amends.Transaction) -> object:
        self.calls.append(call)
        answer = self.says.get((call.action, call.verb))
        return None if answer is None else answer(call)

    def made(self, action: str) -> list[tuple[str, int, str]]:
        """The calls of an action: verb, round, key."""
        return [
            (call.verb.name, call.round, call.idempotency_key)
            for call in self.calls
            if call.action == action
        ]


def broken(call: amends.Call) -> object:
    """The participant cannot keep the contract."""
    raise amends.Broken("shelf is gone")


def refuses(call: amends.Call) -> object:
    """A definite refusal."""
    raise amends.Rejected("nobody_home")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """The participant, with its own database."""
    return Shop(tmp_path)


@pytest.fixture
async def config(shop: Shop, tmp_path: Path) -> AsyncIterator[Config]:
    """A runtime's configuration; the participant is served for as long as it is used."""
    async with amends.serve(shop.participant) as server:
        yield Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"shop": Participant(address=server.address)},
        )


@asynccontextmanager
async def a_runtime(config: Config) -> AsyncIterator[amends.Client]:
    """A runtime, and a client of it."""
    async with run_engine(config) as engine, amends.Client(engine.address) as client:
        yield client


@asynccontextmanager
async def an_operator(config: Config) -> AsyncIterator[tuple[amends.Client, Operator]]:
    """A client, and the stub for what no client of ours would send."""
    async with (
        run_engine(config) as engine,
        amends.Client(engine.address) as client,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        yield client, operator_pb2_grpc.OperatorServiceStub(channel)


async def stuck(client: amends.Client, saga_id: str) -> amends.Saga:
    """The saga once it is stuck, as whoever watches for that finds out."""
    with anyio.fail_after(PATIENCE_S):
        saga = await client.get(saga_id)
        async for _ in client.watch(state=amends.SagaState.STUCK):  # the first is told at once
            saga = await client.get(saga_id)
            if saga.state is amends.SagaState.STUCK:
                return saga
    return saga


async def start_stuck(client: amends.Client, saga_id: str = "s-1") -> amends.Saga:
    """Start an order that gets stuck, and wait until it is."""
    await client.register(ORDER)
    await client.start("order", saga_id=saga_id)
    return await stuck(client, saga_id)


async def acts(client: amends.Client, saga_id: str = "s-1") -> list[tuple[str, str, int, str, str]]:
    """What operators did, as the history has it."""
    return [
        (record.detail, record.step, record.round, record.author, record.reason)
        async for record in client.history(saga_id)
        if record.kind is amends.RecordKind.OPERATOR_ACTED
    ]


# -- retry -----------------------------------------------------------------------------------------


async def test_a_broken_step_is_retried_once_its_participant_is_mended(
    shop: Shop, config: Config
) -> None:
    """In the same round, under the same key; and the saga completes. A restart lies in between."""
    shop.says["reserve", amends.Verb.EXECUTE] = broken
    async with a_runtime(config) as client:
        saga = await start_stuck(client)
        assert saga.step("reserve").state is amends.StepState.STUCK
    shop.says.clear()
    async with a_runtime(config) as client:
        saga = await client.retry("s-1", **WHO)
        assert saga.state is amends.SagaState.RUNNING
        assert (await client.wait("s-1", timeout_s=PATIENCE_S)).completed
        assert await acts(client) == [("retry", "reserve", 1, WHO["author"], WHO["reason"])]
    assert len(set(shop.made("reserve"))) == 1


async def test_a_refusal_past_the_point_of_no_return_is_retried_in_a_new_round(
    shop: Shop, config: Config
) -> None:
    """The refused key stays refused, and the new one is another try; then the saga completes."""
    shop.says["notify", amends.Verb.EXECUTE] = refuses
    async with a_runtime(config) as client:
        saga = await start_stuck(client)
        assert saga.past_no_return
        assert saga.step("notify").state is amends.StepState.STUCK
        shop.says.clear()
        await client.retry("s-1", step="notify", **WHO)
        saga = await client.wait("s-1", timeout_s=PATIENCE_S)
        assert saga.completed
        assert saga.step("notify").round == 2
        assert await acts(client) == [("retry", "notify", 2, WHO["author"], WHO["reason"])]
    (_, first_round, first_key), (_, second_round, second_key) = shop.made("notify")
    assert (first_round, second_round) == (1, 2)
    assert first_key != second_key


async def test_a_compensation_is_retried_in_the_round_that_it_undoes(
    shop: Shop, config: Config
) -> None:
    """There is one effect to undo, so there is one key to undo it under. Restarted in between."""
    shop.says["ship", amends.Verb.EXECUTE] = refuses
    shop.says["reserve", amends.Verb.COMPENSATE] = broken
    async with a_runtime(config) as client:
        saga = await start_stuck(client)
        assert saga.turn is not None
        assert saga.step("reserve").verb is amends.Verb.COMPENSATE
    shop.says.clear()
    async with a_runtime(config) as client:
        assert (await client.retry("s-1", **WHO)).state is amends.SagaState.COMPENSATING
        saga = await client.wait("s-1", timeout_s=PATIENCE_S)
        assert saga.state is amends.SagaState.COMPENSATED
        assert await acts(client) == [("retry", "reserve", 1, WHO["author"], WHO["reason"])]
    undone = [made for made in shop.made("reserve") if made[0] == "COMPENSATE"]
    assert len(undone) == 2
    assert len(set(undone)) == 1


async def test_a_retry_is_refused_where_nothing_is_stuck(shop: Shop, config: Config) -> None:
    """It says what the saga does now, what is stuck instead, or how it ended."""
    shop.says["notify", amends.Verb.EXECUTE] = refuses
    shop.says["reserve", amends.Verb.EXECUTE] = lambda call: (
        amends.InProgress(after_s=3600) if call.saga_id == "busy" else None
    )
    async with a_runtime(config) as client:
        await start_stuck(client)
        with pytest.raises(amends.WrongState) as refused_:
            await client.retry("s-1", step="reserve", **WHO)
        assert refused_.value.reason == "NOTHING_STUCK"
        assert refused_.value.message == (
            "step 'reserve' of saga 's-1' is EXECUTED, neither stuck nor waiting for its next"
            " attempt, and was left alone: stuck is notify: retry that"
        )
        await client.start("order", saga_id="busy")
        with pytest.raises(amends.WrongState) as refused_:
            await client.retry("busy", **WHO)
        assert refused_.value.reason == "NOTHING_STUCK"
        assert refused_.value.message == (
            "no step of saga 'busy' is stuck or waits for its next attempt, so there is nothing to"
            " try now: it is RUNNING, and at reserve (EXECUTING, attempt 1 is under way)"
        )
        await client.abandon("s-1", **WHO)
        with pytest.raises(amends.WrongState, match="has ended ABANDONED") as refused_:
            await client.retry("s-1", **WHO)
        assert refused_.value.reason == "SAGA_ENDED"
        with pytest.raises(amends.NotFound, match="there is no saga 'nobody'"):
            await client.retry("nobody", **WHO)
        with pytest.raises(amends.NotFound, match="did you mean 'notify'"):
            await client.retry("busy", step="notfy", **WHO)


# -- answers that are lost -------------------------------------------------------------------------


def lose_answer(
    monkeypatch: pytest.MonkeyPatch, verb: str, until: Callable[[], Awaitable[object]]
) -> list[str]:
    """The verb's first answer is lost once `until` returns, as when the runtime dies then.

    Gives the ids of the requests that came, in order.
    """
    real, came = getattr(OperatorService, verb), []

    async def lossy(service: OperatorService, request: Any, context: Context) -> Any:
        came.append(request.audit.request_id)
        answer = await real(service, request, context)
        if len(came) == 1:
            await until()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "died before the answer")
        return answer

    monkeypatch.setattr(OperatorService, verb, lossy)
    return came


async def test_one_retry_is_one_retry_however_often_it_is_asked(
    shop: Shop, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is lost, and the step is stuck again by the time that the client asks once more.

    One new round, one word of the operator's in the history.
    """
    shop.says["notify", amends.Verb.EXECUTE] = refuses

    async def stuck_again() -> None:
        with anyio.fail_after(PATIENCE_S):
            while (await client.get("s-1")).step("notify").round < 2:
                await anyio.lowlevel.checkpoint()
            await stuck(client, "s-1")

    came = lose_answer(monkeypatch, "RetrySaga", stuck_again)
    async with a_runtime(config) as client:
        await start_stuck(client)
        assert (await client.retry("s-1", **WHO)).state is amends.SagaState.STUCK
        assert len(came) == 2
        assert len(set(came)) == 1
        assert await acts(client) == [("retry", "notify", 2, WHO["author"], WHO["reason"])]
        await client.retry("s-1", **WHO)  # another request: the next round
        assert [round_ for _, _, round_, *_ in await acts(client)] == [2, 3]


async def test_a_retry_that_ended_the_saga_is_no_error(
    shop: Shop, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is lost, and the saga has completed by the time that the client asks once more."""
    shop.says["notify", amends.Verb.EXECUTE] = refuses

    async def ended() -> None:
        await client.wait("s-1", timeout_s=PATIENCE_S)

    came = lose_answer(monkeypatch, "RetrySaga", ended)
    async with a_runtime(config) as client:
        await start_stuck(client)
        shop.says.clear()
        assert (await client.retry("s-1", **WHO)).completed
        assert len(came) == 2
        with pytest.raises(amends.WrongState) as refused_:
            await client.retry("s-1", **WHO)
        assert refused_.value.reason == "SAGA_ENDED"


async def test_a_retry_is_known_again_after_a_restart(shop: Shop, config: Config) -> None:
    """The id of a request lies in the history, with what it did."""
    shop.says["notify", amends.Verb.EXECUTE] = refuses
    audit = operator_pb2.Audit(**WHO, request_id="r-1")
    request = operator_pb2.RetrySagaRequest(saga_id="s-1", audit=audit)
    async with an_operator(config) as (client, operator):
        await start_stuck(client)
        await operator.RetrySaga(request)
    async with an_operator(config) as (client, operator):
        await operator.RetrySaga(request)
        assert len(await acts(client)) == 1


# -- abandon ---------------------------------------------------------------------------------------


async def test_a_stuck_saga_is_abandoned_with_the_steps_that_remain(
    shop: Shop, config: Config
) -> None:
    """It ends for good, says who and why, and says so again after a restart."""
    shop.says["ship", amends.Verb.EXECUTE] = refuses
    shop.says["reserve", amends.Verb.COMPENSATE] = broken
    async with a_runtime(config) as client:
        await start_stuck(client)
        abandoned = await client.handle("s-1").abandon(**WHO)
        assert abandoned.saga.state is amends.SagaState.ABANDONED
        assert abandoned.saga.ended
        assert abandoned.remaining_steps == ("reserve",)
        assert await acts(client) == [("abandon", "", 0, WHO["author"], WHO["reason"])]
        assert (await client.wait("s-1")).state is amends.SagaState.ABANDONED
    made = len(shop.calls)
    async with a_runtime(config) as client:
        again = await client.abandon("s-1", author="bob", reason="did it work?")
        assert again.saga.state is amends.SagaState.ABANDONED
        assert again.remaining_steps == ("reserve",)
        assert len(await acts(client)) == 1
        with pytest.raises(amends.WrongState):
            await client.cancel("s-1", **WHO)
    assert len(shop.calls) == made


async def test_what_is_not_stuck_is_abandoned_by_force_alone(shop: Shop, config: Config) -> None:
    """The refusal says what it does; by force it ends, with what may still happen named."""
    shop.says["ship", amends.Verb.EXECUTE] = lambda _: amends.InProgress(after_s=3600)
    async with a_runtime(config) as client:
        await client.register(ORDER)
        await client.start("order", saga_id="s-1")
        async for _ in client.watch():  # the first is told at once
            if (await client.get("s-1")).step("ship").call_open:
                break
        with pytest.raises(amends.WrongState) as refused_:
            await client.abandon("s-1", **WHO)
        assert refused_.value.reason == "NOT_STUCK"
        assert "it is RUNNING, and at ship (EXECUTING, attempt 1" in refused_.value.message
        abandoned = await client.abandon("s-1", force=True, **WHO)
        assert abandoned.saga.state is amends.SagaState.ABANDONED
        assert abandoned.remaining_steps == ("reserve", "ship")


async def test_a_completed_saga_is_not_abandoned(shop: Shop, config: Config) -> None:
    """Not by force either: terminal stays terminal."""
    async with a_runtime(config) as client:
        await client.register(ORDER)
        await (await client.start("order", saga_id="s-1")).result(timeout_s=PATIENCE_S)
        for force in (False, True):
            with pytest.raises(amends.WrongState, match="does the opposite") as refused_:
                await client.abandon("s-1", force=force, **WHO)
            assert refused_.value.reason == "SAGA_ENDED"


# -- quarantine ------------------------------------------------------------------------------------


async def test_a_saga_that_a_bug_has_stopped_is_counted(
    shop: Shop, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no turn of its history, so no list has it as stuck: the runtime's count shows it."""
    decide, has_bug = core.decide, True

    def decide_with_a_bug(
        plan: Any, saga: core.Saga | None, message: Any, now_ms: int, epoch: int
    ) -> core.Decision:
        if has_bug and isinstance(message, Answered | RuntimeRestarted):
            raise ZeroDivisionError
        return decide(plan, saga, message, now_ms, epoch)

    monkeypatch.setattr(core, "decide", decide_with_a_bug)
    async with a_runtime(config) as client:
        await client.register(ORDER)
        assert (await client.runtime()).without_wake_up == 0
        await client.start("order", saga_id="s-1")
        with anyio.fail_after(PATIENCE_S):
            while (await client.get("s-1")).state is not amends.SagaState.STUCK:
                await anyio.lowlevel.checkpoint()
        assert (await client.runtime()).without_wake_up == 1
        assert [saga async for saga in client.list(state=amends.SagaState.STUCK)] == []
        has_bug = False
        await client.retry("s-1", **WHO)
        assert (await client.wait("s-1", timeout_s=PATIENCE_S)).completed
        assert (await client.runtime()).without_wake_up == 0


# -- requests --------------------------------------------------------------------------------------


async def test_who_and_why_are_asked_for(config: Config) -> None:
    """Every verb names everything that is missing or wrong at once, and nothing happens."""
    async with an_operator(config) as (_, operator):
        error = await refused(
            operator.RetrySaga(operator_pb2.RetrySagaRequest(saga_id="?", step="No Step"))
        )
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(error.violations) == {"saga_id", "step", "audit.author", "audit.reason"}
        error = await refused(operator.AbandonSaga(operator_pb2.AbandonSagaRequest()))
        assert set(error.violations) == {"saga_id", "audit.author", "audit.reason"}
        audit = operator_pb2.Audit(author=" ", reason="x" * 1025, request_id="é" * 65)
        error = await refused(
            operator.AbandonSaga(operator_pb2.AbandonSagaRequest(saga_id="s", audit=audit))
        )
        assert set(error.violations) == {"audit.author", "audit.reason", "audit.request_id"}
