"""Waits of many tasks at once: they share a stream, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest

import amends
from amends import awaiting
from amends.v1 import saga_pb2, types_pb2
from tests.participants.scripted_runtime import (
    Conversation,
    Hangup,
    Left,
    Refusal,
    ScriptedRuntime,
    Talk,
    scripted_runtime,
)

Code = grpc.StatusCode
UNAVAILABLE = Refusal(Code.UNAVAILABLE, "stopping")


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


def a_saga(saga_id: str) -> types_pb2.Saga:
    """Make a saga that runs."""
    return types_pb2.Saga(saga_id=saga_id, state=types_pb2.SAGA_STATE_RUNNING)


def ended(saga_id: str) -> types_pb2.Saga:
    """Make a saga that has ended."""
    return types_pb2.Saga(
        saga_id=saga_id, state=types_pb2.SAGA_STATE_COMPLETED, ended_at_ms=1_700_000_000_000
    )


def ends(*saga_ids: str) -> saga_pb2.AwaitSagasResponse:
    """Make a message of ends."""
    return saga_pb2.AwaitSagasResponse(
        ends=[saga_pb2.SagaEnd(saga_id=saga_id, saga=ended(saga_id)) for saga_id in saga_ids]
    )


def refused(saga_id: str, code: grpc.StatusCode, reason: str) -> saga_pb2.AwaitSagasResponse:
    """Make a message that a saga cannot be waited for."""
    error = types_pb2.Error(code=code.value[0], reason=reason, message="no")
    if code is Code.RESOURCE_EXHAUSTED:
        error.metadata["retry_after_ms"] = "1"
    return saga_pb2.AwaitSagasResponse(ends=[saga_pb2.SagaEnd(saga_id=saga_id, error=error)])


async def end_all(talk: Talk) -> None:
    """Answer every id at once with its end."""
    while True:
        message = await talk.hear()
        await talk.say(ends(*message.add))


class Held:
    """A stream that answers nothing by itself; what is said on it can be waited for."""

    def __init__(self, then: Conversation | None = None) -> None:
        self.added: list[str] = []
        self.removed: list[str] = []
        self.let_go = anyio.Event()
        self._then = then
        self._news = anyio.Event()
        self.talk: Talk | None = None

    async def __call__(self, talk: Talk) -> None:
        self.talk = talk
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen, talk)
            await self.let_go.wait()
            tasks.cancel_scope.cancel()
        if self._then is not None:
            await self._then(talk)

    async def _listen(self, talk: Talk) -> None:
        with contextlib.suppress(Left):
            while True:
                message = await talk.hear()
                self.removed += message.remove
                self.added += message.add
                self._news.set()
        self._then = None
        self.let_go.set()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something to be said."""
        while not holds():
            self._news = anyio.Event()
            await self._news.wait()

    async def say(self, message: saga_pb2.AwaitSagasResponse) -> None:
        """Send a message."""
        assert self.talk is not None
        await self.talk.say(message)


async def hang_up(talk: Talk) -> None:
    """End the stream as a runtime that stops does."""
    raise Hangup(UNAVAILABLE)


def said(runtime: ScriptedRuntime) -> list[tuple[list[str], list[str]]]:
    """Give what was said on all streams, in order: ids to add, ids to remove."""
    messages = runtime.requests(saga_pb2.AwaitSagasRequest)
    return [(list(message.add), list(message.remove)) for message in messages]


# -- sharing -------------------------------------------------------------------------------------


