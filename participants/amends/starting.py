"""Starts: those of many tasks share a few requests, and each has its own answer.

How to think about it:

1. A start that is alone leaves alone, at once, as StartSaga. While one is under way, others gather
   and leave together as StartSagas, at once if no such request is in flight; else they are the next
   one. So the busier the caller, the fuller the requests, and nobody ever waits for company.
2. Each start has its own timer. When it strikes, a start that is in a request may or may not have
   happened, and one that never was in one certainly has not: `ApiError.in_doubt` says which.
3. A request belongs to all who are in it: it is never cancelled for one that leaves, and its own
   time is the longest of theirs.
4. What may be asked again is asked again, under the same ids, for as long as each start has time: a
   whole request by the rules of `connection`, and single starts by the same rules on their own
   answers. Those that are refused together for a while come back together.
5. Only those who wait are remembered: a start that has left is in no queue.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import anyio
import grpc

from amends.connection import MAX_HOLD_S, Connection
from amends.errors import ApiError, DeadlineExceeded, InvalidRequest, Unavailable
from amends.status import error_from_item
from amends.v1 import saga_pb2

if TYPE_CHECKING:
    from amends.v1 import saga_pb2_grpc

MAX_STARTS: Final = 1000
"""Starts in one request: the runtime's own limit."""
MAX_BYTES: Final = 4 * 1024 * 1024
"""Of the starts in one request, a single one excepted; the runtime takes 16 MiB. Much more would
only keep everybody in it waiting for the last one's payload."""
ITEM_BYTES: Final = 8
"""What a request adds to each of its starts, at most: a tag and a length."""


class Starts:
    """The starts of one client. `run` must run for as long as `start` is called."""

    def __init__(self, connection: Connection, stub: saga_pb2_grpc.SagaServiceAsyncStub) -> None:
        self._connection = connection
        self._start_saga = stub.StartSaga
        self._start_sagas = stub.StartSagas
        self._under_way = 0
        self._waiting: dict[_Start, None] = {}  # in order; for the next requests
        self._open: set[_Start] = set()
        self._something_waits = anyio.Event()
        self._over: Callable[[bool], Exception] | None = None

    async def start(
        self, request: saga_pb2.StartSagaRequest, timeout_s: float, hold_s: float
    ) -> saga_pb2.StartSagaResponse:
        """Start a saga, and give the runtime's answer.

        One that is alone is answered when the saga has ended, or after `hold_s`. Any other one is
        answered at once, with the saga as lists show it. Raises `ApiError`, whose `in_doubt` covers
        all attempts.
        """
        alone = not self._under_way
        self._under_way += 1
        try:
            if alone:
                return await self._ask_alone(request, timeout_s, hold_s)
            until = time.monotonic() + timeout_s
            try:
                return await self._ask_together(request, until)
            except InvalidRequest as refused:
                return await self._ask_what_is_wrong(request, until, refused)
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
    ) -> saga_pb2.StartSagaResponse:
        def ask(left_s: float) -> saga_pb2.StartSagaRequest:
            # What is left beyond the call's own time is the runtime's to hold the reply.
            if hold_s:
                request.wait_ms = max(int((left_s - timeout_s) * 1000), 0)
            return request

        return await self._connection.call(
            self._start_saga, ask, timeout_s + min(hold_s, MAX_HOLD_S), unsent_s=timeout_s
        )

    async def _ask_what_is_wrong(
        self, request: saga_pb2.StartSagaRequest, until: float, refused: InvalidRequest
    ) -> saga_pb2.StartSagaResponse:
        """Ask alone what is malformed: in a batch its answer is one text, alone all violations."""
        try:
            return await self._ask_alone(request, max(until - time.monotonic(), 0.001), 0.0)
        except InvalidRequest as error:
            error.in_doubt |= refused.in_doubt
            raise
        except ApiError:
            raise refused from None

    # -- together ------------------------------------------------------------------------------

    async def _ask_together(
        self, request: saga_pb2.StartSagaRequest, until: float
    ) -> saga_pb2.StartSagaResponse:
        if self._over is not None:
            raise self._over(False)
        start = _Start(request, until)
        timer = asyncio.get_running_loop().call_later(
            until - time.monotonic(), start.expire, self._connection.target
        )
        self._open.add(start)
        self._again([start])
        try:
            return await start.answer
        finally:
            timer.cancel()
            self._open.discard(start)
            self._waiting.pop(start, None)

    def _again(self, starts: Iterable[_Start]) -> None:
        self._waiting.update(dict.fromkeys(start for start in starts if not start.answer.done()))
        self._something_waits.set()

    async def run(self) -> None:
        """Send what gathers, one request after another, until cancelled."""
        failed = 0
        while True:
            while not self._waiting:
                self._something_waits = anyio.Event()
                await self._something_waits.wait()
            batch: list[_Start] = []
            try:
                await self._connection.reach(max(start.until for start in self._waiting))
                batch = self._next_batch()
                answers = await self._send(batch)
            except ApiError as error:
                failed += 1
                wait_s = self._connection.backoff_s(error, failed)
                self._put_back(batch, error, wait_s)
                await anyio.sleep(wait_s or 0.0)
            else:
                failed = 0
                self._take(batch, answers)

    def _next_batch(self) -> list[_Start]:
        batch: list[_Start] = []
        over: list[_Start] = []  # their callers are about to leave
        room = MAX_BYTES
        for start in self._waiting:
            if start.answer.done():
                over.append(start)
                continue
            room -= start.size
            if len(batch) == MAX_STARTS or (batch and room < 0):
                break
            batch.append(start)
        for start in (*batch, *over):
            del self._waiting[start]
        return batch

    async def _send(self, batch: Sequence[_Start]) -> Sequence[saga_pb2.StartSagasResult]:
        """Give the answers to the starts of a batch, in their order. Raises `ApiError`."""
        if not batch:
            return ()  # all have left while the runtime was being reached
        request = saga_pb2.StartSagasRequest(starts=[start.request for start in batch])
        timeout_s = max(start.until for start in batch) - time.monotonic()
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
        return reply.results

    def _put_back(self, batch: Sequence[_Start], error: ApiError, wait_s: float | None) -> None:
        """Let a batch that failed ask again, first of all, as far as that helps.

        An empty one stands for everybody: the runtime was not reached.
        """
        for start in batch or list(self._waiting):
            start.error = error
            if wait_s is None or time.monotonic() + wait_s >= start.until:
                start.give_up()
        again = [start for start in batch if not start.answer.done()]
        self._waiting = {**dict.fromkeys(again), **self._waiting}

    def _take(self, batch: Sequence[_Start], answers: Sequence[saga_pb2.StartSagasResult]) -> None:
        """Let each start have its answer; those that are to ask again do so together."""
        later: list[tuple[_Start, float]] = []
        for start, answer in zip(batch, answers, strict=True):
            if answer.HasField("started"):
                start.succeed(answer.started)
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
        if later:
            self._ask_again_after(max(wait_s for _, wait_s in later), [start for start, _ in later])

    def _ask_again_after(self, wait_s: float, starts: Sequence[_Start]) -> None:
        for start in starts:
            if time.monotonic() + wait_s >= start.until:
                start.give_up()
        asyncio.get_running_loop().call_later(wait_s, self._again, starts)


