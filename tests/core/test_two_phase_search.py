"""State search for the two-phase commit: every state of coordinator, network and participants.

Breadth first from the start, over the real `decide`, until there are no new states: two or three
branches whose participants keep the contract (`voters.py`), and up to two faults in all, each of
which is

- a call that is lost, or arrives only after its time-out, or twice: once now, once whenever,
- a reply that is lost,
- a participant that dies: before its commit it is as if the call had been lost, after it the reply,
- a runtime that dies: what is open may have been sent or not, and arrives whenever it likes,
- a breaker that is open when a vote is asked for.

Free of charge are every vote (yes, no, LOCKED), wake-ups, the deadline, a cancel, an operator's
retry, a branch that asks GetDecision and does as it is told, an InProgress while an older call of
the same life may still run, and any delay of what is on its way.

States that differ only in when things happened, in attempts' numbers or in the names of branches
that are asked at once are one state. All are kept, none is cut: where a search ends, it has closed.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Final, NamedTuple

import pytest
from hypothesis import settings

from amends_runtime.core.definition import Definition, Mode, Plan, RetryPolicy, Step, TwoPhase
from amends_runtime.core.effects import CallParticipant, Effect
from amends_runtime.core.messages import (
    CancelSaga,
    InProgress,
    Message,
    NotSent,
    Outcome,
    RetrySaga,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState, Verb
from amends_runtime.core.saga import Saga, decide
from tests.core.rules import rule
from tests.core.test_state_search import answered, reaching
from tests.core.two_phase_rules import Minutes, check_votes
from tests.core.voters import Life, answer, told

START_MS: Final = 1_000_000
LONG: Final = settings().max_examples > 100

# One retry, always after one millisecond: a second failure gives a vote up, or marks a branch.
ONCE: Final = RetryPolicy(first_ms=1, factor=1.0, max_ms=1, give_up_after_ms=1)

NOTHING, ASKED, REPLIED = 0, 1, 2
"""A branch's call: none is open; it is on its way; it is answered, as REPLIED and the outcome."""

OUTCOMES: Final[list[Outcome]] = [Unknown("LOST"), InProgress(1)]
"""What a coordinator can hear of a call, by number; what participants say is added to it."""
LOST, BUSY = 0, 1

Said = tuple[str, int, int]
"""A message without its instants: what, of which branch, and with which outcome."""
ENDS_A_CALL: Final = frozenset(("answered", "answered late", "withdrawn", "breaker"))

Copy = tuple[int, int, int, bool]
"""A call that is on its way: branch, verb, round, and what it says of the vote."""

# Plain numbers from here on: an enumeration's member takes a hundred times as long to hash.
PREPARE: Final = int(Verb.PREPARE)
NEW, HOLDS, REFUSED, WAS_LOCKED, COMMITTED = map(
    int, (Life.NEW, Life.HOLDS, Life.REFUSED, Life.WAS_LOCKED, Life.COMMITTED)
)


def plan_of(branches: int, *, ordered: bool = False, rounds: int = 1) -> Plan:
    """A two-phase commit whose branches are alike."""
    steps = tuple(
        Step(
            name=f"b{number}",
            participant="bank",
            action="move",
            timeout_ms=100,
            retry=ONCE,
            compensation_retry=ONCE,
        )
        for number in range(branches)
    )
    two_phase = TwoPhase(ordered=ordered, locked_retries=rounds - 1)
    return Plan(
        Definition(name="small", mode=Mode.TWO_PHASE_COMMIT, steps=steps, two_phase=two_phase)
    )


class Case(NamedTuple):
    """What is searched. `faults` in all; `at_least` so many states must be found."""

    plan: Plan
    faults: int
    deadline: bool
    cancel: bool
    at_least: int


