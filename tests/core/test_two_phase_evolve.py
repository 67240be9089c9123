"""`evolve` refuses what no two-phase commit can have done: what cannot be cannot be stored either.

Deciding twice, telling somebody what is not decided, and ending with something held are no
histories: a bug that decides them fails before anything is durable.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from amends_runtime.core.definition import Definition, Mode, Plan, Step, TwoPhase
from amends_runtime.core.messages import NotSent, StartSaga, Wake
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    Failure,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepPrepared,
    StepRejected,
    StepStuck,
    Timing,
    TurnCause,
    Verb,
    VoteRefused,
)
from amends_runtime.core.saga import decide, evolve, fold
from amends_runtime.core.two_phase import LOCKED, decision_of
from amends_runtime.errors import IllegalMessage, IllegalRecord

PREPARE, EXECUTE, COMPENSATE = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE
COMMIT, ABORT = CommitDecision.COMMIT, CommitDecision.ABORT
NO, LOCK = Failure("NO"), Failure(LOCKED)
TIMING = Timing(1, 2)
DEADLINE_MS = 1_000


def plan(*, ordered: bool = False) -> Plan:
    """Two branches, two rounds."""
    steps = tuple(Step(name=name, participant="bank", action="move") for name in ("a", "b"))
    settings = TwoPhase(ordered=ordered, locked_retries=1)
    return Plan(
        Definition(name="transfer", mode=Mode.TWO_PHASE_COMMIT, steps=steps, two_phase=settings)
    )


TWO, ORDERED = plan(), plan(ordered=True)
BEGUN = SagaStarted(1, "s-1", "transfer", TWO.content_hash, "c", Payload(), DEADLINE_MS)


def asked(step: int, verb: Verb = PREPARE, attempt: int = 1, round_: int = 1) -> AttemptStarted:
    """An attempt."""
    return AttemptStarted(2, step, verb, round_, attempt, 1)


def yes(step: int) -> StepPrepared:
    """A vote."""
    return StepPrepared(3, step, 1, 1, TIMING, Payload())


def no(step: int, failure: Failure = NO) -> VoteRefused:
    """A vote."""
    return VoteRefused(3, step, 1, 1, TIMING, failure)


def aborted(step: int | None = 0, failure: Failure = NO) -> DecisionMade:
    """A decision, by a refusal or by the deadline."""
    cause = TurnCause.DEADLINE if step is None else TurnCause.REJECTED
    return DecisionMade(4, ABORT, 1, cause, step, failure)


COMMITTED = DecisionMade(4, COMMIT, 1)
VOTED: list[Record] = [BEGUN, asked(0), asked(1), yes(0), yes(1)]
COMMITTING: list[Record] = [*VOTED, COMMITTED, asked(0, EXECUTE), asked(1, EXECUTE)]
REFUSED: list[Record] = [BEGUN, asked(0), asked(1), yes(1), no(0), aborted()]
WAS_LOCKED: list[Record] = [BEGUN, asked(0), asked(1), no(1, LOCK), no(0, LOCK), aborted(0, LOCK)]
ROLLING_BACK: list[Record] = [*REFUSED, asked(1, COMPENSATE)]
DONE = StepExecuted(5, 0, 1, 1, TIMING, Payload())
ROUND = RoundPlanned(6, 2, 10)

ILLEGAL: dict[str, tuple[Plan, Sequence[Record], Record]] = {
    "anything before the start": (TWO, [], asked(0)),
    "a second start": (TWO, [BEGUN], BEGUN),
    "a saga's turn": (TWO, [BEGUN], SagaTurnedBack(2, TurnCause.CANCELLED, None, NO)),
    "a saga's refusal": (TWO, [BEGUN, asked(0)], StepRejected(3, 0, 1, 1, TIMING, NO)),
    "a vote asked for twice at once": (TWO, [BEGUN, asked(0)], asked(0, attempt=2)),
    "an attempt's number again": (
        TWO,
        [BEGUN, asked(0), AttemptLost(3, 0, PREPARE, 1, 1, 1)],
        asked(0),
    ),
    "a vote asked for after a yes": (TWO, [BEGUN, asked(0), yes(0)], asked(0, attempt=2)),
    "a vote asked for out of order": (ORDERED, [BEGUN], asked(1)),
    "a vote of another round": (TWO, [BEGUN], asked(0, round_=2)),
    "a vote asked for after COMMIT": (TWO, [*VOTED, COMMITTED], asked(0, attempt=2)),
    "a vote asked for after ABORT": (TWO, [BEGUN, aborted(None)], asked(0)),
    "an answer that nobody waits for": (TWO, [BEGUN], yes(0)),
    "a yes twice": (TWO, [BEGUN, asked(0), yes(0)], yes(0)),
    "COMMIT with a vote missing": (TWO, [BEGUN, asked(0), asked(1), yes(0)], COMMITTED),
    "COMMIT against a no": (TWO, [BEGUN, asked(0), asked(1), yes(0), no(1)], COMMITTED),
    "COMMIT at the deadline": (TWO, VOTED, DecisionMade(DEADLINE_MS, COMMIT, 1)),
    "COMMIT of another round": (TWO, VOTED, DecisionMade(4, COMMIT, 2)),
    "ABORT without a cause": (TWO, [BEGUN], DecisionMade(4, ABORT, 1)),
    "a decision that is none": (
        TWO,
        [BEGUN],
        DecisionMade(4, CommitDecision.PENDING, 1, TurnCause.CANCELLED),
    ),
    "COMMIT twice": (TWO, [*VOTED, COMMITTED], COMMITTED),
    "ABORT after COMMIT": (TWO, [*VOTED, COMMITTED], aborted()),
    "COMMIT after ABORT": (TWO, [*VOTED, aborted(None)], COMMITTED),
    "told to commit before the decision": (TWO, VOTED, asked(0, EXECUTE)),
    "told to roll back before the decision": (TWO, VOTED, asked(0, COMPENSATE)),
    "told to roll back after COMMIT": (TWO, [*VOTED, COMMITTED], asked(0, COMPENSATE)),
    "told to commit after ABORT": (TWO, REFUSED, asked(1, EXECUTE)),
    "a clear no is told to roll back": (TWO, REFUSED, asked(0, COMPENSATE)),
    "told again after it has acknowledged": (TWO, [*COMMITTING, DONE], asked(0, EXECUTE, 2)),
    "told again after it broke its promise": (
        TWO,
        [*COMMITTING, HeuristicReported(5, 0, EXECUTE, 1, 1, TIMING, False, NO)],
        asked(0, EXECUTE, 2),
    ),
    "a decision of its own before there is one": (
        TWO,
        [BEGUN, asked(0)],
        HeuristicReported(5, 0, PREPARE, 1, 1, TIMING, True, NO),
    ),
    "the second phase gives up": (
        TWO,
        COMMITTING,
        AttemptFailed(5, 0, EXECUTE, 1, 1, TIMING, NO),
    ),
    "given up though it has voted": (TWO, VOTED, StepGivenUp(5, 0, 1)),
    "given up while it is asked": (TWO, [BEGUN, asked(0)], StepGivenUp(5, 0, 1)),
    "a mark while votes are collected": (TWO, VOTED, StepStuck(5, 0, EXECUTE, NO)),
    "a mark of the other verb": (
        TWO,
        [*COMMITTING, AttemptFailed(5, 0, EXECUTE, 1, 1, TIMING, NO, False, 9)],
        StepStuck(5, 0, COMPENSATE, NO),
    ),
    "a mark twice": (
        TWO,
        [*COMMITTING, StepStuck(5, 0, EXECUTE, NO)],
        StepStuck(6, 0, EXECUTE, NO),
    ),
    "a mark on what has acknowledged": (
        TWO,
        [*COMMITTING, DONE],
        StepStuck(6, 0, EXECUTE, NO),
    ),
    "cancelled after COMMIT": (TWO, COMMITTING, CancelRequested(5, "ann", "late")),
    "abandoned after COMMIT": (
        TWO,
        COMMITTING,
        OperatorActed(5, OperatorAction.ABANDON, None, "ann", "late"),
    ),
    "a retry of what is asked": (
        TWO,
        [BEGUN, asked(0)],
        OperatorActed(5, OperatorAction.RETRY, 0, "ann", "again", 1),
    ),
    "a round before the decision": (TWO, [BEGUN, asked(0), no(0, LOCK)], ROUND),
    "a round after COMMIT": (TWO, COMMITTING, ROUND),
    "a round after another refusal": (
        TWO,
        [*ROLLING_BACK, StepCompensated(5, 1, 1, 1, TIMING)],
        ROUND,
    ),
    "a round after the deadline": (TWO, [BEGUN, aborted(None)], ROUND),
    "a round while something is held": (
        TWO,
        [BEGUN, asked(0), asked(1), yes(1), no(0, LOCK), aborted(0, LOCK)],
        ROUND,
    ),
    "a round after it was cancelled": (
        TWO,
        [*WAS_LOCKED, CancelRequested(5, "ann", "enough")],
        ROUND,
    ),
    "a round too far": (TWO, WAS_LOCKED, RoundPlanned(6, 3, 10)),
    "a round that never begins": (TWO, WAS_LOCKED, RoundPlanned(6, 2, 0)),
    "an end without a decision": (TWO, [BEGUN], SagaEnded(9, SagaState.COMPENSATED)),
    "an end while it is held": (TWO, REFUSED, SagaEnded(9, SagaState.COMPENSATED)),
    "an end while it is told": (TWO, ROLLING_BACK, SagaEnded(9, SagaState.COMPENSATED)),
    "an end before all have committed": (
        TWO,
        [*COMMITTING, DONE],
        SagaEnded(9, SagaState.COMPLETED),
    ),
    "completed after ABORT": (TWO, [BEGUN, aborted(None)], SagaEnded(9, SagaState.COMPLETED)),
    "mixed where all agree": (TWO, [BEGUN, aborted(None)], SagaEnded(9, SagaState.MIXED)),
    "compensated where one broke its promise": (
        TWO,
        [*ROLLING_BACK, HeuristicReported(5, 1, COMPENSATE, 1, 1, TIMING, True, NO)],
        SagaEnded(9, SagaState.COMPENSATED),
    ),
    "abandoned": (TWO, [BEGUN, aborted(None)], SagaEnded(9, SagaState.ABANDONED)),
    "anything after the end": (
        TWO,
        [BEGUN, aborted(None), SagaEnded(9, SagaState.COMPENSATED)],
        CancelRequested(10, "ann", ""),
    ),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_a_record_that_cannot_follow_is_refused(what: str) -> None:
    """The error names the saga, its state and the record."""
    a_plan, history, record = ILLEGAL[what]
    before = fold(a_plan, history)
    with pytest.raises(IllegalRecord) as caught:
        evolve(a_plan, before, record)
    assert type(record).__name__ in str(caught.value)
    assert ("s-1" if history else "(none)") in str(caught.value)


def test_a_commit_begins_with_its_start() -> None:
    """Any other first message is a bug of the runtime, and is named."""
    with pytest.raises(IllegalMessage, match="Wake"):
        decide(TWO, None, Wake(), 1, 1)


def test_a_message_of_no_kind_is_refused() -> None:
    """What the table of rules does not know cannot be sent."""
    saga = decide(TWO, None, StartSaga(saga_id="s-1", content_hash="c", input=Payload()), 1, 1).saga
    with pytest.raises(IllegalMessage, match=r"s-1.*RUNNING.*str"):
        decide(TWO, saga, "boo", 2, 1)  # type: ignore[arg-type]
    with pytest.raises(IllegalMessage, match="NotSent of step 2"):
        decide(TWO, saga, NotSent(step=2, verb=PREPARE, round=1, attempt=1), 2, 1)


def test_what_was_decided_is_known_of_every_round() -> None:
    """Pending, then the decision; before it ABORT, since a round follows nothing else.

    What can come no more is ABORT, too.
    """
    said: dict[str, list[Record]] = {
        "voting": [BEGUN, asked(0)],
        "committed": [*VOTED, COMMITTED],
        "aborted": REFUSED,
        "second round": [*WAS_LOCKED, ROUND],
        "over": [BEGUN, aborted(None), SagaEnded(9, SagaState.COMPENSATED)],
    }
    found = {}
    for what, history in said.items():
        saga = fold(TWO, history)
        assert saga is not None
        found[what] = [decision_of(saga, round_).name for round_ in range(4)]
    assert found == {
        "voting": ["UNKNOWN", "PENDING", "UNKNOWN", "UNKNOWN"],
        "committed": ["UNKNOWN", "COMMIT", "UNKNOWN", "UNKNOWN"],
        "aborted": ["UNKNOWN", "ABORT", "UNKNOWN", "UNKNOWN"],
        "second round": ["UNKNOWN", "ABORT", "PENDING", "UNKNOWN"],
        "over": ["UNKNOWN", "ABORT", "ABORT", "ABORT"],
    }


def test_a_new_round_begins_with_nothing_of_the_old_one() -> None:
    """Its votes brought results that count no longer, and each branch begins anew."""
    history: list[Record] = [BEGUN, asked(0), asked(1), no(0, LOCK)]
    late = StepPrepared(5, 1, 1, 1, TIMING, Payload(b"twelve bytes"))
    back: list[Record] = [asked(1, COMPENSATE), StepCompensated(6, 1, 1, 1, TIMING)]
    before = fold(TWO, [*history, aborted(0, LOCK), late, *back])
    assert before is not None
    assert before.payload_bytes == 12
    after = evolve(TWO, before, RoundPlanned(7, 2, 20))
    assert (after.round, after.decision, after.turn, after.payload_bytes) == (2, None, None, 0)
    assert [(step.status.name, step.retry_at_ms, step.unknown) for step in after.steps] == [
        ("PENDING", 20, False),
        ("PENDING", 20, False),
    ]
