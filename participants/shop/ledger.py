"""The ledger of a service: an append-only list of effects, written with what it lists.

A line is written in the transaction that holds the business rows and the barrier's row. So the
ledger has a line exactly if the effect took place, whatever was killed when.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import amends

_SQL_FOLDER: Final = Path(__file__).parent / "sql"

_APPEND: Final = """
INSERT INTO effects
    (at_ms, clock_ns, saga_id, step, effect, key, order_id, subject, quantity, amount_cents)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def schema(service: str) -> str:
    """Give the SQL that makes a service's tables and its ledger where they are missing."""
    return "".join(
        (_SQL_FOLDER / f"{name}.sql").read_text(encoding="utf-8") for name in ("ledger", service)
    )


def append(
    transaction: amends.Transaction,
    call: amends.Call,
    effect: str,
    *,
    order_id: str,
    subject: str,
    quantity: int = 0,
    amount_cents: int = 0,
) -> None:
    """Write one effect of `call` into the ledger, in the transaction in which it happens."""
    transaction.execute(
        _APPEND,
        (
            time.time_ns() // 1_000_000,
            # One clock for all processes of a machine, and it never goes back.
            time.monotonic_ns(),
            call.saga_id,
            call.step,
            effect,
            call.idempotency_key,
            order_id,
            subject,
            quantity,
            amount_cents,
        ),
    )
