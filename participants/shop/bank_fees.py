"""The branch that collects fees: two-phase commit by hand, over a table of what is pending.

Three handlers and a source for the resolver are all that it takes where neither prepared
transactions nor reservations fit. The barrier sees to repeated, late and reordered calls, so each
handler runs once, and only if its vote stands.
"""

from __future__ import annotations

import time
from pathlib import Path

import amends
from shop import bank_books
from shop.bank import FEES, Branch, asked_of

ACTION = "collect"


def make_bank_fees(database: Path) -> Branch:
    """Make the branch over a file."""
    barrier = amends.SqliteBarrier(database, schema=bank_books.schema(FEES))
    bank = amends.Participant(FEES, barrier=barrier)
    bank.prepare(ACTION)(prepare_collect)
    bank.execute(ACTION)(execute_collect)
    bank.compensate(ACTION)(compensate_collect)
    return Branch(bank, PendingFees(bank, barrier))


def prepare_collect(call: amends.Call, transaction: amends.Transaction) -> None:
    """Vote: write down what is to be collected, so that the commit needs nothing else.

    Refuses with ``no_fee``.
    """
    account, amount_cents = asked_of(call).moves(ACTION)
    if not amount_cents:
        raise amends.Rejected("no_fee", "there is nothing to collect")
    transaction.execute(
        "INSERT INTO pending (store_id, incarnation, saga_id, step, round, account, amount_cents,"
        " since_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            call.store_id,
            call.incarnation,
            call.saga_id,
            call.step,
            call.round,
            account,
            amount_cents,
            time.time_ns() // 1_000_000,
        ),
    )


def execute_collect(call: amends.Call, transaction: amends.Transaction) -> None:
    """Commit: move what is pending. It may not refuse; the vote was a promise."""
    if not call.two_phase:
        raise amends.Rejected("two_phase_only", "fees are collected in two-phase commits alone")
    row = _delete_pending(call, transaction)
    if row is None:
        raise amends.Broken("pending_lost", "what was voted for is gone; somebody deleted it")
    account, amount_cents = row
    bank_books.move(transaction, call, account, amount_cents)


def compensate_collect(call: amends.Call, transaction: amends.Transaction) -> None:
    """Roll back: forget what is pending."""
    _delete_pending(call, transaction)


def _delete_pending(call: amends.Call, transaction: amends.Transaction) -> tuple[str, int] | None:
    found: tuple[str, int] | None = transaction.execute(
        "DELETE FROM pending WHERE store_id = ? AND saga_id = ? AND step = ? AND round = ?"
        " RETURNING account, amount_cents",
        (call.store_id, call.saga_id, call.step, call.round),
    ).fetchone()
    return found


class PendingFees:
    """What is in doubt here, for the `InDoubtResolver`: an `amends.InDoubtSource` by hand."""

    def __init__(self, bank: amends.Participant, barrier: amends.SqliteBarrier) -> None:
        self._bank = bank
        self._barrier = barrier

    async def in_doubt(
        self, older_than_s: float = 0, *, after: str = "", limit: int = 500
    ) -> list[amends.InDoubt]:
        """List what is pending and old, oldest first."""
        before_ms = time.time_ns() // 1_000_000 - round(older_than_s * 1000)

        def read(transaction: amends.Transaction) -> list[tuple[str, str, str, str, int, int, str]]:
            return transaction.execute(
                "SELECT store_id, incarnation, saga_id, step, round, since_ms, pending_number"
                " FROM pending WHERE since_ms <= ? AND pending_number > ?"
                " ORDER BY pending_number LIMIT ?",
                (before_ms, int(after or 0), limit),
            ).fetchall()

        return [
            amends.InDoubt(
                store_id=store_id,
                incarnation=incarnation,
                saga_id=saga_id,
                step=step,
                round=round_,
                since_ms=since_ms,
                what="a fee that is to be collected",
                name=str(number),
            )
            for store_id, incarnation, saga_id, step, round_, since_ms, number in (
                await self._barrier.write(read)
            )
        ]

    async def resolve(self, in_doubt: amends.InDoubt, decision: amends.Decision) -> bool:
        """Carry a decision out through the barrier, by the same rules as a call of the runtime's.

        So whichever comes second is answered by what the first has done.
        """
        call = in_doubt.call(ACTION, decision)
        outcome = await self._bank.barrier.run(call, self._bank.handlers()[ACTION, call.verb])
        if isinstance(outcome, amends.Done):
            return True
        if isinstance(outcome, amends.InProgress):
            return False
        raise amends.VoteNotSettled(f"saga {in_doubt.saga_id} was to {decision}, and: {outcome}")
