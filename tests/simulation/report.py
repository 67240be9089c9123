"""What many schedules came to together: counts, findings, and the tables that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from tests.simulation.faults import Fault
from tests.simulation.world import Course, Violation

__all__ = ["Finding", "Totals"]

TAIL_LINES = 40
"""How much of a trace is shown with a finding: a replay shows all of it."""


class Finding(msgspec.Struct, frozen=True):
    """A seed whose schedule broke a rule."""

    seed: int
    violations: tuple[Violation, ...]
    tail: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Say it for people, with the command that repeats it."""
        yield f"seed {self.seed}:"
        for violation in self.violations:
            yield f"  RULE   {violation.rule}"
            yield f"  BROKEN {violation.what}"
        yield "  the end of its trace:"
        yield from self.tail
        yield f"  to repeat it: make simulate SEED={self.seed}"


class Totals(msgspec.Struct):
    """Sums over schedules. `in_schedules` counts those in which a fault fired at all."""

    schedules: int = 0
    fired: Counter[str] = msgspec.field(default_factory=Counter)
    in_schedules: Counter[str] = msgspec.field(default_factory=Counter)
    ends: Counter[str] = msgspec.field(default_factory=Counter)
    operations: Counter[str] = msgspec.field(default_factory=Counter)
    findings: list[Finding] = msgspec.field(default_factory=list)

    def add(self, seed: int, course: Course) -> None:
        """Take in one schedule."""
        self.schedules += 1
        for fault, count in course.fired.items():
            self.fired[fault.value] += count
            self.in_schedules[fault.value] += 1
        self.ends.update(course.ends)
        self.operations.update(course.operations)
        if course.violations:
            tail = tuple(course.trace.lines()[-TAIL_LINES:])
            self.findings.append(Finding(seed, course.violations, tail))

    def merge(self, other: Totals) -> None:
        """Take in the sums of others."""
        self.schedules += other.schedules
        self.fired.update(other.fired)
        self.in_schedules.update(other.in_schedules)
        self.ends.update(other.ends)
        self.operations.update(other.operations)
        self.findings += other.findings

    def never_fired(self) -> list[str]:
        """The faults that these schedules have not shown."""
        return [fault.value for fault in Fault if not self.fired[fault.value]]

    def table(self) -> Iterator[str]:
        """How often each fault fired, and what the sagas came to."""
        yield f"{'fault':<58}{'fired':>10}{'schedules':>11}"
        for fault in Fault:
            fired, schedules = self.fired[fault.value], self.in_schedules[fault.value]
            yield f"{fault.value:<58}{fired:>10,}{schedules:>11,}"
        yield ""
        yield "sagas by end:  " + _counted(self.ends)
        yield "operations:    " + _counted(self.operations)

    def to_json(self) -> dict[str, Any]:
        """Everything, as values that JSON has."""
        return {
            "schedules": self.schedules,
            "violations": len(self.findings),
            "failing_seeds": [finding.seed for finding in self.findings],
            "rules_broken": sorted({v.rule for f in self.findings for v in f.violations}),
            "never_fired": self.never_fired(),
            "fired": dict(sorted(self.fired.items())),
            "in_schedules": dict(sorted(self.in_schedules.items())),
            "sagas": dict(sorted(self.ends.items())),
            "operations": dict(sorted(self.operations.items())),
        }


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts)) or "none"
