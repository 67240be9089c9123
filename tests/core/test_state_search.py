"""State search: every state that a small saga can reach, with one or two faults, breadth first.

Where the property tests draw samples, this closes over all of them: from each state every message
of a small alphabet is decided, checked against the rules, and leads to the next states, until there
are no new ones. States that differ only in when things happened are one state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import settings

from amends_runtime.core.definition import Definition, Kind, Plan, RetryPolicy, Step
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    Broken,
    CancelSaga,
    Done,
    Message,
    NotSent,
    Outcome,
    Rejected,
    RetrySaga,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import Phase, Saga, StepState, StepStatus, decide
from tests.core.rules import Ledger, check_decision, rule

START_MS = 1_000_000
LONG = settings().max_examples > 100
FAULTS = 3 if LONG else 2

# One retry, always after one millisecond: a second failure gives up.
ONCE = RetryPolicy(first_ms=1, factor=1.0, max_ms=1, give_up_after_ms=1)


# What is said too late. Each is said in every state; in a short search of one attempt or the other.
ECHOES = (Done(), Rejected("LATE"))


def step(name: str, *after: str, kind: Kind = Kind.COMPENSATABLE) -> Step:
    """A step that is retried once."""
    return Step(
        name=name,
        participant="shop",
        action="act",
        kind=kind,
        after=after,
        timeout_ms=100,
        retry=ONCE,
        compensation_retry=ONCE,
    )


LINE = (step("a"), step("b", "a"), step("p", "b", kind=Kind.PIVOT))
DIAMOND = (step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c"))
AFTER_THE_PIVOT = (
    step("a"),
    step("p", "a", kind=Kind.PIVOT),
    step("r", "p", kind=Kind.RETRIABLE),
    step("look", "a", kind=Kind.READ_ONLY),
)


class Node(msgspec.Struct):
    """A state, one way to it (its ledger), and how many faults may follow."""

    saga: Saga
    now_ms: int
    ledger: Ledger
    faults: int
    retries: int  # that an operator has left

    @property
    def stranded(self) -> bool:
        """A step is stuck, and the operator has gone home."""
        stuck = any(one.status is StepStatus.STUCK for one in self.saga.steps)
        return stuck and not self.retries and not self.saga.ended


class Move(msgspec.Struct):
    """A message that a state can get, when, and what it costs. A kind one is good news."""

    message: Message
    at_ms: int
    faults: int = 0
    kind: bool = False
    retries: int = 0


class Case(NamedTuple):
    """What is searched, with how many faults, and at least how many states that has."""

    steps: tuple[Step, ...]
    at_least: int
    faults: int = FAULTS
    deadline_ms: int = 0
    retries: int = 1  # of an operator
    twins: tuple[int, ...] = ()
    """Two steps that may be exchanged, because the definition says the same of both."""


CASES = {
    "line": Case(LINE, 8_000),
    "line with deadline": Case(LINE, 10_000, deadline_ms=50),
    "diamond": Case(DIAMOND, 4_000, faults=FAULTS if LONG else 1, retries=int(LONG), twins=(1, 2)),
    "after the pivot": Case(AFTER_THE_PIVOT, 20_000, deadline_ms=50),
}


@pytest.mark.parametrize("name", CASES)
def test_every_reachable_state_keeps_the_rules(name: str) -> None:
    """No state breaks a rule, and each can come to an end by nothing but good answers.

    Where a step is stuck, by that and one retry; what is stuck after the last one that is searched
    is left out of the claim.
    """
    case = CASES[name]
    kind_moves, stranded = search(case)
    print(f"{len(kind_moves)} states with up to {case.faults} faults")  # noqa: T201 - shown by -rP
    assert len(kind_moves) >= case.at_least
    ends = {state for state, following in kind_moves.items() if following is None}
    assert reaching(ends, kind_moves) | stranded == kind_moves.keys()


def search(case: Case) -> tuple[dict[Hashable, list[Hashable] | None], set[Hashable]]:
    """All reachable states, each with those that kind moves lead to; None for the last ones.

    Also those of them that only a further retry could help.
    """
    plan = Plan(Definition(name="small", steps=case.steps))
    start = StartSaga(
        saga_id="s-1",
        content_hash="c",
        input=Payload(),
        deadline_at_ms=START_MS + case.deadline_ms if case.deadline_ms else 0,
    )
    decision = decide(plan, None, start, START_MS, 1)
    ledger = Ledger(plan)
    ledger.follow(decision)
    first = Node(decision.saga, START_MS, ledger, faults=case.faults, retries=case.retries)
    kind_moves: dict[Hashable, list[Hashable] | None] = {}
    stranded: set[Hashable] = set()
    seen = {key(first, case.twins)}
    searched: set[Hashable] = set()  # the sagas, of which several nodes have the same
    queue = deque([(key(first, case.twins), first)])
    while queue:
        here, node = queue.popleft()
        saga, _ = here
        if saga not in searched:
            searched.add(saga)
            check_echoes(plan, node)
        following: list[Hashable] = []
        for move in moves(node):
            after = taken(plan, node, move)
            name = key(after, case.twins)
            if move.kind:
                following.append(name)
            if name not in seen:
                seen.add(name)
                queue.append((name, after))
        kind_moves[here] = None if node.saga.ended else following
        if node.stranded:
            stranded.add(here)
    return kind_moves, stranded


def taken(plan: Plan, node: Node, move: Move) -> Node:
    """The node that a move leads to."""
    decision = decide(plan, node.saga, move.message, move.at_ms, 1)
    check_decision(plan, node.saga, move.message, decision)
    ledger = node.ledger.copy()
    ledger.follow(decision)
    faults, retries = node.faults - move.faults, node.retries - move.retries
    return Node(decision.saga, move.at_ms, ledger, faults, retries)


def moves(node: Node) -> Iterator[Move]:
    """Every message of the alphabet that this state can get; after the end they do nothing."""
    saga, now_ms = node.saga, node.now_ms
    yield Move(CancelSaga(author="ann"), now_ms)
    if saga.state is SagaState.STUCK:
        yield Move(AbandonSaga(author="ann", reason="enough"), now_ms)
    if node.retries and any(one.status is StepStatus.STUCK for one in saga.steps):
        yield Move(RetrySaga(author="ann", reason="mended"), now_ms, kind=True, retries=1)
    times = {one.retry_at_ms for one in saga.steps if one.retry_at_ms}
    times |= {saga.deadline_at_ms} if saga.deadline_at_ms else set()
    for at_ms in times:
        yield Move(Wake(), max(now_ms, at_ms), kind=at_ms != saga.deadline_at_ms)
    for number, one in enumerate(saga.steps):
        if not one.open:
            continue
        yield Move(answered(number, one, Done(), now_ms), now_ms, kind=True)
        yield Move(answered(number, one, Rejected("NO"), now_ms), now_ms)
        if node.faults:
            yield Move(answered(number, one, Unknown("LOST"), now_ms), now_ms, faults=1)
            yield Move(answered(number, one, Broken("BROKEN"), now_ms), now_ms, faults=1)
            not_sent = NotSent(step=number, verb=one.verb, round=one.round, attempt=one.attempt)
            yield Move(not_sent, now_ms, faults=1)
    if node.faults:
        yield Move(RuntimeRestarted(), now_ms, faults=1)


def check_echoes(plan: Plan, node: Node) -> None:
    """Whatever is said of an attempt that is not open, in any state, changes nothing."""
    for number, one in enumerate(node.saga.steps):
        for verb in (Verb.EXECUTE, Verb.COMPENSATE):
            for attempt in range(one.attempt + 2):
                other = msgspec.structs.replace(one, verb=verb, attempt=attempt)
                if one.open and (verb, attempt) == (one.verb, one.attempt):
                    continue
                for outcome in ECHOES if LONG else (ECHOES[(number + attempt) % 2],):
                    message = answered(number, other, outcome, node.now_ms)
                    decision = decide(plan, node.saga, message, node.now_ms, 1)
                    silent = decision.saga is node.saga and not decision.effects
                    rule("an echo changes nothing", holds=silent)


def answered(number: int, one: StepState, outcome: Outcome, now_ms: int) -> Answered:
    """The answer to a step's attempt, at once."""
    return Answered(
        step=number,
        verb=one.verb,
        round=one.round,
        attempt=one.attempt,
        sent_at_ms=now_ms,
        answered_at_ms=now_ms,
        status="OK",
        polls=0,
        outcome=outcome,
    )


def key(node: Node, twins: tuple[int, ...]) -> tuple[Hashable, Hashable]:
    """What makes a state another: the saga's own part, and what is left for faults and retries.

    All of the saga but the instants, of which only the order counts.

    `twins` as in `Case`.
    """
    saga = node.saga
    forward = saga.phase is Phase.FORWARD and not saga.past_no_return
    times = {one.retry_at_ms for one in saga.steps} | {one.running_until_ms for one in saga.steps}
    times |= {saga.deadline_at_ms} if forward else set()
    order = {at_ms: rank for rank, at_ms in enumerate(sorted(times - {0}), 1)}

    def rank(at_ms: int) -> int:
        if not at_ms:
            return 0
        return order[at_ms] if at_ms > node.now_ms else -1

    cause, culprit = (0, None) if saga.turn is None else (saga.turn.cause, saga.turn.step)
    steps = [
        (
            (one.status, one.verb, one.round, one.attempt, one.open),
            (one.unknown, one.refused, one.executed, one.failures, one.spent_ms),
            number == culprit,
            (rank(one.retry_at_ms), rank(one.running_until_ms)),
        )
        for number, one in enumerate(saga.steps)
    ]
    if twins:
        first, second = twins
        steps[first], steps[second] = sorted((steps[first], steps[second]))
    flags = (saga.phase, saga.end, saga.past_no_return, saga.cancel_requested, cause)
    budget = (node.faults, node.retries)
    return (tuple(steps), flags, rank(saga.deadline_at_ms) if forward else 0), budget


def reaching(goals: set[Hashable], graph: dict[Hashable, list[Hashable] | None]) -> set[Hashable]:
    """The states from which a goal can be reached."""
    before: dict[Hashable, list[Hashable]] = {}
    for state, following in graph.items():
        for other in following or ():
            before.setdefault(other, []).append(state)
    found, stack = set(goals), list(goals)
    while stack:
        for state in before.get(stack.pop(), ()):
            if state not in found:
                found.add(state)
                stack.append(state)
    return found
