"""A participant for the tests of the command line. Prints its address once it serves."""

import sys

import amends

payments = amends.Participant("payments")


@payments.execute("charge")
def charge(call: amends.Call) -> dict[str, str]:
    """Charge, unless the amount is above 100."""
    order: dict[str, int] = call.input or {}  # type: ignore[assignment]  # the tests send no bytes
    if order.get("amount", 0) > 100:
        raise amends.Rejected("card_declined", "above the limit\x1b[2J of the card")
    return {"receipt": call.saga_id}


@payments.compensate("charge")
def refund(call: amends.Call) -> None:
    """Nothing is kept, so there is nothing to give back."""


if __name__ == "__main__":

    def tell(server: amends.Server) -> None:
        """Print where the participant is reached."""
        sys.stdout.write(f"{server.address}\n")
        sys.stdout.flush()

    amends.run(payments, on_ready=tell)
