"""GetDecision: what a participant in doubt is told.

The participant voted yes, holds what it voted for, and was not told how it ended. What it hears
here it carries out, so nothing is said that is not durable, and nothing that only this store would
believe:

    another store's question                        UNKNOWN
    one from before a restore that nobody confirmed,
        or from an incarnation that is none of ours UNKNOWN
    until then, whoever asks: an id that this store
        does not have, and a saga that is held back UNKNOWN: what the backup lacks may be a COMMIT
    an earlier incarnation's question, of a saga
        that was started after the restore          UNKNOWN: it was lost, and its id used again
    an id that this store has never had             ABORT: what is not recorded was not committed
    a saga that is no two-phase commit              UNSPECIFIED
    a round that this history does not have yet     UNKNOWN
    one that it cannot have any more, for it ended  ABORT
    an earlier round                                ABORT: no round follows a commit
    the running round                               PENDING, COMMIT or ABORT
    a purged saga                                   as it was, by its tombstone

A history that cannot be read is an error and no answer. Whoever asks keeps what it holds after
UNKNOWN, PENDING and every error.

A vote of the incarnation that is here never meets the third line: its saga was recorded by this
incarnation before anybody was asked to vote, so it is known, and is not held back. Who meets it is
a person who asks about an older vote in this incarnation's name.
"""

from __future__ import annotations

from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.core.records import CommitDecision
from amends_runtime.core.saga import Saga
from amends_runtime.core.two_phase import decision_of
from amends_runtime.errors import NotFound
from amends_runtime.ports import Insights, LoadedSaga, StoreIdentity, Tombstone

__all__ = ["Decisions"]


class Decisions:
    """Answers from memory where the saga is live, else from the store, one saga at a time."""

    def __init__(self, supervisor: Supervisor, insights: Insights, identity: StoreIdentity) -> None:
        self._supervisor = supervisor
        self._insights = insights
        self._identity = identity

    async def find(
        self, saga_id: str, round_: int, *, store_id: str, incarnation: str
    ) -> CommitDecision | None:
        """The durable decision; None: the saga is no two-phase commit.

        `store_id` and `incarnation` are those that the call of Prepare brought. Raises WrongState
        for a history that cannot be read, StoreError where nothing can be read.
        """
        if store_id != self._identity.store_id or not self._insights.believes(incarnation):
            return CommitDecision.UNKNOWN
        try:
            view = await self._supervisor.view(saga_id)
        except NotFound:
            found = (await self._insights.load([saga_id])).get(saga_id)
            if found is None:
                # Read after the store: confirmed in between, it is believed by now.
                is_restored = self._insights.restored
                return CommitDecision.UNKNOWN if is_restored else CommitDecision.ABORT
            if isinstance(found, Tombstone):
                return _as_it_was(found, round_)
            view = await self._supervisor.view(saga_id)  # it was started in between
        if view.saga.round and not view.saga.ended and await self._is_held_back(saga_id):
            return CommitDecision.UNKNOWN
        if incarnation != self._identity.incarnation and await self._is_new(saga_id):
            return CommitDecision.UNKNOWN  # of a saga that is lost, whose id was used again
        return _as_it_is(view.saga, round_)

    async def _is_held_back(self, saga_id: str) -> bool:
        """Whether a two-phase commit that has not ended is from before an unconfirmed restore."""
        through_no = self._insights.unconfirmed_through_no
        if not through_no:
            return False
        found = (await self._insights.load([saga_id])).get(saga_id)
        return isinstance(found, LoadedSaga) and found.saga_no <= through_no

    async def _is_new(self, saga_id: str) -> bool:
        """Whether a saga is from after the last restore, so that no earlier one asked its votes."""
        found = (await self._insights.load([saga_id])).get(saga_id)
        through_no = self._insights.restored_through_no  # 0, if the backup had none at all
        return isinstance(found, LoadedSaga) and found.saga_no > through_no


def _as_it_is(saga: Saga, round_: int) -> CommitDecision | None:
    return decision_of(saga, round_) if saga.round else None


def _as_it_was(tombstone: Tombstone, round_: int) -> CommitDecision | None:
    if tombstone.decision is None or round_ == tombstone.round:
        return tombstone.decision
    return CommitDecision.ABORT
