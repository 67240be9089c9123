"""A barrier whose calls share commits, in a process that stops where a crash would hurt.

Usage: sharing.py DATABASE WHERE. It gives its barrier calls of all `SAGAS` at once, prints what
each is answered, and ``end``. Where it is told to stop it prints ``here`` and stands until it is
killed. WHERE is one of

- ``nowhere``
- ``in-the-middle``: the third of five handlers has written, their transaction is open
- ``before-answers``: the transaction is committed, nobody is answered
- ``disk-full``: no file may grow any more when the transaction is to be committed; the calls are
  given once more with room again
- ``under-load``: calls without end, each printed when it is answered
"""

from __future__ import annotations

import asyncio
import math
import resource
import sqlite3
import sys
import threading
from collections.abc import Iterable

from amends import Call, Participant, SqliteBarrier, Transaction, Verb
from amends.barrier import sqlite_calls
from amends.barrier.sqlite_writer import Answered, Writer
from amends.outcomes import Done

SCHEMA = "CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT, entry TEXT, amount INTEGER)"
SAGAS = ["a", "b", "c", "d", "e"]
ASKERS = 40

database, where = sys.argv[1:3]


def tell(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stop_here() -> None:
    """Say so, and wait to be killed."""
    tell("here")
    threading.Event().wait()


def connect() -> sqlite3.Connection:
    """Open the database; a disk that was full has room again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return sqlite3.connect(database)


barrier = SqliteBarrier(connect, schema=SCHEMA, busy_timeout_s=30.0, share_commits=True)
payments = Participant("payments", barrier=barrier)


@payments.execute("charge", compensatable=False)
def charge(call: Call, tx: Transaction) -> str:
    """Write an effect, then stop if that is the place."""
    tx.execute("INSERT INTO ledger VALUES (?, 'charge', 5)", (call.saga_id,))
    if where == "in-the-middle" and call.saga_id == "c":
        stop_here()
    if where == "disk-full" and call.attempt == 1 and call.saga_id == "e":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    return call.saga_id


handler = payments.handlers()["charge", Verb.EXECUTE]


def stop_instead(_writer: Writer, answers: Iterable[Answered]) -> None:
    """Stop where the thread would tell the event loop what is committed."""
    stop_here()


# However busy the machine is: all calls that are given at once share.
sqlite_calls.MAX_SHARED_S = math.inf  # type: ignore[misc]

if where == "before-answers":
    Writer.tell = stop_instead  # type: ignore[assignment,method-assign]


async def ask(saga_id: str, attempt: int = 1) -> None:
    """Give one call to the barrier, and print what it is answered."""
    call = Call(
        verb=Verb.EXECUTE,
        action="charge",
        saga_id=saga_id,
        step="pay",
        round=1,
        idempotency_key=f"store/{saga_id}/pay/execute/1",
        store_id="store",
        attempt=attempt,
    )
    try:
        outcome = await barrier.run(call, handler)
    except Exception as error:  # noqa: BLE001  # the test looks which
        tell(f"{saga_id} {type(error).__name__}")
        return
    assert isinstance(outcome, Done)
    assert outcome.result is not None
    tell(f"{saga_id} {outcome.result.json()}")


async def ask_at_once(attempt: int = 1) -> None:
    """Queue all calls while the thread is busy."""
    is_queued = threading.Event()
    busy = asyncio.ensure_future(barrier.write(lambda _: is_queued.wait()))
    asked = [asyncio.ensure_future(ask(saga_id, attempt)) for saga_id in SAGAS]
    await asyncio.sleep(0)
    is_queued.set()
    await asyncio.gather(busy, *asked)


async def ask_for_ever(asker: int) -> None:
    """Ask one call after the other."""
    number = 0
    while True:
        number += 1
        await ask(f"{asker}-{number}")


async def main() -> None:
    """Do what is asked for."""
    async with barrier:
        if where == "under-load":
            await asyncio.gather(*map(ask_for_ever, range(ASKERS)))
        await ask_at_once()
        if where == "disk-full":
            await ask_at_once(attempt=2)
    tell("end")


if __name__ == "__main__":
    asyncio.run(main())
