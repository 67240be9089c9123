"""The definitions of simulated sagas: chosen ones, and random ones of every legal shape.

They are made once: a plan is immutable and shared by all sagas of its content.
"""

from __future__ import annotations

import functools
import random

from amends_runtime.core.definition import (
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
)
from tests.simulation.participants import READ
from tests.simulation.votes import action_of

__all__ = [
    "PARTICIPANTS",
    "RIVALS",
    "branch",
    "commit",
    "commits",
    "flow",
    "flows",
    "is_hasty",
    "step",
]

PARTICIPANTS = ("alpha", "beta", "gamma")

HASTY = RetryPolicy(first_ms=50, factor=2.0, max_ms=400, give_up_after_ms=200)
PATIENT = RetryPolicy(first_ms=50, factor=2.0, max_ms=400, give_up_after_ms=10**10)
USUAL = None  # the defaults of the definition: up to 30 s between attempts

RANDOM_FLOWS = 192  # enough for every shape; all are kept in memory


def step(  # noqa: PLR0917  # a definition reads as a table
    name: str,
    participant: str = "alpha",
    kind: Kind = Kind.COMPENSATABLE,
    after: tuple[str, ...] | None = None,
    timeout_ms: int = 1_000,
    retry: RetryPolicy | None = PATIENT,
    compensation_retry: RetryPolicy | None = PATIENT,
) -> Step:
    """One step; its action follows from its kind."""
    return Step(
        name=name,
        participant=participant,
        action=READ if kind is Kind.READ_ONLY else "act",
        kind=kind,
        after=after,
        timeout_ms=timeout_ms,
        retry=retry,
        compensation_retry=compensation_retry,
    )


def flow(name: str, *steps: Step) -> Plan:
    """The plan of these steps."""
    return Plan(Definition(name=name, steps=steps))


def branch(  # noqa: PLR0917  # a definition reads as a table
    name: str,
    participant: str,
    account: str,
    amount: int,
    timeout_ms: int = 1_000,
    retry: RetryPolicy | None = PATIENT,
    compensation_retry: RetryPolicy | None = PATIENT,
) -> Step:
    """One branch of a two-phase commit: an amount that an account is to have more."""
    return Step(
        name=name,
        participant=participant,
        action=action_of(account, amount),
        timeout_ms=timeout_ms,
        retry=retry,
        compensation_retry=compensation_retry,
    )


def commit(
    name: str,
    *branches: Step,
    ordered: bool = False,
    locked_retries: int = 0,
    deadline_ms: int = 0,
) -> Plan:
    """The plan of a two-phase commit of these branches."""
    settings = TwoPhase(ordered=ordered, locked_retries=locked_retries)
    return Plan(
        Definition(
            name=name,
            steps=branches,
            mode=Mode.TWO_PHASE_COMMIT,
            deadline_ms=deadline_ms,
            two_phase=settings,
        )
    )


def is_hasty(policy: RetryPolicy | None) -> bool:
    """Whether an ordinary outage uses these retries up."""
    return policy is not None and policy.give_up_after_ms < 60_000


@functools.cache
def flows() -> tuple[Plan, ...]:
    """All of them, always the same."""
    chance = random.Random("flows")  # noqa: S311  # fixed, so that a seed means the same for ever
    return (*_chosen(), *(_random(number, chance) for number in range(RANDOM_FLOWS)))


def _chosen() -> tuple[Plan, ...]:
    retriable, pivot, read = Kind.RETRIABLE, Kind.PIVOT, Kind.READ_ONLY
    return (
        flow("one", step("a")),
        flow("list", step("a"), step("b", "beta"), step("c", "gamma")),
        flow("hasty-list", *(step(n, retry=HASTY) for n in "abc")),
        flow(
            "order",
            step("place", "alpha"),
            step("reserve", "beta", after=("place",), retry=HASTY),
            step("charge", "gamma", after=("place",)),
            step("ship", "alpha", pivot, after=("reserve", "charge")),
            step("confirm", "beta", retriable, after=("ship",)),
            step("notify", "gamma", retriable, after=("ship",)),
        ),
        flow(
            "quote",
            step("look", "alpha", read),
            step("hold", "beta", after=("look",)),
            step("check", "gamma", read, after=("hold",), retry=HASTY),
            step("take", "alpha", retriable, after=("check",)),
        ),
        flow("wide", *(step(f"w{n}", PARTICIPANTS[n % 3], after=()) for n in range(5))),
        flow(
            "diamond",
            step("a", "alpha", after=()),
            step("b", "beta", after=("a",), timeout_ms=100),
            step("c", "gamma", after=("a",), timeout_ms=100),
            step("d", "alpha", after=("b", "c")),
        ),
        flow("usual", step("a", retry=USUAL), step("b", "beta", retry=USUAL, timeout_ms=10_000)),
        flow(
            "usual-pivot",
            step("a", retry=USUAL, compensation_retry=USUAL),
            step("p", "beta", pivot, retry=USUAL),
            step("r", "gamma", retriable, retry=USUAL),
        ),
    )


def _random(number: int, chance: random.Random) -> Plan:
    """A plan of 1 to 7 steps: any graph, and any kinds that the rules of the pivot allow.

    The first steps can be undone, then comes the pivot or none, then what must succeed. Read-only
    steps stand anywhere.
    """
    count = chance.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 7))
    point = chance.randint(0, count)  # how many steps can be undone
    with_pivot = point < count and chance.random() < 0.5
    steps: list[Step] = []
    for place in range(count):
        width = chance.choice((0, 1, 1, 2, 3)) if steps else 0
        after = {chance.choice(steps).name for _ in range(width)}
        if place < point:
            kind = chance.choice((Kind.COMPENSATABLE,) * 4 + (Kind.READ_ONLY,))
        elif with_pivot and place == point:
            kind = Kind.PIVOT
            after |= {other.name for other in steps if other.kind is Kind.COMPENSATABLE}
        else:
            kind = chance.choice((Kind.RETRIABLE, Kind.RETRIABLE, Kind.READ_ONLY))
            if kind is Kind.RETRIABLE and with_pivot:
                after.add(steps[point].name)
        steps.append(
            step(
                f"{kind.name[0].lower()}{place}",
                chance.choice(PARTICIPANTS),
                kind,
                tuple(sorted(after)),
                timeout_ms=chance.choice((60, 200, 1_000)),
                retry=chance.choice((HASTY, PATIENT, PATIENT, PATIENT, USUAL)),
                compensation_retry=chance.choice((HASTY, PATIENT, PATIENT, PATIENT, USUAL)),
            )
        )
    if chance.random() < 0.3:
        steps.reverse()  # once `after` is explicit, the order of the list says nothing
    return flow(f"random-{number}", *steps)


# -- two-phase commits -----------------------------------------------------------------------------


@functools.cache
def commits() -> tuple[Plan, ...]:
    """All two-phase commits, always the same; the first few want the same accounts."""
    chance = random.Random("commits")  # noqa: S311  # fixed, so that a seed means the same for ever
    return (*_transfers(), *(_random_commit(number, chance) for number in range(RANDOM_COMMITS)))


RIVALS = 6
"""So many of the first commits stand in each other's way."""

RANDOM_COMMITS = 96


def _transfers() -> tuple[Plan, ...]:
    there = (branch("a", "alpha", "x", -7), branch("b", "beta", "x", 7))
    back = (branch("b", "beta", "x", -5), branch("a", "alpha", "x", 5))
    three = (*there[:1], branch("b", "beta", "y", 4), branch("c", "gamma", "x", 3))
    return (
        commit("there", *there, locked_retries=3),
        commit("back", *back, locked_retries=3),
        commit("there-ordered", *there, ordered=True, locked_retries=3),
        commit("back-ordered", *back, ordered=True, locked_retries=3),
        commit("three", *three, locked_retries=1),
        commit("back-at-once", *back),
        commit("one", branch("a", "alpha", "y", 0)),
        commit("three-ordered", *three, ordered=True, deadline_ms=2_000),
    )


def _random_commit(number: int, chance: random.Random) -> Plan:
    """A plan of 1 to 4 branches, no two of them of one account; what they move adds up to 0."""
    accounts = [(name, account) for name in PARTICIPANTS for account in "xy"]
    chosen = chance.sample(accounts, chance.choice((1, 2, 2, 3, 3, 4)))
    amounts = [chance.randint(-9, 9) for _ in chosen[1:]]
    retries = (HASTY, PATIENT, PATIENT, PATIENT, USUAL)
    branches = [
        branch(
            f"b{place}",
            participant,
            account,
            amount,
            timeout_ms=chance.choice((60, 200, 1_000)),
            retry=chance.choice(retries),
            compensation_retry=chance.choice(retries),
        )
        for place, ((participant, account), amount) in enumerate(
            zip(chosen, (-sum(amounts), *amounts), strict=True)
        )
    ]
    return commit(
        f"commit-{number}",
        *branches,
        ordered=chance.random() < 0.4,
        locked_retries=chance.choice((0, 0, 1, 2, 3)),
        deadline_ms=chance.choice((0, 0, 60, 300, 2_000, 20_000)),
    )
