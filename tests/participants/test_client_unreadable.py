"""Answers that cannot be read: an error of the call that they are for, and of no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

import amends
from amends.status import MAX_RETRY_AFTER_S, STATUS_KEY, error_from_item, error_from_status
from amends.v1 import saga_pb2, types_pb2
from tests.participants.scripted_runtime import (
    Refusal,
    ScriptedRuntime,
    Talk,
    scripted_runtime,
)

GARBAGE = b"\xff\xff\xff"
UNREADABLE = "with bytes that this client cannot read: is it another version?"


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a server that starts whatever it is asked for, and answers as the test says."""
    async with scripted_runtime() as running:
        running.answer("StartSaga", start_alone)
        running.answer("StartSagas", start_all)
        yield running


@pytest.fixture
async def client(runtime: ScriptedRuntime) -> AsyncIterator[amends.Client]:
    """Give a client of it that is patient: no test waits for its time to be over."""
    async with amends.Client(runtime.address, timeout_s=60) as open_client:
        yield open_client


def started(saga_id: str) -> saga_pb2.StartSagaResponse:
    """Make the answer to a start."""
    saga = types_pb2.Saga(saga_id=saga_id, state=types_pb2.SAGA_STATE_RUNNING)
    return saga_pb2.StartSagaResponse(saga=saga)


async def start_alone(request: saga_pb2.StartSagaRequest) -> Message:
    """Start what is asked for alone."""
    return started(request.saga_id)


async def start_all(request: saga_pb2.StartSagasRequest) -> Message:
    """Start all that is asked for together."""
    results = [saga_pb2.StartSagasResult(started=started(one.saga_id)) for one in request.starts]
    return saga_pb2.StartSagasResponse(results=results)


async def say_garbage(talk: Talk) -> None:
    """Answer whatever is said with bytes that are no message."""
    await talk.hear()
    await talk.say(GARBAGE)
    await talk.hear()


async def end_all(talk: Talk) -> None:
    """Answer every id at once with its end."""
    while True:
        asked = await talk.hear()
        ends = [
            saga_pb2.SagaEnd(
                saga_id=saga_id,
                saga=types_pb2.Saga(saga_id=saga_id, state=types_pb2.SAGA_STATE_COMPLETED),
            )
            for saga_id in asked.add
        ]
        await talk.say(saga_pb2.AwaitSagasResponse(ends=ends))


async def test_a_call_says_that_its_answer_cannot_be_read(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Asked once: the same bytes would come again. Whether it was done, nobody knows."""
    runtime.answer("GetSaga", GARBAGE)
    with pytest.raises(amends.ApiError, match=UNREADABLE) as caught:
        await client.get("order-1")
    assert type(caught.value) is amends.ApiError
    assert (caught.value.code, caught.value.in_doubt) == (grpc.StatusCode.INTERNAL, True)
    assert len(runtime.requests(saga_pb2.GetSagaRequest)) == 1


async def test_a_start_whose_answer_cannot_be_read_is_unknown(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It may have happened: the error has the id by which to ask."""
    runtime.answer("StartSaga", GARBAGE, start_alone)
    with pytest.raises(amends.StartUnknown, match=UNREADABLE):
        await client.start("order")
    assert (await client.start("order", saga_id="order-2")).saga_id == "order-2"


async def test_starts_whose_answer_cannot_be_read_end_nobody_else(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Those of that request are unknown; the client goes on to start what comes later."""
    came, let_go = anyio.Event(), anyio.Event()

    async def held(request: saga_pb2.StartSagaRequest) -> Message:
        came.set()
        await let_go.wait()
        return started(request.saga_id)

    runtime.answer("StartSaga", held)
    runtime.answer("StartSagas", GARBAGE, start_all)
    async with asyncio.TaskGroup() as tasks:
        alone = tasks.create_task(client.start("order", saga_id="alone"))
        await came.wait()
        together = await asyncio.gather(
            *(client.start("order") for _ in range(3)), return_exceptions=True
        )
        assert [type(one) for one in together] == [amends.StartUnknown] * 3
        assert UNREADABLE in str(together[0])
        later = await asyncio.gather(*(client.start("order", saga_id=f"l-{n}") for n in range(3)))
        assert [one.saga_id for one in later] == ["l-0", "l-1", "l-2"]
        let_go.set()
    assert alone.result().saga_id == "alone"


async def test_a_wait_outlives_one_message_that_cannot_be_read(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The stream is opened again, as after any odd end of one."""
    runtime.converse("AwaitSagas", say_garbage, end_all)
    assert (await client.wait("order-1")).completed
    assert runtime.streams == 2


async def test_a_wait_gives_up_where_nothing_can_be_read(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It is told so, and the client still serves the next one."""
    runtime.converse("AwaitSagas", say_garbage)
    with pytest.raises(amends.ApiError, match=UNREADABLE):
        await client.wait("order-1")
    runtime.converse("AwaitSagas", end_all)
    assert (await client.wait("order-2")).completed


async def test_a_watch_says_that_an_event_cannot_be_read(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """To go on beyond it would miss something, which a watch never does."""

    async def say_one_and_garbage(talk: Talk) -> None:
        await talk.hear()
        await talk.say(saga_pb2.WatchSagasResponse(lagged=True))
        await talk.say(GARBAGE)
        await talk.hear()

    runtime.converse("WatchSagas", say_one_and_garbage)
    events = client.watch()
    assert (await anext(events)).lagged
    with pytest.raises(amends.ApiError, match=UNREADABLE):
        await anext(events)


async def test_closing_a_client_that_met_garbage_is_silent(runtime: ScriptedRuntime) -> None:
    """It is no bug of the client's."""
    runtime.answer("StartSaga", GARBAGE)
    runtime.converse("AwaitSagas", say_garbage)
    async with amends.Client(runtime.address, timeout_s=60) as client:
        with pytest.raises(amends.StartUnknown):
            await client.start("order")
        with pytest.raises(amends.ApiError):
            await client.wait("order-1")


@pytest.mark.parametrize("said", ["9" * 5000, "9" * 400, "1e400", "-1", "٣", "", "soon"])
def test_an_items_absurd_time_to_ask_again_is_bounded(said: str) -> None:
    """No number, or an hour at most: nobody's timer overflows."""
    error = types_pb2.Error(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        reason="COMMIT_QUEUE",
        message="full",
        metadata={"retry_after_ms": said},
    )
    overloaded = error_from_item(error, "127.0.0.1:7233")
    assert isinstance(overloaded, amends.Overloaded)
    assert overloaded.retry_after_s in (None, MAX_RETRY_AFTER_S)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2**62, MAX_RETRY_AFTER_S), (-5, 0.0), (2, 2.0)], ids=str
)
def test_a_status_absurd_time_to_ask_again_is_bounded(seconds: int, shown: float) -> None:
    """As an item's."""
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds)))
    metadata = grpc.aio.Metadata((STATUS_KEY, status.SerializeToString()))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, "full"
    )
    overloaded = error_from_status(error, "127.0.0.1:7233")
    assert isinstance(overloaded, amends.Overloaded)
    assert overloaded.retry_after_s == shown


async def test_a_number_of_violations_that_is_none_is_no_failure(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """What was said is shown all the same."""
    runtime.answer(
        "GetSaga",
        Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "bad",
            "INVALID_REQUEST",
            metadata=(("violations", "9" * 5000),),
            violations=(("saga_id", "bad"),),
        ),
    )
    with pytest.raises(amends.InvalidRequest, match="saga_id: bad"):
        await client.get("order-1")
