"""Inventory: puts goods aside for an order, and back on the shelf."""

from __future__ import annotations

import amends
from shop import ledger
from shop.catalogue import read_order
from shop.tracing import span

inventory = amends.Participant("inventory", barrier=None)  # its process gives it one: server.py


@inventory.execute("reserve")
def reserve(call: amends.Call, transaction: amends.Transaction) -> dict[str, object]:
    """Put the goods aside. Refuses with ``out_of_stock``."""
    order = read_order(call.json())
    order_id = call.result_json("place")["order_id"]
    with span("take from the shelf"):
        taken = transaction.execute(
            "UPDATE stock SET on_hand = on_hand - ? WHERE sku = ? AND on_hand >= ?",
            (order.quantity, order.sku, order.quantity),
        ).rowcount
    if not taken:
        raise amends.Rejected("out_of_stock", "there are not enough pieces on the shelf")
    number = transaction.execute(
        "INSERT INTO reservations (saga_id, order_id, sku, quantity) VALUES (?, ?, ?, ?)",
        (call.saga_id, order_id, order.sku, order.quantity),
    ).lastrowid
    ledger.append(
        transaction,
        call,
        "reserve",
        order_id=order_id,
        subject=order.sku,
        quantity=order.quantity,
    )
    return {"reservation_id": f"reservation-{number}"}


@inventory.compensate("reserve")
def release(call: amends.Call, transaction: amends.Transaction) -> None:
    """Put back what was put aside for the saga's order."""
    # By the saga and not by the result of `reserve`: that may have been lost on the way.
    reserved = transaction.execute(
        "UPDATE reservations SET released = 1 WHERE reservation_number ="
        " (SELECT min(reservation_number) FROM reservations WHERE saga_id = ? AND released = 0)"
        " RETURNING order_id, sku, quantity",
        (call.saga_id,),
    ).fetchone()
    if reserved is None:
        raise amends.Broken("reservation_not_found", "there is no reservation to release")
    order_id, sku, quantity = reserved
    transaction.execute("UPDATE stock SET on_hand = on_hand + ? WHERE sku = ?", (quantity, sku))
    ledger.append(
        transaction,
        call,
        "release",
        order_id=order_id,
        subject=sku,
        quantity=quantity,
    )
