"""Crash points: somebody dies at every single point of a course, and at every point again.

How to think about it. The simulator draws faults; here nothing is drawn. A *scenario* is one saga
with a fixed fate: refused at this step, its replies lost at that one, cancelled, out of time. Its
fault-free course, one without deaths, is run first and passes so many *points*:

    before a commit    nothing of it is on the disk
    after a commit     it is on the disk, and nobody has been told
    before a call      its record is on the disk, and the call never leaves
    after a call       the participant has done what it does, and nobody hears its reply

In a two-phase commit everybody's death matters, and its participants die, too, at points of theirs:

    before a participant's commit    nothing of the call is in its database
    after a participant's commit     all of it is, and the runtime is not answered

A participant that dies loses its connections, the calls that wait for its database and the
transaction that is open; its database stays, and it is there again at once.

Then it is run again for each of them, and whose point it is dies exactly there. What happens then
is the recovery, and it has points of its own; for each of those the scenario is run once more, with
a death at both. So every single death and every pair is run, none is sampled, and each run is held
to all of the simulator's rules and to the scenario's own end. `Enumeration` has the counts.

Durations follow one fixed sequence and nothing is left to chance, so that the k-th point of a
course is the same point each time; each run checks that up to its death it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from tests.simulation.crash_scenarios import SAGAS, Scenario
from tests.simulation.crash_votes import COMMITS
from tests.simulation.faults import Fault, Faults
from tests.simulation.world import Course, run

__all__ = [
    "KINDS",
    "KINDS_OF_COMMITS",
    "SCENARIOS",
    "Enumeration",
    "Failure",
    "Point",
    "Scenario",
    "enumerate_deaths",
    "fault_free",
]

T = TypeVar("T")

KINDS = {
    Fault.CRASH_BEFORE_COMMIT: "before a commit",
    Fault.CRASH_AFTER_WRITE: "after a commit",
    Fault.CRASH_BEFORE_CALL: "before a call",
    Fault.CRASH_AFTER_REPLY: "after a call",
}
"""The simulator's words for the points, and ours."""

KINDS_OF_COMMITS = {
    **KINDS,
    Fault.DIED_BEFORE_COMMIT: "before a participant's commit",
    Fault.DIED_AFTER_COMMIT: "after a participant's commit",
}
"""Where a two-phase commit has a death: the last two are its participants'."""

SCENARIOS = (*SAGAS, *COMMITS)

GOLDEN = 0.6180339887  # its multiples spread evenly, and no two neighbours are close


# -- deaths ----------------------------------------------------------------------------------------


class Point(msgspec.Struct, frozen=True):
    """A place in a course where somebody may die; `where` names the process or the call."""

    kind: Fault
    where: str

    def __str__(self) -> str:
        return f"{KINDS_OF_COMMITS[self.kind]} ({self.where})"


class Deaths(Faults):
    """The scenario's fate, and deaths at chosen points; everything else goes well.

    `points[n]` are those that were passed after n deaths; `deaths[n]` is the number of the one at
    which somebody dies next.
    """

    def __init__(self, scenario: Scenario, deaths: Sequence[int]) -> None:
        super().__init__(random.Random(0))  # noqa: S311  # never asked
        self.points: list[list[Point]] = [[]]
        self._scenario = scenario
        self._deaths = deaths
        self._lost = 0
        self._durations = 0

    def strikes(self, fault: Fault, where: str = "") -> bool:
        """Say whether it is the scenario's fate, or whether it is time to die."""
        if fault in KINDS_OF_COMMITS:
            happens = self._dies_at(Point(fault, where))
        elif fault in (Fault.REJECT, Fault.VOTE_NO):
            happens = _step_of(where) == self._scenario.rejected
        elif fault is Fault.FOREIGN_LOCK:
            happens = _step_of(where) == self._scenario.locked and where.endswith("/1")
        elif fault is Fault.ASKED:
            happens = _step_of(where) == self._scenario.asks
        else:
            happens = self._loses(fault, where)
        if happens:
            self.count(fault, where)
        return happens

    def between(self, low: float, high: float) -> float:
        """Give the next duration of the sequence; equal ones would keep parallel calls in step."""
        self._durations += 1
        return low + (high - low) * (self._durations * GOLDEN % 1)

    def pick(self, what: Sequence[T]) -> T:
        """The first will do."""
        return what[0]

    @property
    def died(self) -> int:
        """How often somebody has died."""
        return len(self.points) - 1

    def _dies_at(self, point: Point) -> bool:
        passed = self.points[-1]
        passed.append(point)
        if self.died == len(self._deaths) or self._deaths[self.died] != len(passed) - 1:
            return False
        self.points.append([])
        return True

    def _loses(self, fault: Fault, where: str) -> bool:
        loss = self._scenario.loss
        if loss is None or fault is not loss.fault or self._lost >= loss.times:
            return False
        if _step_of(where) != loss.step or f"/{loss.verb}/" not in where:
            return False
        self._lost += 1
        return True


