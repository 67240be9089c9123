"""WaitSaga holds its reply until the end, CancelSaga until it is clear what comes of it."""

import grpc
import pytest

import amends
from amends.v1 import operator_pb2, saga_pb2, types_pb2
from amends_runtime.api import service
from amends_runtime.core.definition import Definition, Kind, Step
from amends_runtime.engine import Engine
from tests.api.refusals import refused
from tests.api.shop import Shop
from tests.api.stubs import Operator, Sagas

TURNED_BACK = saga_pb2.CANCEL_DISPOSITION_TURNED_BACK
ALREADY = saga_pb2.CANCEL_DISPOSITION_ALREADY_TURNED_BACK
WAITS = saga_pb2.CANCEL_DISPOSITION_WAITS_FOR_PIVOT


async def started(sagas: Sagas, saga_id: str = "s-1", definition: str = "order") -> None:
    """Starts a saga and waits for nothing."""
    await sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id=saga_id, definition=definition))


def waiting(timeout_ms: int = 0) -> saga_pb2.WaitSagaRequest:
    """A wait for s-1."""
    return saga_pb2.WaitSagaRequest(saga_id="s-1", timeout_ms=timeout_ms)


def cancelling(**words: str) -> saga_pb2.CancelSagaRequest:
    """A cancellation of s-1."""
    return saga_pb2.CancelSagaRequest(saga_id="s-1", **{"reason": "no longer wanted", **words})


async def facts(sagas: Sagas) -> list[str | None]:
    """The kinds of the records of s-1."""
    page = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s-1"))
    return [record.WhichOneof("fact") for record in page.records]


# -- waiting ---------------------------------------------------------------------------------------


async def test_a_wait_ends_with_the_saga(sagas: Sagas, shop: Shop) -> None:
    """The reply comes with the end, and says that it is one."""
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    call = sagas.WaitSaga(waiting())
    held.let_go.set()
    answer = await call
    assert (answer.ended, answer.saga.state) == (True, types_pb2.SAGA_STATE_COMPLETED)


async def test_a_wait_for_an_ended_saga_answers_at_once(sagas: Sagas) -> None:
    """What has ended is not waited for, however often it is asked."""
    await started(sagas)
    for _ in range(3):
        assert (await sagas.WaitSaga(waiting())).ended


async def test_a_wait_that_is_over_says_so(sagas: Sagas, shop: Shop) -> None:
    """The time is over and the saga is not."""
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    answer = await sagas.WaitSaga(waiting(1))
    assert (answer.ended, answer.saga.state) == (False, types_pb2.SAGA_STATE_RUNNING)


async def test_a_wait_is_over_before_the_callers_deadline(
    sagas: Sagas, shop: Shop, waits_s: list[float]
) -> None:
    """However long it may take: a tenth of the time, or a second, is left for the answer."""
    shop.hold("ship")
    await started(sagas)
    for asked_ms, deadline_s in ((0, 30), (2**63 - 1, 30), (0, 8)):
        answer = await sagas.WaitSaga(waiting(asked_ms), timeout=deadline_s)
        assert (answer.ended, answer.saga.state) == (False, types_pb2.SAGA_STATE_RUNNING)
    for waited_s, most_s in zip(waits_s, (29.5, 29.5, 7.5), strict=True):
        assert 0 < waited_s < most_s


async def test_a_negative_wait_is_refused(sagas: Sagas) -> None:
    """A mistake, not a wish."""
    error = await refused(sagas.WaitSaga(waiting(-1)))
    assert set(error.violations) == {"timeout_ms"}


# -- cancelling ------------------------------------------------------------------------------------


