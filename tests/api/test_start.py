"""StartSaga: durable, idempotent by id and content, and strict about what it takes."""

import uuid

import grpc
import grpc.aio
import pytest

from amends.v1 import saga_pb2, saga_pb2_grpc, types_pb2
from amends_runtime.config import Config, Limits
from amends_runtime.engine import Engine, run_engine
from tests.api.refusals import refused
from tests.api.shop import ORDER, Shop
from tests.api.stubs import Sagas

MIB = 1024 * 1024


def start(**fields: object) -> saga_pb2.StartSagaRequest:
    """A start of `order` with the id s-1, unless said otherwise."""
    return saga_pb2.StartSagaRequest(**{"saga_id": "s-1", "definition": "order", **fields})  # type: ignore[arg-type]


async def test_a_start_with_a_wait_answers_with_the_end(sagas: Sagas, shop: Shop) -> None:
    """The reply is held until the saga has ended; it has its steps, its input, and no error."""
    payload = types_pb2.Payload(data=b"{}", content_type="application/json")
    answer = await sagas.StartSaga(start(input=payload, labels={"tier": "gold"}, wait_ms=60_000))
    assert (answer.ended, answer.existed) == (True, False)
    assert answer.saga.state == types_pb2.SAGA_STATE_COMPLETED
    assert answer.saga.input == payload
    assert dict(answer.saga.labels) == {"tier": "gold"}
    assert [(step.name, step.state) for step in answer.saga.steps] == [
        (name, types_pb2.STEP_STATE_EXECUTED) for name in ("reserve", "ship", "notify")
    ]
    assert [call.action for call in shop.calls] == ["reserve", "ship", "notify"]


async def test_a_start_without_a_wait_answers_at_once(sagas: Sagas, shop: Shop) -> None:
    """The saga is durable and under way; what its steps take is not waited for."""
    shop.hold("reserve")
    answer = await sagas.StartSaga(start())
    assert (answer.ended, answer.saga.state) == (False, types_pb2.SAGA_STATE_RUNNING)
    assert (await sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="s-1"))).saga.version >= 1


async def test_the_same_start_again_is_the_same_saga(sagas: Sagas, shop: Shop) -> None:
    """Whoever lost a reply asks again, with another wait and trace, and nothing runs twice."""
    await sagas.StartSaga(start(labels={"a": "1", "b": "2"}, wait_ms=60_000))
    again = await sagas.StartSaga(
        start(labels={"b": "2", "a": "1"}, wait_ms=1),
        metadata=(("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"),),
    )
    assert (again.existed, again.ended) == (True, True)
    assert len(shop.calls) == 3


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"input": types_pb2.Payload(data=b"x")}, id="input"),
        pytest.param({"input": types_pb2.Payload(content_type="x")}, id="content type"),
        pytest.param({"labels": {"a": "1"}}, id="labels"),
        pytest.param({"deadline_ms": 60_000}, id="deadline"),
    ],
)
async def test_the_same_id_with_other_content_is_refused(
    sagas: Sagas, other: dict[str, object]
) -> None:
    """The id is taken: the saga that has it goes on unchanged, and the caller is told of it."""
    await sagas.StartSaga(start(wait_ms=60_000))
    error = await refused(sagas.StartSaga(start(**other)))
    assert error.code is grpc.StatusCode.ALREADY_EXISTS
    assert (error.reason, error.domain) == ("SAGA_EXISTS_WITH_OTHER_CONTENT", "amends")
    assert error.metadata["saga_id"] == "s-1"
    assert "another id" in error.message
    saga = (await sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="s-1"))).saga
    assert not saga.labels
    assert not saga.input.data


async def test_without_an_id_the_runtime_makes_one(sagas: Sagas) -> None:
    """It is a UUIDv7, and each such start is another saga."""
    answers = [await sagas.StartSaga(start(saga_id="")) for _ in range(2)]
    ids = [uuid.UUID(answer.saga.saga_id) for answer in answers]
    assert ids[0] != ids[1]
    assert {made.version for made in ids} == {7}
    assert {made.variant for made in ids} == {uuid.RFC_4122}


