"""The operator's half of the client: what is sent and read, and what a lost answer comes to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypedDict

import grpc
import pytest

import amends
from amends.saga_wire import record_from_wire, watched_from_wire
from amends.v1 import operator_pb2, saga_pb2, types_pb2
from tests.participants.scripted_runtime import Refusal, ScriptedRuntime, scripted_runtime

Code = grpc.StatusCode
LOST = Refusal(Code.UNAVAILABLE, "died before the answer")
AUDIT = operator_pb2.Audit(author="ada", reason="it is mended")


class Words(TypedDict):
    """Who does it and why."""

    author: str
    reason: str


WHO: Words = {"author": "ada", "reason": "it is mended"}


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a server that answers as the test says."""
    async with scripted_runtime() as running:
        yield running


@pytest.fixture
async def client(runtime: ScriptedRuntime) -> AsyncIterator[amends.Client]:
    """Give a client of it that is patient."""
    async with amends.Client(runtime.address, timeout_s=60) as open_client:
        yield open_client


def a_saga(state: types_pb2.SagaState.ValueType) -> types_pb2.Saga:
    """Make a saga of the contract."""
    return types_pb2.Saga(saga_id="s-1", definition="order", state=state)


def requests(runtime: ScriptedRuntime) -> list[Any]:
    """Give all requests so far; each has an audit."""
    return [request for _, request in runtime.asked]


def wrong_state(reason: str) -> Refusal:
    """Make a refusal of the runtime's own."""
    return Refusal(Code.FAILED_PRECONDITION, "no", reason)


