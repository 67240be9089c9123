"""A stream: calls that come in batches, and their replies, in batches and in any order.

How to think about it
---------------------

1. What a call is answered with is `answering.py`'s affair and no other than for a unary call; the
   places are those of the whole server. Here is only how calls come and replies go.
2. Each call that has come is answered once: with its outcome, or with the error that a unary call
   would have failed with. Only the end of the stream leaves calls without an answer.
3. The first message grants credits: as many calls as may be under way on this stream. A call beyond
   them is not dropped, it is answered RESOURCE_EXHAUSTED.
4. Replies gather while a message is being written, and leave together in the next one: the busier
   the stream, the fuller the messages. Whoever sends without reading is not read any further.
5. A call's time is up by one timer for all of its batch that have as long. Its reply is sent then;
   its handler is cancelled, and keeps its place until it has really ended.
6. A worker is a task that answers one ready call after another, each in a copy of the stream's
   context, for as long as their handlers need not wait. The task of a handler that waits belongs to
   that call alone: it ends with it, and others see to the rest. So what a handler leaves behind in
   its context or its task meets no other call, and a task that was cancelled is not used again. A
   task for each call would take 2 µs more of the 10 µs that a call takes.
7. A stream that breaks cancels its handlers, as unary calls are whose caller has left. One that
   drains says so once, takes no new calls, answers those under way, and ends.
8. What goes wrong with one call is that call's error, and its neighbours do not notice: whatever
   its handler raises, and an answer that cannot be written. Only what ends the process, and a fault
   of our own outside of any call, ends a stream; then with a status, so that nobody waits for it.

A call's fields are read when they are asked for: a `Call` that is kept keeps its batch in memory.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import types
from collections import deque
from collections.abc import Awaitable, Coroutine, Generator
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from amends.answering import Answering, NoOutcome, tell
from amends.outcomes import MAX_REASON, Call, Done, InProgress, Outcome
from amends.tracing import CallTracer
from amends.v1 import participant_pb2
from amends.wire import VERBS, Said

logger = logging.getLogger(__name__)

WAITING_CREDITS: Final = 256
"""Credits beyond the server's places: calls that are here already when a place becomes free. Fewer
would leave handlers idle for the time that a message takes; more would wait here, in their own
time, what they can wait in the runtime for nothing."""

MAX_REPLIES: Final = 512
"""Replies in one message."""

MAX_BYTES: Final = 1024 * 1024
"""Of the replies in one message, a single one excepted: gRPC takes 4 MiB."""

MAX_REPLY_BYTES: Final = 2 * 1024 * 1024
"""Of one reply. A result has at most half as many; an outcome that an author has changed after it
was made may have any number."""

MAX_TURN_S: Final = 0.005
"""Of a worker whose handlers compute and never wait; then others in the event loop have theirs."""

REPLY_BYTES: Final = 64
"""What a reply has besides its result, roughly; or besides its reason and its message."""

MAX_SHOWN: Final = 512
"""Characters of an error that comes from reading the stream."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Answer: TypeAlias = Outcome | NoOutcome


class _UnderWay:
    """One call, from its arrival to the end of its handler."""

    __slots__ = ("call", "call_number", "is_answered", "line_number", "message", "task", "time_out")

    def __init__(
        self, call_number: int, call: Call, message: participant_pb2.Call, time_out: _TimeOut
    ) -> None:
        self.call_number = call_number
        self.call = call
        self.message = message
        self.time_out = time_out
        self.is_answered = False
        self.line_number = 0
        """Where it stands in the line for a place; 0 once it has one."""
        self.task: asyncio.Task[None] | None = None
        """The task of its handler, once that waits."""


class _TimeOut:
    """The end of the time of some calls that came together and have as long."""

    __slots__ = ("calls", "left", "since_ns", "timer")

    def __init__(self, since_ns: int) -> None:
        self.since_ns = since_ns
        self.calls: list[_UnderWay] = []
        self.left = 0
        self.timer: asyncio.TimerHandle | None = None

    def add(self, one: _UnderWay) -> None:
        self.calls.append(one)
        self.left += 1

    def answered(self) -> None:
        """Count one call less; a timer that nobody needs any more is given up."""
        self.left -= 1
        if not self.left and self.timer is not None:
            self.timer.cancel()
            self.calls.clear()


