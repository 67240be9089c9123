"""A participant's part in a saga's trace: its spans, what is current in handlers, no secrets."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

import amends
from amends.tracing import MAX_TOLD, CallTracer
from amends.v1 import participant_pb2 as pb
from amends.v1 import types_pb2
from tests.participants.asking import asking, call_message
from tests.participants.ledger import Ledger
from tests.participants.processes import ended_well
from tests.participants.tracing import (
    ATTEMPT,
    BLOCKED,
    FAULTS,
    SECRET,
    TRACE,
    TRACEPARENT,
    UNSAMPLED,
    FaultError,
    Faulty,
    Spans,
    facts,
    ids,
    parent,
    provided,
    raises,
)

EXECUTE = "amends.v1.ParticipantService/Execute"
COMPENSATE = "amends.v1.ParticipantService/Compensate"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Give what the process's spans are, in a provider of the test's own."""
    with provided(monkeypatch) as spans:
        yield spans


def traced(verb: amends.Verb = amends.Verb.EXECUTE, **changes: Any) -> pb.Call:
    """Make a call that carries an attempt's trace context."""
    traceparent = changes.pop("traceparent", TRACEPARENT)
    call = call_message(verb, **changes)
    call.traceparent = traceparent
    return call


def participant_of(
    handler: Callable[..., object], barrier: amends.Barrier | None = None
) -> amends.Participant:
    """Make one whose only action is done by a handler."""
    participant = (
        amends.Participant("payments", barrier=None)
        if barrier is None
        else amends.Participant("payments", barrier=barrier)
    )
    participant.execute("charge", compensatable=False)(handler)
    return participant


