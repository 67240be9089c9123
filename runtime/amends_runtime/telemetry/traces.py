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
   records there is no room, one that has come back from a rest. What was read is kept as if it had
   been seen, if there is room. Of a saga that rests, or has had no turn for a minute, neither
   records nor state are kept: its payloads must not stay in memory when it has left it. What is
   left of it is how much has left.
4. Nobody knows which spans had left when the runtime before this one ended: if it was killed, those
   in its queue had not. So a recovered saga's spans leave once more, all that are closed, and so do
   those of sagas that ended in the last seconds before the last commit. They have the same ids and
   contents as the first time, so a collector that has them already has them twice, not something
   else.
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
    HeuristicReported,
    Record,
    SagaEnded,
    SagaStarted,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    VoteRefused,
)
from amends_runtime.core.saga import Saga, fold
from amends_runtime.core.tracing import Tracing
from amends_runtime.core.waking import kept_wake_ms
from amends_runtime.errors import AmendsError, UnreadableSaga
from amends_runtime.ports import (
    ENDED_STATES,
    Insights,
    LoadedSaga,
    SagaFilter,
    WatchedTurns,
)
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
AT_REST: Final = 200_000  # about 60 MB; the spans of one that is forgotten leave once more
QUIET_LOOKS: Final = 24  # a minute: longer than most calls, so that few live sagas are read again
WAITING: Final = 100_000  # sagas that wait to be read: as many as are live at once, by default

READ_AT_ONCE: Final = 16  # histories in memory together, each with 3 MiB of payloads at most
READ_RECORDS: Final = 4_000  # about, of all of these: decoding them takes 10 ms of the loop
READ_PAUSE_S: Final = 0.05  # between two pages, so that reading takes a small part of the loop
REST_S_PER_RECORD: Final = 0.005  # and reading the longest histories again and again, too

# What a runtime that was killed may have had in its queue, if its collector was well.
LOOK_BACK_MS: Final = 10_000
LOOK_BACK_TURNS: Final = 4_096  # some hundreds of sagas, read at READ_AT_ONCE in READ_PAUSE_S
LOOK_BACK_STRETCH: Final = 256  # turns that are looked at in one question to the store
LOOK_BACK_SIZE: Final = 512 * 1024  # of records in one answer
LOOK_BACK_ANSWERS: Final = 64  # so many times that; with a pause after each, some seconds

RECORD_BYTES: Final = 512  # of a record without its payload, about
SMALL_PAYLOADS: Final = 16 * 1024  # fewer bytes wait with their records, more are taken out first

ENDED: Final = SagaFilter(states=tuple(sorted(ENDED_STATES)))

