"""The table of transitions is true: what is drawn in the README is what sagas do."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings

from amends_runtime.core.messages import Message, Outcome
from amends_runtime.core.records import Record, SagaState
from amends_runtime.core.saga import TRANSITIONS
from tests.core.definitions import make_plan
from tests.core.world import World

TABLE = {(before, after) for before, afters in TRANSITIONS.items() for after in afters}


def test_random_worlds_show_the_whole_table_and_nothing_else(pytestconfig: pytest.Config) -> None:
    """Of a thousand sagas, all changes of state are in the table, and all of the table is seen.

    The state is looked at after each record, so that STUCK may follow RUNNING and give way to it
    within one turn: one branch is stuck, and the next step of another has not been started yet. The
    worlds are hostile enough: every kind of message and record occurs in them.
    """
    seed = str(pytestconfig.option.hypothesis_seed)
    seen: Counter[object] = Counter()
    for number in range(10 * settings().max_examples):
        world = random_world(f"{seed}/{number}")
        seen.update(world.transitions)
        seen.update(type(message) for message, _ in world.told)
        seen.update(type(record) for record in world.records)
        seen.update(type(getattr(message, "outcome", None)) for message, _ in world.told)
    changes = {change for change in seen if isinstance(change, tuple)}
    assert changes == TABLE
    wanted = [*Message.__args__, *Record.__args__, *Outcome.__args__]
    assert [kind.__name__ for kind in wanted if not seen[kind]] == []


def random_world(seed: str) -> World:
    """Some saga's life, up to its end or sixty events."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    world = World(make_plan(dice.choice), dice.choice, dice.choice([0, 0, 1, 300, 60_000]))
    for _ in range(60):
        if world.saga is not None and world.saga.ended:
            break
        world.act()
    return world


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    """Every state but MIXED, which only a two-phase commit knows, follows from RUNNING."""
    assert set(TRANSITIONS) == set(SagaState) - {SagaState.MIXED}
    reached = {SagaState.RUNNING}
    for _ in TRANSITIONS:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(TRANSITIONS)
