"""The way out for spans: a bounded queue, and the one thread that empties it.

How to think about it. The loop must never wait for a collector, and a collector may be slow, gone,
or there and silent. So the loop only puts a parcel into a queue, or finds it full; all else, making
spans of what is in the parcel, encoding them, the network and its time-outs, is the thread's.

1. What finds the queue full is dropped and counted: what came first is nearer to leaving, and a
   collector that is back gets a stretch without holes.
2. What the collector did not take is tried again, for `TRY_FOR_S`, and then counted as failed. The
   library says of no failure whether it would last, and one bad batch must not stop all others.
   A collector whose answer was late or lost gets the same spans twice, as OTLP has it.
3. Nobody is told of each failure: one warning when the collector stops taking spans, one line when
   it takes them again.
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

from amends_runtime.telemetry.spans import Span

__all__ = ["QUEUE_BYTES", "Export", "Sender", "SpanCounts"]

QUEUE_BYTES: Final = 64 * 1024 * 1024  # some ten thousand sagas: a collector's restart under load
ENOUGH_SPANS: Final = 48  # 2 ms of encoding: larger messages save nothing and hold up the loop
MESSAGE_SPANS: Final = 256  # of one parcel: well below the 4 MiB that a collector takes
GATHER_S: Final = 0.1  # spans that come within it share a message; nobody waits for them
TRY_FOR_S: Final = 60.0  # a collector's restart, and then some
FIRST_WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 10.0
LET_GO_S: Final = 0.3  # for a call that was broken off to return, once the end is due

Parcel = TypeVar("Parcel")

_log = structlog.get_logger(__name__)


class Export(Protocol):
    """The way to one collector. All of it is called on the sender's thread, but for `close`."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """Sends spans and waits for the answer; why that failed, or None."""
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

    `unpack` makes the spans of a parcel; `left` is told of each parcel whether its spans were
    taken. Both are called on the thread. `where` names the collector for people. Call `start`, and
    `close` at the end.
    """

    def __init__(
        self,
        export: Export,
        *,
        where: str,
        unpack: Callable[[Parcel], list[Span]],
        left: Callable[[Parcel, bool], None],
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._export = export
        self._where = where
        self._unpack = unpack
        self._left = left
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
        self._lost_before = 0

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

    def counts(self) -> SpanCounts:
        """What became of all spans so far. From any thread."""
        return SpanCounts(self._exported, self._dropped, self._failed)

    async def close(self, within_s: float) -> None:
        """Sends what waits, and lets go of what has not left after so many seconds."""
        self._closing.set()
        self._wake.set()
        await anyio.to_thread.run_sync(self._thread.join, within_s)
        if self._thread.is_alive():
            self._abandoned.set()
            # It may hang itself, and is then left behind, too.
            threading.Thread(target=self._break_off, daemon=True).start()
            await anyio.to_thread.run_sync(self._thread.join, LET_GO_S)
            _log.warning("traces_abandoned", to=self._where, sagas=self.waiting)
        else:
            self._break_off()

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
        while self._queue and len(spans) < ENOUGH_SPANS:
            parcel, parcel_size = self._queue.popleft()
            parcels.append(parcel)
            size += parcel_size
            try:
                spans += self._unpack(parcel)
            except Exception:  # noqa: BLE001  # a bug in making spans is of this trace alone
                _log.exception("trace_not_made")
            time.sleep(0)  # lets the loop have the interpreter, which it would else wait 5 ms for
        taken = 0
        while taken < len(spans) and self._deliver(spans[taken : taken + MESSAGE_SPANS]):
            taken += MESSAGE_SPANS
        if taken < len(spans):
            self._failed += len(spans) - taken
        for parcel in parcels:
            self._left(parcel, taken >= len(spans))
        self._bytes_out += size

    def _deliver(self, spans: Sequence[Span]) -> bool:
        give_up_s = time.monotonic() + TRY_FOR_S
        wait_s = FIRST_WAIT_S
        while True:
            is_last = self._closing.is_set()
            why = self._export.send(spans)
            if why is None:
                self._exported += len(spans)
                self._note_up()
                return True
            if self._abandoned.is_set():
                return False
            self._note_down(why)
            if is_last or time.monotonic() > give_up_s:
                return False
            self._closing.wait(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    def _note_down(self, why: str) -> None:
        if self._is_down:
            return
        self._is_down = True
        self._lost_before = self._dropped + self._failed
        _log.warning(
            "traces_not_taken",
            to=self._where,
            why=why,
            hint="sagas go on; spans wait for the collector, and are dropped when too many do",
        )

    def _note_up(self) -> None:
        if not self._is_down:
            return
        self._is_down = False
        lost = self._dropped + self._failed - self._lost_before
        _log.info("traces_taken_again", to=self._where, spans_lost=lost)
