"""A participant that takes its time and changes its mind, as a program that traces itself.

    python patient_service.py --listen=… --ready-file=…

Its action `ponder` is in progress for the first `POLLS` times that it is asked, `stubborn` cannot
be undone the first time. It ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Final

import amends
from shop.tracing import exported

POLLS: Final = 3

patient = amends.Participant("patient", barrier=None)

_asked: Counter[str] = Counter()


@patient.execute("ponder", compensatable=False)
async def ponder(call: amends.Call) -> amends.InProgress | None:
    """Answer when it has been asked often enough."""
    _asked[call.idempotency_key] += 1
    return amends.InProgress(0.05) if _asked[call.idempotency_key] <= POLLS else None


@patient.execute("stubborn")
async def stubborn(call: amends.Call) -> None:
    """Do it."""


@patient.compensate("stubborn")
async def give_in(call: amends.Call) -> None:
    """Undo it, at the second request."""
    _asked[call.idempotency_key] += 1
    if _asked[call.idempotency_key] == 1:
        raise amends.Broken("not_in_the_mood")


@patient.execute("refuse", compensatable=False)
async def refuse(call: amends.Call) -> None:
    """Never do it."""
    raise amends.Rejected("not_ever")


def main() -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    given = parser.parse_args()

    def announce(server: amends.Server) -> None:
        beside = given.ready_file.with_suffix(".new")
        beside.write_text(json.dumps({"address": server.address}), encoding="utf-8")
        beside.replace(given.ready_file)

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with exported("patient"):
        amends.run(patient, given.listen, grace_s=0, on_ready=announce)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
