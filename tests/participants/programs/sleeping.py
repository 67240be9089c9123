"""A participant whose main thread is never the one that a signal is given to, and sleeps.

It prints its address. The system may give a signal to any thread that does not block it, and gRPC
has threads of its own: here it is always another one.
"""

from __future__ import annotations

import signal
import sys
import threading

from amends import Call, Participant, run

sleeping = Participant("sleeping", barrier=None)


@sleeping.execute("nothing", compensatable=False)
def nothing(call: Call) -> None:
    """Do nothing."""


def tell(address: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    run(sleeping, on_ready=lambda server: tell(server.address))
