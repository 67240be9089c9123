"""A participant for the tests of the command line.

Prints its address once it serves, and ends when its standard input does.
"""

import json
import os
import sys
import threading

import amends

payments = amends.Participant("payments", barrier=None)


@payments.execute("charge")
def charge(call: amends.Call) -> dict[str, str]:
    """Charge, unless the amount is above 100, or the order says that it breaks."""
    order = json.loads(call.input or b"{}")
    if order.get("broken") == "charge":
        raise amends.Broken("ledger_lost", "the ledger cannot be read")
    if order.get("amount", 0) > 100:
        raise amends.Rejected("card_declined", "above the limit\x1b[2J of the card")
    return {"receipt": call.saga_id}


@payments.compensate("charge")
def refund(call: amends.Call) -> None:
    """Nothing is kept, so there is nothing to give back, unless the order says that it breaks."""
    if json.loads(call.input or b"{}").get("broken") == "refund":
        raise amends.Broken("ledger_lost", "the ledger cannot be read")


@payments.execute("refuse")
def refuse(call: amends.Call) -> None:
    """Refuse, so that what came before is undone."""
    raise amends.Rejected("refused")


@payments.compensate("refuse")
def nothing(call: amends.Call) -> None:
    """A refusal has no effect."""


def tell(server: amends.Server) -> None:
    """Print where the participant is reached."""
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()


def end_with_stdin() -> None:
    """Leave nothing behind when the test run dies."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_stdin, daemon=True).start()
    amends.run(payments, on_ready=tell)
