"""Calls of `async def` handlers: each has a transaction of its own, across its awaits.

The thread stays with the call from its begin to its end and does the handler's statements as they
come. So such a call shares no commit: others would wait for whatever its handler awaits, and a
handler that is cancelled would have to be told from what the others wrote.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from amends.barrier.sqlite_database import Database
from amends.barrier.sqlite_writer import Writer, held_up, running_future
from amends.errors import HandlerFailed, TransactionMisused
from amends.outcomes import Call, Outcome

T = TypeVar("T")

HOLD_MARGIN_S: Final = 2.0
"""The event loop ends a handler that holds the transaction for too long; only if the loop does not
come to it in this time (the handler blocks it) does the thread roll back by itself."""


class Held:
    """One call of an `async def` handler: the thread stays with it until its transaction ends."""

    number = 0

    def __init__(
        self, call: Call, *, until_s: float, max_hold_s: float, release: Callable[[], None]
    ) -> None:
        self.until_s = until_s
        self._call = call
        self._max_hold_s = max_hold_s
        self._release = release
        self._context = contextvars.copy_context()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self.begun: concurrent.futures.Future[Outcome | None] = concurrent.futures.Future()
        """The answer if there is one already, else ``None``: run the handler."""
        self.ended: concurrent.futures.Future[None] = running_future()
        """The transaction has ended and the thread is free."""

    # --- called in the event loop; none of these waits

    def submit(self, work: Callable[[Database], T]) -> concurrent.futures.Future[T]:
        """Queue a statement. Raises `TransactionMisused` if the transaction has ended."""
        return self._put(_Statement(work))

    def settle(self, outcome: Outcome) -> concurrent.futures.Future[Outcome]:
        """Queue the end of the transaction. Raises `HandlerFailed` if it has ended already."""
        try:
            return self._put(_Statement(partial(_settle, outcome), last=True))
        except TransactionMisused as error:
            raise self._too_long() from error

    def abandon(self) -> None:
        """Queue a rollback; harmless if the transaction has ended or never began."""
        self.begun.cancel()
        self._commands.put(None)

    def withdraw(self) -> None:
        """Answer that the call is to be asked again."""
        self._end()
        if self.begun.set_running_or_notify_cancel():
            self.begun.set_result(held_up(self._call))

    def _put(self, statement: _Statement[T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._over:
                raise TransactionMisused(
                    "the transaction has ended; it lives as long as its handler"
                )
            self._commands.put(statement)
        return statement.future

    def _too_long(self) -> HandlerFailed:
        return HandlerFailed(
            f"the handler of {self._call.verb} {self._call.action!r} held its transaction for more "
            f"than {self._max_hold_s:g} s and blocked the event loop; it was rolled back"
        )

    # --- called in the thread

    def perform(self, writer: Writer) -> None:
        """Begin, then do what the handler asks until the transaction ends."""
        if not self.begun.set_running_or_notify_cancel():
            self._end()
            return
        try:
            outcome = self._context.run(self._begin, writer)
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            writer.database.roll_back()
            self._end()
            self.begun.set_exception(error)
            return
        if outcome is not None:
            self._end()
            self.begun.set_result(outcome)
            return
        self.begun.set_result(None)
        self._serve(writer.database)

    def _begin(self, writer: Writer) -> Outcome | None:
        if not writer.begin(self.number, [self._call]):
            return held_up(self._call)
        outcome = writer.database.enter(self._call)
        if outcome is not None:
            writer.database.commit()
        return outcome

    def _serve(self, database: Database) -> None:
        until_s = time.monotonic() + self._max_hold_s + HOLD_MARGIN_S
        while True:
            try:
                command = self._commands.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                command = None
            if command is None:
                database.roll_back()
                self._end()
                return
            if command.last:
                error = command.perform(database)
                if error is not None:
                    database.roll_back()
                self._end()
                command.tell(error)
                return
            command.tell(command.perform(database))

    def _end(self) -> None:
        with self._lock:
            self._over = True
        while not self._commands.empty():
            late = self._commands.get()
            if late is not None:
                late.tell(TransactionMisused("the transaction has ended before this statement"))
        self._release()
        self.ended.set_result(None)


def _settle(outcome: Outcome, database: Database) -> Outcome:
    outcome = database.settle(outcome)
    database.commit()
    return outcome


class _Command(Protocol):
    last: bool

    def perform(self, database: Database) -> BaseException | None: ...

    def tell(self, error: BaseException | None) -> None: ...


class _Statement(Generic[T]):
    """Work inside a held transaction; done and told apart, so that the end can come in between."""

    def __init__(self, work: Callable[[Database], T], *, last: bool = False) -> None:
        self._work = work
        self._context = contextvars.copy_context()
        self._values: list[T] = []
        self.last = last
        # Never cancelled: that a waiting task left says nothing about the statement.
        self.future: concurrent.futures.Future[T] = running_future()

    def perform(self, database: Database) -> BaseException | None:
        try:
            self._values.append(self._context.run(self._work, database))
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            return error
        return None

    def tell(self, error: BaseException | None) -> None:
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(self._values.pop())
