"""What is prepared and not yet told whether to commit, and who can say so and carry it out.

A participant that has voted yes may not decide alone: until it is told, it is *in doubt*, and what
it has prepared holds locks or reservations. The runtime tells it, and goes on until it is answered.
A participant that has waited for long can also ask by itself; `resolver.py` does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Protocol

from amends.outcomes import Call, Verb

PAGE: Final = 500
"""What is in doubt, in one answer of a source: a list of some hundred kilobytes."""


class Decision(enum.StrEnum):
    """What a runtime says of one round of a saga. Only the first two can be carried out."""

    COMMIT = "COMMIT"
    """All are to commit."""
    ABORT = "ABORT"
    """All are to roll back; also of a saga that the runtime has never seen (presumed abort)."""
    PENDING = "PENDING"
    """Votes are being collected: the decision will come."""
    UNKNOWN = "UNKNOWN"
    """This runtime must not guess: it is not the one that asked for the vote, or its store was
    restored from a backup and no operator has confirmed that yet."""
    NOT_TWO_PHASE = "NOT_TWO_PHASE"
    """The saga is no two-phase commit."""
    UNRECOGNISED = "UNRECOGNISED"
    """Something that this version of the SDK does not know."""

    @property
    def is_final(self) -> bool:
        """Whether it says what is to be done."""
        return self in (Decision.COMMIT, Decision.ABORT)


@dataclass(frozen=True, slots=True)
class InDoubt:
    """One vote that has not been told whether to commit."""

    store_id: str
    """Identity of the runtime's store that asked for the vote."""
    incarnation: str
    """Incarnation of that store then."""
    saga_id: str
    """The saga."""
    step: str
    """The step: the branch of the two-phase commit."""
    round: int
    """The round, from 1."""
    since_ms: int
    """When it was prepared, UTC."""
    what: str
    """What it holds, for people, for example ``takes 500 from accounts``. No payload."""
    name: str
    """The source's own name for it, unique there: a prepared transaction's global id, a hold's
    number. A page begins behind one."""

    def call(self, action: str, decision: Decision) -> Call:
        """Make the call by which a decision is carried out through the participant's barrier.

        For a source of your own, over handlers of your own::

            call = in_doubt.call("collect", decision)
            outcome = await bank.barrier.run(call, bank.handlers()[call.action, call.verb])

        It is answered by the same rules as what the runtime sends, whichever comes first. It has no
        input: `Call.from_resolver` says so to the handler. Raises `ValueError` for a decision that
        cannot be carried out.
        """
        verb = _VERB_OF.get(decision)
        if verb is None:
            raise ValueError(f"{decision} is no decision that can be carried out")
        return Call(
            verb=verb,
            action=action,
            saga_id=self.saga_id,
            step=self.step,
            round=self.round,
            idempotency_key=f"{self.store_id}/{self.saga_id}/{self.step}/{verb}/{self.round}",
            store_id=self.store_id,
            incarnation=self.incarnation,
            executed=True,  # it is in doubt because it was prepared
            two_phase=True,
            from_resolver=True,
        )


_VERB_OF: Final = {Decision.COMMIT: Verb.EXECUTE, Decision.ABORT: Verb.COMPENSATE}


class InDoubtSource(Protocol):
    """What knows which votes are in doubt, and can carry out the decision."""

    async def in_doubt(
        self, older_than_s: float = 0, *, after: str = "", limit: int = PAGE
    ) -> list[InDoubt]:
        """List what was prepared at least `older_than_s` ago, at most `limit`.

        Always in the same order, and behind the one with the name `after`. Raises `BarrierError`.
        """
        ...

    async def resolve(self, in_doubt: InDoubt, decision: Decision) -> bool:
        """Carry out `Decision.COMMIT` or `Decision.ABORT`, durably.

        True when it is settled, also if somebody else has settled it by now; what the runtime sends
        later is then answered `Done`. False if a call of the runtime is at it at this moment: look
        again later. Raises `ValueError` for any other decision; `VoteNotSettled` if what is found
        is not what was decided, which must be looked at by a person; and `BarrierError`, or what a
        handler raises, if it is not settled for now.
        """
        ...
