"""Calls of `def` handlers, and the transaction that several of them may share.

How to think about it
---------------------

The sync of a commit costs as much as everything else that a call does. Where the author allows it,
the calls that wait when a transaction begins run one after another in that transaction, and one
commit makes all of them durable. Otherwise each transaction has one call; the rules are the same.

1. A call is taken out of the queue when its turn comes, not before: until then it can be withdrawn,
   and a handler that takes long holds nobody but those who have run before it.
2. Each handler writes inside a savepoint. Its refusal or exception takes back its own writes alone.
3. Nobody is answered before the commit has returned. If it fails, every call of the transaction is
   unknown.
4. If the transaction is lost on the way (the database failed, or SQLite ended it because of one
   call's error), the calls that had run in it are rolled back for certain: those whose fault it was
   not are to be asked again, as if their turn had not come.
5. A call whose transaction failed or was lost shares none when it comes again. So the one whose
   fault it was fails its neighbours once and not at every attempt.
6. A handler that took long the last time begins a transaction of its own.

Two calls of one life never meet here: `SqliteBarrier.run` answers the second `InProgress`. So the
rows of all calls can be read when the transaction begins and written when it ends, in few
statements. Each statement lets go of the interpreter's lock, and beside a busy event loop it can
take milliseconds to get it back.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from amends.barrier.sqlite_database import Database, Life, life_of
from amends.barrier.sqlite_writer import Writer, held_up
from amends.errors import NotCompensatable
from amends.handler import Handler, thread_context
from amends.outcomes import Call, Outcome, Verb

MAX_SHARED: Final = 64
"""Calls in one transaction. With as many the sync is a small part of each; a failed commit makes no
more than these unknown."""

MAX_SHARED_S: Final = 0.02
"""How long a transaction takes further calls in: the first waits about so long for the others."""

MAX_SHARED_BYTES: Final = 4 * 1024 * 1024
"""Replies of one transaction, which are kept until it commits; one alone may have 1 MiB."""

MAX_APART: Final = 4096
"""Lives that are remembered because a shared transaction of theirs failed: 64 such transactions."""


class Loan(Protocol):
    """A transaction in a handler's hands, to be taken back."""

    def end(self) -> None:
        """Refuse every further use."""
        ...


