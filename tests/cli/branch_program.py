"""A participant of two-phase commits for the tests of the command line.

`branch_program.py NAME DATABASE LISTEN GATES`. Prints its address once it serves, and ends when its
standard input does. What the saga's input names it for, it does: `wait` with its vote, or `fail` to
commit, until the file GATES/<saga> is there; `refuse` or find it `locked`; decide `alone`.
"""

import json
import os
import sys
import threading
from pathlib import Path

import amends

NAME, DATABASE, LISTEN, GATES = sys.argv[1:]
ACTION = {"east": "debit", "west": "credit"}[NAME]
branch = amends.Participant(NAME, barrier=amends.SqliteBarrier(DATABASE))


def is_to(call: amends.Call, word: str) -> bool:
    """Whether the saga's input names this participant for it."""
    return bool(json.loads(call.input or b"{}").get(word) == NAME)


def is_open(call: amends.Call) -> bool:
    """Whether nothing keeps it from answering any more."""
    return (Path(GATES) / call.saga_id).exists()


@branch.prepare(ACTION)
def prepare(call: amends.Call, tx: amends.Transaction) -> object:
    """Vote."""
    if is_to(call, "wait") and not is_open(call):
        return amends.InProgress(after_s=0.02)
    if is_to(call, "refuse"):
        raise amends.Rejected("insufficient", "the account has too little")
    if is_to(call, "locked") and not is_open(call):
        raise amends.Rejected("LOCKED")
    return None


@branch.execute(ACTION)
def commit(call: amends.Call, tx: amends.Transaction) -> None:
    """Commit."""
    if is_to(call, "fail") and not is_open(call):
        raise OSError("the disk is full")
    if is_to(call, "alone"):
        raise amends.Heuristic(False, "expired", "the hold had expired")


@branch.compensate(ACTION)
def roll_back(call: amends.Call, tx: amends.Transaction) -> None:
    """Roll back; what was written by the vote is nothing here."""


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
    amends.run(branch, LISTEN, on_ready=tell)
