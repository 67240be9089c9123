"""What the engine needs of the world around it, as small Protocols.

    Store           the durable truth: whole batches of transitions, under compare-and-set and epoch
    Insights        the same truth, for readers that must not write
    Transport       one participant's endpoint: calls out, outcomes in; a Caller: one at a time
    Clock           wall time and monotonic time
    Observer        told of what became durable and of what went on the wire; can change nothing

Implementations live in `storage/`, `dispatch/`, `telemetry/`; they know this file and not each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec
from anyio.abc import TaskGroup

from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import Definition, Plan
from amends_runtime.core.messages import Outcome
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    CommitDecision,
    Record,
    SagaState,
    SagaTurnedBack,
    Verb,
)
from amends_runtime.core.saga import Saga
from amends_runtime.core.waking import kept_wake_ms

__all__ = [
    "AuditEntry",
    "Call",
    "Caller",
    "Clock",
    "Insights",
    "LoadedSaga",
    "Observer",
    "OpenSaga",
    "OperatorWords",
    "ParticipantAddress",
    "RegisteredDefinition",
    "Reply",
    "Resting",
    "RestingSaga",
    "SagaFilter",
    "SagaSummary",
    "Store",
    "StoreIdentity",
    "StoredTurn",
    "Tombstone",
    "Transition",
    "Transport",
    "WatchedTurn",
    "WatchedTurns",
    "summarise",
    "summary_after",
]


# -- the store -------------------------------------------------------------------------------------


ENDED_STATES = frozenset(
    (SagaState.COMPLETED, SagaState.COMPENSATED, SagaState.ABANDONED, SagaState.MIXED)
)


class StoreIdentity(msgspec.Struct, frozen=True):
    """Which store this is.

    `epoch` grows with every opening; `incarnation` changes with a restore.
    """

    store_id: str
    incarnation: str
    epoch: int


class SagaSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A saga's row in the read model: what lists show. No payloads, nothing per step.

    `wake_at_ms` is until when it rests, see `core.waking`; 0: it is to be brought in at a restart.
    """

    saga_no: int
    saga_id: str
    definition_name: str
    definition_hash: str
    state: SagaState
    version: int
    started_at_ms: int
    updated_at_ms: int
    ended_at_ms: int = 0
    deadline_at_ms: int = 0
    wake_at_ms: int = 0
    past_no_return: bool = False
    labels: dict[str, str] = {}


def summarise(saga: Saga, saga_no: int, version: int) -> SagaSummary:
    """The row that lists show of this saga.

    The read model is this function of every saga's history.
    """
    return SagaSummary(
        saga_no=saga_no,
        saga_id=saga.saga_id,
        definition_name=saga.definition_name,
        definition_hash=saga.definition_hash,
        state=saga.state,
        version=version,
        started_at_ms=saga.started_at_ms,
        updated_at_ms=saga.updated_at_ms,
        ended_at_ms=saga.ended_at_ms,
        deadline_at_ms=saga.deadline_at_ms,
        wake_at_ms=kept_wake_ms(saga),
        past_no_return=saga.past_no_return,
        labels=saga.labels,
    )


def summary_after(
    row: SagaSummary,
    version: int,
    records: Sequence[Record],
    state: SagaState,
    *,
    past_no_return: bool,
) -> SagaSummary:
    """A saga's row as it was after an earlier turn; what follows it are the turn's own facts."""
    ended = state in ENDED_STATES
    return msgspec.structs.replace(
        row,
        version=version,
        state=state,
        past_no_return=past_no_return,
        updated_at_ms=records[-1].at_ms if records else row.updated_at_ms,
        ended_at_ms=row.ended_at_ms if ended else 0,
    )


class Transition(msgspec.Struct, frozen=True, gc=False):
    """One saga's turn: records to append, and the read-model row if what it shows changed.

    `version` is the version that the turn makes, from 1; `version - 1` must be the stored one.
    `state` and `past_no_return` are the saga's after the turn: stored with it, so that whoever
    watches sees what was so then. The first transition of a saga always carries its summary.
    """

    saga_no: int
    version: int
    records: tuple[Record, ...]
    state: SagaState
    past_no_return: bool
    summary: SagaSummary | None = None