CASES: dict[str, Case] = {
    "two branches, two faults": Case(plan_of(2), 2, True, True, 30_000),
    "two in order, two faults": Case(plan_of(2, ordered=True), 2, True, True, 12_000),
    "two branches, two rounds, one fault": Case(plan_of(2, rounds=2), 1, True, True, 40_000),
    "three branches, one fault, no deadline": Case(plan_of(3), 1, False, True, 90_000),
    "three in order, one fault": Case(plan_of(3, ordered=True), 1, True, True, 27_000),
}
LONG_CASES: dict[str, Case] = {
    "three branches, one fault": Case(plan_of(3), 1, True, True, 270_000),
    "two branches, two rounds, two faults": Case(plan_of(2, rounds=2), 2, True, True, 500_000),
    "three branches, two faults": Case(plan_of(3), 2, True, True, 700_000),
    "three in order, two faults": Case(plan_of(3, ordered=True), 2, True, True, 130_000),
}
if LONG:
    CASES |= LONG_CASES


@pytest.mark.parametrize("name", CASES)
def test_every_reachable_state_keeps_the_rules(name: str) -> None:
    """All commit or none, nobody is told too early, nothing stays held, and each state can end."""
    case = CASES[name]
    began_s = time.perf_counter()
    search = Search(case)
    kind_moves = search.run()
    seconds = time.perf_counter() - began_s
    print(  # noqa: T201 - shown by -rP
        f"{name}: {len(kind_moves)} states, {search.moves} moves, {len(search.sagas)} states of the"
        f" coordinator, closed in {seconds:.1f} s"
    )
    assert len(kind_moves) >= case.at_least
    ends = {state for state, following in kind_moves.items() if following is None}
    rule("each state can come to an end", holds=reaching(ends, kind_moves) == kind_moves.keys())


class Place(NamedTuple):
    """A state of everything: the coordinator's by its number, calls, lives, late copies, faults.

    `lives` are per branch and round, `late` the copies of calls that are still on their way.
    """

    saga: int
    calls: tuple[int, ...]
    lives: tuple[tuple[int, ...], ...]
    late: tuple[Copy, ...] = ()
    faults: int = 0


class Known(NamedTuple):
    """A state of the coordinator, and one way to it. `flags` and `branches` name what it is."""

    saga: Saga
    now_ms: int
    minutes: Minutes
    flags: int
    branches: tuple[int, ...]


