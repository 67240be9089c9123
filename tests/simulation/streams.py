"""Streams between runtimes and participants: the real transport, over a connection that breaks.

How to think about it. What the runtime sends and takes in over a stream is the real
`ExchangeTransport`'s business. It is given what grpc.aio would give it, the call object of one
bidirectional stream; behind that stand the participant's end of the stream, which keeps the
contract, and a connection which does not:

1. In each direction messages arrive whole and in the order in which they left, or not at all.
2. A connection breaks at any instant: what had not arrived by then never will. So some of the calls
   that had left were carried out and some were not, and their caller cannot tell which.
3. The participant answers calls in whatever order they end, in batches, and shuffles those. Each
   gets one reply: one that was lost on the way to its handler, or whose reply was, is answered with
   an error when its time has long been over, and gives its credit back by that.
4. What becomes of one call on its way to a handler and back is as on the unary way (`network`).

Both ends are held to the contract here: hello first, numbers of their own, never more calls than
credits, none after a stream drains, and none that its lane has had an answer to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from amends.v1 import participant_pb2, types_pb2
from tests.simulation.faults import Fault
from tests.simulation.participants import Answer, Participant

if TYPE_CHECKING:
    from tests.simulation.network import Way
    from tests.simulation.runtime import Process

__all__ = ["Channel", "Stream"]

LATENCY_S = (0.0002, 0.008)
WRITE_S = (0.0, 0.002)  # long enough for some company
FLUSH_S = (0.0, 0.004)  # replies gather for so long
STALL_S = (0.05, 3.0)  # often beyond a deadline
TAKEN_S = (0.05, 1.0)  # until credits that were taken back are granted again
WINDOWS = (1, 2, 3, 5, 256)  # one that is used up at once, and one that never is
LATE_ERROR_S = 0.05  # after a call's time is over, until the participant says so

_OK = grpc.StatusCode.OK
_ENDS = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.OK,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Channel:
    """What the generated stub needs of a channel: streams are opened here, and nothing else."""

    def __init__(self, process: Process, participant: Participant) -> None:
        self._process = process
        self._participant = participant
        self.way: Way | None = None

    def unary_unary(self, *_: object, **__: object) -> None:
        """The unary verbs go by the simulated network."""

    def stream_stream(self, *_: object, **__: object) -> Any:
        """Give what opens a stream."""

        def open_stream() -> Stream:
            assert self.way is not None, "a transport belongs to a way"
            return Stream(self._process, self._participant, self.way)

        return open_stream


class Stream:
    """One stream, both of its ends; what is public is what grpc.aio's call object has."""

    def __init__(self, process: Process, participant: Participant, way: Way) -> None:
        self._process = process
        self._participant = participant
        self._way = way
        self._world = process.world
        self._name = f"{process.name} {participant.name}"
        self._end: tuple[grpc.StatusCode, str] | None = None
        # The runtime's end.
        self._inbox: deque[participant_pb2.ExchangeResponse | None] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._taken: participant_pb2.ExchangeResponse | None = None  # and not yet accounted for
        self._credits = 0
        self._drains = False
        self._numbers: set[int] = set()
        # The participant's end.
        self._hello: participant_pb2.ExchangeHello | None = None
        self._under_way: dict[int, str] = {}
        self._finished: list[participant_pb2.ExchangeReply] = []
        self._is_granted = False
        self._is_draining = False
        # The connection: when the latest message of each direction arrives.
        self._request_at_s = 0.0
        self._response_at_s = 0.0

    # -- the runtime's end -----------------------------------------------------------------------

    async def write(self, request: participant_pb2.ExchangeRequest) -> None:
        """Let a message leave; raises as grpc.aio does once the stream is over."""
        await self._process.wait_if_dead()
        if self._end is not None:
            raise asyncio.InvalidStateError("the stream is over")
        if request.HasField("hello"):
            self._leave(self._take_hello, request.hello)
            return
        self._account()
        self._check(request)
        for one in request.calls:
            where = _where(one.call)
            if self._world.faults.strikes(Fault.CRASH_BEFORE_CALL, where):
                self._process.die()
            await self._process.wait_if_dead()
            self._world.trace.add("{} calls {} on a stream", self._process.name, where)
        message = participant_pb2.ExchangeRequest()
        message.CopyFrom(request)
        if self._world.faults.strikes(Fault.STREAM_BREAKS_BEFORE, self._name):
            self.break_off(self._world.faults.pick(_ENDS))
        else:
            self._leave(self._take_calls, message)
        await asyncio.sleep(self._world.faults.between(*WRITE_S))
        await self._process.wait_if_dead()
        if self._end is not None:
            raise _error(*self._end)

    async def read(self) -> Any:
        """Wait for the next message; EOF after the last one of a stream that ended in order."""
        self._account()
        while not self._inbox:
            if self._end is not None:
                if self._end[0] is _OK:
                    return grpc.aio.EOF
                raise _error(*self._end)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        await self._process.wait_if_dead()
        self._taken = self._inbox.popleft()
        return self._taken

    async def code(self) -> grpc.StatusCode:
        """What it ended with."""
        assert self._end is not None, "asked of a stream that is over"
        return self._end[0]

    async def details(self) -> str:
        """What it ended with, in words."""
        assert self._end is not None, "asked of a stream that is over"
        return self._end[1]

    def done(self) -> bool:
        """Whether it is over."""
        return self._end is not None

    def cancel(self) -> bool:
        """End it at once; who waits for a message is cancelled."""
        if self._end is not None:
            return False
        self._end = grpc.StatusCode.CANCELLED, "cancelled by the runtime"
        self._inbox.clear()
        self._forget()
        if self._reader is not None:
            self._reader.cancel()
        return True

    def _account(self) -> None:
        """The transport has seen what it took last: it asks for more, or sends."""
        if self._taken is not None:
            self._credits += self._taken.credits + len(self._taken.replies)
            self._drains = self._drains or self._taken.draining
            self._taken = None

    def _check(self, request: participant_pb2.ExchangeRequest) -> None:
        world = self._world
        if not self._is_granted:
            world.violation("a stream's calls wait until it is opened", self._name)
        if self._drains:
            world.violation("a stream that drains is given no new calls", self._name)
        if len(request.calls) > max(0, self._credits):
            world.violation(
                "no more calls leave on a stream than there are credits for",
                f"{self._name}: {len(request.calls)} calls, {self._credits} credits",
            )
        self._credits -= len(request.calls)
        if self._credits == 0:
            world.faults.count(Fault.CREDITS_RUN_OUT, self._name)
        for one in request.calls:
            if one.call_number in self._numbers:
                world.violation("each call of a stream has a number of its own", self._name)
            self._numbers.add(one.call_number)
            self._way.check_open(one.call)

    # -- the connection --------------------------------------------------------------------------

    def _leave(self, arrive: Any, message: Any) -> None:
        """A message of the runtime's is on its way."""
        faults, now_s = self._world.faults, self._world.now_s()
        at_s = max(self._request_at_s, now_s + faults.between(*LATENCY_S))
        if faults.strikes(Fault.STREAM_STALLS, self._name):
            at_s += faults.between(*STALL_S)
        self._request_at_s = at_s
        self._world.network.under_way += 1
        self._world.later(at_s - now_s, self._arrive, arrive, message)

    def _arrive(self, arrive: Any, message: Any) -> None:
        self._world.network.under_way -= 1
        if self._end is None:
            arrive(message)

    def _say(self, response: participant_pb2.ExchangeResponse) -> None:
        """A message of the participant's is on its way."""
        faults, now_s = self._world.faults, self._world.now_s()
        self._response_at_s = max(self._response_at_s, now_s + faults.between(*LATENCY_S))
        unreadable = faults.strikes(Fault.STREAM_UNREADABLE, self._name)
        self._world.network.under_way += 1
        self._world.later(
            self._response_at_s - now_s, self._arrive, self._put, None if unreadable else response
        )

    def _put(self, response: participant_pb2.ExchangeResponse | None) -> None:
        self._inbox.append(response)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def break_off(self, code: grpc.StatusCode, details: str = "simulated") -> None:
        """End it at this instant, for both; what is on its way is lost."""
        if self._end is None:
            self._end = code, details
            self._forget()
            self._wake()

    def _forget(self) -> None:
        self._participant.streams.pop(self, None)
        self._under_way.clear()
        self._finished.clear()

    # -- the participant's end -------------------------------------------------------------------

    def _take_hello(self, hello: participant_pb2.ExchangeHello) -> None:
        faults = self._world.faults
        if self._participant.is_down:
            self.break_off(grpc.StatusCode.UNAVAILABLE)
        elif faults.strikes(Fault.STREAM_REFUSED, self._name):
            self.break_off(grpc.StatusCode.UNIMPLEMENTED)
        else:
            self._hello = hello
            self._participant.streams[self] = None
            if not faults.strikes(Fault.STREAM_HANGS, self._name):
                self.open()

    def open(self) -> None:
        """Grant the first credits, if the participant has not yet."""
        if self._end is None and not self._is_granted:
            self._is_granted = True
            self._grant(self._world.faults.pick(WINDOWS))

    def _take_calls(self, request: participant_pb2.ExchangeRequest) -> None:
        faults = self._world.faults
        assert self._hello is not None, "calls come after the first credits"
        for one in request.calls:
            message = self._completed(one, request.oldest_open_at_ms)
            self._under_way[one.call_number] = message.idempotency_key
            timeout_s = one.timeout_ms / 1000
            self._world.network.hand_over(
                self._participant, message, timeout_s, self._finisher(one.call_number)
            )
            self._world.later(
                timeout_s + LATE_ERROR_S,
                self._finish,
                one.call_number,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        if not self._is_draining and faults.strikes(Fault.STREAM_DRAINS, self._name):
            self._is_draining = True
            self._say(participant_pb2.ExchangeResponse(draining=True))
        elif faults.strikes(Fault.CREDITS_TAKEN, self._name):
            count = faults.pick((1, 2, 200))
            self._say(participant_pb2.ExchangeResponse(credits=-count))
            self._world.later(faults.between(*TAKEN_S), self._grant, count)

    def _grant(self, count: int) -> None:
        if self._end is None:
            self._say(participant_pb2.ExchangeResponse(credits=count))

    def _completed(
        self, one: participant_pb2.ExchangeCall, oldest_open_at_ms: int
    ) -> participant_pb2.Call:
        """The call as the unary verbs would have brought it."""
        hello, message = self._hello, participant_pb2.Call()
        assert hello is not None, "calls come after it"
        message.CopyFrom(one.call)
        verb = types_pb2.Verb.Name(message.verb).removeprefix("VERB_").lower()
        message.idempotency_key = (
            f"{hello.store_id}/{message.saga_id}/{message.step}/{verb}/{message.round}"
        )
        message.store_id, message.epoch = hello.store_id, hello.epoch
        message.incarnation, message.participant = hello.incarnation, hello.participant
        message.deadline_at_ms = self._process.clock.now_ms() + one.timeout_ms
        message.oldest_open_at_ms = oldest_open_at_ms
        return message

    def _finisher(self, number: int) -> Any:
        return lambda answer: self._finish(number, answer)

    def _finish(self, number: int, answer: Answer) -> None:
        """A call has ended: its reply leaves with those that end soon."""
        if self._under_way.pop(number, None) is None:
            return  # it was answered, or the stream is over
        reply = participant_pb2.ExchangeReply(call_number=number)
        if isinstance(answer, grpc.StatusCode):
            reply.error.code, reply.error.message = answer.value[0], "simulated"
        else:
            reply.outcome.CopyFrom(answer)
        self._finished.append(reply)
        if len(self._finished) == 1:
            self._world.later(self._world.faults.between(*FLUSH_S), self._flush)

    def _flush(self) -> None:
        faults, replies = self._world.faults, self._finished
        if self._end is not None or not replies:
            return
        self._finished = []
        if len(replies) > 1 and faults.pick((True, False)):
            faults.count(Fault.REPLIES_SHUFFLED, self._name)
            replies.reverse()
        if faults.strikes(Fault.STREAM_BREAKS_AFTER, self._name):
            self.break_off(faults.pick(_ENDS))
            return
        self._say(participant_pb2.ExchangeResponse(replies=replies))
        if self._is_draining and not self._under_way:
            self._world.network.under_way += 1
            self._world.later(
                self._response_at_s - self._world.now_s(), self._arrive, self._over, 0
            )

    def _over(self, _: int) -> None:
        self.break_off(_OK, "drained")


def _where(call: participant_pb2.Call) -> str:
    verb = types_pb2.Verb.Name(call.verb).removeprefix("VERB_")
    return f"{call.saga_id}/{call.step}/{verb}/{call.attempt}"


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
