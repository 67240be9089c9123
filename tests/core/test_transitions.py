"""The tables of transitions are true: what is drawn in the documents is what sagas do."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import settings

from amends_runtime.core import saga, two_phase
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import Heuristic, Message, Outcome
from amends_runtime.core.records import (
    DecisionMade,
    HeuristicReported,
    Record,
    RoundPlanned,
    SagaState,
    SagaTurnedBack,
    StepPrepared,
    StepRejected,
    VoteRefused,
)
from tests.core.definitions import Choose, make_plan, make_two_phase_plan
from tests.core.two_phase_world import VotingWorld
from tests.core.world import World

Table = Mapping[SagaState, Sequence[SagaState]]
Make = Callable[[Choose], World]

ONLY_VOTES: tuple[type, ...] = (
    StepPrepared,
    VoteRefused,
    DecisionMade,
    HeuristicReported,
    RoundPlanned,
    Heuristic,
)
ONLY_SAGAS: tuple[type, ...] = (StepRejected, SagaTurnedBack)


def in_saga_mode(choose: Choose) -> World:
    """A saga in a hostile world."""
    plan: Plan = make_plan(choose)
    return World(plan, choose, choose([0, 0, 1, 300, 60_000]))


def in_two_phases(choose: Choose) -> World:
    """A two-phase commit in a hostile world."""
    plan: Plan = make_two_phase_plan(choose)
    return VotingWorld(plan, choose, choose([0, 300, 60_000, 60_000]))


@pytest.mark.parametrize(
    ("transitions", "make", "others"),
    [
        (saga.TRANSITIONS, in_saga_mode, ONLY_VOTES),
        (two_phase.TRANSITIONS, in_two_phases, ONLY_SAGAS),
    ],
    ids=["saga", "two-phase commit"],
)
def test_random_worlds_show_the_whole_table_and_nothing_else(
    transitions: Table, make: Make, others: tuple[type, ...], pytestconfig: pytest.Config
) -> None:
    """Of a thousand sagas, all changes of state are in the table, and all of the table is seen.

    The state is looked at after each record, so that STUCK may follow RUNNING and give way to it
    within one turn: one branch is stuck, and the next step of another has not been started yet. The
    worlds are hostile enough: every kind of message and record occurs in them, but for what only
    the other mode has.
    """
    seed = str(pytestconfig.option.hypothesis_seed)
    seen: Counter[object] = Counter()
    for number in range(10 * settings().max_examples):
        world = random_world(f"{seed}/{number}", make)
        seen.update(world.transitions)
        seen.update(type(message) for message, _ in world.told)
        seen.update(type(record) for record in world.records)
        seen.update(type(getattr(message, "outcome", None)) for message, _ in world.told)
    changes = {change for change in seen if isinstance(change, tuple)}
    assert changes == {(before, after) for before in transitions for after in transitions[before]}
    wanted = {*Message.__args__, *Record.__args__, *Outcome.__args__} - {*others}
    assert sorted(kind.__name__ for kind in wanted if not seen[kind]) == []


def random_world(seed: str, make: Make) -> World:
    """Some saga's life, up to its end or sixty events."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    world = make(dice.choice)
    for _ in range(60):
        if world.saga is not None and world.saga.ended:
            break
        world.act()
    return world


@pytest.mark.parametrize(
    ("transitions", "missing"),
    [(saga.TRANSITIONS, SagaState.MIXED), (two_phase.TRANSITIONS, SagaState.ABANDONED)],
    ids=["saga", "two-phase commit"],
)
def test_every_state_is_in_the_table_and_can_be_reached(
    transitions: Table, missing: SagaState
) -> None:
    """Every state but the one that only the other mode knows follows from RUNNING."""
    assert set(transitions) == set(SagaState) - {missing}
    reached = {SagaState.RUNNING}
    for _ in transitions:
        reached |= {after for state in reached for after in transitions[state]}
    assert reached == set(transitions)