class Search:
    """One search. The coordinator's states are numbered, and each decides about a message once."""

    def __init__(self, case: Case) -> None:
        two_phase = case.plan.two_phase
        assert two_phase is not None
        self.plan, self.case = case.plan, case
        self.sagas: list[Known] = []
        self.moves = 0
        self._ordered, self._rounds = two_phase.ordered, two_phase.locked_retries + 1
        self._numbers: dict[Hashable, int] = {}
        self._parts: dict[Hashable, int] = {}  # what names of states consist of
        self._decided: dict[tuple[int, Said], tuple[int, tuple[int, ...]]] = {}
        self._answers: dict[tuple[int, int, int, bool], tuple[int, int]] = {}

    def run(self) -> dict[Hashable, list[Hashable] | None]:
        """All reachable states by their numbers, each with those that kind moves lead to.

        None for the last ones.
        """
        first = self._start()
        seen = {self._name(first): 0}
        queue = deque([first])
        kind_moves: dict[Hashable, list[Hashable] | None] = {}
        while queue:
            place = queue.popleft()
            following: list[Hashable] = []
            for kind, after in self._moves(place):
                self.moves += 1
                name = self._name(after)
                number = seen.get(name)
                if number is None:
                    self._check(after)
                    number = seen[name] = len(seen)
                    queue.append(after)
                if kind:
                    following.append(number)
            ended = self.sagas[place.saga].saga.ended
            kind_moves[len(kind_moves)] = None if ended else following  # they come in their order
        return kind_moves

    # -- what holds in every state -----------------------------------------------------------------

    def _check(self, place: Place) -> None:
        saga = self.sagas[place.saga].saga
        for lives in zip(*place.lives, strict=True):
            if COMMITTED in lives:
                rule("all of a round commit, or none", holds=set(lives) <= {COMMITTED, HOLDS})
        if saga.ended:
            last = {lives[saga.round - 1] for lives in place.lives}
            anywhere = set(itertools.chain(*place.lives))
            rule("nothing is held at the end", holds=HOLDS not in anywhere)
            if saga.end is SagaState.COMPLETED:
                rule("COMPLETED: all have committed", holds=last == {COMMITTED})
            else:
                rule("who keeps promises never ends MIXED", holds=saga.end is SagaState.COMPENSATED)
                rule("COMPENSATED: none has committed", holds=COMMITTED not in anywhere)

    # -- moves -------------------------------------------------------------------------------------

    def _moves(self, place: Place) -> Iterator[tuple[bool, Place]]:
        """Everything that can happen next. A kind move needs no fault and is nobody's refusal."""
        saga = self.sagas[place.saga].saga
        yield from self._late(place)
        yield from self._asking(place, saga)
        if saga.ended:
            return  # what else is said does nothing: a property test shows it
        may_fail = place.faults < self.case.faults
        if self.case.cancel:
            yield False, self._told(place, ("cancel", 0, 0))
        if any(step.stuck_since_ms for step in saga.steps):
            yield False, self._told(place, ("retry", 0, 0))
        for number in range(len(instants(saga))):
            yield True, self._told(place, ("wake", number, 0))
        is_due = saga.deadline_at_ms > 0 and saga.decision is None
        if is_due:
            yield False, self._told(place, ("deadline", 0, 0))
        for number, call in enumerate(place.calls):
            if call == ASKED:
                yield from self._on_its_way(place, saga, number)
            elif call >= REPLIED:
                yield True, self._told(place, ("answered", number, call - REPLIED))
                if is_due:  # and its timer has not fired yet
                    yield False, self._told(place, ("answered late", number, call - REPLIED))
            if call and may_fail:
                yield False, self._told(failing(place), ("answered", number, LOST))
        if may_fail:
            yield from self._restarts(failing(place), saga)

    def _on_its_way(self, place: Place, saga: Saga, number: int) -> Iterator[tuple[bool, Place]]:
        copy = copy_of(saga, number)
        _, verb, round_, _ = copy
        may_fail = place.faults < self.case.faults
        withdrawn = verb == PREPARE and saga.decision is not None
        for vote in self._votes(place, copy):
            arrived, said = self._arrived(place, copy, vote)
            yield vote == HOLDS, with_call(arrived, number, REPLIED + said)
            if may_fail:
                twice = delayed(failing(arrived), copy)
                yield False, with_call(twice, number, REPLIED + said)
        if may_fail:
            yield False, self._told(delayed(failing(place), copy), ("answered", number, LOST))
        if withdrawn:
            yield True, self._told(place, ("withdrawn", number, 0))
        elif verb == PREPARE and may_fail:
            yield False, self._told(failing(place), ("breaker", number, 0))
        if any(late[0] == number and late[2] == round_ for late in place.late):
            yield False, self._told(place, ("answered", number, BUSY))

    def _late(self, place: Place) -> Iterator[tuple[bool, Place]]:
        """A copy arrives at last; nobody hears what is said to it."""
        for number, copy in enumerate(place.late):
            rest = place._replace(late=place.late[:number] + place.late[number + 1 :])
            for vote in self._votes(place, copy):
                yield False, self._arrived(rest, copy, vote)[0]

    def _asking(self, place: Place, saga: Saga) -> Iterator[tuple[bool, Place]]:
        """Somebody who is in doubt asks what was decided, and does it."""
        for number, lives in enumerate(place.lives):
            for round_, life in enumerate(lives, 1):
                verb = told(saga, round_) if life == HOLDS else None
                if verb is not None:
                    yield False, self._arrived(place, (number, int(verb), round_, True), life)[0]

    def _restarts(self, place: Place, saga: Saga) -> Iterator[tuple[bool, Place]]:
        """The runtime dies: what it had asked was sent or not, and its replies reach nobody."""
        copies = [copy_of(saga, number) for number, call in enumerate(place.calls) if call == ASKED]
        for sent in itertools.product((False, True), repeat=len(copies)):
            after = place._replace(calls=(NOTHING,) * len(place.calls))
            for copy in itertools.compress(copies, sent):
                after = delayed(after, copy)
            yield False, self._told(after, ("restarted", 0, 0))

    def _votes(self, place: Place, copy: Copy) -> tuple[int, ...]:
        """What a call can come to: a first vote is free, everything else is settled."""
        number, verb, round_, _ = copy
        if verb != PREPARE or place.lives[number][round_ - 1] != NEW:
            return (HOLDS,)
        # Where no round may follow, LOCKED is a no like any other.
        return (HOLDS, REFUSED) if self._rounds == 1 else (HOLDS, REFUSED, WAS_LOCKED)

    # -- what moves do -----------------------------------------------------------------------------

    def _arrived(self, place: Place, copy: Copy, vote: int) -> tuple[Place, int]:
        """The participant has handled it; and what it says, by number."""
        number, verb, round_, voted = copy
        lives = place.lives[number]
        question = (lives[round_ - 1], verb, vote, voted)
        if question not in self._answers:
            life, said = answer(Life(question[0]), Verb(verb), Life(vote), voted=voted)
            if said not in OUTCOMES:
                OUTCOMES.append(said)
            self._answers[question] = int(life), OUTCOMES.index(said)
        after, outcome = self._answers[question]
        lives = (*lives[: round_ - 1], after, *lives[round_:])
        all_lives = (*place.lives[:number], lives, *place.lives[number + 1 :])
        return Place(place.saga, place.calls, all_lives, place.late, place.faults), outcome

    def _told(self, place: Place, said: Said) -> Place:
        """The coordinator hears something, and its effects leave."""
        key = (place.saga, said)
        if key not in self._decided:
            self._decided[key] = self._decide(self.sagas[place.saga], said)
        saga, asked = self._decided[key]
        what, number, outcome = said
        calls = [*place.calls]
        goes_on = outcome == BUSY and self.sagas[saga].saga.steps[number].open
        if what in ENDS_A_CALL and not goes_on:
            calls[number] = NOTHING
        for other in asked:
            calls[other] = ASKED
        return Place(saga, tuple(calls), place.lives, place.late, place.faults)

    # -- the coordinator ---------------------------------------------------------------------------

    def _start(self) -> Place:
        start = StartSaga(
            saga_id="s-1",
            content_hash="c",
            input=Payload(),
            deadline_at_ms=START_MS + 50 if self.case.deadline else 0,
        )
        decision = decide(self.plan, None, start, START_MS, 1)
        minutes = Minutes(self.plan)
        minutes.follow(decision)
        saga = self._number(decision.saga, START_MS, minutes)
        asked = asked_in(decision.effects)
        branches = range(len(self.plan.steps))
        calls = tuple(ASKED if number in asked else NOTHING for number in branches)
        return Place(saga, calls, ((NEW,) * self._rounds,) * len(branches))

    def _decide(self, known: Known, said: Said) -> tuple[int, tuple[int, ...]]:
        message, now_ms = message_of(known, said)
        decision = decide(self.plan, known.saga, message, now_ms, 1)
        check_votes(self.plan, known.saga, message, decision)
        minutes = known.minutes.copy()
        minutes.follow(decision)
        return self._number(decision.saga, now_ms, minutes), asked_in(decision.effects)

    def _number(self, saga: Saga, now_ms: int, minutes: Minutes) -> int:
        """The number of this state, of which only the order of instants counts."""
        voting = saga.decision is None
        times = {*instants(saga)}
        times |= {saga.deadline_at_ms} if voting else set()
        order = {at_ms: rank for rank, at_ms in enumerate(sorted(times - {0}), 1) if at_ms > now_ms}
        cause, culprit = (0, None) if saga.turn is None else (int(saga.turn.cause), saga.turn.step)
        branches = tuple(
            (
                (int(step.status), int(step.verb), step.open, step.unknown),
                (step.refused, step.locked, step.prepared_at_ms > 0, number == culprit),
                (step.failures > 0, min(step.spent_ms, 2), step.stuck_since_ms > 0),
                order.get(step.retry_at_ms, -1) if step.retry_at_ms else 0,
                order.get(step.mark_at_ms, -1) if step.mark_at_ms else 0,
            )
            for number, step in enumerate(saga.steps)
        )
        deadline = order.get(saga.deadline_at_ms, -1) if voting and saga.deadline_at_ms else 0
        how = (int(saga.phase), int(saga.end or 0), int(saga.decision or 0), cause)
        parts = self._parts
        flags = (how, saga.round, deadline, saga.cancel_requested)
        named = parts.setdefault(flags, len(parts))
        numbers = tuple(parts.setdefault(branch, len(parts)) for branch in branches)
        number = self._numbers.setdefault((named, numbers), len(self.sagas))
        if number == len(self.sagas):
            self.sagas.append(Known(saga, now_ms, minutes, named, numbers))
        return number

    def _name(self, place: Place) -> tuple[int, ...]:
        """What makes a state another; branches that are asked at once may change their places."""
        known = self.sagas[place.saga]
        late: list[tuple[Copy, ...]] = [()] * len(place.calls)
        for number, verb, round_, voted in place.late:
            late[number] = (*late[number], (0, verb, round_, voted))
        parts = self._parts
        branches = [
            parts.setdefault(part, len(parts))
            for part in zip(known.branches, place.calls, place.lives, late, strict=True)
        ]
        if not self._ordered:
            branches.sort()
        return (known.flags, place.faults, *branches)


