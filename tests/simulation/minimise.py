"""What a violation needs: faults, sagas and incidents are taken away while it stays.

Delta debugging in its simplest form, one piece at a time and again until nothing more can go
(A. Zeller, "Yesterday, my program worked", 1999). A piece may be gone and the *same* rule still be
broken, or it stays.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tests.simulation.faults import OBSERVED, Fault
from tests.simulation.schedule import draw
from tests.simulation.world import Course, run

__all__ = ["Less", "minimise", "run_less"]


class Less(msgspec.Struct, frozen=True):
    """What is left out of a seed's schedule: kinds of faults, sagas and incidents by number."""

    faults: frozenset[Fault] = frozenset()
    sagas: frozenset[int] = frozenset()
    incidents: frozenset[int] = frozenset()

    def arguments(self) -> str:
        """The arguments of `simulate.py` that leave this out."""
        names = sorted(fault.name for fault in self.faults)
        parts = [f"--off {','.join(names)}"] if names else []
        for option, numbers in (("sagas", self.sagas), ("incidents", self.incidents)):
            if numbers:
                parts.append(f"--without-{option} {','.join(map(str, sorted(numbers)))}")
        return " ".join(parts)


def run_less(seed: int, less: Less) -> Course:
    """Run a seed's schedule without some of it."""
    schedule, faults = draw(seed, less.faults)
    return run(schedule.without(less.sagas, less.incidents), faults)


def minimise(seed: int, tell: Callable[[str], None]) -> tuple[Less, Course] | None:
    """Leave out whatever the seed's violation does not need.

    None: the seed breaks no rule. `tell` hears of each piece that could go.
    """
    schedule, _ = draw(seed)
    less, course = Less(), run_less(seed, Less())
    if not course.violations:
        return None
    rule = course.violations[0].rule
    tried = -1
    while tried != _size(less):
        tried = _size(less)
        for smaller, name in _smaller(less, course, len(schedule.sagas), len(schedule.incidents)):
            candidate = msgspec.structs.replace(
                less,
                faults=less.faults | smaller.faults,
                sagas=less.sagas | smaller.sagas,
                incidents=less.incidents | smaller.incidents,
            )
            if candidate == less:
                continue
            found = run_less(seed, candidate)
            if any(violation.rule == rule for violation in found.violations):
                less, course = candidate, found
                tell(f"goes: {name}")
    return less, course


def _size(less: Less) -> int:
    return len(less.faults) + len(less.sagas) + len(less.incidents)


def _smaller(less: Less, course: Course, sagas: int, incidents: int) -> list[tuple[Less, str]]:
    """The single pieces that could be left out."""
    pieces = [
        (Less(sagas=frozenset({n})), f"saga {n}") for n in range(sagas) if n not in less.sagas
    ]
    pieces += [
        (Less(incidents=frozenset({n})), f"incident {n}")
        for n in range(incidents)
        if n not in less.incidents
    ]
    gone = {*less.faults, *OBSERVED}
    fired = [fault for fault in Fault if fault in course.fired and fault not in gone]
    return pieces + [(Less(faults=frozenset({fault})), fault.value) for fault in fired]