async def test_a_saga_that_still_can_turns_back(sagas: Sagas, shop: Shop) -> None:
    """Before the pivot the request decides; who asked and why is in the history."""
    held = shop.hold("reserve")
    await started(sagas)
    await held.begun.wait()
    answer = await sagas.CancelSaga(cancelling(author="ann", reason="changed her mind"))
    assert answer.disposition == TURNED_BACK
    assert answer.saga.turn.cause == types_pb2.TURN_CAUSE_CANCELLED
    assert answer.saga.turn.error.message == "changed her mind"
    held.let_go.set()
    assert (await sagas.WaitSaga(waiting())).saga.state == types_pb2.SAGA_STATE_COMPENSATED
    page = await sagas.GetHistory(saga_pb2.GetHistoryRequest(saga_id="s-1"))
    (requested,) = [r.cancel_requested for r in page.records if r.HasField("cancel_requested")]
    assert (requested.author, requested.reason) == ("ann", "changed her mind")
    assert [call.verb for call in shop.calls][-1] == amends.Verb.COMPENSATE


async def test_a_saga_that_has_turned_back_is_left_alone(sagas: Sagas, shop: Shop) -> None:
    """The second request changes nothing, while it compensates and when it has ended."""
    held = shop.hold("reserve")
    await started(sagas)
    await held.begun.wait()
    await sagas.CancelSaga(cancelling())
    assert (await sagas.CancelSaga(cancelling())).disposition == ALREADY
    held.let_go.set()
    await sagas.WaitSaga(waiting())
    assert (await sagas.CancelSaga(cancelling())).disposition == ALREADY
    assert (await facts(sagas)).count("cancel_requested") == 1


async def test_the_pivots_done_refuses_the_request(
    sagas: Sagas, shop: Shop, engine: Engine
) -> None:
    """While the pivot is tried the reply is held; it took effect, so the saga goes forward."""
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    call = sagas.CancelSaga(cancelling())
    await engine.supervisor.wait("s-1", 60, lambda saga: saga.cancel_requested)
    assert not call.done()
    held.let_go.set()
    error = await refused(call)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAST_NO_RETURN")
    assert error.preconditions == [("PAST_NO_RETURN", "sagas/s-1")]
    assert error.metadata["saga_id"] == "s-1"
    assert (await sagas.WaitSaga(waiting())).saga.state == types_pb2.SAGA_STATE_COMPLETED


async def test_the_pivots_refusal_grants_the_request(
    sagas: Sagas, shop: Shop, engine: Engine
) -> None:
    """The pivot was refused, the saga turns back: what the caller wanted."""
    held = shop.hold("ship", amends.Rejected("no_truck"))
    await started(sagas)
    await held.begun.wait()
    call = sagas.CancelSaga(cancelling())
    await engine.supervisor.wait("s-1", 60, lambda saga: saga.cancel_requested)
    held.let_go.set()
    answer = await call
    assert answer.disposition == TURNED_BACK
    assert answer.saga.turn.error.reason == "no_truck"


async def test_a_pivot_that_takes_long_is_not_waited_for(
    sagas: Sagas, shop: Shop, waits_s: list[float]
) -> None:
    """Within the caller's deadline the answer is that it is recorded, and the pivot decides."""
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    answer = await sagas.CancelSaga(cancelling(), timeout=8)
    assert (answer.disposition, answer.saga.past_no_return) == (WAITS, True)
    assert 0 < waits_s[0] < 7.5
    assert (await facts(sagas)).count("cancel_requested") == 1