async def test_a_call_is_a_span_below_the_attempt(ledger: Ledger, spans: Spans) -> None:
    """It says whose call it was and what came of it, by the conventions for RPC and our own."""
    async with ledger.served() as asker:
        call = traced(saga_id="order-7", attempt=3)
        call.tracestate = "vendor=1"
        assert await asker.say(call) == "done"
    span = spans.one
    assert (span.name, span.kind) == (EXECUTE, SpanKind.SERVER)
    assert ids(span)[0] == TRACE
    assert parent(span) == ATTEMPT
    assert span.parent is not None
    assert span.parent.is_remote
    assert span.parent.trace_state.get("vendor") == "1"
    assert facts(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": EXECUTE,
        "rpc.response.status_code": "OK",
        "amends.saga_id": "order-7",
        "amends.definition": "order",
        "amends.step": "pay",
        "amends.action": "charge",
        "amends.verb": "execute",
        "amends.participant": "payments",
        "amends.round": 1,
        "amends.attempt": 3,
        "amends.poll": False,
        "amends.outcome": "done",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "amends"


async def test_every_verb_has_its_span(ledger: Ledger, spans: Spans) -> None:
    """Named by its method."""
    async with ledger.served() as asker:
        for verb in amends.Verb:
            await asker.ask(traced(verb))
    service = "amends.v1.ParticipantService/"
    names = [span.name.removeprefix(service) for span in spans.ended]
    assert names == ["Prepare", "Execute", "Compensate"]


def author_sync(call: amends.Call) -> None:
    """Make a span of the author's own."""
    with trace.get_tracer("author").start_as_current_span("own"):
        pass


async def author_async(call: amends.Call) -> None:
    """Make a span of the author's own, with something to wait for in it."""
    with trace.get_tracer("author").start_as_current_span("own"):
        await anyio.lowlevel.checkpoint()


def author_sync_tx(call: amends.Call, tx: amends.Transaction) -> None:
    """Make one beside a statement."""
    tx.execute("SELECT 1")
    author_sync(call)


async def author_async_tx(call: amends.Call, tx: amends.AsyncTransaction) -> None:
    """Make one beside a statement that is waited for."""
    await tx.execute("SELECT 1")
    await author_async(call)


@pytest.mark.parametrize(
    "handler",
    [author_sync, author_async, author_sync_tx, author_async_tx],
    ids=lambda handler: handler.__name__,
)
async def test_the_authors_spans_are_below_the_call(
    handler: Callable[..., object], tmp_path: Path, spans: Spans
) -> None:
    """In either kind of handler, in the event loop and in the barrier's threads."""
    barriers: Sequence[amends.Barrier | None] = [amends.SqliteBarrier(tmp_path / "payments.db")]
    if handler in (author_sync, author_async):
        barriers = [*barriers, None]
    for barrier in barriers:
        participant = participant_of(handler, barrier)
        async with amends.serve(participant) as server, asking(server.address) as asker:
            assert await asker.say(traced()) == "done"
    calls = spans.named(EXECUTE)
    own = spans.named("own")
    assert len(calls) == len(own) == len(barriers)
    assert [parent(span) for span in own] == [ids(span)[1] for span in calls]
    assert {ids(span)[0] for span in spans.ended} == {TRACE}


async def test_calls_side_by_side_keep_their_spans_apart(spans: Spans) -> None:
    """Each handler sees its own, whoever else waits in the event loop."""
    both_in = asyncio.Barrier(2)
    seen: dict[str, int] = {}

    async def meet(call: amends.Call) -> None:
        await both_in.wait()
        seen[call.saga_id] = trace.get_current_span().get_span_context().span_id

    participant = participant_of(meet)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        await asyncio.gather(*(asker.ask(traced(saga_id=saga_id)) for saga_id in ("a", "b")))
    found = {facts(span)["amends.saga_id"]: int(ids(span)[1], 16) for span in spans.ended}
    assert found == seen
    assert len(set(seen.values())) == 2


async def test_the_wait_for_a_place_is_part_of_the_call(spans: Spans) -> None:
    """Its span begins when it comes in, not when there is room for it."""
    begun = asyncio.Semaphore(0)
    leave = asyncio.Event()

    def note(span: Span) -> None:
        begun.release()

    async def stay(call: amends.Call) -> None:
        await leave.wait()

    spans.on_begin = note
    server = amends.serve(participant_of(stay), max_concurrent=1)
    async with server, asking(server.address) as asker:
        first = asyncio.create_task(asker.say(traced(saga_id="a")))
        await begun.acquire()
        second = asyncio.create_task(asker.say(traced(saga_id="b")))
        await begun.acquire()  # although the first has the only place
        leave.set()
        assert [await first, await second] == ["done", "done"]
    assert len(spans.ended) == 2


@pytest.mark.parametrize(
    "traceparent",
    ["", "nonsense", f"00-{'0' * 32}-{ATTEMPT}-01", f"ff-{TRACE}-{ATTEMPT}-01"],
    ids=["none", "nonsense", "zero", "no version"],
)
async def test_a_call_without_a_valid_context_is_a_root(traceparent: str, spans: Spans) -> None:
    """Also where the server was started inside a span, which is nobody's parent."""
    with trace.get_tracer("author").start_as_current_span("start"):
        participant = participant_of(author_async)
        async with amends.serve(participant) as server, asking(server.address) as asker:
            assert await asker.say(traced(traceparent=traceparent)) == "done"
    (call,) = spans.named(EXECUTE)
    (start,) = spans.named("start")
    assert parent(call) is None
    assert ids(call)[0] not in (TRACE, ids(start)[0])


async def test_an_unsampled_call_records_nothing(spans: Spans) -> None:
    """Nor do the author's spans in it; what is sent on from there says so, too."""
    seen: list[trace.SpanContext] = []

    def charge(call: amends.Call) -> None:
        author_sync(call)
        seen.append(trace.get_current_span().get_span_context())

    participant = participant_of(charge)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        assert await asker.say(traced(traceparent=UNSAMPLED)) == "done"
    assert spans.ended == ()
    (context,) = seen
    assert f"{context.trace_id:032x}" == TRACE
    assert not context.trace_flags.sampled


async def test_each_poll_is_a_call(spans: Spans) -> None:
    """Below the same attempt, and marked as one."""
    answers = iter([amends.InProgress(), amends.InProgress(), None])

    def charge(call: amends.Call) -> object:
        return next(answers)

    participant = participant_of(charge)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        for poll in (False, True, True):
            await asker.ask(traced(poll=poll))
    found = [(facts(span)["amends.poll"], facts(span)["amends.outcome"]) for span in spans.ended]
    assert found == [(False, "in_progress"), (True, "in_progress"), (True, "done")]
    assert [parent(span) for span in spans.ended] == [ATTEMPT] * 3


# ------------------------------------------------------------------------- outcomes and errors


def refuse(call: amends.Call) -> None:
    """Say why, in words that are not for spans."""
    raise amends.Rejected("card_declined", SECRET)


def break_down(call: amends.Call) -> None:
    """Say why, in words that are not for spans."""
    raise amends.Broken("ledger_lost", SECRET)


def fail(call: amends.Call) -> None:
    """Quote a payload."""
    raise LookupError(SECRET)


def give_no_json(call: amends.Call) -> object:
    """Answer with what has no JSON."""
    return {"amount": object(), SECRET: 1}


def answer(call: amends.Call) -> dict[str, str]:
    """Answer with a payload."""
    return {"result": SECRET}


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (answer, ("OK", "done", None, None)),
        (refuse, ("OK", "rejected", "card_declined", None)),
        (break_down, ("OK", "broken", "ledger_lost", "Broken")),
        (fail, ("UNKNOWN", "unknown", None, "LookupError")),
        (give_no_json, ("UNKNOWN", "unknown", None, "PayloadError")),
    ],
    ids=["done", "rejected", "broken", "failed", "no JSON"],
)
async def test_what_came_of_it_is_told_without_secrets(
    handler: Callable[..., object], told: tuple[str | None, ...], tmp_path: Path, spans: Spans
) -> None:
    """A refusal is no error; what is one, is told by its type, and nothing by its message."""
    participant = participant_of(handler, amends.SqliteBarrier(tmp_path / "payments.db"))
    async with amends.serve(participant) as server, asking(server.address) as asker:
        call = traced()
        call.input.data = SECRET.encode()
        call.results.add(step="place").result.data = SECRET.encode()
        await answered(asker.ask(call))
    span = spans.one
    names = ("rpc.response.status_code", "amends.outcome", "amends.reason", "error.type")
    assert tuple(map(facts(span).get, names)) == told
    is_error = told[-1] is not None
    assert span.status.status_code is (StatusCode.ERROR if is_error else StatusCode.UNSET)
    assert span.status.description is None
    assert span.events == ()
    assert SECRET not in span.to_json()


