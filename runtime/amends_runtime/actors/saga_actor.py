"""A saga in memory: its state, its mailbox, and who waits for it.

An actor handles one message at a time, and none while the records of the one before are not
durable. It holds only what is committed: `saga` and `version` change in `committed`, never in
`decide`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import msgspec

from amends_runtime.actors.mailbox import Envelope, Mailbox
from amends_runtime.actors.timers import Timer
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import CallParticipant, PollParticipant
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import Decision, Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.ports import Call, Transition, summarise

__all__ = ["MAX_CRASHES", "SagaActor", "Turn", "call_for", "ended"]

MAX_CRASHES = (
    3  # a bug that strikes three times running will strike again: leave this saga to people
)


class Turn(msgspec.Struct, frozen=True):
    """What an actor decided and what waits for the commit."""

    actor: SagaActor
    envelope: Envelope
    decision: Decision
    transition: Transition | None

    @property
    def payload_bytes(self) -> int:
        """How much of other people's content its records carry."""
        before = self.actor.saga.payload_bytes if self.actor.saga is not None else 0
        return self.decision.saga.payload_bytes - before


def ended(saga: Saga) -> bool:
    """The condition that most waiters wait for."""
    return saga.ended


class SagaActor:
    """One saga."""

    __slots__ = (
        "_waiters",
        "busy",
        "crashes",
        "dropped",
        "mailbox",
        "plan",
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
        self.busy = False  # a turn of it is decided and not durable
        self.queued = False  # it stands in the queue of actors that can decide
        self.dropped = False  # its state in memory is not to be believed any more
        self.crashes = 0
        self.quarantined = False
        self.shown: tuple[object, ...] = ()  # what its row in the read model shows
        self._waiters: list[tuple[Callable[[Saga], bool], asyncio.Future[SagaView | None]]] = []

    def restore(self, saga: Saga, version: int) -> None:
        """Takes over a state that was folded from the store."""
        self.saga = saga
        self.version = version
        self.shown = _shown(saga)

    def decide(self, envelope: Envelope, now_ms: int, epoch: int) -> Turn:
        """What a message comes to. Changes nothing; see `committed`."""
        decision = core.decide(self.plan, self.saga, envelope.message, now_ms, epoch)
        if not decision.records:
            return Turn(self, envelope, decision, None)
        version = self.version + 1
        summary = None
        if _shown(decision.saga) != self.shown:
            summary = summarise(decision.saga, self.saga_no, version)
        saga = decision.saga
        transition = Transition(
            self.saga_no, version, decision.records, saga.state, saga.past_no_return, summary
        )
        return Turn(self, envelope, decision, transition)

    def committed(self, turn: Turn) -> None:
        """The turn's records are durable: this is the saga now."""
        self.saga = turn.decision.saga
        if turn.transition is not None:
            self.version = turn.transition.version
            if turn.transition.summary is not None:
                self.shown = _shown(self.saga)
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

    def waiters_to(self, other: SagaActor) -> None:
        """Hands everybody who waits to the actor that takes this one's place."""
        other._waiters += self._waiters
        self._waiters = []
        if other.saga is not None:
            other._tell_waiters()  # what they wait for may have become durable in between

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


def _shown(saga: Saga) -> tuple[object, ...]:
    """What a list shows of a saga that can change; equal means that its row need not be written."""
    return (saga.state, saga.past_no_return, saga.ended_at_ms)


def call_for(
    plan: Plan, saga: Saga, effect: CallParticipant | PollParticipant, tracing: Tracing
) -> Call:
    """The attempt that an effect asks for, with everything that the participant is handed."""
    step = plan.steps[effect.step]
    state = saga.steps[effect.step]
    compensating = effect.verb is Verb.COMPENSATE
    turn = saga.turn if compensating else None
    return Call(
        saga_id=saga.saga_id,
        definition_name=saga.definition_name,
        step=effect.step,
        step_name=step.name,
        participant=step.participant,
        action=step.action,
        verb=effect.verb,
        round=effect.round,
        attempt=effect.attempt,
        timeout_ms=step.timeout_ms,
        input=saga.input,
        results=tuple(_results(plan, saga, effect.step)),
        executed=compensating and state.executed,
        own_result=state.result if compensating else None,
        turn=turn,
        turn_step_name=plan.steps[turn.step].name if turn and turn.step is not None else "",
        traceparent=tracing.traceparent(
            saga.saga_id,
            saga.traceparent,
            effect.step,
            effect.verb,
            effect.round,
            effect.attempt,
        ),
        poll=isinstance(effect, PollParticipant),
    )


def _results(plan: Plan, saga: Saga, step: int) -> Iterator[tuple[str, Payload]]:
    for other in plan.uses[step]:
        result = saga.steps[other].result
        if result is not None:
            yield plan.steps[other].name, result
