"""A runtime that lets every saga leave at once makes the histories of one that keeps them all."""

from __future__ import annotations

import anyio
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from amends_runtime.actors.supervisor import Limits, StartRequest
from amends_runtime.core.definition import Definition, Kind, Mode, RetryPolicy, Step, TwoPhase
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Unknown,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Record
from amends_runtime.errors import Refusal
from amends_runtime.ports import Call, LoadedSaga, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.storage.read_model import verify_read_model
from amends_runtime.testing.virtual_time import START_MS
from tests.actors.virtual import Shop, a_runtime, in_virtual_time

POLICY = RetryPolicy(first_ms=50, max_ms=120_000, give_up_after_ms=600_000)

OUTCOMES = st.one_of(
    st.just(Done()),
    st.just(Unknown("UNAVAILABLE")),
    st.just(Rejected("no")),
    st.just(Broken("B")),
    st.builds(InProgress, st.sampled_from([1, 500, 20_000, 90_000])),
)
SCRIPTS = st.lists(OUTCOMES, max_size=12)

FLOW = Definition(
    name="flow",
    steps=tuple(
        Step(name=name, participant="shop", action="do", after=after, retry=POLICY, kind=kind)
        for name, after, kind in (
            ("a", (), Kind.COMPENSATABLE),
            ("b", (), Kind.COMPENSATABLE),
            ("c", ("a", "b"), Kind.PIVOT),
            ("d", ("c",), Kind.RETRIABLE),
        )
    ),
)

VOTES = st.one_of(
    OUTCOMES,
    st.sampled_from([Done(), Rejected("LOCKED"), Heuristic(True, "h"), Heuristic(False, "h")]),
)
BRANCHES = ("a", "b", "c")


def a_commit(*, ordered: bool) -> Definition:
    """A two-phase commit whose branches may be tried twice more, and are told for minutes."""
    return Definition(
        name="flow",
        mode=Mode.TWO_PHASE_COMMIT,
        two_phase=TwoPhase(ordered=ordered, locked_retries=2),
        steps=tuple(
            Step(
                name=name,
                participant="shop",
                action="do",
                retry=POLICY,
                compensation_retry=POLICY,
            )
            for name in BRANCHES
        ),
    )


WORDS = st.sampled_from(["cancel", "retry", "abandon", "look", "wait"])
SAID = st.lists(st.tuples(st.integers(0, 900), WORDS), max_size=4)


class Scripted(Shop):
    """Answers each step's calls in order, and Done to all that follow."""

    def __init__(self, scripts: list[list[Outcome]]) -> None:
        super().__init__()
        self._scripts = [list(script) for script in scripts]

    async def call(self, call: Call) -> Reply:
        """Answers a moment later."""
        await anyio.sleep(0.003 * (call.step + 1))
        script = self._scripts[call.step]
        outcome = script.pop(0) if script else Done()
        rolled_back = call.verb.name == "COMPENSATE" and not call.two_phase
        if rolled_back and isinstance(outcome, Rejected):
            outcome = Done()
        return Reply(outcome, "OK", healthy=True)


def histories(
    scripts: list[list[Outcome]],
    said: list[tuple[int, str]],
    deadline_ms: int,
    park_after_ms: int,
    definition: Definition = FLOW,
) -> list[Record]:
    """What a saga comes to by these answers and these words, so many seconds after its start."""
    disk = MemoryDisk()
    found: list[Record] = []

    async def main() -> None:
        store = MemoryStore(disk)
        limits = Limits(park_after_ms=park_after_ms)
        async with a_runtime(store, Scripted(scripts), limits=limits) as engine:
            await engine.definitions.register(definition)
            supervisor = engine.supervisor
            await supervisor.start_saga(
                StartRequest(
                    saga_id="s",
                    definition_name="flow",
                    content_hash="c",
                    input=Payload(b""),
                    deadline_ms=deadline_ms,
                )
            )
            began_s = anyio.current_time()
            for at_s, word in sorted(said):
                await anyio.sleep(max(0, began_s + at_s + 0.7 - anyio.current_time()))
                try:
                    if word == "cancel":
                        await supervisor.cancel_saga("s", "ann", "why not")
                    elif word == "retry":
                        await supervisor.retry_saga("s", None, "ann", "why not")
                    elif word == "abandon":
                        await supervisor.abandon_saga("s", "ann", "why not")
                    elif word == "look":
                        await supervisor.view("s")
                    else:
                        await supervisor.wait("s", 0.1)
                except Refusal:
                    continue
            await anyio.sleep(3_000)
            counts = supervisor.counts()
            assert counts.without_wake_up == 0
            assert park_after_ms or not counts.live
        assert await verify_read_model(store) == []
        loaded = (await MemoryStore(disk).load(["s"]))["s"]
        assert isinstance(loaded, LoadedSaga)
        found.extend(record for turn in loaded.turns for record in turn.records)

    in_virtual_time(main)
    return found


@settings(max_examples=settings().max_examples * 2 // 5, deadline=None)
@given(
    st.lists(SCRIPTS, min_size=4, max_size=4),
    SAID,
    st.sampled_from([0, 1_000, 60_000, 3_600_000]),
)
def test_parking_changes_nothing(
    scripts: list[list[Outcome]], said: list[tuple[int, str]], deadline_ms: int
) -> None:
    """The same answers at the same times make the same records, in the same order of each step."""
    never = histories(scripts, said, deadline_ms, park_after_ms=10**12)
    always = histories(scripts, said, deadline_ms, park_after_ms=0)
    assert without_instants(always) == without_instants(never)


@settings(max_examples=settings().max_examples * 2 // 5, deadline=None)
@given(
    st.lists(st.lists(VOTES, max_size=12), min_size=3, max_size=3),
    SAID,
    st.sampled_from([0, 1_000, 60_000, 3_600_000]),
    st.booleans(),
)
def test_parking_changes_nothing_of_a_two_phase_commit(
    scripts: list[list[Outcome]],
    said: list[tuple[int, str]],
    deadline_ms: int,
    ordered: bool,  # noqa: FBT001  # drawn
) -> None:
    """Votes in progress, rounds that wait for a lock, branches that do not acknowledge for long."""
    definition = a_commit(ordered=ordered)
    never = histories(scripts, said, deadline_ms, 10**12, definition)
    always = histories(scripts, said, deadline_ms, 0, definition)
    assert without_instants(always) == without_instants(never)


def without_instants(records: list[Record]) -> list[object]:
    """The records as plain lists, with 0 for each instant: all that is no earlier than the start.

    What comes back from rest may be asked a millisecond later. So of branches that are answered at
    the same instant either may be the first: the order is that of each step's records.
    """

    def step_of(record: Record) -> int:
        step = getattr(record, "step", None)
        return -1 if step is None else step

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return 0 if isinstance(value, int) and value >= START_MS else value

    by_step = sorted(records, key=step_of)
    return [plain(msgspec.to_builtins(record, builtin_types=(bytes,))) for record in by_step]
