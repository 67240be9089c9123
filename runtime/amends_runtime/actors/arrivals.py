"""Arrivals: sagas on their way from the store into memory.

How to think about it. Every message for a saga that is not in memory makes an arrival, which keeps
it, and arrivals are read from the store together, so a thousand starts cost one query. Because an
id is here from the question to the answer, no two actors of one saga can come to be in this
process; between processes the store's compare-and-set sees to it.

What somebody asks for comes at once. What comes by itself, at a restart or because its time has
come, comes at leisure: while there is `room`, and behind what is asked for. So a hundred thousand
that come together hold up nobody, and neither memory nor participants are flooded. A page of them
is read ahead, so that no turn waits for the disk once there is room.

Behind does not mean never: after `ASKED_IN_A_ROW` readings of what is asked for it is their turn.
Those that compensate have a line of their own, before the others, because somebody's money waits.
So does somebody for what a two-phase commit's participants hold: it is in that line, too.
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

LOAD_TOGETHER: Final = 128  # histories read by one query: at 3 MiB each, below 400 MiB
STORE_RETRY_S: Final = 0.05  # a reopened store is back after a checkpoint
PACE_S: Final = 0.002  # until it is asked again whether there is room: a commit takes as long
MAX_PACE_S: Final = 0.2  # where there is none for long: live sagas are at their bound
ASKED_IN_A_ROW: Final = 4  # so a fifth of the readings, at least, is for what comes by itself


class Arrival:
    """A saga on its way into memory, with the messages that wait for it.

    One that is `needed` was in memory before, or nobody but the runtime knows that it is due: it
    goes on arriving until it is here, whatever the store says meanwhile. Any other one is only
    asked for.
    """

    __slots__ = ("at_leisure", "compensates", "envelopes", "needed", "predecessor", "recovering")

    def __init__(
        self, predecessor: SagaActor | None, *, at_leisure: bool, compensates: bool
    ) -> None:
        self.envelopes: list[Envelope] = []
        self.predecessor = predecessor
        self.needed = at_leisure or predecessor is not None
        self.at_leisure = at_leisure
        self.compensates = compensates  # as far as is known, and only of one at leisure
        self.recovering = False  # recovery has named it, and counts it when it is here

    def fail(self, error: Exception) -> None:
        """Whoever waits for it is told that it does not come."""
        for envelope in self.envelopes:
            envelope.fail(error)
        if self.predecessor is not None:
            self.predecessor.fail_waiters(error)


_Page = list[tuple[str, Arrival, LoadedSaga | Tombstone | None]]
"""Arrivals that were read, with what the store has of each."""


class _Line:
    """Those that come at leisure, in order; `ahead` are read, and wait for room."""

    __slots__ = ("ahead", "queue")

    def __init__(self) -> None:
        self.queue: deque[str] = deque()
        self.ahead: _Page = []

    def __len__(self) -> int:
        return len(self.queue) + len(self.ahead)


class Arrivals:
    """Those on their way, and the task that reads them.

    `arrived` is handed each with what was found, after it was taken out; `unreadable` one whose
    history is damaged. `room` says how many of those at leisure may come now: it is asked once for
    those that compensate (True), and once for the others.
    """

    def __init__(
        self,
        store: Store,
        *,
        room: Callable[[bool], int],
        arrived: Callable[[str, Arrival, LoadedSaga | Tombstone | None], None],
        unreadable: Callable[[str, Arrival, UnreadableSaga], None],
    ) -> None:
        self._store = store
        self._room = room
        self._arrived = arrived
        self._unreadable = unreadable
        self._arrivals: dict[str, Arrival] = {}
        self._asked: deque[str] = deque()
        self._lines = {True: _Line(), False: _Line()}  # those that compensate first
        self._something_to_load = anyio.Event()

    def find(self, saga_id: str) -> Arrival | None:
        """The saga's arrival, if it is on its way."""
        return self._arrivals.get(saga_id)

    def of(
        self,
        saga_id: str,
        predecessor: SagaActor | None = None,
        *,
        at_leisure: bool = False,
        compensates: bool = False,
    ) -> Arrival:
        """The saga's arrival, which begins now unless it is on its way.

        One that came at leisure and is asked for comes at once.
        """
        arrival = self._arrivals.get(saga_id)
        if arrival is None:
            arrival = self._arrivals[saga_id] = Arrival(
                predecessor, at_leisure=at_leisure, compensates=compensates
            )
        elif at_leisure:
            arrival.needed = True
            return arrival
        elif arrival.at_leisure:
            arrival.at_leisure = False
        else:
            return arrival
        self._queue_up(saga_id, arrival)
        self._something_to_load.set()
        return arrival

    @property
    def waiting(self) -> int:
        """How many that are asked for have not been read."""
        return len(self._asked)

    @property
    def waiting_at_leisure(self) -> int:
        """How many others have not come."""
        return sum(map(len, self._lines.values()))

    def __len__(self) -> int:
        return len(self._arrivals)

    # -- reading them --------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads arrivals from the store, many at a time, for as long as the runtime lives.

        A store that cannot be read for a moment, as while it is reopened after a failed commit,
        holds arrivals up and loses none of them.
        """
        pause_s, in_a_row = PACE_S, 0
        while True:
            if self._asked and in_a_row < ASKED_IN_A_ROW:
                in_a_row += 1
                self._hand_over(await self._load(self._take(self._asked, at_leisure=False)))
                continue
            in_a_row = 0
            if await self._go_on_at_leisure():
                pause_s = PACE_S
            elif not self._asked:
                self._something_to_load = anyio.Event()
                with anyio.move_on_after(pause_s if self.waiting_at_leisure else None):
                    await self._something_to_load.wait()
                pause_s = min(2 * pause_s, MAX_PACE_S)

    async def _go_on_at_leisure(self) -> bool:
        """Lets some come for whom there is room, or reads some ahead; False: neither."""
        for compensates, line in self._lines.items():
            if line.ahead and (room := self._room(compensates)) > 0:
                page, line.ahead = line.ahead[:room], line.ahead[room:]
                self._hand_over(page)
                await anyio.lowlevel.checkpoint()
                return True
            if line.queue and not line.ahead:
                line.ahead = await self._load(self._take(line.queue, at_leisure=True))
                return True
        return False

    def _queue_up(self, saga_id: str, arrival: Arrival) -> None:
        if arrival.at_leisure:
            self._lines[arrival.compensates].queue.append(saga_id)
        else:
            self._asked.append(saga_id)

    def _take(self, queue: deque[str], *, at_leisure: bool) -> list[str]:
        """The next of a queue that are still on their way by it, each once."""
        taken: dict[str, None] = {}
        while queue and len(taken) < LOAD_TOGETHER:
            saga_id = queue.popleft()
            arrival = self._arrivals.get(saga_id)
            if arrival is not None and arrival.at_leisure is at_leisure:
                taken[saga_id] = None
        return list(taken)

    def _hand_over(self, page: _Page) -> None:
        for saga_id, arrival, found in page:
            # Not one that was read ahead, asked for since, and has come already.
            if self._arrivals.get(saga_id) is arrival:
                del self._arrivals[saga_id]
                self._arrived(saga_id, arrival, found)

    async def _load(self, ids: list[str]) -> _Page:
        """These as the store has them, but for those that cannot be read."""
        try:
            found = await self._store.load(ids) if ids else {}
        except UnreadableSaga:
            return await self._load_one_by_one(ids)
        except StoreError as error:
            await self._load_later(ids, error)
            return []
        return [(saga_id, self._arrivals[saga_id], found.get(saga_id)) for saga_id in ids]

    async def _load_one_by_one(self, ids: list[str]) -> _Page:
        """One of these is damaged; which, is told by reading each alone."""
        page: _Page = []
        for number, saga_id in enumerate(ids):
            try:
                found = await self._store.load([saga_id])
            except UnreadableSaga as error:
                self._unreadable(saga_id, self._arrivals.pop(saga_id), error)
            except StoreError as error:
                await self._load_later(ids[number:], error)
                break
            else:
                page.append((saga_id, self._arrivals[saga_id], found.get(saga_id)))
        return page

    async def _load_later(self, ids: list[str], error: StoreError) -> None:
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
            else:
                self._queue_up(saga_id, arrival)
        await anyio.sleep(STORE_RETRY_S)
