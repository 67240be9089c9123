"""Participants of a two-phase commit behind a barrier, as a table: what is said, what is done.

A life is one branch in one round. Its row and its effect are one local transaction, so a life is
always in one of these states, and a participant that dies comes back in the state that it was in.
"""

from __future__ import annotations

import enum
from typing import Final

from amends_runtime.core.messages import Broken, Done, Heuristic, Outcome, Rejected
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import CommitDecision, Verb
from amends_runtime.core.saga import Saga
from amends_runtime.core.two_phase import LOCKED, decision_of

__all__ = ["NO", "RECEIPT", "VOTES", "Life", "answer", "told"]


class Life(enum.IntEnum):
    """Where a branch stands in one round."""

    NEW = 0
    HOLDS = 1  # voted yes, and waits for the decision
    REFUSED = 2
    WAS_LOCKED = 3
    FENCED = 4  # rolled back before it was ever asked
    COMMITTED = 5
    ROLLED_BACK = 6


NO: Final = Rejected("NO_FUNDS")
VOTES: Final[dict[Life, Outcome]] = {
    Life.HOLDS: Done(Payload(b"vote")),
    Life.REFUSED: NO,
    Life.WAS_LOCKED: Rejected(LOCKED),
}
"""What a first Prepare can come to."""

RECEIPT: Final = Done(Payload(b"receipt"))
"""What a commit says of itself, which is something else than its vote said."""

_FENCED: Final = Rejected("fenced")


def answer(life: Life, verb: Verb, vote: Life, *, voted: bool) -> tuple[Life, Outcome]:
    """The state after a call and what is answered to it.

    `vote` is what a first Prepare comes to. `voted` is what Compensate says: that the coordinator
    has the yes in its records.
    """
    if verb is Verb.PREPARE:
        life = vote if life is Life.NEW else life
        if life is Life.COMMITTED:
            return life, VOTES[Life.HOLDS]
        return life, VOTES.get(life, _FENCED)
    if verb is Verb.EXECUTE:
        if life in (Life.HOLDS, Life.COMMITTED):
            return Life.COMMITTED, RECEIPT
        fenced = life in (Life.FENCED, Life.ROLLED_BACK)
        return life, _FENCED if fenced else Broken("vote_lost")
    if life is Life.COMMITTED:
        return life, Heuristic(True, "committed_before")
    if life is Life.NEW and voted:
        return life, Broken("barrier_lost")
    undone = {Life.NEW: Life.FENCED, Life.HOLDS: Life.ROLLED_BACK}
    return undone.get(life, life), Done()


def told(saga: Saga, round_: int) -> Verb | None:
    """What a branch does that asks GetDecision; None: it goes on waiting."""
    verbs = {CommitDecision.COMMIT: Verb.EXECUTE, CommitDecision.ABORT: Verb.COMPENSATE}
    return verbs.get(decision_of(saga, round_))
