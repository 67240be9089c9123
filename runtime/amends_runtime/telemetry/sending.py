"""The way out for spans: a bounded queue, and the one thread that empties it.

How to think about it. The loop must never wait for a collector, and a collector may be slow, gone,
or there and silent. So the loop only puts a parcel into a queue, or finds it full; all else, making
spans of what is in the parcel, encoding them, the network and its time-outs, is the thread's.

1. What finds the queue full is dropped and counted: what came first is nearer to leaving, and a
   collector that is back gets a stretch without holes.
2. What the collector did not take, and may take later, is tried again for `TRY_FOR_S`, and then
   counted as failed. What it will not take is counted at once: one bad message must not hold up
   all others. Where something in a message was too large or wrong, its halves are sent, and
   theirs, so that one bad span costs itself alone. A collector whose answer was late or lost gets
   the same spans twice, as OTLP has it.
3. Nobody is told of each failure: one warning when the collector stops taking spans, one line when
   it takes them again; and a warning a minute, at most, that it takes some and not others. What no
   such line has told of is told at the end.
4. The end is bounded: what has not left by then is counted and let go. The thread is a daemon, so
   that one which hangs in a call does not keep the process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import anyio.to_thread
import structlog

from amends_runtime.telemetry.collector import Answer, Refused, Taken
from amends_runtime.telemetry.spans import Span

__all__ = ["QUEUE_BYTES", "Export", "Sender", "SpanCounts"]

QUEUE_BYTES: Final = 64 * 1024 * 1024  # some ten thousand sagas: a collector's restart under load
ENOUGH_SPANS: Final = 48  # 2 ms of encoding: larger messages save nothing and hold up the loop
MESSAGE_SPANS: Final = 256  # of one parcel: well below the 4 MiB that a collector takes
GATHER_S: Final = 0.1  # spans that come within it share a message; nobody waits for them
TRY_FOR_S: Final = 60.0  # a collector's restart, and then some
FIRST_WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 10.0
MAX_ASKED_WAIT_S: Final = 30.0  # as long as a collector may ask for; it gets two tries at least
SAY_REJECTED_S: Final = 60.0
MAX_PARTS: Final = 40  # messages in place of one that was refused: enough for two bad spans of 256
WHOLE_FOR_S: Final = 60.0  # nothing is halved, once of such parts not one was taken
LET_GO_S: Final = 0.3  # for a call that was broken off to return, once the end is due

WAITS: Final = (
    "sagas go on; spans wait for the collector, and are dropped when too many do; is it there, and"
    " does it speak this protocol?"
)
REFUSES: Final = (
    "sagas go on, and these spans are dropped, for it would refuse them again; does it speak this"
    " protocol, and is the address right?"
)

Parcel = TypeVar("Parcel")

_log = structlog.get_logger(__name__)


class Export(Protocol):
    """The way to one collector. All of it is called on the sender's thread, but for `close`."""

    def send(self, spans: Sequence[Span]) -> Answer:
        """Sends spans and waits for the answer."""
        ...

    def close(self) -> None:
        """Breaks off what is being sent. May hang."""
        ...


class SpanCounts(NamedTuple):
    """What became of spans. `dropped` ones were never made, so their number is about right."""

    exported: int
    dropped: int
    failed: int


