"""Orders: takes an order down, cancels it, or confirms it once it is on its way."""

from __future__ import annotations

import amends
from shop import ledger
from shop.catalogue import read_order

orders = amends.Participant("orders", barrier=None)  # its process gives it one: server.py


@orders.execute("place")
def place(call: amends.Call, transaction: amends.Transaction) -> dict[str, object]:
    """Take an order down. Its number and its price are what the later steps work with."""
    order = read_order(call.json())
    number = transaction.execute(
        "INSERT INTO orders (saga_id, customer, sku, quantity, amount_cents, state)"
        " VALUES (?, ?, ?, ?, ?, 'placed')",
        (call.saga_id, order.customer, order.sku, order.quantity, order.amount_cents),
    ).lastrowid
    order_id = f"order-{number}"
    ledger.append(
        transaction,
        call,
        "place",
        order_id=order_id,
        subject=order.customer,
        quantity=order.quantity,
        amount_cents=order.amount_cents,
    )
    return {"order_id": order_id, "amount_cents": order.amount_cents}


@orders.compensate("place")
def cancel(call: amends.Call, transaction: amends.Transaction) -> None:
    """Cancel the saga's order, which stays in the book."""
    # By the saga and not by the result of `place`: that may have been lost on the way.
    placed = transaction.execute(
        "UPDATE orders SET state = 'cancelled' WHERE order_number ="
        " (SELECT min(order_number) FROM orders WHERE saga_id = ? AND state = 'placed')"
        " RETURNING order_number, customer, quantity, amount_cents",
        (call.saga_id,),
    ).fetchone()
    if placed is None:
        raise amends.Broken("order_not_found", "there is no placed order to cancel")
    number, customer, quantity, amount_cents = placed
    ledger.append(
        transaction,
        call,
        "cancel",
        order_id=f"order-{number}",
        subject=customer,
        quantity=quantity,
        amount_cents=amount_cents,
    )


@orders.execute("confirm", compensatable=False)
def confirm(call: amends.Call, transaction: amends.Transaction) -> dict[str, object]:
    """Tell the customer that the order is on its way; comes after the point of no return."""
    tracking_code = call.result_json("ship")["tracking_code"]
    confirmed = transaction.execute(
        "UPDATE orders SET state = 'confirmed', tracking_code = ? WHERE order_number ="
        " (SELECT min(order_number) FROM orders WHERE saga_id = ? AND state = 'placed')"
        " RETURNING order_number, customer, quantity, amount_cents",
        (tracking_code, call.saga_id),
    ).fetchone()
    if confirmed is None:
        raise amends.Broken("order_not_found", "there is no placed order to confirm")
    number, customer, quantity, amount_cents = confirmed
    order_id = f"order-{number}"
    ledger.append(
        transaction,
        call,
        "confirm",
        order_id=order_id,
        subject=customer,
        quantity=quantity,
        amount_cents=amount_cents,
    )
    return {"order_id": order_id, "tracking_code": tracking_code}