def message_of(known: Known, said: Said) -> tuple[Message, int]:
    """The message, and when it comes."""
    what, number, outcome = said
    saga, now_ms = known.saga, known.now_ms
    if what == "answered late":
        now_ms = max(now_ms, saga.deadline_at_ms)
    if what == "cancel":
        return CancelSaga(author="ann"), now_ms
    if what == "retry":
        return RetrySaga(author="ann", reason="mended"), now_ms
    if what == "restarted":
        return RuntimeRestarted(), now_ms
    if what == "deadline":
        return Wake(saga.deadline_at_ms), max(now_ms, saga.deadline_at_ms)
    if what == "wake":
        at_ms = instants(saga)[number]
        return Wake(at_ms), max(now_ms, at_ms)
    step = saga.steps[number]
    if what in {"withdrawn", "breaker"}:
        reason = "BREAKER_OPEN" if what == "breaker" else ""
        key = {"step": number, "verb": step.verb, "round": step.round, "attempt": step.attempt}
        return NotSent(**key, reason=reason), now_ms  # type: ignore[arg-type]
    return answered(number, step, OUTCOMES[outcome], now_ms), now_ms


def instants(saga: Saga) -> list[int]:
    """When its branches wake up, in order: for an attempt, or to be marked."""
    times = {step.retry_at_ms for step in saga.steps} | {step.mark_at_ms for step in saga.steps}
    return sorted(times - {0})


def asked_in(effects: tuple[Effect, ...]) -> tuple[int, ...]:
    """The branches that are asked something."""
    return tuple(effect.step for effect in effects if isinstance(effect, CallParticipant))


def copy_of(saga: Saga, number: int) -> Copy:
    """The call of a branch's open attempt."""
    step = saga.steps[number]
    return number, int(step.verb), step.round, step.prepared_at_ms > 0


def failing(place: Place) -> Place:
    """One fault more."""
    return place._replace(faults=place.faults + 1)


def delayed(place: Place, copy: Copy) -> Place:
    """One more copy of a call is on its way."""
    return place._replace(late=tuple(sorted({*place.late, copy})))


def with_call(place: Place, number: int, call: int) -> Place:
    """A branch's call in another state."""
    calls = (*place.calls[:number], call, *place.calls[number + 1 :])
    return Place(place.saga, calls, place.lives, place.late, place.faults)
