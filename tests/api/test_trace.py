"""GetTrace: a saga's spans out of its history; and whose trace a started saga joins."""

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

import amends
from amends.v1 import saga_pb2, types_pb2
from amends_runtime.api.tracing import MAX_SPANS, SagaTraces, TracePage
from amends_runtime.config import Config, Telemetry
from amends_runtime.core.definition import Plan, normalise
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptStarted,
    Failure,
    Record,
    SagaStarted,
    Timing,
    Verb,
)
from amends_runtime.core.tracing import Tracing
from amends_runtime.engine import Engine, run_engine
from amends_runtime.ports import LoadedSaga, StoredTurn
from tests.api.refusals import refused
from tests.api.shop import ORDER, Shop
from tests.api.stubs import Sagas

MIB = 1024 * 1024
CALLER = f"00-{'a' * 32}-{'b' * 16}-01"
OTHER = f"00-{'c' * 32}-{'d' * 16}-01"


async def started(
    sagas: Sagas,
    saga_id: str,
    *,
    traceparent: str = "",
    wait_ms: int = 60_000,
    metadata: tuple[tuple[str, str], ...] = (),
) -> None:
    """Start a saga and, unless `wait_ms` is 0, wait for its end."""
    await sagas.StartSaga(
        saga_pb2.StartSagaRequest(
            saga_id=saga_id, definition="order", wait_ms=wait_ms, traceparent=traceparent
        ),
        metadata=metadata,
    )


async def pages(
    sagas: Sagas, saga_id: str, *, page_size: int = 0, include_open: bool = False
) -> list[saga_pb2.GetTraceResponse]:
    """All pages of a trace."""
    found: list[saga_pb2.GetTraceResponse] = []
    token = ""
    while not found or token:
        request = saga_pb2.GetTraceRequest(
            saga_id=saga_id, page_size=page_size, page_token=token, include_open=include_open
        )
        found.append(await sagas.GetTrace(request))
        token = found[-1].next_page_token
    return found


def spans_of(*responses: saga_pb2.GetTraceResponse) -> list[Span]:
    """The spans of some pages, whose bytes are put together as anybody may."""
    data = TracesData.FromString(b"".join(response.traces_data for response in responses))
    return list(_spans(data))


def _spans(data: TracesData) -> Iterator[Span]:
    for of_resource in data.resource_spans:
        for of_scope in of_resource.scope_spans:
            yield from of_scope.spans


def is_open(span: Span) -> bool:
    """Whether it is marked as one that has not ended."""
    return any(each.key == "amends.open" and each.value.bool_value for each in span.attributes)


# -- the trace of a saga ---------------------------------------------------------------------------


async def test_a_saga_that_has_ended_has_its_whole_trace(sagas: Sagas, engine: Engine) -> None:
    """One trace under derived ids; the root first, every other span below one before it."""
    await started(sagas, "s-1")
    [page] = await pages(sagas, "s-1")
    spans = spans_of(page)
    tracing = Tracing(engine.store.identity.store_id)
    assert page.trace_id == tracing.trace_id("s-1", "")
    assert (page.sampled, page.spans, page.open_spans) == (True, len(spans), 0)
    assert spans[0].span_id.hex() == tracing.root_span("s-1")
    assert [span.name for span in spans[:2]] == ["saga order", "step reserve"]
    seen = set()
    for number, span in enumerate(spans):
        assert span.trace_id.hex() == page.trace_id
        assert span.parent_span_id in seen if number else not span.parent_span_id
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        seen.add(span.span_id)
    [of_resource] = TracesData.FromString(page.traces_data).resource_spans
    names = {each.key: each.value.string_value for each in of_resource.resource.attributes}
    assert names["service.name"] == "amends"
    assert names["service.instance.id"] == engine.store.identity.store_id


async def test_what_has_not_ended_comes_only_if_asked_for(sagas: Sagas, shop: Shop) -> None:
    """It is counted in any case, and marked where it is there."""
    held = shop.hold("ship")
    await started(sagas, "s-1", wait_ms=0)
    await held.begun.wait()
    [closed] = await pages(sagas, "s-1")
    assert [span.name for span in spans_of(closed)] == [
        "step reserve",
        "amends.v1.ParticipantService/Execute",
    ]
    assert closed.open_spans == 3
    [both] = await pages(sagas, "s-1", include_open=True)
    assert (both.spans, both.open_spans) == (5, 3)
    assert [span.name for span in spans_of(both) if is_open(span)] == [
        "saga order",
        "step ship",
        "amends.v1.ParticipantService/Execute",
    ]
    assert not any(is_open(span) for span in spans_of(closed))
    held.let_go.set()
    await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
    [ended] = await pages(sagas, "s-1")
    of_closed = {span.span_id: span for span in spans_of(ended)}
    assert all(of_closed[span.span_id] == span for span in spans_of(closed))


