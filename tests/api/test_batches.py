"""StartSagas and AwaitSagas: many at once, each with its own answer."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import grpc
import pytest

import amends
from amends.v1 import saga_pb2, types_pb2
from amends_runtime.api import awaiting
from amends_runtime.engine import Engine
from tests.api.refusals import refused
from tests.api.shop import Shop
from tests.api.stubs import Sagas

COMPLETED = types_pb2.SAGA_STATE_COMPLETED


def start(saga_id: str, **fields: Any) -> saga_pb2.StartSagaRequest:
    """A start of `order`."""
    return saga_pb2.StartSagaRequest(**{"saga_id": saga_id, "definition": "order", **fields})


# -- starting --------------------------------------------------------------------------------------


async def test_each_start_has_its_own_answer(sagas: Sagas) -> None:
    """In the order of the request; what is wrong with one is no other's business."""
    await sagas.StartSaga(start("taken", deadline_ms=60_000))
    answer = await sagas.StartSagas(
        saga_pb2.StartSagasRequest(
            starts=[
                start("new"),
                start("new"),
                start("taken"),
                start("bad id", deadline_ms=-1),
                start("other", definition="ordre"),
                start(""),
            ]
        )
    )
    new, again, taken, bad, unknown, unnamed = answer.results
    assert (new.started.saga.saga_id, new.started.existed) == ("new", False)
    assert (again.started.saga.saga_id, again.started.existed) == ("new", True)
    assert (taken.error.code, taken.error.reason) == (
        grpc.StatusCode.ALREADY_EXISTS.value[0],
        "SAGA_EXISTS_WITH_OTHER_CONTENT",
    )
    assert bad.error.reason == "INVALID_REQUEST"
    assert "starts[3].saga_id:" in bad.error.message
    assert "starts[3].deadline_ms:" in bad.error.message
    assert unknown.error.reason == "UNKNOWN_DEFINITION"
    assert len(unnamed.started.saga.saga_id) == 36


async def test_a_large_batch_is_started_and_answered_briefly(sagas: Sagas) -> None:
    """As lists show them: a response of a thousand sagas stays small."""
    payload = types_pb2.Payload(data=bytes(3_000))
    answer = await sagas.StartSagas(
        saga_pb2.StartSagasRequest(starts=[start(f"s-{n}", input=payload) for n in range(1_000)])
    )
    assert [result.started.saga.saga_id for result in answer.results] == [
        f"s-{n}" for n in range(1_000)
    ]
    assert answer.ByteSize() < 1_000_000
    assert (await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-999"))).ended


async def test_a_batch_that_is_too_large_is_refused_as_a_whole(sagas: Sagas) -> None:
    """Nothing of it is started."""
    starts = [start(f"s-{n}") for n in range(1_001)]
    error = await refused(sagas.StartSagas(saga_pb2.StartSagasRequest(starts=starts)))
    assert error.violations == {"starts": "1001 of them, and 1000 are the most: send more requests"}
    assert not (await sagas.ListSagas(saga_pb2.ListSagasRequest())).sagas


async def test_a_bug_in_one_start_is_that_ones_answer(
    sagas: Sagas, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are started all the same."""
    start_saga = engine.supervisor.start_saga

    async def buggy(request: Any) -> Any:
        if request.saga_id == "cursed":
            raise ValueError("secret")
        return await start_saga(request)

    monkeypatch.setattr(engine.supervisor, "start_saga", buggy)
    answer = await sagas.StartSagas(
        saga_pb2.StartSagasRequest(starts=[start("a"), start("cursed"), start("b")])
    )
    assert [result.WhichOneof("result") for result in answer.results] == [
        "started",
        "error",
        "started",
    ]
    error = answer.results[1].error
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
    assert "secret" not in error.message


# -- awaiting --------------------------------------------------------------------------------------


class Stream:
    """The client's side of one AwaitSagas stream."""

    def __init__(self, sagas: Sagas) -> None:
        self.call: Any = sagas.AwaitSagas()
        self._pending: list[saga_pb2.SagaEnd] = []

    async def send(self, *, add: list[str] | None = None, remove: list[str] | None = None) -> None:
        """Changes what is waited for."""
        await self.call.write(saga_pb2.AwaitSagasRequest(add=add or (), remove=remove or ()))

    async def end(self) -> saga_pb2.SagaEnd:
        """The next end."""
        while not self._pending:
            answer = await self.call.read()
            assert isinstance(answer, saga_pb2.AwaitSagasResponse), "the stream is over"
            self._pending += answer.ends
        return self._pending.pop(0)


@pytest.fixture
async def stream(sagas: Sagas) -> AsyncIterator[Stream]:
    """An open stream."""
    stream = Stream(sagas)
    yield stream
    stream.call.cancel()


async def test_ends_come_as_they_happen(sagas: Sagas, stream: Stream, shop: Shop) -> None:
    """At once for what has ended, later for what is under way, with the results."""

    async def shipped(call: amends.Call) -> object:
        return amends.Payload(b"parcel 7", "text/plain")

    shop.behaviours["ship"] = shipped
    await sagas.StartSaga(start("done", wait_ms=60_000))
    await stream.send(add=["done"])
    end = await stream.end()
    assert (end.saga_id, end.saga.state) == ("done", COMPLETED)
    assert end.saga.steps[1].result.data == b"parcel 7"
    held = shop.hold("reserve")
    await sagas.StartSaga(start("later"))
    await stream.send(add=["later", "done"])  # one that was told is told again if asked
    assert (await stream.end()).saga_id == "done"
    await held.begun.wait()
    held.let_go.set()
    assert (await stream.end()).saga_id == "later"


async def test_what_cannot_be_waited_for_has_its_error(stream: Stream) -> None:
    """The other waits, and the stream, go on."""
    await stream.send(add=["nobody", "not an id"])
    ends = {end.saga_id: end.error for end in [await stream.end(), await stream.end()]}
    assert ends["nobody"].reason == "UNKNOWN_SAGA"
    assert ends["nobody"].code == grpc.StatusCode.NOT_FOUND.value[0]
    assert ends["not an id"].reason == "INVALID_REQUEST"


async def test_what_is_removed_is_not_told(sagas: Sagas, stream: Stream, shop: Shop) -> None:
    """Whoever no longer waits hears nothing; adding it twice tells it once."""
    held = shop.hold("reserve")
    for saga_id in ("unwanted", "wanted"):
        await sagas.StartSaga(start(saga_id))
    await stream.send(add=["unwanted", "wanted", "wanted"])
    await stream.send(remove=["unwanted", "never added"])
    await stream.send(add=["nobody"])
    assert (await stream.end()).saga_id == "nobody"  # so the removal has been read
    held.let_go.set()
    assert (await stream.end()).saga_id == "wanted"
    await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="unwanted"))
    await stream.call.done_writing()
    assert await stream.call.read() is grpc.aio.EOF


