"""What `make soak` does with orders (``MODE=saga``): the four services, and what goes wrong there.

Each order goes through four services, two of which are called by the unary verbs. Some are refused,
some turn back because they are cancelled or late; replies are lost, calls fail, services are slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import amends
from scripts.soak_plan import (
    JOURNAL_NAME,
    Behaviour,
    Errand,
    Findings,
    Trade,
    dice_of,
)
from shop.audit import audit, databases_in
from shop.catalogue import (
    DECLINED_CARD,
    EMPTY_PURSE,
    OPENING_BALANCES_CENTS,
    PRODUCTS,
    SERVICES,
    SHOP_ACCOUNT,
    UNKNOWN_ADDRESS,
)
from shop.definition import order as order_definition
from shop.processes import Process, Processes

SERVICE_OF: Final = {
    "place": "orders",
    "confirm": "orders",
    "cancel": "orders",
    "charge": "payments",
    "refund": "payments",
    "reserve": "inventory",
    "release": "inventory",
    "ship": "shipping",
}

SWITCHES: Final[dict[str, dict[str, Any]]] = {
    "orders": {
        "place": {"decline": 0.02, "lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "confirm": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        # Fewer orders are undone than done: higher chances, so that all of them fire.
        "cancel": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "payments": {
        "charge": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "refund": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "inventory": {
        "reserve": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02},
        "release": {"lose_reply": 0.08, "fail_before": 0.08, "slow": 0.05},
    },
    "shipping": {"ship": {"lose_reply": 0.02, "fail_before": 0.02, "slow": 0.02}},
}
"""The chances of each attempt; `decline` of each step."""

SLOW_S: Final = 0.3
"""Longer than an order takes, so that deadlines and cancellations strike in the middle."""

REFUSALS: Final = {
    "card_declined": 0.05,
    "out_of_stock": 0.04,
    "insufficient_funds": 0.03,
    "undeliverable": 0.05,
}
"""The share of orders that are refused because of what they say."""

BEHAVIOUR: Final = Behaviour()


class Orders(Trade):
    """Sagas of four services."""

    mode = "saga"
    participants = SERVICES
    unary_of_both = ("orders", "inventory")
    killed = SERVICES

    def definitions(self) -> Sequence[amends.Definition]:
        """The order."""
        return [order_definition]

    def errand(self, seed: int, number: int) -> Errand:
        """Draw one order, and how its client behaves."""
        dice = dice_of(seed, "order", number)
        customers = sorted(set(OPENING_BALANCES_CENTS) - {SHOP_ACCOUNT, EMPTY_PURSE})
        order: dict[str, object] = {
            "customer": dice.choice(customers),
            "card": "4000-0000",
            "sku": dice.choice([sku for sku, product in PRODUCTS.items() if product.opening_stock]),
            "quantity": dice.randint(1, 3),
            "address": f"{dice.randint(1, 99)} Long Lane",
        }
        (refusal,) = dice.choices([*REFUSALS, ""], [*REFUSALS.values(), 1 - sum(REFUSALS.values())])
        match refusal:
            case "card_declined":
                order["card"] = DECLINED_CARD
            case "out_of_stock":
                order["sku"] = next(
                    s for s, product in PRODUCTS.items() if not product.opening_stock
                )
            case "insufficient_funds":
                order["customer"] = EMPTY_PURSE
            case "undeliverable":
                order["address"] = UNKNOWN_ADDRESS
            case _:
                pass
        return Errand.drawn(
            f"soak-{seed}-{number:06}", "order", order, order, dice, behaviour=BEHAVIOUR
        )

    def switches(self) -> dict[str, Any]:
        """What goes wrong, by service."""
        return {
            service: {
                operation: faults | {"slow_s": SLOW_S} for operation, faults in operations.items()
            }
            for service, operations in SWITCHES.items()
        }

    def planned_faults(self) -> list[str]:
        """Name everything that a long run must have seen."""
        of_switches = [
            f"{operation} {fault}"
            for operations in SWITCHES.values()
            for operation, faults in operations.items()
            for fault in faults
        ]
        turns = ["turned back by cancelled", "turned back by deadline"]
        refused = [f"refused {reason}" for reason in REFUSALS]
        return [*of_switches, *refused, *turns, "impatient start"]

    async def start(self, processes: Processes) -> Sequence[Process]:
        """Start the four services."""
        return await processes.start_services()

    def audit(self, folder: Path) -> Findings:
        """Compare the four ledgers with the journal."""
        report = audit(databases_in(folder), folder / JOURNAL_NAME)
        return Findings(
            sagas=report.sagas,
            completed=report.completed,
            compensated=report.compensated,
            unknown_starts=report.unknown_starts,
            effects=report.effects,
            by_participant=[
                (SERVICE_OF[operation], count) for operation, count in report.effects.items()
            ],
            violations=len(report.violations),
            lines=report.lines(),
        )
