"""What happens to orders that cannot go on: participants that are down or slow, deadlines, cancels.

"Down" is a service that does not listen; its breaker opens, and orders wait in its lane. Nothing is
undone because of that, only because of a deadline or a person.
"""

from __future__ import annotations

import asyncio
import time

import pytest

import amends
from amends import BreakerState, CancelDisposition, RecordKind, SagaState, StepState
from tests.acceptance.world import PATIENCE_S, World, until


async def test_a_participant_is_down_and_comes_back(world: World) -> None:
    """Its breaker opens; orders wait, and nothing is undone; when it is back they complete."""
    await world.take_down("shipping")
    started = [await world.start() for _ in range(5)]

    await world.wait_breaker("shipping", BreakerState.OPEN)
    breaker = await world.breaker("shipping")
    assert breaker.consecutive_failures >= 3
    assert not breaker.held

    async def all_wait() -> bool:
        lane = next(p for p in await world.client.participants() if p.name == "shipping")
        sagas = [await saga.get() for saga in started]
        return lane.calls_waiting > 0 and all(saga.past_no_return for saga in sagas)

    await until(all_wait, "all orders to have come as far as shipping")
    for saga in started:
        seen = await saga.get()
        assert seen.state is SagaState.RUNNING
        assert seen.step("ship").state is StepState.EXECUTING
        assert sorted(world.effects(saga.saga_id)) == ["charge", "place", "reserve"]
    others = {b.participant: b.state for b in await world.client.breakers()}
    assert others["payments"] is BreakerState.CLOSED

    world.switch()
    for saga in started:
        assert (await world.end(saga)).completed
        assert world.effects(saga.saga_id).count("ship") == 1
    await world.wait_breaker("shipping", BreakerState.CLOSED)


async def test_the_deadline_passes_while_a_participant_is_down(world: World) -> None:
    """The order turns back; what may have run is undone once the participant is back."""
    await world.take_down("payments")
    started = await world.start(deadline_s=2)

    await world.wait_record(started.saga_id, RecordKind.SAGA_TURNED_BACK)
    saga = await started.get()
    assert saga.turn is not None
    assert saga.turn.cause is amends.Cause.DEADLINE

    world.switch()
    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    effects = world.effects(started.saga_id)
    assert "ship" not in effects
    assert effects.count("charge") == effects.count("refund")
    assert effects[-1] == "cancel"


async def test_the_deadline_passes_while_a_participant_is_slow(world: World) -> None:
    """The call in flight is waited for, and what it did is undone."""
    # An order's own calls have no longer than a deadline that can be reached in time.
    await world.client.register(
        amends.Definition("order-with-time")
        .step("place", "orders", "place")
        .step("charge", "payments", "charge", timeout_s=PATIENCE_S)
        .step("reserve", "inventory", "reserve", after=["place"])
    )
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start("order-with-time", deadline_s=3)
    await world.wait_strike("payments", "charge hold", after=struck)
    await world.wait_record(started.saga_id, RecordKind.SAGA_TURNED_BACK)
    world.switch()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert ended.turn.cause is amends.Cause.DEADLINE
    effects = world.effects(started.saga_id)
    assert sorted(effects) == sorted(["place", "charge", "reserve", "refund", "release", "cancel"])
    assert effects.index("charge") < effects.index("refund") < effects.index("cancel")


async def test_the_deadline_does_not_strike_past_the_point_of_no_return(world: World) -> None:
    """From the pivot's first attempt on, its outcome decides and the clock does not."""
    world.switch(shipping={"ship": {"hold": {"next": 1}}})
    struck = world.strikes("shipping", "ship hold")
    started = await world.start(deadline_s=2)
    await world.wait_strike("shipping", "ship hold", after=struck)
    deadline_at_ms = started.saga.deadline_at_ms
    assert deadline_at_ms is not None
    await until(lambda: time.time_ns() // 1_000_000 > deadline_at_ms, "the deadline to pass")
    world.switch()

    ended = await world.end(started)

    assert ended.completed
    assert ended.deadline_at_ms is not None
    assert ended.ended_at_ms is not None
    assert ended.ended_at_ms > ended.deadline_at_ms


async def test_an_order_is_cancelled_while_it_runs(world: World) -> None:
    """It turns back, durably and once; asked again it says that it has."""
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)

    cancelled = await started.cancel(reason="found it cheaper", author="customer-07")
    again = await started.cancel(reason="found it cheaper", author="customer-07")
    world.switch()
    ended = await world.end(started)

    assert cancelled.disposition is CancelDisposition.TURNED_BACK
    assert again.disposition is CancelDisposition.ALREADY_TURNED_BACK
    assert ended.state is SagaState.COMPENSATED
    (requested,) = await world.records(started.saga_id, RecordKind.CANCEL_REQUESTED)
    assert (requested.author, requested.reason) == ("customer-07", "found it cheaper")
    effects = world.effects(started.saga_id)
    assert effects.count("charge") == effects.count("refund") == 1
    assert effects[-1] == "cancel"