async def test_a_participant_that_has_decided_alone_is_an_error(spans: Spans) -> None:
    """Which way it decided is told beside the reason, and nothing of its message."""

    def report(call: amends.Call) -> None:
        raise amends.Heuristic(False, "expired", SECRET)

    async with amends.serve(participant_of(report)) as server, asking(server.address) as asker:
        call = traced()
        call.mode = types_pb2.MODE_TWO_PHASE_COMMIT
        assert await asker.say(call) == "heuristic"
    span = spans.one
    names = ("amends.outcome", "amends.reason", "amends.committed", "error.type")
    assert tuple(map(facts(span).get, names)) == ("heuristic", "expired", False, "Heuristic")
    assert span.status.status_code is StatusCode.ERROR
    assert SECRET not in span.to_json()


async def answered(answer: Awaitable[object]) -> None:
    """Wait for an answer of any kind."""
    try:
        await answer
    except grpc.aio.AioRpcError:
        return


@pytest.mark.parametrize(
    ("changes", "status", "error_type"),
    [
        ({"action": "chagre"}, "UNIMPLEMENTED", "UNIMPLEMENTED"),
        ({"participant": "hotels"}, "UNIMPLEMENTED", "UNIMPLEMENTED"),
        ({"step": ""}, "INVALID_ARGUMENT", None),
    ],
    ids=["unknown action", "not for us", "malformed"],
)
async def test_what_is_refused_at_the_door_is_a_span_too(
    changes: dict[str, Any], status: str, error_type: str | None, spans: Spans
) -> None:
    """The server's faults are errors; the caller's are not, by the conventions for gRPC."""
    participant = participant_of(answer)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        code, _ = await asker.status(traced(**changes))
    assert code.name == status
    span = spans.one
    assert parent(span) == ATTEMPT
    assert facts(span)["rpc.response.status_code"] == status
    assert facts(span)["amends.outcome"] == "unknown"
    assert facts(span).get("error.type") == error_type
    assert span.status.status_code is (StatusCode.UNSET if error_type is None else StatusCode.ERROR)


async def test_an_unavailable_barrier_is_an_error(ledger: Ledger, spans: Spans) -> None:
    """By the type of its error."""
    async with ledger.served() as asker:
        await ledger.barrier.aclose()  # as `open` says: twice open, once closed
        await ledger.barrier.aclose()
        code, _ = await asker.status(traced())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert facts(spans.one)["error.type"] == "BarrierError"


