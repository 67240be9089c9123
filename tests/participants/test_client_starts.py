"""Starts of many tasks at once: they share requests, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
from google.protobuf.message import Message

import amends
from amends import room, starting
from amends.v1 import saga_pb2, types_pb2
from tests.participants.scripted_runtime import (
    Refusal,
    ScriptedRuntime,
    Talk,
    names,
    scripted_runtime,
)

Code = grpc.StatusCode
UNAVAILABLE = Refusal(Code.UNAVAILABLE, "starting")


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a server that starts whatever it is asked for, unless the test says otherwise."""
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
    saga = types_pb2.Saga(saga_id=saga_id, definition="order", state=types_pb2.SAGA_STATE_RUNNING)
    return saga_pb2.StartSagaResponse(saga=saga)


async def start_alone(request: saga_pb2.StartSagaRequest) -> Message:
    """Start what is asked for alone."""
    return started(request.saga_id)


async def start_all(request: saga_pb2.StartSagasRequest) -> Message:
    """Start all that is asked for together."""
    return answers(request, {})


def answers(
    request: saga_pb2.StartSagasRequest, errors: dict[str, types_pb2.Error]
) -> saga_pb2.StartSagasResponse:
    """Start all, but for those that have errors."""
    return saga_pb2.StartSagasResponse(
        results=[
            saga_pb2.StartSagasResult(error=errors[start.saga_id])
            if start.saga_id in errors
            else saga_pb2.StartSagasResult(started=started(start.saga_id))
            for start in request.starts
        ]
    )


def an_error(code: grpc.StatusCode, reason: str, **metadata: str) -> types_pb2.Error:
    """Make the answer to one start that was refused."""
    return types_pb2.Error(
        code=code.value[0], reason=reason, message=f"{reason}, as it is", metadata=metadata
    )


class Gate:
    """An answer that waits until it is let go; `came` is set when it was first asked for."""

    def __init__(self, then: Callable[[Any], Any] = start_all) -> None:
        self.came = anyio.Event()
        self.let_go = anyio.Event()
        self._then = then

    async def __call__(self, request: Any) -> Message:
        self.came.set()
        await self.let_go.wait()
        answer: Message = await self._then(request)
        return answer


def batches(runtime: ScriptedRuntime) -> list[list[str]]:
    """Give the ids of each request of many starts, in order."""
    requests = runtime.requests(saga_pb2.StartSagasRequest)
    return [[start.saga_id for start in request.starts] for request in requests]


async def outcome(start: Any) -> amends.StartedSaga | Exception:
    """Give what came of a start, an error too."""
    try:
        saga: amends.StartedSaga = await start
        return saga
    except Exception as error:  # noqa: BLE001  # it is what is asked for
        return error


class Company:
    """A start that is under way for as long as the block, so that others are not alone.

    The runtime answers it when the block is left.
    """

    def __init__(self, runtime: ScriptedRuntime, client: amends.Client) -> None:
        self._gate = Gate(start_alone)
        runtime.answer("StartSaga", self._gate, start_alone)
        self._client = client

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._client.start("order", saga_id="company"))
        await self._gate.came.wait()

    async def __aexit__(self, *_: object) -> None:
        self._gate.let_go.set()
        await self._task


# -- sharing -------------------------------------------------------------------------------------


