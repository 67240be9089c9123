"""Two-phase commits of three participants for the crash points, each with a fixed fate.

Their money is moved from one account to two others. A vote is an effect, and so is a roll back of
what was voted for: a branch that was never prepared is only fenced.
"""

from __future__ import annotations

from collections.abc import Iterator

from amends_runtime.core.definition import RetryPolicy, Step
from tests.simulation.crash_scenarios import (
    COMPENSATED,
    COMPLETED,
    EITHER,
    FOR_EVER,
    IN_FIRST,
    IN_SECOND,
    Loss,
    Scenario,
    over_streams,
)
from tests.simulation.faults import Fault
from tests.simulation.flows import HASTY, PATIENT, branch, commit

__all__ = ["COMMITS"]


def _branches(retry: RetryPolicy = PATIENT) -> Iterator[Step]:
    for name, participant, amount in (("a", "alpha", -5), ("b", "beta", 3), ("c", "gamma", 2)):
        yield branch(name, participant, "x", amount, retry=retry)


VOTES = commit("votes", *_branches())
SHORT = commit("short", *_branches(HASTY))
AGAIN = commit("again", *_branches(), locked_retries=1)
ORDERED = commit("ordered", *_branches(), ordered=True)
ORDERED_AGAIN = commit("ordered-again", *_branches(), ordered=True, locked_retries=1)


def _scenarios() -> Iterator[Scenario]:
    yield Scenario(name="votes: commit", plan=VOTES, end=COMPLETED, effects=6)
    for name in "abc":
        yield Scenario(
            name=f"votes: {name} votes no",
            plan=VOTES,
            end=COMPENSATED,
            effects=4,
            rejected=name,
        )
    yield Scenario(
        name="votes: deadline during the votes",
        plan=VOTES,
        end=COMPENSATED,
        effects=6,
        deadline_ms=IN_FIRST,
    )
    yield Scenario(
        name="votes: cancelled during the votes",
        plan=VOTES,
        end=COMPENSATED,
        effects=6,
        cancel_at_s=IN_FIRST / 1000,
        may_end=EITHER,
    )
    yield Scenario(
        name="votes: cancelled after the decision",
        plan=VOTES,
        end=COMPLETED,
        effects=6,
        cancel_at_s=IN_SECOND / 1000,
        may_end=EITHER,
    )
    yield Scenario(
        name="votes: vote of b lost",
        plan=VOTES,
        end=COMPLETED,
        effects=6,
        loss=Loss(Fault.LOSE_REPLY, "b", 1, "prepare"),
        may_end=EITHER,  # two deaths more open the breaker, which is a no
    )
    yield Scenario(
        name="votes: votes of b lost, given up",
        plan=SHORT,
        end=COMPENSATED,
        effects=6,
        loss=Loss(Fault.LOSE_REPLY, "b", FOR_EVER, "prepare"),
    )
    yield Scenario(
        name="votes: c never asked, given up",
        plan=SHORT,
        end=COMPENSATED,
        effects=4,
        loss=Loss(Fault.LOSE_REQUEST, "c", FOR_EVER, "prepare"),
    )
    yield Scenario(
        name="votes: commit of b lost",
        plan=VOTES,
        end=COMPLETED,
        effects=6,
        loss=Loss(Fault.LOSE_REQUEST, "b", 1, "execute"),
    )
    yield Scenario(
        name="votes: acknowledgement of b lost",
        plan=VOTES,
        end=COMPLETED,
        effects=6,
        loss=Loss(Fault.LOSE_REPLY, "b", 1, "execute"),
    )
    yield Scenario(
        name="votes: c votes no, acknowledgement of a lost",
        plan=VOTES,
        end=COMPENSATED,
        effects=4,
        rejected="c",
        loss=Loss(Fault.LOSE_REPLY, "a", 1, "compensate"),
    )
    yield Scenario(
        name="votes: b asks, its commit is lost",
        plan=VOTES,
        end=COMPLETED,
        effects=6,
        asks="b",
        loss=Loss(Fault.LOSE_REQUEST, "b", 2, "execute"),
    )
    yield Scenario(
        name="votes: c votes no, b asks, its roll back is lost",
        plan=VOTES,
        end=COMPENSATED,
        effects=4,
        rejected="c",
        asks="b",
        loss=Loss(Fault.LOSE_REQUEST, "b", 2, "compensate"),
    )
    yield Scenario(name="votes: b LOCKED, again", plan=AGAIN, end=COMPLETED, effects=10, locked="b")
    yield Scenario(name="ordered: commit", plan=ORDERED, end=COMPLETED, effects=6)
    for number, name in enumerate("abc"):
        yield Scenario(
            name=f"ordered: {name} votes no",
            plan=ORDERED,
            end=COMPENSATED,
            effects=2 * number,
            rejected=name,
        )
    yield Scenario(
        name="ordered: b LOCKED, again",
        plan=ORDERED_AGAIN,
        end=COMPLETED,
        effects=8,
        locked="b",
    )


BY_VERBS = tuple(_scenarios())
COMMITS = (*BY_VERBS, *map(over_streams, BY_VERBS))