def _step_of(where: str) -> str:
    """The step in a call's key, which may have the store's id before it."""
    parts = where.removeprefix("store/").split("/")
    return parts[1] if len(parts) > 1 else ""


# -- enumeration -----------------------------------------------------------------------------------


class Failure(msgspec.Struct, frozen=True):
    """A run that did not end right: where somebody died, what was wrong, its whole course."""

    scenario: str
    deaths: tuple[int, ...]
    points: tuple[Point, ...]
    wrong: tuple[str, ...]
    trace: tuple[str, ...]

    def __str__(self) -> str:
        died = ", then ".join(
            f"{number}: {point}" for number, point in zip(self.deaths, self.points, strict=True)
        )
        wrong = "\n  ".join(self.wrong)
        return f"{self.scenario}; died at {died or 'no point'}\n  {wrong}"


class Enumeration(msgspec.Struct):
    """What was run of one scenario. `points` are those of the fault-free course, by kind."""

    scenario: str
    points: dict[str, int]
    prepares: int
    executes: int
    compensations: int
    singles: int = 0
    pairs: int = 0
    recovery_points: int = 0
    ends: Counter[str] = msgspec.field(default_factory=Counter)
    failures: list[Failure] = msgspec.field(default_factory=list)


def fault_free(scenario: Scenario) -> tuple[Deaths, Course]:
    """Run a scenario in which nobody dies."""
    deaths = Deaths(scenario, ())
    return deaths, run(scenario.schedule(), deaths)


def enumerate_deaths(scenario: Scenario, *, pairs: bool) -> Enumeration:
    """Run a scenario with a death at each of its points; with `pairs` also one at each after it."""
    dry, course = fault_free(scenario)
    points = dry.points[0]
    calls = [point.where for point in points if point.kind is Fault.CRASH_BEFORE_CALL]
    found = Enumeration(
        scenario.name,
        dict(Counter(KINDS_OF_COMMITS[point.kind] for point in points)),
        sum("/PREPARE/" in call for call in calls),
        sum("/EXECUTE/" in call for call in calls),
        sum("/COMPENSATE/" in call for call in calls),
    )
    effects = course.operations["effects"]
    if course.ends == {scenario.end.name: 1} and effects == scenario.effects:
        _judge(found, scenario, dry, course)
    else:
        otherwise = f"without a death it ends {course.ends} with {effects} effects"
        _judge(found, scenario, dry, course, otherwise)
    for first in range(len(points)):
        recovered = _die_at(scenario, (first,), points, found)
        found.singles += 1
        found.recovery_points += len(recovered)
        for second in range(len(recovered) if pairs else 0):
            _die_at(scenario, (first, second), recovered, found)
            found.pairs += 1
    return found


def _die_at(
    scenario: Scenario, numbers: tuple[int, ...], expected: Sequence[Point], found: Enumeration
) -> list[Point]:
    """Die at these points; give those that were passed after the last death.

    `expected` are those that were passed before it when nobody died there: up to the death they
    must be the same.
    """
    deaths = Deaths(scenario, numbers)
    course = run(scenario.schedule(), deaths)
    if deaths.died != len(numbers):
        _judge(found, scenario, deaths, course, f"it died {deaths.died} times, not {len(numbers)}")
    elif deaths.points[-2] != expected[: numbers[-1] + 1]:
        _judge(found, scenario, deaths, course, "the course up to its death is another one")
    else:
        _judge(found, scenario, deaths, course)
    return deaths.points[-1]


def _judge(
    found: Enumeration, scenario: Scenario, deaths: Deaths, course: Course, *otherwise: str
) -> None:
    """Count a run, and note what was wrong with it: `otherwise`, and what can be seen of it."""
    found.ends.update(course.ends)
    wrong = [*otherwise]
    wrong += [f"{violation.rule}: {violation.what}" for violation in course.violations]
    if course.ends not in [{end.name: 1} for end in scenario.ends]:
        wrong.append(f"it ends {course.ends} instead of {[end.name for end in scenario.ends]}")
    if not wrong:
        return
    died = deaths.points[: deaths.died]
    found.failures.append(
        Failure(
            scenario.name,
            tuple(len(passed) - 1 for passed in died),
            tuple(passed[-1] for passed in died),
            tuple(wrong),
            tuple(course.trace.lines()),
        )
    )