async def test_the_stream_ends_with_its_last_end(sagas: Sagas, stream: Stream, shop: Shop) -> None:
    """A client that has said its last is still told what it waits for, and then it is over."""
    held = shop.hold("reserve")
    await sagas.StartSaga(start("s-1"))
    await stream.send(add=["s-1"])
    await stream.call.done_writing()
    held.let_go.set()
    assert (await stream.end()).saga_id == "s-1"
    assert await stream.call.read() is grpc.aio.EOF
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_one_stream_has_a_limit(
    sagas: Sagas, stream: Stream, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it an id is refused by name, and can be added when others have ended."""
    monkeypatch.setattr(awaiting, "MAX_AWAITED", 1)
    held = shop.hold("reserve")
    await sagas.StartSaga(start("s-1"))
    await stream.send(add=["s-1", "s-2"])
    end = await stream.end()
    assert (end.saga_id, end.error.reason) == ("s-2", "TOO_MANY_AWAITED")
    held.let_go.set()
    assert (await stream.end()).saga_id == "s-1"
    await stream.send(add=["s-1"])
    assert (await stream.end()).saga.state == COMPLETED


async def test_a_thousand_ends_go_over_one_stream(sagas: Sagas, stream: Stream) -> None:
    """Every id that was added has exactly one end."""
    ids = [f"s-{n}" for n in range(1_000)]
    await stream.send(add=ids[:500])  # before their start: not found
    assert {(await stream.end()).error.reason for _ in range(500)} == {"UNKNOWN_SAGA"}
    await sagas.StartSagas(saga_pb2.StartSagasRequest(starts=map(start, ids)))
    await stream.send(add=ids)
    ends = [await stream.end() for _ in ids]
    assert sorted(end.saga_id for end in ends) == sorted(ids)
    assert {end.saga.state for end in ends} == {COMPLETED}


async def test_a_client_that_leaves_takes_its_waits_along(
    engine: Engine, sagas: Sagas, shop: Shop
) -> None:
    """The sagas go on; nothing waits for them any more."""
    shop.hold("reserve")
    await sagas.StartSaga(start("s-1"))
    stream = Stream(sagas)
    await stream.send(add=["s-1", "nobody"])
    assert (await stream.end()).saga_id == "nobody"
    actor = engine.supervisor._actors["s-1"]
    assert actor._waiters
    stream.call.cancel()
    with anyio.fail_after(30):
        while actor._waiters:  # noqa: ASYNC110  # the server hears of it when it does
            await anyio.sleep(0.001)