class _Batch:
    """What the calls of one message have in common."""

    __slots__ = ("at_ms", "said", "since_ns", "time_outs")

    def __init__(self, said: Said) -> None:
        self.said = said
        self.since_ns = time.time_ns()
        self.at_ms = self.since_ns // 1_000_000
        self.time_outs: dict[int, _TimeOut] = {}

    def time_out(self, timeout_ms: int) -> _TimeOut:
        """Give the time-out of those that have as long."""
        found = self.time_outs.get(timeout_ms)
        if found is None:
            found = self.time_outs[timeout_ms] = _TimeOut(self.since_ns)
        return found


class _Interrupted(Exception):
    """Something that ends the process has struck in one of a stream's tasks."""


class Exchange:
    """One stream of one runtime. `serve` is its life."""

    def __init__(self, answering: Answering, tracer: CallTracer, context: Context) -> None:
        self._answering = answering
        self._admission = answering.admission
        self._tracer = tracer
        self._stream = context
        self._credits = answering.admission.max_concurrent + WAITING_CREDITS
        self._loop = asyncio.get_running_loop()
        # What every call begins with; see rule 6.
        self._context = contextvars.copy_context()
        self._under_way: dict[int, _UnderWay] = {}
        self._ready: deque[_UnderWay] = deque()
        self._coming = 0  # workers that look at what is ready without having to wait before
        self._has_waited = False  # the handler that was begun last
        self._replies: deque[tuple[int, Answer]] = deque()
        self._not_replied = 0  # what has come and is in no message yet
        self._to_grant = 0
        self._is_granted = False
        self._is_closed = False
        self._has_ended = False  # the runtime sends no more
        self._says_draining = answering.admission.is_draining  # or somebody says so later
        self._refusal: NoOutcome | None = None
        self.interrupt: BaseException | None = None
        """What ends the process, if it has struck here."""
        self._writer: asyncio.Future[None] | None = None  # it waits for something to write
        self._reader: asyncio.Future[None] | None = None  # it waits until more has been written

    async def serve(self) -> NoOutcome | None:
        """Take calls, send replies until the stream is over; give the error that ends it, or None.

        If it is cancelled, because the stream has broken, the handlers under way are, too. Nothing
        else is raised: what ends the process is `interrupt` then, to be raised when the stream has
        its status.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                reader = tasks.create_task(self._read())
                try:
                    await self._write()
                finally:
                    self._close()
                reader.cancel()
                for one in self._under_way.values():
                    if one.task is not None:
                        one.task.cancel()
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            self.interrupt = error
        except BaseException as failure:  # noqa: BLE001  # rule 8
            if self.interrupt is None:
                self._refusal = _why_it_ends(failure) or self._refusal
        if self.interrupt is not None:
            self._refusal = self._answering.refuse_when_interrupted()
        return self._refusal

    def begin_draining(self) -> None:
        """Say that no new calls are wanted, answer those under way, then end."""
        self._says_draining = True
        self._wake_writer()

    def _interrupted_by(self, error: BaseException) -> _Interrupted:
        """Give what ends the stream in place of what ends the process.

        That would leave the event loop from here, at once, and the stream with no status.
        """
        self.interrupt = error
        self._close()
        return _Interrupted()

    def _close(self) -> None:
        """Answer nothing more, and give back what calls hold whose handlers have not begun.

        To be done before any handler is cancelled because of the stream: one that is cancelled
        otherwise has an answer.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for one in self._under_way.values():
            if one.time_out.timer is not None:
                one.time_out.timer.cancel()
            if one.line_number:
                self._admission.step_out(one.line_number)
        for _ in range(len(self._ready)):
            self._admission.leave()
        self._ready.clear()

    # ---------------------------------------------------------------------------------- reading

    async def _read(self) -> None:
        """Take in what comes, until nothing more does or the stream is not to go on."""
        try:
            self._refusal = await self._take_hello()
            while self._refusal is None:
                request = await self._stream.read()
                if request is grpc.aio.EOF:
                    break
                self._refusal = self._take(request)
                await self._wait_written()
        except DecodeError as error:
            self._refusal = _invalid(f"a message cannot be read: {str(error)[:MAX_SHOWN]}")
        except (KeyboardInterrupt, SystemExit) as error:
            raise self._interrupted_by(error) from error
        except BaseException:
            self._close()
            raise
        self._has_ended = True
        self._wake_writer()

    async def _take_hello(self) -> NoOutcome | None:
        request = await self._stream.read()
        if request is grpc.aio.EOF or not request.HasField("hello"):
            return _invalid("the first message of a stream carries hello")
        if len(request.calls):
            return _invalid("the first message of a stream carries no calls: nothing was done")
        hello = request.hello
        if not hello.store_id:
            return _invalid("hello.store_id is missing")
        refusal = self._answering.refuse_stranger(hello.participant)
        if refusal is not None:
            logger.error("a stream is refused: %s", refusal.message)
            return refusal
        refusal = self._answering.refuse_when_draining()
        if refusal is not None:
            return refusal
        self._hello = hello
        self._to_grant = self._credits
        self._is_granted = True
        self._wake_writer()
        return None

    def _take(self, request: participant_pb2.ExchangeRequest) -> NoOutcome | None:
        """Take a batch in; what refuses the whole stream is returned."""
        if request.HasField("hello"):
            return _invalid("hello is said once, in the first message")
        self._tracer.look()
        hello = self._hello
        batch = _Batch(
            Said(hello.store_id, hello.epoch, hello.incarnation, request.oldest_open_at_ms)
        )
        for member in request.calls:
            self._arrive(member, batch)
        self._staff()
        for timeout_ms, time_out in batch.time_outs.items():
            if time_out.left:
                time_out.timer = self._loop.call_later(
                    timeout_ms / 1000, self._expire, time_out, timeout_ms
                )
        return None

    def _arrive(self, member: participant_pb2.ExchangeCall, batch: _Batch) -> None:
        """Answer a call at once if it cannot be taken; else see that it gets a place."""
        number, timeout_ms, message = member.call_number, member.timeout_ms, member.call
        verb = VERBS.get(message.verb)
        call: Call | NoOutcome
        if self._not_replied >= self._credits:
            call = self._beyond_credits()
        elif number in self._under_way:
            call = _invalid(f"call_number {number} is that of a call under way")
        elif timeout_ms < 1:
            call = _too_late(timeout_ms)
        else:
            known = message if member.HasField("call") else None
            call = self._answering.admit(known, verb, batch.said, batch.at_ms + timeout_ms)
        self._not_replied += 1
        if isinstance(call, NoOutcome):
            if verb is not None:  # without one there is no name for a span
                with self._tracer.span(verb, message, batch.since_ns) as span:
                    tell(span, call)
            self._reply(number, call)
            return
        time_out = batch.time_out(timeout_ms)
        one = self._under_way[number] = _UnderWay(number, call, message, time_out)
        time_out.add(one)
        if self._admission.enter():
            self._ready.append(one)  # and `_take` has it staffed
        else:
            one.line_number = self._admission.line_up(partial(self._begin, one))

    def _begin(self, one: _UnderWay) -> bool:
        """Take the place that a call has waited for."""
        one.line_number = 0
        self._ready.append(one)
        self._staff()
        return True

    def _expire(self, time_out: _TimeOut, timeout_ms: int) -> None:
        """Answer what has no answer in time, and stop its handlers."""
        too_late = _too_late(timeout_ms)
        for one in [*time_out.calls]:
            if one.is_answered:
                continue
            if one.line_number:
                self._admission.step_out(one.line_number)
                one.line_number = 0
            if one.task is not None:
                one.task.cancel()  # and its span tells why
            else:
                with self._tracer.span(one.call.verb, one.message, time_out.since_ns) as span:
                    tell(span, too_late)
            self._answer(one, too_late)

    async def _wait_written(self) -> None:
        """Read no further while nobody reads what is answered; see rule 4."""
        while self._not_replied > 2 * self._credits:
            self._reader = self._loop.create_future()
            await self._reader

    # -------------------------------------------------------------------------------- answering

    def _staff(self) -> None:
        """See to it that somebody takes what is ready.

        One worker for all, unless the last handler had to wait: then its neighbours will, too, and
        all of them are begun in this turn of the event loop.
        """
        if self._is_closed:
            return
        wanted = len(self._ready) if self._has_waited else min(1, len(self._ready))
        while self._coming < wanted:
            self._coming += 1
            self._tasks.create_task(self._work())

    async def _work(self) -> None:
        """Answer calls for as long as none has to wait; see rule 6."""
        try:
            waiting = await self._answer_ready()
        except (KeyboardInterrupt, SystemExit) as error:
            raise self._interrupted_by(error) from error
        finally:
            # Also if it is cancelled, by a handler of before that has kept the task.
            self._coming -= 1
            self._staff()
        if waiting is not None:
            await self._wait_for(*waiting)

    async def _answer_ready(self) -> tuple[_UnderWay, Awaitable[Answer]] | None:
        """Answer ready calls; give the one that has to wait, and the rest of its answering."""
        task = asyncio.current_task()
        assert task is not None
        ready, now_s = self._ready, self._loop.time
        until_s = now_s() + MAX_TURN_S
        while ready:
            one = ready.popleft()
            if one.is_answered:  # its time was up before its turn came
                self._admission.leave()
                continue
            context = self._context.copy()
            answer: Answer
            try:
                answering = self._ask(one, context)
                waits_for = context.run(answering.send, None)
            except StopIteration as end:
                answer = end.value
            except asyncio.CancelledError:
                answer = _CANCELLED_ITSELF
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self._admission.leave()
                    raise
                answer = _lost(error)
            else:
                self._has_waited = True
                one.task = task
                return one, _go_on(answering, context, waits_for)
            self._has_waited = False
            self._admission.leave()
            self._answer(one, answer)
            if task.cancelling():
                break  # the handler has cancelled its own task, which is not to be the next one's
            if now_s() > until_s:
                await asyncio.sleep(0)
                until_s = now_s() + MAX_TURN_S
        return None

    async def _wait_for(self, one: _UnderWay, answer: Awaitable[Answer]) -> None:
        """See a handler to its end that had to wait."""
        try:
            self._answer(one, await answer)
        except asyncio.CancelledError:
            if not self._is_closed:  # else nobody hears it
                self._answer(one, _CANCELLED_ITSELF)  # if it was its time-out, it has its answer
            raise
        except GeneratorExit:
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            raise self._interrupted_by(error) from error
        except BaseException as error:  # noqa: BLE001  # rule 8
            self._answer(one, _lost(error))
        finally:
            self._admission.leave()

    def _ask(self, one: _UnderWay, context: contextvars.Context) -> Coroutine[Any, Any, Answer]:
        if self._tracer.is_recording:
            return self._ask_traced(one)
        if self._tracer.is_available:
            context.run(self._tracer.pass_on, one.message)
        return self._answering.ask(one.call)

    async def _ask_traced(self, one: _UnderWay) -> Answer:
        with self._tracer.span(one.call.verb, one.message, one.time_out.since_ns) as span:
            answer: Answer
            try:
                answer = await self._answering.ask(one.call)
            except asyncio.CancelledError:
                if not one.is_answered:
                    raise
                answer = NoOutcome(grpc.StatusCode.DEADLINE_EXCEEDED, "")  # for the span alone
            tell(span, answer)
        return answer

    def _answer(self, one: _UnderWay, answer: Answer) -> None:
        """Let the first answer of a call be its reply."""
        if one.is_answered:
            return
        one.is_answered = True
        del self._under_way[one.call_number]
        one.time_out.answered()
        self._reply(one.call_number, answer)

    def _reply(self, call_number: int, answer: Answer) -> None:
        self._replies.append((call_number, answer))
        if self._writer is not None:
            self._wake_writer()

    def _beyond_credits(self) -> NoOutcome:
        return NoOutcome(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"participant {self._answering.name} grants {self._credits} calls under way on a "
            "stream, and this is one more; nothing was done",
        )

    # ---------------------------------------------------------------------------------- writing

    async def _write(self) -> None:
        """Send what there is to send, until the stream is to end."""
        has_said_draining = False
        while True:
            says_draining = self._says_draining and not has_said_draining and self._is_granted
            if self._replies or self._to_grant or says_draining:
                await self._stream.write(self._next_message(draining=says_draining))
                has_said_draining = has_said_draining or says_draining
                self._wake_reader()
            elif self._is_over():
                return
            else:
                self._writer = self._loop.create_future()
                await self._writer
                self._writer = None

    def _is_over(self) -> bool:
        if self._refusal is not None:
            return True
        if self._says_draining and not self._is_granted:
            self._refusal = self._answering.refuse_when_draining()
            return True
        return (self._has_ended or self._says_draining) and not self._under_way

    def _next_message(self, *, draining: bool) -> participant_pb2.ExchangeResponse:
        """Take as many replies as fit; from then on the runtime may use their credits again."""
        response = participant_pb2.ExchangeResponse(credits=self._to_grant, draining=draining)
        self._to_grant = 0
        add, replies = response.replies.add, self._replies
        count = size = 0
        while replies and count < MAX_REPLIES:
            call_number, answer = replies[0]
            reply_bytes = _size(answer)
            if reply_bytes > MAX_REPLY_BYTES:
                answer, reply_bytes = _TOO_LARGE, REPLY_BYTES
            size += reply_bytes
            if size > MAX_BYTES and count:
                break
            replies.popleft()
            count += 1
            reply = add(call_number=call_number)
            failure: NoOutcome | None
            if isinstance(answer, NoOutcome):
                failure = answer
            else:
                failure = self._answering.put(answer, reply.outcome)
            if failure is not None:
                reply.error.code = failure.code.value[0]
                reply.error.reason = failure.code.name
                reply.error.message = failure.message
        self._not_replied -= count
        return response

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