class Sender(Generic[Parcel]):
    """Takes parcels on the loop, and sends the spans in them from a thread of its own.

    `unpack` makes the spans of a parcel; `left` is told of each parcel whether its spans are dealt
    with, or may be sent once more. Both are called on the thread. `about` is how many spans a
    parcel has, for counting those that nobody makes any more. `where` names the collector for
    people. Call `start`, and `close` at the end.
    """

    def __init__(
        self,
        export: Export,
        *,
        where: str,
        unpack: Callable[[Parcel], list[Span]],
        left: Callable[[Parcel, bool], None],
        about: Callable[[Parcel], int] = lambda _: 1,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._export = export
        self._where = where
        self._unpack = unpack
        self._left = left
        self._about = about
        self._queue_bytes = queue_bytes
        self._queue: deque[tuple[Parcel, int]] = deque()
        # Each number has one thread that writes it, so that none needs a lock.
        self._bytes_in = self._dropped = 0  # the loop's
        self._bytes_out = self._exported = self._failed = 0  # the thread's
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amends-traces", daemon=True)
        self._is_down = False
        self._why = ""  # of the last refusal, until something is taken again
        self._under_way = 0  # parcels that have left the queue, and are not dealt with
        self._unsent = 0  # parcels of which spans are lost, and below, lost spans that a line told
        self._told = 0
        self._said_rejected_s = -SAY_REJECTED_S
        self._in_hand = 0  # spans that are being sent, and not counted yet
        self._whole_until_s = 0.0

    # -- the loop's side -----------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def offer(self, parcel: Parcel, size: int) -> bool:
        """Takes a parcel of about so many bytes; False: there is no room."""
        if self._bytes_in - self._bytes_out + size > self._queue_bytes and self._queue:
            return False
        self._bytes_in += size
        self._queue.append((parcel, size))
        if not self._wake.is_set():
            self._wake.set()
        return True

    def drop(self, spans: int) -> None:
        """Counts spans that will not be sent."""
        self._dropped += spans

    @property
    def has_room(self) -> bool:
        """Whether the queue is less than half full: room for what nobody is in a hurry with."""
        return self.waiting_bytes < self._queue_bytes // 2

    @property
    def waiting_bytes(self) -> int:
        """About how much memory the parcels take that wait, or are being sent."""
        return self._bytes_in - self._bytes_out

    @property
    def waiting(self) -> int:
        """How many parcels wait."""
        return len(self._queue)

    @property
    def _lost(self) -> int:
        return self._dropped + self._failed

    def counts(self) -> SpanCounts:
        """What became of all spans so far. From any thread."""
        return SpanCounts(self._exported, self._dropped, self._failed)

    async def close(self, within_s: float) -> None:
        """Sends what waits, and lets go of what has not left after so many seconds."""
        self._closing.set()
        self._wake.set()
        waiting = 0
        await anyio.to_thread.run_sync(self._thread.join, within_s)
        if self._thread.is_alive():
            waiting = self._under_way + self.waiting  # before it gives up what is under way
            self._abandoned.set()
            # It may hang itself, and is then left behind, too.
            threading.Thread(target=self._break_off, daemon=True).start()
            await anyio.to_thread.run_sync(self._thread.join, LET_GO_S)
            self._dropped += sum(self._about(parcel) for parcel, _ in self._queue)
            if self._thread.is_alive():
                self._dropped += self._in_hand
        else:
            self._break_off()
        lost = self._lost - self._told
        if waiting or lost:
            _log.warning(
                "traces_abandoned",
                to=self._where,
                sagas=max(waiting, self._unsent),
                spans_lost=lost,
                why=self._why or "it had not answered yet",
                hint="amends trace export SAGA --to COLLECTOR sends them",
            )

    def _break_off(self) -> None:
        try:
            self._export.close()
        except Exception:  # noqa: BLE001  # the library's, at the end of the process
            _log.debug("exporter_close_failed", to=self._where)

    # -- the thread's side ---------------------------------------------------------------------

    def _run(self) -> None:
        while not self._abandoned.is_set():
            self._wake.wait()
            self._closing.wait(GATHER_S)
            self._wake.clear()
            while self._queue and not self._abandoned.is_set():
                self._send_some()
            if self._closing.is_set() and not self._queue:
                return

    def _send_some(self) -> None:
        """Sends one batch: whole parcels, until there are enough spans for a message."""
        spans: list[Span] = []
        parcels: list[Parcel] = []
        size = 0
        failed_before = self._failed
        while self._queue and len(spans) < ENOUGH_SPANS:
            self._under_way += 1
            parcel, parcel_size = self._queue.popleft()
            parcels.append(parcel)
            size += parcel_size
            try:
                spans += self._unpack(parcel)
            except Exception:  # noqa: BLE001  # a bug in making spans is of this trace alone
                _log.exception("trace_not_made")
            time.sleep(0)  # lets the loop have the interpreter, which it would else wait 5 ms for
        self._in_hand = len(spans)
        is_settled = True
        for first in range(0, len(spans), MESSAGE_SPANS):
            message = spans[first : first + MESSAGE_SPANS]
            if is_settled:
                is_settled = self._deliver(message)
            else:
                self._fail(len(message))
        if self._failed > failed_before:
            self._unsent += len(parcels)
        for parcel in parcels:
            self._left(parcel, is_settled)
        self._bytes_out += size
        self._under_way = 0

    def _deliver(self, spans: Sequence[Span]) -> bool:
        """Sends one message, until that is settled; False: it was not, in its time."""
        answer = self._send(spans)
        if not isinstance(answer, Refused):
            self._take(len(spans), answer)
            return True
        if _has_parts(spans, answer) and time.monotonic() >= self._whole_until_s:
            return self._deliver_in_parts(spans, answer)
        self._note_down(answer)
        self._fail(len(spans))
        return not answer.may_pass

    def _deliver_in_parts(self, spans: Sequence[Span], why: Refused) -> bool:
        """Halves what was refused, until what is wrong with it stands alone."""
        parts = _halves(spans)
        tries, taken, refused = MAX_PARTS, 0, 0
        is_settled = True
        while parts:
            part = parts.pop()
            if not tries or not is_settled:
                refused += len(part)
                continue
            tries -= 1
            answer = self._send(part)
            if not isinstance(answer, Refused):
                self._take(len(part), answer)
                taken += len(part)
            elif _has_parts(part, answer):
                parts += _halves(part)
            else:
                refused += len(part)
                why, is_settled = answer, not answer.may_pass
        self._fail(refused)
        if taken and refused:
            self._note_rejected(refused, why.why)
        elif refused:  # it is not one span, then
            self._whole_until_s = time.monotonic() + WHOLE_FOR_S
            self._note_down(why)
        return is_settled

    def _send(self, spans: Sequence[Span]) -> Answer:
        """Sends one message as often as it may help, and answers how that ended."""
        give_up_s = time.monotonic() + TRY_FOR_S
        wait_s = FIRST_WAIT_S
        while True:
            is_last = self._closing.is_set()
            answer = self._export.send(spans)
            if not isinstance(answer, Refused) or not answer.may_pass:
                return answer
            if self._abandoned.is_set() or is_last or time.monotonic() > give_up_s:
                return answer
            self._note_down(answer)
            self._closing.wait(max(wait_s, min(answer.after_s, MAX_ASKED_WAIT_S)))
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    def _take(self, spans: int, answer: Taken) -> None:
        rejected = min(answer.rejected, spans)
        self._exported += spans - rejected
        self._in_hand -= spans - rejected
        self._fail(rejected)
        if rejected:
            self._note_rejected(rejected, answer.why)
        self._note_up()

    def _fail(self, spans: int) -> None:
        self._failed += spans
        self._in_hand -= spans

    def _note_rejected(self, spans: int, why: str) -> None:
        self._told += spans  # as far as it is
        now_s = time.monotonic()
        if now_s - self._said_rejected_s < SAY_REJECTED_S:
            return
        self._said_rejected_s = now_s
        _log.warning(
            "spans_rejected",
            to=self._where,
            spans=spans,
            why=why,
            hint="the collector took the others; said once a minute, counted always",
        )

    def _note_down(self, answer: Refused) -> None:
        if self._abandoned.is_set():
            return  # it was broken off here, not there
        self._why = answer.why
        if self._is_down:
            return
        self._is_down = True
        _log.warning(
            "traces_not_taken",
            to=self._where,
            why=answer.why,
            hint=WAITS if answer.may_pass else REFUSES,
        )

    def _note_up(self) -> None:
        if not self._is_down:
            return
        self._is_down, self._why, self._unsent = False, "", 0
        lost, self._told = self._lost - self._told, self._lost
        _log.info("traces_taken_again", to=self._where, spans_lost=lost)


def _has_parts(spans: Sequence[Span], refused: Refused) -> bool:
    """Whether some of these may be taken without the others."""
    return refused.of_content and not refused.may_pass and len(spans) > 1


def _halves(spans: Sequence[Span]) -> list[Sequence[Span]]:
    middle = len(spans) // 2
    return [spans[middle:], spans[:middle]]  # the first of them is taken from the end
