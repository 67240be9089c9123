"""The client when the runtime refuses, is silent, dies and comes back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import grpc
import pytest
from google.protobuf.message import Message

import amends
from amends.v1 import operator_pb2, saga_pb2, types_pb2
from tests.participants.scripted_runtime import (
    Refusal,
    ScriptedRuntime,
    names,
    scripted_runtime,
)

Code = grpc.StatusCode
UNAVAILABLE = Refusal(Code.UNAVAILABLE, "starting")


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a server that answers as the test says."""
    async with scripted_runtime() as running:
        yield running


@pytest.fixture
async def client(runtime: ScriptedRuntime) -> AsyncIterator[amends.Client]:
    """Give a client of it that is patient: no test waits for its time to be over."""
    async with amends.Client(runtime.address, timeout_s=60) as open_client:
        yield open_client


def free_address() -> str:
    """Give an address of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def a_saga(saga_id: str = "order-1", **changes: object) -> types_pb2.Saga:
    """Make a saga of the contract."""
    fields: dict[str, object] = {
        "saga_id": saga_id,
        "definition": "order",
        "state": types_pb2.SAGA_STATE_RUNNING,
        "version": 1,
        **changes,
    }
    return types_pb2.Saga(**fields)  # type: ignore[arg-type]


def an_ended_saga(saga_id: str = "order-1") -> types_pb2.Saga:
    """Make a completed saga of the contract."""
    return a_saga(
        saga_id,
        state=types_pb2.SAGA_STATE_COMPLETED,
        ended_at_ms=1_700_000_000_000,
        steps=[types_pb2.StepStatus(name="reserve", state=types_pb2.STEP_STATE_EXECUTED)],
    )


class Silence:
    """An answer that does not come; `came` is set when it was asked for."""

    def __init__(self) -> None:
        self.came = anyio.Event()

    async def __call__(self, request: Message) -> Message:
        self.came.set()
        await anyio.sleep_forever()
        raise AssertionError("it sleeps for ever")


# -- what an error becomes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "in_doubt"),
    [
        (Code.INVALID_ARGUMENT, amends.InvalidRequest, False),
        (Code.NOT_FOUND, amends.NotFound, False),
        (Code.ALREADY_EXISTS, amends.AlreadyExists, False),
        (Code.FAILED_PRECONDITION, amends.WrongState, False),
        (Code.RESOURCE_EXHAUSTED, amends.Overloaded, False),
        (Code.UNIMPLEMENTED, amends.ApiError, False),
        (Code.UNAUTHENTICATED, amends.ApiError, False),
        (Code.PERMISSION_DENIED, amends.ApiError, False),
        (Code.DEADLINE_EXCEEDED, amends.DeadlineExceeded, True),
        (Code.INTERNAL, amends.ApiError, True),
        (Code.UNKNOWN, amends.ApiError, True),
        (Code.ABORTED, amends.ApiError, True),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else "",
)
async def test_an_error_of_the_runtime_becomes_its_exception(
    runtime: ScriptedRuntime,
    client: amends.Client,
    code: grpc.StatusCode,
    kind: type[amends.ApiError],
    *,
    in_doubt: bool,
) -> None:
    """With the runtime's reason, message and metadata; and whether anything may have happened."""
    runtime.answer(
        "GetSaga", Refusal(code, "because", "SOME_REASON", metadata=(("saga_id", "order-1"),))
    )
    with pytest.raises(amends.ApiError, match="because") as caught:
        await client.get("order-1")
    error = caught.value
    assert type(error) is kind
    assert (error.reason, error.code) == ("SOME_REASON", code)
    assert error.metadata == {"saga_id": "order-1"}
    assert error.in_doubt is in_doubt
    assert error.message == str(error)


async def test_every_violation_is_told(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """One line each, with the field; and how many more there are than fitted."""
    runtime.answer(
        "RegisterDefinition",
        Refusal(
            Code.INVALID_ARGUMENT,
            "steps[0].name: bad; and 2 more",
            "INVALID_DEFINITION",
            metadata=(("violations", "3"),),
            violations=(("steps[0].name", "bad"), ("steps[1].after", "there is no step 'x'")),
        ),
    )
    with pytest.raises(amends.InvalidRequest) as caught:
        await client.register(amends.Definition("order").step("reserve", "inventory", "reserve"))
    assert caught.value.violations == (
        amends.Violation("steps[0].name", "bad"),
        amends.Violation("steps[1].after", "there is no step 'x'"),
    )
    assert str(caught.value).splitlines() == [
        "the runtime refused the request:",
        "  steps[0].name: bad",
        "  steps[1].after: there is no step 'x'",
        "  and 1 more",
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(Refusal(Code.NOT_FOUND, "no saga", "X", domain="elsewhere"), id="foreign"),
        pytest.param(Refusal(Code.NOT_FOUND, "no saga", raw_details=b"\xff\xff"), id="garbage"),
        pytest.param(Refusal(Code.NOT_FOUND, "no saga"), id="none"),
    ],
)
async def test_details_that_are_not_ours_are_left_alone(
    runtime: ScriptedRuntime, client: amends.Client, refusal: Refusal
) -> None:
    """The status still counts; but only the runtime itself can say that nothing happened."""
    runtime.answer("GetSaga", refusal)
    with pytest.raises(amends.NotFound, match="no saga") as caught:
        await client.get("order-1")
    assert caught.value.reason == "NOT_FOUND"
    assert caught.value.metadata == {}
    assert caught.value.in_doubt


