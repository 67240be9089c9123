"""Held back: two-phase commits from before a restore that nobody has confirmed.

How to think about it. A restored store knows less than it once did. Of a two-phase commit whose
votes it sees collected it may have decided COMMIT since, and told some of it. Whatever it would
decide now it might decide otherwise, and tell the others. So such a commit does not come in, by
whatever way it was to: recovery, its time, somebody's message. It can be read and waited for.
Nothing about it is decided, and nobody is called, until an operator has confirmed the store; then
each comes in as after any restart.

1. What is held back is a matter of its number alone: `Store.unconfirmed_through_no`. What starts
   from then on is of the new incarnation, which has seen all of it, and goes on; after the next
   restart, too.
2. All ways in lead through `Entering._bring_in`, which asks here. Who was held back there is
   known here, so that nobody is forgotten: the horizon looks at no instant twice.
3. What comes in after the confirmation is told so, once (`RuntimeRestarted.restored`): what the
   store has lost may have asked, and told, branches and rounds that it knows nothing of.
4. What is held back is counted as what rests outside memory, and its branches are in doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio

from amends_runtime.actors.saga_actor import Waiter
from amends_runtime.core.definition import Plan
from amends_runtime.core.saga import Saga
from amends_runtime.ports import LoadedSaga, Store

__all__ = ["HeldBack"]


class HeldBack:
    """Those that wait for a confirmation and have come as far as the door, with who waits there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiters: dict[str, list[Waiter]] = {}
        self._confirmed = anyio.Event()

    def is_due(self, loaded: LoadedSaga, plan: Plan, saga: Saga) -> bool:
        """Whether this saga, as it was read, is to be held back now."""
        return (
            plan.two_phase is not None
            and not saga.ended
            and loaded.saga_no <= self._store.unconfirmed_through_no
        )

    def has_lost_history(self, loaded: LoadedSaga, plan: Plan, saga: Saga) -> bool:
        """Whether this saga, as it was read, is to be told that it may have gone on since."""
        return (
            plan.two_phase is not None
            and not saga.ended
            and not saga.history_lost
            and loaded.saga_no <= self._store.restored_through_no
        )

    def keep(self, saga_id: str) -> bool:
        """This saga is held back. False: it was before."""
        if saga_id in self._waiters:
            return False
        self._waiters[saga_id] = []
        return True

    def take(self, saga_id: str) -> list[Waiter] | None:
        """Who waits for a saga that is not held back any more; None: it was not held back."""
        return self._waiters.pop(saga_id, None)

    def __contains__(self, saga_id: str) -> bool:
        return saga_id in self._waiters

    @property
    def saga_ids(self) -> list[str]:
        """All of them, in the order in which they came."""
        return list(self._waiters)

    # -- waiting for one -----------------------------------------------------------------------

    def add_waiter(self, saga_id: str, until: Callable[[Saga], bool]) -> asyncio.Future[Any]:
        """As `SagaActor.add_waiter`. Nothing happens to the saga before it comes in."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiters[saga_id].append((until, waiter))
        return waiter

    def remove_waiter(self, saga_id: str, waiter: asyncio.Future[Any]) -> None:
        """The other side has left."""
        kept = self._waiters.get(saga_id)
        if kept:
            self._waiters[saga_id] = [entry for entry in kept if entry[1] is not waiter]

    def fail_waiters(self, error: Exception) -> None:
        """Nobody can be told here any more."""
        for saga_id, waiters in self._waiters.items():
            for _, waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            self._waiters[saga_id] = []

    # -- the confirmation ----------------------------------------------------------------------

    def note_confirmed(self) -> None:
        """Somebody has asked to confirm the store; whether it is by now, it says itself."""
        if not self._store.restored:
            self._confirmed.set()

    async def wait_confirmed(self) -> None:
        """Until the store is confirmed."""
        await self._confirmed.wait()
