"""An order from start to end: completed, refused at each step, its replies lost at each step."""

from __future__ import annotations

import pytest

import amends
from amends import RecordKind, SagaState, StepState
from tests.acceptance.world import World

SERVICE_OF = {
    "place": "orders",
    "charge": "payments",
    "reserve": "inventory",
    "ship": "shipping",
    "confirm": "orders",
    "cancel": "orders",
    "refund": "payments",
    "release": "inventory",
}
STEP_OF = {"cancel": "place", "refund": "charge", "release": "reserve"}
UNDO_OF = {"place": "cancel", "charge": "refund", "reserve": "release"}


async def test_an_order_completes(world: World) -> None:
    """Each of its effects takes place once, in the order of the definition; nothing is undone."""
    started = await world.start()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPLETED
    assert ended.past_no_return
    assert {step.name: step.state for step in ended.steps} == dict.fromkeys(
        ("place", "charge", "reserve", "ship", "confirm"), StepState.EXECUTED
    )
    effects = world.effects(started.saga_id)
    assert sorted(effects[1:3]) == ["charge", "reserve"]
    assert [*effects[:1], *effects[3:]] == ["place", "ship", "confirm"]


async def test_a_start_is_asked_twice_and_happens_once(world: World) -> None:
    """The same id and content finds the saga as it is; with other content it is refused."""
    started = await world.start()
    again = await world.start(saga_id=started.saga_id)

    assert again.existed
    with pytest.raises(amends.AlreadyExists):
        await world.client.start("order", {"sku": "cup"}, saga_id=started.saga_id)

    assert (await world.end(started)).completed
    assert world.effects(started.saga_id).count("charge") == 1


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("place", "shop_closed"),
        ("charge", "card_declined"),
        ("reserve", "out_of_stock"),
        ("ship", "undeliverable"),
    ],
)
async def test_a_step_is_refused(world: World, refused: str, reason: str) -> None:
    """Everything that took effect before is undone in reverse order; the refused step never ran."""
    world.switch(**{SERVICE_OF[refused]: {refused: {"decline": {"next": 1}}}})
    started = await world.start()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert ended.turn.cause is amends.Cause.REJECTED
    assert ended.turn.step == refused
    assert ended.turn.failure is not None
    assert ended.turn.failure.reason == reason
    assert ended.step(refused).state is StepState.REJECTED
    assert_undone(world.effects(started.saga_id), never=refused)


async def test_a_refusal_after_the_point_of_no_return_is_shown(world: World) -> None:
    """What must succeed and is refused needs a person: the saga is STUCK and says why."""
    world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await world.start()
    world.may_be_stuck.add(started.saga_id)

    await world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")

    saga = await started.get()
    assert saga.state is SagaState.STUCK
    assert not saga.ended
    confirm = saga.step("confirm")
    assert confirm.state is StepState.STUCK
    assert confirm.stuck_since_ms is not None
    assert confirm.last_error is not None
    assert confirm.last_error.reason == "shop_closed"
    assert "ship" in world.effects(started.saga_id)
    assert not set(world.effects(started.saga_id)) & set(UNDO_OF.values())
    stuck = [each.saga_id async for each in world.client.list(state=SagaState.STUCK)]
    assert started.saga_id in stuck
    with pytest.raises(amends.WrongState):
        await started.cancel(reason="tired of waiting", author="customer")


@pytest.mark.parametrize("step", ["place", "charge", "reserve", "ship", "confirm"])
async def test_a_reply_is_lost_after_the_effect(world: World, step: str) -> None:
    """It is asked again under the same key and answered from the barrier: one effect, two tries."""
    world.switch(**{SERVICE_OF[step]: {step: {"lose_reply": {"next": 1}}}})
    started = await world.start()

    ended = await world.end(started)

    assert ended.completed
    assert world.effects(started.saga_id).count(step) == 1
    assert ended.step(step).attempt == 2
    (failed,) = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED)
    assert (failed.step, failed.attempt) == (step, 1)
    assert failed.timing is not None
    assert failed.timing.status == "UNAVAILABLE"
    (executed,) = await world.records(started.saga_id, RecordKind.STEP_EXECUTED, step)
    assert executed.attempt == 2


@pytest.mark.parametrize("undoing", ["cancel", "refund", "release"])
async def test_a_reply_is_lost_after_an_undoing(world: World, undoing: str) -> None:
    """It is undone once all the same."""
    world.switch(
        shipping={"ship": {"decline": {"next": 1}}},
        **{SERVICE_OF[undoing]: {undoing: {"lose_reply": {"next": 1}}}},
    )
    started = await world.start()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert_undone(world.effects(started.saga_id), never="ship")
    assert ended.step(STEP_OF[undoing]).attempt == 2


async def test_a_refusal_whose_reply_is_lost_stays_a_refusal(world: World) -> None:
    """The barrier keeps the refusal: the second try hears it, although the fault has passed."""
    world.switch(
        payments={"charge": {"decline": {"next": 1}, "lose_reply": {"next": 1}}},
    )
    started = await world.start()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert ended.turn.failure is not None
    assert ended.turn.failure.reason == "card_declined"
    assert "charge" not in world.effects(started.saga_id)
    assert_undone(world.effects(started.saga_id), never="charge")


async def test_a_compensation_fails_for_a_while(world: World) -> None:
    """It is tried until it succeeds, every try can be seen, and the money is back once."""
    world.switch(
        shipping={"ship": {"decline": {"next": 1}}},
        payments={"refund": {"fail_before": {"next": 4}}},
    )
    started = await world.start()

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    failed = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED, "charge")
    assert [(record.verb, record.attempt) for record in failed] == [
        (amends.Verb.COMPENSATE, attempt) for attempt in range(1, 5)
    ]
    assert world.effects(started.saga_id).count("refund") == 1
    assert_undone(world.effects(started.saga_id), never="ship")


async def test_retries_are_given_up_and_the_step_is_undone_too(world: World) -> None:
    """Nobody knows whether it ran, and it did: it is compensated like everything before it."""
    await world.client.register(
        amends.Definition("order-in-haste")
        .step("place", "orders", "place")
        .step(
            "charge",
            "payments",
            "charge",
            retry=amends.Retry(first_s=0.01, max_s=0.02, give_up_after_s=0.03),
        )
    )
    world.switch(payments={"charge": {"lose_reply": 1}})
    started = await world.start("order-in-haste")

    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    assert ended.turn is not None
    assert (ended.turn.cause, ended.turn.step) == (amends.Cause.GAVE_UP, "charge")
    assert world.effects(started.saga_id) == ["place", "charge", "refund", "cancel"]


def assert_undone(effects: list[str], *, never: str) -> None:
    """All that took effect was undone, once, `place` last; `never` took no effect."""
    done = [effect for effect in effects if effect in UNDO_OF]
    undone = [effect for effect in effects if effect in STEP_OF]
    assert effects == done + undone
    assert never not in effects
    assert len(set(done)) == len(done)
    assert sorted(undone) == sorted(UNDO_OF[effect] for effect in done)
    # charge and reserve come in no order; place comes before both, and is undone after both.
    if done:
        assert (done[0], undone[-1]) == ("place", "cancel")
