"""`evolve` refuses a record that cannot follow the history: a damaged or foreign one is noticed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from amends_runtime.core.definition import Definition, Kind, Plan, Step
from amends_runtime.core.messages import NotSent, StartSaga, Wake
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    Failure,
    Record,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepGivenUp,
    StepRejected,
    StepStuck,
    Timing,
    TurnCause,
    Verb,
)
from amends_runtime.core.saga import decide, evolve, fold
from amends_runtime.errors import IllegalMessage, IllegalRecord

EXECUTE, COMPENSATE = Verb.EXECUTE, Verb.COMPENSATE
NO = Failure("NO")
TIMING = Timing(1, 2)
TURNED = SagaTurnedBack(9, TurnCause.CANCELLED, None, NO)


def plan(*kinds: Kind) -> Plan:
    """A list of steps of these kinds."""
    steps = (
        Step(name=f"s{number}", participant="shop", action="act", kind=kind)
        for number, kind in enumerate(kinds)
    )
    return Plan(Definition(name="order", steps=tuple(steps)))


TWO = plan(Kind.COMPENSATABLE, Kind.PIVOT)
GATE = plan(Kind.COMPENSATABLE, Kind.RETRIABLE)
BEGUN = SagaStarted(1, "s-1", "order", TWO.content_hash, "c", Payload())
FIRST = AttemptStarted(2, 0, EXECUTE, 1, 1, 1)
DONE = StepExecuted(3, 0, 1, 1, TIMING, Payload())
SECOND = AttemptStarted(3, 1, EXECUTE, 1, 1, 1)
UNDO = AttemptStarted(10, 0, COMPENSATE, 1, 1, 1)

ILLEGAL: dict[str, tuple[Plan, Sequence[Record], Record]] = {
    "anything before the start": (TWO, [], FIRST),
    "a second start": (TWO, [BEGUN], BEGUN),
    "an attempt while one is open": (TWO, [BEGUN, FIRST], AttemptStarted(3, 0, EXECUTE, 1, 2, 1)),
    "an attempt number again": (
        TWO,
        [BEGUN, FIRST, AttemptLost(3, 0, EXECUTE, 1, 1, 1)],
        AttemptStarted(3, 0, EXECUTE, 1, 1, 1),
    ),
    "a forward attempt after turning back": (TWO, [BEGUN, TURNED], FIRST),
    "an end of an attempt that was never started": (TWO, [BEGUN], DONE),
    "an end of another attempt": (
        TWO,
        [BEGUN, FIRST],
        StepExecuted(3, 0, 1, 2, TIMING, Payload()),
    ),
    "an end of another round": (TWO, [BEGUN, FIRST], StepRejected(3, 0, 2, 1, TIMING, NO)),
    "Done twice": (TWO, [BEGUN, FIRST, DONE], DONE),
    "a compensation's end for an execution": (
        TWO,
        [BEGUN, FIRST],
        StepCompensated(3, 0, 1, 1, TIMING),
    ),
    "an execution's end for a compensation": (TWO, [BEGUN, FIRST, DONE, TURNED, UNDO], DONE),
    "a failure of the other verb": (
        TWO,
        [BEGUN, FIRST],
        AttemptFailed(3, 0, COMPENSATE, 1, 1, TIMING, NO),
    ),
    "a loss of the other verb": (TWO, [BEGUN, FIRST], AttemptLost(3, 0, COMPENSATE, 1, 1, 1)),
    "a withdrawal of the other verb": (
        TWO,
        [BEGUN, FIRST],
        AttemptWithdrawn(3, 0, COMPENSATE, 1, 1),
    ),
    "stuck while an attempt is open": (TWO, [BEGUN, FIRST], StepStuck(3, 0, EXECUTE, NO)),
    "given up while an attempt is open": (TWO, [BEGUN, FIRST], StepGivenUp(3, 0, 5)),
    "turning back twice": (TWO, [BEGUN, TURNED], TURNED),
    "turning back past the pivot's first attempt": (
        TWO,
        [BEGUN, FIRST, DONE, SECOND],
        TURNED,
    ),
    "turning back past a retriable's first attempt": (GATE, [BEGUN, FIRST, DONE, SECOND], TURNED),
    "completed while steps are left": (TWO, [BEGUN], SagaEnded(3, SagaState.COMPLETED)),
    "completed after turning back": (TWO, [BEGUN, TURNED], SagaEnded(9, SagaState.COMPLETED)),
    "compensated without turning back": (TWO, [BEGUN], SagaEnded(3, SagaState.COMPENSATED)),
    "an end that is none": (TWO, [BEGUN], SagaEnded(3, SagaState.STUCK)),
    "compensated while a compensation is owed": (
        TWO,
        [BEGUN, FIRST, DONE, TURNED],
        SagaEnded(9, SagaState.COMPENSATED),
    ),
    "anything after the end": (
        TWO,
        [BEGUN, TURNED, SagaEnded(9, SagaState.COMPENSATED)],
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


def test_an_empty_history_is_no_saga() -> None:
    """Nothing folds to nothing."""
    assert fold(TWO, []) is None


def test_a_saga_begins_with_its_start() -> None:
    """Any other first message is a bug of the runtime, and is named."""
    with pytest.raises(IllegalMessage, match="Wake"):
        decide(TWO, None, Wake(), 1, 1)


def test_a_message_of_no_kind_is_refused() -> None:
    """What the table of rules does not know cannot be sent."""
    saga = decide(TWO, None, StartSaga(saga_id="s-1", content_hash="c", input=Payload()), 1, 1).saga
    with pytest.raises(IllegalMessage, match=r"s-1.*RUNNING.*str"):
        decide(TWO, saga, "boo", 2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, 2])
def test_a_message_for_a_step_that_does_not_exist_is_refused(step: int) -> None:
    """A step number outside of the definition is a bug of the runtime, and is named."""
    saga = decide(TWO, None, StartSaga(saga_id="s-1", content_hash="c", input=Payload()), 1, 1).saga
    with pytest.raises(IllegalMessage, match=f"NotSent of step {step}"):
        decide(TWO, saga, NotSent(step=step, verb=EXECUTE, round=1, attempt=1), 2, 1)
