"""Scenarios of the crash points: one saga with a fixed fate each.

Its fate is a refusal, a loss, a cancellation or a deadline, and how it ends follows from that. The
two-phase commits are in `crash_votes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.records import SagaState
from tests.simulation.faults import Fault
from tests.simulation.flows import HASTY, PARTICIPANTS, PATIENT, flow, step
from tests.simulation.schedule import SagaScript, Schedule

__all__ = [
    "COMPENSATED",
    "COMPLETED",
    "EITHER",
    "FOR_EVER",
    "IN_FIRST",
    "IN_SECOND",
    "SAGAS",
    "Loss",
    "Scenario",
    "over_streams",
]

SAGA = "s-1"


class Loss(msgspec.Struct, frozen=True):
    """A step's calls of one verb lose their requests or replies, all of them or the first few."""

    fault: Fault
    step: str
    times: int
    verb: str = "execute"


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One saga and its fate.

    end       how it ends if nobody dies
    effects   how many effects it has then, votes and compensations included
    rejected  the step that is refused, or votes no
    locked    the branch that votes LOCKED in its first round
    asks      the branch that asks for the decision, for as long as it is in doubt
    may_end   how it may end if somebody does: a cancellation or a deadline that finds the saga
              elsewhere may come to something else
    streams   its participants are called over streams, and not by the unary verbs
    """

    name: str
    plan: Plan
    end: SagaState
    effects: int
    rejected: str = ""
    locked: str = ""
    asks: str = ""
    loss: Loss | None = None
    cancel_at_s: float | None = None
    deadline_ms: int = 0
    may_end: tuple[SagaState, ...] = ()
    streams: bool = False

    @property
    def is_commit(self) -> bool:
        """Whether it is a two-phase commit: its participants die, too."""
        return self.plan.two_phase is not None

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


def over_streams(scenario: Scenario) -> Scenario:
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
SAGAS = (*BY_VERBS, *map(over_streams, BY_VERBS))
