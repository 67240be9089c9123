"""Leaving: sagas that rest go from memory, now, a little later, or when others need the room.

A saga leaves when it has ended, and when a turn leaves it at rest for long. One that rests for less
stays, and is a candidate for leaving when the bound of live sagas is reached. One that somebody
asked for stays for `LINGER_S`, because who asks once asks again.

The bound refuses starts. What exists has a reserve above it, and what compensates, or is a
two-phase commit, twice as much of it: else sagas that wait for a participant which is away, and so
cannot leave, would keep out those that have nothing to do with it, somebody's refund among them.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final

import anyio

from amends_runtime.actors.horizon import Horizon
from amends_runtime.actors.limits import Limits
from amends_runtime.actors.parking import Parked, Parking
from amends_runtime.actors.saga_actor import SagaActor
from amends_runtime.actors.timers import Timers
from amends_runtime.core.saga import Phase
from amends_runtime.core.waking import rests_until_ms
from amends_runtime.ports import Clock

__all__ = ["Leaving"]

LINGER_S: Final = 1.0  # a waiter comes at once after it was told how the saga stands
RELIEF: Final = 16  # one in so many live sagas leaves at a time, when there are too many
RESERVE: Final = 8  # one in so many places more than the bound for what exists


class Leaving:
    """Takes sagas out of `actors`, the live ones by id, and lets `parking` keep what must be."""

    def __init__(
        self,
        actors: dict[str, SagaActor],
        *,
        parking: Parking,
        timers: Timers,
        horizon: Horizon,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._actors = actors
        self._parking = parking
        self._timers = timers
        self._horizon = horizon
        self._clock = clock
        self._limits = limits
        self._resting: dict[str, SagaActor] = {}  # live, and may leave when others need the room
        self._lingering: deque[tuple[float, SagaActor]] = deque()  # until when, monotonic
        self._someone_lingers = anyio.Event()

    def rest(self, actor: SagaActor, *, asked_for: bool) -> None:
        """A turn has left the saga without a call: it may leave memory, now or later."""
        until_ms = _rests_until_ms(actor)
        if not until_ms:
            return
        rests_long = until_ms - self._clock.now_ms() > self._limits.park_after_ms
        if rests_long and not asked_for:
            self._park(actor)
            return
        self._resting[actor.saga_id] = actor
        if rests_long:
            self._lingering.append((self._clock.monotonic_s() + LINGER_S, actor))
            self._someone_lingers.set()

    def leave(self, actor: SagaActor) -> None:
        """The saga has ended, or rests: it is a row now."""
        if self._actors.get(actor.saga_id) is actor:
            del self._actors[actor.saga_id]
        self._resting.pop(actor.saga_id, None)
        self._timers.forget(actor.timers)

    @property
    def is_full(self) -> bool:
        """Whether there are as many live sagas as there may be."""
        return len(self._actors) >= self._limits.live_sagas

    def room(self, *, compensates: bool) -> int:
        """How many more that exist may be live, the reserve included. It may be below 0."""
        bound = self._limits.live_sagas
        reserve = max(1, bound // RESERVE)
        return bound + reserve * (2 if compensates else 1) - len(self._actors)

    def relieve(self) -> bool:
        """There are too many live sagas: some of those at rest leave, who rest longest first.

        False: none is.
        """
        resting = [
            (until_ms, number, actor)
            for number, actor in enumerate(self._resting.values())
            if (until_ms := _rests_until_ms(actor))
        ]
        self._resting = {actor.saga_id: actor for *_, actor in resting}
        for *_, actor in heapq.nlargest(max(1, len(self._actors) // RELIEF), resting):
            self._park(actor)
        return not self.is_full

    async def run(self) -> None:
        """Lets those go that somebody asked for a while ago, for as long as the runtime lives."""
        while True:
            while not self._lingering:
                self._someone_lingers = anyio.Event()
                await self._someone_lingers.wait()
            until_s, actor = self._lingering.popleft()
            await anyio.sleep(max(0.0, until_s - self._clock.monotonic_s()))
            if self._actors.get(actor.saga_id) is actor and not actor.busy:
                self.rest(actor, asked_for=False)

    def _park(self, actor: SagaActor) -> None:
        """The saga leaves memory, but for what its row does not say of it."""
        assert actor.saga is not None, "what rests is durable"
        waiters, timers = actor.take_waiters(), actor.timers
        by_row = actor.kept_wake_ms > self._horizon.through_ms and not actor.polls
        if by_row:
            self._timers.forget(timers)
        if not by_row or waiters:
            timers = [timer for timer in timers if timer.saga_id is not None]
            compensates = actor.saga.phase is Phase.BACKWARD or actor.saga.round > 0
            parked = Parked(timers, actor.polls, waiters, compensates=compensates)
            self._parking.keep(actor.saga_id, parked)
        actor.timers, actor.polls = [], ()
        self._parking.went(actor)
        self.leave(actor)


def _rests_until_ms(actor: SagaActor) -> int:
    """The instant up to which nothing happens to the saga; 0: it does not rest, or has messages."""
    if actor.saga is None or actor.busy or actor.mailbox or actor.quarantined or actor.dropped:
        return 0
    polls = actor.polls
    until_ms = rests_until_ms(actor.saga, [poll.step for poll in polls] if polls else ())
    return min([until_ms, *(poll.at_ms for poll in polls)])