@types.coroutine
def _go_on(
    answering: Coroutine[Any, Any, Answer], context: contextvars.Context, waits_for: object
) -> Generator[object, Any, Answer]:
    """Run a coroutine that waits to its end, in its context, as a part of the current task."""
    while True:
        try:
            value = yield waits_for
        except BaseException as error:  # noqa: BLE001  # it is the coroutine's, not ours
            step = partial(answering.throw, error)
        else:
            step = partial(answering.send, value)
        try:
            waits_for = context.run(step)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def _size(answer: Answer) -> int:
    """Give the bytes of a reply, roughly and not less."""
    try:
        if isinstance(answer, Done):
            if answer.result is None:
                return REPLY_BYTES
            return REPLY_BYTES + len(answer.result.data) + 4 * len(answer.result.content_type)
        if isinstance(answer, InProgress):
            return REPLY_BYTES
        return 2 * REPLY_BYTES + 4 * MAX_REASON + 4 * len(answer.message)
    except Exception:  # noqa: BLE001  # what cannot be measured cannot be written either
        return REPLY_BYTES


def _why_it_ends(failure: BaseException) -> NoOutcome | None:
    """Log what went wrong with a whole stream; give the status, or None if nobody is there."""
    ours: BaseException | None = failure
    if isinstance(failure, BaseExceptionGroup):
        broken, ours = failure.split(grpc.aio.BaseError)
        if broken is not None:
            logger.info("a stream broke: %s", broken.exceptions[0])
        if ours is not None:
            ours = ours.exceptions[0]
    if ours is None:
        return None
    logger.debug("the traceback of what follows", exc_info=ours)
    logger.critical("a stream ends: the SDK failed: %s", type(ours).__name__)
    return _lost(ours)


def _lost(error: BaseException) -> NoOutcome:
    """Stand for what `Answering.ask` does not explain. Only the type is told: see there."""
    kind = type(error).__name__
    return NoOutcome(grpc.StatusCode.INTERNAL, f"the SDK failed: {kind}", kind)


_CANCELLED_ITSELF: Final = NoOutcome(
    grpc.StatusCode.CANCELLED, "the handler has cancelled its own task"
)

_TOO_LARGE: Final = NoOutcome(
    grpc.StatusCode.INTERNAL,
    f"the outcome cannot be sent: it has more than {MAX_REPLY_BYTES} bytes",
)


def _invalid(message: str) -> NoOutcome:
    return NoOutcome(grpc.StatusCode.INVALID_ARGUMENT, message)


def _too_late(timeout_ms: int) -> NoOutcome:
    if timeout_ms < 1:
        message = f"timeout_ms is {timeout_ms}: the time was up before it began; nothing was done"
    else:
        message = f"no outcome within {timeout_ms} ms"
    return NoOutcome(grpc.StatusCode.DEADLINE_EXCEEDED, message)
