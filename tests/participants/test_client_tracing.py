"""What a client says of traces with its starts, and what it reads of a saga's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
from opentelemetry import trace

import amends
from amends.v1 import saga_pb2, types_pb2
from amends_runtime.config import Config, Participant, Server
from amends_runtime.engine import run_engine
from tests.participants.scripted_runtime import Refusal, ScriptedRuntime, scripted_runtime
from tests.participants.tracing import (
    SECRET,
    TRACEPARENT,
    UNSAMPLED,
    FaultError,
    Spans,
    ids,
    provided,
    raises,
)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Give what the process's spans are, in a provider of the test's own."""
    with provided(monkeypatch) as spans:
        yield spans


@pytest.fixture
async def runtime() -> AsyncIterator[ScriptedRuntime]:
    """Give a server that starts whatever it is asked for."""
    async with scripted_runtime() as running:
        running.answer("StartSaga", start_alone)
        running.answer("StartSagas", start_all)
        yield running


@pytest.fixture
async def client(runtime: ScriptedRuntime) -> AsyncIterator[amends.Client]:
    """Give a client of it."""
    async with amends.Client(runtime.address, timeout_s=60) as open_client:
        yield open_client


async def start_alone(request: saga_pb2.StartSagaRequest) -> saga_pb2.StartSagaResponse:
    """Start what is asked for alone."""
    return saga_pb2.StartSagaResponse(saga=types_pb2.Saga(saga_id=request.saga_id))


async def start_all(request: saga_pb2.StartSagasRequest) -> saga_pb2.StartSagasResponse:
    """Start all that is asked for together."""
    return saga_pb2.StartSagasResponse(
        results=[
            saga_pb2.StartSagasResult(started=await start_alone(start)) for start in request.starts
        ]
    )


def sent(runtime: ScriptedRuntime) -> dict[str, str]:
    """Give the trace context of each start, by saga, alone or in company."""
    alone = runtime.requests(saga_pb2.StartSagaRequest)
    together = runtime.requests(saga_pb2.StartSagasRequest)
    starts = [*alone, *(start for request in together for start in request.starts)]
    return {start.saga_id: start.traceparent for start in starts}


def current() -> str:
    """Give the current span as W3C has it."""
    context = trace.get_current_span().get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


async def test_a_start_carries_the_current_span(
    runtime: ScriptedRuntime, client: amends.Client, spans: Spans
) -> None:
    """So that the saga is found in the trace of whoever wanted it."""
    with trace.get_tracer("author").start_as_current_span("checkout"):
        await client.start("order", saga_id="a")
        expected = current()
    await client.start("order", saga_id="b")
    assert sent(runtime) == {"a": expected, "b": ""}


async def test_starts_in_a_batch_each_carry_their_own(
    runtime: ScriptedRuntime, client: amends.Client, spans: Spans
) -> None:
    """The span that was current where `start` was called, not where the batch is sent from."""
    expected: dict[str, str] = {}
    let_go = anyio.Event()

    async def slow_start(request: saga_pb2.StartSagaRequest) -> saga_pb2.StartSagaResponse:
        await let_go.wait()
        return await start_alone(request)

    async def order(saga_id: str) -> None:
        with trace.get_tracer("author").start_as_current_span(saga_id):
            expected[saga_id] = current()
            await client.start("order", saga_id=saga_id)

    runtime.answer("StartSaga", slow_start)
    names = [f"order-{n}" for n in range(20)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(order("alone"))
        for name in names:
            tasks.create_task(order(name))
        tasks.create_task(client.start("order", saga_id="without"))
        await anyio.wait_all_tasks_blocked()
        let_go.set()
    assert sent(runtime) == expected | {"without": ""}
    assert len(set(expected.values())) == len(names) + 1
    assert runtime.requests(saga_pb2.StartSagasRequest), "some left together"


async def test_a_repeated_attempt_carries_the_same(
    runtime: ScriptedRuntime, client: amends.Client, spans: Spans
) -> None:
    """The start is asked again as it was."""
    runtime.answer("StartSaga", Refusal(grpc.StatusCode.UNAVAILABLE), start_alone)
    with trace.get_tracer("author").start_as_current_span("checkout"):
        await client.start("order", saga_id="a")
        expected = current()
    requests = runtime.requests(saga_pb2.StartSagaRequest)
    assert [request.traceparent for request in requests] == [expected] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TRACEPARENT, TRACEPARENT),
        (UNSAMPLED, UNSAMPLED),
        ("", ""),
        ("nonsense", ""),
        (TRACEPARENT.upper(), ""),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", ""),
        (f"{TRACEPARENT}-more", ""),
        (f"01{TRACEPARENT[2:]}", TRACEPARENT),
        (f"cc{TRACEPARENT[2:]}-what will be", TRACEPARENT),
        (f"01{TRACEPARENT[2:-2]}fe", UNSAMPLED),
        (f"01{TRACEPARENT[2:]}.", ""),
        (f"ff{TRACEPARENT[2:]}", ""),
    ],
    ids=[
        *("sampled", "unsampled", "none", "nonsense", "upper case", "zero", "longer"),
        *("version 01", "a longer version cc", "unknown flags", "no dash", "version ff"),
    ],
)
async def test_a_context_can_be_given(
    runtime: ScriptedRuntime, client: amends.Client, spans: Spans, given: str, expected: str
) -> None:
    """It goes before the current span; a text that is none is none, and refuses no start.

    Of later versions it is sent what version 00 has, as W3C asks.
    """
    with trace.get_tracer("author").start_as_current_span("checkout"):
        await client.start("order", saga_id="a", traceparent=given)
    assert sent(runtime) == {"a": expected}


