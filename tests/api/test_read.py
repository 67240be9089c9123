"""GetSaga, ListSagas, GetHistory: the truth, in pages."""

import grpc
import pytest

import amends
from amends.v1 import saga_pb2, types_pb2
from tests.api.refusals import refused
from tests.api.shop import Shop
from tests.api.stubs import Sagas

MIB = 1024 * 1024


async def started(sagas: Sagas, *saga_ids: str, wait_ms: int = 60_000, **labels: str) -> None:
    """Starts sagas, one after another."""
    for saga_id in saga_ids:
        await sagas.StartSaga(
            saga_pb2.StartSagaRequest(
                saga_id=saga_id, definition="order", wait_ms=wait_ms, labels=labels
            )
        )


def listing(page_size: int = 0, token: str = "", **conditions: object) -> saga_pb2.ListSagasRequest:
    """A request for a page of sagas."""
    return saga_pb2.ListSagasRequest(
        filter=saga_pb2.SagaFilter(**conditions),  # type: ignore[arg-type]
        page_size=page_size,
        page_token=token,
    )


def ids(response: saga_pb2.ListSagasResponse) -> list[str]:
    """The ids of a page."""
    return [saga.saga_id for saga in response.sagas]


# -- one saga --------------------------------------------------------------------------------------


async def test_an_unknown_saga_is_not_found(sagas: Sagas) -> None:
    """The error names the id that was asked for."""
    for call in (
        sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="nobody")),
        sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="nobody")),
        sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="nobody")),
        sagas.CancelSaga(saga_pb2.CancelSagaRequest(saga_id="nobody", reason="x")),
        sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="parent/step")),
    ):
        error = await refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SAGA")
        assert error.metadata["saga_id"] in {"nobody", "parent/step"}


@pytest.mark.parametrize("saga_id", ["", "ä", "a b", "x" * 400], ids=["none", "ä", "space", "long"])
async def test_an_id_that_cannot_be_is_refused(sagas: Sagas, saga_id: str) -> None:
    """No store is asked for it."""
    for call in (
        sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id=saga_id)),
        sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id=saga_id)),
        sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id=saga_id)),
        sagas.CancelSaga(saga_pb2.CancelSagaRequest(saga_id=saga_id, reason="x")),
    ):
        error = await refused(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(error.violations) == {"saga_id"}


# -- lists -----------------------------------------------------------------------------------------


async def test_a_list_shows_what_was_just_started(sagas: Sagas, shop: Shop) -> None:
    """Newest first, never stale, without steps and payloads."""
    shop.hold("reserve")
    for number in range(5):
        await started(sagas, f"s-{number}", wait_ms=0)
        assert ids(await sagas.ListSagas(listing()))[0] == f"s-{number}"
    page = await sagas.ListSagas(listing())
    assert ids(page) == ["s-4", "s-3", "s-2", "s-1", "s-0"]
    assert not page.next_page_token
    assert {saga.state for saga in page.sagas} == {types_pb2.SAGA_STATE_RUNNING}
    assert not any(saga.steps or saga.HasField("input") for saga in page.sagas)


async def test_pages_are_stable_while_sagas_come(sagas: Sagas) -> None:
    """Every saga of the first question comes once, whatever was started in between."""
    await started(sagas, *(f"s-{number}" for number in range(7)))
    seen: list[str] = []
    token = ""
    while True:
        page = await sagas.ListSagas(listing(page_size=3, token=token))
        seen += ids(page)
        token = page.next_page_token
        if not token:
            break
        await started(sagas, f"new-{len(seen)}")
    assert seen == [f"s-{number}" for number in reversed(range(7))]


async def test_a_last_page_that_is_full_has_no_token(sagas: Sagas) -> None:
    """A client that follows tokens never gets an empty page."""
    await started(sagas, "s-0", "s-1")
    page = await sagas.ListSagas(listing(page_size=2))
    assert (len(page.sagas), page.next_page_token) == (2, "")


async def test_filters_must_all_hold(sagas: Sagas, shop: Shop) -> None:
    """State, definition, labels and times; none of them is "any"."""
    await started(sagas, "done", tier="gold", region="eu")
    shop.hold("reserve")
    await started(sagas, "running", wait_ms=0, tier="gold")
    running = types_pb2.SAGA_STATE_RUNNING
    now_ms = (await sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="running"))).saga.started_at_ms
    for expected, conditions in (
        (["running"], {"states": [running]}),
        (["running", "done"], {"states": [running, types_pb2.SAGA_STATE_UNSPECIFIED]}),
        (["running", "done"], {"labels": {"tier": "gold"}, "definition": "order"}),
        (["done"], {"labels": {"tier": "gold", "region": "eu"}}),
        ([], {"states": [running], "labels": {"region": "eu"}}),
        ([], {"definition": "other"}),
        ([], {"started_from_ms": now_ms + 1}),
        (["running", "done"], {"started_from_ms": 1, "started_before_ms": now_ms + 1}),
    ):
        assert ids(await sagas.ListSagas(listing(**conditions))) == expected, conditions


