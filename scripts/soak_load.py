"""The load of a soak: clients in a closed loop, and what has happened so far."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio

import amends
from scripts.soak_plan import Errand, Trade
from shop.journal import Journal

START_TIMEOUT_S: Final = 10.0
"""Of one start; a patient client begins anew with the same id."""

WAIT_S: Final = 60.0
"""After so long a client leaves a saga to the drain, and goes on with the next."""

MANY_LATE: Final = 30
"""After so many sagas that were left like this there is nothing more to learn from going on."""

OPEN_STATES: Final = (
    amends.SagaState.RUNNING,
    amends.SagaState.COMPENSATING,
    amends.SagaState.STUCK,
)
"""Of sagas that have not ended."""


class Stalled(Exception):
    """The load does not go on."""


class News:
    """Counts what the client was told, and wakes whoever waits for the k-th piece of it."""

    def __init__(self) -> None:
        self.count = 0
        self.last_s = time.monotonic()
        self.at_next: list[Callable[[], None]] = []
        """Called with the next piece, once."""
        self._changed = anyio.Event()

    def came(self) -> None:
        """One more acknowledgement or end."""
        self.count += 1
        self.last_s = time.monotonic()
        self._changed.set()
        self._changed = anyio.Event()
        at_next, self.at_next = self.at_next, []
        for call in at_next:
            call()

    async def wait_for(self, count: int) -> None:
        """Wait until there have been so many."""
        while self.count < count:
            await self._changed.wait()


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    started: int = 0
    under_way: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    kills_while_starting: int = 0
    left: list[str] = field(default_factory=list)
    """Sagas that clients have left to the drain."""
    stuck: int = 0
    """Sagas that had not ended after it."""
    restart_s: list[float] = field(default_factory=list)
    """From a kill of the runtime to its ready file."""
    first_news_s: list[float] = field(default_factory=list)
    """From a kill of the runtime to the first news after it was ready again."""
    resident_mib: list[float] = field(default_factory=list)
    """Of the runtime, through all of its lives."""
    looks: int = 0
    """How often the books were looked at while it ran."""
    transports: dict[str, str] = field(default_factory=dict)
    """By participant: how the last runtime called it."""


class Load:
    """The clients: a closed loop over one connection."""

    def __init__(
        self,
        trade: Trade,
        client: amends.Client,
        journal: Journal,
        errands: Sequence[Errand],
        tally: Tally,
    ) -> None:
        self.news = News()
        self.trade = trade
        self._client = client
        self._journal = journal
        self._errands: Iterator[Errand] = iter(errands)
        self._tally = tally
        self._late = 0
        self._open = anyio.Event()
        self._open.set()

    def pause(self) -> None:
        """Let no client start anything until `go_on`."""
        self._open = anyio.Event()

    def go_on(self) -> None:
        """Let clients start again."""
        self._open.set()

    async def run_client(self) -> None:
        """Run errands, one after another, until there are none."""
        for errand in self._errands:
            await self._open.wait()
            self._tally.started += 1
            self._tally.under_way += 1
            if await self._start(errand):
                if errand.cancel_after_s is not None:
                    await self._cancel(errand, errand.cancel_after_s)
                if errand.is_forgetful:
                    self._tally.left.append(errand.saga_id)
                elif (saga := await self.see_end(errand.saga_id, WAIT_S)) is None:
                    self._tally.left.append(errand.saga_id)
                    self._note_late()
                else:
                    await anyio.sleep(self.trade.rests_s(saga))
            self._tally.under_way -= 1

    async def see_end(self, saga_id: str, timeout_s: float) -> amends.Saga | None:
        """Wait for a saga's end and write it down; None if it does not come in time, or at all."""
        give_up_at_s = time.monotonic() + timeout_s
        while (left_s := give_up_at_s - time.monotonic()) > 0:
            try:
                saga = await self._client.wait(saga_id, timeout_s=left_s)
            except (amends.WaitTimeout, amends.Unavailable, amends.DeadlineExceeded):
                continue
            except amends.NotFound:
                return None  # an acknowledged saga is lost; the auditor will say so
            self._journal.ended(saga_id, saga.state)
            self._tally.ended[saga.state] += 1
            self._count_turn(saga)
            self._tally.faults.update(self.trade.noted(saga))
            self.news.came()
            return saga
        return None

    async def under_way(self) -> tuple[int, int] | None:
        """Say how many sagas have not ended, and how many have; None if nobody can say."""
        try:
            still_open = [saga async for saga in self._client.list(state=OPEN_STATES)]
            sagas = (await self._client.runtime()).sagas
        except amends.ApiError:
            return None
        return len(still_open), sum(sagas.values()) - len(still_open)

    def _note_late(self) -> None:
        self._late += 1
        if self._late >= MANY_LATE:
            raise Stalled(f"{self._late} sagas did not end within {WAIT_S:g} s each")

    async def _start(self, errand: Errand) -> bool:
        """Start it; False if an impatient client never heard that it was."""
        self._journal.starting(errand.saga_id, errand.entry)
        while True:
            try:
                await self._client.start(
                    errand.definition,
                    errand.input,
                    saga_id=errand.saga_id,
                    deadline_s=errand.deadline_s,
                    timeout_s=errand.patience_s or START_TIMEOUT_S,
                )
            except amends.StartUnknown:
                if errand.patience_s is not None:
                    self._tally.faults["impatient start"] += 1
                    return False
            except (amends.Unavailable, amends.DeadlineExceeded, amends.Overloaded):
                if errand.patience_s is not None:
                    # Not in doubt, says the SDK; the auditor will hold it to that.
                    self._journal.refused(errand.saga_id)
                    self._tally.faults["refused start"] += 1
                    return False
            else:
                self._journal.acknowledged(errand.saga_id)
                self.news.came()
                return True

    async def _cancel(self, errand: Errand, after_s: float) -> None:
        await anyio.sleep(after_s)
        # It may be too late, or nobody knows; the saga's end shows which.
        with contextlib.suppress(amends.ApiError):
            await self._client.cancel(errand.saga_id, reason="second thoughts", author="customer")

    def _count_turn(self, saga: amends.Saga) -> None:
        if saga.turn is None:
            return
        if saga.turn.cause is amends.Cause.REJECTED and saga.turn.failure is not None:
            self._tally.faults[f"refused {saga.turn.failure.reason}"] += 1
        else:
            self._tally.faults[f"turned back by {saga.turn.cause}"] += 1
