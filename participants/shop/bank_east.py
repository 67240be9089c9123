"""The branch on PostgreSQL: what a vote has done is held by the database itself until it is told.

Votes are all that is written here. `PreparedTransactions` ends their transactions with PREPARE
TRANSACTION, and commits or rolls them back as the runtime decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import amends
from shop import bank_books
from shop.bank import EAST, Branch, asked_of

if TYPE_CHECKING:
    import asyncpg

_APPEND = f"INSERT INTO movements ({bank_books.COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"  # noqa: S608  # constants


def make_bank_east(database: str | Callable[[], Any]) -> Branch:
    """Make the branch over a PostgreSQL, which `PreparedTransactions` connects to."""
    votes = amends.PreparedTransactions(database, schema=bank_books.schema(EAST))
    bank = amends.Participant(EAST, barrier=votes)
    bank.prepare("debit")(debit)
    bank.prepare("credit")(credit)
    return Branch(bank, votes)


async def debit(call: amends.Call, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Vote on taking money. Refuses with ``unknown_account``, ``insufficient_funds``."""
    await _move(call, connection)


async def credit(call: amends.Call, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Vote on giving money. Refuses with ``unknown_account``."""
    await _move(call, connection)


async def _move(call: amends.Call, connection: asyncpg.Connection[asyncpg.Record]) -> None:
    account, amount_cents = asked_of(call).moves(call.action)
    # Locked before it is looked at, and until the decision: a vote is a promise.
    balance_cents = await connection.fetchval(
        "SELECT balance_cents FROM accounts WHERE account = $1 FOR UPDATE", account
    )
    if balance_cents is None:
        raise amends.Rejected("unknown_account", "there is no such account here")
    if balance_cents + amount_cents < 0:
        raise amends.Rejected("insufficient_funds", "the account does not cover it")
    await connection.execute(
        "UPDATE accounts SET balance_cents = balance_cents + $1 WHERE account = $2",
        amount_cents,
        account,
    )
    await connection.execute(_APPEND, *bank_books.movement(call, account, amount_cents))
