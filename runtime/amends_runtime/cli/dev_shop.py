"""What `amends dev` plays with: the definition `hello`, and the participant that carries it out.

An order names an item and its price in cents. Two prices and a word make it end in other ways:
above `LIMIT_CENTS` the charge is refused, so that the saga turns back; with `"stuck": true` the
charge is broken when it is first asked for, so that the saga waits for an operator's retry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import amends

__all__ = ["DEFINITION", "LIMIT_CENTS", "NAME", "demo_participant"]

NAME: Final = "demo"
LIMIT_CENTS: Final = 10_000

DEFINITION: Final = (
    amends.Definition("hello")
    .step("reserve", NAME, "reserve")
    .step("charge", NAME, "charge")
    .retriable("ship", NAME, "ship")
)

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS reservations (saga_id TEXT PRIMARY KEY, item TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS charges (saga_id TEXT NOT NULL, cents INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS parcels (saga_id TEXT PRIMARY KEY, item TEXT NOT NULL);
"""


def demo_participant(database: Path) -> amends.Participant:
    """A participant with the actions reserve, charge and ship; its ledger is in `database`."""
    demo = amends.Participant(NAME, barrier=amends.SqliteBarrier(database, schema=SCHEMA))
    broken: set[str] = set()

    @demo.execute("reserve")
    def reserve(call: amends.Call, tx: amends.Transaction) -> dict[str, str]:
        item = _item(call)
        tx.execute("INSERT INTO reservations VALUES (?, ?)", (call.saga_id, item))
        return {"reserved": item}

    @demo.compensate("reserve")
    def release(call: amends.Call, tx: amends.Transaction) -> None:
        tx.execute("DELETE FROM reservations WHERE saga_id = ?", (call.saga_id,))

    @demo.execute("charge")
    def charge(call: amends.Call, tx: amends.Transaction) -> dict[str, int]:
        cents = _order(call).get("cents", 0)
        if not isinstance(cents, int) or isinstance(cents, bool) or cents < 0:
            raise amends.Rejected("no_price", "cents must be a whole number, 0 or more")
        if cents > LIMIT_CENTS:
            raise amends.Rejected("limit_exceeded", f"at most {LIMIT_CENTS} cents an order")
        if _order(call).get("stuck") is True and call.saga_id not in broken:
            broken.add(call.saga_id)  # in memory only: it is about the first time, not for ever
            raise amends.Broken("ledger_locked", "the ledger is locked: retry the saga")
        tx.execute("INSERT INTO charges VALUES (?, ?)", (call.saga_id, cents))
        return {"charged_cents": cents}

    @demo.compensate("charge")
    def refund(call: amends.Call, tx: amends.Transaction) -> None:
        charged = (call.own_result_json() or {}).get("charged_cents", 0)
        tx.execute("INSERT INTO charges VALUES (?, ?)", (call.saga_id, -charged))

    @demo.execute("ship", compensatable=False)
    def ship(call: amends.Call, tx: amends.Transaction) -> dict[str, str]:
        tx.execute("INSERT INTO parcels VALUES (?, ?)", (call.saga_id, _item(call)))
        return {"parcel": f"parcel of {call.saga_id}"}

    return demo


def _order(call: amends.Call) -> dict[str, Any]:
    try:
        order = call.json()
    except amends.PayloadError:
        order = ()
    if order is None:
        return {}  # started without an input
    if not isinstance(order, dict):
        raise amends.Rejected("no_order", 'the input must be like {"item": "tea", "cents": 1200}')
    return order


def _item(call: amends.Call) -> str:
    return str(_order(call).get("item", "tea"))[:100]
