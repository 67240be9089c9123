"""Random valid definitions, for the property tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from amends_runtime.core.definition import (
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
)

__all__ = ["Choose", "chooser", "make_plan", "make_two_phase_plan", "plans", "two_phase_plans"]

Choose = Callable[[Sequence[Any]], Any]
"""Where chance comes from: picks one of several. Hypothesis' choices can be shrunk."""

# Short enough that a random world sees give-ups, long enough that it sees retries before them.
HASTY = RetryPolicy(first_ms=50, factor=2.0, max_ms=400, give_up_after_ms=150)
HURRIED = RetryPolicy(first_ms=50, factor=2.0, max_ms=400, give_up_after_ms=60)
PATIENT = RetryPolicy(first_ms=50, factor=2.0, max_ms=400, give_up_after_ms=10**10)


def chooser(data: st.DataObject) -> Choose:
    """Let hypothesis choose."""

    def choose(what: Sequence[Any]) -> Any:
        return what[data.draw(st.integers(0, len(what) - 1))]

    return choose


@st.composite
def plans(draw: st.DrawFn, *, patient: bool = False) -> Plan:
    """The plan of a random valid definition."""
    return make_plan(chooser(draw(st.data())), patient=patient)


def make_plan(choose: Choose, *, patient: bool = False) -> Plan:
    """Make a plan of 1 to 8 steps: any graph, and any kinds that the rules of the pivot allow.

    The first steps can be undone, then comes the pivot or none, then what must succeed. Read-only
    steps may stand anywhere. With `patient`, no retries are ever given up.
    """
    count = choose(range(1, 9))
    point = choose(range(count + 1))  # how many steps can be undone
    with_pivot = point < count and choose([True, False])
    policies = [PATIENT] if patient else [HASTY, PATIENT]
    steps: list[Step] = []
    for number in range(count):
        after = {choose(steps).name for _ in range(choose([0, 1, 1, 2, 3]))} if steps else set()
        if number < point:
            kind = choose([Kind.COMPENSATABLE] * 4 + [Kind.READ_ONLY])
        elif with_pivot and number == point:
            kind = Kind.PIVOT
            after |= {step.name for step in steps if step.kind is Kind.COMPENSATABLE}
        else:
            kind = choose([Kind.RETRIABLE, Kind.RETRIABLE, Kind.READ_ONLY])
            if kind is Kind.RETRIABLE and with_pivot:
                after.add(steps[point].name)
        steps.append(
            Step(
                name=f"{kind.name[0].lower()}{number}",
                participant="shop",
                action="act",
                kind=kind,
                after=tuple(sorted(after)),
                timeout_ms=choose([100, 1_000]),
                retry=choose(policies),
                compensation_retry=choose(policies),
            )
        )
    if choose([False, True]):
        steps.reverse()  # once `after` is explicit, the order of the list says nothing
    return Plan(Definition(name="random", steps=tuple(steps)))


@st.composite
def two_phase_plans(draw: st.DrawFn, *, patient: bool = False) -> Plan:
    """The plan of a random two-phase commit."""
    return make_two_phase_plan(chooser(draw(st.data())), patient=patient)


def make_two_phase_plan(choose: Choose, *, patient: bool = False) -> Plan:
    """Make a plan of 1 to 5 branches, at once or in order, with or without further rounds."""
    policies = [PATIENT] if patient else [HURRIED, PATIENT]
    steps = [
        Step(
            name=f"b{number}",
            participant="bank",
            action="move",
            timeout_ms=choose([100, 1_000]),
            retry=choose(policies),
            compensation_retry=choose(policies),
        )
        for number in range(choose([1, 2, 2, 3, 3, 4, 5]))
    ]
    two_phase = TwoPhase(ordered=choose([False, True]), locked_retries=choose([0, 1, 3]))
    return Plan(
        Definition(
            name="random", mode=Mode.TWO_PHASE_COMMIT, steps=tuple(steps), two_phase=two_phase
        )
    )
