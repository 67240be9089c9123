"""Recovery: the sagas that had not ended when the store was opened are brought in again.

Recovery only names them; each is read as it is by then, so that what a page said is never taken for
what a saga is. Those that rest are left to the horizon. First come the two-phase commits, whose
participants keep what others need, with those that compensate, because somebody's money is waiting,
and of each the oldest first; page by page, each page's arrivals before the next, so that memory is
not flooded. It is over when all are named and none is awaited.

How it is paced:

1. Sagas come in while few turns wait, and a few with each commit where many do (`arrivals`,
   `Entering.room`). So who asks the runtime for anything waits some milliseconds behind them, and
   those that are in get on and end while others still come: memory stays far below what it was
   before the kill. And no load, however long it lasts, keeps them out.
2. A participant never has more calls at once than its lane's limit, its own or the operator's; the
   others wait in the lane, by the lane's order. That bounds what it has to bear, not its calls per
   second: its usual rate is not known here, and a rate from before the kill would hold everybody up
   who was killed after a quiet night, or because the participant was away.
3. No lane holds up the bringing in, however long its queue: sagas that wait for a slow participant
   stand before others that do not need it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from typing import Final, TypeVar

import anyio
import msgspec
import structlog

from amends_runtime.core.records import SagaState
from amends_runtime.core.waking import NEVER_MS
from amends_runtime.errors import StoreError
from amends_runtime.ports import Clock, OpenSaga, RestingSaga, Store

__all__ = ["Recovering", "Recovery"]

_log = structlog.get_logger(__name__)

RECOVERY_PAGE: Final = 1_000  # sagas named before those named earlier are waited for
RETRY_S: Final = 0.05  # a reopened store is back after a checkpoint
PAUSE_S: Final = 0.01  # about one commit

ORDER: Final = (SagaState.COMPENSATING, SagaState.RUNNING, SagaState.STUCK)

T = TypeVar("T")


_HELD_BACK: Final = (
    "the store was restored: nothing about them is decided and nobody is told anything until an"
    " operator has looked (amends in-doubt) and confirmed it (amends confirm-restore)"
)
_NONE_HELD_BACK: Final = (
    "the store was restored, and no two-phase commit was under way in the backup; one that it does"
    " not know of may have been: participants in doubt are answered UNKNOWN until an operator has"
    " looked what they hold, so amends confirm-restore is still due"
)


class Recovery(msgspec.Struct, frozen=True):
    """How far it is.

    `sagas` have been brought in so far, `duration_s` is how long it has taken. One whose history is
    damaged counts as brought in: nothing more is tried.
    """

    running: bool
    sagas: int
    duration_s: float


class Recovering:
    """Names what is to be brought in, and knows what of it is still awaited, and since when.

    `name` is told a saga's id and whether it comes before others, and says whether it has to
    arrive; then `arrived` is called once it has. `waiting` is how many have been named and not yet
    read, `two_phase` the hashes of the definitions that are two-phase commits.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        name: Callable[[str, bool], bool],
        waiting: Callable[[], int],
        two_phase: Callable[[], Collection[str]],
    ) -> None:
        self._store = store
        self._clock = clock
        self._name = name
        self._waiting = waiting
        self._two_phase = two_phase
        self._began_s: float | None = None
        self._ended_s: float | None = None
        self._all_named = False
        self._awaited = 0
        self._sagas = 0

    async def run(self) -> None:
        """Until all are named. A store that cannot be read for a moment is waited for."""
        boundary = self._store.next_saga_no()  # what starts from now on is nobody's to recover
        self._began_s = self._clock.monotonic_s()
        two_phase = self._two_phase()
        await self._say_what_is_held_back(two_phase)
        if two_phase:
            for state in ORDER:
                await self._name_all(state, boundary, two_phase)
        for state in ORDER:
            await self._name_all(state, boundary)
        self._all_named = True
        self._note_end()
        _log.info("recovered", sagas=self._sagas + self._awaited)

    async def _name_all(
        self, state: SagaState, boundary: int, of: Collection[str] | None = None
    ) -> None:
        """All in this state; with `of` those of these definitions, before others."""
        async for page in self._open(state, boundary):
            for named in page:
                if of is not None and named.definition_hash not in of:
                    continue
                comes_first = of is not None or state is SagaState.COMPENSATING
                if self._name(named.saga_id, comes_first):
                    self._awaited += 1
            await self.wait_for_most()

    async def _open(self, state: SagaState, boundary: int) -> AsyncIterator[list[OpenSaga]]:
        after_no = 0
        while page := await self._read(
            partial(self._store.open_sagas, state, after_no, RECOVERY_PAGE)
        ):
            yield [named for named in page if named.saga_no < boundary]
            after_no = page[-1].saga_no
            if after_no >= boundary:
                return

    async def _say_what_is_held_back(self, two_phase: Collection[str]) -> None:
        """Those that rest among them, which are not named; see `held_back`."""
        if not self._store.restored:
            return
        through_no = self._store.unconfirmed_through_no
        sagas = 0
        for state in ORDER:
            async for page in self._open(state, through_no + 1):
                sagas += sum(named.definition_hash in two_phase for named in page)
        last: RestingSaga | None = None
        while resting := await self._read(
            partial(self._store.resting_sagas, last, NEVER_MS, RECOVERY_PAGE)
        ):
            sagas += sum(
                one.definition_hash in two_phase and one.saga_no <= through_no for one in resting
            )
            last = resting[-1]
        _log.warning(
            "two_phase_commits_held_back",
            sagas=sagas,
            incarnation=self._store.identity.incarnation,
            hint=_HELD_BACK if sagas else _NONE_HELD_BACK,
        )

    async def wait_for_most(self) -> None:
        """Until most of what was named has been read."""
        while self._waiting() > RECOVERY_PAGE // 2:  # noqa: ASYNC110  # a pace
            await anyio.sleep(PAUSE_S)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await read()
            except StoreError as error:
                _log.warning("recovery_waits_for_the_store", error=str(error))
                await anyio.sleep(RETRY_S)

    def arrived(self) -> None:
        """One that was awaited is here, or never will be."""
        self._awaited -= 1
        self._sagas += 1
        self._note_end()

    def _note_end(self) -> None:
        if self._all_named and not self._awaited and self._ended_s is None:
            self._ended_s = self._clock.monotonic_s()

    def now(self) -> Recovery:
        """How far it is now."""
        if self._began_s is None:
            return Recovery(running=True, sagas=0, duration_s=0.0)  # it is about to begin
        until_s = self._clock.monotonic_s() if self._ended_s is None else self._ended_s
        return Recovery(self._ended_s is None, self._sagas, until_s - self._began_s)