async def test_a_thousand_starts_cost_a_few_requests(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The first leaves at once and alone, all others together; each has its own saga."""
    sagas = await asyncio.gather(
        *(client.start("order", {"number": n}, saga_id=f"order-{n}") for n in range(1000))
    )
    assert [saga.saga_id for saga in sagas] == [f"order-{n}" for n in range(1000)]
    assert [saga.saga.input.json() for saga in sagas] == [{"number": n} for n in range(1000)]
    assert sorted(names(runtime.asked)) == ["StartSaga", "StartSagas"]


async def test_requests_have_a_limit_of_starts(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """As many as the runtime takes, in the order in which they were asked for."""
    await asyncio.gather(*(client.start("order", saga_id=f"order-{n}") for n in range(2501)))
    assert batches(runtime) == [
        [f"order-{n}" for n in range(1, 1001)],
        [f"order-{n}" for n in range(1001, 2001)],
        [f"order-{n}" for n in range(2001, 2501)],
    ]


async def test_requests_have_a_limit_of_bytes(
    runtime: ScriptedRuntime, client: amends.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start too large for it still leaves, by itself."""
    monkeypatch.setattr(starting, "MAX_BYTES", 10_000)
    sizes = [10, 4000, 4000, 4000, 50_000, 100, 100]
    await asyncio.gather(
        *(client.start("order", bytes(size), saga_id=f"{n}") for n, size in enumerate(sizes))
    )
    assert batches(runtime) == [["1", "2"], ["3"], ["4"], ["5", "6"]]


async def test_one_request_is_on_its_way_while_the_next_gathers(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Starts that come meanwhile, one by one, leave together when it is answered."""
    gate = Gate()
    runtime.answer("StartSagas", gate, start_all)
    async with Company(runtime, client), asyncio.TaskGroup() as tasks:
        tasks.create_task(client.start("order", saga_id="first"))
        await gate.came.wait()
        for n in range(5):
            tasks.create_task(client.start("order", saga_id=f"next-{n}"))
            await anyio.wait_all_tasks_blocked()
        assert batches(runtime) == [["first"]]
        gate.let_go.set()
    assert batches(runtime) == [["first"], [f"next-{n}" for n in range(5)]]


async def test_starts_one_after_another_leave_alone(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nobody waits for company."""
    for n in range(3):
        await client.start("order", saga_id=f"order-{n}")
    assert names(runtime.asked) == ["StartSaga"] * 3


async def test_a_start_in_company_can_wait_for_the_end(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """`wait_s` holds for it too: the runtime answers many starts at once, and is asked on."""
    ended = types_pb2.Saga(
        saga_id="order-1", state=types_pb2.SAGA_STATE_COMPLETED, ended_at_ms=1_700_000_000_000
    )
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=ended, ended=True))
    async with Company(runtime, client):
        started_saga = await client.start("order", saga_id="order-1", wait_s=60)
    assert started_saga.saga.completed
    assert batches(runtime) == [["order-1"]]


def completed(saga_id: str) -> types_pb2.Saga:
    """Make a saga as it is told at its end."""
    return types_pb2.Saga(
        saga_id=saga_id,
        state=types_pb2.SAGA_STATE_COMPLETED,
        ended_at_ms=1_700_000_000_000,
        steps=[types_pb2.StepStatus(name="reserve", state=types_pb2.STEP_STATE_EXECUTED)],
    )


async def end_all(talk: Talk) -> None:
    """End each saga that is waited for."""
    while True:
        ends = [
            saga_pb2.SagaEnd(saga_id=saga_id, saga=completed(saga_id))
            for saga_id in (await talk.hear()).add
        ]
        await talk.say(saga_pb2.AwaitSagasResponse(ends=ends))


async def test_many_starts_that_wait_share_one_stream(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Each is answered when its saga has ended, whole, and its result needs no further question."""
    runtime.converse("AwaitSagas", end_all)
    async with Company(runtime, client):
        started_sagas = await asyncio.gather(
            *(client.start("order", {"n": n}, saga_id=f"s-{n}", wait_s=60) for n in range(100))
        )
        sagas = [await one.result() for one in started_sagas]
    assert [saga.saga_id for saga in sagas] == [f"s-{n}" for n in range(100)]
    assert {saga.step("reserve").state for saga in sagas} == {amends.StepState.EXECUTED}
    assert [saga.input.json() for saga in sagas] == [{"n": n} for n in range(100)]
    assert runtime.streams == 1
    assert "WaitSaga" not in names(runtime.asked)


async def test_a_start_that_waits_is_told_how_its_saga_stands_when_the_wait_is_over(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It is started, whatever comes; a last look says the rest."""

    async def hear_only(talk: Talk) -> None:
        while True:
            await talk.hear()

    running = types_pb2.Saga(saga_id="slow", state=types_pb2.SAGA_STATE_STUCK)
    runtime.converse("AwaitSagas", hear_only)
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=running))
    async with Company(runtime, client):
        started_saga = await client.start("order", saga_id="slow", wait_s=0.1)
    assert started_saga.saga.state is amends.SagaState.STUCK


