"""Starts: those of many tasks share a few requests, and each has its own answer.

How to think about it:

1. A start that is alone leaves alone, at once, as StartSaga. While one is under way, others gather
   and leave together as StartSagas, at once if no such request is in flight; else they are the next
   one. So the busier the caller, the fuller the requests, and nobody ever waits for company. Only
   a full request goes beside others: a loop with much to do turns slowly, and takes its answers
   late. Measured with 12,000 starts a second from one loop: a request took 0.7 s, of which the
   runtime needed a tenth.
2. Each start has its own time. When that is over, a start that is in a request may or may not have
   happened, and one that never was in one certainly has not: `ApiError.in_doubt` says which.
3. A request belongs to all who are in it: it is never cancelled for one that leaves, and its own
   time is the longest of theirs.
4. What may be asked again is asked again, under the same ids, for as long as each start has time: a
   whole request by the rules of `connection`, and single starts by the same rules on their own
   answers. Those that are refused together for a while come back together, before what is younger.
5. Only as many starts are in flight as the runtime takes: see `room`.
6. In their order, but those that have waited for half of their time let the others go first. With
   more starts than can be sent they would be sent last of all: each request full of starts that
   nobody waits for any more when they are answered, and no caller gets anything.
7. Only those who wait are remembered: a start that has left is in no queue.
8. Who wants the saga's end is not woken in between: its answer goes on to `awaiting` as it comes.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import grpc

from amends.awaiting import Waits
from amends.connection import MAX_BACKOFF_S, MAX_HOLD_S, Connection
from amends.deadlines import Deadlines
from amends.errors import ApiError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from amends.room import Place, Room
from amends.saga_wire import saga_from_wire
from amends.sagas import Saga
from amends.status import error_from_item
from amends.v1 import saga_pb2, types_pb2

if TYPE_CHECKING:
    from amends.v1 import saga_pb2_grpc

MAX_BYTES: Final = 4 * 1024 * 1024
"""Of the starts in one request, a single one excepted; the runtime takes 16 MiB. Much more would
only keep everybody in it waiting for the last one's payload."""
ITEM_BYTES: Final = 8
"""What a request adds to each of its starts, at most: a tag and a length."""


class Started(NamedTuple):
    """What the runtime said of a start."""

    saga: Saga
    """As it stood then, perhaps as lists show it; or at its end."""
    existed: bool
    is_whole: bool
    """It has ended, and has its steps: there is nothing more to be told of it."""
    unheld: Exception | None = None
    """Why its end, which was to be waited for, is not waited for any more; see `Waits.go_on`."""


