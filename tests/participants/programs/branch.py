"""A branch of a bank in a process of its own, which can be told to stop where a crash would hurt.

Usage: branch.py DRIVER WHERE, with the DSN in the environment as BANK. It prints its address; where
it is told to stop it prints ``here`` and stands until it is killed. WHERE is one of

- ``nowhere``
- ``working``: the handler has written, nothing is prepared
- ``prepared``: PREPARE TRANSACTION has been answered, the reply has not left
- ``between``: ROLLBACK PREPARED has been answered, the fence is not placed
- ``finished``: Execute or Compensate is done, the reply has not left
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from amends import Call, Participant, PreparedTransactions, Server, Verb, run
from amends.barrier import prepared, prepared_votes
from amends.handler import Handler
from amends.outcomes import Outcome

driver, where = sys.argv[1:3]


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stop_here(place: str) -> None:
    """Stand until killed, if this is the place."""
    if where == place:
        tell("here")
        threading.Event().wait()


async def finish(session: Any, command: str, name: Any) -> Any:
    """Stop between the two transactions of Compensate."""
    finished = await prepared_votes.finish(session, command, name)
    if command.startswith("ROLLBACK"):
        stop_here("between")
    return finished


class StoppingBarrier(PreparedTransactions):
    """Stops between what is durable and the reply."""

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        outcome = await super().run(call, handler)
        stop_here("prepared" if call.verb is Verb.PREPARE else "finished")
        return outcome


setattr(prepared, "finish", finish)  # noqa: B010  # its own name for it
bank = Participant("bank", barrier=StoppingBarrier(os.environ["BANK"], driver=driver))  # type: ignore[arg-type]


@bank.prepare("debit")
async def debit(call: Call, connection: Any) -> None:
    """Take the money."""
    amount = int(call.json()["amount"])
    await connection.execute(f"UPDATE accounts SET cents = cents - {amount}")  # noqa: S608  # an int
    stop_here("working")


def print_address(server: Server) -> None:
    """Tell the test where to ask."""
    tell(server.address)


if __name__ == "__main__":
    run(bank, on_ready=print_address, grace_s=30.0)
