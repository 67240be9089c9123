"""Payments: moves money from a customer's account to the shop's, and back."""

from __future__ import annotations

import amends
from shop import ledger
from shop.catalogue import DECLINED_CARD, SHOP_ACCOUNT, read_order
from shop.tracing import span

payments = amends.Participant("payments", barrier=None)  # its process gives it one: server.py

_MOVE = "UPDATE accounts SET balance_cents = balance_cents + ? WHERE account = ?"


@payments.execute("charge")
def charge(call: amends.Call, transaction: amends.Transaction) -> dict[str, object]:
    """Charge what the order costs. Refuses with ``card_declined``, ``insufficient_funds``."""
    order = read_order(call.json())
    placed = call.result_json("place")
    order_id, amount_cents = placed["order_id"], placed["amount_cents"]
    with span("authorise card"):
        if order.card == DECLINED_CARD:
            raise amends.Rejected("card_declined", "the bank declined the card")
    account = transaction.execute(
        "SELECT balance_cents FROM accounts WHERE account = ?", (order.customer,)
    ).fetchone()
    if account is None:
        raise amends.Rejected("unknown_account", "the customer has no account here")
    if account[0] < amount_cents:
        raise amends.Rejected("insufficient_funds", "the account does not cover the order")
    transaction.execute(_MOVE, (-amount_cents, order.customer))
    transaction.execute(_MOVE, (amount_cents, SHOP_ACCOUNT))
    number = transaction.execute(
        "INSERT INTO charges (saga_id, order_id, account, amount_cents) VALUES (?, ?, ?, ?)",
        (call.saga_id, order_id, order.customer, amount_cents),
    ).lastrowid
    ledger.append(
        transaction,
        call,
        "charge",
        order_id=order_id,
        subject=order.customer,
        amount_cents=amount_cents,
    )
    return {"charge_id": f"charge-{number}"}


@payments.compensate("charge")
def refund(call: amends.Call, transaction: amends.Transaction) -> None:
    """Give back what was charged for the saga's order."""
    # By the saga and not by the result of `charge`: that may have been lost on the way.
    charged = transaction.execute(
        "UPDATE charges SET refunded = 1 WHERE charge_number ="
        " (SELECT min(charge_number) FROM charges WHERE saga_id = ? AND refunded = 0)"
        " RETURNING order_id, account, amount_cents",
        (call.saga_id,),
    ).fetchone()
    if charged is None:
        raise amends.Broken("charge_not_found", "there is no charge to refund")
    order_id, account, amount_cents = charged
    transaction.execute(_MOVE, (-amount_cents, SHOP_ACCOUNT))
    transaction.execute(_MOVE, (amount_cents, account))
    ledger.append(
        transaction,
        call,
        "refund",
        order_id=order_id,
        subject=account,
        amount_cents=amount_cents,
    )
