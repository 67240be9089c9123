"""Parked sagas: what memory keeps of those that rest, and how many there are.

How to think about it. A saga that rests (`core.waking`) needs no actor: its history is in the
store, and what brings it back is an instant or somebody's message. Where its row names an instant
beyond the horizon of the timers, or that only a person moves it, nothing of it stays in memory.
Else an entry does: the timers that bring it back, polls that wait for their time and stand in no
record, and whoever waits for its end.

Those that rest are counted by their state, from the rows once, and from then on as they go and
come: a million of them is never walked. How many of their steps are in doubt stands in no row. So
a saga that rested when the runtime began counts as one, which it usually is, until it moves. Of a
two-phase commit's branches none counts until then: it moves when its next attempt is due.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from amends_runtime.actors.saga_actor import SagaActor, Waiter
from amends_runtime.actors.survey import branches_in_doubt, in_doubt
from amends_runtime.actors.timers import Timer
from amends_runtime.core.effects import PollParticipant
from amends_runtime.core.records import SagaState

__all__ = ["Parked", "Parking", "SinceWhen"]

AGE_STEP_MS: Final = 5_000  # an alert asks for minutes


class Parked:
    """What memory keeps of a parked saga.

    `compensates`: it goes backward, or is a two-phase commit, and comes in before others.
    `is_near`: it is kept because the horizon has come to its instant.
    """

    __slots__ = ("compensates", "is_near", "polls", "timers", "waiters")

    def __init__(
        self,
        timers: list[Timer],
        polls: tuple[PollParticipant, ...],
        waiters: list[Waiter],
        *,
        compensates: bool,
    ) -> None:
        self.compensates = compensates
        self.is_near = False
        self.timers = timers
        self.polls = polls
        self.waiters = waiters or None  # most have none, and an empty list is a tenth of the entry

    @property
    def has_timer(self) -> bool:
        """Whether one of its timers is still to fire."""
        return any(timer.saga_id is not None for timer in self.timers)

    def remove_waiter(self, waiter: object) -> None:
        """The other side has left."""
        if self.waiters is not None:
            self.waiters = [one for one in self.waiters if one[1] is not waiter] or None

    def fail_waiters(self, error: Exception) -> None:
        """Nobody can be told here any more."""
        for _, waiter in self.waiters or ():
            if not waiter.done():
                waiter.set_exception(error)
        self.waiters = None


class SinceWhen:
    """Counts what goes and comes by its instant, about: a night's outage is some thousand counts.

    `AGE_STEP_MS` is how much older the oldest one may be shown than it is.
    """

    def __init__(self) -> None:
        self.count = 0
        self._by_instant: Counter[int] = Counter()

    def count_in(self, since_ms: int, one: int) -> None:
        """One more of that instant, or with -1 one less."""
        self.count += one
        at = since_ms // AGE_STEP_MS
        self._by_instant[at] += one
        if not self._by_instant[at]:
            del self._by_instant[at]

    @property
    def oldest_ms(self) -> int:
        """The instant of the oldest one; 0: there is none."""
        return min(self._by_instant, default=0) * AGE_STEP_MS


class Parking:
    """All that is kept, by saga, and the counts."""

    def __init__(self) -> None:
        self._entries: dict[str, Parked] = {}
        self._by_state: Counter[SagaState] = Counter()
        self.in_doubt = 0
        """Steps in doubt of sagas that rest outside memory."""
        self.branches = SinceWhen()
        """Branches in doubt of two-phase commits that do."""
        self.near = 0
        """Entries that are kept because the horizon has come to them."""

    def begin(self, by_state: dict[SagaState, int]) -> None:
        """So many rested when the store was opened."""
        self._by_state.update(by_state)
        self.in_doubt += sum(by_state.values())

    def keep(self, saga_id: str, parked: Parked) -> None:
        """From now on this is what memory has of the saga."""
        self._entries[saga_id] = parked

    def find(self, saga_id: str) -> Parked | None:
        """What memory has of the saga, if it has anything."""
        return self._entries.get(saga_id)

    def take(self, saga_id: str) -> Parked | None:
        """The same, and it is the caller's from now on."""
        parked = self._entries.pop(saga_id, None)
        if parked is not None and parked.is_near:
            self.near -= 1
        return parked

    def bring_near(self, saga_id: str, *, compensates: bool) -> Parked | None:
        """The entry of a saga to whose instant the horizon has come, which is to get its timer.

        None: it has one.
        """
        parked = self._entries.get(saga_id)
        if parked is None:
            parked = self._entries[saga_id] = Parked([], (), [], compensates=compensates)
        elif parked.has_timer:
            return None
        if not parked.is_near:
            parked.is_near = True
            self.near += 1
        return parked

    def drop_idle(self, saga_id: str) -> None:
        """Forgets an entry that nobody waits at, and that brings nothing back."""
        parked = self._entries.get(saga_id)
        if parked is not None and not (parked.waiters or parked.polls or parked.has_timer):
            self.take(saga_id)

    def went(self, actor: SagaActor) -> None:
        """One more rests outside memory."""
        self._count(actor, 1)

    def came(self, actor: SagaActor) -> None:
        """One of them is back, as it went."""
        self._count(actor, -1)

    def _count(self, actor: SagaActor, one: int) -> None:
        saga = actor.saga
        assert saga is not None, "what rests is durable"
        self._by_state[saga.state] += one
        if actor.has_moved:
            self.in_doubt += one * sum(in_doubt(step) for step in saga.steps)
            for since_ms in branches_in_doubt(saga):
                self.branches.count_in(since_ms, one)
        else:
            self.in_doubt += one

    @property
    def by_state(self) -> dict[SagaState, int]:
        """How many rest outside memory."""
        return {state: count for state, count in self._by_state.items() if count}

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._entries)

    def entries(self) -> Iterator[Parked]:
        """All of them."""
        return iter(self._entries.values())
