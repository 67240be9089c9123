"""What the four services do and refuse, behind their barriers, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import amends
from shop.audit import audit, effects_of
from shop.catalogue import ACTIONS, DECLINED_CARD, EMPTY_PURSE, UNKNOWN_ADDRESS
from shop.definition import order as order_definition
from shop.server import PARTICIPANTS
from tests.shop.calls import Shop, make_call, order_input

PLACED = {"order_id": "order-1", "amount_cents": 49_80}


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    """Give a shop that has just opened."""
    async with Shop(tmp_path) as shop:
        yield shop


def refusal(outcome: object) -> str:
    """Give the reason of a refusal."""
    assert isinstance(outcome, amends.Rejected), outcome
    return outcome.reason


async def test_results_travel_along_the_saga(shop: Shop) -> None:
    """The label names the charge and the reservation, the confirmation the parcel."""
    await shop.complete("saga-1")
    effects = effects_of(shop.databases, "saga-1")
    assert [each.effect for each in effects] == list(ACTIONS)
    assert {each.order_id for each in effects} == {"order-1"}
    order = order_input()
    done = await shop.ask(
        make_call(
            "ship",
            saga_id="saga-2",
            order=order,
            results={
                "place": {"order_id": "order-2", "amount_cents": 1},
                "charge": {"charge_id": "charge-9"},
                "reserve": {"reservation_id": "reservation-8"},
            },
        )
    )
    assert isinstance(done, amends.Done)
    assert done.result is not None
    assert done.result.json() == {"tracking_code": "parcel-2"}


async def test_undoing_needs_no_result(shop: Shop) -> None:
    """A charge whose reply was lost is refunded all the same: the runtime knows no result."""
    charged = await shop.ask(make_call("charge", results={"place": PLACED}))
    assert isinstance(charged, amends.Done)
    refunded = await shop.ask(make_call("charge", amends.Verb.COMPENSATE, executed=False))
    assert isinstance(refunded, amends.Done)
    effects = effects_of(shop.databases, "saga-1")
    assert [(each.effect, each.amount_cents) for each in effects] == [
        ("charge", 49_80),
        ("refund", 49_80),
    ]


async def test_undoing_nothing_leaves_nothing_and_fences(shop: Shop) -> None:
    """A compensation without a charge has no effect, and the charge that comes late is refused."""
    undone = await shop.ask(make_call("charge", amends.Verb.COMPENSATE))
    assert isinstance(undone, amends.Done)
    late = await shop.ask(make_call("charge", results={"place": PLACED}))
    assert refusal(late) == "fenced"
    assert effects_of(shop.databases, "saga-1") == []


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "a declined card": ("charge", {"card": DECLINED_CARD}, "card_declined"),
    "an empty purse": ("charge", {"customer": EMPTY_PURSE}, "insufficient_funds"),
    "a stranger": ("charge", {"customer": "nobody"}, "unknown_account"),
    "an empty shelf": ("reserve", {"sku": "samovar"}, "out_of_stock"),
    "an unknown address": ("ship", {"address": UNKNOWN_ADDRESS}, "undeliverable"),
    "an unknown product": ("place", {"sku": "zeppelin"}, "invalid_order"),
    "no pieces": ("place", {"quantity": 0}, "invalid_order"),
    "a true number of pieces": ("place", {"quantity": True}, "invalid_order"),
    "too many pieces": ("place", {"quantity": 10**9}, "invalid_order"),
    "half a piece": ("place", {"quantity": 0.5}, "invalid_order"),
    "no customer": ("place", {"customer": ""}, "invalid_order"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_have_a_reason_and_no_effect(shop: Shop, name: str) -> None:
    """What cannot be done is refused by name, and neither ledger nor books know of it."""
    action, changes, expected = REFUSED[name]
    results: dict[str, object] = {
        "place": PLACED,
        "charge": {"charge_id": "charge-1"},
        "reserve": {"reservation_id": "reservation-1"},
    }
    outcome = await shop.ask(make_call(action, order=order_input(**changes), results=results))
    assert refusal(outcome) == expected
    assert effects_of(shop.databases, "saga-1") == []
    assert audit(shop.databases, shop.journal_path).violations == ()


async def test_every_fault_of_an_order_is_named(shop: Shop) -> None:
    """Bad input is refused with everything that is wrong with it, and without quoting it."""
    outcome = await shop.ask(make_call("place", order={"sku": 5, "quantity": "secret"}))
    assert isinstance(outcome, amends.Rejected)
    for expected in ("customer must be", "card must be", "sku must be", "quantity must be"):
        assert expected in outcome.message
    assert "secret" not in outcome.message
    assert refusal(await shop.ask(make_call("place", saga_id="saga-2", order=[]))) == (
        "invalid_order"
    )


def test_the_definition_names_what_the_services_have() -> None:
    """Each step calls an action that its participant has; what must be undone can be."""
    for step in order_definition.steps:
        handlers = PARTICIPANTS[step.participant].handlers()
        assert (step.action, amends.Verb.EXECUTE) in handlers
        can_undo = (step.action, amends.Verb.COMPENSATE) in handlers
        assert can_undo == (step.kind is amends.StepKind.COMPENSATABLE)
        assert can_undo == (ACTIONS[step.action].undo is not None)
    order_definition.to_proto()
