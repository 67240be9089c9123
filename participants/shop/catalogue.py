"""What is sold and for how much, who has how much money when the shop opens, and what services do.

Everything that several of the shop's modules must agree on, as plain values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import amends


@dataclass(frozen=True, slots=True)
class Product:
    """Something that is sold."""

    price_cents: int
    opening_stock: int
    """Pieces on hand when the inventory's database is made."""


PRODUCTS: Final = {
    "teapot": Product(price_cents=24_90, opening_stock=1_000_000),
    "kettle": Product(price_cents=49_00, opening_stock=1_000_000),
    "cup": Product(price_cents=6_50, opening_stock=1_000_000),
    "tray": Product(price_cents=18_00, opening_stock=1_000_000),
    # In the catalogue, but never on the shelf: an order for it is refused by the inventory.
    "samovar": Product(price_cents=390_00, opening_stock=0),
}
"""By stock-keeping unit. The stock outlasts any soak, so that only planted refusals occur."""

SHOP_ACCOUNT: Final = "shop"
"""Where the customers' money goes; opens empty."""

EMPTY_PURSE: Final = "empty-purse"
"""A customer without money: a charge is refused with ``insufficient_funds``."""

OPENING_BALANCES_CENTS: Final = {
    SHOP_ACCOUNT: 0,
    EMPTY_PURSE: 0,
    **{f"customer-{number:02}": 10_000_000_00 for number in range(100)},
}
"""By account, when the payments' database is made."""

DECLINED_CARD: Final = "declined"
"""The card whose charge is refused with ``card_declined``."""

UNKNOWN_ADDRESS: Final = "nowhere"
"""The address to which shipping is refused with ``undeliverable``."""

MAX_QUANTITY: Final = 1_000
"""Pieces in one order; more is taken for a slip of the keyboard."""


@dataclass(frozen=True, slots=True)
class Action:
    """What a service can be asked, by the names that its effects have in the ledger."""

    service: str
    effect: str
    undo: str | None
    """The effect of its compensation; None: it cannot be undone."""
    refusal: str
    """The reason with which the switch `decline` refuses it."""


ACTIONS: Final = {
    "place": Action("orders", "place", "cancel", refusal="shop_closed"),
    "charge": Action("payments", "charge", "refund", refusal="card_declined"),
    "reserve": Action("inventory", "reserve", "release", refusal="out_of_stock"),
    "ship": Action("shipping", "ship", None, refusal="undeliverable"),
    "confirm": Action("orders", "confirm", None, refusal="shop_closed"),
}
"""By the action's name; the name of an action is the name of its effect."""

SERVICES: Final = ("orders", "payments", "inventory", "shipping")
"""The services, in the order in which an order meets them."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a customer wants: the input of the saga."""

    customer: str
    """The account that pays."""
    card: str
    sku: str
    quantity: int
    address: str

    @property
    def amount_cents(self) -> int:
        """What it costs."""
        return PRODUCTS[self.sku].price_cents * self.quantity


def read_order(document: object) -> Order:
    """Read an order from the saga's input.

    Raises `amends.Rejected` with the reason ``invalid_order`` and every fault in its message: what
    cannot be understood has no effect and never will have.
    """
    if not isinstance(document, dict):
        raise amends.Rejected("invalid_order", "the input is not a JSON object")
    faults = [
        f"{name} must be a non-empty string"
        for name in ("customer", "card", "sku", "address")
        if not (isinstance(document.get(name), str) and document[name])
    ]
    if not faults and document["sku"] not in PRODUCTS:
        faults.append(f"sku must be one of {', '.join(PRODUCTS)}")
    quantity = document.get("quantity")
    # A bool is an int in Python, and an order for True teapots is none.
    if type(quantity) is not int or not 1 <= quantity <= MAX_QUANTITY:
        faults.append(f"quantity must be a whole number from 1 to {MAX_QUANTITY}")
    if faults:
        raise amends.Rejected("invalid_order", "; ".join(faults))
    names = ("customer", "card", "sku", "quantity", "address")
    return Order(**{name: document[name] for name in names})
