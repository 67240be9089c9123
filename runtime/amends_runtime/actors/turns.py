"""Turns: many actors decide, one commit, then their effects leave.

Two tasks and one slot between them. The *decider* takes actors that have a message and lets each
decide one; what has records goes into the slot. The *committer* takes the whole slot, commits it
with one sync, and only then lets effects, answers and observers have it. While it syncs, the
decider fills the slot again, only with actors outside the batch in flight, up to `batch_limit`;
then it waits. That bound matters: Python's interpreter lock makes an unbounded overlap slower, not
faster, and what is decided but not durable is what a failed commit throws away.

A commit that fails is one of four things:

    VersionConflict   somebody else wrote these sagas: they are dropped and read again, the rest is
    committed CommitUnknown     nobody knows: all of the batch are dropped, the store is reopened,
    then they are read again OwnershipLost     another runtime owns the store: this one ends
    anything else     a bug or a broken disk: this one ends
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import anyio
import anyio.lowlevel
import structlog

from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.saga_actor import MAX_CRASHES, SagaActor, Turn
from amends_runtime.core.messages import StartSaga
from amends_runtime.core.tracing import Tracing
from amends_runtime.errors import AmendsError, CommitUnknown, Unavailable, VersionConflict
from amends_runtime.ports import Clock, Observer, Store

__all__ = ["Turns"]

_log = structlog.get_logger(__name__)

DECIDE_SLICE = 128  # messages decided before the loop lets replies and requests in
BATCH_BYTES = 8 * 1024 * 1024  # payloads in one commit: more of them is seconds for everybody in it


class Turns:
    """The turn loop.

    `perform` lets a durable turn's effects leave; `dropped` reads actors again.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        observer: Observer,
        batch_limit: int,
        tracing: Tracing,
        perform: Callable[[Turn], None],
        dropped: Callable[[Sequence[SagaActor], Exception], None],
    ) -> None:
        self._store = store
        self._tracing = tracing
        self._clock = clock
        self._observer = observer
        self._batch_limit = batch_limit
        self._perform = perform
        self._dropped = dropped
        self._ready: deque[SagaActor] = deque()
        self._slot: list[Turn] = []
        self._slot_bytes = 0
        self._in_flight: list[Turn] = []
        self._something_ready = anyio.Event()
        self._something_decided = anyio.Event()
        self._room = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self.commits = 0
        """Batches that were taken up to be committed, so far."""

    def ready(self, actor: SagaActor) -> None:
        """The actor has a message. It decides as soon as its turn in flight, if any, is durable."""
        if actor.queued or actor.busy or actor.quarantined or not actor.mailbox.messages:
            return
        actor.queued = True
        self._ready.append(actor)
        if len(self._ready) == 1:  # else the decider does not sleep, and has not been idle
            self._something_ready.set()
            if self._idle.is_set():
                self._idle = anyio.Event()

    @property
    def backlog(self) -> int:
        """Actors that wait to decide, and turns that wait for their commit."""
        return len(self._ready) + len(self._slot) + len(self._in_flight)

    async def wait_idle(self) -> None:
        """Until nothing waits to be decided or committed."""
        await self._idle.wait()

    # -- deciding ------------------------------------------------------------------------------

    async def run_decider(self) -> None:
        """Lets actors decide, for as long as the runtime lives."""
        while True:
            while not self._ready:
                self._note_idle()
                self._something_ready = anyio.Event()
                await self._something_ready.wait()
            while len(self._slot) >= self._batch_limit or self._slot_bytes >= BATCH_BYTES:
                self._room = anyio.Event()
                await self._room.wait()
            self._decide_some()
            await anyio.lowlevel.checkpoint()

    def _decide_some(self) -> None:
        now_ms, epoch = self._clock.now_ms(), self._store.identity.epoch
        room = min(DECIDE_SLICE, self._batch_limit - len(self._slot))
        while self._ready and room and self._slot_bytes < BATCH_BYTES:
            room -= 1
            actor = self._ready.popleft()
            actor.queued = False
            if actor.dropped or actor.busy or not actor.mailbox.messages:
                continue
            turn = self._decide_one(actor, now_ms, epoch)
            if turn is None:
                continue
            if turn.transition is None:
                self._finish(turn)
            else:
                actor.busy = True
                self._slot.append(turn)
                self._slot_bytes += turn.payload_bytes
        if self._slot:
            self._something_decided.set()

    def _decide_one(self, actor: SagaActor, now_ms: int, epoch: int) -> Turn | None:
        """A bug in deciding counts against that saga alone.

        The third one running quarantines it.
        """
        envelope = actor.mailbox.take_nowait()
        try:
            turn = actor.decide(envelope, now_ms, epoch)
        except Exception as error:  # noqa: BLE001
            self._crashed(actor, envelope, error)
            return None
        actor.crashes = 0
        return turn

    def _crashed(self, actor: SagaActor, envelope: Envelope, error: Exception) -> None:
        actor.crashes += 1
        actor.quarantined = actor.crashes >= MAX_CRASHES
        message = envelope.message
        caller = message.traceparent if isinstance(message, StartSaga) else actor.traceparent
        _log.exception(
            "decide_crashed",
            saga_id=actor.saga_id,
            trace_id=self._tracing.trace_id(actor.saga_id, caller),
            on=type(message).__name__,
            crashes=actor.crashes,
            quarantined=actor.quarantined,
        )
        failure = Unavailable(
            f"deciding failed inside ({type(error).__name__}), which the log shows; ask again"
        )
        envelope.fail(failure)
        if actor.quarantined:
            for waiting in actor.mailbox.drain():
                waiting.fail(failure)
        elif envelope.sender is None:
            # Nobody would send it again: a reply that is lost here would leave its attempt open.
            actor.mailbox.put_back(envelope)
        self.ready(actor)

    # -- committing ----------------------------------------------------------------------------

    async def run_committer(self) -> None:
        """Commits what was decided, for as long as the runtime lives."""
        while True:
            while not self._slot:
                self._note_idle()
                self._something_decided = anyio.Event()
                await self._something_decided.wait()
            self._in_flight, self._slot, self._slot_bytes = self._slot, [], 0
            self._room.set()
            self.commits += 1
            try:
                await self._commit(self._in_flight)
            except AmendsError:
                self._abandon()
                raise
            self._in_flight = []

    async def _commit(self, batch: list[Turn]) -> None:
        while batch:
            transitions = [turn.transition for turn in batch if turn.transition is not None]
            began_s = self._clock.monotonic_s()
            try:
                await self._store.commit(transitions)
            except VersionConflict as conflict:
                batch = self._without(batch, conflict)
            except CommitUnknown as unknown:
                await self._recover(batch, unknown)
                return
            else:
                self._observer.batch_committed(
                    len(transitions), self._clock.monotonic_s() - began_s
                )
                for turn in batch:
                    self._committed(turn)
                return

    def _committed(self, turn: Turn) -> None:
        actor, before = turn.actor, turn.actor.saga
        actor.busy = False
        self._finish(turn)
        decision = turn.decision
        self._observer.turn_committed(actor.plan, before, decision.saga, decision.records)

    def _finish(self, turn: Turn) -> None:
        """What may follow once a turn is durable.

        The new state, the answer, the effects, the next message.
        """
        turn.actor.committed(turn)
        self._perform(turn)
        if turn.actor.mailbox.messages:
            self.ready(turn.actor)

    def _without(self, batch: list[Turn], conflict: VersionConflict) -> list[Turn]:
        lost = [turn for turn in batch if turn.actor.saga_no in conflict.saga_nos]
        if not lost:
            raise conflict  # nothing to leave out: committing again would only fail again
        for turn in lost:
            saga = turn.decision.saga
            _log.error(
                "version_conflict",
                saga_id=saga.saga_id,
                trace_id=self._tracing.trace_id(saga.saga_id, saga.traceparent),
            )
        self._drop(lost, Unavailable("somebody else wrote this saga; it is read again, ask again"))
        return [turn for turn in batch if turn not in lost]

    async def _recover(self, batch: list[Turn], unknown: CommitUnknown) -> None:
        """Rule 7: nothing that this commit may have written is believed until it is read again."""
        _log.error("commit_unknown", error=str(unknown), transitions=len(batch))
        await self._store.reopen()
        _log.warning("store_reopened", sagas_read_again=len(batch))
        self._drop(
            batch,
            Unavailable("the store failed in the middle of this write; ask again with the same id"),
        )

    def _abandon(self) -> None:
        """This runtime commits no more: whoever waits for an answer is told that there is none."""
        error = Unavailable("this runtime has lost its store; ask again with the same id")
        turns = [*self._in_flight, *self._slot]
        for turn in turns:
            turn.envelope.fail(error)
        for actor in [*self._ready, *(turn.actor for turn in turns)]:
            for envelope in actor.mailbox.drain():
                envelope.fail(error)

    def _drop(self, lost: list[Turn], error: Exception) -> None:
        for turn in lost:
            turn.actor.busy = False
            turn.actor.dropped = True
            turn.envelope.fail(error)
        self._dropped([turn.actor for turn in lost], error)

    def _note_idle(self) -> None:
        if not self.backlog:
            self._idle.set()