async def test_a_thousand_waits_cost_a_few_messages(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """One stream, one message for all that begin together, and each its own end."""
    runtime.converse("AwaitSagas", end_all)
    ids = [f"order-{n}" for n in range(1000)]
    sagas = await asyncio.gather(*(client.wait(saga_id) for saga_id in ids))
    assert [saga.saga_id for saga in sagas] == ids
    assert all(saga.completed for saga in sagas)
    assert (runtime.streams, said(runtime)) == (1, [(ids, [])])


async def test_the_same_stream_serves_all_that_follows(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It stays open when nothing is waited for."""
    runtime.converse("AwaitSagas", end_all)
    for saga_id in ("a", "b", "a"):
        assert (await client.handle(saga_id).result()).saga_id == saga_id
    assert (runtime.streams, said(runtime)) == (1, [(["a"], []), (["b"], []), (["a"], [])])


async def test_an_id_is_said_once_however_many_wait_for_it(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """All get its one end."""
    runtime.converse("AwaitSagas", end_all)
    sagas = await asyncio.gather(*(client.wait("order-1") for _ in range(10)))
    assert [saga.saga_id for saga in sagas] == ["order-1"] * 10
    assert said(runtime) == [(["order-1"], [])]


async def test_a_full_stream_is_no_limit_of_the_caller(
    runtime: ScriptedRuntime, client: amends.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further one is opened; ids that end make room again."""
    monkeypatch.setattr(awaiting, "MAX_AWAITED", 2)
    held = [Held(), Held(), Held()]
    runtime.converse("AwaitSagas", *held)
    async with asyncio.TaskGroup() as tasks:
        for n in range(5):
            tasks.create_task(client.wait(f"order-{n}"))
        for one in held:
            await one.wait_until(lambda one=one: bool(one.added))  # type: ignore[misc]
        assert sorted(len(one.added) for one in held) == [1, 2, 2]
        for one in held:
            await one.say(ends(*one.added))
    assert runtime.streams == 3


async def test_ids_beyond_one_message_follow_in_the_next(
    runtime: ScriptedRuntime, client: amends.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages have a limit, too."""
    monkeypatch.setattr(awaiting, "MAX_SAID", 2)
    runtime.converse("AwaitSagas", end_all)
    await asyncio.gather(*(client.wait(saga_id) for saga_id in "abcde"))
    assert said(runtime) == [(["a", "b"], []), (["c", "d"], []), (["e"], [])]


# -- leaving -------------------------------------------------------------------------------------


async def test_a_wait_that_leaves_takes_only_itself_along(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """The id is forgotten when the last one who waits for it has left."""
    held = Held()
    runtime.converse("AwaitSagas", held)
    async with asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(client.wait("shared"))
        leaves = [tasks.create_task(client.wait(saga_id)) for saga_id in ("shared", "own")]
        await held.wait_until(lambda: len(held.added) == 2)
        for task in leaves:
            task.cancel()
        await held.wait_until(lambda: bool(held.removed))
        assert held.removed == ["own"]
        await held.say(ends("shared", "own", "never asked for"))
    assert stays.result().saga_id == "shared"


async def test_a_wait_that_left_can_begin_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Forgotten and added anew, also in one message, in this order."""
    held = Held()
    runtime.converse("AwaitSagas", held)
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.wait("order-1"))
        await held.wait_until(lambda: bool(held.added))
        first.cancel()
        await asyncio.wait([first])
        again = tasks.create_task(client.wait("order-1"))
        await held.wait_until(lambda: len(held.added) == 2)
        await held.say(ends("order-1"))
    assert again.result().completed
    assert held.removed == ["order-1"]


async def test_a_scope_recognises_its_own_cancellation(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """A wait inside a cancelled scope ends there, the stream goes on, and nothing leaks out."""
    held = Held()
    runtime.converse("AwaitSagas", held)
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:

            async def cancel_when_it_came() -> None:
                await held.wait_until(lambda: bool(held.added))
                scope.cancel()

            tasks.start_soon(cancel_when_it_came)
            await client.wait("order-1")
        assert scope.cancelled_caught
        await held.wait_until(lambda: held.removed == ["order-1"])
    assert runtime.streams == 1


async def test_a_wait_that_is_over_shows_the_saga_as_it_stands(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """By one last look; the others, and the stream, go on."""
    held = Held()
    runtime.converse("AwaitSagas", held)
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=a_saga("hasty")))
    async with asyncio.TaskGroup() as tasks:
        patient = tasks.create_task(client.wait("patient"))
        with pytest.raises(amends.WaitTimeout, match="hasty has not ended") as caught:
            await client.wait("hasty", timeout_s=0.2)
        await held.wait_until(lambda: "patient" in held.added)
        await held.say(ends("patient"))
    assert caught.value.saga.state is amends.SagaState.RUNNING
    assert patient.result().completed
    assert len(runtime.requests(saga_pb2.WaitSagaRequest)) == 1


async def test_a_wait_that_ends_in_its_last_moment_has_ended(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """What the last look finds counts."""
    runtime.converse("AwaitSagas", Held())
    runtime.answer("WaitSaga", saga_pb2.WaitSagaResponse(saga=ended("order-1"), ended=True))
    assert (await client.wait("order-1", timeout_s=0.05)).completed


async def test_waits_that_are_over_together_all_have_their_last_look(
    runtime: ScriptedRuntime, client: amends.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few at a time; who does not get a turn in time is told that the saga goes on."""
    looking = 0
    most = 0
    blocked = anyio.Event()

    async def look(request: saga_pb2.WaitSagaRequest) -> saga_pb2.WaitSagaResponse:
        nonlocal looking, most
        looking += 1
        most = max(most, looking)
        await anyio.lowlevel.checkpoint()
        looking -= 1
        return saga_pb2.WaitSagaResponse(saga=a_saga(request.saga_id))

    async def outcome(saga_id: str, timeout_s: float) -> amends.AmendsError:
        with pytest.raises(amends.AmendsError) as caught:
            await client.wait(saga_id, timeout_s=timeout_s)
        return caught.value

    runtime.converse("AwaitSagas", Held())
    runtime.answer("WaitSaga", look)
    errors = await asyncio.gather(*(outcome(f"order-{n}", 0.1) for n in range(500)))
    assert [type(error) for error in errors] == [amends.WaitTimeout] * 500
    assert most <= awaiting.LAST_LOOKS

    async def never(request: Any) -> saga_pb2.WaitSagaResponse:
        await blocked.wait()
        return saga_pb2.WaitSagaResponse(saga=a_saga("x"))

    runtime.answer("WaitSaga", never)
    monkeypatch.setattr(awaiting, "TURN_S", 0.01)
    monkeypatch.setattr(awaiting, "REPLY_GRACE_S", 0.2)
    errors = await asyncio.gather(*(outcome(f"order-{n}", 0) for n in range(101)))
    blocked.set()
    assert [type(error) for error in errors] == [amends.DeadlineExceeded] * 101
    reasons = [error.reason for error in errors if isinstance(error, amends.ApiError)]
    assert reasons.count("NO_LAST_LOOK") == 1


# -- breaking and asking again -------------------------------------------------------------------


async def test_a_stream_that_breaks_is_opened_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """It is told all ids that are still waited for, and no others."""
    first, second = Held(hang_up), Held()
    runtime.converse("AwaitSagas", first, second)
    async with asyncio.TaskGroup() as tasks:
        waits = [tasks.create_task(client.wait(saga_id)) for saga_id in "abcd"]
        await first.wait_until(lambda: len(first.added) == 4)
        await first.say(ends("a"))
        await waits[0]
        waits[1].cancel()
        await first.wait_until(lambda: bool(first.removed))
        first.let_go.set()
        await second.wait_until(lambda: len(second.added) == 2)
        assert (second.added, second.removed) == (["c", "d"], [])
        await second.say(ends("c", "d"))
    assert [wait.result().saga_id for wait in waits if not wait.cancelled()] == ["a", "c", "d"]


@pytest.mark.parametrize("leave", ["dies", "says goodbye"])
async def test_waits_outlive_a_restart(
    runtime: ScriptedRuntime, client: amends.Client, leave: str
) -> None:
    """Killed, or with a stream that is ended in good order: the waits notice nothing."""
    first = Held()
    runtime.converse("AwaitSagas", first, end_all)
    async with asyncio.TaskGroup() as tasks:
        wait = tasks.create_task(client.wait("order-1"))
        await first.wait_until(lambda: bool(first.added))
        if leave == "dies":
            await runtime.die()
            await runtime.start()
        else:
            first.let_go.set()
    assert wait.result().completed
    assert said(runtime) == [(["order-1"], [])] * 2


async def test_what_begins_and_leaves_while_nobody_is_there_is_not_said(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nothing piles up: the next stream is told what is waited for then."""
    first, second = Held(), Held()
    runtime.converse("AwaitSagas", first, second)
    async with asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(client.wait("stays"))
        await first.wait_until(lambda: bool(first.added))
        await runtime.die()
        left = [tasks.create_task(client.wait(f"left-{n}")) for n in range(20)]
        await anyio.wait_all_tasks_blocked()
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        await runtime.start()
        await second.wait_until(lambda: bool(second.added))
        assert (second.added, second.removed) == (["stays"], [])
        await second.say(ends("stays"))
    assert stays.result().completed


async def test_an_id_that_is_refused_is_asked_for_by_itself(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """That answer is complete, and surely not to an earlier question; the others go on."""

    async def refuse(talk: Talk) -> None:
        message = await talk.hear()
        for saga_id in message.add:
            await talk.say(
                ends(saga_id)
                if saga_id == "good"
                else refused(saga_id, Code.NOT_FOUND, "UNKNOWN_SAGA")
            )
        await talk.hear()

    async def alone(request: saga_pb2.WaitSagaRequest) -> saga_pb2.WaitSagaResponse:
        assert request.saga_id == "just started"
        return saga_pb2.WaitSagaResponse(saga=ended(request.saga_id), ended=True)

    runtime.converse("AwaitSagas", refuse)
    runtime.answer("WaitSaga", Refusal(Code.NOT_FOUND, "no such saga", "UNKNOWN_SAGA"), alone)
    async with asyncio.TaskGroup() as tasks:
        good = tasks.create_task(client.wait("good"))
        with pytest.raises(amends.NotFound, match="no such saga") as caught:
            await client.wait("nobody")
    assert caught.value.reason == "UNKNOWN_SAGA"
    assert good.result().completed

    runtime.converse("AwaitSagas", refuse)
    async with amends.Client(runtime.address) as other:
        assert (await other.wait("just started")).completed


async def test_an_id_that_is_refused_for_a_while_is_said_again(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """On the same stream, by itself."""

    async def refuse_once(talk: Talk) -> None:
        for reason in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
            (saga_id,) = (await talk.hear()).add
            await talk.say(refused(saga_id, reason, "LATER"))
        await end_all(talk)

    runtime.converse("AwaitSagas", refuse_once)
    assert (await client.wait("order-1")).completed
    assert (runtime.streams, said(runtime)) == (1, [(["order-1"], [])] * 3)


async def test_a_runtime_without_the_stream_is_asked_for_each(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """UNIMPLEMENTED is asked about once; then each wait is a WaitSaga of its own."""

    async def alone(request: saga_pb2.WaitSagaRequest) -> saga_pb2.WaitSagaResponse:
        return saga_pb2.WaitSagaResponse(saga=ended(request.saga_id), ended=True)

    async def unknown(talk: Talk) -> None:
        raise Hangup(Refusal(Code.UNIMPLEMENTED))

    runtime.converse("AwaitSagas", unknown)
    runtime.answer("WaitSaga", alone)
    for _ in range(2):
        sagas = await asyncio.gather(*(client.wait(saga_id) for saga_id in "abc"))
        assert [saga.saga_id for saga in sagas] == ["a", "b", "c"]
    assert runtime.streams == 1


async def test_an_error_that_does_not_pass_is_told_to_all(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Each has an error of its own; and whoever waits next tries anew."""

    async def fail(talk: Talk) -> None:
        await talk.hear()
        raise Hangup(Refusal(Code.PERMISSION_DENIED, "not you"))

    async def error_of(saga_id: str) -> amends.ApiError:
        with pytest.raises(amends.ApiError, match="not you") as caught:
            await client.wait(saga_id)
        return caught.value

    runtime.converse("AwaitSagas", fail, end_all)
    first, second = await asyncio.gather(error_of("a"), error_of("b"))
    assert first is not second
    assert first.code is Code.PERMISSION_DENIED
    assert (await client.wait("a")).completed


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.DEADLINE_EXCEEDED])
async def test_a_stream_that_ends_oddly_is_opened_again(
    runtime: ScriptedRuntime, client: amends.Client, code: grpc.StatusCode
) -> None:
    """Proxies end streams like this, and nothing was lost."""

    async def odd(talk: Talk) -> None:
        await talk.hear()
        raise Hangup(Refusal(code))

    runtime.converse("AwaitSagas", odd, odd, end_all)
    assert (await client.wait("order-1")).completed
    assert runtime.streams == 3


async def test_a_stream_that_ends_oddly_again_and_again_is_told(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Nobody waits for ever for a runtime that has a bug."""

    async def odd(talk: Talk) -> None:
        await talk.hear()
        raise Hangup(Refusal(Code.INTERNAL, "a bug"))

    runtime.converse("AwaitSagas", odd)
    with pytest.raises(amends.ApiError, match="a bug"):
        await client.wait("order-1")
    assert runtime.streams == awaiting.MAX_ODD_ENDS


async def test_waits_outlive_a_connection_that_breaks_while_they_speak(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """Ids come and go all the time, the runtime dies again and again: who stays sees no error."""
    over = anyio.Event()

    async def come_and_go(name: str) -> None:
        number = 0
        while not over.is_set():
            number += 1
            wait = asyncio.create_task(client.wait(f"{name}-{number}"))
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            wait.cancel()
            await asyncio.wait([wait])

    streams = [Held() for _ in range(5)]
    followers: list[Conversation] = [*streams[1:], end_all]
    runtime.converse("AwaitSagas", streams[0])
    async with asyncio.TaskGroup() as tasks:
        stays = tasks.create_task(client.wait("stays"))
        for n in range(20):
            tasks.create_task(come_and_go(f"{n}"))
        for held, following in zip(streams, followers, strict=True):
            await held.wait_until(lambda held=held: len(held.removed) > 20)  # type: ignore[misc]
            runtime.converse("AwaitSagas", following)
            await runtime.die()
            await runtime.start()
        await stays
        over.set()
    assert stays.result().completed


async def test_an_impatient_client_is_told_at_once(runtime: ScriptedRuntime) -> None:
    """With `retry_unavailable=False` a stream that breaks is not opened again."""
    runtime.converse("AwaitSagas", hang_up)
    async with amends.Client(runtime.address, retry_unavailable=False) as client:
        with pytest.raises(amends.Unavailable, match="stopping"):
            await client.wait("order-1")
    assert runtime.streams == 1


async def test_what_can_be_no_id_is_not_said_to_others(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """An enormous one would break the stream for everybody; it is refused by itself."""
    runtime.converse("AwaitSagas", end_all)
    runtime.answer("WaitSaga", Refusal(Code.INVALID_ARGUMENT, "too long", "INVALID_REQUEST"))
    with pytest.raises(amends.InvalidRequest, match="too long"):
        await client.wait("x" * 100_000)
    assert runtime.streams == 0


async def test_closing_ends_a_wait_for_ever(runtime: ScriptedRuntime) -> None:
    """In another task: an error, not a cancellation that nobody asked for."""
    held = Held()
    runtime.converse("AwaitSagas", held)

    async def error_of(client: amends.Client) -> amends.ApiError:
        with pytest.raises(amends.Unavailable) as caught:
            await client.wait("order-1")
        return caught.value

    async with asyncio.TaskGroup() as tasks, amends.Client(runtime.address) as client:
        wait = tasks.create_task(error_of(client))
        await held.wait_until(lambda: bool(held.added))
    assert wait.result().reason == "CLIENT_CLOSED"
    # In good order: what was merely cancelled would leave work for a loop that may be closed.
    assert held.removed == ["order-1"]
    assert held.let_go.is_set()


async def test_closing_does_not_wait_for_a_runtime_that_is_silent(
    runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not say goodbye in time is left alone."""

    async def answer_and_be_silent(talk: Talk) -> None:
        await talk.say(ends(*(await talk.hear()).add))
        await anyio.sleep_forever()

    monkeypatch.setattr(awaiting, "HANG_UP_S", 0.05)
    runtime.converse("AwaitSagas", answer_and_be_silent)
    async with amends.Client(runtime.address) as client:
        await client.wait("order-1")


async def test_closing_ends_waits_while_nobody_is_there() -> None:
    """Also those that no stream has ever known."""

    async def error_of(client: amends.Client) -> amends.ApiError:
        with pytest.raises(amends.Unavailable) as caught:
            await client.wait("order-1")
        return caught.value

    async with scripted_runtime() as runtime:
        address = runtime.address
    async with asyncio.TaskGroup() as tasks, amends.Client(address) as client:
        wait = tasks.create_task(error_of(client))
        await anyio.wait_all_tasks_blocked()
    assert wait.result().reason == "CLIENT_CLOSED"