async def test_a_server_that_is_no_runtime_is_named(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Somebody else's server answers UNIMPLEMENTED: the message says where, and asks what it is."""
    with pytest.raises(amends.ApiError, match="is it an amends runtime") as caught:
        await client.get("order-1")
    assert runtime.address in str(caught.value)
    assert caught.value.code is Code.UNIMPLEMENTED


async def test_nobody_at_the_address() -> None:
    """The message names the address, the refused connection and the command that starts one."""
    address = free_address()
    async with amends.Client(address, retry_unavailable=False) as client:
        with pytest.raises(amends.Unavailable, match="Connection refused") as caught:
            await client.get("order-1")
    assert address in str(caught.value)
    assert "amends serve" in str(caught.value)
    assert not caught.value.in_doubt


async def test_an_answer_that_does_not_come(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """When the call's time is over it ends with `DeadlineExceeded`, which names the runtime."""
    runtime.answer("GetSaga", a_saga_reply(), Silence())
    await client.get("order-1")
    with pytest.raises(amends.DeadlineExceeded, match=runtime.address):
        await client.get("order-1", timeout_s=0.1)


def a_page(*saga_ids: str, then: str = "") -> saga_pb2.ListSagasResponse:
    """Make a page of sagas, and the token of the next."""
    return saga_pb2.ListSagasResponse(sagas=map(a_saga, saga_ids), next_page_token=then)


def a_saga_reply() -> saga_pb2.GetSagaResponse:
    """Make the reply of GetSaga."""
    return saga_pb2.GetSagaResponse(saga=a_saga())


# -- asking again --------------------------------------------------------------------------------


async def test_an_unavailable_runtime_is_asked_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Until it answers; the caller notices nothing."""
    runtime.answer("GetSaga", UNAVAILABLE, Refusal(Code.CANCELLED), UNAVAILABLE, a_saga_reply())
    assert (await client.get("order-1")).saga_id == "order-1"
    assert names(runtime.asked) == ["GetSaga"] * 4


async def test_an_overloaded_runtime_is_asked_again_when_it_says_when(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """With RetryInfo the call is asked again after that time."""
    overloaded = Refusal(Code.RESOURCE_EXHAUSTED, "full", "COMMIT_QUEUE", retry_after_ms=1)
    runtime.answer("GetSaga", overloaded, overloaded, a_saga_reply())
    await client.get("order-1")
    assert names(runtime.asked) == ["GetSaga"] * 3


@pytest.mark.parametrize("retry_after_ms", [None, 3_600_000])
async def test_an_overload_that_does_not_pass_in_time_is_raised(
    runtime: ScriptedRuntime, client: amends.Client, retry_after_ms: int | None
) -> None:
    """Without RetryInfo, or when the time to wait is longer than the call's: at once."""
    runtime.answer(
        "GetSaga",
        Refusal(Code.RESOURCE_EXHAUSTED, "full", "DISK", retry_after_ms=retry_after_ms),
    )
    with pytest.raises(amends.Overloaded, match="full") as caught:
        await client.get("order-1")
    assert caught.value.retry_after_s == (retry_after_ms and retry_after_ms / 1000)
    assert names(runtime.asked) == ["GetSaga"]


async def test_an_impatient_client_is_told_at_once(runtime: ScriptedRuntime) -> None:
    """With `retry_unavailable=False` nothing is asked twice."""
    runtime.answer("GetSaga", UNAVAILABLE)
    async with amends.Client(runtime.address, retry_unavailable=False) as client:
        with pytest.raises(amends.Unavailable, match="starting"):
            await client.get("order-1")
    assert names(runtime.asked) == ["GetSaga"]


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.ABORTED, Code.NOT_FOUND])
async def test_other_errors_are_never_asked_again(
    runtime: ScriptedRuntime, client: amends.Client, code: grpc.StatusCode
) -> None:
    """What asking again does not mend is raised at once."""
    runtime.answer("GetSaga", Refusal(code), a_saga_reply())
    with pytest.raises(amends.ApiError):
        await client.get("order-1")
    assert names(runtime.asked) == ["GetSaga"]