async def test_the_saga_is_pinned_to_the_version_that_was_named(
    sagas: Sagas, engine: Engine
) -> None:
    """A content hash picks the version; one that nobody registered is NOT_FOUND."""
    registered = engine.definitions.find("order")
    named = await sagas.StartSaga(start(definition_hash=registered.content_hash))
    assert named.saga.definition_hash == registered.content_hash
    error = await refused(sagas.StartSaga(start(saga_id="s-2", definition_hash="0" * 64)))
    assert (error.code, error.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "UNKNOWN_DEFINITION_VERSION",
    )


async def test_an_unknown_definition_is_not_found_with_a_suggestion(sagas: Sagas) -> None:
    """A misspelt name is answered with the one that was probably meant."""
    error = await refused(sagas.StartSaga(start(definition="ordre")))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_DEFINITION")
    assert "did you mean 'order'?" in error.message
    await nothing_is_stored(sagas)


async def nothing_is_stored(sagas: Sagas) -> None:
    """No saga exists."""
    assert not (await sagas.ListSagas(saga_pb2.ListSagasRequest())).sagas


@pytest.mark.parametrize("content_type", ["a\nb", "a\x1b[2J", "té/xt"])
async def test_a_content_type_is_a_line_of_ascii(sagas: Sagas, content_type: str) -> None:
    """It is printed and sent on as it is; what could drive a terminal is refused, written out."""
    payload = types_pb2.Payload(data=b"{}", content_type=content_type)
    error = await refused(sagas.StartSaga(start(input=payload)))
    assert list(error.violations) == ["input.content_type"]
    assert "printable ASCII" in error.violations["input.content_type"]
    assert error.violations["input.content_type"].isprintable()


async def test_everything_that_is_wrong_is_said_at_once(sagas: Sagas, shop: Shop) -> None:
    """Every field has its violation, each with the mend, and nothing is stored or called."""
    error = await refused(
        sagas.StartSaga(
            start(
                saga_id="a/b",
                definition="No Name",
                definition_hash="XYZ",
                input=types_pb2.Payload(data=b"?" * (MIB + 1), content_type="t" * 257),
                labels={"Bad Key": "1", "fine": "ä" * 200},
                deadline_ms=-1,
                wait_ms=-2,
            )
        )
    )
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    )
    assert set(error.violations) == {
        "saga_id",
        "definition",
        "definition_hash",
        "input.data",
        "input.content_type",
        "labels['Bad Key']",
        "labels['fine']",
        "deadline_ms",
        "wait_ms",
    }
    assert error.metadata["violations"] == "9"
    assert "reserved" in error.violations["saga_id"] or "kept" in error.violations["saga_id"]
    assert error.violations["input.data"].startswith(f"{MIB + 1} bytes, and {MIB} are the most")
    assert "payload_bytes" in error.violations["input.data"]
    assert "400 bytes, and 256" in error.violations["labels['fine']"]
    assert "-1" in error.violations["deadline_ms"]
    assert "saga_id:" in error.message
    assert "??" not in error.message
    await nothing_is_stored(sagas)
    assert not shop.calls


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        pytest.param({"saga_id": "x" * 129}, "saga_id", "129 bytes", id="long id"),
        pytest.param({"saga_id": "größe"}, "saga_id", "not a saga id", id="umlaut"),
        pytest.param({"saga_id": "a b"}, "saga_id", "not a saga id", id="space"),
        pytest.param({"saga_id": "a\n"}, "saga_id", "not a saga id", id="line break"),
        pytest.param({"definition": ""}, "definition", "missing", id="no definition"),
        pytest.param(
            {"labels": {f"k{n}": "" for n in range(17)}}, "labels", "17 labels", id="many labels"
        ),
        pytest.param({"labels": {"": "v"}}, "labels['']", "label's key", id="empty key"),
        pytest.param(
            {"deadline_ms": 2**63 - 1}, "deadline_ms", "out of range", id="deadline without end"
        ),
    ],
)
async def test_each_limit_names_itself(
    sagas: Sagas, fields: dict[str, object], field: str, words: str
) -> None:
    """What is wrong, where, and by how much; nothing is stored."""
    error = await refused(sagas.StartSaga(start(**fields)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(error.violations) == {field}
    assert words in error.violations[field]
    await nothing_is_stored(sagas)


async def test_what_is_just_within_the_limits_is_taken(sagas: Sagas, shop: Shop) -> None:
    """The longest id, the largest payload and all labels arrive unchanged at the participant."""
    answer = await sagas.StartSaga(
        start(
            saga_id="Az0._:-" + "x" * 121,
            input=types_pb2.Payload(data=bytes(MIB), content_type="t" * 256),
            labels={f"k{n}" + "x" * 60: "v" * 256 for n in range(16)},
            wait_ms=60_000,
        )
    )
    assert answer.saga.state == types_pb2.SAGA_STATE_COMPLETED
    assert len(answer.saga.labels) == 16
    assert all(len(call.input) == MIB for call in shop.calls)


async def test_a_request_beyond_the_servers_limit_is_refused_by_grpc(sagas: Sagas) -> None:
    """More than 16 MiB never reach a handler."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await sagas.StartSaga(start(input=types_pb2.Payload(data=bytes(16 * MIB))))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await nothing_is_stored(sagas)


async def test_the_callers_trace_reaches_the_participant(sagas: Sagas, shop: Shop) -> None:
    """The calls belong to the trace of whoever started the saga."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    await sagas.StartSaga(
        start(wait_ms=60_000), metadata=(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
    )
    assert {call.traceparent[3:35] for call in shop.calls} == {trace}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("nonsense", id="nonsense"),
        pytest.param(f"00-{'0' * 32}-{'2' * 16}-01", id="the zero trace"),
        pytest.param(f"00-{'1' * 32}-{'0' * 16}-01", id="the zero span"),
        pytest.param(f"ff-{'1' * 32}-{'2' * 16}-01", id="the forbidden version"),
        pytest.param(f"00-{'1' * 32}-{'2' * 16}-01-more", id="too long"),
    ],
)
async def test_a_trace_context_that_is_none_is_ignored(
    sagas: Sagas, shop: Shop, header: str
) -> None:
    """As W3C asks: the saga starts all the same, with a trace of its own."""
    answer = await sagas.StartSaga(start(wait_ms=60_000), metadata=(("traceparent", header),))
    assert answer.saga.state == types_pb2.SAGA_STATE_COMPLETED
    (trace,) = {call.traceparent[3:35] for call in shop.calls}
    assert trace not in header


