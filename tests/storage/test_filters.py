"""Lists and watches by any filter, against a brute-force oracle: searched, over both stores."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from amends_runtime.core.definition import Plan, normalise
from amends_runtime.core.records import SagaState
from amends_runtime.ports import (
    SagaFilter,
    SagaSummary,
    Store,
    Transition,
    WatchedTurn,
    summary_after,
)
from amends_runtime.storage import open_memory_store, open_sqlite_store
from tests.storage.samples import NOW_MS, ORDER, PLAN, Played

REFUND = Plan(normalise(msgspec.structs.replace(ORDER, name="refund")))
PLANS = {"order": PLAN, "refund": REFUND}
SPREAD_MS = 20  # starts so close together that bounds fall on them

labels = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["1", "2", ""]), max_size=3)
instants = st.one_of(st.just(0), st.integers(NOW_MS, NOW_MS + SPREAD_MS))


class Born(msgspec.Struct, frozen=True):
    """A saga of the population: its definition, its start, and what is answered to its calls."""

    definition: str
    at_ms: int
    labels: dict[str, str]
    answers: str

    def play(self, saga_no: int) -> Played:
        """All of its turns: d(one), r(ejected), u(nknown), c(ancelled)."""
        played = Played(saga_no, plan=PLANS[self.definition], at_ms=self.at_ms, labels=self.labels)
        verbs = {"d": played.done, "r": played.rejected, "u": played.unknown, "c": played.cancel}
        for answer in self.answers:
            assert played.saga is not None
            if played.saga.ended or (answer != "c" and not played.calls):
                break
            if answer == "c" and played.saga.cancel_requested:
                continue
            # A compensation is never rejected: it would be tried again by a timer, which none has.
            verbs["d" if answer == "r" and played.saga.turn is not None else answer]()
        return played


populations = st.lists(
    st.builds(
        Born,
        definition=st.sampled_from(sorted(PLANS)),
        at_ms=st.integers(NOW_MS, NOW_MS + SPREAD_MS),
        labels=labels,
        answers=st.text("ddrc", max_size=6),
    ),
    min_size=1,
    max_size=12,
)
filters = st.builds(
    SagaFilter,
    states=st.lists(st.sampled_from(SagaState), max_size=4, unique=True).map(
        lambda states: tuple(sorted(states))
    ),
    definition_name=st.sampled_from(["", "", "order", "refund", "other"]),
    started_from_ms=instants,
    started_before_ms=instants,
    labels=labels.map(lambda some: dict(sorted(some.items()))),
)
questions = st.lists(st.tuples(filters, st.integers(1, 5)), min_size=1, max_size=8)


def matches(where: SagaFilter, row: SagaSummary) -> bool:
    """What a filter says, in the words of its documentation."""
    return all(
        (
            not where.states or row.state in where.states,
            where.definition_name in ("", row.definition_name),
            row.started_at_ms >= where.started_from_ms,
            not where.started_before_ms or row.started_at_ms < where.started_before_ms,
            where.labels.items() <= row.labels.items(),
        )
    )


def interleaved(sagas: list[Played]) -> Iterator[list[Transition]]:
    """Batches as an engine would commit them: the next turn of every saga that has one."""
    for version in range(max(len(played.transitions) for played in sagas)):
        yield [p.transitions[version] for p in sagas if version < len(p.transitions)]


async def check(store: Store, population: list[Born], asked: list[tuple[SagaFilter, int]]) -> None:
    """Commits the population, and compares every answer with the oracle's."""
    for plan in PLANS.values():
        await store.put_definition(plan.definition, NOW_MS)
    sagas = [born.play(store.next_saga_no()) for born in population]
    committed: list[Transition] = []
    for batch in interleaved(sagas):
        await store.commit(batch)
        committed += batch
    rows = {
        transition.saga_no: transition.summary
        for transition in committed
        if transition.summary is not None
    }
    fed = [
        WatchedTurn(
            seq,
            summary_after(
                rows[turn.saga_no],
                turn.version,
                turn.records,
                turn.state,
                past_no_return=turn.past_no_return,
            ),
            turn.records,
        )
        for seq, turn in enumerate(committed, start=1)
    ]
    for where, count in asked:
        listed = [row for no, row in sorted(rows.items(), reverse=True) if matches(where, row)]
        assert await store.list_sagas(where, len(rows) + 1) == listed
        paged: list[SagaSummary] = []
        while page := await store.list_sagas(where, count, paged[-1].saga_no if paged else None):
            paged += page
        assert paged == listed
        told: list[WatchedTurn] = []
        through = 0
        while through < store.head_seq:
            stretch = await store.turns_after(
                through, where, turns=count, looked_at=count * 2, size=100 * count
            )
            assert through < stretch.through_seq <= stretch.head_seq == len(committed)
            assert len(stretch.turns) <= count
            assert stretch.purged_after == 0
            told += stretch.turns
            through = stretch.through_seq
        assert told == [turn for turn in fed if matches(where, turn.saga)]


@given(populations, questions)
def test_a_memory_store_answers_as_the_oracle(
    population: list[Born], asked: list[tuple[SagaFilter, int]]
) -> None:
    """Exactly what matches: lists newest first, turns in their order, in pages of any size."""

    async def run() -> None:
        async with open_memory_store() as store:
            await check(store, population, asked)

    anyio.run(run)


@settings(max_examples=max(1, settings().max_examples // 5))  # each one syncs a disk
@given(populations, questions)
def test_an_sqlite_store_answers_as_the_oracle(
    population: list[Born], asked: list[tuple[SagaFilter, int]]
) -> None:
    """The same of the SQL, whichever of its queries answers."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with open_sqlite_store(Path(folder) / "amends.db") as store:
                await check(store, population, asked)

    anyio.run(run)
