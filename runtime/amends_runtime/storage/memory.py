"""The store without a disk: the same contract, for tests and simulations.

What a disk would keep lies in a `MemoryDisk`, which outlives its stores. Opening it again is a
restart: the next epoch, everything that was committed, nothing else. Opening it while another store
has it takes it over, as on a shared disk after a false alarm: the other one's next write raises
OwnershipLost.
"""

from __future__ import annotations

import bisect
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio.lowlevel
import msgspec

from amends_runtime.core.definition import Definition, content_hash
from amends_runtime.core.records import SagaState
from amends_runtime.errors import CommitUnknown, OwnershipLost, StoreError, VersionConflict
from amends_runtime.ports import (
    AuditEntry,
    LoadedSaga,
    OpenSaga,
    OperatorWords,
    ParticipantAddress,
    RegisteredDefinition,
    Resting,
    RestingSaga,
    SagaFilter,
    SagaSummary,
    StoredTurn,
    StoreIdentity,
    Tombstone,
    Transition,
    WatchedTurn,
    WatchedTurns,
    summary_after,
)
from amends_runtime.storage.read_model import AfterTurn

__all__ = ["MemoryDisk", "MemoryStore", "open_memory_store"]

OPEN_STATES = frozenset((SagaState.RUNNING, SagaState.COMPENSATING, SagaState.STUCK))


class FedTurn(msgspec.Struct, frozen=True):
    """A turn's place in the history of all sagas, and what the saga was after it."""

    seq: int
    saga_no: int
    version: int
    state: SagaState
    past_no_return: bool


class MemoryDisk:
    """What survives the death of a process that used a `MemoryStore`."""

    def __init__(self) -> None:
        self.store_id = str(uuid.uuid4())
        self.incarnation = str(uuid.uuid4())
        self.earlier_incarnations: set[str] = set()
        self.restored = False
        self.restored_through_no = 0
        self.epoch = 0
        self.seq = 0
        self.history: dict[int, list[StoredTurn]] = {}
        self.sagas: dict[int, SagaSummary] = {}
        self.saga_nos: dict[str, int] = {}
        self.definitions: dict[str, RegisteredDefinition] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.feed: list[FedTurn] = []  # by position
        self.participants: dict[str, ParticipantAddress] = {}
        self.audit: list[AuditEntry] = []
        self.reopens = True
        self._fault: bool | None = None

    def mark_restored(self) -> None:
        """As if it came from a backup: the next store that opens it is another incarnation."""
        self.earlier_incarnations.add(self.incarnation)
        self.incarnation = str(uuid.uuid4())
        self.restored = True
        self.restored_through_no = max(self.history, default=0)

    def fail_next_commit(self, *, written: bool, reopens: bool = True) -> None:
        """The next commit raises CommitUnknown, and has or has not been written.

        If it is one after which a store reopens itself, it does only if `reopens`.
        """
        self._fault = written
        self.reopens = reopens

    def take_fault(self) -> bool | None:
        """Whether the failing commit is written; None: it does not fail."""
        fault, self._fault = self._fault, None
        return fault


@asynccontextmanager
async def open_memory_store(disk: MemoryDisk | None = None) -> AsyncIterator[MemoryStore]:
    """Opens a disk, by default a new one, for the length of a block."""
    store = MemoryStore(disk or MemoryDisk())
    try:
        yield store
    finally:
        await store.close()