async def test_a_wait_ends_before_the_callers_own_deadline(
    sagas: Sagas, shop: Shop, waits_s: list[float]
) -> None:
    """A caller with a short deadline gets the saga as it stands, not DEADLINE_EXCEEDED."""
    shop.hold("reserve")
    answer = await sagas.StartSaga(start(wait_ms=60_000), timeout=8)
    assert (answer.ended, answer.saga.state) == (False, types_pb2.SAGA_STATE_RUNNING)
    assert 0 < waits_s[0] < 7.5


async def test_a_start_whose_client_leaves_happens_all_the_same(sagas: Sagas, shop: Shop) -> None:
    """The saga runs in no handler, so nobody's leaving stops it."""
    held = shop.hold("reserve")
    call = sagas.StartSaga(start(wait_ms=60_000))
    await held.begun.wait()
    call.cancel()
    held.let_go.set()
    ended = await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
    assert ended.saga.state == types_pb2.SAGA_STATE_COMPLETED


async def test_a_runtime_that_is_full_says_when_to_come_back(config: Config, shop: Shop) -> None:
    """A limit that is reached refuses a start before anything is done; later it is taken."""
    full = config.model_copy(update={"limits": Limits(live_sagas=1)})
    async with (
        run_engine(full, [ORDER]) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):
        sagas = saga_pb2_grpc.SagaServiceStub(channel)
        held = shop.hold("reserve")
        await sagas.StartSaga(start())
        error = await refused(sagas.StartSaga(start(saga_id="s-2")))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_ms is not None
        assert error.retry_after_ms > 0
        await held.begun.wait()
        held.let_go.set()
        await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
        listed = await sagas.ListSagas(saga_pb2.ListSagasRequest())
        assert [saga.saga_id for saga in listed.sagas] == ["s-1"]
        assert (await sagas.StartSaga(start(saga_id="s-2", wait_ms=60_000))).ended