async def test_a_start_that_waits_and_leaves_is_taken_off_the_stream(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """As any wait is."""
    heard, removed = anyio.Event(), anyio.Event()

    async def hear_only(talk: Talk) -> None:
        while True:
            message = await talk.hear()
            if "leaves" in message.add:
                heard.set()
            if "leaves" in message.remove:
                removed.set()

    runtime.converse("AwaitSagas", hear_only)
    async with Company(runtime, client):
        task = asyncio.create_task(client.start("order", saga_id="leaves", wait_s=60))
        await heard.wait()
        task.cancel()
        await asyncio.wait([task])
        await removed.wait()
    assert task.cancelled()


async def test_closing_tells_a_start_that_waits_that_it_has_started(
    runtime: ScriptedRuntime,
) -> None:
    """That much is certain."""
    heard = anyio.Event()

    async def hear_only(talk: Talk) -> None:
        while True:
            await talk.hear()
            heard.set()

    runtime.converse("AwaitSagas", hear_only)
    async with amends.Client(runtime.address, timeout_s=60) as client, Company(runtime, client):
        task = asyncio.create_task(client.start("order", saga_id="held", wait_s=60))
        await heard.wait()
    assert (await task).saga_id == "held"
    assert not (await task).saga.ended


async def test_the_end_of_a_saga_that_was_answered_in_short_is_asked_for(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """One that existed and has ended is answered without its steps; its result has them."""
    saga = types_pb2.Saga(
        saga_id="order-1", state=types_pb2.SAGA_STATE_COMPLETED, ended_at_ms=1_700_000_000_000
    )

    async def existed(request: Message) -> Message:
        answer = saga_pb2.StartSagaResponse(saga=saga, existed=True, ended=True)
        return saga_pb2.StartSagasResponse(results=[saga_pb2.StartSagasResult(started=answer)])

    runtime.answer("StartSagas", existed)
    whole = types_pb2.Saga()
    whole.CopyFrom(saga)
    whole.steps.add(name="reserve", state=types_pb2.STEP_STATE_EXECUTED)
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=whole, ended=True))
    async with Company(runtime, client):
        started_saga = await client.start("order", saga_id="order-1")
        assert started_saga.existed
        assert started_saga.saga.ended
        assert (await started_saga.result()).step("reserve").state is amends.StepState.EXECUTED


# -- each its own answer -------------------------------------------------------------------------


