"""The store of one runtime process: the real one in memory, over a disk that outlives it.

It takes time, fails as a store may fail, and is where a process dies before a commit or with its
answer on the lips. A dead process reaches nothing here: its calls wait for ever, and the world
cancels whoever waits.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from amends_runtime.core.definition import Definition
from amends_runtime.core.records import SagaState
from amends_runtime.errors import CommitUnknown, StoreError
from amends_runtime.ports import (
    LoadedSaga,
    OpenSaga,
    OperatorWords,
    ParticipantAddress,
    RegisteredDefinition,
    Resting,
    RestingSaga,
    SagaFilter,
    SagaSummary,
    StoreIdentity,
    Tombstone,
    Transition,
)
from amends_runtime.storage.memory import MemoryStore
from tests.simulation.faults import Fault
from tests.simulation.trace import ShownTransitions

if TYPE_CHECKING:
    from tests.simulation.runtime import Process

__all__ = ["Store"]

T = TypeVar("T")

COMMIT_S = (0.0002, 0.004)  # before the write and after it: a sync on a good disk
SLOW_COMMIT_S = (0.05, 1.0)
READ_S = (0.0001, 0.002)


class Store:
    """What a process has of the disk."""

    def __init__(self, process: Process, inner: MemoryStore) -> None:
        self.inner = inner
        self.commits = 0  # that this process has seen succeed
        self.lost_at_s: float | None = None  # when it could not be reopened after a lone write
        self._told_at_s: dict[tuple[int, int], float] = {}  # by saga and version; inf: not yet
        self._process = process
        self._world = process.world

    @property
    def identity(self) -> StoreIdentity:
        """As of the opening."""
        return self.inner.identity

    def next_saga_no(self) -> int:
        """From memory: no fault can be here."""
        return self.inner.next_saga_no()

    # -- writing ---------------------------------------------------------------------------------

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commit turns."""
        shown = ShownTransitions(transitions)
        turns = [(transition.saga_no, transition.version) for transition in transitions]
        self._told_at_s.update(dict.fromkeys(turns, math.inf))
        seq = await self._write(lambda: self.inner.commit(transitions), shown)
        self._told_at_s.update(dict.fromkeys(turns, self._world.now_s()))
        self.commits += 1
        return seq

    async def put_participant(
        self, name: str, address: str, words: OperatorWords, *, tls: bool = False
    ) -> None:
        """Register a participant by hand."""
        await self._write(
            lambda: self.inner.put_participant(name, address, words, tls=tls),
            f"{name} at {address}",
            alone=True,
        )

    async def remove_participant(self, name: str, words: OperatorWords) -> bool:
        """Take that back."""
        return await self._write(
            lambda: self.inner.remove_participant(name, words),
            f"{name} where it is configured",
            alone=True,
        )

    async def put_definition(
        self, definition: Definition, now_ms: int
    ) -> tuple[RegisteredDefinition, bool]:
        """Register a definition."""
        return await self._write(
            lambda: self.inner.put_definition(definition, now_ms),
            f"definition {definition.name}",
            alone=True,
        )

    async def _write(
        self, write: Callable[[], Awaitable[T]], what: object, *, alone: bool = False
    ) -> T:
        """Write, or fail, or die: before, after the write, or after the answer.

        After a failed write of its own, which is no turn's, a store reopens itself or is lost.
        """
        process, faults = self._process, self._world.faults
        await process.wait_if_dead()
        self._die_if(Fault.CRASH_BEFORE_COMMIT)
        low, high = COMMIT_S
        if faults.strikes(Fault.SLOW_COMMIT, process.name):
            low, high = SLOW_COMMIT_S
        await self._takes(faults.between(low, high))
        written = faults.strikes(Fault.COMMIT_FAILED_WRITTEN, process.name)
        if written or faults.strikes(Fault.COMMIT_FAILED, process.name):
            loses = alone and faults.strikes(Fault.STORE_LOST, process.name)
            self.inner.disk.fail_next_commit(written=written, reopens=not loses)
        try:
            answer = await write()
        except CommitUnknown:
            if self.inner.lost:
                self.lost_at_s = self._world.now_s()
            if written:
                self._world.wrote(process, what)
            await self._takes(faults.between(*COMMIT_S))
            raise
        finally:
            self.inner.disk.take_fault()  # one that refused before it could strike
        self._world.wrote(process, what)
        self._die_if(Fault.CRASH_AFTER_WRITE)
        await self._takes(faults.between(low, high))
        return answer

    async def reopen(self) -> None:
        """Reopen, unless that fails, too: then the process ends."""
        await self._takes(self._world.faults.between(*COMMIT_S))
        if self._world.faults.strikes(Fault.REOPEN_FAILED, self._process.name):
            raise StoreError("the store could not be reopened, as planned")
        await self.inner.reopen()
        now_s = self._world.now_s()
        for turn, at_s in self._told_at_s.items():
            if at_s == math.inf:
                self._told_at_s[turn] = now_s

    def knows(self, saga_no: int, version: int) -> bool:
        """Whether this process has had the time to act on a turn that is on the disk.

        Not while the turn's own commit has no answer, nor at that answer's very instant: what was
        taken from a queue before may leave then. One that was replaced knows nothing more.
        """
        if self.inner.disk.epoch != self.identity.epoch:
            return False
        return self._told_at_s.get((saga_no, version), -1.0) < self._world.now_s()

    def went_on(self, paused_at_s: float) -> None:
        """The process was paused: what it was told at that instant it acts upon now."""
        now_s = self._world.now_s()
        for turn, at_s in self._told_at_s.items():
            if at_s == paused_at_s:
                self._told_at_s[turn] = now_s
        if self.lost_at_s is not None:
            self.lost_at_s = now_s

    async def close(self) -> None:
        """A simulated process never ends in order."""

    # -- reading ---------------------------------------------------------------------------------

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        """Histories, as of some instant between question and answer."""
        return await self._read(self.inner.load, saga_ids)

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        """A page of recovery."""
        return await self._read(self.inner.open_sagas, state, after_no, limit)

    async def resting_sagas(
        self, after: RestingSaga | None, until_ms: int, limit: int, updated_after_ms: int = 0
    ) -> list[RestingSaga]:
        """A page of those that the horizon comes to."""
        return await self._read(self.inner.resting_sagas, after, until_ms, limit, updated_after_ms)

    async def count_resting(self) -> Resting:
        """How many rest."""
        return await self._read(self.inner.count_resting)

    async def list_sagas(
        self, where: SagaFilter, limit: int, before_no: int | None = None
    ) -> list[SagaSummary]:
        """A page of a list."""
        return await self._read(self.inner.list_sagas, where, limit, before_no)

    async def count_by_state(self) -> dict[SagaState, int]:
        """How many sagas are in each state."""
        return await self._read(self.inner.count_by_state)

    async def oldest_open_ms(self) -> int | None:
        """Since when there have been open sagas."""
        return await self._read(self.inner.oldest_open_ms)

    async def participants(self) -> list[ParticipantAddress]:
        """Those that operators registered; asked at the start, and after a failed change."""
        await self._process.wait_if_dead()
        return await self.inner.participants()

    async def definitions(self) -> list[RegisteredDefinition]:
        """All definitions; asked at the start, before anything can be told to wait."""
        await self._process.wait_if_dead()
        return await self.inner.definitions()

    def __getattr__(self, name: str) -> Any:
        """What a newer port asks for and the simulation has no fault for, the store answers."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    async def _read(self, read: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        faults = self._world.faults
        await self._takes(faults.between(*READ_S))
        if self._process.number > 1 and not self.commits:
            self._die_if(Fault.CRASH_IN_RECOVERY)
            await self._process.wait_if_dead()
        if faults.strikes(Fault.READ_FAILED, self._process.name):
            raise StoreError("a read failed, as planned")
        answer = await read(*arguments)
        await self._takes(faults.between(*READ_S))
        return answer

    # -- time and death --------------------------------------------------------------------------

    async def _takes(self, seconds: float) -> None:
        await self._process.wait_if_dead()
        await anyio.sleep(seconds)
        await self._process.wait_if_dead()

    def _die_if(self, fault: Fault) -> None:
        if not self._process.is_dead and self._world.faults.strikes(fault, self._process.name):
            self._process.die()
