"""The branch on SQLite with reservations: a vote holds an amount, and moves nothing."""

from __future__ import annotations

from pathlib import Path

import amends
from shop import bank_books
from shop.bank import WEST, Branch, asked_of, read_transfer


def make_bank_west(database: Path) -> Branch:
    """Make the branch over a file."""
    barrier = amends.SqliteBarrier(database, schema=bank_books.schema(WEST))
    bank = amends.Participant(WEST, barrier=barrier)
    holds = amends.Reservations("accounts", key="account", quantity="balance_cents")
    holds.takes(bank, "debit", _wanted, on_confirm=_write_down)
    holds.gives(bank, "credit", _wanted, on_confirm=_write_down)
    return Branch(bank, holds)


def _wanted(call: amends.Call) -> amends.Hold:
    """Say which account, and how much of it. Refuses with ``invalid_transfer``."""
    account, amount_cents = asked_of(call).moves(call.action)
    return amends.Hold(account, abs(amount_cents))


def _write_down(call: amends.Call, transaction: amends.Transaction, hold: amends.Hold) -> None:
    """Write down what moves, in the transaction in which it does."""
    account, amount_cents = read_transfer(call.json()).moves(call.action)
    assert (account, abs(amount_cents)) == (hold.key, hold.amount), "it is what was voted for"
    bank_books.append(transaction, call, account, amount_cents)