async def test_a_context_of_a_wrong_type_is_an_error(client: amends.Client) -> None:
    """As with every other argument."""
    wrong: Any = 17
    with pytest.raises(TypeError, match="traceparent must be a str, not int"):
        await client.start("order", traceparent=wrong)


async def test_a_provider_that_fails_costs_no_start(
    runtime: ScriptedRuntime,
    client: amends.Client,
    spans: Spans,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The saga begins without its caller's trace; the log says so once, by the type alone."""
    span = spans.provider.get_tracer("author").start_span("checkout")
    monkeypatch.setattr(span, "get_span_context", raises(FaultError))
    with trace.use_span(span):
        for saga_id in ("a", "b"):
            await client.start("order", saga_id=saga_id)
    assert sent(runtime) == {"a": "", "b": ""}
    told = [record.getMessage() for record in caplog.records if record.name == "amends.tracing"]
    assert told == ["a start goes on without its caller's trace: FaultError in the tracer provider"]
    assert SECRET not in caplog.text


async def test_caller_and_participants_are_one_trace(tmp_path: Path, spans: Spans) -> None:
    """Through a real runtime: the start's span, each call of the saga, and the authors' spans."""
    payments = amends.Participant("payments", barrier=amends.SqliteBarrier(tmp_path / "p.db"))

    @payments.execute("charge")
    def charge(call: amends.Call) -> None:
        with trace.get_tracer("author").start_as_current_span("authorise"):
            pass

    @payments.compensate("charge")
    def refund(call: amends.Call) -> None:
        pass

    @payments.execute("ship", compensatable=False)
    async def ship(call: amends.Call) -> None:
        raise amends.Rejected("undeliverable")

    order = amends.Definition("order").step("charge", "payments", "charge")
    order = order.pivot("ship", "payments", "ship")
    async with amends.serve(payments) as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"payments": Participant(address=server.address)},
        )
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(order)
            with trace.get_tracer("author").start_as_current_span("checkout"):
                started = await client.start("order")
            saga = await started.result(timeout_s=30)
            trace_id = (await client.trace(saga.saga_id)).trace_id
    assert saga.state is amends.SagaState.COMPENSATED
    names = [span.name.removeprefix("amends.v1.ParticipantService/") for span in spans.ended]
    assert sorted(names) == ["Compensate", "Execute", "Execute", "authorise", "checkout"]
    assert {ids(span)[0] for span in spans.ended} == {trace_id}


async def test_a_trace_is_read_whole(runtime: ScriptedRuntime, client: amends.Client) -> None:
    """Its pages are asked for, one after the other, and joined."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    async def page(request: saga_pb2.GetTraceRequest) -> saga_pb2.GetTraceResponse:
        number = int(request.page_token or "0")
        return saga_pb2.GetTraceResponse(
            traces_data=[b"one", b"two", b"three"][number],
            trace_id=trace_id,
            sampled=True,
            spans=[10, 10, 4][number],
            open_spans=2,
            next_page_token=["1", "2", ""][number],
        )

    runtime.answer("GetTrace", page)
    expected = amends.Trace(
        trace_id=trace_id, sampled=True, traces_data=b"onetwothree", spans=24, open_spans=2
    )
    assert await client.trace("order-1", include_open=True) == expected
    assert await client.handle("order-1").trace() == expected
    requests = runtime.requests(saga_pb2.GetTraceRequest)
    assert [request.include_open for request in requests] == [True] * 3 + [False] * 3
    assert {request.saga_id for request in requests} == {"order-1"}
    assert "onetwothree" not in repr(expected)