class _Start:
    """One start on its way, and what has become of it so far."""

    __slots__ = ("answer", "error", "failures", "in_doubt", "is_sent", "request", "size", "until")

    def __init__(self, request: saga_pb2.StartSagaRequest, until: float) -> None:
        self.request = request
        self.size = request.ByteSize() + ITEM_BYTES
        self.until = until
        self.answer: asyncio.Future[saga_pb2.StartSagaResponse] = (
            asyncio.get_running_loop().create_future()
        )
        self.is_sent = False  # in a request that is not answered yet
        self.in_doubt = False  # an earlier attempt may have been carried out
        self.failures = 0
        self.error: ApiError | None = None  # of the last attempt

    @property
    def may_have_happened(self) -> bool:
        return self.in_doubt or self.is_sent

    def succeed(self, response: saga_pb2.StartSagaResponse) -> None:
        if not self.answer.done():
            self.answer.set_result(response)

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

    def expire(self, target: str) -> None:
        """Its time is over."""
        if self.is_sent:
            self.fail(
                DeadlineExceeded(
                    f"the runtime at {target} did not answer in time",
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
                    f"the start was not sent in time: the runtime at {target} has neither answered "
                    "the starts before it nor refused the connection; give it more time",
                    reason="NOT_SENT",
                    code=grpc.StatusCode.UNAVAILABLE,
                    in_doubt=False,
                )
            )


def _broken(what: str) -> ApiError:
    return ApiError(
        f"the runtime {what}: is it of another version than this client?",
        reason=grpc.StatusCode.INTERNAL.name,
        code=grpc.StatusCode.INTERNAL,
        in_doubt=True,
    )