class Starts:
    """The starts of one client.

    `run` must run for as long as `start` is called, in `MAX_REQUESTS` tasks. `max_waiting` bounds
    those that are not in a request.
    """

    def __init__(
        self,
        connection: Connection,
        stub: saga_pb2_grpc.SagaServiceAsyncStub,
        waits: Waits,
        deadlines: Deadlines,
        *,
        max_waiting: int,
    ) -> None:
        self._connection = connection
        self._max_waiting = max_waiting
        self._start_saga = stub.StartSaga
        self._start_sagas = stub.StartSagas
        self._waits = waits
        self._deadlines = deadlines
        self._under_way = 0
        # In order, for the next requests; a dict would look for its first one through all the
        # places of those that have gone.
        self._waiting: OrderedDict[_Start, None] = OrderedDict()
        self._again: OrderedDict[_Start, None] = OrderedDict()  # before those: they were in one
        self._late: dict[_Start, None] = {}  # after those, and the last one first
        self._room = Room()
        self._requests = 0  # under way
        self._pauses = 0  # after requests of which nothing was taken
        self._took_s = 0.0  # the last one
        self._open: set[_Start] = set()
        self._is_due = anyio.Event()
        self._over: Callable[[bool], Exception] | None = None

    async def start(
        self, request: saga_pb2.StartSagaRequest, timeout_s: float, hold_s: float
    ) -> Started:
        """Start a saga, and give the runtime's answer, with `hold_s` when the saga has ended.

        One that is alone is answered then or after `hold_s`. Any other one is answered then or,
        with the saga as lists show it, when it can be waited for no longer. Raises `ApiError`,
        whose `in_doubt` covers all attempts.
        """
        alone = not self._under_way
        self._under_way += 1
        try:
            if alone:
                return await self._ask_alone(request, timeout_s, hold_s)
            start = _Start(request, timeout_s, self._connection.target, hold_s)
            try:
                return await self._ask_together(start)
            except InvalidRequest as refused:
                return await self._ask_what_is_wrong(request, start.until, refused)
        finally:
            self._under_way -= 1

    def end(self, error_for: Callable[[bool], Exception]) -> None:
        """Answer every start, now and later, with an error; it is made of `in_doubt`."""
        self._over = error_for
        for start in list(self._open):
            start.fail(error_for(start.may_have_happened))

    # -- alone ---------------------------------------------------------------------------------

    async def _ask_alone(
        self, request: saga_pb2.StartSagaRequest, timeout_s: float, hold_s: float
    ) -> Started:
        def ask(left_s: float) -> saga_pb2.StartSagaRequest:
            # What is left beyond the call's own time is the runtime's to hold the reply.
            if hold_s:
                request.wait_ms = max(int((left_s - timeout_s) * 1000), 0)
            return request

        response = await self._connection.call(
            self._start_saga, ask, timeout_s + min(hold_s, MAX_HOLD_S), unsent_s=timeout_s
        )
        return _started(response)

    async def _ask_what_is_wrong(
        self, request: saga_pb2.StartSagaRequest, until: float, refused: InvalidRequest
    ) -> Started:
        """Ask alone what is malformed: in a batch its answer is one text, alone all violations."""
        try:
            return await self._ask_alone(request, max(until - time.monotonic(), 0.001), 0.0)
        except InvalidRequest as error:
            error.in_doubt |= refused.in_doubt
            raise
        except ApiError:
            raise refused from None

    # -- together ------------------------------------------------------------------------------

    async def _ask_together(self, start: _Start) -> Started:
        if self._over is not None:
            raise self._over(False)
        if self._count_waiting() >= self._max_waiting:
            raise _too_many_waiting(self._max_waiting)
        start.tick = self._deadlines.add(start, start.until)
        self._open.add(start)
        self._waiting[start] = None
        self._note_due()
        try:
            return await start.answer
        finally:
            self._deadlines.discard(start, start.tick)
            self._open.discard(start)
            self._waiting.pop(start, None)
            self._again.pop(start, None)
            self._late.pop(start, None)
            if start.is_followed:
                self._waits.remove(start.request.saga_id, start)

    async def run(self) -> None:
        """Send what gathers, one request after another, until cancelled."""
        failed = 0
        while True:
            while not self._may_leave():
                if self._is_due.is_set():
                    self._is_due = anyio.Event()
                await self._is_due.wait()
            self._requests += 1
            try:
                wait_s, failed = await self._send_request(failed)
            finally:
                self._requests -= 1
            await self._pause(wait_s)

    async def _send_request(self, failed: int) -> tuple[float, int]:
        """Send what waits, as far as there is room, and let each start have its answer.

        `failed` is how many requests running have failed; gives it anew, after how long nothing is
        to be sent.
        """
        batch: list[_Start] = []
        place: Place | None = None
        refused: int | None = None
        try:
            if not self._connection.is_ready:
                await self._connection.reach(max(start.until for start in self._all_waiting()))
            batch = self._next_batch()
            place = self._room.take(len(batch))
            refused, wait_s = self._take(batch, await self._send(batch))
        except ApiError as error:
            failed += 1
            backoff_s = self._connection.backoff_s(error, failed)
            self._put_back(batch, error, backoff_s)
            if isinstance(error, Overloaded):
                refused = len(batch) // 2
            return backoff_s or 0.0, failed
        else:
            return wait_s, 0
        finally:
            if place is not None:
                self._room.give_back(place, refused)

    async def _pause(self, seconds: float) -> None:
        """Nothing is sent meanwhile, but others have a turn in any case."""
        self._pauses += seconds > 0
        try:
            await anyio.sleep(seconds)
        finally:
            self._pauses -= seconds > 0
        self._note_due()

    def _may_leave(self) -> bool:
        """Whether a request is to be sent now: see rules 1 and 5."""
        if self._pauses:
            return False
        waiting = self._count_waiting()
        if not self._requests:
            return waiting > 0
        return waiting >= self._room.left and self._room.is_worth_a_request

    def _count_waiting(self) -> int:
        return len(self._again) + len(self._waiting) + len(self._late)

    def _note_due(self) -> None:
        if self._may_leave():
            self._is_due.set()

    def _all_waiting(self) -> list[_Start]:
        return [*self._again, *self._waiting, *self._late]

    def _next_batch(self) -> list[_Start]:
        batch: list[_Start] = []
        room, room_bytes = self._room.left, MAX_BYTES
        now = time.monotonic()
        while len(batch) < room and (start := self._next(now)) is not None:
            room_bytes -= start.size
            if batch and room_bytes < 0:
                self._again[start] = None
                self._again.move_to_end(start, last=False)
                break
            batch.append(start)
        return batch

    def _next(self, now: float) -> _Start | None:
        """The start that is to be sent first, out of its queue; see rule 6."""
        for queue in (self._again, self._waiting):
            while queue:
                start, _ = queue.popitem(last=False)
                if start.answer.done():
                    continue  # its caller is about to leave
                if now < start.late_at:
                    return start
                self._late[start] = None
        while self._late:
            start, _ = self._late.popitem()
            if now + self._took_s >= start.until:
                start.expire()  # not sent, and not to be: it would only be in doubt
            elif not start.answer.done():
                return start
        return None

    async def _send(self, batch: Sequence[_Start]) -> Sequence[saga_pb2.StartSagasResult]:
        """Give the answers to the starts of a batch, in their order. Raises `ApiError`."""
        if not batch:
            return ()  # all have left while the runtime was being reached
        request = saga_pb2.StartSagasRequest(starts=[start.request for start in batch])
        began = time.monotonic()
        timeout_s = max(start.until for start in batch) - began
        for start in batch:
            start.is_sent = True
        try:
            reply = await self._connection.attempt(
                self._start_sagas, request, max(timeout_s, 0.001)
            )
            if len(reply.results) != len(batch):
                raise _broken(f"answered {len(batch)} starts with {len(reply.results)} results")
        except ApiError as error:
            for start in batch:
                start.failed_with(error)
            raise
        self._took_s = time.monotonic() - began
        return reply.results

    def _put_back(self, batch: Sequence[_Start], error: ApiError, wait_s: float | None) -> None:
        """Let a batch that failed ask again, first of all, as far as that helps.

        An empty one stands for everybody: the runtime was not reached.
        """
        for start in batch or self._all_waiting():
            start.error = error
            if wait_s is None or time.monotonic() + wait_s >= start.until:
                start.give_up()
        again = [start for start in batch if not start.answer.done()]
        for start in reversed(again):
            self._again[start] = None
            self._again.move_to_end(start, last=False)

    def _take(
        self, batch: Sequence[_Start], answers: Sequence[saga_pb2.StartSagasResult]
    ) -> tuple[int, float]:
        """Let each start have its answer; those that are to ask again do so together.

        Gives how many do, and how long to wait before the next request: of one of which nothing
        was taken, the next one's fate is known.
        """
        later: list[tuple[_Start, float]] = []
        now = time.monotonic()
        for start, answer in zip(batch, answers, strict=True):
            if answer.HasField("started"):
                self._has_started(start, answer.started, now)
                continue
            error = (
                error_from_item(answer.error, self._connection.target)
                if answer.HasField("error")
                else _broken("answered a start with nothing that this client knows")
            )
            start.failed_with(error)
            start.failures += 1
            wait_s = self._connection.backoff_s(error, start.failures)
            if wait_s is None:
                start.give_up()
            else:
                later.append((start, wait_s))
        if not later:
            return 0, 0.0
        wait_s = max(wait_s for _, wait_s in later)
        self._ask_again_after(wait_s, [start for start, _ in later])
        return len(later), min(wait_s, MAX_BACKOFF_S) if len(later) == len(batch) else 0.0

    def _has_started(self, start: _Start, response: saga_pb2.StartSagaResponse, now: float) -> None:
        if start.answer.done():
            return
        if now >= start.hold_until or _is_whole(response.saga):
            start.answer.set_result(_started(response))
            return
        # In bytes, for it is hardly ever read, and a message would keep all that came with it.
        start.response = response.SerializeToString()
        start.existed = response.existed
        # From here on the end of its time is the end of its wait, and what befalls is the wait's.
        self._open.discard(start)
        self._deadlines.discard(start, start.tick)
        start.tick = self._deadlines.add(start, start.hold_until)
        start.is_followed = True
        self._waits.add(start.request.saga_id, start)

    def _ask_again_after(self, wait_s: float, starts: Sequence[_Start]) -> None:
        for start in starts:
            if time.monotonic() + wait_s >= start.until:
                start.give_up()
        asyncio.get_running_loop().call_later(wait_s, self._come_back, starts)

    def _come_back(self, starts: Iterable[_Start]) -> None:
        self._again.update(dict.fromkeys(start for start in starts if not start.answer.done()))
        self._note_due()


