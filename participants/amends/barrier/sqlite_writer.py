"""The one thread that works on the barrier's database, its queue, and the way back to the loop.

How to think about it
---------------------

A transaction belongs to a thread that nobody can cancel, so no cancellation can poison it: a
cancelled task has an `await` less, the statement that it waited for still ends in its own
transaction. The queue in front of the thread is the writer lock, first come, first served.

- A `def` handler is one job and one hop: begin, judge, run, settle, commit, all in the thread;
  where the author allows it one transaction serves several of them (`sqlite_calls.py`).
- An `async def` handler is one job, too, but the thread stays with it: it begins the transaction,
  then takes the handler's statements from a queue of that transaction until it is settled, rolled
  back, or has held the thread for too long (`sqlite_held.py`).
- Either works in the context variables of the task that answers the call, so that what traces or
  logs there knows whose work it is.
- A call whose turn does not come in time, or whose caller leaves before, is withdrawn. A job is in
  the queue or the thread has it: who takes it out, under the queue's lock, has decided whether it
  begins or is withdrawn. So a withdrawn call never ran, and the queue holds no call that nobody
  waits for.
- To wake the event loop is a system call, so it is woken once for all answers that it has not yet
  fetched.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from amends.barrier.sqlite_database import Database, DatabaseBusy
from amends.barrier.verdict import Answer, Question, judge
from amends.outcomes import Call, Outcome

T = TypeVar("T")


class Job(Protocol):
    """Something for the thread to do; whoever waits for it is told by a future."""

    number: int
    """Its place in the queue."""
    until_s: float
    """When it is withdrawn if it still waits, by the event loop's clock."""

    def perform(self, writer: Writer) -> None:
        """Do it, in the thread. Never raises: errors go to the future."""
        ...

    def withdraw(self) -> None:
        """Answer that the call is to be asked again; it is out of the queue and never performed."""
        ...


class Answered(Protocol):
    """What the thread has decided and the event loop is to be told."""

    def deliver(self) -> None:
        """Tell whoever waits, in the event loop."""
        ...


class Writer:
    """The thread, its queue, and the database that it alone touches.

    Belongs to the event loop that runs when it is made.
    """

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.loop = asyncio.get_running_loop()
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._changed = threading.Condition(threading.Lock())
        self._is_stopping = False
        self._last_number = 0
        self._locked_through = 0
        self._timer: asyncio.TimerHandle | None = None
        self._answers: deque[Answered] = deque()
        self._is_woken = False
        self._stopped: concurrent.futures.Future[None] = running_future()
        # A daemon: a `def` handler that never returns must not keep the process from ending.
        # Ending inside a transaction is what the barrier is made for.
        self._thread = threading.Thread(target=self._work, name=f"amends {name}", daemon=True)
        self._thread.start()

    # --- called in the event loop; none of these waits

    def submit(self, job: Job) -> None:
        """Queue a job; not after `stop`."""
        with self._changed:
            self._last_number += 1
            job.number = self._last_number
            self._jobs[job.number] = job
            self._changed.notify()
        if self._timer is None and job.until_s < math.inf:
            self._timer = self.loop.call_at(job.until_s, self._withdraw_late)

    @property
    def queued(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._jobs)

    def withdraw(self, job: Job) -> None:
        """Take a call out of the queue and let it be asked again; nothing, if the thread has it."""
        if self.take(job):
            job.withdraw()

    def stop(self) -> concurrent.futures.Future[None]:
        """Let the queued jobs be done, then close the database; the future says when."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        return self._stopped

    def _withdraw_late(self) -> None:
        """Withdraw the calls whose time is over.

        One timer serves all: they are equally patient, so the first in the queue is the first late.
        """
        now_s = self.loop.time()
        with self._changed:
            calls = [job for job in self._jobs.values() if job.until_s < math.inf]
        late = list(itertools.takewhile(lambda job: job.until_s <= now_s, calls))
        for job in late:
            self.withdraw(job)
        waits = len(calls) > len(late)
        self._timer = (
            self.loop.call_at(calls[len(late)].until_s, self._withdraw_late) if waits else None
        )

    def _deliver(self) -> None:
        # First of all: what is answered after the last look must wake the loop again.
        self._is_woken = False
        while self._answers:
            self._answers.popleft().deliver()

    # --- called in the thread

    def begin(self, number: int, calls: Sequence[Call]) -> bool:
        """Begin a transaction for the job of that number; False if its lock is taken.

        All calls that wait in the queue meanwhile are told the same: each waiting its own busy
        time-out for the same lock would let the last ones miss their deadlines.
        """
        if number <= self._locked_through:
            return False
        try:
            self.database.begin(calls)
        except DatabaseBusy:
            self._locked_through = self._last_number
            return False
        return True

    def take(self, job: Job) -> bool:
        """Take a job out of the queue; False if it has been taken out before."""
        with self._changed:
            return self._jobs.pop(job.number, None) is not None

    def first(self, count: int) -> list[Job]:
        """Give the first jobs of the queue, and leave them there."""
        with self._changed:
            return list(itertools.islice(self._jobs.values(), count))

    def tell(self, answers: Iterable[Answered]) -> None:
        """Have answers delivered in the event loop, in this order."""
        self._answers.extend(answers)
        if not self._is_woken:
            self._is_woken = True
            # The loop may have ended, and then nobody waits for them any more.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _work(self) -> None:
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
    until_s = math.inf

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

    def withdraw(self) -> None:
        """Be cancelled; nobody withdraws one while it is waited for."""
        self.future.cancel()


def running_future() -> concurrent.futures.Future[T]:
    """Make a future that cannot be cancelled any more."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future
