"""A branch of a bank, as a program that stops or dies exactly where a transfer tells it to.

    python branch_service.py KIND WHERE --points=FOLDER --listen=… --ready-file=…

`KIND` is ``postgres`` (votes are prepared transactions; WHERE is the DSN) or ``sqlite`` (votes are
reservations; WHERE is the file). Its actions are `debit` and `credit`; a transfer's input is JSON
with `from`, `to`, `cents` and `at`, the points, by what is passed there::

    {"credit prepare after": ["hold"], "debit execute before": ["die", "hold"]}

``before`` a verb nothing of it has happened, ``after`` it all is committed and not yet answered.
The first call that comes by does the first, the second one the second: ``hold`` waits until the
file ``….go`` is there, ``die`` is SIGKILL. Each leaves a file in FOLDER first; see `Points`. Ends
when its standard input closes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any, Final

import anyio
import asyncpg

import amends
from amends.handler import Handler
from amends.outcomes import Outcome

ACCOUNTS: Final = 40
OPENING_CENTS: Final = 100
LOOK_EVERY_S: Final = 0.01

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS accounts (
    account TEXT PRIMARY KEY,
    balance_cents BIGINT NOT NULL CHECK (balance_cents >= 0)
);
CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT NOT NULL, account TEXT NOT NULL, cents BIGINT);
"""

SQLITE_SCHEMA: Final = _TABLES + "".join(
    f"INSERT OR IGNORE INTO accounts VALUES ('acc-{number}', {OPENING_CENTS});"  # noqa: S608  # constants
    for number in range(ACCOUNTS)
)
# The openings with the table alone: what is in doubt has rows locked, and an INSERT would wait.
POSTGRES_SCHEMA: Final = f"""
DO $$
BEGIN
    IF to_regclass('accounts') IS NULL THEN
        {_TABLES}
        INSERT INTO accounts
            SELECT 'acc-' || number, {OPENING_CENTS} FROM generate_series(0, {ACCOUNTS - 1}) number;
    END IF;
END
$$
"""  # noqa: S608  # constants


class Points:
    """The folder by which a test and the branches tell each other where calls have come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reached(self, saga_id: str, point: str, times: int = 1) -> Path:
        """Name the file that is there when so many calls have come to a point."""
        return self._folder / f"{saga_id}.{point.replace(' ', '-')}.{times}"

    def go(self, saga_id: str, point: str, times: int = 1) -> Path:
        """Name the file that lets the call go on."""
        return self.reached(saga_id, point, times).with_suffix(f".{times}.go")

    async def pass_by(self, call: amends.Call, side: str) -> None:
        """Do what the transfer says of this point."""
        point = f"{call.action} {call.verb} {side}"
        planned = json.loads(call.input).get("at", {}).get(point, [])
        for times, action in zip(itertools.count(1), planned, strict=False):
            try:
                self.reached(call.saga_id, point, times).touch(exist_ok=False)
            except FileExistsError:
                continue  # somebody came by before us, maybe in another life
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            go = self.go(call.saga_id, point, times)
            while not go.exists():  # noqa: ASYNC110  # another process makes it
                await anyio.sleep(LOOK_EVERY_S)
            return


def stop_at(barrier: Any, points: Points) -> None:
    """Let each call of a barrier pass by its points, before and after."""
    inner = barrier.run

    async def run(call: amends.Call, handler: Handler | None) -> Outcome:
        await points.pass_by(call, "before")
        outcome: Outcome = await inner(call, handler)
        await points.pass_by(call, "after")
        return outcome

    barrier.run = run


def amount_of(call: amends.Call) -> tuple[str, int]:
    """Say whose account changes by how much."""
    asked = json.loads(call.input)
    if call.action == "debit":
        return asked["from"], -asked["cents"]
    return asked["to"], asked["cents"]


def postgres_branch(dsn: str) -> tuple[amends.Participant, amends.PreparedTransactions]:
    """A branch whose votes are prepared transactions."""
    barrier = amends.PreparedTransactions(dsn, schema=POSTGRES_SCHEMA)
    bank = amends.Participant("east", barrier=barrier)

    async def move(call: amends.Call, connection: asyncpg.Connection) -> None:
        account, cents = amount_of(call)
        try:
            changed = await connection.execute(
                "UPDATE accounts SET balance_cents = balance_cents + $2 WHERE account = $1",
                account,
                cents,
            )
        except asyncpg.CheckViolationError:
            raise amends.Rejected("insufficient", "there is too little") from None
        if changed != "UPDATE 1":
            raise amends.Rejected("unknown_key", "there is no such account")
        await connection.execute(
            "INSERT INTO ledger VALUES ($1, $2, $3)", call.saga_id, account, cents
        )

    for action in ("debit", "credit"):
        bank.prepare(action)(move)
    return bank, barrier


def sqlite_branch(path: str) -> tuple[amends.Participant, amends.Reservations]:
    """A branch whose votes are reservations."""
    bank = amends.Participant("west", barrier=amends.SqliteBarrier(path, schema=SQLITE_SCHEMA))
    holds = amends.Reservations("accounts", key="account", quantity="balance_cents")

    def hold(call: amends.Call) -> amends.Hold:
        account, cents = amount_of(call)
        return amends.Hold(account, abs(cents))

    def note(call: amends.Call, tx: amends.Transaction, _: amends.Hold) -> None:
        tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, *amount_of(call)))

    holds.takes(bank, "debit", hold, on_confirm=note)
    holds.gives(bank, "credit", hold, on_confirm=note)
    return bank, holds


def main() -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["postgres", "sqlite"])
    parser.add_argument("where")
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--ask", default="", help="the runtime that is asked when in doubt")
    given = parser.parse_args()
    made = postgres_branch if given.kind == "postgres" else sqlite_branch
    bank, source = made(given.where)
    stop_at(bank.barrier, Points(given.points))
    resolver = None
    if given.ask:
        resolver = amends.InDoubtResolver(source, given.ask, older_than_s=0.2, every_s=0.1)

    def announce(server: amends.Server) -> None:
        beside = given.ready_file.with_suffix(".new")
        beside.write_text(json.dumps({"address": server.address}), encoding="utf-8")
        beside.replace(given.ready_file)

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    amends.run(bank, given.listen, grace_s=0, on_ready=announce, resolver=resolver)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
