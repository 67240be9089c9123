"""Waits: those of many tasks share one stream, which says of each saga when it has ended.

How to think about it:

1. A stream is told an id when somebody begins to wait for it, after the start, not before: what has
   ended by then is answered at once, and who never waits costs nothing. It is told to forget the id
   when the last one who waits for it leaves. What is to be said gathers while the last message is
   on its way, so a thousand waits that begin together are one message.
2. A stream that breaks is opened again, and told all ids that are still waited for.
3. A stream takes so many ids; when it is full, a further one is opened. So the limit is never the
   caller's.
4. Each wait has its own time, and a last look at the saga when that is over.
5. When the client is closed, the streams end in good order: forgotten ids, last word, last answer.
   One that is merely cancelled leaves work for the event loop, which may be closed by then.
6. An id that the stream refuses is asked for by itself, as WaitSaga: that answer is complete, and
   surely not one to an earlier question. So is every id if the runtime has no such stream.
"""

from __future__ import annotations

import asyncio
import copy
import math
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import grpc

from amends.connection import MAX_HOLD_S, REACH_S, Connection, Stream
from amends.deadlines import Deadlines
from amends.errors import ApiError, DeadlineExceeded, Unavailable, WaitTimeout
from amends.saga_wire import saga_from_wire
from amends.sagas import Saga
from amends.status import error_from_item
from amends.v1 import saga_pb2, types_pb2

if TYPE_CHECKING:
    from amends.v1 import saga_pb2_grpc

MAX_AWAITED: Final = 10_000
"""Ids of one stream: the runtime's own limit."""
MAX_SAID: Final = 10_000
"""Ids in one message, some 1.3 MB at most."""
MAX_ID_BYTES: Final = 128
"""A longer id is no saga's, and would only make a message too large for all others in it."""
ODD_ENDS: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
MAX_ODD_ENDS: Final = 5
"""How often running a stream may end like this, as proxies do when they lose a connection."""
REPLY_GRACE_S: Final = 2.0
"""How long a reply that is due at the end of a wait may take to arrive."""
MAX_PAUSE_S: Final = 0.2
"""Between two waits for the same saga; nothing is missed in it, since a wait looks first."""
LAST_LOOKS: Final = 100
"""Looks at once at the end of waits: more are not faster, and each would miss its own time."""
HANG_UP_S: Final = 1.0
"""How long a runtime may take to say goodbye; one that is well takes a millisecond."""
TURN_S: Final = 10.0
"""How long a last look may wait for its turn: thousands of waits may end in the same moment."""


class Waiting(Protocol):
    """Somebody who waits for a saga on a stream; exactly one of the two is called, once."""

    def has_ended(self, saga: types_pb2.Saga) -> None:
        """It has. The message belongs to a larger one, and is not to be kept."""
        ...

    def cannot_wait(self, why: Exception) -> None:
        """Not on a stream; see `Waits.go_on`."""
        ...


