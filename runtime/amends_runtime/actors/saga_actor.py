"""A saga in memory: its state, its mailbox, and who waits for it.

An actor handles one message at a time, and none while the records of the one before are not
durable. It holds only what is committed: `saga` and `version` change in `committed`, never in
`decide`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from amends_runtime.actors.mailbox import Envelope, Mailbox
from amends_runtime.actors.timers import Timer
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import CallParticipant, PollParticipant
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import Decision, Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.core.waking import kept_wake_ms
from amends_runtime.ports import Call, Transition, summarise

__all__ = ["MAX_CRASHES", "SagaActor", "Turn", "Waiter", "call_for", "ended"]

MAX_CRASHES = (
    3  # a bug that strikes three times running will strike again: leave this saga to people
)


class Turn(msgspec.Struct, frozen=True, eq=False):
    """What an actor decided and what waits for the commit.

    `payload_bytes` is how much of other people's content its records carry.
    """

    actor: SagaActor
    envelope: Envelope
    decision: Decision
    transition: Transition | None
    payload_bytes: int = 0


def ended(saga: Saga) -> bool:
    """The condition that most waiters wait for."""
    return saga.ended


Waiter = tuple[Callable[[Saga], bool], "asyncio.Future[SagaView | None]"]
"""A condition, and who is told once it holds."""


class SagaActor:
    """One saga."""

    __slots__ = (
        "_waiters",
        "busy",
        "crashes",
        "dropped",
        "has_moved",
        "mailbox",
        "plan",
        "polls",
        "quarantined",
        "queued",
        "saga",
        "saga_id",
        "saga_no",
        "shown",
        "timers",
        "version",
    )

    def __init__(self, saga_id: str, saga_no: int, plan: Plan, mailbox_capacity: int) -> None:
        self.saga_id = saga_id
        self.saga_no = saga_no
        self.plan = plan
        self.saga: Saga | None = None
        self.version = 0
        self.mailbox = Mailbox(mailbox_capacity)
        self.timers: list[Timer] = []
        self.polls: tuple[PollParticipant, ...] = ()  # attempts in progress, to be asked much later
        self.busy = False  # a turn of it is decided and not durable
        self.queued = False  # it stands in the queue of actors that can decide
        self.dropped = False  # its state in memory is not to be believed any more
        self.crashes = 0
        self.has_moved = True  # a turn of it is younger than the runtime
        self.quarantined = False
        self.shown: _Shown | None = None  # what its row in the read model shows
        self._waiters: list[Waiter] = []

    def restore(self, saga: Saga, version: int, wake_at_ms: int, *, has_moved: bool) -> None:
        """Takes over a state that was folded from the store.

        `wake_at_ms` is its row's: one that an older program wrote does not name it. `has_moved`:
        not everything of it was there when the runtime began.
        """
        self.has_moved = has_moved
        self.saga = saga
        self.version = version
        self.shown = (saga.state, saga.past_no_return, saga.ended_at_ms, wake_at_ms)

    def decide(self, envelope: Envelope, now_ms: int, epoch: int) -> Turn:
        """What a message comes to. Changes nothing; see `committed`."""
        before = self.saga
        decision = core.decide(self.plan, before, envelope.message, now_ms, epoch)
        if not decision.records:
            return Turn(self, envelope, decision, None)
        version = self.version + 1
        saga = decision.saga
        state = saga.state
        summary = None
        if _shown(saga, state) != self.shown:
            summary = summarise(saga, self.saga_no, version)
        transition = Transition(
            self.saga_no, version, decision.records, state, saga.past_no_return, summary
        )
        payload_bytes = saga.payload_bytes - (0 if before is None else before.payload_bytes)
        return Turn(self, envelope, decision, transition, payload_bytes)

    def committed(self, turn: Turn) -> None:
        """The turn's records are durable: this is the saga now."""
        self.saga = turn.decision.saga
        transition = turn.transition
        if transition is not None:
            self.version = transition.version
            self.has_moved = True
            row = transition.summary
            if row is not None:
                self.shown = (row.state, row.past_no_return, row.ended_at_ms, row.wake_at_ms)
            if self._waiters:
                self._tell_waiters()
        if turn.envelope.sender is not None:
            turn.envelope.tell(Told(turn.decision.answer, self.view()))

    @property
    def traceparent(self) -> str:
        """The trace context that its start brought; empty before the start is durable, too."""
        return "" if self.saga is None else self.saga.traceparent

    def view(self) -> SagaView:
        """The saga as it is durable. Only for an actor whose start is."""
        assert self.saga is not None, "an actor is viewed only after its start is durable"
        return SagaView(self.plan, self.saga, self.version, self.quarantined)

    def keep_timer(self, timer: Timer) -> None:
        """Looks after one more wake-up. Those that have fired are of no use to anybody."""
        self.timers = [one for one in self.timers if one.saga_id is not None]
        self.timers.append(timer)

    # -- waiting -------------------------------------------------------------------------------

    def add_waiter(self, until: Callable[[Saga], bool]) -> asyncio.Future[SagaView | None]:
        """A future that is set when `until` holds for the durable state, or the saga has ended.

        Whoever waits may set it to None to end the wait.
        """
        waiter: asyncio.Future[SagaView | None] = asyncio.get_running_loop().create_future()
        self._waiters.append((until, waiter))
        return waiter

    def remove_waiter(self, waiter: asyncio.Future[SagaView | None]) -> None:
        """The other side has left."""
        self._waiters = [entry for entry in self._waiters if entry[1] is not waiter]

    def fail_waiters(self, error: Exception) -> None:
        """Nobody can be told here any more."""
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiters = []

    def take_waiters(self) -> list[Waiter]:
        """Everybody who waits here, for whoever looks after them from now on."""
        waiters, self._waiters = self._waiters, []
        return waiters

    def give_waiters(self, waiters: list[Waiter]) -> None:
        """Looks after these from now on."""
        self._waiters += waiters
        if self.saga is not None:
            self._tell_waiters()  # what they wait for may have become durable in between

    @property
    def kept_wake_ms(self) -> int:
        """When its row says that it goes on by itself; 0: the row does not say."""
        return 0 if self.shown is None else self.shown[3]

    def _tell_waiters(self) -> None:
        if not self._waiters:
            return
        assert self.saga is not None, "told after a commit"
        kept = []
        for until, waiter in self._waiters:
            if self.saga.ended or until(self.saga):
                if not waiter.done():
                    waiter.set_result(self.view())
            elif not waiter.done():
                kept.append((until, waiter))
        self._waiters = kept