async def test_each_start_has_its_own_error(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """In the class that it would have alone; what is wrong with one is no other's business."""
    errors = {
        "unknown": an_error(Code.NOT_FOUND, "UNKNOWN_DEFINITION"),
        "taken": an_error(Code.ALREADY_EXISTS, "SAGA_EXISTS", saga_id="taken"),
        "bad state": an_error(Code.FAILED_PRECONDITION, "PARTICIPANT_NOT_REGISTERED"),
        "full": an_error(Code.RESOURCE_EXHAUSTED, "DISK"),
        "cursed": an_error(Code.INTERNAL, "INTERNAL", incident="7"),
        "strange": an_error(Code.OK, ""),
    }

    async def answer(request: Any) -> Message:
        return answers(request, errors)

    runtime.answer("StartSagas", answer)
    ids = [*errors, "good"]
    async with Company(runtime, client):
        came = await asyncio.gather(*(outcome(client.start("order", saga_id=i)) for i in ids))
    of = dict(zip(ids, came, strict=True))
    assert isinstance(of["good"], amends.StartedSaga)
    kinds = {
        "unknown": amends.NotFound,
        "taken": amends.AlreadyExists,
        "bad state": amends.WrongState,
        "full": amends.Overloaded,
    }
    for saga_id, kind in kinds.items():
        error = of[saga_id]
        assert type(error) is kind
        assert isinstance(error, amends.ApiError)
        assert (error.reason, error.in_doubt) == (errors[saga_id].reason, False)
        assert str(error) == errors[saga_id].message
        assert error.metadata == dict(errors[saga_id].metadata)
    for saga_id in ("cursed", "strange"):
        unknown = of[saga_id]
        assert isinstance(unknown, amends.StartUnknown)
        assert unknown.saga_id == saga_id
    assert len(batches(runtime)) == 1


async def test_what_is_malformed_is_told_in_full(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """In a batch its answer is one text; asked alone, it has every violation with its field."""
    bad = an_error(Code.INVALID_ARGUMENT, "INVALID_REQUEST")

    async def answer(request: Any) -> Message:
        return answers(request, {"b a d": bad})

    runtime.answer("StartSagas", answer)
    refusal = Refusal(
        Code.INVALID_ARGUMENT, "saga_id: bad", "INVALID", violations=(("saga_id", "bad"),)
    )
    async with Company(runtime, client):
        runtime.answer("StartSaga", refusal)
        bad_one, good_one = await asyncio.gather(
            outcome(client.start("order", saga_id="b a d")), outcome(client.start("order"))
        )
    assert isinstance(bad_one, amends.InvalidRequest)
    assert bad_one.violations == (amends.Violation("saga_id", "bad"),)
    assert isinstance(good_one, amends.StartedSaga)


async def test_what_is_malformed_is_told_even_if_nobody_answers_any_more(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The runtime has refused it: that is the answer, whatever comes of asking again."""

    async def answer(request: Any) -> Message:
        return answers(request, {"bad": an_error(Code.INVALID_ARGUMENT, "INVALID_REQUEST")})

    runtime.answer("StartSagas", answer)
    async with Company(runtime, client):
        runtime.answer("StartSaga", Refusal(Code.INTERNAL))
        with pytest.raises(amends.InvalidRequest, match="INVALID_REQUEST, as it is") as caught:
            await client.start("order", saga_id="bad")
    assert not caught.value.in_doubt


# -- asking again --------------------------------------------------------------------------------


async def test_a_start_that_is_refused_for_a_while_is_asked_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """By itself, together with those that were refused with it, and held up by nobody else's."""
    refused = {
        saga_id: an_error(Code.RESOURCE_EXHAUSTED, "COMMIT_QUEUE", retry_after_ms="1")
        for saga_id in ("a", "b")
    }

    async def once(request: Any) -> Message:
        return answers(request, refused)

    runtime.answer("StartSagas", once, once, start_all)
    async with Company(runtime, client):
        sagas = await asyncio.gather(*(client.start("order", saga_id=i) for i in "abc"))
    assert [saga.saga_id for saga in sagas] == ["a", "b", "c"]
    assert batches(runtime) == [["a", "b", "c"], ["a", "b"], ["a", "b"]]


async def test_requests_become_as_large_as_what_is_taken(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """What a full runtime would refuse stays here; all are started in the end, each once."""
    full = an_error(Code.RESOURCE_EXHAUSTED, "COMMIT_QUEUE", retry_after_ms="1")
    taken: list[str] = []

    async def ten(request: Any) -> Message:
        ids = [start.saga_id for start in request.starts]
        taken.extend(ids[:10])
        return answers(request, dict.fromkeys(ids[10:], full))

    runtime.answer("StartSagas", ten)
    ids = [f"order-{n}" for n in range(200)]
    async with Company(runtime, client):
        await asyncio.gather(*(client.start("order", saga_id=i) for i in ids))
    first, *later = (len(batch) for batch in batches(runtime))
    assert first == 200
    assert max(later) == int(10 * room.ROOM_GROWS)
    assert sorted(taken) == sorted(ids)


async def test_requests_grow_again_when_all_is_taken(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """One refusal of many starts is not for ever."""
    full = an_error(Code.RESOURCE_EXHAUSTED, "COMMIT_QUEUE", retry_after_ms="1")

    async def refuse(request: Any) -> Message:
        return answers(request, {start.saga_id: full for start in request.starts})

    runtime.answer("StartSagas", refuse, start_all)
    async with Company(runtime, client):
        await asyncio.gather(*(client.start("order", saga_id=f"order-{n}") for n in range(500)))
    sizes = [len(batch) for batch in batches(runtime)]
    assert sizes[:5] == [500, 8, 10, 12, 15]
    assert sizes[-2] > 60
    assert sum(sizes) == 1000


async def test_full_requests_go_beside_others(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nobody waits for an answer where another whole request could be on its way."""
    came: list[object] = []
    all_came = anyio.Event()

    async def together(request: Any) -> Message:
        came.append(request)
        if len(came) == room.MAX_REQUESTS:
            all_came.set()
        await all_came.wait()
        return await start_all(request)

    runtime.answer("StartSagas", together)
    async with Company(runtime, client):
        count = room.MAX_REQUESTS * room.MAX_STARTS
        await asyncio.gather(*(client.start("order", saga_id=f"order-{n}") for n in range(count)))
    assert [len(batch) for batch in batches(runtime)] == [room.MAX_STARTS] * room.MAX_REQUESTS


async def test_more_starts_than_may_wait_are_refused_at_once(runtime: ScriptedRuntime) -> None:
    """Nothing of them has left, and those that wait are started."""
    gate = Gate()
    runtime.answer("StartSagas", gate, start_all)
    async with (
        amends.Client(runtime.address, timeout_s=60, max_waiting_starts=3) as client,
        Company(runtime, client),
    ):
        first = asyncio.create_task(client.start("order", saga_id="first"))
        await gate.came.wait()
        waiting = [asyncio.create_task(client.start("order", saga_id=i)) for i in "abc"]
        await anyio.lowlevel.checkpoint()
        with pytest.raises(amends.Overloaded, match="max_waiting_starts") as caught:
            await client.start("order", saga_id="d")
        assert caught.value.reason == "TOO_MANY_WAITING_STARTS"
        assert not caught.value.in_doubt
        gate.let_go.set()
        await asyncio.gather(first, *waiting)
    assert batches(runtime) == [["first"], ["a", "b", "c"]]


async def test_who_has_waited_for_half_of_its_time_lets_others_go_first(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """With more starts than can be sent, those that are sent have time for their answers."""
    assert client._open is not None
    starts = client._open.starts
    request = saga_pb2.StartSagaRequest(saga_id="late", definition="order")
    late = starting._Start(request, 60, runtime.address, hold_s=0.0)
    late.late_at = 0.0
    async with Company(runtime, client):
        starts._waiting[late] = None
        await client.start("order", saga_id="a")
        await late.answer
    assert batches(runtime) == [["a", "late"]]


async def test_who_has_no_time_for_an_answer_is_not_sent(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It is certain that it did not happen; sent, it would be in doubt."""
    assert client._open is not None
    starts = client._open.starts
    request = saga_pb2.StartSagaRequest(saga_id="late", definition="order")
    late = starting._Start(request, 60, runtime.address, hold_s=0.0)
    late.late_at = 0.0
    starts._took_s = 100.0
    async with Company(runtime, client):
        starts._waiting[late] = None
        await client.start("order", saga_id="a")
        with pytest.raises(amends.Unavailable) as caught:
            await late.answer
    assert caught.value.reason == "NOT_SENT"
    assert not caught.value.in_doubt
    assert batches(runtime) == [["a"]]


async def test_a_start_that_is_refused_for_too_long_is_told_at_once(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """When the time to wait is longer than its own."""
    full = an_error(Code.RESOURCE_EXHAUSTED, "COMMIT_QUEUE", retry_after_ms="3600000")

    async def answer(request: Any) -> Message:
        return answers(request, {"order-1": full})

    runtime.answer("StartSagas", answer)
    async with Company(runtime, client):
        with pytest.raises(amends.Overloaded) as caught:
            await client.start("order", saga_id="order-1")
    assert caught.value.retry_after_s == 3600
    assert not caught.value.in_doubt


async def test_a_request_that_nobody_could_answer_is_asked_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """As it was: the same ids, so that nothing happens twice; nobody notices."""
    runtime.answer("StartSagas", UNAVAILABLE, Refusal(Code.CANCELLED), start_all)
    async with Company(runtime, client):
        await asyncio.gather(*(client.start("order", {"n": n}) for n in range(3)))
    first, second, third = runtime.requests(saga_pb2.StartSagasRequest)
    assert first == second == third


async def test_starts_outlive_a_runtime_that_dies_with_them(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The request arrived, the runtime dies, another comes up: it is asked for the same sagas.

    And those that gathered meanwhile leave with them.
    """
    gate = Gate()
    runtime.answer("StartSagas", gate, start_all)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.start("order", saga_id="alone"))
        tasks.create_task(client.start("order", saga_id="sent"))
        await gate.came.wait()
        tasks.create_task(client.start("order", saga_id="gathered"))
        await runtime.die()
        await runtime.start()
    assert batches(runtime) == [["sent"], ["sent", "gathered"]]


async def test_an_error_that_does_not_pass_is_told_to_those_in_the_request(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nobody knows of them; those that were still gathering are asked for all the same."""
    gate = Gate(too_few)
    runtime.answer("StartSagas", gate, start_all)
    async with Company(runtime, client), asyncio.TaskGroup() as tasks:
        sent = [tasks.create_task(outcome(client.start("order"))) for _ in range(2)]
        await gate.came.wait()
        gathered = tasks.create_task(outcome(client.start("order")))
        gate.let_go.set()
    for task in sent:
        assert isinstance(task.result(), amends.StartUnknown)
    assert sent[0].result() is not sent[1].result()
    assert isinstance(gathered.result(), amends.StartedSaga)


async def too_few(request: saga_pb2.StartSagasRequest) -> Message:
    """Answer fewer starts than were asked for, as no runtime does."""
    return saga_pb2.StartSagasResponse(results=[saga_pb2.StartSagasResult()])


# -- time, and leaving ---------------------------------------------------------------------------


async def test_each_start_has_its_own_time(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Sent: nobody knows. Not sent: certainly not. And the request goes on for who has time."""
    gate = Gate()
    runtime.answer("StartSagas", gate, start_all)
    async with Company(runtime, client), asyncio.TaskGroup() as tasks:
        patient = tasks.create_task(client.start("order", saga_id="patient"))
        sent = tasks.create_task(outcome(client.start("order", saga_id="sent", timeout_s=0.5)))
        await gate.came.wait()
        unsent = tasks.create_task(outcome(client.start("order", saga_id="unsent", timeout_s=0.01)))
        unknown, certain = await sent, await unsent
        gate.let_go.set()
    assert isinstance(unknown, amends.StartUnknown)
    assert unknown.saga_id == "sent"
    assert isinstance(unknown.__cause__, amends.DeadlineExceeded)
    assert isinstance(certain, amends.Unavailable)
    assert (certain.reason, certain.in_doubt) == ("NOT_SENT", False)
    assert patient.result().saga_id == "patient"
    assert batches(runtime) == [["patient", "sent"]]


async def test_a_start_that_leaves_takes_nobody_with_it(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """A cancelled one in a request does not cancel the request; one outside is never sent."""
    gate = Gate()
    runtime.answer("StartSagas", gate, start_all)
    async with Company(runtime, client), asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(client.start("order", saga_id="stays"))
        leaves = tasks.create_task(client.start("order", saga_id="leaves"))
        await gate.came.wait()
        gathers = [tasks.create_task(client.start("order", saga_id=f"g-{n}")) for n in range(2)]
        await anyio.wait_all_tasks_blocked()
        leaves.cancel()
        gathers[0].cancel()
        await asyncio.wait([leaves, gathers[0]])
        gate.let_go.set()
    assert stays.result().saga_id == "stays"
    assert leaves.cancelled()
    assert batches(runtime) == [["stays", "leaves"], ["g-1"]]


async def test_a_start_whose_time_is_over_holds_up_nobody(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Also in the moment before its caller has left: it is not sent, and not looked at for ever."""
    assert client._open is not None
    starts = client._open.starts
    async with Company(runtime, client):
        request = saga_pb2.StartSagaRequest(saga_id="over")
        over = starting._Start(request, 60, runtime.address, hold_s=0.0)
        over.answer.cancel()
        starts._waiting[over] = None
        starts._note_due()
        await client.start("order", saga_id="good")
    assert batches(runtime) == [["good"]]
    assert starts._waiting == {}


async def test_a_scope_recognises_its_own_cancellation(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """A start in company inside a cancelled scope ends there, and nothing leaks out."""
    gate = Gate()
    runtime.answer("StartSagas", gate)
    async with Company(runtime, client), anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:

            async def cancel_when_it_came() -> None:
                await gate.came.wait()
                scope.cancel()

            tasks.start_soon(cancel_when_it_came)
            await client.start("order")
        assert scope.cancelled_caught
        gate.let_go.set()


async def test_starts_that_never_left_are_not_unknown(runtime: ScriptedRuntime) -> None:
    """Nobody at the address: certainly not started, all of them, and why."""
    await runtime.die()
    async with amends.Client(runtime.address, timeout_s=0.3) as client:
        errors = await asyncio.gather(*(outcome(client.start("order")) for _ in range(5)))
    await runtime.start()
    for error in errors:
        assert isinstance(error, amends.Unavailable)
        assert "Connection refused" in str(error)
        assert not error.in_doubt
    assert len({id(error) for error in errors}) == 5


async def test_impatient_starts_are_told_at_once(runtime: ScriptedRuntime) -> None:
    """With `retry_unavailable=False` nothing is asked twice."""
    runtime.answer("StartSaga", UNAVAILABLE)
    runtime.answer("StartSagas", UNAVAILABLE)
    async with amends.Client(runtime.address, retry_unavailable=False) as client:
        errors = await asyncio.gather(*(outcome(client.start("order")) for _ in range(3)))
    assert [type(error) for error in errors] == [amends.StartUnknown] * 3
    assert sorted(names(runtime.asked)) == ["StartSaga", "StartSagas"]


async def test_closing_tells_everybody(runtime: ScriptedRuntime) -> None:
    """What was sent is unknown; what was not, certainly did not happen."""
    gate = Gate()
    alone = Gate(start_alone)
    runtime.answer("StartSaga", alone)
    runtime.answer("StartSagas", gate)
    async with asyncio.TaskGroup() as tasks, amends.Client(runtime.address) as client:
        company = tasks.create_task(outcome(client.start("order")))
        await alone.came.wait()
        sent = tasks.create_task(outcome(client.start("order")))
        await gate.came.wait()
        unsent = tasks.create_task(outcome(client.start("order")))
        await anyio.wait_all_tasks_blocked()
    for task in (company, sent):
        error = task.result()
        assert isinstance(error, amends.StartUnknown)
        assert isinstance(error.__cause__, amends.Unavailable)
        assert error.__cause__.reason == "CLIENT_CLOSED"
    error = unsent.result()
    assert isinstance(error, amends.Unavailable)
    assert (error.reason, error.in_doubt) == ("CLIENT_CLOSED", False)


async def test_a_client_may_be_closed_by_another_task(runtime: ScriptedRuntime) -> None:
    """As frameworks do that open in one place and close in another."""
    client = amends.Client(runtime.address)
    await asyncio.create_task(client.__aenter__())
    await asyncio.gather(*(client.start("order") for _ in range(3)))
    await asyncio.create_task(client.__aexit__(None, None, None))
    with pytest.raises(RuntimeError, match="async with"):
        await client.start("order")


async def test_a_bug_in_the_client_is_told_to_everybody(
    runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for a task that has ended; and closing raises what it ended with."""

    def buggy(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(starting.Starts, "_take", buggy)
    client = amends.Client(runtime.address, timeout_s=60)
    await client.__aenter__()
    alone, together = await asyncio.gather(*(outcome(client.start("order")) for _ in range(2)))
    assert isinstance(alone, amends.StartedSaga)
    assert isinstance(together, RuntimeError)
    assert "oops" in str(together)
    with pytest.raises(RuntimeError, match="oops"):
        await client.wait("order-1")
    with pytest.RaisesGroup(ZeroDivisionError):
        await client.__aexit__(None, None, None)
