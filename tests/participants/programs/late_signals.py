"""A participant that is sent SIGTERM and SIGINT again in the last moments of its process.

It prints its address, and ``returned`` when `run` has. The late signals come after `run`, and twice
when the interpreter ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

from amends import Call, Participant, run


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def send_late() -> None:
    """Send this process both signals; they have been handled when this returns."""
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)


late = Participant("late", barrier=None)


@late.execute("nothing", compensatable=False)
def nothing(call: Call) -> None:
    """Do nothing."""


if __name__ == "__main__":
    atexit.register(send_late)  # before `run` has registered anything: called after it
    run(late, on_ready=lambda server: tell(server.address))
    send_late()
    tell("returned")
    atexit.register(send_late)