async def test_a_token_belongs_to_its_filter(sagas: Sagas) -> None:
    """Equal filters share it, in any order; another filter or method, and junk, is refused."""
    await started(sagas, "s-0", "s-1", "s-2", a="1", b="2")
    states = [types_pb2.SAGA_STATE_COMPLETED, types_pb2.SAGA_STATE_STUCK]
    page = await sagas.ListSagas(listing(1, states=states, labels={"a": "1", "b": "2"}))
    token = page.next_page_token
    same = await sagas.ListSagas(
        listing(1, token, states=[*reversed(states)] * 2, labels={"b": "2", "a": "1"})
    )
    assert ids(same) == ["s-1"]
    for call in (
        sagas.ListSagas(listing(1, token)),
        sagas.ListSagas(listing(1, token, states=states)),
        sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s-0", page_token=token)),
        sagas.ListSagas(listing(1, "junk")),
        sagas.ListSagas(listing(1, "ä" * 2_000)),
        sagas.ListSagas(listing(1, token[:-2])),
    ):
        error = await refused(call)
        assert (error.code, set(error.violations)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            {"page_token"},
        )


async def test_everything_that_is_wrong_with_a_listing_is_said_at_once(sagas: Sagas) -> None:
    """Times, states, labels, name, size and token."""
    error = await refused(
        sagas.ListSagas(
            listing(
                -1,
                "junk",
                states=[99],
                definition="No Name",
                started_from_ms=20,
                started_before_ms=10,
                labels={"BAD": "x"},
            )
        )
    )
    assert set(error.violations) == {
        "page_size",
        "page_token",
        "filter.states",
        "filter.definition",
        "filter.started_before_ms",
        "filter.labels['BAD']",
    }
    assert "SAGA_STATE_STUCK" in error.violations["filter.states"]


async def test_a_page_larger_than_the_largest_is_the_largest(sagas: Sagas) -> None:
    """Whoever asks for all gets as many as there may be."""
    await started(sagas, "s-0")
    assert ids(await sagas.ListSagas(listing(2**31 - 1))) == ["s-0"]


# -- histories -------------------------------------------------------------------------------------


async def history(sagas: Sagas, saga_id: str, page_size: int) -> list[types_pb2.Record]:
    """All records of a saga, page by page."""
    records: list[types_pb2.Record] = []
    token = ""
    while True:
        page = await sagas.GetHistory(
            saga_pb2.GetHistoryRequest(saga_id=saga_id, page_size=page_size, page_token=token)
        )
        records += page.records
        token = page.next_page_token
        if not token:
            return records


async def test_a_history_tells_everything_in_order(sagas: Sagas) -> None:
    """From the start to the end, each turn with its version; the same by small and large pages."""
    await started(sagas, "other", "s-1")
    records = await history(sagas, "s-1", 0)
    assert [record.WhichOneof("fact") for record in records] == [
        "saga_started",
        *["attempt_started", "step_executed"] * 3,
        "saga_ended",
    ]
    assert records == await history(sagas, "s-1", 1)
    assert records == await history(sagas, "s-1", 3)
    versions = [record.version for record in records]
    assert versions == sorted(versions)
    assert versions[0] == 1
    seqs = [record.seq for record in records]
    assert seqs == sorted(seqs)
    executed = records[2].step_executed
    assert (executed.key.step, executed.timing.status) == ("reserve", "OK")
    assert executed.timing.sent_at_ms <= executed.timing.answered_at_ms


async def test_a_history_can_be_read_while_it_grows(sagas: Sagas, shop: Shop) -> None:
    """A token of a running saga goes on where its page ended."""
    held = shop.hold("ship")
    await started(sagas, "s-1", wait_ms=0)
    await held.begun.wait()
    first = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s-1", page_size=2))
    held.let_go.set()
    await sagas.WaitSaga(saga_pb2.WaitSagaRequest(saga_id="s-1"))
    rest = await sagas.GetHistory(
        saga_pb2.GetHistoryRequest(saga_id="s-1", page_token=first.next_page_token)
    )
    assert [*first.records, *rest.records] == await history(sagas, "s-1", 0)


async def test_a_history_of_large_payloads_comes_in_pages_that_fit(
    sagas: Sagas, shop: Shop
) -> None:
    """Three mebibytes of payloads never make a message that a client does not take."""

    async def large(call: object) -> object:
        return amends.Payload(bytes(MIB))

    shop.behaviours["reserve"] = shop.behaviours["ship"] = large
    await sagas.StartSaga(
        saga_pb2.StartSagaRequest(
            saga_id="s-1",
            definition="order",
            input=types_pb2.Payload(data=bytes(MIB)),
            wait_ms=60_000,
        )
    )
    saga = (await sagas.GetSaga(saga_pb2.GetSagaRequest(saga_id="s-1"))).saga
    assert saga.state == types_pb2.SAGA_STATE_COMPLETED
    first = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s-1"))
    assert first.ByteSize() <= 4 * MIB
    assert first.next_page_token
    records = await history(sagas, "s-1", 0)
    assert records[-1].HasField("saga_ended")
    assert sum(len(record.step_executed.result.data) for record in records) == 2 * MIB
