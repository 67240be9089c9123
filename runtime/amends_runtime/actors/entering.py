"""Entering: what becomes of a saga that was read, or that nobody knows.

`arrivals` brings each here with what the store has of it. One that has a history is folded, and is
live from then on. If it has not ended it is told so before anything else: Revived, if it was
parked, for nothing of it was lost; RuntimeRestarted, if it was in memory and is no more, for
whatever it had in flight is gone. One that has ended answers its messages and leaves. A two-phase
commit of a restored store does not enter before somebody has confirmed it: see `held_back`.

One that nobody knows begins with its first start, if it may. One whose history is damaged is told
of, counted, and left to people. How many may enter by themselves, without anybody asking for them,
is decided here, too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec
import structlog

from amends_runtime.actors import refusals
from amends_runtime.actors.arrivals import Arrival
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.held_back import HeldBack
from amends_runtime.actors.leaving import Leaving
from amends_runtime.actors.limits import Limits
from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.parking import Parked, Parking
from amends_runtime.actors.recovery import Recovering
from amends_runtime.actors.saga_actor import SagaActor
from amends_runtime.actors.timers import Timers
from amends_runtime.actors.turns import Turns
from amends_runtime.actors.view import Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import PollParticipant
from amends_runtime.core.messages import (
    AbandonSaga,
    Revived,
    RuntimeRestarted,
    StartSaga,
    Wake,
)
from amends_runtime.core.saga import Saga
from amends_runtime.errors import Overloaded, Refusal, StoreError
from amends_runtime.ports import Clock, LoadedSaga, Observer, Store, Tombstone

__all__ = ["Entering"]

_log = structlog.get_logger(__name__)

ARRIVE_BACKLOG = 512  # turns that wait, up to which more may come in by themselves: a commit full
ARRIVE_SHARE = 32  # where more wait, so many of either line come in all the same with each commit


class Entering:
    """Puts sagas into `actors`, the live ones by id, and lets them take part in `turns`.

    `room`, `arrived` and `cannot_be_read` are what `Arrivals` asks for.
    """

    def __init__(
        self,
        actors: dict[str, SagaActor],
        store: Store,
        definitions: Definitions,
        *,
        parking: Parking,
        held_back: HeldBack,
        leaving: Leaving,
        timers: Timers,
        turns: Turns,
        recovery: Recovering,
        clock: Clock,
        observer: Observer,
        limits: Limits,
    ) -> None:
        self._actors = actors
        self._store = store
        self._definitions = definitions
        self._parking = parking
        self._held_back = held_back
        self._leaving = leaving
        self._timers = timers
        self._turns = turns
        self._recovery = recovery
        self._clock = clock
        self._observer = observer
        self._limits = limits
        self._began_at_seq = store.head_seq
        self._share_taken = {True: -1, False: -1}  # with which commit, by line; see `room`
        self.unreadable: dict[str, str] = {}
        """Sagas whose history is damaged, and how."""

    def room(self, compensates: bool) -> int:  # noqa: FBT001  # which of the lines asks
        """How many sagas of a line may come in by themselves now, and do.

        As many as there is memory for, while the turns keep up; else a share with each commit: a
        load that does not end must not keep out what it has no part in.
        """
        if self._leaving.is_full:
            self._leaving.relieve()
        room = self._leaving.room(compensates=compensates)
        if self._turns.backlog <= ARRIVE_BACKLOG or room <= 0:
            return room
        if self._share_taken[compensates] == self._turns.commits:
            return 0
        self._share_taken[compensates] = self._turns.commits
        return min(room, ARRIVE_SHARE)

    def arrived(self, saga_id: str, arrival: Arrival, found: LoadedSaga | Tombstone | None) -> None:
        """It was read, and this is what the store has of it; None: it does not know the id."""
        if arrival.recovering:
            self._recovery.arrived()
        try:
            if isinstance(found, LoadedSaga):
                self._bring_in(found, arrival)
            elif isinstance(found, Tombstone):
                self._forget_parked(saga_id, refusals.purged(found))
                arrival.fail(refusals.purged(found))
            else:
                self._bring_in_new(saga_id, arrival)
        except Exception as error:  # noqa: BLE001  # one saga must not hold up the others
            arrival.recovering = False
            self.cannot_be_read(saga_id, arrival, error)

    def cannot_be_read(self, saga_id: str, arrival: Arrival, error: Exception) -> None:
        """Leaves a damaged saga to people.

        It stays in the store as it is, and whoever asks is told.
        """
        if arrival.recovering:
            self._recovery.arrived()
        _log.error(
            "saga_cannot_be_read",
            saga_id=saga_id,
            error=f"{type(error).__name__}: {error}" if isinstance(error, StoreError) else "",
            exc_info=not isinstance(error, StoreError),
            hint="its history is damaged; all other sagas go on; restore it from a backup",
        )
        self.unreadable[saga_id] = str(error) if isinstance(error, StoreError) else "see the log"
        refusal = refusals.unreadable(saga_id, self.unreadable[saga_id])
        arrival.fail(refusal)
        self._forget_parked(saga_id, refusal)

    def _forget_parked(self, saga_id: str, error: Exception) -> None:
        """Nothing brings this saga back, and who waits for it is told so."""
        parked = self._parking.take(saga_id)
        if parked is not None:
            self._timers.forget(parked.timers)
            parked.fail_waiters(error)
        for _, waiter in self._held_back.take(saga_id) or ():
            if not waiter.done():
                waiter.set_exception(error)

    def _bring_in(self, loaded: LoadedSaga, arrival: Arrival) -> None:
        plan = self._definitions.plan(loaded.definition_hash)
        saga = core.fold(plan, (record for turn in loaded.turns for record in turn.records))
        assert saga is not None, "a stored saga has at least its start"
        actor = SagaActor(loaded.saga_id, loaded.saga_no, plan, self._limits.mailbox)
        moved = loaded.turns[-1].seq > self._began_at_seq
        actor.restore(saga, loaded.version, loaded.wake_at_ms, has_moved=moved)
        if self._held_back.is_due(loaded, plan, saga):
            self._hold_back(actor, arrival)
            return
        parked = self._parking.take(loaded.saga_id)
        waited_at_the_door = self._held_back.take(loaded.saga_id)
        if arrival.predecessor is not None:
            self._tell_of_unknown_turn(arrival.predecessor, loaded, saga)
        elif waited_at_the_door is not None:
            actor.has_moved = True  # it was counted as it is, see `_hold_back`
            self._parking.came(actor)
            actor.give_waiters(waited_at_the_door)
        elif not saga.ended and (parked is not None or loaded.wake_at_ms):
            self._parking.came(actor)  # one that has ended went as a live one: its entry is old
        # To be abandoned must not depend on whether the saga can go on. A two-phase commit does go
        # on when it is: it is told first what it has lost, or it would call twice.
        ends = AbandonSaga if plan.two_phase is None else ()
        first = [one for one in arrival.envelopes if isinstance(one.message, ends)]
        rest = [one for one in arrival.envelopes if not isinstance(one.message, ends)]
        restored = self._held_back.has_lost_history(loaded, plan, saga)
        if parked is not None and not restored:
            first.append(Envelope(Revived(self._polls_by_now(parked))))
        elif not saga.ended:
            first.append(Envelope(RuntimeRestarted(restored)))
        if parked is not None:
            self._timers.forget(parked.timers)
            actor.give_waiters(parked.waiters or [])
        self._make_live(actor, arrival, [*first, *rest])
        if saga.ended and not actor.mailbox:
            self._leaving.leave(actor)

    def _hold_back(self, actor: SagaActor, arrival: Arrival) -> None:
        """It was read, and does not come in; see `held_back`. Who asked is told how it stands."""
        saga_id, saga = actor.saga_id, actor.saga
        assert saga is not None, "it was read from the store"
        if self._held_back.keep(saga_id):
            if actor.kept_wake_ms:
                self._parking.came(actor)  # it was counted by its row
            actor.has_moved = True
            self._parking.went(actor)
        parked = self._parking.take(saga_id)
        if parked is not None:  # the horizon had come to it
            self._timers.forget(parked.timers)
        now_ms, epoch = self._clock.now_ms(), self._store.identity.epoch
        for envelope in arrival.envelopes:
            if isinstance(envelope.message, StartSaga):
                turn = actor.decide(envelope, now_ms, epoch)
                assert not turn.decision.records, "a repeated start changes nothing"
                envelope.tell(Told(turn.decision.answer, actor.view()))
            elif isinstance(envelope.message, Wake):
                envelope.tell(Told(None, actor.view()))
            else:
                identity = self._store.identity
                envelope.fail(refusals.restore_unconfirmed(saga_id, identity.incarnation))

    def _tell_of_unknown_turn(self, before: SagaActor, loaded: LoadedSaga, saga: Saga) -> None:
        """A commit that was believed to have failed was written: observers hear of it now."""
        records = [
            record
            for turn in loaded.turns
            if turn.version > before.version
            for record in turn.records
        ]
        if records:
            self._observer.turn_committed(before.plan, before.saga, saga, records)

    def _polls_by_now(self, parked: Parked) -> tuple[PollParticipant, ...]:
        """A parked saga's polls, each as far ahead as its timer is, whatever the clock says.

        Their instants are by the clock as it was when they were asked for.
        """
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic_s()
        due_s = {timer.at_ms: timer.due_s for timer in parked.timers}
        polls = []
        for poll in parked.polls:
            ahead_ms = math.ceil(max(0.0, due_s[poll.at_ms] - now_s) * 1000)
            polls.append(msgspec.structs.replace(poll, at_ms=now_ms + ahead_ms))
        return tuple(polls)

    def _bring_in_new(self, saga_id: str, arrival: Arrival) -> None:
        """Nobody knows this id.

        Its first start makes it, whatever came before that had nothing to speak to.
        """
        envelopes = deque(arrival.envelopes)
        while envelopes and not isinstance(envelopes[0].message, StartSaga):
            envelopes.popleft().fail(refusals.not_found(saga_id))
        if not envelopes:
            arrival.fail(refusals.not_found(saga_id))
            return
        plan = envelopes[0].plan
        assert plan is not None, "a start brings its plan"
        refused = self._why_not_start(plan)
        if refused is not None:
            for envelope in envelopes:
                is_start = isinstance(envelope.message, StartSaga)
                envelope.fail(refused if is_start else refusals.not_found(saga_id))
            return
        actor = SagaActor(saga_id, self._store.next_saga_no(), plan, self._limits.mailbox)
        self._make_live(actor, arrival, envelopes)

    def _make_live(
        self, actor: SagaActor, arrival: Arrival, envelopes: Sequence[Envelope] | deque[Envelope]
    ) -> None:
        if arrival.predecessor is not None:
            actor.give_waiters(arrival.predecessor.take_waiters())
        self._actors[actor.saga_id] = actor
        for envelope in envelopes:
            try:
                actor.mailbox.put_nowait(envelope)
            except Overloaded as full:
                envelope.fail(full)
        self._turns.ready(actor)

    def _why_not_start(self, plan: Plan) -> Refusal | None:
        """Why a saga that does not exist yet is not to be started now, if it is not."""
        missing = self._definitions.unregistered(plan)
        if missing:
            return refusals.cannot_run(plan, missing)
        if self._leaving.is_full and not self._leaving.relieve():
            return refusals.too_many_live(len(self._actors), self._limits.live_sagas)
        return None
