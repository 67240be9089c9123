"""Two branches of a bank, each with a database of its own, and the transfer between them.

Each has one account, with 100 in it. A branch votes by a hold in its own table (Try), commits by
moving the money (Confirm), and rolls back by letting the hold go (Cancel). What a test wants said
instead stands in `says`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio

import amends
from amends_runtime.config import Config, Participant, Server
from tests.storage.sqlite_file import execute

TRANSFER = (
    amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT)
    .step("debit", "east", "debit", retry=amends.Retry(first_s=0.001, max_s=0.001))
    .step("credit", "west", "credit", retry=amends.Retry(first_s=0.001, max_s=0.001))
)

_TABLES = """
CREATE TABLE account (balance INTEGER NOT NULL);
INSERT INTO account VALUES (100);
CREATE TABLE holds (life TEXT PRIMARY KEY, amount INTEGER NOT NULL);
"""

Says = Callable[[amends.Call], Awaitable[object]]


class Hanging:
    """A handler that begins, says so, and waits until it is let go; then it does as it would."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.let_go = anyio.Event()

    async def __call__(self, call: amends.Call) -> None:
        """Says that it has begun, and waits."""
        self.begun.set()
        await self.let_go.wait()


async def no_funds(call: amends.Call) -> None:
    """A vote of no."""
    raise amends.Rejected("no_funds")


class Branch:
    """One branch, which can debit and credit its account."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}.db"
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(_TABLES)
        self.says: dict[amends.Verb, Says] = {}
        self.calls: list[amends.Call] = []

    def participant(self) -> amends.Participant:
        """The participant to be served."""
        barrier = amends.SqliteBarrier(str(self.path))
        participant = amends.Participant(self.name, barrier=barrier)
        for action in ("debit", "credit"):
            participant.prepare(action)(self._prepare)
            participant.execute(action)(self._commit)
            participant.compensate(action)(self._roll_back)
        return participant

    @property
    def balance(self) -> int:
        """What its account has."""
        [[balance]] = execute(self.path, "SELECT balance FROM account")
        return int(balance)

    @property
    def holds(self) -> int:
        """How many votes it stands by."""
        return len(execute(self.path, "SELECT life FROM holds"))

    @property
    def vote(self) -> amends.Call:
        """The call of its first vote: what a participant in doubt asks about."""
        return next(call for call in self.calls if call.verb is amends.Verb.PREPARE)

    def hang(self, verb: amends.Verb) -> Hanging:
        """From now on its handler of that verb waits."""
        hanging = self.says[verb] = Hanging()
        return hanging

    async def _says(self, call: amends.Call) -> object:
        self.calls.append(call)
        says = self.says.get(call.verb)
        return None if says is None else await says(call)

    async def _prepare(
        self, call: amends.Call, tx: amends.AsyncTransaction
    ) -> amends.InProgress | None:
        said = await self._says(call)
        if isinstance(said, amends.InProgress):
            return said
        amount = int(call.input) if call.action == "credit" else -int(call.input)
        await tx.execute("INSERT INTO holds VALUES (?, ?)", (_life(call), amount))
        return None

    async def _commit(self, call: amends.Call, tx: amends.AsyncTransaction) -> None:
        await self._says(call)
        await tx.execute(
            "UPDATE account SET balance = balance + (SELECT amount FROM holds WHERE life = ?)",
            (_life(call),),
        )
        await tx.execute("DELETE FROM holds WHERE life = ?", (_life(call),))

    async def _roll_back(self, call: amends.Call, tx: amends.AsyncTransaction) -> None:
        await self._says(call)
        await tx.execute("DELETE FROM holds WHERE life = ?", (_life(call),))


def _life(call: amends.Call) -> str:
    return f"{call.store_id}/{call.saga_id}/{call.step}/{call.round}"


class Bank:
    """Both branches, and the configuration of a runtime that calls them."""

    def __init__(self, folder: Path) -> None:
        self.east = Branch("east", folder)
        self.west = Branch("west", folder)
        self.database = folder / "amends.db"
        self.config = Config()

    @property
    def balances(self) -> tuple[int, int]:
        """East's and west's."""
        return self.east.balance, self.west.balance

    @property
    def holds(self) -> int:
        """How many votes are stood by, in both."""
        return self.east.holds + self.west.holds

    def let_go(self) -> None:
        """Lets everything go that waits in a branch."""
        for says in (*self.east.says.values(), *self.west.says.values()):
            if isinstance(says, Hanging):
                says.let_go.set()


@asynccontextmanager
async def open_bank(folder: Path) -> AsyncIterator[Bank]:
    """Serves both branches; what still waits in one at the end is let go."""
    bank = Bank(folder)
    async with (
        amends.serve(bank.east.participant(), grace_s=5) as east,
        amends.serve(bank.west.participant(), grace_s=5) as west,
    ):
        bank.config = Config(
            server=Server(listen="127.0.0.1:0", database=str(bank.database)),
            participants={
                "east": Participant(address=east.address),
                "west": Participant(address=west.address),
            },
        )
        yield bank
        bank.let_go()
