"""Somebody dies before and after every commit and every call, and everything still ends right.

The runtime in all scenarios, and in the two-phase commits the participants, too. Every single point
is run here, of every scenario over streams or by unary calls in turn; over both in `make test
MODE=long`. `make crash-points` also runs every pair: a death at each point of each recovery.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from amends_runtime.core import saga as core
from amends_runtime.core import two_phase_fold
from amends_runtime.core.messages import RuntimeRestarted
from amends_runtime.core.saga import StepState, StepStatus
from tests.simulation.crash_points import (
    KINDS,
    KINDS_OF_COMMITS,
    SCENARIOS,
    Scenario,
    enumerate_deaths,
    fault_free,
)
from tests.simulation.faults import Fault

SHORTEST = next(scenario for scenario in SCENARIOS if scenario.name == "list: success")

STREAMS = ", streams"
NAMES = list(dict.fromkeys(scenario.name.removesuffix(STREAMS) for scenario in SCENARIOS))
PLAYED = [
    scenario
    for scenario in SCENARIOS
    if settings().max_examples > 100
    or NAMES.index(scenario.name.removesuffix(STREAMS)) % 2 == scenario.name.endswith(STREAMS)
]


@pytest.mark.parametrize("scenario", PLAYED, ids=lambda scenario: scenario.name)
def test_it_ends_right_whichever_point_it_dies_at(scenario: Scenario) -> None:
    """As many runs as the fault-free course has points; the saga ends as it should in each."""
    found = enumerate_deaths(scenario, pairs=False)
    assert not found.failures, f"{found.failures[0]}\n" + "\n".join(found.failures[0].trace)
    assert found.points.keys() == set((KINDS_OF_COMMITS if scenario.is_commit else KINDS).values())
    assert found.points["before a commit"] == found.points["after a commit"]
    assert found.points["before a call"] == found.points["after a call"]
    assert found.prepares + found.executes + found.compensations == found.points["before a call"]
    if scenario.is_commit:
        died = [found.points[f"{when} a participant's commit"] for when in ("before", "after")]
        assert died[0] == died[1] <= found.points["before a call"]
    assert found.singles == sum(found.points.values())
    assert found.ends.total() == found.singles + 1
    assert set(found.ends) <= {end.name for end in scenario.ends}


def test_every_pair_of_the_shortest_scenario() -> None:
    """As many runs as the recoveries have points."""
    found = enumerate_deaths(SHORTEST, pairs=True)
    assert not found.failures, str(found.failures[0])
    assert found.pairs == found.recovery_points > found.singles


def test_the_scenarios_differ_in_what_happens() -> None:
    """Both ends are there, a second attempt, a fence, a new round, and an answer in doubt."""
    courses = {scenario.name: fault_free(scenario) for scenario in SCENARIOS}
    assert len(courses) == len(SCENARIOS)
    assert {end for _, course in courses.values() for end in course.ends} == {
        "COMPLETED",
        "COMPENSATED",
    }
    _, twice = courses["order: pivot's first reply lost"]
    assert twice.operations["calls"] == twice.operations["effects"] + 1
    again, _ = courses["votes: b LOCKED, again"]
    assert again.fired[Fault.NEXT_ROUND] == 1
    for name in ("votes: b asks, its commit is lost", "ordered: b LOCKED, again, streams"):
        asking, _ = courses[name]
        assert asking.fired[Fault.TOLD_EARLIER] == ("asks" in name)
    _, fenced = courses["list: requests of b lost, given up"]
    assert fenced.operations["fences"] > 0


def test_a_recovery_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that does nothing about the calls it had in flight fails after some deaths."""

    def forget(turn: object, message: object) -> None:
        """Nothing follows from a restart."""

    rules: dict[Any, Any] = core._RULES
    monkeypatch.setitem(rules, RuntimeRestarted, forget)
    found = enumerate_deaths(SHORTEST, pairs=False)
    assert 0 < len(found.failures) < found.singles
    assert "died at" in str(found.failures[0])


def test_a_scenario_that_is_described_wrongly_is_found() -> None:
    """The fault-free course is held to what the scenario says of it."""
    wrong = Scenario(name="wrong", plan=SHORTEST.plan, end=SHORTEST.end, effects=99)
    found = enumerate_deaths(wrong, pairs=False)
    assert found.failures[0].deaths == ()


def test_a_coordinator_that_forgets_who_may_have_voted_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After some deaths a branch holds what nobody tells it to let go of."""
    scenario = next(one for one in SCENARIOS if one.name == "votes: c votes no")
    is_held = two_phase_fold.is_held

    def if_known(step: StepState) -> bool:
        return is_held(step) and step.status is not StepStatus.UNKNOWN

    monkeypatch.setattr(two_phase_fold, "is_held", if_known)
    found = enumerate_deaths(scenario, pairs=False)
    assert 0 < len(found.failures) < found.singles
    assert any("held at the end" in wrong for one in found.failures for wrong in one.wrong)
