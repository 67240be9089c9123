"""Crash points: the runtime dies at every single point of a course, and at every point again.

How to think about it. The simulator draws faults; here nothing is drawn. A *scenario* is one saga
with a fixed fate: refused at this step, its replies lost at that one, cancelled, out of time. Its
fault-free course, one without deaths, is run first and passes so many *points*:

    before a commit    nothing of it is on the disk
    after a commit     it is on the disk, and nobody has been told
    before a call      its record is on the disk, and the call never leaves
    after a call       the participant has done what it does, and nobody hears its reply

Then it is run again for each of them, and the process dies exactly there. What the next process
does is the recovery, and it has points of its own; for each of those the scenario is run once more,
and dies at both. So every single death and every pair is run, none is sampled, and each run is held
to all of the simulator's rules and to the scenario's own end. `Enumeration` has the counts.

Durations follow one fixed sequence and nothing is left to chance, so that the k-th point of a
course is the same point each time; each run checks that up to its death it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.records import SagaState
from tests.simulation.faults import Fault, Faults
from tests.simulation.flows import HASTY, PARTICIPANTS, PATIENT, flow, step
from tests.simulation.schedule import SagaScript, Schedule
from tests.simulation.world import Course, run

__all__ = [
    "KINDS",
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

SAGA = "s-1"


# -- scenarios -------------------------------------------------------------------------------------


class Loss(msgspec.Struct, frozen=True):
    """A step's calls of one verb lose their requests or replies, all of them or the first few."""

    fault: Fault
    step: str
    times: int
    verb: str = "execute"


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One saga and its fate.

    end       how it ends if nobody dies
    effects   how many effects it has then, compensations included
    may_end   how it may end if somebody does: a cancellation or a deadline that finds the saga
              elsewhere may come to something else
    streams   its participants are called over streams, and not by the unary verbs
    """

    name: str
    plan: Plan
    end: SagaState
    effects: int
    rejected: str = ""
    loss: Loss | None = None
    cancel_at_s: float | None = None
    deadline_ms: int = 0
    may_end: tuple[SagaState, ...] = ()
    streams: bool = False

    @property
    def ends(self) -> tuple[SagaState, ...]:
        """How it may end, whoever dies."""
        return self.may_end or (self.end,)

    def schedule(self) -> Schedule:
        """What the simulator is to run."""
        script = SagaScript(
            saga_id=SAGA,
            plan=self.plan,
            cancel_at_s=self.cancel_at_s,
            deadline_ms=self.deadline_ms,
        )
        streams = PARTICIPANTS if self.streams else ()
        return Schedule(sagas=(script,), calm_at_s=0.0, streams=streams)


GOLDEN = 0.6180339887  # its multiples spread evenly, and no two neighbours are close

COMPLETED, COMPENSATED = SagaState.COMPLETED, SagaState.COMPENSATED
EITHER = (COMPLETED, COMPENSATED)
FOR_EVER = 10**9

# A call takes 16 ms from its sending to its reply, a commit 4 ms, so that one step begins every
# 20 ms and its call is on the wire at these instants.
IN_FIRST, IN_SECOND, IN_THIRD = 12, 32, 52

LATER_MS = {IN_FIRST: 20, IN_SECOND: 60, IN_THIRD: 90}
"""The same instants where calls go over streams."""

LIST = flow("list", *(step(name, retry=HASTY) for name in ("a", "b", "c")))
DIAMOND = flow(
    "diamond",
    step("a", "alpha", after=(), retry=HASTY),
    step("b", "beta", after=("a",), retry=HASTY),
    step("c", "gamma", after=("a",), retry=HASTY),
    step("d", "alpha", after=("b", "c"), retry=HASTY),
)
ORDER = flow(
    "order",
    step("reserve", "alpha", retry=HASTY),
    step("charge", "beta", Kind.PIVOT, after=("reserve",), retry=PATIENT),
    step("ship", "gamma", Kind.RETRIABLE, after=("charge",), retry=PATIENT),
    step("notify", "alpha", Kind.RETRIABLE, after=("charge",), retry=PATIENT),
)


def _scenarios() -> Iterator[Scenario]:
    yield Scenario(name="list: success", plan=LIST, end=COMPLETED, effects=3)
    for number, name in enumerate("abc"):
        yield Scenario(
            name=f"list: {name} refused",
            plan=LIST,
            end=COMPENSATED,
            effects=2 * number,
            rejected=name,
        )
    for number, name in enumerate("abc"):
        yield Scenario(
            name=f"list: replies of {name} lost, given up",
            plan=LIST,
            end=COMPENSATED,
            effects=2 * (number + 1),
            loss=Loss(Fault.LOSE_REPLY, name, FOR_EVER),
        )
    for number, name in enumerate("abc"):
        yield Scenario(
            name=f"list: requests of {name} lost, given up",
            plan=LIST,
            end=COMPENSATED,
            effects=2 * number,
            loss=Loss(Fault.LOSE_REQUEST, name, FOR_EVER),
        )
    for number, (name, at_ms) in enumerate(
        zip("abc", (IN_FIRST, IN_SECOND, IN_THIRD), strict=True)
    ):
        yield Scenario(
            name=f"list: cancelled during {name}",
            plan=LIST,
            end=COMPENSATED,
            effects=2 * (number + 1),
            cancel_at_s=at_ms / 1000,
            may_end=EITHER,
        )
    yield Scenario(
        name="list: deadline during b",
        plan=LIST,
        end=COMPENSATED,
        effects=4,
        deadline_ms=IN_SECOND,
    )
    yield Scenario(
        name="list: c refused, a compensation's reply lost",
        plan=LIST,
        end=COMPENSATED,
        effects=4,
        rejected="c",
        loss=Loss(Fault.LOSE_REPLY, "b", 1, "compensate"),
    )
    yield Scenario(
        name="list: c refused, a compensation's request lost",
        plan=LIST,
        end=COMPENSATED,
        effects=4,
        rejected="c",
        loss=Loss(Fault.LOSE_REQUEST, "b", 1, "compensate"),
    )
    yield Scenario(name="diamond: success", plan=DIAMOND, end=COMPLETED, effects=4)
    yield Scenario(
        name="diamond: b refused beside c", plan=DIAMOND, end=COMPENSATED, effects=4, rejected="b"
    )
    yield Scenario(
        name="diamond: d refused", plan=DIAMOND, end=COMPENSATED, effects=6, rejected="d"
    )
    yield Scenario(
        name="diamond: replies of b lost, given up",
        plan=DIAMOND,
        end=COMPENSATED,
        effects=6,
        loss=Loss(Fault.LOSE_REPLY, "b", FOR_EVER),
    )
    yield Scenario(
        name="diamond: requests of c lost, given up",
        plan=DIAMOND,
        end=COMPENSATED,
        effects=4,
        loss=Loss(Fault.LOSE_REQUEST, "c", FOR_EVER),
    )
    yield Scenario(
        name="diamond: cancelled during b and c",
        plan=DIAMOND,
        end=COMPENSATED,
        effects=6,
        cancel_at_s=IN_SECOND / 1000,
        may_end=EITHER,
    )
    yield Scenario(name="order: success", plan=ORDER, end=COMPLETED, effects=4)
    yield Scenario(
        name="order: pivot refused", plan=ORDER, end=COMPENSATED, effects=2, rejected="charge"
    )
    yield Scenario(
        name="order: pivot's first reply lost",
        plan=ORDER,
        end=COMPLETED,
        effects=4,
        loss=Loss(Fault.LOSE_REPLY, "charge", 1),
    )
    yield Scenario(
        name="order: first request after the pivot lost",
        plan=ORDER,
        end=COMPLETED,
        effects=4,
        loss=Loss(Fault.LOSE_REQUEST, "ship", 1),
    )
    yield Scenario(
        name="order: cancelled during the pivot",
        plan=ORDER,
        end=COMPLETED,
        effects=4,
        cancel_at_s=IN_SECOND / 1000,
        may_end=EITHER,
    )
    yield Scenario(
        name="order: deadline during the pivot",
        plan=ORDER,
        end=COMPLETED,
        effects=4,
        deadline_ms=IN_SECOND,
        may_end=EITHER,
    )


def _over_streams(scenario: Scenario) -> Scenario:
    """The same fate where a stream has to be opened first and replies wait for company."""
    cancel_at_s, deadline_ms = scenario.cancel_at_s, scenario.deadline_ms
    return msgspec.structs.replace(
        scenario,
        name=f"{scenario.name}, streams",
        cancel_at_s=None if cancel_at_s is None else LATER_MS[round(cancel_at_s * 1000)] / 1000,
        deadline_ms=LATER_MS[deadline_ms] if deadline_ms else 0,
        streams=True,
    )


BY_VERBS = tuple(_scenarios())
SCENARIOS = (*BY_VERBS, *map(_over_streams, BY_VERBS))


# -- deaths ----------------------------------------------------------------------------------------


class Point(msgspec.Struct, frozen=True):
    """A place in a course where the process may die; `where` names the process or the call."""

    kind: Fault
    where: str

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} ({self.where})"


class Deaths(Faults):
    """The scenario's fate, and deaths at chosen points; everything else goes well.

    `points[n]` are those that the n-th process has passed; `deaths[n]` is the number of the one at
    which it dies.
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
        if fault in KINDS:
            happens = self._dies_at(Point(fault, where))
        elif fault is Fault.REJECT:
            happens = _step_of(where) == self._scenario.rejected
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
        """How often the process has died."""
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
    """A run that did not end right: where the process died, what was wrong, its whole course."""

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
        dict(Counter(KINDS[point.kind] for point in points)),
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
    """Die at these points; give those that the last process passed, which saw the end.

    `expected` are the points that the process which dies last passed when it lived on: up to its
    death it must have passed the same.
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