_CLOSES: Final[dict[type[Record], int]] = {
    StepExecuted: 2,  # the attempt and the step
    StepRejected: 2,
    StepCompensated: 2,
    StepPrepared: 2,
    VoteRefused: 2,
    HeuristicReported: 2,
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

    `is_past`: it ended before this runtime began, and whether it is sampled is still to be seen.
    `saga` is its state after its last turn, None once it has ended or rests: it may be large, and
    what waits must not be. `turned_at` is by which look it had that turn. `left` is the thread's:
    how many records the spans are of that have left. `length` is how many records the saga had when
    somebody looked; 0: nobody has.
    """

    __slots__ = (
        "has_ended",
        "is_past",
        "is_pending",
        "left",
        "length",
        "payload_bytes",
        "plan",
        "records",
        "rest_until_s",
        "saga",
        "saga_id",
        "turned_at",
    )

    def __init__(
        self, plan: Plan, saga_id: str, saga: Saga | None, records: list[Record] | None
    ) -> None:
        self.plan = plan
        self.saga = saga
        self.saga_id = saga_id
        self.payload_bytes = 0
        self.records = records
        self.left = 0
        self.length = 0
        self.turned_at = 0
        self.has_ended = self.is_past = saga is None
        self.is_pending = False
        self.rest_until_s = 0.0

    @property
    def expected(self) -> int:
        """About how many records its history has."""
        steps = () if self.saga is None else self.saga.steps
        return max(self.length, 2 * sum(step.attempt for step in steps))


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

    To be made before anything is committed. `run` must run for as long as sagas do; call `close`
    after the last commit, while `insights` can still be read. Its memory is bounded:
    `KEPT_RECORDS`, `WAITING`, `UNSAMPLED`, `AT_REST` and the queue's `queue_bytes`, and a few words
    for each sampled saga of those that are live at the same time.
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
            about=_closed_by,
            queue_bytes=queue_bytes,
        )
        self._live: dict[str, _Live] = {}
        self._unsampled: dict[str, None] = {}  # a set whose oldest can be found
        self._at_rest: dict[str, None] = {}  # of the live above; a set whose oldest can be found
        self._kept = 0
        self._looks = 0
        self._young: list[_Live] = []  # has had turns since the last look
        self._old: list[_Live] = []  # has had turns before it
        self._to_read: dict[str, _Live] = {}
        self._running = anyio.CancelScope()
        self._is_closed = False
        self._past_seq = insights.head_seq
        """Up to here is what runtimes before this one did; 0 once that has been looked at."""
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
            # Read again, after a failed commit or a rest: it goes on from a state that is not the
            # one we have followed, so whether anything lies between them is for the store to say.
            self._forget_records(live)
            self._at_rest.pop(saga_id, None)
        live.saga = saga
        live.turned_at = self._looks
        live.payload_bytes = saga.payload_bytes
        if live.records is not None:
            live.records.extend(records)
            self._kept += len(records)
        if saga.end is not None:
            del self._live[saga_id]
            live.saga, live.has_ended = None, True
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
        if not self._tracing.keeps(saga.saga_id, saga.traceparent):
            if saga.end is None:
                if len(self._unsampled) >= UNSAMPLED:
                    del self._unsampled[next(iter(self._unsampled))]
                self._unsampled[saga.saga_id] = None
            return None
        live = _Live(plan, saga.saga_id, saga, [] if before is None else None)
        self._live[saga.saga_id] = live
        return live

    def _forget_records(self, live: _Live) -> None:
        if live.records is not None:
            self._kept -= len(live.records)
            live.records = None

    def _let_rest(self, live: _Live) -> None:
        """Keeps no more of a saga that goes on than how much of it has left."""
        if self._live.get(live.saga_id) is not live or live.saga is None:
            return
        live.length = live.expected
        live.saga = None
        self._forget_records(live)
        if len(self._at_rest) >= AT_REST:
            oldest = next(iter(self._at_rest))
            del self._at_rest[oldest], self._live[oldest]
        self._at_rest[live.saga_id] = None

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
        if not live.has_ended:
            self._wait_for_next_look(live)
        else:
            # About: what has left before it was full is not known on this side.
            self._sender.drop(_closed_by(_Parcel(live, [*records], len(records))))

    def _let_wait(self, live: _Live) -> None:
        """The saga's history is read before long."""
        if live.saga_id in self._to_read or len(self._to_read) < WAITING:
            self._to_read[live.saga_id] = live
        elif not live.has_ended:
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
                await self._look_and_read()
                await anyio.sleep(LOOK_EVERY_S)

    async def _look_and_read(self) -> None:
        try:
            await self._look()
            await self._look_back()
            await self._read(time.monotonic() + LOOK_EVERY_S)
        except AmendsError as error:  # the store is being reopened, or it is the end
            _log.debug("traces_not_read", error=str(error))
        except Exception:  # noqa: BLE001  # an onlooker's bug is not the runtime's
            _log.exception("traces_failed")

    async def _look_back(self) -> None:
        """Has those sagas read whose spans the runtime before this one may not have sent.

        From the newest on, for these are the likeliest to be missing.
        """
        past_seq, self._past_seq = self._past_seq, 0
        if not past_seq:
            return
        try:
            last = await self._turns(past_seq - 1, SagaFilter(), 1)
            for turn in last.turns:
                await self._look_back_to(turn.saga.updated_at_ms - LOOK_BACK_MS, past_seq)
        except AmendsError:
            self._past_seq = past_seq
            raise

    async def _look_back_to(self, since_ms: int, until_seq: int) -> None:
        plans = {
            registered.content_hash: Plan(registered.definition)
            for registered in await self._insights.definitions()
        }
        last_seq = max(0, until_seq - LOOK_BACK_TURNS)
        answers, reaches_back = 0, False
        while until_seq > last_seq and answers < LOOK_BACK_ANSWERS and not reaches_back:
            after_seq = seq = max(last_seq, until_seq - LOOK_BACK_STRETCH)
            while seq < until_seq and answers < LOOK_BACK_ANSWERS:
                found = await self._turns(seq, ENDED, until_seq - seq)
                for turn in found.turns:
                    plan = plans.get(turn.saga.definition_hash)
                    if turn.saga.ended_at_ms < since_ms:
                        reaches_back = True
                    elif turn.seq <= until_seq and plan is not None:
                        live = _Live(plan, turn.saga.saga_id, None, None)
                        live.length = 2 * turn.saga.version
                        self._let_wait(live)
                seq = found.through_seq
                answers += 1
                await anyio.sleep(READ_PAUSE_S)
            until_seq = after_seq

    async def _turns(self, after_seq: int, where: SagaFilter, looked_at: int) -> WatchedTurns:
        return await self._insights.turns_after(
            after_seq, where, turns=looked_at, looked_at=looked_at, size=LOOK_BACK_SIZE
        )

    async def _look(self) -> None:
        """Hands over the sagas that had turns before the last look and go on."""
        due, self._old, self._young = self._old, self._young, []
        now_s = time.monotonic()
        self._looks += 1
        for number, live in enumerate(due, 1):
            live.is_pending = False
            if not live.has_ended:
                if live.rest_until_s > now_s:
                    self._wait_for_next_look(live)
                else:
                    self._hand_over(live)
                    if not live.is_pending and live.saga is not None and kept_wake_ms(live.saga):
                        self._let_rest(live)
            if number % OFFER_SLICE == 0:
                await anyio.lowlevel.checkpoint()
        if self._looks % QUIET_LOOKS == 0:
            await self._let_quiet_ones_rest()

    async def _let_quiet_ones_rest(self) -> None:
        """An attempt that is asked again much later stands in no history: only its quiet shows."""
        for number, live in enumerate(list(self._live.values()), 1):
            if live.turned_at < self._looks - QUIET_LOOKS and not live.is_pending:
                self._let_rest(live)
            if number % OFFER_SLICE == 0:
                await anyio.lowlevel.checkpoint()

    async def _read(self, until_s: float) -> None:
        """Reads histories, a page at a time, while there is room for what comes of them."""
        while self._to_read and self._sender.has_room:
            # Taken out before they are read: what has a turn meanwhile must be read once more.
            page = self._next_page()
            try:
                await self._read_page(page)
            except (AmendsError, anyio.get_cancelled_exc_class()):
                for live in page:
                    self._to_read.setdefault(live.saga_id, live)
                raise
            if time.monotonic() > until_s:
                return
            await anyio.sleep(READ_PAUSE_S)

    def _next_page(self) -> list[_Live]:
        page: list[_Live] = []
        room = READ_RECORDS
        for live in islice(self._to_read.values(), READ_AT_ONCE):
            room -= live.expected
            if page and room < 0:
                break
            page.append(live)
        for live in page:
            del self._to_read[live.saga_id]
        return page

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
            if live.is_past and not self._is_sampled(records):
                continue
            live.length = len(records)
            if not self._keep(live, records):
                live.rest_until_s = time.monotonic() + REST_S_PER_RECORD * len(records)
            if not self._offer(live, records):
                self._give_up(live, records)
            await anyio.lowlevel.checkpoint()

    def _keep(self, live: _Live, records: list[Record]) -> bool:
        """Goes on from what was read, as if all of it had been seen here; False: it cannot."""
        if live.saga is None or live.records is not None:
            return False
        if len(records) > RECORDS_PER_SAGA or self._kept + len(records) > KEPT_RECORDS:
            return False
        # A turn may have been told of since it was read, or be read that is yet to be told of.
        if fold(live.plan, records) != live.saga:
            return False
        # Payloads that were read are not those that the saga's actor holds anyway.
        live.records = [_without_payload(record) for record in records]
        self._kept += len(records)
        return True

    def _is_sampled(self, records: Sequence[Record]) -> bool:
        started = records[0]
        assert isinstance(started, SagaStarted), "a history begins with its start"
        trace_id = self._tracing.trace_id(started.saga_id, started.traceparent)
        return self._tracing.is_sampled(trace_id, started.traceparent)

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
            # A disk that stalls must not hold up the end: what it has not given by then is left.
            with anyio.move_on_after(CLOSE_S / 2):
                await self._read_the_last(began_s + CLOSE_S / 2)
            await self._sender.close(max(CLOSE_S / 2, began_s + CLOSE_S - time.monotonic()))
            if self._to_read:
                _log.warning(
                    "traces_not_read",
                    to=self.where,
                    sagas=len(self._to_read),
                    hint="amends trace export SAGA --to COLLECTOR sends them",
                )

    async def _read_the_last(self, until_s: float) -> None:
        try:
            # The next runtime will look back, too: they are not worth the wait.
            self._to_read = {
                saga_id: live for saga_id, live in self._to_read.items() if not live.is_past
            }
            for live in (*self._old, *self._young):
                live.rest_until_s = 0.0
            for _ in range(2):  # the young are old after the first
                await self._look()
            await self._read(until_s)
        except AmendsError as error:  # the store may be what ended the runtime
            _log.debug("traces_not_read", error=str(error))
        except Exception:  # noqa: BLE001  # as in `run`
            _log.exception("traces_failed")

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


def _closed_by(parcel: _Parcel) -> int:
    """About how many spans a parcel has."""
    records = parcel.records[parcel.live.left : parcel.count]
    return sum(_CLOSES.get(type(record), 0) for record in records)


def _without_payload(record: Record) -> Record:
    if isinstance(record, SagaStarted):
        return msgspec.structs.replace(record, input=EMPTY)
    if isinstance(record, StepExecuted):
        return msgspec.structs.replace(record, result=EMPTY)
    return record