@pytest.mark.parametrize("page_size", [1, 2, 5])
async def test_pages_together_are_the_whole(sagas: Sagas, page_size: int) -> None:
    """In the same order, whatever the size of a page, each with what holds for the whole."""
    await started(sagas, "s-1")
    [whole] = await pages(sagas, "s-1")
    found = await pages(sagas, "s-1", page_size=page_size)
    assert spans_of(*found) == spans_of(whole)
    assert [page.spans for page in found[:-1]] == [page_size] * (len(found) - 1)
    assert {page.trace_id for page in found} == {whole.trace_id}


async def test_a_page_ends_before_it_is_too_large(
    sagas: Sagas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one span always fits, so that there is an end."""
    await started(sagas, "s-1")
    [whole] = await pages(sagas, "s-1")
    counts = []
    for limit in (1_500, 1):
        monkeypatch.setattr("amends_runtime.api.tracing.PAGE_BYTES", limit)
        found = await pages(sagas, "s-1")
        assert all(len(page.traces_data) <= limit or page.spans == 1 for page in found)
        assert spans_of(*found) == spans_of(whole)
        counts.append(len(found))
    assert 1 < counts[0] < counts[1] == whole.spans


async def test_pages_show_the_saga_as_it_was_at_the_first(sagas: Sagas, shop: Shop) -> None:
    """A saga that ends in between does not move what comes next."""
    held = shop.hold("ship")
    await started(sagas, "s-1", wait_ms=0)
    await held.begun.wait()
    request = saga_pb2.GetTraceRequest(saga_id="s-1", page_size=1)
    first = await sagas.GetTrace(request)
    held.let_go.set()
    await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
    request.page_token = first.next_page_token
    second = await sagas.GetTrace(request)
    assert [span.name for span in spans_of(first, second)] == [
        "step reserve",
        "amends.v1.ParticipantService/Execute",
    ]
    assert (second.open_spans, second.next_page_token) == (3, "")


async def test_a_trace_of_many_attempts_comes_in_pages_that_fit() -> None:
    """Nothing of three thousand spans and long events is left out, and no message is too large."""
    plan = Plan(normalise(ORDER))
    history: list[Record] = [SagaStarted(1, "s-1", "order", plan.content_hash, "", Payload(b""))]
    for attempt in range(1, 3_001):
        at_ms = attempt * 10
        history += [
            AttemptStarted(at_ms, 0, Verb.EXECUTE, 1, attempt, 1),
            AttemptFailed(
                at_ms + 5,
                *(0, Verb.EXECUTE, 1, attempt, Timing(at_ms, at_ms + 4, "UNKNOWN")),
                Failure("UNKNOWN", "words"),
                retry_at_ms=at_ms + 10,
            ),
        ]
    turns = tuple(StoredTurn(n, n, (record,)) for n, record in enumerate(history, start=1))
    loaded = LoadedSaga(1, "s-1", plan.content_hash, turns)
    traces = SagaTraces(Tracing("store-1"), {})
    request = saga_pb2.GetTraceRequest(saga_id="s-1", include_open=True)
    found: list[saga_pb2.GetTraceResponse] = []
    while not found or request.page_token:
        found.append(await traces.page(TracePage.of(request), plan, loaded))
        request.page_token = found[-1].next_page_token
    assert all(page.ByteSize() < 4 * MIB and 0 < page.spans <= MAX_SPANS for page in found)
    spans = spans_of(*found)
    assert len(spans) == 3_002
    assert len({span.span_id for span in spans}) == 3_002


async def test_a_trace_that_nobody_samples_is_there_all_the_same(sagas: Sagas) -> None:
    """The caller's flag says that it is not kept, and a person may want it later."""
    await started(sagas, "s-1", traceparent=CALLER[:-2] + "00")
    [page] = await pages(sagas, "s-1")
    assert (page.trace_id, page.sampled) == ("a" * 32, False)
    assert page.spans == len(spans_of(page)) > 0


async def test_what_is_no_saga_has_no_trace(sagas: Sagas) -> None:
    """As with histories."""
    error = await refused(sagas.GetTrace(saga_pb2.GetTraceRequest(saga_id="nobody")))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SAGA")
    assert error.metadata["saga_id"] == "nobody"


async def test_everything_that_is_wrong_with_a_request_is_said_at_once(sagas: Sagas) -> None:
    """And a token goes with the very same question."""
    wrong = {"saga_id": "ä", "page_size": -1, "page_token": "junk"}
    error = await refused(sagas.GetTrace(saga_pb2.GetTraceRequest(**wrong)))  # type: ignore[arg-type]
    assert set(error.violations) == set(wrong)
    await started(sagas, "s-1")
    token = (
        await sagas.GetTrace(saga_pb2.GetTraceRequest(saga_id="s-1", page_size=1))
    ).next_page_token
    for other in (
        saga_pb2.GetTraceRequest(saga_id="s-2", page_token=token),
        saga_pb2.GetTraceRequest(saga_id="s-1", include_open=True, page_token=token),
    ):
        assert set((await refused(sagas.GetTrace(other))).violations) == {"page_token"}


# -- whose trace a saga joins ----------------------------------------------------------------------


async def traceparent_of(sagas: Sagas, saga_id: str) -> str:
    """The trace context that a saga's start is recorded with."""
    page = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id=saga_id, page_size=1))
    return page.records[0].saga_started.traceparent