async def test_the_wait_for_a_pivot_has_its_own_bound(
    sagas: Sagas, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller without a deadline is answered, too."""
    monkeypatch.setattr(service, "MAX_CANCEL_WAIT_MS", 1)
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    assert (await sagas.CancelSaga(cancelling())).disposition == WAITS


async def test_a_stuck_pivot_is_not_waited_for(sagas: Sagas, shop: Shop, engine: Engine) -> None:
    """It waits for an operator, who may be asleep: the caller is told that it is recorded."""

    async def broken(call: amends.Call) -> object:
        raise amends.Broken("lost_ledger")

    shop.behaviours["ship"] = broken
    await started(sagas)
    await engine.supervisor.wait("s-1", 60, lambda saga: saga.state.name == "STUCK")
    answer = await sagas.CancelSaga(cancelling())
    assert (answer.disposition, answer.saga.state) == (WAITS, types_pb2.SAGA_STATE_STUCK)


async def test_a_saga_that_is_abandoned_meanwhile_waits_for_no_pivot(
    sagas: Sagas, operator: Operator, shop: Shop, engine: Engine
) -> None:
    """Whoever waits for the pivot's outcome is told the end, and not that it may still turn."""
    held = shop.hold("ship")
    await started(sagas)
    await held.begun.wait()
    call = sagas.CancelSaga(cancelling())
    await engine.supervisor.wait("s-1", 60, lambda saga: saga.cancel_requested)
    await operator.AbandonSaga(
        operator_pb2.AbandonSagaRequest(
            saga_id="s-1", audit=operator_pb2.Audit(author="ada", reason="settled"), force=True
        )
    )
    error = await refused(call)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SAGA_ABANDONED")
    assert error.metadata == {"saga_id": "s-1", "state": "ABANDONED"}


async def test_a_saga_past_its_point_of_no_return_goes_on(sagas: Sagas, shop: Shop) -> None:
    """After the pivot nothing turns it back."""
    held = shop.hold("notify")
    await started(sagas)
    await held.begun.wait()
    error = await refused(sagas.CancelSaga(cancelling()))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAST_NO_RETURN")
    assert error.metadata["state"] == "RUNNING"


async def test_a_saga_that_is_stuck_past_its_point_of_no_return_says_what_helps(
    sagas: Sagas, shop: Shop, engine: Engine
) -> None:
    """It does not go on by itself, so nobody is told that it does."""

    async def broken(call: amends.Call) -> object:
        raise amends.Broken("lost_mailbox")

    shop.behaviours["notify"] = broken
    await started(sagas)
    await engine.supervisor.wait("s-1", 60, lambda saga: saga.state.name == "STUCK")
    error = await refused(sagas.CancelSaga(cancelling()))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAST_NO_RETURN")
    assert error.metadata == {"saga_id": "s-1", "state": "STUCK", "stuck": "notify"}
    assert "stuck at notify" in error.message
    assert "amends retry s-1 --reason WHY" in error.message
    assert "amends abandon s-1 --reason WHY" in error.message
    assert "until they succeed" not in error.message


async def test_without_a_pivot_the_first_retriable_step_is_the_point(
    sagas: Sagas, shop: Shop, engine: Engine
) -> None:
    """There is no outcome to wait for: the request is refused at once."""
    await engine.definitions.register(
        Definition(
            name="letter",
            steps=(Step(name="notify", participant="shop", action="notify", kind=Kind.RETRIABLE),),
        )
    )
    held = shop.hold("notify")
    await started(sagas, definition="letter")
    await held.begun.wait()
    assert (await refused(sagas.CancelSaga(cancelling()))).reason == "PAST_NO_RETURN"


async def test_a_completed_saga_is_not_undone(sagas: Sagas) -> None:
    """The refusal says what to do instead."""
    await started(sagas)
    await sagas.WaitSaga(waiting())
    error = await refused(sagas.CancelSaga(cancelling()))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SAGA_COMPLETED")
    assert error.metadata == {"saga_id": "s-1", "state": "COMPLETED"}
    assert "opposite" in error.message


async def test_words_have_a_limit(sagas: Sagas) -> None:
    """Author and reason land in the history, so they are bounded."""
    error = await refused(sagas.CancelSaga(cancelling(author="a" * 257, reason="r" * 1025)))
    assert set(error.violations) == {"author", "reason"}


@pytest.mark.parametrize("reason", ["", " \n"], ids=["none", "blank"])
async def test_a_cancellation_without_a_reason_is_refused(
    sagas: Sagas, shop: Shop, reason: str
) -> None:
    """It would land in the history and help nobody there; the saga goes on."""
    shop.hold("reserve")
    await started(sagas)
    error = await refused(sagas.CancelSaga(cancelling(reason=reason)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "say why" in error.violations["reason"]
    assert "cancel_requested" not in await facts(sagas)