async def test_an_order_is_cancelled_before_its_call_could_leave(world: World) -> None:
    """What only waited in the lane is taken out of it; nothing was charged, nothing is refunded."""
    await world.take_down("payments")
    first = await world.start()
    await world.wait_breaker("payments", BreakerState.OPEN)
    started = await world.start()
    await world.wait_record(started.saga_id, RecordKind.ATTEMPT_STARTED, "charge")

    await started.cancel(reason="no patience", author="customer-07")
    await world.wait_record(started.saga_id, RecordKind.SAGA_TURNED_BACK)
    world.switch()

    assert (await world.end(started)).state is SagaState.COMPENSATED
    effects = world.effects(started.saga_id)
    assert not {"charge", "refund", "ship"} & set(effects)
    assert (await world.end(first)).completed


async def test_an_order_is_cancelled_while_the_pivot_is_tried_and_refused(world: World) -> None:
    """The request is written down; its answer waits for the pivot's outcome, which turns back."""
    world.switch(shipping={"ship": {"hold": {"next": 1}}})
    struck = world.strikes("shipping", "ship hold")
    started = await world.start()
    await world.wait_strike("shipping", "ship hold", after=struck)

    cancelling = asyncio.create_task(started.cancel(reason="second thoughts", author="customer-07"))
    await world.wait_record(started.saga_id, RecordKind.CANCEL_REQUESTED)
    world.switch(shipping={"ship": {"decline": {"next": 1}}})
    cancelled = await cancelling
    ended = await world.end(started)

    assert cancelled.disposition is CancelDisposition.TURNED_BACK
    assert ended.state is SagaState.COMPENSATED
    assert "ship" not in world.effects(started.saga_id)
    assert len(await world.records(started.saga_id, RecordKind.CANCEL_REQUESTED)) == 1


async def test_an_order_is_cancelled_while_the_pivot_is_tried_and_done(world: World) -> None:
    """The pivot's outcome decides: it went through, so the request is refused in the end."""
    world.switch(shipping={"ship": {"hold": {"next": 1}}})
    struck = world.strikes("shipping", "ship hold")
    started = await world.start()
    await world.wait_strike("shipping", "ship hold", after=struck)

    cancelling = asyncio.create_task(started.cancel(reason="second thoughts", author="customer-07"))
    await world.wait_record(started.saga_id, RecordKind.CANCEL_REQUESTED)
    world.switch()
    with pytest.raises(amends.WrongState) as refused:
        await cancelling
    ended = await world.end(started)

    assert refused.value.reason == "PAST_NO_RETURN"
    assert ended.completed
    assert world.effects(started.saga_id).count("ship") == 1
    assert len(await world.records(started.saga_id, RecordKind.CANCEL_REQUESTED)) == 1


async def test_an_order_is_cancelled_while_the_pivot_cannot_be_tried(world: World) -> None:
    """Nobody can tell yet, and the answer says so; the request stays, and the outcome decides."""
    await world.take_down("shipping")
    started = await world.start()
    await world.wait_record(started.saga_id, RecordKind.ATTEMPT_STARTED, "ship")

    cancelled = await world.client.cancel(
        started.saga_id, reason="second thoughts", author="customer-07", timeout_s=5
    )
    assert cancelled.disposition is CancelDisposition.WAITS_FOR_PIVOT
    assert (await started.get()).state is SagaState.RUNNING

    world.switch()
    assert (await world.end(started)).completed


async def test_an_order_is_cancelled_after_its_end(world: World) -> None:
    """A completed order cannot be cancelled; one that was undone already says so."""
    completed = await world.start()
    refused = await world.start(card="declined")
    assert (await world.end(completed)).completed
    assert (await world.end(refused)).state is SagaState.COMPENSATED

    with pytest.raises(amends.WrongState):
        await completed.cancel(reason="too late", author="customer-07")
    answer = await refused.cancel(reason="too late", author="customer-07")

    assert answer.disposition is CancelDisposition.ALREADY_TURNED_BACK
    assert (await completed.get()).completed
    with pytest.raises(amends.NotFound):
        await world.client.cancel("nobody-knows-me", reason="none", author="nobody")