class StoredTurn(msgspec.Struct, frozen=True):
    """One turn as it was persisted. `seq` is its position in the history of all sagas."""

    seq: int
    version: int
    records: tuple[Record, ...]


class LoadedSaga(msgspec.Struct, frozen=True):
    """A saga's whole history, oldest turn first, and its row's `wake_at_ms`."""

    saga_no: int
    saga_id: str
    definition_hash: str
    turns: tuple[StoredTurn, ...]
    wake_at_ms: int = 0

    @property
    def version(self) -> int:
        """The version that the next transition follows."""
        return self.turns[-1].version


class WatchedTurn(msgspec.Struct, frozen=True):
    """One turn as a watcher is told of it.

    `saga` is its row as it was after this turn. `records` are empty where the row is damaged.
    `purged_before` counts the turns that are gone from between the one before it in the answer (or
    the question's position) and this one.
    """

    seq: int
    saga: SagaSummary
    records: tuple[Record, ...]
    purged_before: int = 0


class WatchedTurns(msgspec.Struct, frozen=True):
    """A stretch of the history of all sagas, and what in it was asked for.

    Everything up to `through_seq` was looked at, which is where the next question begins;
    `head_seq` is the last that is committed. `purged_after` counts the turns that are gone from
    between the last one of `turns` (or the question's position) and `through_seq`.
    """

    turns: tuple[WatchedTurn, ...]
    through_seq: int
    head_seq: int
    purged_after: int = 0


class OpenSaga(NamedTuple):
    """A saga that has not ended, by name and definition: what it is stands in its history."""

    saga_no: int
    saga_id: str
    definition_hash: str


class RestingSaga(NamedTuple):
    """A saga that has not ended and rests up to an instant, by name, and where it stands in order.

    Pages of them are read by the first three fields.
    """

    wake_at_ms: int
    state: SagaState
    saga_no: int
    saga_id: str
    definition_hash: str


class Resting(msgspec.Struct, frozen=True):
    """How many sagas rest, by state, and when the row that was written last was written."""

    by_state: dict[SagaState, int]
    updated_at_ms: int


class Tombstone(msgspec.Struct, frozen=True):
    """What is left of a purged saga, so that its id is never used again.

    `decision` and `round` are those of a two-phase commit's last round, else None and 0: a
    participant may still ask.
    """

    saga_id: str
    content_hash: str
    state: SagaState
    ended_at_ms: int
    decision: CommitDecision | None = None
    round: int = 0


class RegisteredDefinition(msgspec.Struct, frozen=True):
    """A definition as it was registered. `version` counts the contents of one name, from 1.

    `activated` orders the contents of a name by when each last became the one that new sagas get:
    the highest is it. Registering an older content again raises it, and keeps its version.
    """

    definition: Definition
    content_hash: str
    version: int
    registered_at_ms: int
    activated: int = 0


class ParticipantAddress(msgspec.Struct, frozen=True):
    """Where a participant is called.

    `by_operator`: registered at run time, not by configuration. `tls`: it is called with TLS, and
    never in plain text, whether its TLS files are there or not.
    """

    name: str
    address: str
    by_operator: bool = False
    tls: bool = False


class OperatorWords(msgspec.Struct, frozen=True):
    """Who did something by hand, why, and when (UTC milliseconds).

    `request_id` is a client's own id of the request, so that a repeat does nothing; empty: none.
    """

    author: str
    reason: str
    at_ms: int
    request_id: str = ""


class AuditEntry(msgspec.Struct, frozen=True):
    """Something that an operator did and that is no saga's history.

    `verb` is what was done, `subject` to what, `details` are the rest of it, in words.
    """

    verb: str
    subject: str
    details: str
    words: OperatorWords


class SagaFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Conditions that must all hold; an empty one holds always. Instants are UTC milliseconds."""

    states: tuple[SagaState, ...] = ()
    definition_name: str = ""
    started_from_ms: int = 0
    started_before_ms: int = 0
    labels: dict[str, str] = {}


class Insights(Protocol):
    """The store, for reading.

    Every answer includes every commit that was acknowledged before the question.
    """

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        """The histories of these sagas, or their tombstones.

        An unknown id is absent from the answer.
        """
        ...

    async def list_sagas(
        self, where: SagaFilter, limit: int, before_no: int | None = None
    ) -> list[SagaSummary]:
        """Matching sagas, newest (highest number) first, below `before_no`."""
        ...

    async def count_by_state(self) -> dict[SagaState, int]:
        """How many sagas the read model has in each state."""
        ...

    async def oldest_open_ms(self) -> int | None:
        """When the oldest saga that has not ended was started; None if there is none."""
        ...

    async def definitions(self) -> list[RegisteredDefinition]:
        """All registered definitions, by name and version."""
        ...

    async def participants(self) -> list[ParticipantAddress]:
        """The participants that an operator registered, by name."""
        ...

    async def audit(self, limit: int) -> list[AuditEntry]:
        """What operators did that is no saga's history, newest first."""
        ...

    @property
    def restored(self) -> bool:
        """Whether it came from a backup or from elsewhere, and no operator has confirmed it."""
        ...

    @property
    def restored_through_no(self) -> int:
        """The number of the last saga from before the last restore, confirmed or not; 0: none."""
        ...

    @property
    def unconfirmed_through_no(self) -> int:
        """The number of the last saga from before a restore that nobody has confirmed.

        0: there was no restore, or it is confirmed. Where a saga stands up to that number is what
        the backup knows; it may have been decided otherwise since.
        """
        ...

    def believes(self, incarnation: str) -> bool:
        """Whether this store answers for what was asked under `incarnation`.

        It does for its own; for those before it once an operator has confirmed the restore; never
        for any other, which another copy of it had.
        """
        ...

    @property
    def head_seq(self) -> int:
        """The position of the last turn that was committed here; 0 before the first."""
        ...

    async def turns_after(
        self, after_seq: int, where: SagaFilter, *, turns: int, looked_at: int, size: int
    ) -> WatchedTurns:
        """Turns of matching sagas above `after_seq`, in the order in which they were committed.

        At most so many `turns`, of at most so many `looked_at`, and about so many bytes of records
        (`size`): one turn always fits. The states of `where` are compared with the saga's after the
        turn. There is one writer, and a batch has its positions when its transaction begins: so
        whoever sees a turn sees all turns before it, or never will.
        """
        ...

    async def wait_beyond(self, seq: int) -> None:
        """Until `head_seq` is above `seq`. Raises StoreError when the store is closed."""
        ...