async def test_names_from_the_wire_have_an_end(spans: Spans) -> None:
    """A malformed call cannot fill the queue of spans with what it calls an id."""
    participant = participant_of(answer)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        await asker.ask(traced(saga_id="x" * 100_000))
    assert facts(spans.one)["amends.saga_id"] == "x" * 512


@pytest.mark.parametrize("has_barrier", [True, False], ids=["barrier", "none"])
async def test_a_caller_that_leaves(tmp_path: Path, spans: Spans, *, has_barrier: bool) -> None:
    """Nobody knows what became of it, and it is no error of the server's."""
    inside = asyncio.Event()

    async def stay(call: amends.Call) -> None:
        inside.set()
        await asyncio.Event().wait()

    barrier = amends.SqliteBarrier(tmp_path / "payments.db") if has_barrier else None
    participant = participant_of(stay, barrier)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        call = asker.stub.Execute(pb.ExecuteRequest(call=traced()))
        await inside.wait()
        call.cancel()
    span = spans.one  # leaving the block has waited for it
    assert facts(span)["rpc.response.status_code"] == "CANCELLED"
    assert facts(span)["amends.outcome"] == "unknown"
    assert span.status.status_code is StatusCode.UNSET


# ------------------------------------------------------------------------ tracing decides nothing


