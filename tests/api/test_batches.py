"""StartSagas and AwaitSagas: many at once, each with its own answer."""

import gc
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
import structlog
from google.protobuf.message import Message

import amends
from amends.v1 import saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.api import awaiting
from amends_runtime.api.awaiting import AwaitedSagas
from amends_runtime.api.server import MAX_REQUEST_BYTES, ApiServer
from amends_runtime.config import Config, Limits
from amends_runtime.engine import Engine, run_engine
from amends_runtime.ports import LoadedSaga, Tombstone
from tests.api.refusals import refused
from tests.api.shop import ORDER, Shop
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


@pytest.mark.parametrize("size", [1024 * 1024 + 1, 5 * 1024 * 1024, MAX_REQUEST_BYTES - 1024])
async def test_an_input_that_is_too_large_is_refused_by_our_own_limit(
    sagas: Sagas, size: int
) -> None:
    """It arrives, and the answer names the limit, the size and what to do; alone and in a batch."""
    large = start("large", input=types_pb2.Payload(data=bytes(size)))
    said = f"{size} bytes, and 1048576 are the most: store the data elsewhere"
    error = await refused(sagas.StartSaga(large))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert said in error.violations["input.data"]
    answer = await sagas.StartSagas(saga_pb2.StartSagasRequest(starts=[large, start("small")]))
    assert f"starts[0].input.data: {said}" in answer.results[0].error.message
    assert answer.results[1].started.saga.saga_id == "small"


def alive(kind: type[Message], saga_id: str) -> bool:
    """Whether a request with this id is still in memory."""
    return any(
        isinstance(one, kind) and saga_id in str(one.SerializeToString())
        for one in gc.get_objects()
    )


async def test_a_request_that_is_refused_is_not_kept(channel: grpc.aio.Channel) -> None:
    """It goes at once: the collector counts objects, and may not come by for a gigabyte."""
    ask: Any = channel.unary_unary("/amends.v1.SagaService/StartSaga")  # the message is theirs only
    gc.collect()
    gc.disable()
    try:
        await refused(ask(start("refused-and-gone", definition="ordre").SerializeToString()))
        with anyio.fail_after(10):
            while alive(saga_pb2.StartSagaRequest, "refused-and-gone"):  # noqa: ASYNC110
                await anyio.sleep(0.001)
    finally:
        gc.enable()