# -- starting ------------------------------------------------------------------------------------


def started(request: saga_pb2.StartSagaRequest) -> saga_pb2.StartSagaResponse:
    """Make the reply to a start."""
    return saga_pb2.StartSagaResponse(saga=a_saga(request.saga_id))


async def start_answer(request: Message) -> Message:
    """Start whatever is asked for."""
    assert isinstance(request, saga_pb2.StartSagaRequest)
    return started(request)


async def test_a_start_says_what_was_asked_for(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Name, input as JSON, labels, deadline in milliseconds, version; and an id of our own."""
    runtime.answer("StartSaga", start_answer)
    handle = await client.start(
        "order",
        {"sku": "A"},
        labels={"shop": "north"},
        deadline_s=1.5,
        definition_hash="ab" * 32,
    )
    [request] = runtime.requests(saga_pb2.StartSagaRequest)
    assert request.saga_id == handle.saga_id
    assert len(request.saga_id) == 36
    assert request.definition == "order"
    assert request.definition_hash == "ab" * 32
    assert request.input.data == b'{"sku":"A"}'
    assert request.input.content_type == "application/json"
    assert dict(request.labels) == {"shop": "north"}
    assert request.deadline_ms == 1500
    assert request.wait_ms == 0


async def test_a_start_without_input_sends_none(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nothing is nothing, and not the JSON value null."""
    runtime.answer("StartSaga", start_answer)
    await client.start("order")
    assert runtime.requests(saga_pb2.StartSagaRequest)[0].input == types_pb2.Payload()


async def test_a_start_is_asked_again_under_the_same_id(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Whatever the first attempts came to, there is one id and one content."""
    runtime.answer(
        "StartSaga",
        UNAVAILABLE,
        Refusal(Code.RESOURCE_EXHAUSTED, "full", "COMMIT_QUEUE", retry_after_ms=1),
        start_answer,
    )
    handle = await client.start("order", {"sku": "A"})
    first, second, third = runtime.requests(saga_pb2.StartSagaRequest)
    assert first == second == third
    assert first.saga_id == handle.saga_id


async def test_a_start_outlives_a_runtime_that_dies_with_it(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The request arrived, the runtime dies, another comes up: it is asked for the same saga."""
    silence = Silence()
    runtime.answer("StartSaga", silence, start_answer)
    async with asyncio.TaskGroup() as tasks:
        start = tasks.create_task(client.start("order", saga_id="order-1"))
        await silence.came.wait()
        await runtime.die()
        await runtime.start()
    assert start.result().saga_id == "order-1"
    first, second = runtime.requests(saga_pb2.StartSagaRequest)
    assert first == second


async def test_a_start_whose_answer_was_lost_is_unknown(runtime: ScriptedRuntime) -> None:
    """The runtime died with the request and did not come back: the error has the id and says so."""
    silence = Silence()
    runtime.answer("StartSaga", silence)
    impatient = amends.Client(runtime.address, retry_unavailable=False)
    async with impatient as client, asyncio.TaskGroup() as tasks:
        start = tasks.create_task(failure_of_start(client))
        await silence.came.wait()
        await runtime.die()
    error = start.result()
    assert isinstance(error, amends.StartUnknown)
    assert error.saga_id == runtime.requests(saga_pb2.StartSagaRequest)[0].saga_id
    assert error.saga_id in str(error)
    assert "client.get" in str(error)
    assert isinstance(error.__cause__, amends.Unavailable)


async def failure_of_start(client: amends.Client) -> Exception:
    """Start, and give the error that must come of it."""
    with pytest.raises(amends.AmendsError) as caught:
        await client.start("order")
    return caught.value


async def test_a_start_that_never_left_is_not_unknown() -> None:
    """Nobody at the address: the saga was certainly not started, and the error says that."""
    async with amends.Client(free_address(), timeout_s=0.2) as client:
        with pytest.raises(amends.Unavailable) as caught:
            await client.start("order")
    assert not caught.value.in_doubt


async def test_a_start_that_never_left_does_not_wait_for_its_end() -> None:
    """`wait_s` is for a saga that was started; without one the call's own time counts."""
    async with amends.Client(free_address(), timeout_s=0.2) as client, asyncio.timeout(30):
        with pytest.raises(amends.Unavailable):
            await client.start("order", wait_s=60)


async def test_a_start_that_holds_its_answer_outlives_the_runtime(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The runtime dies while it holds the answer; the next one is asked for the same saga."""
    silence = Silence()
    ended = saga_pb2.StartSagaResponse(saga=an_ended_saga(), existed=True, ended=True)
    runtime.answer("StartSaga", silence, ended)
    async with asyncio.TaskGroup() as tasks:
        start = tasks.create_task(client.start("order", saga_id="order-1", wait_s=60))
        await silence.came.wait()
        await runtime.die()
        await runtime.start()
    assert start.result().saga.completed


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([Refusal(Code.INTERNAL)], id="a bug in the runtime"),
        pytest.param([Refusal(Code.INVALID_ARGUMENT)], id="a refusal that is not the runtime's"),
        pytest.param(
            [UNAVAILABLE, Refusal(Code.RESOURCE_EXHAUSTED, "full", "DISK")],
            id="a refusal after an attempt without answer",
        ),
    ],
)
async def test_a_start_that_may_have_happened_is_unknown(
    runtime: ScriptedRuntime, client: amends.Client, answers: list[Refusal]
) -> None:
    """Unless the runtime itself refused every attempt, nobody can say that nothing happened."""
    runtime.answer("StartSaga", *answers)
    with pytest.raises(amends.StartUnknown) as caught:
        await client.start("order", saga_id="order-1")
    assert caught.value.saga_id == "order-1"


async def test_a_refused_start_did_not_happen(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """A refusal by the runtime is raised as what it is."""
    runtime.answer("StartSaga", Refusal(Code.NOT_FOUND, "no definition", "UNKNOWN_DEFINITION"))
    with pytest.raises(amends.NotFound, match="no definition"):
        await client.start("order")


async def test_an_id_that_is_taken_is_taken(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Even after an attempt without answer: a saga of other content has this id."""
    runtime.answer("StartSaga", UNAVAILABLE, Refusal(Code.ALREADY_EXISTS, "taken", "SAGA_EXISTS"))
    with pytest.raises(amends.AlreadyExists, match="taken"):
        await client.start("order", saga_id="order-1")


async def test_a_start_can_hold_its_answer(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """`wait_s` is the runtime's to wait; the ended saga is in the answer."""
    runtime.answer("StartSaga", saga_pb2.StartSagaResponse(saga=an_ended_saga(), ended=True))
    handle = await client.start("order", saga_id="order-1", wait_s=5)
    assert handle.saga.completed
    assert 0 < runtime.requests(saga_pb2.StartSagaRequest)[0].wait_ms <= 5000
    assert names(runtime.asked) == ["StartSaga"]


async def test_a_start_can_wait_longer_than_the_runtime_holds_an_answer(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The start asks for no longer a wait than there is, and waits ask on."""
    runtime.answer("StartSaga", saga_pb2.StartSagaResponse(saga=a_saga()))
    runtime.answer(
        "WaitSaga",
        saga_pb2.WaitSagaResponse(saga=a_saga()),
        saga_pb2.WaitSagaResponse(saga=an_ended_saga(), ended=True),
    )
    handle = await client.start("order", saga_id="order-1", wait_s=3600)
    assert handle.saga.completed
    assert 0 < runtime.requests(saga_pb2.StartSagaRequest)[0].wait_ms <= 60_000
    waits = runtime.requests(saga_pb2.WaitSagaRequest)
    assert len(waits) == 2
    assert all(0 < wait.timeout_ms <= 60_000 for wait in waits)


async def test_a_started_saga_stays_started_when_the_wait_fails(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The start is done: trouble while waiting for the end is no failure of it."""
    runtime.answer("StartSaga", saga_pb2.StartSagaResponse(saga=a_saga()))
    runtime.answer("WaitSaga", Refusal(Code.INTERNAL))
    handle = await client.start("order", saga_id="order-1", wait_s=3600)
    assert handle.saga.state is amends.SagaState.RUNNING


# -- waiting -------------------------------------------------------------------------------------


async def test_a_wait_outlives_a_restart(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Without a time-out it goes on until the saga has ended, whoever answers."""
    silence = Silence()
    runtime.answer(
        "WaitSaga",
        saga_pb2.WaitSagaResponse(saga=a_saga()),
        silence,
        saga_pb2.WaitSagaResponse(saga=an_ended_saga(), ended=True),
    )
    async with asyncio.TaskGroup() as tasks:
        wait = tasks.create_task(client.handle("order-1").result())
        await silence.came.wait()
        await runtime.die()
        await runtime.start()
    assert wait.result().completed


async def test_a_wait_that_is_over_gives_the_saga_as_it_was_seen(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """No wait of zero goes out, which would mean the runtime's own minute."""
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=a_saga()))
    with pytest.raises(amends.WaitTimeout, match="order-1 has not ended") as caught:
        await client.wait("order-1", timeout_s=0)
    assert caught.value.saga.state is amends.SagaState.RUNNING
    assert {wait.timeout_ms for wait in runtime.requests(saga_pb2.WaitSagaRequest)} == {1}


async def test_a_wait_for_no_saga(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Refusals end a wait."""
    runtime.answer("WaitSaga", Refusal(Code.NOT_FOUND, "no saga", "UNKNOWN_SAGA"))
    with pytest.raises(amends.NotFound):
        await client.wait("order-1")


async def test_a_wait_that_nobody_answers() -> None:
    """A runtime that is not there all the time is reported as that."""
    async with amends.Client(free_address()) as client:
        with pytest.raises(amends.Unavailable):
            await client.wait("order-1", timeout_s=0.1)


async def test_a_wait_that_nobody_answers_any_more(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """When its time is over, what was seen last is in the error, and why there is no news."""
    runtime.answer("GetSaga", a_saga_reply())
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=a_saga()), UNAVAILABLE)
    await client.get("order-1")  # so that the wait's short time is not spent on connecting
    with pytest.raises(amends.WaitTimeout, match="starting") as caught:
        await client.wait("order-1", timeout_s=1)
    assert isinstance(caught.value.__cause__, amends.Unavailable)


# -- cancelling and closing ----------------------------------------------------------------------


async def test_a_scope_recognises_its_own_cancellation(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """A call inside a cancelled scope ends there, and the scope lets nothing out (grpc #43502)."""
    silence = Silence()
    runtime.answer("GetSaga", silence)
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:

            async def cancel_when_it_came() -> None:
                await silence.came.wait()
                scope.cancel()

            tasks.start_soon(cancel_when_it_came)
            await client.get("order-1")
        assert scope.cancelled_caught
    assert names(runtime.asked) == ["GetSaga"]


async def test_a_cancelled_task_is_cancelled(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """CancelledError is raised as it is, and the call is not asked again."""
    silence = Silence()
    runtime.answer("GetSaga", silence)
    task = asyncio.create_task(client.get("order-1"))
    await silence.came.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert names(runtime.asked) == ["GetSaga"]


async def test_closing_ends_what_is_under_way(runtime: ScriptedRuntime) -> None:
    """A call in another task gets an error, not a cancellation that nobody asked for."""
    silence = Silence()
    runtime.answer("StartSaga", silence)
    async with asyncio.TaskGroup() as tasks, amends.Client(runtime.address) as client:
        start = tasks.create_task(failure_of_start(client))
        await silence.came.wait()
    error = start.result()
    assert isinstance(error, amends.StartUnknown)
    assert isinstance(error.__cause__, amends.Unavailable)
    assert error.__cause__.reason == "CLIENT_CLOSED"


async def test_closing_ends_a_wait_for_ever(runtime: ScriptedRuntime) -> None:
    """Also one that would go on through any restart."""
    silence = Silence()
    runtime.answer("WaitSaga", silence)
    async with asyncio.TaskGroup() as tasks, amends.Client(runtime.address) as client:
        wait = tasks.create_task(unavailable_wait(client))
        await silence.came.wait()
    assert wait.result().reason == "CLIENT_CLOSED"


async def test_closing_ends_a_call_that_is_about_to_ask_again(runtime: ScriptedRuntime) -> None:
    """Whether it waits for its next attempt or is in one: it ends, and with the same words."""
    came = anyio.Event()

    async def not_yet(request: Message) -> Message:
        came.set()
        return saga_pb2.WaitSagaResponse(saga=a_saga())

    runtime.answer("WaitSaga", not_yet)
    async with asyncio.TaskGroup() as tasks, amends.Client(runtime.address) as client:
        wait = tasks.create_task(unavailable_wait(client))
        await came.wait()
    assert wait.result().reason == "CLIENT_CLOSED"


async def unavailable_wait(client: amends.Client) -> amends.ApiError:
    """Wait, and give the error that must come of it."""
    with pytest.raises(amends.Unavailable) as caught:
        await client.wait("order-1")
    return caught.value


async def test_a_client_must_be_open(runtime: ScriptedRuntime) -> None:
    """Before and after its block it says what is missing, and it can be opened again."""
    runtime.answer("GetSaga", a_saga_reply())
    client = amends.Client(runtime.address)
    with pytest.raises(RuntimeError, match="async with"):
        await client.get("order-1")
    for _ in range(2):
        async with client:
            await client.get("order-1")
            with pytest.raises(RuntimeError, match="open already"):
                await client.__aenter__()
    with pytest.raises(RuntimeError, match="async with"):
        await client.get("order-1")


async def test_what_is_no_request_is_refused_before_it_leaves(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Mistakes of the program are errors of the program."""
    with pytest.raises(ValueError, match="saga_id is empty"):
        await client.start("order", saga_id="")
    with pytest.raises(ValueError, match="deadline_s"):
        await client.start("order", deadline_s=0)
    with pytest.raises(ValueError, match="wait_s"):
        await client.start("order", wait_s=float("nan"))
    with pytest.raises(ValueError, match="timeout_s"):
        await client.wait("order-1", timeout_s=-1)
    with pytest.raises(amends.PayloadError):
        await client.start("order", {"when": object()})
    with pytest.raises(amends.InvalidDefinition):
        await client.register(amends.Definition("order").step("a", "p", "a", after=["b"]))
    assert runtime.asked == []


@pytest.mark.parametrize(
    "target",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:",
        ":7233",
        "127.0.0.1:0",
        "127.0.0.1:99999",
        "::1:7233",
        "http://127.0.0.1:7233",
        "127.0.0.1:7233/path",
        "two words:7233",
        "unix:",
    ],
)
def test_what_is_no_target_is_refused(target: str) -> None:
    """Rather than taken for something else: gRPC would make 443 of a port that is not given."""
    with pytest.raises(ValueError, match="host:port"):
        amends.Client(target)


@pytest.mark.parametrize(
    "target", ["127.0.0.1:7233", "amends.example:1", "[::1]:7233", "unix:/run/amends.sock"]
)
def test_targets_are_hosts_with_ports_and_sockets(target: str) -> None:
    """Nothing is connected before the client is opened."""
    assert amends.Client(target).target == target


# -- pages ---------------------------------------------------------------------------------------


async def test_a_list_asks_for_pages_as_they_are_needed(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """All pages with the same filter, each with the token of the one before; then it ends."""
    runtime.answer(
        "ListSagas",
        a_page("c", "b", then="two"),
        a_page(then="three"),
        a_page("a"),
    )
    found = [
        saga.saga_id
        async for saga in client.list(
            state=[amends.SagaState.RUNNING, amends.SagaState.STUCK],
            definition="order",
            labels={"shop": "north"},
            started_from_ms=5,
            started_before_ms=9,
        )
    ]
    assert found == ["c", "b", "a"]
    requests = runtime.requests(saga_pb2.ListSagasRequest)
    assert [request.page_token for request in requests] == ["", "two", "three"]
    for request in requests:
        assert request.filter == saga_pb2.SagaFilter(
            states=[types_pb2.SAGA_STATE_RUNNING, types_pb2.SAGA_STATE_STUCK],
            definition="order",
            labels={"shop": "north"},
            started_from_ms=5,
            started_before_ms=9,
        )


async def test_a_limited_list_asks_for_no_more(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """`limit` bounds the last page, and no page follows it; 0 asks for none."""
    runtime.answer(
        "ListSagas",
        a_page(*(f"order-{n}" for n in range(100)), then="two"),
        a_page("order-100", "order-101", then="three"),
    )
    assert len([saga async for saga in client.list(limit=102)]) == 102
    sizes = [request.page_size for request in runtime.requests(saga_pb2.ListSagasRequest)]
    assert sizes == [100, 2]
    assert [saga async for saga in client.list(limit=0)] == []
    assert len(runtime.asked) == 2


async def test_one_state_is_a_filter_too(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """By member or by its name; a word that is none is refused before it leaves."""
    runtime.answer("ListSagas", saga_pb2.ListSagasResponse())
    assert [saga async for saga in client.list(state=amends.SagaState.STUCK)] == []
    [request] = runtime.requests(saga_pb2.ListSagasRequest)
    assert list(request.filter.states) == [types_pb2.SAGA_STATE_STUCK]
    with pytest.raises(ValueError, match="STUKC"):
        [saga async for saga in client.list(state="STUKC")]  # type: ignore[arg-type]


async def test_a_history_is_read_to_its_end(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Page after page, oldest first."""
    runtime.answer(
        "GetHistory",
        saga_pb2.GetHistoryResponse(
            records=[types_pb2.Record(seq=1, saga_started=types_pb2.SagaStarted())],
            next_page_token="two",  # noqa: S106  # no password
        ),
        saga_pb2.GetHistoryResponse(
            records=[types_pb2.Record(seq=2, saga_ended=types_pb2.SagaEnded())]
        ),
    )
    records = [record async for record in client.history("order-1")]
    assert [(record.seq, record.kind) for record in records] == [
        (1, amends.RecordKind.SAGA_STARTED),
        (2, amends.RecordKind.SAGA_ENDED),
    ]
    tokens = [r.page_token for r in runtime.requests(saga_pb2.GetHistoryRequest)]
    assert tokens == ["", "two"]


async def test_many_calls_at_once_share_the_connection(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Any number of tasks may call."""
    runtime.answer("GetSaga", a_saga_reply())
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(client.get(f"order-{n}")) for n in range(50)]
    assert {call.result().saga_id for call in calls} == {"order-1"}
    assert len(runtime.asked) == 50


async def test_operators_answers_are_read(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Participants, breakers and the runtime itself, in plain Python types."""
    breaker = operator_pb2.Breaker(
        participant="payments",
        state=operator_pb2.BREAKER_STATE_OPEN,
        consecutive_failures=5,
        since_ms=10,
        next_probe_at_ms=20,
    )
    participant = operator_pb2.Participant(
        name="payments",
        address="127.0.0.1:7001",
        source=operator_pb2.PARTICIPANT_SOURCE_OPERATOR,
        breaker=breaker,
        calls_in_flight=1,
        calls_waiting=2,
        concurrency_limit=256,
        transport="unary",
        last_error="UNAVAILABLE",
    )
    runtime.answer("ListBreakers", operator_pb2.ListBreakersResponse(breakers=[breaker]))
    runtime.answer(
        "ListParticipants", operator_pb2.ListParticipantsResponse(participants=[participant])
    )
    runtime.answer(
        "GetRuntime", operator_pb2.GetRuntimeResponse(store_id="s", epoch=3, sagas={"STUCK": 1})
    )
    expected = amends.BreakerInfo(
        participant="payments",
        state=amends.BreakerState.OPEN,
        consecutive_failures=5,
        since_ms=10,
        next_probe_at_ms=20,
        held=False,
    )
    assert await client.breakers() == (expected,)
    assert await client.participants() == (
        amends.ParticipantInfo(
            name="payments",
            address="127.0.0.1:7001",
            by_operator=True,
            breaker=expected,
            calls_in_flight=1,
            calls_waiting=2,
            concurrency_limit=256,
            transport="unary",
            last_error="UNAVAILABLE",
        ),
    )
    assert (await client.runtime()).sagas == {"STUCK": 1}


# -- arguments that are none ---------------------------------------------------------------------


async def drained(sagas: AsyncIterator[object]) -> None:
    """Ask for all of them."""
    async for _ in sagas:
        pass


BAD_ARGUMENTS: dict[str, tuple[Callable[[Any], Awaitable[object]], type[Exception], str]] = {
    "deadline_s too long": (
        lambda c: c.start("order", deadline_s=1e30),
        ValueError,
        "deadline_s must be 0.001 to 315360000 seconds, not 1e+30",
    ),
    "deadline_s negative": (
        lambda c: c.start("order", deadline_s=-1),
        ValueError,
        "deadline_s must be 0.001 to 315360000 seconds, not -1",
    ),
    "deadline_s beyond floats": (
        lambda c: c.start("order", deadline_s=10**400),
        ValueError,
        "deadline_s must be 0.001 to 315360000 seconds",
    ),
    "deadline_s text": (
        lambda c: c.start("order", deadline_s="5"),
        TypeError,
        "deadline_s must be a number of seconds, not str",
    ),
    "wait_s": (
        lambda c: c.start("order", wait_s=1e30),
        ValueError,
        "wait_s must be 0.0 to 315360000 seconds",
    ),
    "timeout_s": (
        lambda c: c.get("order-1", timeout_s=float("nan")),
        ValueError,
        "timeout_s must be 0.001 to 315360000 seconds, not nan",
    ),
    "wait": (
        lambda c: c.wait("order-1", timeout_s=True),
        TypeError,
        "timeout_s must be a number of seconds, not bool",
    ),
    "definition": (lambda c: c.start(5), TypeError, "definition must be a str, not int"),
    "saga_id": (lambda c: c.start("order", saga_id=7), TypeError, "saga_id must be a str, not int"),
    "definition_hash": (
        lambda c: c.start("order", definition_hash=b"ab"),
        TypeError,
        "definition_hash must be a str, not bytes",
    ),
    "a label": (
        lambda c: c.start("order", labels={"a": 1}),
        TypeError,
        "labels['a'] must be a str, not int",
    ),
    "a label's name": (
        lambda c: c.start("order", labels={1: "a"}),
        TypeError,
        "a key of labels must be a str, not int",
    ),
    "labels": (
        lambda c: c.start("order", labels=["a"]),
        TypeError,
        "labels must be a mapping of str to str, not list",
    ),
    "half a character": (
        lambda c: c.start("order", saga_id="\ud800"),
        ValueError,
        "saga_id holds half a character, which cannot be sent",
    ),
    "get": (lambda c: c.get(5), TypeError, "saga_id must be a str, not int"),
    "handle": (lambda c: c.handle(5).get(), TypeError, "saga_id must be a str, not int"),
    "wait for": (lambda c: c.wait(None), TypeError, "saga_id must be a str, not NoneType"),
    "history": (lambda c: drained(c.history(5)), TypeError, "saga_id must be a str, not int"),
    "cancel": (
        lambda c: c.cancel("order-1", reason=5, author="desk"),
        TypeError,
        "reason must be a str, not int",
    ),
    "cancel's author": (
        lambda c: c.cancel("order-1", reason="r", author=None),
        TypeError,
        "author must be a str, not NoneType",
    ),
    "list": (
        lambda c: drained(c.list(started_from_ms=1.5)),
        TypeError,
        "started_from_ms must be an int, not float",
    ),
    "list too late": (
        lambda c: drained(c.list(started_before_ms=2**63)),
        ValueError,
        f"started_before_ms must be 0 to {2**63 - 1}",
    ),
    "list's limit": (
        lambda c: drained(c.list(limit="5")),
        TypeError,
        "limit must be an int, not str",
    ),
    "list's labels": (
        lambda c: drained(c.list(labels={"a": 1})),
        TypeError,
        "labels['a'] must be a str, not int",
    ),
    "register": (
        lambda c: c.register("order"),
        TypeError,
        'must be an amends.Definition, not str: build one with amends.Definition("name").step(…)',
    ),
    "diff": (
        lambda c: c.diff({}),
        TypeError,
        "definition must be an amends.Definition, not dict",
    ),
    "definition by name": (lambda c: c.definition(5), TypeError, "name must be a str, not int"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
async def test_a_bad_argument_is_named_before_anything_is_sent(
    runtime: ScriptedRuntime, client: amends.Client, name: str
) -> None:
    """The field, and what it must be: a TypeError for the type, a ValueError for the range."""
    call, kind, message = BAD_ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        await call(client)
    assert message in str(caught.value)
    assert runtime.asked == []


def test_a_target_that_is_no_text_is_named() -> None:
    """As the others are."""
    with pytest.raises(TypeError, match="target must be a str, not int"):
        amends.Client(7233)  # type: ignore[arg-type]


async def test_a_diff_is_read_whole(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """The runtime's three answers, in plain Python types."""
    definition = amends.Definition("order").step("reserve", "inventory", "reserve")
    runtime.answer(
        "DiffDefinition",
        operator_pb2.DiffDefinitionResponse(
            differences=["step 'reserve': timeout_ms 5 -> 6"],
            violations=[
                types_pb2.Error(
                    reason="INVALID_DEFINITION",
                    message="there is no participant 'inventory'",
                    metadata={"field": "definition.steps[0].participant"},
                ),
                types_pb2.Error(message="too large"),
            ],
        ),
    )
    assert await client.diff(definition) == amends.DefinitionDiff(
        same=False,
        differences=("step 'reserve': timeout_ms 5 -> 6",),
        violations=(
            amends.Violation(
                "definition.steps[0].participant", "there is no participant 'inventory'"
            ),
            amends.Violation("", "too large"),
        ),
    )
    [request] = runtime.requests(operator_pb2.DiffDefinitionRequest)
    assert request.definition == definition.to_proto()


# -- whose client it is --------------------------------------------------------------------------


async def first(stream: AsyncIterator[object]) -> object:
    """Give what a stream gives first."""
    return await anext(stream)


@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.start("order"),
        lambda client: client.get("order-1"),
        lambda client: client.wait("order-1"),
        lambda client: first(client.list()),
        lambda client: first(client.watch()),
        lambda client: client.__aexit__(None, None, None),
    ],
    ids=["start", "get", "wait", "list", "watch", "close"],
)
async def test_a_client_belongs_to_one_event_loop(
    runtime: ScriptedRuntime,
    client: amends.Client,
    use: Callable[[amends.Client], Awaitable[object]],
) -> None:
    """In another one each use says so at once; in its own it goes on."""

    async def in_another_loop() -> None:
        with pytest.raises(RuntimeError, match="this client belongs to another event loop"):
            await use(client)

    await asyncio.to_thread(asyncio.run, in_another_loop())
    runtime.answer("GetSaga", saga_pb2.GetSagaResponse(saga=a_saga()))
    assert (await client.get("order-1")).saga_id == "order-1"