class Waits:
    """The waits of one client. `run` must run for as long as `wait` is called."""

    def __init__(
        self,
        connection: Connection,
        stub: saga_pb2_grpc.SagaServiceAsyncStub,
        deadlines: Deadlines,
        *,
        retry_unavailable: bool,
    ) -> None:
        self._connection = connection
        self._deadlines = deadlines
        self._wait_saga = stub.WaitSaga
        self._await_sagas = stub.AwaitSagas
        self._retry_unavailable = retry_unavailable
        self._lines: list[_Line] = []
        self._new_lines: list[_Line] = []
        self._line_is_new = anyio.Event()
        self._last_looks = anyio.Semaphore(LAST_LOOKS)
        self._over: Callable[[bool], Exception] | None = None

    async def wait(self, saga_id: str, until: float) -> Saga:
        """Give a saga when it has ended, at the latest at the monotonic instant `until`.

        Raises `WaitTimeout` if it has not ended by then, and `ApiError`.
        """
        if len(saga_id.encode()) > MAX_ID_BYTES:
            return await self._alone(saga_id, until)
        if time.monotonic() >= until:
            return await self._last_look(saga_id, until)
        try:
            return await self._on_a_line(saga_id, until)
        except (_AskAloneError, TimeoutError) as why:
            return await self.go_on(saga_id, until, why)

    async def go_on(self, saga_id: str, until: float, why: Exception) -> Saga:
        """Give a saga that cannot be waited for on a stream any more; see `wait`."""
        match why:
            case _AskAloneError():
                return await self._alone(saga_id, until)
            case TimeoutError():
                return await self._last_look(saga_id, until)
            case _:
                raise why

    def end(self, error_for: Callable[[bool], Exception]) -> None:
        """Answer every wait, now and later, with an error; it is made of `in_doubt`."""
        self._over = error_for
        for line in self._lines:
            line.fail(lambda: error_for(True))

    async def hang_up(self) -> None:
        """End all streams, after `end`."""
        with anyio.move_on_after(HANG_UP_S):
            for line in self._lines:
                line.hang_up()
            for line in self._lines:
                await line.wait_hung_up()

    # -- over a stream -------------------------------------------------------------------------

    def add(self, saga_id: str, waiting: Waiting) -> None:
        """Have somebody told when a saga has ended, until `remove`."""
        if self._over is not None:
            waiting.cannot_wait(self._over(True))
        else:
            self._line_for(saga_id).add(saga_id, waiting)

    def remove(self, saga_id: str, waiting: Waiting) -> None:
        """Forget who waits, if it still does."""
        for line in self._lines:
            line.remove(saga_id, waiting)

    async def _on_a_line(self, saga_id: str, until: float) -> Saga:
        if self._over is not None:
            raise self._over(False)
        wait = _Wait()
        tick = None if until == math.inf else self._deadlines.add(wait, until)
        self.add(saga_id, wait)
        try:
            return await wait.answer
        finally:
            if tick is not None:
                self._deadlines.discard(wait, tick)
            if not wait.is_answered:
                self.remove(saga_id, wait)

    def _line_for(self, saga_id: str) -> _Line:
        for line in self._lines:
            if line.takes(saga_id):
                return line
        line = _Line(self._connection, self._await_sagas)
        self._lines.append(line)
        self._new_lines.append(line)
        self._line_is_new.set()
        return line

    async def run(self) -> None:
        """Keep the streams, until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                await self._line_is_new.wait()
                self._line_is_new = anyio.Event()
                while self._new_lines:
                    tasks.start_soon(self._new_lines.pop().run)

    # -- by itself -----------------------------------------------------------------------------

    async def _last_look(self, saga_id: str, until: float) -> Saga:
        with anyio.move_on_after(TURN_S) as turn:
            await self._last_looks.acquire()
        if turn.cancelled_caught:
            raise DeadlineExceeded(
                f"the wait for saga {saga_id} is over, and so many others with it that there was "
                "no time to look at how it stands: it goes on; ask with client.get",
                reason="NO_LAST_LOOK",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        try:
            return await self._alone(saga_id, until)
        finally:
            self._last_looks.release()

    async def _alone(self, saga_id: str, until: float) -> Saga:
        request = saga_pb2.WaitSagaRequest(saga_id=saga_id)

        def ask(left_s: float) -> saga_pb2.WaitSagaRequest:
            # Never 0, which would mean the runtime's default.
            request.timeout_ms = math.ceil(left_s * 1000)
            return request

        seen: Saga | None = None
        while True:
            left_s = max(until - time.monotonic(), 0.0)
            try:
                reply = await self._connection.call(
                    self._wait_saga, ask, min(left_s, MAX_HOLD_S), grace_s=REPLY_GRACE_S
                )
            except (Unavailable, DeadlineExceeded) as error:
                if self._connection.closed or not self._retry_unavailable:
                    raise
                if time.monotonic() < until:
                    continue  # the call has asked again, with waits between, for as long as it had
                if seen is None:
                    raise
                raise WaitTimeout(seen, f"{_not_ended(seen)} Then: {error}") from error
            seen = saga_from_wire(reply.saga)
            if reply.ended:
                return seen
            if time.monotonic() >= until:
                raise WaitTimeout(seen, _not_ended(seen))
            # A runtime that stops answers early; without a pause it would be asked in a circle.
            await anyio.sleep(random.uniform(0, MAX_PAUSE_S))  # noqa: S311  # guards no secret


class _Wait:
    """One call of `Waits.wait`."""

    __slots__ = ("answer", "is_answered")

    def __init__(self) -> None:
        self.answer: asyncio.Future[Saga] = asyncio.get_running_loop().create_future()
        self.is_answered = False  # by the stream, which has forgotten it then

    def has_ended(self, saga: types_pb2.Saga) -> None:
        self.is_answered = True
        if not self.answer.done():
            self.answer.set_result(saga_from_wire(saga))

    def cannot_wait(self, why: Exception) -> None:
        self.is_answered = True
        self._fail(why)

    def expire(self) -> None:
        self._fail(TimeoutError())

    def _fail(self, why: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(why)
            self.answer.exception()  # so that nobody complains if its caller is cancelled right now


class _Line:
    """One stream and its ids, through all of its connections."""

    def __init__(
        self,
        connection: Connection,
        method: grpc.aio.StreamStreamMultiCallable[
            saga_pb2.AwaitSagasRequest, saga_pb2.AwaitSagasResponse
        ],
    ) -> None:
        self._connection = connection
        self._method = method
        self._wanted: dict[str, list[Waiting]] = {}
        self._to_add: dict[str, None] = {}
        self._to_remove: dict[str, None] = {}
        self._something_to_say = anyio.Event()
        self._is_answered = False  # since it was opened last
        self._is_missing = False  # the runtime has no such stream
        self._failures: dict[str, int] = {}
        self._is_closing = False
        self._no_stream = anyio.Event()  # set while none is open
        self._no_stream.set()

    def takes(self, saga_id: str) -> bool:
        """Whether there is room for an id, or it is there."""
        return saga_id in self._wanted or len(self._wanted) < MAX_AWAITED

    def add(self, saga_id: str, waiting: Waiting) -> None:
        """Tell somebody when the saga has ended, or that it cannot be waited for here."""
        if self._is_missing:
            waiting.cannot_wait(_AskAloneError())
            return
        others = self._wanted.get(saga_id)
        if others is not None:
            others.append(waiting)
        else:
            self._wanted[saga_id] = [waiting]
            self._to_add[saga_id] = None
            self._something_to_say.set()

    def remove(self, saga_id: str, waiting: Waiting) -> None:
        """Forget who waits, if it still does; and the id with the last one."""
        others = self._wanted.get(saga_id, [])
        if waiting not in others:
            return
        others.remove(waiting)
        if others:
            return
        if saga_id not in self._to_add:  # it was said
            self._to_remove[saga_id] = None
            self._something_to_say.set()
        self._forget(saga_id)

    def fail(self, error_for: Callable[[], Exception]) -> None:
        """Answer all with an error."""
        self._to_remove.update(dict.fromkeys(self._wanted.keys() - self._to_add.keys()))
        while self._wanted:
            self._refuse(next(iter(self._wanted)), error_for)

    def hang_up(self) -> None:
        """End the stream, if one is open, when what there is to say is said."""
        self._is_closing = True
        self._something_to_say.set()

    async def wait_hung_up(self) -> None:
        """Return when no stream is open."""
        await self._no_stream.wait()

    def _forget(self, saga_id: str) -> list[Waiting]:
        self._to_add.pop(saga_id, None)
        self._failures.pop(saga_id, None)
        return self._wanted.pop(saga_id, [])

    def _say_again(self, saga_id: str) -> None:
        if saga_id in self._wanted:
            self._to_add[saga_id] = None
            self._something_to_say.set()

    # -- the stream ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a stream open while there is something to wait for, until cancelled."""
        failed = 0
        while True:
            while not self._wanted:
                self._something_to_say = anyio.Event()
                await self._something_to_say.wait()
            error = await self._one_stream()
            failed = 1 if self._is_answered else failed + 1
            wait_s = self._connection.backoff_s(_as_unavailable(error, failed), failed)
            if error.code is grpc.StatusCode.UNIMPLEMENTED:
                self._is_missing = True
                self.fail(_AskAloneError)
            elif wait_s is None:
                self.fail(partial(copy.copy, error))
            await anyio.sleep(wait_s or 0.0)

    async def _one_stream(self) -> ApiError:
        """Open a stream, serve it until it is over, and give what it ended with."""
        self._is_answered = False
        try:
            await self._connection.reach(time.monotonic() + REACH_S)
        except ApiError as error:
            return error
        stream = self._connection.stream(self._method)
        self._no_stream = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, stream)
                ended_with = await self._read(stream)
                tasks.cancel_scope.cancel()
        finally:
            stream.cancel()
            self._no_stream.set()
            # Nothing of this was said to the next one.
            self._to_add = dict.fromkeys(self._wanted)
            self._to_remove = {}
        return ended_with

    async def _write(
        self, stream: Stream[saga_pb2.AwaitSagasRequest, saga_pb2.AwaitSagasResponse]
    ) -> None:
        while True:
            while not self._to_add and not self._to_remove:
                if self._is_closing:
                    await stream.finish()
                    return
                self._something_to_say = anyio.Event()
                await self._something_to_say.wait()
            # What is to be forgotten first: the stream may be full. An id may be in both.
            remove = _taken(self._to_remove)
            add = [] if self._to_remove else _taken(self._to_add)
            await stream.write(saga_pb2.AwaitSagasRequest(add=add, remove=remove))

    async def _read(
        self, stream: Stream[saga_pb2.AwaitSagasRequest, saga_pb2.AwaitSagasResponse]
    ) -> ApiError:
        while True:
            try:
                message = await stream.read()
            except ApiError as error:
                return error
            self._is_answered = True
            for end in message.ends:
                self._take(end)

    def _take(self, end: saga_pb2.SagaEnd) -> None:
        if end.HasField("saga"):
            for waiting in self._forget(end.saga_id):
                waiting.has_ended(end.saga)
        elif end.saga_id in self._wanted:
            self._refused(end)

    def _refused(self, end: saga_pb2.SagaEnd) -> None:
        error = error_from_item(end.error, self._connection.target)
        failures = self._failures[end.saga_id] = self._failures.get(end.saga_id, 0) + 1
        wait_s = self._connection.backoff_s(error, failures)
        if wait_s is not None:
            asyncio.get_running_loop().call_later(wait_s, self._say_again, end.saga_id)
        else:
            self._refuse(end.saga_id, _AskAloneError)

    def _refuse(self, saga_id: str, error_for: Callable[[], Exception]) -> None:
        for waiting in self._forget(saga_id):
            waiting.cannot_wait(error_for())


class _AskAloneError(Exception):
    """The id is to be asked for by itself."""


def _as_unavailable(error: ApiError, failed: int) -> ApiError:
    """Give `Unavailable` for what may be no more than a broken stream, `failed` times running."""
    # A stream has no time limit of its own: it is somebody's in between.
    if isinstance(error, DeadlineExceeded) or (error.code in ODD_ENDS and failed < MAX_ODD_ENDS):
        return Unavailable(error.message, reason=error.reason, code=error.code)
    return error


def _taken(ids: dict[str, None]) -> list[str]:
    """Take out as many ids as one message may say."""
    taken = list(islice(ids, MAX_SAID))
    for saga_id in taken:
        del ids[saga_id]
    return taken


def _not_ended(saga: Saga) -> str:
    return f"saga {saga.saga_id} has not ended in time: it is {saga.state}, and goes on."
