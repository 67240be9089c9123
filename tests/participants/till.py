"""A participant whose calls share commits, and calls that are given to its barrier all at once."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from amends import Call, Participant, SqliteBarrier, Transaction, Verb
from amends.outcomes import Outcome
from tests.participants.asking import call_of
from tests.participants.gate import Gate
from tests.participants.ledger import PATIENCE_S

SCHEMA = """
    CREATE TABLE IF NOT EXISTS ledger (saga_id TEXT, entry TEXT, amount INTEGER);
    CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS payments (
        account TEXT REFERENCES accounts DEFERRABLE INITIALLY DEFERRED)
"""

COMMIT = "commit"

Behaviour = Callable[[Call, Transaction], Any]


class Till:
    """A participant with the action ``charge``; what its handler does is set by saga.

    Before it does as its saga is set, the handler writes its effect. `log` has what happened in the
    barrier's thread, in order: the saga of each handler that ran, and each commit.
    """

    def __init__(self, path: Path, *, share_commits: bool = True, **options: Any) -> None:
        self.path = path
        self.log: list[str] = []
        self.behaves: dict[str, Behaviour] = {}
        self.after_commit: Callable[[], None] = lambda: None
        self.barrier = SqliteBarrier(
            self._connect,
            schema=SCHEMA,
            share_commits=share_commits,
            **{"busy_timeout_s": PATIENCE_S, **options},
        )
        participant = Participant("payments", barrier=self.barrier)
        participant.prepare("charge")(self.charge)
        participant.execute("charge")(self.charge)
        participant.compensate("charge")(self.charge)
        self.handlers = participant.handlers()

    def charge(self, call: Call, tx: Transaction) -> object:
        """Write the verb as the effect, then do what is set."""
        self.log.append(call.saga_id)
        tx.execute("INSERT INTO ledger VALUES (?, ?, ?)", (call.saga_id, call.verb.value, 1))
        behave = self.behaves.get(call.saga_id)
        return None if behave is None else behave(call, tx)

    async def ask(self, saga_id: str, verb: Verb = Verb.EXECUTE, **changes: object) -> str:
        """Give one call to the barrier, and the answer in a word or two."""
        call = call_of(verb, saga_id=saga_id, **changes)
        try:
            outcome = await self.barrier.run(call, self.handlers["charge", verb])
        except Exception as error:  # noqa: BLE001  # the test looks which
            return type(error).__name__
        return in_words(outcome)

    async def ask_at_once(
        self, saga_ids: Sequence[str], verb: Verb = Verb.EXECUTE, **changes: object
    ) -> list[str]:
        """Give a call for each saga to a barrier whose thread is not free until it has all."""
        async with Waiting(self.barrier) as waiting:
            asked = [waiting.start(self.ask(saga_id, verb, **changes)) for saga_id in saga_ids]
        return await asyncio.gather(*asked)

    def commits(self) -> list[list[str]]:
        """Give the sagas whose handlers ran between one commit and the next, and the rest."""
        found: list[list[str]] = [[]]
        for entry in self.log:
            if entry == COMMIT:
                found.append([])
            else:
                found[-1].append(entry)
        return found if found[-1] else found[:-1]

    def effects(self) -> dict[str, int]:
        """Count the effects of each saga."""
        return dict(self._read("SELECT saga_id, count(*) FROM ledger GROUP BY saga_id"))

    def rows(self) -> dict[str, str]:
        """Give the state of each saga's row of Execute."""
        return dict(self._read("SELECT saga_id, state FROM amends_barrier WHERE verb = 'execute'"))

    def everything(self) -> list[list[Any]]:
        """Give all effects, and all rows but for the time at which they were written."""
        return [
            self._read("SELECT * FROM ledger ORDER BY saga_id, entry"),
            self._read(
                "SELECT saga_id, step, round, verb, state, request_hash, reply FROM amends_barrier "
                "ORDER BY saga_id, verb"
            ),
        ]

    def _read(self, statement: str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            return connection.execute(statement).fetchall()

    def _connect(self) -> sqlite3.Connection:
        till = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
                cursor = super().execute(sql, *arguments)  # type: ignore[arg-type]
                if sql.startswith("COMMIT"):
                    till.log.append(COMMIT)
                    till.after_commit()
                return cursor

        connection = sqlite3.connect(self.path, factory=Connection)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


class Waiting:
    """Keeps a barrier's thread busy while calls are queued; at its end the thread is free."""

    def __init__(self, barrier: SqliteBarrier) -> None:
        self._barrier = barrier
        self._gate = Gate()

    async def __aenter__(self) -> Self:
        gate = self._gate
        self._blocking = asyncio.ensure_future(
            self._barrier._in_thread(lambda _: gate.pass_in_thread())
        )
        await gate.reached.wait()
        return self

    def start(self, asking: Any) -> asyncio.Task[str]:
        """Start a task that queues a call."""
        return asyncio.ensure_future(asking)

    async def __aexit__(self, *_exception: object) -> None:
        await asyncio.sleep(0)  # now each of them has queued its call
        self._gate.open()
        await self._blocking


def in_words(outcome: Outcome) -> str:
    """Say an outcome in a word or two: ``done``, ``rejected fenced``, …."""
    reason = getattr(outcome, "reason", "")
    kind = {"InProgress": "in_progress"}.get(type(outcome).__name__, type(outcome).__name__.lower())
    return f"{kind} {reason}".strip()