async def test_requests_say_who_and_why(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Every argument stands in its field."""
    stuck = a_saga(types_pb2.SAGA_STATE_RUNNING)
    runtime.answer("RetrySaga", operator_pb2.RetrySagaResponse(saga=stuck))
    abandoned = a_saga(types_pb2.SAGA_STATE_ABANDONED)
    runtime.answer(
        "AbandonSaga",
        operator_pb2.AbandonSagaResponse(saga=abandoned, remaining_steps=["charge", "ship"]),
    )
    participant = operator_pb2.Participant(
        name="shop",
        address="127.0.0.1:7001",
        configured_address="127.0.0.1:7000",
        source=operator_pb2.PARTICIPANT_SOURCE_OPERATOR,
    )
    runtime.answer("PutParticipant", operator_pb2.PutParticipantResponse(participant=participant))
    runtime.answer("RemoveParticipant", operator_pb2.RemoveParticipantResponse())
    handle = client.handle("s-1")
    saga = await handle.retry(step="charge", author="ada", reason="it is mended")
    assert saga.state is amends.SagaState.RUNNING
    answer = await handle.abandon(author="ada", reason="it is mended", force=True)
    assert answer.saga.state is amends.SagaState.ABANDONED
    assert answer.remaining_steps == ("charge", "ship")
    info = await client.put_participant(
        "shop", "127.0.0.1:7001", author="ada", reason="it is mended"
    )
    assert info.by_operator
    assert (info.address, info.configured_address) == ("127.0.0.1:7001", "127.0.0.1:7000")
    await client.remove_participant("shop", author="ada", reason="it is mended")
    assert all(request.audit.request_id for request in requests(runtime))
    for request in requests(runtime):
        request.audit.request_id = ""
    assert requests(runtime) == [
        operator_pb2.RetrySagaRequest(saga_id="s-1", step="charge", audit=AUDIT),
        operator_pb2.AbandonSagaRequest(saga_id="s-1", audit=AUDIT, force=True),
        operator_pb2.PutParticipantRequest(name="shop", address="127.0.0.1:7001", audit=AUDIT),
        operator_pb2.RemoveParticipantRequest(name="shop", audit=AUDIT),
    ]


async def test_a_request_has_one_id_however_often_it_is_asked(
    runtime: ScriptedRuntime, client: amends.Client
) -> None:
    """By it the runtime knows a repeat, and does nothing; the next call has another one."""
    going = a_saga(types_pb2.SAGA_STATE_COMPENSATING)
    runtime.answer("RetrySaga", LOST, LOST, operator_pb2.RetrySagaResponse(saga=going))
    runtime.answer("AbandonSaga", LOST, operator_pb2.AbandonSagaResponse(saga=going))
    runtime.answer("PutParticipant", LOST, operator_pb2.PutParticipantResponse())
    runtime.answer("RemoveParticipant", LOST, operator_pb2.RemoveParticipantResponse())
    saga = await client.retry("s-1", **WHO)
    assert saga.state is amends.SagaState.COMPENSATING
    await client.retry("s-1", **WHO)
    await client.abandon("s-1", **WHO)
    await client.put_participant("shop", "127.0.0.1:7001", **WHO)
    await client.remove_participant("shop", **WHO)
    ids = [request.audit.request_id for request in requests(runtime)]
    asked = [ids.count(one) for one in dict.fromkeys(ids)]
    assert asked == [3, 1, 2, 2, 2]
    assert all(8 <= len(one) <= 128 for one in ids)


@pytest.mark.parametrize("reason", ["NOTHING_STUCK", "SAGA_ENDED"])
async def test_a_retry_that_is_refused_at_once_is_refused(
    runtime: ScriptedRuntime, client: amends.Client, reason: str
) -> None:
    """Nothing had been done for it: the caller is told."""
    runtime.answer("RetrySaga", wrong_state(reason))
    with pytest.raises(amends.WrongState) as refused:
        await client.retry("s-1", author="ada", reason="it is mended")
    assert refused.value.reason == reason


@pytest.mark.parametrize("reason", ["NOT_BY_OPERATOR", "UNKNOWN_PARTICIPANT"])
async def test_a_removal_of_what_is_not_there_is_refused(
    runtime: ScriptedRuntime, client: amends.Client, reason: str
) -> None:
    """Also after a lost answer: had that one removed it, this one would be answered as done."""
    runtime.answer("RemoveParticipant", LOST, Refusal(Code.NOT_FOUND, "no", reason))
    with pytest.raises(amends.NotFound):
        await client.remove_participant("shop", **WHO)


async def test_arguments_that_cannot_be_sent_are_named(client: amends.Client) -> None:
    """Before anything is sent."""
    with pytest.raises(TypeError, match="author must be a str"):
        await client.retry("s-1", author=7, reason="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reason must be a str"):
        await client.abandon("s-1", author="ada", reason=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="address must be a str"):
        await client.put_participant("shop", 7001, author="a", reason="b")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="resume_token must be a str"):
        await anext(client.watch(resume_token=7))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'BROKEN' is not a valid SagaState"):
        await anext(client.watch(state="BROKEN"))  # type: ignore[arg-type]


def test_an_event_is_read_with_its_records() -> None:
    """A turn has a saga and records, a notice has neither; both say where to go on."""
    acted = types_pb2.OperatorActed(
        action="retry", step="charge", author="ada", reason="it is mended", round=2
    )
    record = types_pb2.Record(seq=7, version=3, at_ms=5, operator_acted=acted)
    event = watched_from_wire(
        saga_pb2.WatchSagasResponse(
            saga=a_saga(types_pb2.SAGA_STATE_STUCK),
            records=[record],
            resume_token="here",  # noqa: S106  # guards nothing
            lagged=True,
            purged_turns=4,
        )
    )
    assert event.saga is not None
    assert event.saga.state is amends.SagaState.STUCK
    assert event.records == (record_from_wire(record),)
    assert (event.resume_token, event.lagged, event.purged_turns) == ("here", True, 4)
    [read] = event.records
    assert read.kind is amends.RecordKind.OPERATOR_ACTED
    assert (read.detail, read.step, read.round) == ("retry", "charge", 2)
    assert (read.author, read.reason) == ("ada", "it is mended")
    notice = watched_from_wire(saga_pb2.WatchSagasResponse(resume_token="here"))  # noqa: S106
    assert notice == amends.WatchEvent(
        saga=None,
        records=(),
        resume_token="here",  # noqa: S106
        lagged=False,
    )
