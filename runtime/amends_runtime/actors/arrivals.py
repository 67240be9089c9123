"""Arrivals: sagas on their way from the store into memory.

How to think about it. Every message for a saga that is not in memory makes an arrival, which keeps
it, and arrivals are read from the store together, so a thousand starts cost one query. Because an
id is here from the question to the answer, no two actors of one saga can come to be in this
process; between processes the store's compare-and-set sees to it.

There are two queues. What somebody asks for is read at once. What comes by itself, at a restart or
because its time has come, is read at leisure: while there is `room`, and behind all that is asked
for. So a hundred thousand that come together hold up nobody, and neither memory nor participants
are flooded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import anyio
import anyio.lowlevel
import structlog

from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.saga_actor import SagaActor
from amends_runtime.errors import StoreError, Unavailable, UnreadableSaga
from amends_runtime.ports import LoadedSaga, Store, Tombstone

__all__ = ["Arrival", "Arrivals"]

_log = structlog.get_logger(__name__)

LOAD_TOGETHER: Final = 128  # histories in memory at once: at 3 MiB each, below 400 MiB
STORE_RETRY_S: Final = 0.05  # a reopened store is back after a checkpoint
PACE_S: Final = 0.01  # about one commit: new work gets its turns in between


class Arrival:
    """A saga on its way into memory, with the messages that wait for it.

    One that is `needed` was in memory before, or nobody but the runtime knows that it is due: it
    goes on arriving until it is here, whatever the store says meanwhile. Any other one is only
    asked for.
    """

    __slots__ = ("at_leisure", "envelopes", "needed", "predecessor", "recovering")

    def __init__(self, predecessor: SagaActor | None, *, at_leisure: bool) -> None:
        self.envelopes: list[Envelope] = []
        self.predecessor = predecessor
        self.needed = at_leisure or predecessor is not None
        self.at_leisure = at_leisure
        self.recovering = False  # recovery has named it, and counts it when it is here

    def fail(self, error: Exception) -> None:
        """Whoever waits for it is told that it does not come."""
        for envelope in self.envelopes:
            envelope.fail(error)
        if self.predecessor is not None:
            self.predecessor.fail_waiters(error)


class Arrivals:
    """Those on their way, and the task that reads them.

    `arrived` is handed each with what was found, after it was taken out; `unreadable` one whose
    history is damaged. `room` says how many of those at leisure may come now.
    """

    def __init__(
        self,
        store: Store,
        *,
        room: Callable[[], int],
        arrived: Callable[[str, Arrival, LoadedSaga | Tombstone | None], None],
        unreadable: Callable[[str, Arrival, UnreadableSaga], None],
    ) -> None:
        self._store = store
        self._room = room
        self._arrived = arrived
        self._unreadable = unreadable
        self._arrivals: dict[str, Arrival] = {}
        self._asked: deque[str] = deque()
        self._at_leisure: deque[str] = deque()
        self._something_to_load = anyio.Event()

    def find(self, saga_id: str) -> Arrival | None:
        """The saga's arrival, if it is on its way."""
        return self._arrivals.get(saga_id)

    def of(
        self, saga_id: str, predecessor: SagaActor | None = None, *, at_leisure: bool = False
    ) -> Arrival:
        """The saga's arrival, which begins now unless it is on its way.

        One that came at leisure and is asked for comes at once.
        """
        arrival = self._arrivals.get(saga_id)
        if arrival is None:
            arrival = self._arrivals[saga_id] = Arrival(predecessor, at_leisure=at_leisure)
        elif at_leisure:
            arrival.needed = True
            return arrival
        elif arrival.at_leisure:
            arrival.at_leisure = False
        else:
            return arrival
        (self._at_leisure if at_leisure else self._asked).append(saga_id)
        self._something_to_load.set()
        return arrival

    @property
    def waiting(self) -> int:
        """How many that are asked for have not been read."""
        return len(self._asked)

    @property
    def waiting_at_leisure(self) -> int:
        """How many others have not been read."""
        return len(self._at_leisure)

    def __len__(self) -> int:
        return len(self._arrivals)

    # -- reading them --------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads arrivals from the store, many at a time, for as long as the runtime lives.

        A store that cannot be read for a moment, as while it is reopened after a failed commit,
        holds arrivals up and loses none of them.
        """
        while True:
            ids = await self._next()
            try:
                found = await self._store.load(ids)
            except UnreadableSaga:
                await self._load_one_by_one(ids)
            except StoreError as error:
                self._load_later(ids, error)
                await anyio.sleep(STORE_RETRY_S)
            else:
                for saga_id in ids:
                    self._hand_over(saga_id, found.get(saga_id))

    async def _next(self) -> list[str]:
        """Those that are read now: what is asked for, and where nothing is, the others."""
        while True:
            while not self._asked and not self._at_leisure:
                self._something_to_load = anyio.Event()
                await self._something_to_load.wait()
            asked = bool(self._asked)
            queue = self._asked if asked else self._at_leisure
            count = min(LOAD_TOGETHER, len(queue))
            if not asked:
                count = min(count, self._room())
            if count <= 0:
                self._something_to_load = anyio.Event()
                with anyio.move_on_after(PACE_S):
                    await self._something_to_load.wait()
                continue
            # Each once: one may have been queued again while it was read.
            taken = dict.fromkeys(queue.popleft() for _ in range(count))
            ids = [saga_id for saga_id in taken if self._is_due(saga_id, asked=asked)]
            if ids:
                return ids

    def _is_due(self, saga_id: str, *, asked: bool) -> bool:
        """Whether it is still on its way by this queue."""
        arrival = self._arrivals.get(saga_id)
        return arrival is not None and arrival.at_leisure is not asked

    def _hand_over(self, saga_id: str, found: LoadedSaga | Tombstone | None) -> None:
        self._arrived(saga_id, self._arrivals.pop(saga_id), found)

    def _load_later(self, ids: list[str], error: StoreError) -> None:
        """The store cannot be read now. Who asks is told; what is needed goes on arriving."""
        _log.warning("load_waits_for_the_store", error=str(error), sagas=len(ids))
        failure = Unavailable(f"the store cannot be read now ({error}); ask again")
        for saga_id in ids:
            arrival = self._arrivals[saga_id]
            kept = [envelope for envelope in arrival.envelopes if envelope.sender is None]
            for envelope in arrival.envelopes:
                envelope.fail(failure)
            arrival.envelopes = kept
            if not arrival.needed:
                del self._arrivals[saga_id]
            elif arrival.at_leisure:
                self._at_leisure.append(saga_id)
            else:
                self._asked.append(saga_id)

    async def _load_one_by_one(self, ids: list[str]) -> None:
        """One of these is damaged; which, is told by reading each alone."""
        for number, saga_id in enumerate(ids):
            try:
                found = await self._store.load([saga_id])
            except UnreadableSaga as error:
                self._unreadable(saga_id, self._arrivals.pop(saga_id), error)
            except StoreError as error:
                self._load_later(ids[number:], error)
                return
            else:
                self._hand_over(saga_id, found.get(saga_id))
