"""The saga that these tests test: an order, with a step of each kind."""

from __future__ import annotations

import amends

ORDER = (
    amends.Definition("order")
    .read_only("quote", "inventory", "quote")
    .step("reserve", "inventory", "reserve")
    .step("charge", "payments", "charge", timeout_s=5)
    .pivot("ship", "shipping", "ship")
    .retriable("confirm", "orders", "confirm")
)

ALL = ["execute quote", "execute reserve", "execute charge", "execute ship", "execute confirm"]
"""The course of an order in which nothing goes wrong."""

UNDONE = [
    "execute quote",
    "execute reserve",
    "execute charge",
    "compensate reserve",
]
"""The course of an order whose charge is refused."""
