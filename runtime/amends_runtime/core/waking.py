"""Until when a saga rests: whether it may leave memory, and what brings it back.

A saga rests while no attempt of it is open: what happens next is then a retry, its deadline, or a
person's word, and all three stand in its history. So it needs no memory, only an instant.

1. An instant may be too early, never too late: a wake-up that finds nothing to do does nothing.
2. A saga that is stuck in one step and goes on in another one does not rest. Such are few, and
   whoever counts what is stuck has to find them in memory.
3. Nor does one in which nothing is stuck and nothing waits: no correct history comes to that, and
   in memory it is counted as one that nothing wakes.
4. A two-phase commit rests until its next attempt, its next round, its prepare deadline or the
   instant at which a branch is to be marked. Nothing in it is ever stuck for good: a branch that
   needs an operator is told again by itself, and the saga's state shows the mark, also in its row.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Phase, Saga, StepStatus

__all__ = ["NEVER_MS", "WORTH_KEEPING_MS", "kept_wake_ms", "rests_until_ms"]

NEVER_MS: Final = 2**63 - 1
"""The instant of a saga that only a person moves. The largest that a store holds."""

WORTH_KEEPING_MS: Final = 10_000
"""Nearer wake-ups are not kept in the saga's row: most retries follow within seconds, and writing
each down would cost every one of them more than a restart that brings all of them in at once."""

_FORWARD: Final = Phase.FORWARD
_STUCK: Final = StepStatus.STUCK


def rests_until_ms(saga: Saga, aside: Collection[int] = ()) -> int:
    """The instant up to which nothing happens to the saga by itself; NEVER_MS; 0: it does not rest.

    `aside` are steps whose open attempt the caller looks after, such as one that is in progress and
    asked again later: it has to know their instants itself.
    """
    if saga.ended:
        return 0
    forward = saga.phase is _FORWARD
    until_ms = NEVER_MS
    if forward and saga.deadline_at_ms and not saga.past_no_return:
        until_ms = saga.deadline_at_ms
    stuck = waits = False
    for number, step in enumerate(saga.steps):
        if step.mark_at_ms:
            until_ms = min(until_ms, step.mark_at_ms)
        if step.open:
            if number not in aside:
                return 0
            waits = True
        elif step.status is _STUCK:
            stuck = True
        # Backward every turn looks at every step: one that is due and has not begun waits for
        # another step, and no instant moves it.
        elif step.retry_at_ms and (forward or step.retry_at_ms > saga.updated_at_ms):
            waits = True
            until_ms = min(until_ms, step.retry_at_ms)
    if stuck == waits or (stuck and saga.state is not SagaState.STUCK):
        return 0
    return until_ms


def kept_wake_ms(saga: Saga) -> int:
    """What the saga's row says of it: a restart need not bring it in before this instant.

    0: it has to, at once. A function of the history alone, whatever a runtime's settings are.
    """
    for step in saga.steps:
        if step.open:
            return 0  # it does not rest: the answer for nearly every turn, for a fifth of the price
    until_ms = rests_until_ms(saga)
    return until_ms if until_ms - saga.updated_at_ms >= WORTH_KEEPING_MS else 0