class _Start:
    """One start on its way, and what has become of it so far."""

    __slots__ = (
        "answer",
        "error",
        "existed",
        "failures",
        "hold_until",
        "in_doubt",
        "is_followed",
        "is_sent",
        "late_at",
        "request",
        "response",
        "size",
        "target",
        "tick",
        "until",
    )

    def __init__(
        self,
        request: saga_pb2.StartSagaRequest,
        timeout_s: float,
        target: str,
        hold_s: float,
    ) -> None:
        now = time.monotonic()
        self.request = request
        self.size = request.ByteSize() + ITEM_BYTES
        self.until = now + timeout_s
        self.late_at = now + timeout_s / 2
        self.target = target
        self.hold_until = now + hold_s
        self.tick = 0  # of its present deadline
        self.answer: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.is_sent = False  # in a request that is not answered yet
        self.in_doubt = False  # an earlier attempt may have been carried out
        self.failures = 0
        self.error: ApiError | None = None  # of the last attempt
        self.response: bytes | None = None  # the runtime's answer: its end is waited for now
        self.existed = False  # as that answer says
        self.is_followed = False  # on a stream

    @property
    def may_have_happened(self) -> bool:
        return self.in_doubt or self.is_sent

    def has_ended(self, saga: types_pb2.Saga) -> None:
        self.is_followed = False
        if not self.answer.done():
            self.answer.set_result(Started(saga_from_wire(saga), self.existed, is_whole=True))

    def cannot_wait(self, why: Exception) -> None:
        self.is_followed = False
        self._is_unheld(why)

    def _is_unheld(self, why: Exception) -> None:
        assert self.response is not None, "what is waited for has started"
        if not self.answer.done():
            response = saga_pb2.StartSagaResponse.FromString(self.response)
            self.answer.set_result(_started(response)._replace(unheld=why))

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # so that nobody complains if its caller is cancelled right now

    def failed_with(self, error: ApiError) -> None:
        """An attempt is over; whether there is a further one is decided elsewhere."""
        self.is_sent = False
        self.in_doubt |= error.in_doubt
        self.error = error

    def give_up(self) -> None:
        assert self.error is not None, "given up after an attempt"
        error = copy.copy(self.error)
        error.in_doubt = self.in_doubt
        self.fail(error)

    def expire(self) -> None:
        """Its time is over."""
        if self.response is not None:
            self._is_unheld(TimeoutError())
        elif self.is_sent:
            self.fail(
                DeadlineExceeded(
                    f"the runtime at {self.target} did not answer in time",
                    reason=grpc.StatusCode.DEADLINE_EXCEEDED.name,
                    code=grpc.StatusCode.DEADLINE_EXCEEDED,
                    in_doubt=True,
                )
            )
        elif self.error is not None:
            self.give_up()
        else:
            self.fail(
                Unavailable(
                    f"the start was not sent in time: the runtime at {self.target} has neither "
                    "answered the starts before it nor refused the connection; give it more time",
                    reason="NOT_SENT",
                    code=grpc.StatusCode.UNAVAILABLE,
                    in_doubt=False,
                )
            )


def _started(response: saga_pb2.StartSagaResponse) -> Started:
    return Started(saga_from_wire(response.saga), response.existed, _is_whole(response.saga))


def _is_whole(saga: types_pb2.Saga) -> bool:
    return saga.ended_at_ms > 0 and len(saga.steps) > 0


def _too_many_waiting(limit: int) -> Overloaded:
    return Overloaded(
        f"{limit} starts of this client wait to be sent, and no more may (max_waiting_starts):"
        " start again when some of them have their answers, or fewer at a time",
        reason="TOO_MANY_WAITING_STARTS",
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        metadata={"limit": str(limit)},
        retry_after_s=MAX_BACKOFF_S,
    )


def _broken(what: str) -> ApiError:
    return ApiError(
        f"the runtime {what}: is it of another version than this client?",
        reason=grpc.StatusCode.INTERNAL.name,
        code=grpc.StatusCode.INTERNAL,
        in_doubt=True,
    )