class DefCall:
    """One call of a `def` handler, or one for which there is no handler."""

    __slots__ = (
        "_handler",
        "_lend",
        "_release",
        "_transactions",
        "call",
        "context",
        "error",
        "future",
        "life",
        "number",
        "outcome",
        "until_s",
    )

    def __init__(
        self,
        call: Call,
        handler: Handler | None,
        *,
        future: asyncio.Future[Outcome],
        until_s: float,
        transactions: Transactions,
        lend: Callable[[Database], Loan],
        release: Callable[[], None],
    ) -> None:
        self.number = 0
        self.until_s = until_s
        self.call = call
        self.life = life_of(call)
        self._handler = handler
        self.future = future
        self._transactions = transactions
        self._lend = lend
        self._release = release
        self.context = thread_context()
        """The context variables of the task that answers the call."""
        self.outcome: Outcome | None = None
        """What it is answered, unless there is an error."""
        self.error: BaseException | None = None
        """Why its outcome is unknown."""

    @property
    def kind(self) -> tuple[str, Verb]:
        """Which handler it is for."""
        return self.call.action, self.call.verb

    def withdraw(self) -> None:
        """Answer that the call is to be asked again."""
        self._release()
        self.ask_again()
        self.deliver()

    def perform(self, writer: Writer) -> None:
        """Begin a transaction with this call."""
        self._transactions.perform(writer, self)

    def run(self, database: Database) -> None:
        """Do the call's part in the open transaction. Never raises."""
        try:
            self.outcome = self.context.run(self._answer, database)
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            self.error = error
            database.leave()

    def ask_again(self) -> None:
        """Have it asked again, because nothing of it was kept."""
        self.outcome = held_up(self.call)

    def fail(self, error: BaseException) -> None:
        """Leave its outcome unknown."""
        self.error = error

    def end(self) -> None:
        """Let others of its life begin. Before the answer: whoever has it may ask again at once."""
        self._release()

    def deliver(self) -> None:
        """Give the answer to whoever waits for it; nobody does if the caller has left."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            assert self.outcome is not None
            self.future.set_result(self.outcome)

    def _answer(self, database: Database) -> Outcome:
        outcome = database.enter(self.call, self._handler)
        if outcome is not None:
            return outcome
        if self._handler is None:
            call = self.call
            raise NotCompensatable(action=call.action, step=call.step, saga_id=call.saga_id)
        loan = self._lend(database)
        try:
            outcome = self._handler.answer(self.call, loan)
        finally:
            loan.end()
        return database.settle(outcome)


class Transactions:
    """Decides which calls share a transaction, and takes them through it."""

    def __init__(self, *, are_shared: bool) -> None:
        self._max_calls = MAX_SHARED if are_shared else 1
        self._apart: dict[Life, None] = {}
        self._slow: set[tuple[str, Verb]] = set()

    def perform(self, writer: Writer, leader: DefCall) -> None:
        """Take a call, and those behind it that may share, through one transaction."""
        followers = self._followers(writer, leader)
        try:
            calls = [leader.call, *(follower.call for follower in followers)]
            has_begun = leader.context.run(writer.begin, leader.number, calls)
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            writer.database.roll_back()
            leader.fail(error)
            self._end(writer, [leader])
            return
        if not has_begun:
            leader.ask_again()
            self._end(writer, [leader])
            return
        members = self._run(writer, leader, followers)
        if writer.database.in_transaction:
            self._commit(writer.database, members)
        else:
            self._lose(writer.database, members)
        self._end(writer, members)

    def _followers(self, writer: Writer, leader: DefCall) -> list[DefCall]:
        """Give the calls that wait behind the first and may share; they stay in the queue."""
        followers: list[DefCall] = []
        if self._max_calls == 1 or leader.life in self._apart:
            return followers
        for job in writer.first(self._max_calls - 1):
            # In the order of the queue: what may not share ends the row.
            if not isinstance(job, DefCall) or not self._may_follow(job):
                break
            followers.append(job)
        return followers

    def _may_follow(self, job: DefCall) -> bool:
        return job.life not in self._apart and job.kind not in self._slow

    def _run(self, writer: Writer, leader: DefCall, followers: Sequence[DefCall]) -> list[DefCall]:
        """Run the calls whose turn comes in time, while the transaction is open; give those."""
        database = writer.database
        until_s = time.monotonic() + MAX_SHARED_S
        self._run_one(leader, database)
        members = [leader]
        for follower in followers:
            is_full = database.reply_bytes >= MAX_SHARED_BYTES or time.monotonic() >= until_s
            if is_full or not database.in_transaction:
                break
            if writer.take(follower):
                self._run_one(follower, database)
                members.append(follower)
        return members

    def _run_one(self, member: DefCall, database: Database) -> None:
        began_s = time.monotonic()
        member.run(database)
        if time.monotonic() - began_s >= MAX_SHARED_S:
            self._slow.add(member.kind)
        else:
            self._slow.discard(member.kind)

    def _commit(self, database: Database, members: Sequence[DefCall]) -> None:
        try:
            members[-1].context.run(database.commit)
        except Exception as error:  # noqa: BLE001  # goes to whoever waits for the futures
            database.roll_back()
            for member in members:
                if member.error is None:
                    member.fail(error if len(members) == 1 else _twin(error))
            self._set_apart(members)
        else:
            for member in members:
                self._apart.pop(member.life, None)

    def _lose(self, database: Database, members: Sequence[DefCall]) -> None:
        database.roll_back()
        for member in members[:-1]:
            if member.error is None:
                member.ask_again()
        self._set_apart(members)

    def _set_apart(self, members: Sequence[DefCall]) -> None:
        if len(members) > 1:
            self._apart.update((member.life, None) for member in members)
        while len(self._apart) > MAX_APART:
            del self._apart[next(iter(self._apart))]

    def _end(self, writer: Writer, members: Sequence[DefCall]) -> None:
        for member in members:
            member.end()
        writer.tell(members)


def _twin(error: Exception) -> Exception:
    """Give each caller an error of its own: what is raised collects the frames of its raisers."""
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin
