"""Takes payments, and gives them back."""

from amends import Call, Participant, Rejected, SqliteBarrier, Transaction, run

SCHEMA = "CREATE TABLE IF NOT EXISTS charges (saga_id TEXT, cents INTEGER)"
payments = Participant("payments", barrier=SqliteBarrier("payments.db", schema=SCHEMA))


@payments.execute("charge")
def charge(call: Call, tx: Transaction) -> dict[str, int]:
    """Take the money, or refuse."""
    if (cents := call.json()["cents"]) > 100_000:
        raise Rejected("card_declined", "the amount is above the limit")
    tx.execute("INSERT INTO charges VALUES (?, ?)", (call.saga_id, cents))
    return {"charged": cents}


@payments.compensate("charge")
def refund(call: Call, tx: Transaction) -> None:
    """Give it back: called once, and only if the charge was committed."""
    tx.execute("INSERT INTO charges VALUES (?, ?)", (call.saga_id, -call.json()["cents"]))


if __name__ == "__main__":
    run(payments, listen="127.0.0.1:50061")
