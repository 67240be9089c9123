"""The read model is a function of the history; this proves it, and makes it anew.

A saga's row was true at the version that it names, and what it shows has not changed since. Both
halves are checked: the fold of the history up to that version gives exactly the row, and the fold
of all of it shows the same state, point of no return and end. So is what is kept beside each turn
for watchers: the fold up to it has that state and that point of no return.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from amends_runtime.core.definition import Plan
from amends_runtime.core.records import SagaStarted, SagaState
from amends_runtime.core.saga import Saga, evolve, fold
from amends_runtime.errors import IllegalRecord, StoreError
from amends_runtime.ports import RegisteredDefinition, SagaSummary, StoredTurn, summarise

__all__ = ["AfterTurn", "Difference", "Rebuildable", "rebuild_read_model", "verify_read_model"]

PAGE = 256  # sagas read at once: bounds what lies in memory

# What may not differ even from a later version: an engine writes the row when one of these changes.
SHOWN = ("state", "past_no_return", "ended_at_ms", "wake_at_ms")


class Difference(msgspec.Struct, frozen=True):
    """One thing in which a saga's row is not what its history says."""

    saga_no: int
    saga_id: str
    field: str
    row: object
    history: object


class AfterTurn(NamedTuple):
    """What is kept beside a turn: the saga after it. State None: the turn is older than that."""

    version: int
    state: SagaState | None
    past_no_return: bool


class Rebuildable(Protocol):
    """What a store offers for this."""

    async def definitions(self) -> list[RegisteredDefinition]:
        """All registered definitions."""
        ...

    async def saga_numbers(self, after_no: int, limit: int) -> list[int]:
        """A page of the numbers of all sagas that have a history or a row, or only one of them."""
        ...

    async def stored(
        self, saga_nos: Sequence[int]
    ) -> tuple[dict[int, tuple[StoredTurn, ...]], dict[int, SagaSummary]]:
        """Histories and read-model rows of these sagas, as of one moment."""
        ...

    async def after_turns(self, saga_nos: Sequence[int]) -> dict[int, tuple[AfterTurn, ...]]:
        """What is kept beside the turns of these sagas, by version."""
        ...

    async def replace_read_model(self, pages: AsyncIterator[Sequence[SagaSummary]]) -> None:
        """The read model becomes these rows, all at once."""
        ...


async def verify_read_model(store: Rebuildable) -> list[Difference]:
    """Everything in which the read model differs from the history.

    May run beside a working runtime.
    """
    plans = await _plans(store)
    found: list[Difference] = []
    async for histories, rows in _pages(store):
        for saga_no in sorted(histories.keys() | rows.keys()):
            found += _compare(plans, saga_no, histories.get(saga_no, ()), rows.get(saga_no))
        for saga_no, kept in (await store.after_turns(sorted(histories))).items():
            turns = {turn.version: turn for turn in histories.get(saga_no, ())}
            found += _compare_turns(plans, saga_no, turns, kept)
    return found


async def rebuild_read_model(store: Rebuildable) -> int:
    """Makes the read model anew from the history, in one transaction; answers how many rows it has.

    Nothing else may commit meanwhile. Raises StoreError, with the read model as it was, where a
    history cannot be read or has no definition.
    """
    plans = await _plans(store)
    count = 0

    async def pages() -> AsyncIterator[Sequence[SagaSummary]]:
        nonlocal count
        async for histories, _ in _pages(store):
            page = [
                summarise(_folded(plans, saga_no, turns), saga_no, turns[-1].version)
                for saga_no, turns in histories.items()
            ]
            count += len(page)
            yield page

    await store.replace_read_model(pages())
    return count


def _compare(
    plans: dict[str, Plan],
    saga_no: int,
    turns: Sequence[StoredTurn],
    row: SagaSummary | None,
) -> Iterator[Difference]:
    saga_id = row.saga_id if row is not None else ""
    try:
        now = summarise(_folded(plans, saga_no, turns), saga_no, turns[-1].version if turns else 0)
        if row is None:
            yield Difference(saga_no, now.saga_id, "row", None, now.state.name)
            return
        then = [turn for turn in turns if turn.version <= row.version]
        written = summarise(_folded(plans, saga_no, then), saga_no, then[-1].version if then else 0)
    except (StoreError, IllegalRecord) as error:
        yield Difference(saga_no, saga_id, "history", None, str(error))
        return
    fields = [field for field in SagaSummary.__struct_fields__ if _differs(row, written, field)]
    fields += [field for field in SHOWN if _differs(row, now, field) and field not in fields]
    for field in fields:
        expected = now if field in SHOWN else written
        yield Difference(saga_no, saga_id, field, getattr(row, field), getattr(expected, field))


def _compare_turns(
    plans: dict[str, Plan],
    saga_no: int,
    turns: dict[int, StoredTurn],
    kept: Sequence[AfterTurn],
) -> Iterator[Difference]:
    """What is wrong beside the turns. A history that cannot be folded is told with its row."""
    begin = turns[1].records[0] if 1 in turns else None
    plan = plans.get(begin.definition_hash) if isinstance(begin, SagaStarted) else None
    saga: Saga | None = None
    for after in kept:
        if plan is None or after.version not in turns:
            return  # or it came after the histories were read, and so did all that follow it
        try:
            for record in turns[after.version].records:
                saga = evolve(plan, saga, record)
        except IllegalRecord:
            return
        assert saga is not None, "a turn has at least one record"
        expected = AfterTurn(after.version, saga.state, saga.past_no_return)
        if after.state is not None and after != expected:
            yield Difference(saga_no, saga.saga_id, "turn", after, expected)


def _differs(row: SagaSummary, other: SagaSummary, field: str) -> bool:
    if field == "wake_at_ms" and row.wake_at_ms == 0:
        return False  # rows of older programs say so of every saga, and it is always allowed
    return bool(getattr(row, field) != getattr(other, field))


def _folded(plans: dict[str, Plan], saga_no: int, turns: Iterable[StoredTurn]) -> Saga:
    records = [record for turn in turns for record in turn.records]
    if not records or not isinstance(records[0], SagaStarted):
        raise StoreError(f"saga no. {saga_no} has no start in its history")
    plan = plans.get(records[0].definition_hash)
    if plan is None:
        raise StoreError(
            f"saga {records[0].saga_id}: its definition {records[0].definition_hash} is not stored"
        )
    saga = fold(plan, records)
    assert saga is not None, "there is at least the start"
    return saga


async def _plans(store: Rebuildable) -> dict[str, Plan]:
    return {
        registered.content_hash: Plan(registered.definition)
        for registered in await store.definitions()
    }


async def _pages(
    store: Rebuildable,
) -> AsyncIterator[tuple[dict[int, tuple[StoredTurn, ...]], dict[int, SagaSummary]]]:
    after_no = 0
    while numbers := await store.saga_numbers(after_no, PAGE):
        yield await store.stored(numbers)
        after_no = numbers[-1]