async def test_a_bug_in_one_start_is_that_ones_answer(
    sagas: Sagas, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are started all the same."""
    begin_start = engine.supervisor._begin_start

    def buggy(request: Any) -> Any:
        if request.saga_id == "cursed":
            raise ValueError("secret")
        return begin_start(request)

    monkeypatch.setattr(engine.supervisor, "_begin_start", buggy)
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


async def test_starts_for_which_there_is_no_room_are_refused_and_counted(
    config: Config, shop: Shop
) -> None:
    """Those before them are started; the others say when to come back, and nothing was done."""
    small = config.model_copy(update={"limits": Limits(commit_queue=3)})
    async with (
        run_engine(small, [ORDER]) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        starts = [start(f"s-{number}") for number in range(5)]
        answer = await sagas.StartSagas(saga_pb2.StartSagasRequest(starts=starts))
        taken, refused_ = answer.results[:3], answer.results[3:]
        assert [one.started.saga.saga_id for one in taken] == ["s-0", "s-1", "s-2"]
        for one in refused_:
            assert one.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert one.error.reason == "COMMIT_QUEUE"
            assert one.error.metadata["limit"] == "3"
            assert int(one.error.metadata["retry_after_ms"]) > 0
        assert engine.supervisor.refused == {"COMMIT_QUEUE": 2}
        listed = await sagas.ListSagas(saga_pb2.ListSagasRequest())
        assert sorted(saga.saga_id for saga in listed.sagas) == ["s-0", "s-1", "s-2"]


async def test_many_callers_of_a_full_runtime_all_get_their_sagas(
    config: Config, shop: Shop
) -> None:
    """The client comes back by itself; nothing is started twice, and no caller hears of it."""
    small = config.model_copy(update={"limits": Limits(commit_queue=8)})
    async with (
        run_engine(small, [ORDER]) as engine,
        amends.Client(engine.address, timeout_s=600) as client,
    ):
        ids = [f"s-{number}" for number in range(100)]
        ended: list[amends.Saga] = []

        async def one(saga_id: str) -> None:
            started = await client.start("order", saga_id=saga_id, wait_s=600)
            ended.append(await started.result(timeout_s=600))

        async with anyio.create_task_group() as tasks:
            for saga_id in ids:
                tasks.start_soon(one, saga_id)
        assert engine.supervisor.refused["COMMIT_QUEUE"] > 0
    assert sorted(saga.saga_id for saga in ended) == sorted(ids)
    assert all(saga.completed for saga in ended)
    calls = Counter((call.saga_id, call.action) for call in shop.calls)
    assert len(calls) == 3 * len(ids)
    assert set(calls.values()) == {1}


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


async def test_what_is_only_in_the_store_comes_in_when_it_is_awaited(
    config: Config, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a recovery has come to it: it goes on, and its end is told."""

    async def unreachable(call: amends.Call) -> object:
        raise ConnectionError

    shop.behaviours["reserve"] = unreachable
    ids = [f"s-{number}" for number in range(20)]
    async with (
        run_engine(config, [ORDER]) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        await sagas.StartSagas(saga_pb2.StartSagasRequest(starts=map(start, ids)))
    del shop.behaviours["reserve"]

    async def never(_: Supervisor) -> None:
        """Recovers nothing."""

    monkeypatch.setattr(Supervisor, "run_recovery", never)
    async with run_engine(config, [ORDER]) as engine:
        assert engine.supervisor.counts().live == 0
        async with grpc.aio.insecure_channel(engine.address) as channel:
            stream = Stream(saga_pb2_grpc.SagaServiceStub(channel))
            await stream.send(add=[*ids, "nobody"])
            ends = [await stream.end() for _ in range(21)]
            stream.call.cancel()
    assert sorted(end.saga_id for end in ends if end.saga.state == COMPLETED) == sorted(ids)
    assert [end.error.reason for end in ends if end.HasField("error")] == ["UNKNOWN_SAGA"]


class Unread:
    """A client's side of a stream that reads when it is told to; its messages are kept.

    In place of gRPC's, whose windows take in some messages that nobody reads: how many is its own
    affair, and not the same from run to run.
    """

    def __init__(self, *requests: saga_pb2.AwaitSagasRequest) -> None:
        self._requests = iter(requests)
        self.more_to_say = anyio.Semaphore(len(requests))
        self.said: list[str] = []
        self.messages: list[saga_pb2.AwaitSagasResponse] = []
        self.writing = anyio.Event()
        self.reads = anyio.Semaphore(0)

    async def read(self) -> object:
        """Gives the next request, when there is one to say."""
        await self.more_to_say.acquire()
        request = next(self._requests, grpc.aio.EOF)
        if isinstance(request, saga_pb2.AwaitSagasRequest):
            self.said += request.add
        else:
            self.more_to_say.release()
        return request

    async def write(self, message: saga_pb2.AwaitSagasResponse) -> None:
        """Waits until the client reads."""
        self.writing.set()
        await self.reads.acquire()
        self.messages.append(message)

    def ends(self) -> list[saga_pb2.SagaEnd]:
        """All that the client was told."""
        return [end for message in self.messages for end in message.ends]


def awaited_by(client: Unread, engine: Engine) -> AwaitedSagas:
    """The server's side."""
    return AwaitedSagas(engine.supervisor, client)  # type: ignore[arg-type]  # it has all we use


async def test_a_client_that_does_not_read_is_not_read_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said and not answered stays bounded; when it reads, everything is answered once."""
    monkeypatch.setattr(awaiting, "MAX_FOUND", 4)
    ids = [f"not an id {number}" for number in range(150)]
    client = Unread(*(saga_pb2.AwaitSagasRequest(add=ids[n : n + 3]) for n in range(0, 150, 3)))
    client.more_to_say.release()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(awaited_by(client, engine).run)
        while len(client.ends()) < 150:
            await client.writing.wait()
            await anyio.wait_all_tasks_blocked()
            # A message under way, what waits behind it, and what is left of a request.
            assert len(client.said) - len(client.ends()) <= 4 + 4 + 3
            client.writing = anyio.Event()
            client.reads.release()
            await anyio.wait_all_tasks_blocked()
    assert [end.saga_id for end in client.ends()] == ids


async def test_a_few_sagas_are_read_from_the_store_at_a_time(
    engine: Engine, sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take the place of starts; one that is removed meanwhile is not told."""
    monkeypatch.setattr(awaiting, "MAX_ARRIVING", 4)
    ids = [f"s-{number}" for number in range(30)]
    for saga_id in ids:
        await sagas.StartSaga(start(saga_id, wait_ms=60_000))
    reading = anyio.Event()
    load = engine.store.load

    async def load_later(saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        await reading.wait()
        return await load(saga_ids)

    monkeypatch.setattr(engine.store, "load", load_later)
    client = Unread(
        saga_pb2.AwaitSagasRequest(add=ids[:3]),
        saga_pb2.AwaitSagasRequest(remove=ids[:1], add=ids[3:]),
    )
    awaited = awaited_by(client, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(awaited.run)
        await anyio.wait_all_tasks_blocked()
        assert sorted(awaited._arriving) == ["s-1", "s-2", "s-3", "s-4"]
        reading.set()
        client.more_to_say.release()
        for _ in ids:
            client.reads.release()
    assert sorted(end.saga_id for end in client.ends()) == sorted(ids[1:])
    assert (awaited._arriving, awaited._waits, awaited._found) == (set(), {}, {})


async def test_ends_that_are_not_read_are_not_kept(
    engine: Engine, sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read costs ids; what it is told when it does is whole all the same."""
    limit = 5 * 1024 * 1024
    monkeypatch.setattr(awaiting, "MAX_KEPT_BYTES", limit)
    payload = types_pb2.Payload(data=bytes(1024 * 1024))
    ids = [f"s-{number}" for number in range(12)]
    for saga_id in ids:
        await sagas.StartSaga(start(saga_id, input=payload, wait_ms=60_000))
    client = Unread(
        saga_pb2.AwaitSagasRequest(add=ids),
        saga_pb2.AwaitSagasRequest(add=["s-0", "not an id"], remove=["never added"]),
    )
    awaited = awaited_by(client, engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(awaited.run)
        await client.writing.wait()
        while awaited._waits:  # noqa: ASYNC110  # they end when the store has answered
            await anyio.sleep(0.001)
        kept = [found.end for found in awaited._found.values() if found.end is not None]
        assert sum(end.ByteSize() for end in kept) == awaited._kept_bytes <= limit
        assert len(awaited._found) >= 9  # counted, whatever is kept of them
        client.more_to_say.release()
        for _ in range(20):
            client.reads.release()
    told = client.ends()
    assert {end.saga_id for end in told} == {*ids, "not an id"}
    assert all(end.saga.input.data == payload.data for end in told if end.HasField("saga"))
    assert (awaited._kept_bytes, awaited._found, awaited._waits) == (0, {}, {})


async def test_what_is_removed_is_not_told_even_if_it_was_found(engine: Engine) -> None:
    """What waits for a client that does not read can be taken back; what is under way cannot."""
    client = Unread(
        saga_pb2.AwaitSagasRequest(add=["under way?"]),
        saga_pb2.AwaitSagasRequest(add=["wanted?", "unwanted?"]),
        saga_pb2.AwaitSagasRequest(remove=["under way?", "unwanted?"]),
    )
    async with anyio.create_task_group() as tasks:
        client.more_to_say = anyio.Semaphore(1)
        tasks.start_soon(awaited_by(client, engine).run)
        await client.writing.wait()
        for _ in range(3):
            client.more_to_say.release()
        await anyio.wait_all_tasks_blocked()
        for _ in range(2):
            client.reads.release()
    assert [end.saga_id for end in client.ends()] == ["under way?", "wanted?"]


async def test_a_request_of_a_client_that_left_is_not_kept(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes at once, as above; also if the client left while its request was being taken in."""
    monkeypatch.setattr(awaiting, "MAX_FOUND", 1)
    ids = [f"/gone-{number}/" * 10_000 + "!" for number in range(140)]
    request = saga_pb2.AwaitSagasRequest(add=ids).SerializeToString()
    call: Any = channel.stream_stream("/amends.v1.SagaService/AwaitSagas")()
    gc.collect()
    gc.disable()
    try:
        await call.write(request)
        await call.read()
        call.cancel()
        with anyio.fail_after(10):
            while alive(saga_pb2.AwaitSagasRequest, "/gone-99/"):  # noqa: ASYNC110
                await anyio.sleep(0.001)
    finally:
        gc.enable()


async def test_a_client_that_leaves_during_a_write_is_no_error(
    engine: Engine, sagas: Sagas
) -> None:
    """However much it was still to be told: it is gone, and the log has nothing to complain of."""
    payload = types_pb2.Payload(data=bytes(1024 * 1024))
    ids = [f"s-{number}" for number in range(30)]
    for saga_id in ids:
        await sagas.StartSaga(start(saga_id, input=payload, wait_ms=60_000))
    server = ApiServer(
        "127.0.0.1:0",
        engine.store,
        engine.supervisor,
        engine.definitions,
        engine.lanes,
        participants=engine.participants,
    )
    address = await server.start()
    with structlog.testing.capture_logs() as logs:
        for _ in range(10):
            async with grpc.aio.insecure_channel(address) as channel:
                stream = Stream(saga_pb2_grpc.SagaServiceStub(channel))
                for saga_id in ids:  # by itself, so that there is a message for each
                    await stream.send(add=[saga_id])
                await stream.end()
                stream.call.cancel()
            while server._door._inside:  # noqa: ASYNC110  # the server hears of it when it does
                await anyio.sleep(0.001)
    await server.stop(0)
    assert [entry for entry in logs if entry["log_level"] not in {"debug", "info"}] == []
