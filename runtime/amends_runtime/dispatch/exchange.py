"""The streaming transport: calls in batches over one bidirectional stream to a participant.

A unary call costs the runtime some 200 µs of CPU, a call in a batch about 5: that is what this
file is for. How to think about it:

1. Calls that come in gather while a message is being written, and leave together in the next one,
   bounded by count, by bytes and by the participant's credits. So the busier the lane, the fuller
   the messages, and nobody waits for company.
2. A stream is opened when there is something to send, and kept. Until the participant has granted
   credits the lane hands over one call, and later never more than there are credits for: all
   others wait there, where no time of theirs runs. If the stream cannot be opened that one call is
   told, as if it had tried to connect, and the lane's breaker paces the attempts.
3. When a stream breaks, every call that was written on it and has no reply is unknown. What was not
   written yet waits for the next stream, or is given back to its lane when its time is over:
   nothing was sent, so nothing is known to have been tried.
4. Each call has its own deadline, from when it came in; the participant is told what is left of it
   and stops the handler by its own timer, nothing is cancelled over the wire.
5. A participant that answers a call neither in time nor soon after may have lost it, and with it
   its credit; or the stream is dead, and nobody has noticed. So a stream that is silent then, or
   has no credit left and nothing under way, is left for a new one.
6. A participant without the stream answers UNIMPLEMENTED and is called by the unary verbs; so is
   one whose messages cannot be read here, because on a stream all others would pay for that. After
   `TRY_AGAIN_S` the stream is tried again: somebody may have rolled out a newer one.
7. A stream that drains, or is left, takes nothing new. Its calls are answered on it while others
   leave by the next one; after the last of them it is ended. Streams that bring nothing, one after
   another, are opened with longer and longer pauses.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from anyio.abc import TaskGroup

from amends.v1 import participant_pb2, participant_pb2_grpc
from amends_runtime import wire
from amends_runtime.core.messages import Unknown
from amends_runtime.dispatch.one_by_one import OneByOne
from amends_runtime.dispatch.status import is_too_large, reply_of
from amends_runtime.dispatch.unary import UnaryTransport, failed_inside
from amends_runtime.ports import Call, Reply, StoreIdentity

__all__ = ["ExchangeTransport"]

_log = structlog.get_logger(__name__)

MAX_CALLS: Final = 256
"""Calls in one message: the next one leaves as soon as this one is written."""
MAX_BYTES: Final = 1024 * 1024
"""Of the calls in one message, a single one excepted: gRPC takes 4 MiB."""
MAX_CALL_BYTES: Final = 4 * 1024 * 1024 - 1024
"""A larger one can't leave on a stream; by itself it fails alone."""
OPENING_S: Final = 10.0
"""How long a participant that has taken the connection may take to grant its first credits."""
LATE_REPLIES_S: Final = 5.0
"""How long after its time a call may be answered, until its credit is believed to be lost."""
MAX_WINDOW: Final = 100_000
"""Calls at once that are believed to be meant: as many as an operator may allow."""
MAX_UNSAID: Final = 3
"""How often a stream is opened again at once whose refusal was lost."""
PAUSE_S: Final = 0.025
MAX_PAUSE_S: Final = 1.0
MAX_DOUBLED: Final = 10
"""Before a stream is opened again after some that opened and brought nothing: doubled each time.
One that cannot be opened at all is the breaker's to pace."""
TRY_AGAIN_S: Final = 300.0
"""Between two attempts at a stream with a participant that had none."""

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}
_LOST_STATUS: Final = "Internal error from Core"
_NOT_SERVED: Final = "Method not implemented"  # of every language's generated code

_Answer = Callable[[Reply | None], None]


class _Sent:
    """A call, from when it came in until it is answered."""

    __slots__ = ("answer", "call", "expires_s")

    def __init__(self, call: Call, answer: _Answer, expires_s: float) -> None:
        self.call = call
        self.answer = answer
        self.expires_s = expires_s

    @property
    def since_s(self) -> float:
        return self.expires_s - self.call.timeout_ms / 1000


class _Stream:
    """One stream, from its opening to its end, and the calls on it that have no reply yet."""

    __slots__ = (
        "call",
        "credits",
        "has_replied",
        "heard_s",
        "is_draining",
        "is_misnumbered",
        "is_open",
        "is_over",
        "is_suspected",
        "late",
        "pending",
        "window",
    )

    def __init__(self, call: Any) -> None:
        self.call = call
        self.pending: dict[int, _Sent] = {}
        self.late: set[int] = set()  # whose time was over, and that still have a credit each
        self.credits = 0
        self.window = 0
        self.is_open = False  # it has granted its first credits
        self.has_replied = False
        self.heard_s = 0.0  # when it last brought anything
        self.is_draining = False
        self.is_misnumbered = False  # it has replied to what it was not asked, and was told of
        self.is_over = False
        self.is_suspected = False  # it is about to be looked at, see rule 5

    @property
    def takes_calls(self) -> bool:
        return self.is_open and not self.is_draining and not self.is_over


class ExchangeTransport:
    """Calls one participant over a stream, or by `unary` where it has none. `open` comes first."""

    def __init__(
        self,
        participant: str,
        unary: UnaryTransport,
        identity: StoreIdentity,
        *,
        max_result_bytes: int,
        oldest_open_ms: Callable[[], int],
    ) -> None:
        self._participant = participant
        self._unary = unary
        self._one_by_one = OneByOne(unary)
        self._identity = identity
        self._max_result_bytes = max_result_bytes
        self._oldest_open_ms = oldest_open_ms
        self._exchange = participant_pb2_grpc.ParticipantServiceStub(unary.channel).Exchange
        self._waiting: deque[_Sent] = deque()
        self._stream: _Stream | None = None  # the one that takes calls, or is about to
        self._streams: dict[_Stream, None] = {}  # all that are not over
        self._last_number = 0
        self._is_unary = False
        self._window = 0  # the latest that was announced; 0: none yet
        self._unsaid = 0  # openings in a row whose end gRPC did not tell
        self._fruitless = 0  # streams that were opened and left without a reply, in a row
        self._closed = False
        self._writer: asyncio.Future[None] | None = None  # it waits for something to do
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_s = 0.0

    @property
    def name(self) -> str:
        if self._is_unary:
            return self._unary.name
        return "exchange" if self._window else ""

    @property
    def limit(self) -> int | None:
        return None if self._is_unary or not self._window else self._window

    @property
    def room(self) -> int:
        if self._is_unary:
            return self._one_by_one.room
        stream = self._stream
        granted = stream.credits if stream is not None and stream.takes_calls else 1
        return granted - len(self._waiting)

    def open(self, tasks: TaskGroup, room_changed: Callable[[], None]) -> None:
        """Its tasks live in `tasks`. Nothing is connected yet."""
        self._tasks = tasks
        self._room_changed = room_changed
        self._loop = asyncio.get_running_loop()
        self._one_by_one.open(tasks, room_changed)
        tasks.start_soon(self._run, name=f"exchange {self._participant}")

    def send(self, call: Call, answer: _Answer) -> None:
        """Lets the call leave with the next message."""
        if self._is_unary:
            self._one_by_one.send(call, answer)
            return
        expires_s = self._loop.time() + call.timeout_ms / 1000
        self._waiting.append(_Sent(call, answer, expires_s))
        if self._expiry is None or expires_s < self._expires_s:
            self._expire_at(expires_s)
        self._wake_writer()

    async def close(self) -> None:
        """Closes the connection; nobody gets an answer any more."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        for stream in self._streams:
            stream.call.cancel()
        self._wake_writer()
        await self._one_by_one.close()

    # -- writing -------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Keeps a stream while there is something to send, for as long as the runtime lives."""
        while not self._closed:
            if not self._waiting or self._is_unary:
                await self._sleep()
            elif self._stream is None:
                if self._fruitless:
                    await asyncio.sleep(_pause_s(self._fruitless))
                self._open_stream()
            elif self._stream.takes_calls and self._stream.credits > 0:
                await self._write(self._stream)
            else:
                await self._sleep()

    async def _sleep(self) -> None:
        self._writer = self._loop.create_future()
        await self._writer

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _open_stream(self) -> None:
        # Also if nothing waits any more: calls with little time would never find one open.
        if self._closed or self._is_unary:
            return
        stream = self._stream = _Stream(self._exchange())
        self._streams[stream] = None
        self._tasks.start_soon(self._serve, stream, name=f"exchange {self._participant} replies")

    async def _write(self, stream: _Stream) -> None:
        request = participant_pb2.ExchangeRequest(oldest_open_at_ms=self._oldest_open_ms())
        room, size, now_s = min(stream.credits, MAX_CALLS), 0, self._loop.time()
        while self._waiting and len(request.calls) < room:
            sent = self._waiting.popleft()
            left_ms = int((sent.expires_s - now_s) * 1000)
            if left_ms < 1:
                self._answer(sent, None)
                continue
            try:
                added = wire.add_exchange_call(request, self._last_number + 1, sent.call, left_ms)
            except Exception as error:  # noqa: BLE001  # one call's fault is not its neighbours'
                del request.calls[-1]
                self._answer(sent, failed_inside(sent.call, error))
                continue
            call_size = added.ByteSize()
            size += call_size
            if call_size > MAX_CALL_BYTES:
                del request.calls[-1]
                size -= call_size
                self._one_by_one.send(sent.call, sent.answer)
            elif size > MAX_BYTES and len(request.calls) > 1:
                del request.calls[-1]
                self._waiting.appendleft(sent)
                break
            else:
                self._last_number += 1
                stream.pending[self._last_number] = sent
        if not len(request.calls):
            return
        stream.credits -= len(request.calls)
        try:
            await stream.call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError):
            # What it ended with is for its reader to tell; until then nothing more is written.
            self._leave(stream)
        except asyncio.CancelledError:
            if not self._is_ended_by_us(stream):
                raise
            self._leave(stream)

    # -- reading -------------------------------------------------------------------------------

    async def _serve(self, stream: _Stream) -> None:
        """Reads replies until the stream is over, and answers what it leaves behind."""
        opening = self._loop.call_later(OPENING_S, self._give_opening_up, stream)
        try:
            reply = await self._read(stream)
        finally:
            opening.cancel()
            stream.is_over = True
            self._streams.pop(stream, None)
            self._leave(stream)
        left, stream.pending = stream.pending, {}
        if not stream.is_open and self._is_unsaid(reply):
            self._unsaid += 1
        elif not stream.is_open and not self._is_unary:
            self._unsaid = 0
            # Nobody is there: those who wait are told, as if each had tried to connect.
            while self._waiting:
                self._answer(self._waiting.popleft(), reply)
        for sent in left.values():
            self._answer(sent, reply)
        self._room_changed()
        self._wake_writer()

    async def _read(self, stream: _Stream) -> Reply:
        """Takes replies in to the end, and gives what the calls without one have ended in."""
        hello = participant_pb2.ExchangeHello(
            store_id=self._identity.store_id,
            epoch=self._identity.epoch,
            incarnation=self._identity.incarnation,
            participant=self._participant,
        )
        try:
            await stream.call.write(participant_pb2.ExchangeRequest(hello=hello))
            while (response := await stream.call.read()) is not grpc.aio.EOF:
                if response is None:  # grpc.aio's word for bytes that it cannot parse
                    stream.call.cancel()
                    self._fall_back(stream, "it sends bytes that are no reply of the contract")
                    return reply_of(grpc.StatusCode.UNAVAILABLE, _UNREADABLE)
                self._take(stream, response)
            code, details = await stream.call.code(), await stream.call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        except asyncio.InvalidStateError:  # the hello could not be written: it is over already
            code, details = await stream.call.code(), await stream.call.details()
        except asyncio.CancelledError:
            if not self._is_ended_by_us(stream):
                raise
            return reply_of(grpc.StatusCode.UNAVAILABLE, _NOT_OPENED)
        return self._ended_with(stream, code, details or "")

    def _ended_with(self, stream: _Stream, code: grpc.StatusCode, details: str) -> Reply:
        if code is grpc.StatusCode.UNIMPLEMENTED and not stream.is_open:
            self._fall_back(stream, "" if _NOT_SERVED in details else details)
        elif is_too_large(code, details):
            self._fall_back(stream, f"a message of it is too large: {details}")
        if code in (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED) or is_too_large(
            code, details
        ):
            return reply_of(grpc.StatusCode.UNAVAILABLE, f"{_ENDED} ({code.name} {details})")
        away = self._unary.is_away()
        if code is grpc.StatusCode.UNAVAILABLE:
            details = self._unary.explain(details)
        return reply_of(code, details, away=away)

    def _take(self, stream: _Stream, response: participant_pb2.ExchangeResponse) -> None:
        stream.heard_s = self._loop.time()
        pending, late = stream.pending, stream.late
        is_room_news = is_wrong = False
        for reply in response.replies:
            number = reply.call_number
            sent = pending.pop(number, None)
            if sent is None:
                if number in late:  # there is room for another, and nobody else hears of it
                    late.discard(number)
                    stream.credits += 1
                    is_room_news = True
                else:
                    is_wrong = True
                continue
            stream.credits += 1
            stream.has_replied = True
            if reply.WhichOneof("reply") == "error":
                error = reply.error
                code = _STATUS.get(error.code, grpc.StatusCode.UNKNOWN)
                answer = reply_of(code, error.message)
            else:
                outcome = wire.outcome_from_proto(
                    reply.outcome,
                    sent.call.verb,
                    self._max_result_bytes,
                    two_phase=sent.call.two_phase,
                )
                answer = Reply(outcome, "OK", healthy=True)
            self._answer(sent, answer)
        if stream.has_replied:
            self._fruitless = 0
        if is_wrong and not stream.is_misnumbered:
            stream.is_misnumbered = True
            _log.warning(
                "stream_reply_unknown",
                participant=self._participant,
                hint="it answered a call_number that is under way nowhere on its stream: each call"
                " gets one reply, with the call's number",
            )
        if response.credits or not stream.is_open:
            stream.is_open = True
            self._unsaid = 0
            granted = max(-MAX_WINDOW, min(response.credits, MAX_WINDOW - stream.window))
            stream.window += granted
            stream.credits += granted
            self._window = max(1, stream.window)
            is_room_news = True
        if is_room_news:
            self._room_changed()
        if response.draining or stream.is_draining:
            self._leave(stream)
        if self._waiting:
            self._wake_writer()

    # -- the end of calls and streams ------------------------------------------------------------

    def _answer(self, sent: _Sent, reply: Reply | None) -> None:
        if not self._closed:
            sent.answer(reply)

    def _leave(self, stream: _Stream) -> None:
        """New calls take another one; it ends after the last of its own."""
        stream.is_draining = True
        if self._stream is stream:
            self._stream = None
            if stream.is_open and not stream.has_replied:
                self._fruitless += 1
            self._wake_writer()
            self._room_changed()
        if not stream.pending and not stream.is_over:
            stream.call.cancel()

    def _is_unsaid(self, reply: Reply) -> bool:
        """Whether gRPC lost what a stream has ended with that was never opened.

        A hello that is written while the stream is being refused fails like this: it is worth
        asking once more.
        """
        outcome = reply.outcome
        return (
            isinstance(outcome, Unknown)
            and _LOST_STATUS in outcome.message
            and self._unsaid < MAX_UNSAID
        )

    def _give_opening_up(self, stream: _Stream) -> None:
        if not stream.is_open:
            self._leave(stream)

    def _is_ended_by_us(self, stream: _Stream) -> bool:
        """Whether a cancellation is that of the stream, and not of the task that waits for it."""
        task = asyncio.current_task()
        return stream.call.done() and (task is None or not task.cancelling())

    def _fall_back(self, stream: _Stream, why: str) -> None:
        """From now on by the unary verbs: what waits, too."""
        self._leave(stream)
        if self._is_unary or self._closed:
            return
        self._is_unary = True
        why = why or "it does not serve Exchange"
        _log.info("participant_without_stream", participant=self._participant, why=why)
        self._loop.call_later(TRY_AGAIN_S, self._try_again)
        while self._waiting:
            self._answer(self._waiting.popleft(), None)
        self._room_changed()

    def _try_again(self) -> None:
        self._is_unary = False

    def _expire_at(self, expires_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expires_s = expires_s
        self._expiry = self._loop.call_at(expires_s, self._expire)

    def _expire(self) -> None:
        """Answers what nobody has answered in time. Looks at all calls, but only this rarely."""
        now_s = self._loop.time()
        self._expiry = None
        late: list[_Sent] = []
        next_s = float("inf")
        for stream in [*self._streams]:
            for number, sent in [*stream.pending.items()]:
                if sent.expires_s <= now_s:
                    del stream.pending[number]
                    stream.late.add(number)
                    late.append(sent)
                    self._suspect(stream, sent)
                else:
                    next_s = min(next_s, sent.expires_s)
            if stream.is_draining:
                self._leave(stream)
        has_stream = self._stream is not None and self._stream.takes_calls
        unsent = [sent for sent in self._waiting if sent.expires_s <= now_s]
        for sent in unsent:
            self._waiting.remove(sent)
        next_s = min([next_s, *(sent.expires_s for sent in self._waiting)])
        if next_s < float("inf"):
            self._expire_at(next_s)
        for sent in late:
            self._answer(sent, reply_of(grpc.StatusCode.DEADLINE_EXCEEDED, _TOO_LATE))
        for sent in unsent:
            # One that waits for a stream to be opened has tried as hard as one that connects.
            reply = None if has_stream else reply_of(grpc.StatusCode.DEADLINE_EXCEEDED, _NO_STREAM)
            self._answer(sent, reply)

    def _suspect(self, stream: _Stream, late: _Sent) -> None:
        """Has a stream looked at a little later, see rule 5: replies may be on their way."""
        if not stream.is_suspected and not stream.is_draining:
            stream.is_suspected = True
            self._loop.call_later(LATE_REPLIES_S, self._leave_if_dead, stream, late.since_s)

    def _leave_if_dead(self, stream: _Stream, since_s: float) -> None:
        stream.is_suspected = False
        is_silent = stream.heard_s < since_s
        is_spent = stream.credits <= 0 and not stream.pending
        if stream.takes_calls and (is_silent or is_spent):
            _log.warning(
                "stream_replaced",
                participant=self._participant,
                why="SILENT" if is_silent else "OUT_OF_CREDITS",
                hint="calls were answered neither in time nor soon after; each needs a reply, at"
                " the latest when its time-out has passed",
            )
            self._leave(stream)


def _pause_s(fruitless: int) -> float:
    return min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(fruitless, MAX_DOUBLED))


_UNREADABLE: Final = "the participant sent bytes on its stream that are no reply of the contract"
_NOT_OPENED: Final = (
    f"the participant took the connection, and no stream, within {OPENING_S:g} s; or it was closed"
)
_ENDED: Final = "the participant ended the stream before it had answered"
_NO_STREAM: Final = "the participant opened no stream in time"
_TOO_LATE: Final = "the participant did not answer in time"
