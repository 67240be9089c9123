"""The runtime dies before and after every commit and every call, and everything still ends right.

Every single point of every scenario is run here. `make crash-points` also runs every pair: a death
at each point of each recovery.
"""

from __future__ import annotations

from typing import Any

import pytest

from amends_runtime.core import saga as core
from amends_runtime.core.messages import RuntimeRestarted
from tests.simulation.crash_points import (
    KINDS,
    SCENARIOS,
    Scenario,
    enumerate_deaths,
    fault_free,
)

SHORTEST = next(scenario for scenario in SCENARIOS if scenario.name == "list: success")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_it_ends_right_whichever_point_it_dies_at(scenario: Scenario) -> None:
    """As many runs as the fault-free course has points; the saga ends as it should in each."""
    found = enumerate_deaths(scenario, pairs=False)
    assert not found.failures, f"{found.failures[0]}\n" + "\n".join(found.failures[0].trace)
    assert found.points.keys() == set(KINDS.values())
    assert found.points["before a commit"] == found.points["after a commit"]
    assert found.points["before a call"] == found.points["after a call"]
    assert found.executes + found.compensations == found.points["before a call"]
    assert found.singles == sum(found.points.values())
    assert found.ends.total() == found.singles + 1
    assert set(found.ends) <= {end.name for end in scenario.ends}


def test_every_pair_of_the_shortest_scenario() -> None:
    """As many runs as the recoveries have points."""
    found = enumerate_deaths(SHORTEST, pairs=True)
    assert not found.failures, str(found.failures[0])
    assert found.pairs == found.recovery_points > found.singles


def test_the_scenarios_differ_in_what_happens() -> None:
    """Both ends are there, a second attempt, and a fence."""
    courses = {scenario.name: fault_free(scenario) for scenario in SCENARIOS}
    assert len(courses) == len(SCENARIOS)
    assert {end for _, course in courses.values() for end in course.ends} == {
        "COMPLETED",
        "COMPENSATED",
    }
    _, twice = courses["order: pivot's first reply lost"]
    assert twice.operations["calls"] == twice.operations["effects"] + 1
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
