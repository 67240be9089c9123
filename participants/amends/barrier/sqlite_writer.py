"""The one thread that works on the barrier's database, and the jobs it is given.

How to think about it
---------------------

A transaction belongs to a thread that nobody can cancel, so no cancellation can poison it: a
cancelled task has an `await` less, the statement that it waited for still ends in its own
transaction. The queue in front of the thread is the writer lock, first come, first served.

- A `def` handler is one job and one hop: begin, judge, run, settle, commit, all in the thread.
- An `async def` handler is one job, too, but the thread stays with it: it begins the transaction,
  then takes the handler's statements from a queue of that transaction until it is settled, rolled
  back, or has held the thread for too long.
- Either works in the context variables of the task that answers the call, so that what traces or
  logs there knows whose work it is.
- A call whose turn does not come in time, or whose caller leaves before, is withdrawn. A job is in
  the queue or the thread has it: who takes it out, under the queue's lock, has decided whether it
  begins or is withdrawn. So a withdrawn call never ran, and the queue holds no call that nobody
  waits for.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from amends.barrier.sqlite_database import Database, DatabaseBusy
from amends.barrier.verdict import Answer, Question, judge
from amends.errors import HandlerFailed, NotCompensatable, TransactionMisused
from amends.handler import Handler, thread_context
from amends.outcomes import Call, Outcome

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOLD_MARGIN_S: Final = 2.0
"""The event loop ends a handler that holds the transaction for too long; only if the loop does not
come to it in this time (the handler blocks it) does the thread roll back by itself."""


class Job(Protocol):
    """Something for the thread to do; whoever waits for it is told by a future."""

    number: int

    def perform(self, writer: Writer) -> None:
        """Do it, in the thread. Never raises: errors go to the future."""
        ...


class CallJob(Job, Protocol):
    """A job that answers a call."""

    def withdraw(self) -> None:
        """Answer that the call is to be asked again; it is out of the queue and never performed."""
        ...


class Writer:
    """The thread, its queue, and the database that it alone touches."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._changed = threading.Condition(threading.Lock())
        self._is_stopping = False
        self._last_number = 0
        self._locked_through = 0
        self._stopped: concurrent.futures.Future[None] = running_future()
        # A daemon: a `def` handler that never returns must not keep the process from ending.
        # Ending inside a transaction is what the barrier is made for.
        self._thread = threading.Thread(target=self._work, name=f"amends {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; call from one thread only, and not after `stop`."""
        with self._changed:
            self._last_number += 1
            job.number = self._last_number
            self._jobs[job.number] = job
            self._changed.notify()

    @property
    def queued(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._jobs)

    def withdraw(self, job: CallJob) -> None:
        """Take a call out of the queue and let it be asked again; nothing, if the thread has it."""
        with self._changed:
            if self._jobs.pop(job.number, None) is None:
                return
        job.withdraw()

    def stop(self) -> concurrent.futures.Future[None]:
        """Let the queued jobs be done, then close the database; the future says when."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        return self._stopped

    def begin(self, job: Job, call: Call) -> Outcome | None:
        """Begin a call's transaction as `Database.begin` does; a lock that is taken is an answer.

        All calls that wait in the queue meanwhile get the same answer: each waiting its own busy
        time-out for the same lock would let the last ones miss their deadlines.
        """
        if job.number > self._locked_through:
            try:
                return self.database.begin(call)
            except DatabaseBusy:
                self._locked_through = self._last_number
        return held_up(call)

    def _work(self) -> None:
        # One job, one commit. To let several `def` calls share a commit, take all of them that are
        # queued here, begin once, give each its own savepoint, commit once, then answer them all.
        while (job := self._next()) is not None:
            job.perform(self)
            del job  # or an idle thread would keep the last call's payloads
        try:
            self.database.close()
        except Exception as error:  # noqa: BLE001  # goes to whoever waits for the future
            self._stopped.set_exception(error)
        else:
            self._stopped.set_result(None)

    def _next(self) -> Job | None:
        """Wait for the next job; ``None`` when there will be none."""
        with self._changed:
            while not self._jobs:
                if self._is_stopping:
                    return None
                self._changed.wait()
            _, job = self._jobs.popitem(last=False)
            return job


def held_up(call: Call) -> Outcome:
    """Give the answer to a call that somebody else keeps from being looked at."""
    held = judge(Question(call.verb, b""), None)
    assert isinstance(held, Answer)
    return held.outcome


class Task(Generic[T]):
    """A function that is run in the thread, with no transaction around it."""

    number = 0

    def __init__(self, work: Callable[[Database], T]) -> None:
        self._work = work
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def perform(self, writer: Writer) -> None:
        """Run it; what it raises rolls back a transaction that it has begun."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            value = self._work(writer.database)
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            writer.database.roll_back()
            self.future.set_exception(error)
        else:
            self.future.set_result(value)


class OneHop:
    """One call of a `def` handler, from begin to commit; or one for which there is no handler."""

    number = 0

    def __init__(
        self,
        call: Call,
        handler: Handler | None,
        *,
        lend: Callable[[Database], Loan],
        release: Callable[[], None],
    ) -> None:
        self._call = call
        self._handler = handler
        self._lend = lend
        self._release = release
        self._context = thread_context()
        self.future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()

    def perform(self, writer: Writer) -> None:
        """Answer the call. If its caller left while it was queued, nothing is run."""
        if not self.future.set_running_or_notify_cancel():
            self._release()
            return
        try:
            outcome = self._context.run(self._answer, writer)
        except BaseException as error:  # noqa: BLE001  # goes to whoever waits for the future
            writer.database.roll_back()
            self._release()
            self.future.set_exception(error)
        else:
            # Before the answer: whoever has it may ask again at once.
            self._release()
            self.future.set_result(outcome)

    def withdraw(self) -> None:
        """Answer that the call is to be asked again."""
        self._release()
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(held_up(self._call))

    def _answer(self, writer: Writer) -> Outcome:
        outcome = writer.begin(self, self._call)
        if outcome is not None:
            return outcome
        if self._handler is None:
            call = self._call
            raise NotCompensatable(action=call.action, step=call.step, saga_id=call.saga_id)
        loan = self._lend(writer.database)
        try:
            outcome = self._handler.answer(self._call, loan)
        finally:
            loan.end()
        return writer.database.settle(outcome)


class Loan(Protocol):
    """A transaction in a handler's hands, to be taken back."""

    def end(self) -> None:
        """Refuse every further use."""
        ...


class Held:
    """One call of an `async def` handler: the thread stays with it until its transaction ends."""

    number = 0

    def __init__(self, call: Call, *, max_hold_s: float, release: Callable[[], None]) -> None:
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
            return self._put(_Statement(lambda database: database.settle(outcome), last=True))
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
            outcome = self._context.run(writer.begin, self, self._call)
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


def running_future() -> concurrent.futures.Future[T]:
    """Make a future that cannot be cancelled any more."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future
