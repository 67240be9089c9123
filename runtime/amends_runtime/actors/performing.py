"""Performing: a turn is durable, and what follows from it leaves.

Calls go to the lanes, wake-ups to the timers. A poll that is to be asked again only much later is
no lane's matter before its time: the saga keeps it (`SagaActor.polls`), with a timer, and may leave
memory with both. What a saga has asked for can be taken back from here, too, as far as it has not
left: when its state is not to be believed, and when nobody asks for it any more.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from amends_runtime.actors.leaving import Leaving
from amends_runtime.actors.saga_actor import SagaActor, Turn, call_for
from amends_runtime.actors.timers import Timers
from amends_runtime.core.effects import (
    CallParticipant,
    PollNow,
    PollParticipant,
    WakeAt,
    WithdrawCall,
)
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import Phase, Saga
from amends_runtime.core.tracing import Tracing
from amends_runtime.core.waking import NEVER_MS
from amends_runtime.ports import Call, Clock

__all__ = ["Outbox", "Performing"]


class Outbox:
    """Where calls go.

    The lanes, as the supervisor needs them. Made of functions so that no layer is skipped.
    """

    __slots__ = ("forget", "holds", "poll", "submit", "withdraw")

    def __init__(
        self,
        submit: Callable[[Call, int], None],
        poll: Callable[[Call, int, PollParticipant], None],
        withdraw: Callable[[str, str, WithdrawCall], None],
        forget: Callable[[str, str, int], None],
        holds: Callable[[str, str, int, Verb], bool],
    ) -> None:
        self.submit = submit
        self.poll = poll
        self.withdraw = withdraw
        self.forget = forget
        self.holds = holds


class Performing:
    """Lets effects leave, through `outbox` and `timers`; then the saga may, through `leaving`.

    What rests for longer than `park_after_ms` is not kept in memory.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        timers: Timers,
        leaving: Leaving,
        clock: Clock,
        park_after_ms: int,
        tracing: Tracing,
    ) -> None:
        self._outbox = outbox
        self._timers = timers
        self._leaving = leaving
        self._clock = clock
        self._park_after_ms = park_after_ms
        self._tracing = tracing

    def perform(self, turn: Turn) -> None:
        """The turn is durable: its effects leave."""
        actor, saga = turn.actor, turn.decision.saga
        calls = False
        for effect in turn.decision.effects:
            if isinstance(effect, CallParticipant):
                calls = True
                call = call_for(actor.plan, saga, effect, self._tracing)
                self._outbox.submit(call, saga.started_at_ms)
            elif isinstance(effect, WakeAt):
                is_deadline = effect.at_ms == saga.deadline_at_ms
                within_ms = actor.plan.longest_wait_ms
                if is_deadline:
                    within_ms = saga.deadline_at_ms - saga.started_at_ms
                elif any(effect.at_ms == step.mark_at_ms for step in saga.steps):
                    within_ms = actor.plan.longest_budget_ms
                actor.keep_timer(self._timers.set(actor.saga_id, effect.at_ms, within_ms))
            elif isinstance(effect, PollParticipant):
                self._poll(actor, saga, effect)
            elif isinstance(effect, PollNow):
                self._ask_now(actor, saga, effect.step)
            else:
                if any(poll.step == effect.step for poll in actor.polls):
                    self.ask_again(actor, NEVER_MS)  # the lane knows how to withdraw a poll
                participant = actor.plan.steps[effect.step].participant
                self._outbox.withdraw(participant, actor.saga_id, effect)
        if saga.ended:
            if saga.abandoned:
                # Nobody asks for it any more, not even a poll that waits for its time.
                self.forget_calls(actor)
            if not actor.mailbox:
                self._leaving.leave(actor)
        elif not calls:
            self._leaving.rest(actor, asked_for=turn.envelope.sender is not None)

    def ask_again(self, actor: SagaActor, due_at_ms: int) -> None:
        """The time of these polls has come: their lanes have them from now on."""
        saga = actor.saga
        assert saga is not None, "polls are of a durable saga"
        due = [poll for poll in actor.polls if poll.at_ms <= due_at_ms]
        actor.polls = tuple(poll for poll in actor.polls if poll.at_ms > due_at_ms)
        for poll in due:
            call = call_for(actor.plan, saga, poll, self._tracing)
            self._outbox.poll(call, saga.started_at_ms, poll)

    def forget_calls(self, actor: SagaActor) -> None:
        """What it asked for and has not left yet is not to leave any more."""
        actor.polls = ()
        for participant in {step.participant for step in actor.plan.steps}:
            self._outbox.forget(participant, actor.saga_id, len(actor.plan.steps))

    def _poll(self, actor: SagaActor, saga: Saga, poll: PollParticipant) -> None:
        """An attempt in progress: what is asked again only much later is no lane's matter yet."""
        withdrawn = saga.phase is Phase.BACKWARD and poll.verb is not Verb.COMPENSATE
        if not withdrawn and poll.at_ms - self._clock.now_ms() > self._park_after_ms:
            actor.polls = (*(one for one in actor.polls if one.step != poll.step), poll)
            actor.keep_timer(self._timers.set(actor.saga_id, poll.at_ms))
            return
        call = call_for(actor.plan, saga, poll, self._tracing)
        self._outbox.poll(call, saga.started_at_ms, poll)
        if withdrawn:
            # It was on the wire when the saga turned back, and could not be withdrawn then.
            key = (poll.step, poll.verb, poll.round, poll.attempt)
            self._outbox.withdraw(call.participant, actor.saga_id, WithdrawCall(*key))

    def _ask_now(self, actor: SagaActor, saga: Saga, step: int) -> None:
        """Somebody wants to know: a poll that waits for its time is the lane's matter at once.

        One that is the lane's already is asked within seconds.
        """
        waiting = [poll for poll in actor.polls if poll.step == step]
        actor.polls = tuple(poll for poll in actor.polls if poll.step != step)
        for poll in waiting:
            now = msgspec.structs.replace(poll, at_ms=self._clock.now_ms())
            self._outbox.poll(
                call_for(actor.plan, saga, now, self._tracing), saga.started_at_ms, now
            )