class MemoryStore:
    """A Store on a `MemoryDisk`. Making one begins the disk's next epoch."""

    def __init__(self, disk: MemoryDisk) -> None:
        disk.epoch += 1
        self.disk = disk
        self._identity = StoreIdentity(disk.store_id, disk.incarnation, disk.epoch)
        self._saga_no = max(disk.history, default=0)
        self._encoder = msgspec.msgpack.Encoder()
        self._closed = False
        self._failed = False
        self._lost = anyio.Event()
        self._moved = anyio.Event()  # something was committed, or the store is closed

    # -- what it is ----------------------------------------------------------------------------

    @property
    def identity(self) -> StoreIdentity:
        return self._identity

    @property
    def restored(self) -> bool:
        return self.disk.restored

    @property
    def restored_through_no(self) -> int:
        return self.disk.restored_through_no

    @property
    def unconfirmed_through_no(self) -> int:
        return self.disk.restored_through_no if self.disk.restored else 0

    def believes(self, incarnation: str) -> bool:
        if incarnation == self._identity.incarnation:
            return True
        return not self.restored and incarnation in self.disk.earlier_incarnations

    def next_saga_no(self) -> int:
        self._saga_no += 1
        return self._saga_no

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, transitions: Sequence[Transition]) -> int:
        await anyio.lowlevel.checkpoint()
        self._check_writable()
        if not transitions:
            return self.disk.seq
        conflicts = self._conflicts(transitions)
        if conflicts:
            raise VersionConflict(conflicts)
        for transition in transitions:
            summary = transition.summary
            if summary is not None and summary.definition_hash not in self.disk.definitions:
                raise StoreError(
                    f"saga {summary.saga_id}: its definition {summary.definition_name!r}"
                    f" ({summary.definition_hash}) is not registered in this store;"
                    " nothing was written"
                )
        fault = self.disk.take_fault()
        if fault is not False:
            self._append(transitions)
            self._note_move()
        if fault is not None:
            self._failed = True
            raise CommitUnknown("a commit failed, as planned, and may or may not have happened")
        return self.disk.seq

    async def put_definition(
        self, definition: Definition, now_ms: int
    ) -> tuple[RegisteredDefinition, bool]:
        """Registers a normalised definition; its content becomes the latest of its name."""
        await anyio.lowlevel.checkpoint()
        self._check_writable()
        wanted = content_hash(definition)
        of_name = [
            other
            for other in self.disk.definitions.values()
            if other.definition.name == definition.name
        ]
        activated = 1 + max((d.activated for d in self.disk.definitions.values()), default=0)
        known = self.disk.definitions.get(wanted)
        if known is None:
            version = 1 + max((other.version for other in of_name), default=0)
            registered = RegisteredDefinition(definition, wanted, version, now_ms, activated)
        elif known.activated == max(other.activated for other in of_name):
            return known, True
        else:
            registered = msgspec.structs.replace(known, activated=activated)
        self._write(lambda: self.disk.definitions.update({wanted: registered}))
        return registered, known is not None

    @property
    def lost(self) -> bool:
        """Whether it has failed for good; see `wait_lost`."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Returns never. Raises StoreError once it was planned to fail and not to reopen itself."""
        await self._lost.wait()
        raise StoreError("the store could not be reopened after a failed commit, as planned")

    async def keep_noted(self) -> None:
        """Returns never. Nothing stands beside a memory: `mark_restored` says what a note would."""
        await anyio.sleep_forever()

    async def put_participant(
        self, name: str, address: str, words: OperatorWords, *, tls: bool = False
    ) -> None:
        """Registers a participant by hand, or points it elsewhere; with its audit entry."""
        await anyio.lowlevel.checkpoint()
        self._check_writable()
        if self._is_repeat("put_participant", name, words):
            return
        registered = ParticipantAddress(name, address, by_operator=True, tls=tls)
        self._write(lambda: self._put_participant(registered, words))

    async def remove_participant(self, name: str, words: OperatorWords) -> bool:
        """Takes back what `put_participant` did; with its audit entry. False: there was nothing."""
        await anyio.lowlevel.checkpoint()
        self._check_writable()
        if self._is_repeat("remove_participant", name, words):
            return True
        if name not in self.disk.participants:
            return False
        self._write(lambda: self._remove_participant(name, words))
        return True

    async def confirm_restore(self, words: OperatorWords) -> bool:
        """Takes a restored store for the truth; with its audit entry. False: it is not restored."""
        await anyio.lowlevel.checkpoint()
        self._check_writable()
        if self._is_repeat("confirm_restore", self.disk.incarnation, words):
            return True
        if not self.disk.restored:
            return False
        self._write(lambda: self._confirm_restore(words))
        return True

    def _confirm_restore(self, words: OperatorWords) -> None:
        self.disk.restored = False
        details = f"with what it knows of {', '.join(sorted(self.disk.earlier_incarnations))}"
        self.disk.audit.append(AuditEntry("confirm_restore", self.disk.incarnation, details, words))

    def _is_repeat(self, verb: str, name: str, words: OperatorWords) -> bool:
        return bool(words.request_id) and any(
            (entry.verb, entry.subject, entry.words.request_id) == (verb, name, words.request_id)
            for entry in self.disk.audit
        )

    def _put_participant(self, registered: ParticipantAddress, words: OperatorWords) -> None:
        self.disk.participants[registered.name] = registered
        details = f"at {registered.address}{', with TLS' if registered.tls else ''}"
        self.disk.audit.append(AuditEntry("put_participant", registered.name, details, words))

    def _remove_participant(self, name: str, words: OperatorWords) -> None:
        was = f"was at {self.disk.participants.pop(name).address}"
        self.disk.audit.append(AuditEntry("remove_participant", name, was, words))

    def _write(self, change: Callable[[], None]) -> None:
        """A write after whose failure the store reopens itself, as SQLite's does, if it can."""
        fault = self.disk.take_fault()
        if fault is not False:
            change()
        if fault is not None:
            if not self.disk.reopens:
                self._failed = True
                self._lost.set()
            raise CommitUnknown("a commit failed, as planned, and may or may not have happened")

    def _conflicts(self, transitions: Sequence[Transition]) -> list[int]:
        """The sagas whose transition does not follow what is stored, or whose id is taken."""
        versions: dict[int, int] = {}
        ids: dict[str, int] = {}
        found = set()
        for transition in transitions:
            saga_no = transition.saga_no
            stored = len(self.disk.history.get(saga_no, ()))
            if transition.version != versions.get(saga_no, stored) + 1:
                found.add(saga_no)
            versions[saga_no] = transition.version
            if transition.summary is None:
                assert transition.version > 1, "a saga starts with its summary"
                continue
            saga_id = transition.summary.saga_id
            holder = ids.setdefault(saga_id, self.disk.saga_nos.get(saga_id, saga_no))
            taken = transition.version == 1 and saga_id in self.disk.tombstones
            if holder != saga_no or taken:
                found.add(saga_no)
        return sorted(found)

    def _append(self, transitions: Sequence[Transition]) -> None:
        for transition in transitions:
            self.disk.seq += 1
            turn = StoredTurn(self.disk.seq, transition.version, transition.records)
            self.disk.history.setdefault(transition.saga_no, []).append(turn)
            self.disk.feed.append(
                FedTurn(
                    turn.seq,
                    transition.saga_no,
                    turn.version,
                    transition.state,
                    transition.past_no_return,
                )
            )
            if transition.summary is not None:
                self._put_summary(transition.summary)

    def _put_summary(self, summary: SagaSummary) -> None:
        self.disk.sagas[summary.saga_no] = summary
        self.disk.saga_nos[summary.saga_id] = summary.saga_no

    # -- reading -------------------------------------------------------------------------------

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        await self._check_readable()
        found: dict[str, LoadedSaga | Tombstone] = {}
        for saga_id in saga_ids:
            saga_no = self.disk.saga_nos.get(saga_id)
            if saga_no is not None:
                found[saga_id] = self._loaded(saga_no)
            elif saga_id in self.disk.tombstones:
                found[saga_id] = self.disk.tombstones[saga_id]
        return found

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        await self._check_readable()
        found = sorted(
            OpenSaga(row.saga_no, row.saga_id, row.definition_hash)
            for row in self._open_rows()
            if row.state is state and not row.wake_at_ms and row.saga_no > after_no
        )
        return found[:limit]

    async def resting_sagas(
        self,
        after: RestingSaga | None,
        until_ms: int,
        limit: int,
        updated_after_ms: int = 0,
    ) -> list[RestingSaga]:
        await self._check_readable()
        found = sorted(
            RestingSaga(row.wake_at_ms, row.state, row.saga_no, row.saga_id, row.definition_hash)
            for row in self._open_rows()
            if 0 < row.wake_at_ms <= until_ms and row.updated_at_ms > updated_after_ms
        )
        return found[bisect.bisect(found, after) if after else 0 :][:limit]

    async def count_resting(self) -> Resting:
        await self._check_readable()
        rows = [row for row in self._open_rows() if row.wake_at_ms]
        by_state = dict(Counter(row.state for row in rows))
        return Resting(by_state, max((row.updated_at_ms for row in rows), default=0))

    async def oldest_open_ms(self) -> int | None:
        await self._check_readable()
        return min((row.started_at_ms for row in self._open_rows()), default=None)

    def _open_rows(self) -> list[SagaSummary]:
        return [row for row in self.disk.sagas.values() if row.state in OPEN_STATES]

    async def list_sagas(
        self, where: SagaFilter, limit: int, before_no: int | None = None
    ) -> list[SagaSummary]:
        await self._check_readable()
        found: list[SagaSummary] = []
        for saga_no in sorted(self.disk.sagas, reverse=True):
            if len(found) == limit:
                break
            summary = self.disk.sagas[saga_no]
            if (before_no is None or saga_no < before_no) and _matches(where, summary):
                found.append(summary)
        return found

    async def count_by_state(self) -> dict[SagaState, int]:
        await self._check_readable()
        return dict(Counter(summary.state for summary in self.disk.sagas.values()))

    async def definitions(self) -> list[RegisteredDefinition]:
        await self._check_readable()
        return sorted(
            self.disk.definitions.values(),
            key=lambda registered: (registered.definition.name, registered.version),
        )

    async def participants(self) -> list[ParticipantAddress]:
        await self._check_readable()
        return [registered for _, registered in sorted(self.disk.participants.items())]

    async def audit(self, limit: int) -> list[AuditEntry]:
        await self._check_readable()
        return self.disk.audit[::-1][:limit]

    # -- watching ------------------------------------------------------------------------------

    @property
    def head_seq(self) -> int:
        return self.disk.seq

    async def turns_after(
        self, after_seq: int, where: SagaFilter, *, turns: int, looked_at: int, size: int
    ) -> WatchedTurns:
        await self._check_readable()
        begin = bisect.bisect_right(self.disk.feed, after_seq, key=lambda fed: fed.seq)
        stretch = self.disk.feed[begin : begin + looked_at]
        told: list[WatchedTurn] = []
        last_seq, last_nth, size_before = after_seq, 0, 0
        through_seq, seen = max(self.disk.seq, after_seq), len(stretch)
        if seen == looked_at:
            through_seq = stretch[-1].seq
        for nth, fed in enumerate(stretch, start=1):
            records = self.disk.history[fed.saga_no][fed.version - 1].records
            saga = summary_after(
                self.disk.sagas[fed.saga_no],
                fed.version,
                records,
                fed.state,
                past_no_return=fed.past_no_return,
            )
            if not _matches(where, saga):
                continue
            if len(told) == turns or size_before >= size:
                through_seq, seen = last_seq, last_nth
                break
            size_before += len(self._encoder.encode(records))
            told.append(
                WatchedTurn(
                    fed.seq, saga, records, purged_before=(fed.seq - last_seq) - (nth - last_nth)
                )
            )
            last_seq, last_nth = fed.seq, nth
        purged_after = (through_seq - last_seq) - (seen - last_nth)
        return WatchedTurns(tuple(told), through_seq, self.disk.seq, purged_after)

    async def wait_beyond(self, seq: int) -> None:
        while self.disk.seq <= seq:
            if self._closed:
                raise StoreError("the store is closed")
            await self._moved.wait()

    def _note_move(self) -> None:
        self._moved.set()
        self._moved = anyio.Event()

    # -- the read model, for its proof ---------------------------------------------------------

    async def saga_numbers(self, after_no: int, limit: int) -> list[int]:
        """A page of the numbers of all sagas that have a history or a row, or only one of them."""
        await self._check_readable()
        numbers = self.disk.history.keys() | self.disk.sagas.keys()
        return sorted(saga_no for saga_no in numbers if saga_no > after_no)[:limit]

    async def stored(
        self, saga_nos: Sequence[int]
    ) -> tuple[dict[int, tuple[StoredTurn, ...]], dict[int, SagaSummary]]:
        """Histories and read-model rows of these sagas, as of one moment."""
        await self._check_readable()
        history, sagas = self.disk.history, self.disk.sagas
        return (
            {saga_no: tuple(history[saga_no]) for saga_no in saga_nos if saga_no in history},
            {saga_no: sagas[saga_no] for saga_no in saga_nos if saga_no in sagas},
        )

    async def after_turns(self, saga_nos: Sequence[int]) -> dict[int, tuple[AfterTurn, ...]]:
        """What is kept beside the turns of these sagas, by version."""
        await self._check_readable()
        kept: dict[int, tuple[AfterTurn, ...]] = dict.fromkeys(saga_nos, ())
        for fed in self.disk.feed:
            if fed.saga_no in kept:
                after = AfterTurn(fed.version, fed.state, fed.past_no_return)
                kept[fed.saga_no] = (*kept[fed.saga_no], after)
        return kept

    async def replace_read_model(self, pages: AsyncIterator[Sequence[SagaSummary]]) -> None:
        """The read model becomes these rows, all at once."""
        self._check_writable()
        summaries = [summary async for page in pages for summary in page]
        self.disk.sagas.clear()
        self.disk.saga_nos.clear()
        for summary in summaries:
            self._put_summary(summary)

    def _loaded(self, saga_no: int) -> LoadedSaga:
        summary = self.disk.sagas[saga_no]
        turns = tuple(self.disk.history[saga_no])
        hashed = summary.definition_hash
        return LoadedSaga(saga_no, summary.saga_id, hashed, turns, summary.wake_at_ms)

    # -- opening and closing -------------------------------------------------------------------

    async def reopen(self) -> None:
        self._check_open()
        self._check_epoch()
        self._failed = False

    async def close(self) -> None:
        self._closed = True
        self._note_move()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    def _check_epoch(self) -> None:
        if self.disk.epoch != self._identity.epoch:
            raise OwnershipLost(
                f"the store is at epoch {self.disk.epoch} and this runtime at"
                f" {self._identity.epoch}: another runtime owns it now, and this one writes no more"
            )

    def _check_writable(self) -> None:
        self._check_open()
        if self._failed:
            raise CommitUnknown("an earlier commit failed: the store must be reopened first")
        self._check_epoch()

    async def _check_readable(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check_open()
        if self._failed:
            raise StoreError("a commit failed: the store must be reopened first")


def _matches(where: SagaFilter, summary: SagaSummary) -> bool:
    return (
        (not where.states or summary.state in where.states)
        and where.definition_name in ("", summary.definition_name)
        and summary.started_at_ms >= where.started_from_ms
        and (not where.started_before_ms or summary.started_at_ms < where.started_before_ms)
        and all(summary.labels.get(key) == value for key, value in where.labels.items())
    )