async def test_a_start_joins_the_trace_that_it_names(sagas: Sagas, shop: Shop) -> None:
    """The request's own is over the metadata's, and the participant's call carries the trace on."""
    await started(sagas, "both", traceparent=CALLER, metadata=(("traceparent", OTHER),))
    await started(sagas, "one", metadata=(("traceparent", OTHER),))
    assert await traceparent_of(sagas, "both") == CALLER
    assert await traceparent_of(sagas, "one") == OTHER
    traces = {call.saga_id: call.traceparent[3:35] for call in shop.calls}
    assert traces == {"both": "a" * 32, "one": "c" * 32}
    [page] = await pages(sagas, "both")
    assert page.trace_id == "a" * 32
    assert spans_of(page)[0].parent_span_id.hex() == "b" * 16


async def test_by_configuration_a_saga_only_links_to_its_caller(config: Config) -> None:
    """It has a trace of its own then, which names the caller's span."""
    linked = config.model_copy(update={"telemetry": Telemetry(caller_trace="link")})
    async with run_engine(linked, [ORDER]) as engine, amends.Client(engine.address) as client:
        await (await client.start("order", saga_id="s-1", traceparent=CALLER)).result()
        trace = await client.trace("s-1")
    root = next(_spans(TracesData.FromString(trace.traces_data)))
    assert trace.trace_id != "a" * 32
    assert not root.parent_span_id
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in root.links] == [
        ("a" * 32, "b" * 16)
    ]


@pytest.mark.parametrize(
    "wrong",
    ["x", CALLER.upper(), CALLER + "-00", f"00-{'0' * 32}-{'b' * 16}-01", "ff" + CALLER[2:]],
)
async def test_a_traceparent_that_is_none_is_refused(sagas: Sagas, wrong: str) -> None:
    """A caller who names one means it; one of the metadata is left alone, as W3C asks."""
    error = await refused(
        sagas.StartSaga(
            saga_pb2.StartSagaRequest(saga_id="s-1", definition="order", traceparent=wrong)
        )
    )
    assert (error.code, set(error.violations)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        {"traceparent"},
    )
    await started(sagas, "s-1", metadata=(("traceparent", wrong),))
    assert await traceparent_of(sagas, "s-1") == ""


@pytest.mark.parametrize(
    ("header", "stored"),
    [
        ("01" + CALLER[2:], CALLER),
        ("cc" + CALLER[2:-2] + "03-what-comes.later", CALLER),
        ("01" + CALLER[2:-2] + "02", CALLER[:-2] + "00"),
    ],
)
async def test_the_metadatas_version_may_be_a_later_one(
    sagas: Sagas, header: str, stored: str
) -> None:
    """What version 00 has of it counts, as W3C asks; the trace goes on as version 00."""
    await started(sagas, "s-1", metadata=(("traceparent", header),))
    assert await traceparent_of(sagas, "s-1") == stored
    [page] = await pages(sagas, "s-1")
    assert page.trace_id == "a" * 32


async def test_starts_of_a_batch_have_each_their_own(sagas: Sagas) -> None:
    """And where one has none, the request's metadata counts; a wrong one is that item's error."""
    given = {"s-0": CALLER, "s-1": "", "s-2": "nonsense"}
    response = await sagas.StartSagas(
        saga_pb2.StartSagasRequest(
            starts=[
                saga_pb2.StartSagaRequest(saga_id=saga_id, definition="order", traceparent=text)
                for saga_id, text in given.items()
            ]
        ),
        metadata=(("traceparent", OTHER),),
    )
    assert [result.WhichOneof("result") for result in response.results] == [
        "started",
        "started",
        "error",
    ]
    assert await traceparent_of(sagas, "s-0") == CALLER
    assert await traceparent_of(sagas, "s-1") == OTHER
    assert "starts[2].traceparent" in str(response.results[2].error)


async def test_the_same_start_with_another_trace_is_the_same_start(sagas: Sagas) -> None:
    """Whoever repeats a start does so in a span of their own."""
    await started(sagas, "s-1", traceparent=CALLER)
    again = await sagas.StartSaga(
        saga_pb2.StartSagaRequest(saga_id="s-1", definition="order", traceparent=OTHER)
    )
    assert again.existed
    assert again.saga.state == types_pb2.SAGA_STATE_COMPLETED
    assert await traceparent_of(sagas, "s-1") == CALLER
