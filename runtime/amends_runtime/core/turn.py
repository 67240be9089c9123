"""The turn: one call of `decide` in the making, and what every saga does alike, whatever its mode.

A machine's `decide` begins a turn, and its rule for the message adds to it: the records that
follow, each at once in the state; effects that its new state does not name; and the answer for
whoever asked. What both machines do in the same way stands here, in functions that take the turn:
being started, restarted, revived and operated, an attempt begun, one polled. What follows from it
is for the machine to say, which goes on by itself afterwards. All that a turn knows of its machine
is that machine's `evolve`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from amends_runtime.core.attempts import IN_PROGRESS, is_open, poll_of
from amends_runtime.core.definition import Plan
from amends_runtime.core.effects import Effect, WakeAt
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    InProgress,
    Message,
    RetrySaga,
    Revived,
    StartSaga,
    Unknown,
)
from amends_runtime.core.records import (
    AttemptLost,
    AttemptStarted,
    OperatorActed,
    OperatorAction,
    Record,
    SagaStarted,
    Verb,
)
from amends_runtime.core.state import Answer, Saga, StepState
from amends_runtime.errors import IllegalMessage

__all__ = [
    "Evolve",
    "Owed",
    "Turn",
    "begin",
    "lose_attempts",
    "on_start",
    "operated",
    "poll_until",
    "start_attempt",
    "steps_to_retry",
    "take_up",
]

Evolve = Callable[[Plan, Saga | None, Record], Saga]
Owed = Callable[[Plan, Saga], list[Effect]]


class Turn(msgspec.Struct, gc=False):
    """The records so far, and the state after them.

    `before` is the state that the message found, `evolve` the machine's. `effects` are those that
    rules add beside what the state owes. `fresh` says that everything it owes is to be done anew.
    """

    plan: Plan
    before: Saga
    saga: Saga
    now_ms: int
    epoch: int
    evolve: Evolve
    records: list[Record] = []
    effects: list[Effect] = []
    answer: Answer | None = None
    fresh: bool = False

    def record(self, record: Record) -> None:
        """Adds a record. Raises IllegalRecord for one that cannot follow."""
        self.saga = self.evolve(self.plan, self.saga, record)
        self.records.append(record)


# -- being started ---------------------------------------------------------------------------------


def begin(plan: Plan, message: Message, now_ms: int, epoch: int, evolve: Evolve) -> Turn:
    """The first turn of a saga. Raises IllegalMessage for any other message than StartSaga."""
    if not isinstance(message, StartSaga):
        raise IllegalMessage("(none)", "(not started)", type(message).__name__)
    started = SagaStarted(
        now_ms,
        message.saga_id,
        plan.definition.name,
        plan.content_hash,
        message.content_hash,
        message.input,
        message.deadline_at_ms,
        message.labels,
        message.traceparent,
    )
    begun = evolve(plan, None, started)
    records: list[Record] = [started]
    return Turn(plan, begun, begun, now_ms, epoch, evolve, records, [], Answer.STARTED, fresh=True)


def on_start(turn: Turn, message: StartSaga) -> None:
    """A repeated start: the caller's retry, or somebody else's use of the same id."""
    same = message.content_hash == turn.saga.content_hash
    turn.answer = Answer.EXISTED if same else Answer.OTHER_CONTENT


# -- being restarted and revived -------------------------------------------------------------------


def lose_attempts(turn: Turn) -> None:
    """The runtime that made the open attempts is gone, and all that the saga was owed with it."""
    for number, step in enumerate(turn.saga.steps):
        if step.open:
            _lose_attempt(turn, number, step)
    turn.fresh = True


def take_up(turn: Turn, message: Revived, owed: Owed) -> None:
    """Nothing was lost, but for an attempt that nobody looked after meanwhile.

    `owed` is the machine's: the wake-ups that are still to come are waited for again.
    """
    for number, step in enumerate(turn.saga.steps):
        polls = [one for one in message.polls if one.step == number and is_open(step, one)]
        turn.effects += polls
        if step.open and not polls:
            _lose_attempt(turn, number, step)
    for effect in owed(turn.plan, turn.saga):
        if isinstance(effect, WakeAt) and effect.at_ms > turn.now_ms:
            turn.effects.append(effect)


def _lose_attempt(turn: Turn, number: int, step: StepState) -> None:
    lost = (number, step.verb, step.round, step.attempt)
    turn.record(AttemptLost(turn.now_ms, *lost, turn.epoch))


# -- being operated --------------------------------------------------------------------------------


def steps_to_retry(
    turn: Turn, message: RetrySaga, can_be_retried: Callable[[StepState], bool]
) -> list[int] | None:
    """The steps that an operator's retry is for, not recorded yet; the turn has its answer.

    None: it changes nothing. Empty: none is, but deciding works again, and that is recorded.
    """
    saga = turn.saga
    if message.request_id and message.request_id == saga.operator_request:
        turn.answer = Answer.RETRIED  # and what came of it is what the sender is shown
        return None
    if saga.ended:
        turn.answer = Answer.ENDED
        return None
    found = [
        number
        for number, step in enumerate(saga.steps)
        if message.step in (None, number) and can_be_retried(step)
    ]
    if not found and not message.revived:
        turn.answer = Answer.NOTHING_STUCK
        return None
    if not found:
        turn.record(operated(turn, message, OperatorAction.RETRY))
    turn.answer = Answer.RETRIED
    return found


def operated(
    turn: Turn,
    message: RetrySaga | AbandonSaga,
    action: OperatorAction,
    step: int | None = None,
    round_: int = 0,
) -> OperatorActed:
    """The record of what an operator did, to a step or to the saga."""
    by = (message.author, message.reason)
    return OperatorActed(turn.now_ms, action, step, *by, round_, message.request_id)


# -- attempts --------------------------------------------------------------------------------------


def start_attempt(turn: Turn, number: int, verb: Verb, round_: int) -> None:
    """Begins the step's next attempt of this verb and round, or the first one."""
    step = turn.saga.steps[number]
    attempt = step.attempt + 1 if step.verb is verb and step.round == round_ else 1
    turn.record(AttemptStarted(turn.now_ms, number, verb, round_, attempt, turn.epoch))


def poll_until(
    turn: Turn, message: Answered, outcome: InProgress, limit_at_ms: int
) -> Unknown | None:
    """Plans the next poll; or says that the attempt has been in progress for too long."""
    if turn.now_ms >= limit_at_ms:
        return Unknown(
            IN_PROGRESS, "the participant is still at it; nothing is known of the outcome"
        )
    turn.effects.append(poll_of(message, outcome, turn.now_ms, limit_at_ms))
    return None
