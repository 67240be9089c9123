"""How definitions differ, in lines for people."""

import msgspec

from amends_runtime.api.differences import differences
from amends_runtime.core.definition import Definition, Kind, RetryPolicy, Step, normalise

RESERVE = Step(name="reserve", participant="inventory", action="reserve")
CHARGE = Step(name="charge", participant="payments", action="charge")
SHIP = Step(name="ship", participant="shipping", action="ship", kind=Kind.PIVOT)
ORDER = Definition(name="order", steps=(RESERVE, CHARGE, SHIP))

change = msgspec.structs.replace


def test_the_same_meaning_has_no_differences() -> None:
    """Defaults written out are the same as defaults."""
    assert differences(ORDER, normalise(ORDER)) == []


def test_each_difference_has_its_line() -> None:
    """Options, steps that come and go, and everything inside a step that stays."""
    after = change(
        ORDER,
        deadline_ms=5,
        steps=(
            change(
                RESERVE,
                timeout_ms=1,
                retry=RetryPolicy(give_up_after_ms=7),
                participant="stock",
            ),
            Step(name="pack", participant="shipping", action="pack"),
            change(SHIP, kind=Kind.COMPENSATABLE),
        ),
    )
    assert differences(ORDER, after) == [
        "deadline_ms was 0, becomes 5",
        "step 'charge' is gone",
        "step 'pack' is new",
        "step 'reserve': participant was inventory, becomes stock",
        "step 'reserve': timeout_ms was 10000, becomes 1",
        "step 'reserve': retry.give_up_after_ms was 300000, becomes 7",
        "step 'ship': kind was PIVOT, becomes COMPENSATABLE",
        "step 'ship': after was charge, becomes pack",
        "step 'ship': uses was reserve, charge, becomes reserve, pack",
        "step 'ship': retry.give_up_after_ms was 86400000, becomes 300000",
    ]


def test_another_order_is_said_as_such() -> None:
    """Steps that only changed places."""
    explicit = Definition(name="order", steps=(change(RESERVE, after=()), change(CHARGE, after=())))
    turned = change(explicit, steps=tuple(reversed(explicit.steps)))
    assert differences(explicit, turned) == [
        "steps that both have stand in another order: charge, reserve"
    ]