class Store(Insights, Protocol):
    """The durable truth, with one writer.

    Every write is one transaction with one sync and checks the epoch. A write is never cancelled
    half-way: a cancelled caller gets its cancellation after the transaction has ended.
    """

    @property
    def identity(self) -> StoreIdentity:
        """Which store this is, as of its opening."""
        ...

    def next_saga_no(self) -> int:
        """A number that no saga of this store has had."""
        ...

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Appends all of the transitions, or none; answers the highest `seq` after the sync.

        Raises VersionConflict (naming all sagas concerned; nothing written), OwnershipLost, or
        CommitUnknown, after which only `reopen` and `close` may be called.
        """
        ...

    async def wait_lost(self) -> None:
        """Returns never. Raises StoreError once it has failed and could not reopen itself."""
        ...

    async def keep_noted(self) -> None:
        """Returns never. Keeps a note, beside the store, of how far its history goes.

        So that an earlier copy in its place is known for one at the next opening.
        """
        ...

    async def reopen(self) -> None:
        """After CommitUnknown.

        Closes, opens anew, checkpoints with truncation. Raises StoreError if it cannot.
        """
        ...

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        """Sagas in this state that have not ended and do not rest, by their rows.

        Lowest number first, above `after_no`.
        """
        ...

    async def resting_sagas(
        self,
        after: RestingSaga | None,
        until_ms: int,
        limit: int,
        updated_after_ms: int = 0,
    ) -> list[RestingSaga]:
        """Sagas that rest at most until `until_ms`, by their rows: earliest first, after `after`.

        Only those whose row was written after `updated_after_ms`.
        """
        ...

    async def count_resting(self) -> Resting:
        """What rests, by the rows; those that only a person moves among them."""
        ...

    async def put_definition(
        self, definition: Definition, now_ms: int
    ) -> tuple[RegisteredDefinition, bool]:
        """Registers a normalised definition.

        The answer's second part: this content was there before.
        """
        ...

    async def put_participant(
        self, name: str, address: str, words: OperatorWords, *, tls: bool = False
    ) -> None:
        """Registers a participant by hand, or points it elsewhere; with its audit entry.

        The same request for it once more (`words.request_id`) changes nothing, whatever happened
        in between.
        """
        ...

    async def remove_participant(self, name: str, words: OperatorWords) -> bool:
        """Takes back what `put_participant` did; with its audit entry. False: there was nothing.

        The same request for it once more changes nothing and answers True.
        """
        ...

    async def confirm_restore(self, words: OperatorWords) -> bool:
        """Takes a restored store for the truth; with its audit entry. False: it is not restored.

        The same request once more changes nothing and answers True.
        """
        ...

    async def close(self) -> None:
        """Ends everything in order; afterwards another runtime may open the store."""
        ...


# -- participants ----------------------------------------------------------------------------------


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt as it goes on the wire. `results` are (step name, result) pairs.

    `two_phase`: it belongs to a two-phase commit. `executed` is for Compensate: the step's Done is
    recorded, in a two-phase commit its yes vote.
    """

    saga_id: str
    definition_name: str
    step: int
    step_name: str
    participant: str
    action: str
    verb: Verb
    round: int
    attempt: int
    timeout_ms: int
    input: Payload
    results: tuple[tuple[str, Payload], ...] = ()
    executed: bool = False
    own_result: Payload | None = None
    turn: SagaTurnedBack | None = None
    turn_step_name: str = ""
    traceparent: str = ""
    poll: bool = False
    two_phase: bool = False


class Reply(msgspec.Struct, frozen=True):
    """What came back of one attempt.

    `healthy` is what it says of the endpoint: True (it answered), False (it is unwell), None
    (nothing). `away` says that there was no connection to it: not that the call never arrived, for
    one may have broken meanwhile, but that nobody is there now.
    """

    outcome: Outcome
    status: str
    healthy: bool | None
    away: bool = False


class Transport(Protocol):
    """One participant's endpoint, to which many calls go at once."""

    @property
    def name(self) -> str:
        """What it is, for people, as the participant turns out to have it; empty until then."""
        ...

    @property
    def limit(self) -> int | None:
        """How many calls the participant has said that it takes at once; None: it has not."""
        ...

    @property
    def room(self) -> int:
        """How many further calls it takes now; who has more keeps them."""
        ...

    def open(self, tasks: TaskGroup, room_changed: Callable[[], None]) -> None:
        """Comes first, once: its tasks live in `tasks`. Nothing is connected yet.

        `room_changed` is called when there may be more room, or another limit, but not after each
        answer, which makes room, too.
        """
        ...

    def send(self, call: Call, answer: Callable[[Reply | None], None]) -> None:
        """Sends one attempt, if there is room for it.

        `answer` is called once, never from inside `send`, at most `call.timeout_ms` from now; not
        any more once the transport was closed. None gives the call back: it was never sent. Raises
        nothing.
        """
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


@runtime_checkable
class Caller(Protocol):
    """One participant's endpoint, to which calls go one by one; `OneByOne` makes it a Transport."""

    name: str

    async def call(self, call: Call) -> Reply:
        """Sends one attempt and waits for its end, at most `call.timeout_ms`.

        Raises nothing but cancellation.
        """
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


# -- time and onlookers ----------------------------------------------------------------------------


class Clock(Protocol):
    """Wall time for records, monotonic time for waits."""

    def now_ms(self) -> int:
        """UTC milliseconds."""
        ...

    def now_us(self) -> int:
        """The same instant in microseconds, for how long calls take."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never jump."""
        ...


class Observer(Protocol):
    """Told of what happened; must not block, must not raise, can change nothing."""

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """These records are durable.

        The saga was `before`, None at its start, and is `saga` now.
        """
        ...

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """One commit of so many transitions took so long, sync included."""
        ...

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """A participant's breaker is in another state now."""
        ...
