"""The survey: what the sagas have in common, counted without disturbing them.

Ten live sagas or a hundred thousand: `Supervisor.survey` looks at `SLICE` of them and lets the loop
go on before it looks at the next. So what it says is no instant's truth but that of the moments in
which it looked: a saga that has left meanwhile is not counted, one that came in is the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from amends_runtime.actors.saga_actor import SagaActor
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import Phase, Saga, StepState, StepStatus

__all__ = ["SLICE", "Survey", "Tally", "branches_in_doubt", "in_doubt", "will_wake"]

SLICE: Final = 200  # about a millisecond, the time of a few turns


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What is in memory, and how many sagas rest outside it.

    active            sagas by state, parked ones too; a quarantined one is shown as stuck
    parked            those of them that rest outside memory, by state
    stuck             sagas with a step that is stuck, and quarantined ones; of two-phase commits
                      those with a branch that an operator should see to
    in_doubt          steps that may have an effect, and nothing definite is known; see `parking`
    branches_in_doubt branches of two-phase commits that hold something, or may; see below
    oldest_in_doubt_s for how long the oldest of them has; 0: there is none
    without_wake_up   sagas that nothing would wake, unreadable and quarantined ones among them
    backlog           sagas that wait to be read, to decide or to be committed
    messages, fullest how many messages wait in all mailboxes, and in the fullest one
    held_s            how long looking at the sagas held the loop, all slices together
    """

    active: dict[SagaState, int]
    parked: dict[SagaState, int]
    stuck: int
    in_doubt: int
    branches_in_doubt: int
    oldest_in_doubt_s: float
    without_wake_up: int
    unreadable: int
    quarantined: int
    backlog: int
    messages: int
    fullest: int
    held_s: float


class Branches:
    """How many branches are in doubt, and since when the oldest one is; 0: there is none."""

    __slots__ = ("count", "oldest_ms")

    def __init__(self) -> None:
        self.count = 0
        self.oldest_ms = 0

    def add(self, since_ms: int) -> None:
        """One more."""
        self.count += 1
        self.oldest_ms = min(self.oldest_ms, since_ms) if self.oldest_ms else since_ms


class Tally:
    """A survey in the making."""

    __slots__ = (
        "active",
        "branches",
        "fullest",
        "in_doubt",
        "messages",
        "quarantined",
        "sleepless",
        "stuck",
    )

    def __init__(self) -> None:
        self.branches = Branches()
        self.active = {SagaState.RUNNING: 0, SagaState.COMPENSATING: 0, SagaState.STUCK: 0}
        self.stuck = 0
        self.in_doubt = 0
        self.sleepless = 0
        self.quarantined = 0
        self.messages = 0
        self.fullest = 0

    def add(self, actor: SagaActor, *, will_wake: bool) -> None:
        """Counts one saga."""
        waiting = len(actor.mailbox)
        if waiting:
            self.messages += waiting
            self.fullest = max(self.fullest, waiting)
        if not will_wake:
            self.sleepless += 1
        if actor.quarantined:
            self.quarantined += 1
        saga = actor.saga
        if saga is None or saga.ended:
            return  # its start is not durable yet, or it is about to leave
        is_stuck = actor.quarantined
        for step in saga.steps:
            if step.status in _DEFINITE:
                continue
            is_stuck = is_stuck or step.status is StepStatus.STUCK
            self.in_doubt += in_doubt(step)
        state = saga.state
        if saga.round:
            is_stuck = is_stuck or state is SagaState.STUCK
            for since_ms in branches_in_doubt(saga):
                self.branches.add(since_ms)
        self.stuck += is_stuck
        self.active[SagaState.STUCK if actor.quarantined else state] += 1


# What is one of these has no open question, which spares most steps the closer look.
_DEFINITE: Final = frozenset(
    (
        StepStatus.PENDING,
        StepStatus.EXECUTED,
        StepStatus.REJECTED,
        StepStatus.COMPENSATED,
        StepStatus.PREPARED,  # its vote is definite; what it holds is counted by its branch
        StepStatus.BROKEN,
    )
)


def in_doubt(step: StepState) -> bool:
    """Whether an attempt of this step ended without a definite outcome, and none has come since.

    A compensation is in doubt once it failed, too: the step may have been undone.
    """
    if step.status in _DEFINITE:
        return False
    if step.verb is Verb.COMPENSATE and step.failures:
        return True
    if step.prepared_at_ms:
        return step.failures > 0  # its vote is known; what became of its commit may not be
    return step.unknown and not (step.executed or step.refused)


def branches_in_doubt(saga: Saga) -> Iterator[int]:
    """Since when each of these branches has kept what others may need, in UTC milliseconds.

    It has voted yes, or nobody knows how it voted, and it has not acknowledged the decision. One
    that is still being asked is not among them: the prepare deadline ends that.
    """
    if not saga.round or saga.ended:
        return
    for step in saga.steps:
        if step.status in _ACKNOWLEDGED:
            continue
        if step.prepared_at_ms:
            yield step.prepared_at_ms
        elif saga.turn is not None and (step.unknown or step.status is StepStatus.COMPENSATING):
            yield saga.turn.at_ms


_ACKNOWLEDGED: Final = frozenset((StepStatus.EXECUTED, StepStatus.COMPENSATED, StepStatus.BROKEN))


def will_wake(actor: SagaActor, holds: Callable[[str, str, int, Verb], bool]) -> bool:
    """Rule 8: what has not ended always has something that wakes it, or is visibly stuck.

    `holds` says whether a participant's lane has an attempt of a saga, a step and a verb.
    """
    saga = actor.saga
    if actor.quarantined:
        return False  # an operator could, and there is a bug
    if saga is None or saga.ended or actor.busy or actor.mailbox:
        return True
    if saga.deadline_at_ms and saga.phase is Phase.FORWARD and not saga.past_no_return:
        return True
    return any(
        step.retry_at_ms
        or step.status is StepStatus.STUCK
        or (
            step.open
            and (
                any(poll.step == number for poll in actor.polls)
                or holds(actor.plan.steps[number].participant, actor.saga_id, number, step.verb)
            )
        )
        for number, step in enumerate(saga.steps)
    )