_Shown = tuple[SagaState, bool, int, int]


def _shown(saga: Saga, state: SagaState) -> _Shown:
    """What a list shows of a saga that can change; equal means that its row need not be written."""
    return (state, saga.past_no_return, saga.ended_at_ms, kept_wake_ms(saga))


def call_for(
    plan: Plan, saga: Saga, effect: CallParticipant | PollParticipant, tracing: Tracing
) -> Call:
    """The attempt that an effect asks for, with everything that the participant is handed."""
    number = effect.step
    step = plan.steps[number]
    call = Call(
        saga_id=saga.saga_id,
        definition_name=saga.definition_name,
        step=number,
        step_name=step.name,
        participant=step.participant,
        action=step.action,
        verb=effect.verb,
        round=effect.round,
        attempt=effect.attempt,
        timeout_ms=step.timeout_ms,
        input=saga.input,
        results=_results(plan, saga, number),
        traceparent=tracing.traceparent(
            saga.saga_id,
            saga.traceparent,
            number,
            effect.verb,
            effect.round,
            effect.attempt,
        ),
        poll=type(effect) is PollParticipant,
        two_phase=plan.two_phase is not None,
    )
    return call if effect.verb is not _COMPENSATE else _to_compensate(call, plan, saga)


_COMPENSATE: Final = Verb.COMPENSATE  # bound once: see `core.saga`


def _to_compensate(call: Call, plan: Plan, saga: Saga) -> Call:
    """The call with what only a compensation is told: what became of the step, and why it is."""
    state, turn = saga.steps[call.step], saga.turn
    return msgspec.structs.replace(
        call,
        # A yes vote promised the effect, so a participant that has forgotten it must say so.
        executed=state.executed or state.prepared_at_ms > 0,
        own_result=saga.handed(call.step),
        turn=turn,
        turn_step_name=plan.step_names[turn.step] if turn and turn.step is not None else "",
    )


def _results(plan: Plan, saga: Saga, step: int) -> tuple[tuple[str, Payload], ...]:
    uses = plan.uses[step]
    if not uses:
        return ()
    found = []
    for other in uses:
        result = saga.handed(other)
        if result is not None:
            found.append((plan.step_names[other], result))
    return tuple(found)
