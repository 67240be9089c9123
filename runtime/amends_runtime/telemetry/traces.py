"""Traces: which sagas' spans leave the runtime, and when.

How to think about it. A trace is a projection of a saga's history (see `projection`), and a span
that is closed never changes. So there is nothing to keep in step: this observer keeps the
records that it is told of anyway, and when a saga has ended, or has gone on for some seconds, hands
them to the thread that makes spans of them and sends these (see `sending`).

1. Whether a saga is sampled is decided once, when it is first met. One that is not costs a look
   into a set for each of its turns.
2. A saga that ends is handed over at once, whole. One that lives on is handed over every few
   seconds, if it had turns, and what has left before does not leave again.
3. A saga whose turns were not all seen here is read from the store when its spans are due, a few at
   a time: one that was recovered, one that was read again after a failed commit, one for whose
   records there is no room.
4. A recovered saga's spans leave once more, all that are closed, because nobody knows which of them
   had left when the runtime before this one died: those in its queue had not. They have the same
   ids and contents as the first time, so a collector that has them already has them twice, not
   something else.
5. Sampling and sending never fail a saga, and the loop never waits for a collector. Where there is
   no room, spans are dropped and counted; `amends trace export` sends any saga's again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

import anyio
import anyio.lowlevel
import msgspec
import structlog

from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import Plan
from amends_runtime.core.payload import EMPTY
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    Record,
    SagaEnded,
    SagaStarted,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepRejected,
    StepStuck,
)
from amends_runtime.core.saga import Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.errors import AmendsError, UnreadableSaga
from amends_runtime.ports import Insights, LoadedSaga
from amends_runtime.telemetry.projection import project
from amends_runtime.telemetry.sending import QUEUE_BYTES, Export, Sender, SpanCounts
from amends_runtime.telemetry.spans import Span

__all__ = ["Traces"]

LOOK_EVERY_S: Final = 2.5  # a span of a saga that lives on leaves after one to two of these
OFFER_SLICE: Final = 256  # handed over before the loop lets others in
CLOSE_S: Final = 2.0  # a collector that is well takes what waits in a fraction of it

KEPT_RECORDS: Final = 100_000  # some ten thousand sagas under way, about 50 MB; others are read
RECORDS_PER_SAGA: Final = 2_000  # one that is retried for days is not worth more memory than others
UNSAMPLED: Final = 200_000  # about 20 MB; one that is forgotten costs a hash once more
WAITING: Final = 100_000  # sagas that wait to be read: as many as are live at once, by default

READ_AT_ONCE: Final = 16  # histories in memory together, each with 3 MiB of payloads at most
READ_PAUSE_S: Final = 0.05  # between two pages, so that reading takes a small part of the loop
REST_S_PER_RECORD: Final = 0.005  # and reading the longest histories again and again, too

RECORD_BYTES: Final = 512  # of a record without its payload, about
SMALL_PAYLOADS: Final = 16 * 1024  # fewer bytes wait with their records, more are taken out first

_CLOSES: Final[dict[type[Record], int]] = {
    StepExecuted: 2,  # the attempt and the step
    StepRejected: 2,
    StepCompensated: 2,
    AttemptFailed: 1,
    AttemptLost: 1,
    StepGivenUp: 1,
    StepStuck: 1,
    SagaEnded: 1,
}
"""How many spans each closes; waits in lanes come to it, and a step may be closed already."""

_log = structlog.get_logger(__name__)


class _Live:
    """A sampled saga. `records` are None if not all of them were seen here.

    `saga` is its state after its last turn, None once it has ended: it may be large, and what waits
    must not be. `left` is the thread's: how many records the spans are of that have left.
    """

    __slots__ = (
        "is_pending",
        "left",
        "payload_bytes",
        "plan",
        "records",
        "rest_until_s",
        "saga",
        "saga_id",
    )

    def __init__(self, plan: Plan, saga: Saga, records: list[Record] | None) -> None:
        self.plan = plan
        self.saga: Saga | None = saga
        self.saga_id = saga.saga_id
        self.payload_bytes = 0
        self.records = records
        self.left = 0
        self.is_pending = False
        self.rest_until_s = 0.0


class _Parcel:
    """A saga's first `count` records. The list may grow meanwhile; `before` is the thread's."""

    __slots__ = ("before", "count", "live", "records")

    def __init__(self, live: _Live, records: list[Record], count: int) -> None:
        self.live = live
        self.records = records
        self.count = count
        self.before = 0


class Traces:
    """The observer that lets spans leave. `where` names the collector for people.

    `run` must run for as long as sagas do; call `close` after the last commit, while `insights` can
    still be read. Its memory is bounded: `KEPT_RECORDS`, `WAITING`, `UNSAMPLED` and the queue's
    `queue_bytes`, and a few words for each sampled saga of those that are live at the same time.
    """

    def __init__(
        self,
        tracing: Tracing,
        insights: Insights,
        export: Export,
        *,
        where: str,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.where = where
        self._tracing = tracing
        self._insights = insights
        self._sender = Sender[_Parcel](
            export,
            where=where,
            unpack=self._unpack,
            left=_note_left,
            queue_bytes=queue_bytes,
        )
        self._live: dict[str, _Live] = {}
        self._unsampled: dict[str, None] = {}  # a set whose oldest can be found
        self._kept = 0
        self._young: list[_Live] = []  # has had turns since the last look
        self._old: list[_Live] = []  # has had turns before it
        self._to_read: dict[str, _Live] = {}
        self._running = anyio.CancelScope()
        self._is_closed = False
        self._sender.start()

    # -- what it is told -----------------------------------------------------------------------

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """Keeps the records, and hands the saga over if it has ended."""
        saga_id = saga.saga_id
        if saga_id in self._unsampled:
            if saga.end is not None:
                del self._unsampled[saga_id]
            return
        live = self._live.get(saga_id)
        if live is None:
            live = self._meet(plan, before, saga)
            if live is None:
                return
        elif live.saga is not before:
            # Read again after a failed commit, which may have left a turn that nobody told us of.
            self._forget_records(live)
        live.saga = saga
        live.payload_bytes = saga.payload_bytes
        if live.records is not None:
            live.records.extend(records)
            self._kept += len(records)
        if saga.end is not None:
            del self._live[saga_id]
            live.saga = None
            self._hand_over(live)
            self._forget_records(live)
            return
        if live.records is not None and (
            self._kept > KEPT_RECORDS or len(live.records) > RECORDS_PER_SAGA
        ):
            self._forget_records(live)
        if not live.is_pending and before is not None:
            live.is_pending = True
            self._young.append(live)

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """Of no saga's trace."""

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """What it holds up is in the records of each saga."""

    def counts(self) -> SpanCounts:
        """What became of all spans so far. From any thread."""
        return self._sender.counts()

    @property
    def waiting(self) -> int:
        """How many parcels wait to be sent, and how many sagas to be read. Bounded."""
        return self._sender.waiting + len(self._to_read)

    # -- deciding and keeping ------------------------------------------------------------------

    def _meet(self, plan: Plan, before: Saga | None, saga: Saga) -> _Live | None:
        """Decides about a saga that is not known here; None: it is not sampled."""
        trace_id = self._tracing.trace_id(saga.saga_id, saga.traceparent)
        if not self._tracing.is_sampled(trace_id, saga.traceparent):
            if saga.end is None:
                if len(self._unsampled) >= UNSAMPLED:
                    del self._unsampled[next(iter(self._unsampled))]
                self._unsampled[saga.saga_id] = None
            return None
        live = _Live(plan, saga, [] if before is None else None)
        self._live[saga.saga_id] = live
        return live

    def _forget_records(self, live: _Live) -> None:
        if live.records is not None:
            self._kept -= len(live.records)
            live.records = None

    # -- handing over --------------------------------------------------------------------------

    def _hand_over(self, live: _Live) -> None:
        """A saga's spans are due. It has ended, or goes on."""
        records = live.records
        if records is None:
            self._let_wait(live)
        elif not self._offer(live, records):
            self._give_up(live, records)

    def _offer(self, live: _Live, records: list[Record]) -> bool:
        payload_bytes = live.payload_bytes
        if payload_bytes > SMALL_PAYLOADS:
            records = [_without_payload(record) for record in records]
            payload_bytes = 0
        count = len(records)
        size = count * RECORD_BYTES + payload_bytes
        return self._sender.offer(_Parcel(live, records, count), size)

    def _give_up(self, live: _Live, records: Sequence[Record]) -> None:
        """There is no room: what goes on is handed over later, what has ended is dropped."""
        if live.saga is not None:
            self._wait_for_next_look(live)
        else:
            # About: what has left before it was full is not known on this side.
            self._sender.drop(sum(_CLOSES.get(type(record), 0) for record in records))

    def _let_wait(self, live: _Live) -> None:
        """The saga's history is read before long."""
        if live.saga_id in self._to_read or len(self._to_read) < WAITING:
            self._to_read[live.saga_id] = live
        elif live.saga is not None:
            self._wait_for_next_look(live)
        else:
            self._sender.drop(2 * len(live.plan.steps) + 1)  # of a saga in which nothing goes wrong

    def _wait_for_next_look(self, live: _Live) -> None:
        if not live.is_pending:
            live.is_pending = True
            self._young.append(live)

    # -- the task ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hands over what goes on, and reads what must be, for as long as the runtime lives."""
        with self._running:
            while True:
                await anyio.sleep(LOOK_EVERY_S)
                await self._look_and_read()

    async def _look_and_read(self) -> None:
        try:
            await self._look()
            await self._read(time.monotonic() + LOOK_EVERY_S)
        except AmendsError as error:  # the store is being reopened, or it is the end
            _log.debug("traces_not_read", error=str(error))
        except Exception:  # noqa: BLE001  # an onlooker's bug is not the runtime's
            _log.exception("traces_failed")

    async def _look(self) -> None:
        """Hands over the sagas that had turns before the last look and go on."""
        due, self._old, self._young = self._old, self._young, []
        now_s = time.monotonic()
        for number, live in enumerate(due, 1):
            live.is_pending = False
            if live.saga is not None:
                if live.rest_until_s > now_s:
                    self._wait_for_next_look(live)
                else:
                    self._hand_over(live)
            if number % OFFER_SLICE == 0:
                await anyio.lowlevel.checkpoint()

    async def _read(self, until_s: float) -> None:
        """Reads histories, a page at a time, while there is room for what comes of them."""
        while self._to_read and self._sender.has_room:
            # Taken out before they are read: what has a turn meanwhile must be read once more.
            ids = [*islice(self._to_read, READ_AT_ONCE)]
            page = [self._to_read.pop(saga_id) for saga_id in ids]
            try:
                await self._read_page(page)
            except (AmendsError, anyio.get_cancelled_exc_class()):
                for live in page:
                    self._to_read.setdefault(live.saga_id, live)
                raise
            if time.monotonic() > until_s:
                return
            await anyio.sleep(READ_PAUSE_S)

    async def _read_page(self, page: Sequence[_Live]) -> None:
        try:
            found = await self._insights.load([live.saga_id for live in page])
        except UnreadableSaga:
            found = {}
            for live in page:
                # People have been told of it: the runtime could not go on with it either.
                with contextlib.suppress(UnreadableSaga):
                    found |= await self._insights.load([live.saga_id])
        for live in page:
            history = found.get(live.saga_id)
            if not isinstance(history, LoadedSaga):
                continue  # unreadable, or purged, as only what has ended long ago is
            records = [record for turn in history.turns for record in turn.records]
            live.rest_until_s = time.monotonic() + REST_S_PER_RECORD * len(records)
            if not self._offer(live, records):
                self._give_up(live, records)

    async def close(self) -> None:
        """Lets everything leave that is closed, within `CLOSE_S`; what has not left then is lost.

        Nothing is decided any more. It is not cancelled half-way. Once more does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._running.cancel()
        with anyio.CancelScope(shield=True):
            began_s = time.monotonic()
            await anyio.lowlevel.checkpoint()  # lets `run` give back what it was reading
            try:
                for live in (*self._old, *self._young):
                    live.rest_until_s = 0.0
                for _ in range(2):  # the young are old after the first
                    await self._look()
                await self._read(began_s + CLOSE_S / 2)
            except AmendsError as error:  # the store may be what ended the runtime
                _log.debug("traces_not_read", error=str(error))
            except Exception:  # noqa: BLE001  # as in `run`
                _log.exception("traces_failed")
            await self._sender.close(max(CLOSE_S / 2, began_s + CLOSE_S - time.monotonic()))
            if self._to_read:
                _log.warning("traces_not_read", to=self.where, sagas=len(self._to_read))

    # -- on the sender's thread ----------------------------------------------------------------

    def _unpack(self, parcel: _Parcel) -> list[Span]:
        """The spans that have closed since the saga's last parcel."""
        live, records = parcel.live, parcel.records[: parcel.count]
        spans = project(self._tracing, live.plan, records)
        parcel.before = live.left
        if live.left:
            gone = project(self._tracing, live.plan, records[: live.left])
            gone_ids = {span.span_id for span in gone}
            spans = [span for span in spans if span.span_id not in gone_ids]
        live.left = max(live.left, parcel.count)
        return spans


def _note_left(parcel: _Parcel, taken: bool) -> None:  # noqa: FBT001  # the sender's one question
    """What was not taken leaves with the saga's next parcel, if there is one."""
    if not taken:
        parcel.live.left = min(parcel.live.left, parcel.before)


def _without_payload(record: Record) -> Record:
    if isinstance(record, SagaStarted):
        return msgspec.structs.replace(record, input=EMPTY)
    if isinstance(record, StepExecuted):
        return msgspec.structs.replace(record, result=EMPTY)
    return record
