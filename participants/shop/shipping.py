"""Shipping: hands a parcel to the carrier. What is on the road does not come back: the pivot."""

from __future__ import annotations

import amends
from shop import ledger
from shop.catalogue import UNKNOWN_ADDRESS, read_order

shipping = amends.Participant("shipping", barrier=None)  # its process gives it one: server.py


@shipping.execute("ship", compensatable=False)
def ship(call: amends.Call, transaction: amends.Transaction) -> dict[str, object]:
    """Ship the goods that are reserved and paid for. Refuses with ``undeliverable``."""
    order = read_order(call.json())
    order_id = call.result_json("place")["order_id"]
    charge_id = call.result_json("charge")["charge_id"]
    reservation_id = call.result_json("reserve")["reservation_id"]
    if order.address == UNKNOWN_ADDRESS:
        raise amends.Rejected("undeliverable", "the carrier does not know the address")
    number = transaction.execute(
        "INSERT INTO shipments (saga_id, order_id, address, label) VALUES (?, ?, ?, ?)",
        (call.saga_id, order_id, order.address, f"{order_id} {charge_id} {reservation_id}"),
    ).lastrowid
    ledger.append(
        transaction,
        call,
        "ship",
        order_id=order_id,
        subject=order.address,
        quantity=order.quantity,
    )
    return {"tracking_code": f"parcel-{number}"}