async def test_a_span_processor_that_fails_fails_no_call(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither at the start of a span nor at its end; the log names the error's type alone."""

    def refuse_to_begin(span: Span) -> None:
        raise LookupError(SECRET)

    class FailsAtTheEnd(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise ValueError(SECRET)

    participant = participant_of(answer)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        spans.on_begin = refuse_to_begin
        assert await asker.say(traced(saga_id="a")) == "done"
        spans.on_begin = lambda _: None
        spans.provider.add_span_processor(FailsAtTheEnd())
        assert await asker.say(traced(saga_id="b")) == "done"
    assert told_by(caplog) == [
        f"a call goes on without its span: {kind} in the tracer provider"
        for kind in ("LookupError", "ValueError")
    ]


TOLD = f"a call goes on without its span: {FaultError.__name__} in the tracer provider"


def told_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give what the log says of traces."""
    return [record.getMessage() for record in caplog.records if record.name == "amends.tracing"]


@pytest.mark.parametrize("verb", [amends.Verb.EXECUTE, amends.Verb.COMPENSATE])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_provider_that_fails_costs_no_answer(
    tmp_path: Path,
    spans: Spans,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    fault: str,
    verb: amends.Verb,
) -> None:
    """Wherever it raises: the effect is committed by then, and whoever asked must hear of it.

    Each call runs its handler once; the log says it once, and only by its type.
    """
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", Faulty(fault))
    ran: list[str] = []
    participant = amends.Participant(
        "payments", barrier=amends.SqliteBarrier(tmp_path / "payments.db")
    )

    @participant.execute("charge")
    def charge(call: amends.Call) -> None:
        ran.append(f"{call.saga_id} charge")

    @participant.compensate("charge")
    def refund(call: amends.Call) -> None:
        ran.append(f"{call.saga_id} refund")

    async with amends.serve(participant) as server, asking(server.address) as asker:
        for saga_id in ("a", "b"):
            assert await asker.say(traced(saga_id=saga_id)) == "done"
            if verb is amends.Verb.COMPENSATE:
                assert await asker.say(traced(verb, saga_id=saga_id, executed=True)) == "done"
    verbs = ("charge", "refund") if verb is amends.Verb.COMPENSATE else ("charge",)
    assert ran == [f"{saga_id} {done}" for saga_id in ("a", "b") for done in verbs]
    touches = fault not in ("get_span_context", "set_status")  # these only for what failed
    assert told_by(caplog) == ([TOLD] if touches else [])
    assert SECRET not in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("handler", "answer"),
    [
        (refuse, "rejected card_declined"),
        (break_down, "broken ledger_lost"),
        (fail, "UNKNOWN"),
        (give_no_json, "UNKNOWN"),
    ],
    ids=["rejected", "broken", "failed", "no JSON"],
)
async def test_a_provider_that_fails_changes_no_answer(
    handler: Callable[..., object],
    answer: str,
    fault: str,
    spans: Spans,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusal stays one, and an error keeps the status that it had."""
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", Faulty(fault))
    participant = participant_of(handler)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        if answer.isupper():
            code, text = await asker.status(traced())
            assert (code.name, FaultError.__name__ in text) == (answer, False)
        else:
            assert await asker.say(traced()) == answer


@pytest.mark.parametrize("fault", FAULTS)
async def test_cancellation_stays_what_it_is(
    fault: str, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPC and the barrier know by it that the caller has left."""
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", Faulty(fault))
    call = traced()
    with pytest.raises(asyncio.CancelledError), CallTracer("p").span(amends.Verb.EXECUTE, call):
        raise asyncio.CancelledError


@pytest.mark.parametrize("function", ["attach", "detach"])
async def test_a_context_that_fails_costs_no_answer(
    function: str, spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where contexts are kept is the author's choice, too (OTEL_PYTHON_CONTEXT)."""
    participant = participant_of(answer)
    async with amends.serve(participant) as server, asking(server.address) as asker:
        with monkeypatch.context() as patched:
            patched.setattr(f"opentelemetry.context.{function}", raises(FaultError))
            assert await asker.say(traced()) == "done"
    assert told_by(caplog) == [TOLD]
    assert parent(spans.one) == ATTEMPT


def test_types_without_end_fill_no_log(
    spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider that makes a type for each failure is told of a few dozen times."""
    tracer = CallTracer("p")
    tracer.look()
    span = tracer.span(amends.Verb.EXECUTE, traced())
    for number in range(1_000):
        kind = type(f"Failure{number}", (Exception,), {})
        monkeypatch.setattr(spans.provider, "get_tracer", raises(kind))
        with span:
            pass
    assert len(told_by(caplog)) == MAX_TOLD


def test_a_def_handler_may_run_an_event_loop(tmp_path: Path) -> None:
    """In its thread there is none, whatever was current where the call came in."""

    def charge(call: amends.Call) -> str:
        return anyio.run(wait_a_little)

    async def wait_a_little() -> str:
        await anyio.lowlevel.checkpoint()
        return "waited"

    async def main() -> None:
        for barrier in (amends.SqliteBarrier(tmp_path / "payments.db"), None):
            participant = participant_of(charge, barrier)
            async with amends.serve(participant) as server, asking(server.address) as asker:
                assert (await asker.ask(traced())).done.result.data == b'"waited"'

    anyio.run(main)


# ------------------------------------------------------------------ without a provider, or the API

PROGRAM = """
import asyncio
import amends
from tests.participants.asking import asking, call_message
from tests.participants.scripted_runtime import scripted_runtime
from amends.v1 import saga_pb2

payments = amends.Participant("payments", barrier=None)

@payments.execute("charge", compensatable=False)
def charge(call: amends.Call) -> str:
    return current()

async def main() -> None:
    async with amends.serve(payments) as server, asking(server.address) as asker:
        call = call_message()
        call.traceparent = TRACEPARENT
        outcome = await asker.ask(call)
        print(outcome.done.result.data.decode())
    async with scripted_runtime() as runtime, amends.Client(runtime.address) as client:
        runtime.answer("StartSaga", saga_pb2.StartSagaResponse())
        await client.start("order")
        await client.start("order", traceparent=TRACEPARENT)
        for request in runtime.requests(saga_pb2.StartSagaRequest):
            print(repr(request.traceparent))

asyncio.run(main())
"""

ABSENT = f"""{BLOCKED}
def current() -> str:
    assert not any(name.startswith("opentelemetry") for name in sys.modules)
    return "no API"
"""

NO_PROVIDER = """
from opentelemetry import trace

def current() -> str:
    return f"{trace.get_current_span().get_span_context().span_id:016x}"
"""


@pytest.mark.parametrize(
    ("before", "current"), [(ABSENT, "no API"), (NO_PROVIDER, ATTEMPT)], ids=["API", "provider"]
)
async def test_nothing_is_missed_without(before: str, current: str, tmp_path: Path) -> None:
    """Participants and clients work in silence; an explicit context is sent on all the same.

    Without a provider the call's own context is the current one, to be sent on by whoever does.
    """
    code = f"TRACEPARENT = {TRACEPARENT!r}\n{textwrap.dedent(before)}\n{PROGRAM}"
    said = await ended_well(code, tmp_path)
    assert said.splitlines() == [f'"{current}"', "''", repr(TRACEPARENT)]
