"""A wall clock that steps back between a wake-up and its decision."""

from __future__ import annotations

from amends_runtime.core.definition import Definition, Plan, Step
from amends_runtime.core.effects import CallParticipant
from amends_runtime.core.messages import Answered, StartSaga, Unknown, Wake
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import decide

PLAN = Plan(Definition(name="d", steps=(Step(name="a", participant="p", action="a"),)))


def test_a_wake_up_does_what_was_due_although_the_clock_has_stepped_back() -> None:
    """The timer fired once and is gone: if this message did nothing, nothing ever would."""
    start = StartSaga(saga_id="s", content_hash="", input=Payload())
    started = decide(PLAN, None, start, 1_000, 1)
    failed = decide(
        PLAN,
        started.saga,
        Answered(
            step=0,
            verb=Verb.EXECUTE,
            round=1,
            attempt=1,
            sent_at_ms=1_000,
            answered_at_ms=1_010,
            status="UNAVAILABLE",
            polls=0,
            outcome=Unknown("UNAVAILABLE"),
        ),
        1_010,
        1,
    )
    due_at_ms = failed.saga.steps[0].retry_at_ms
    woken = decide(PLAN, failed.saga, Wake(due_at_ms), due_at_ms - 5, 1)
    assert woken.effects == (CallParticipant(0, Verb.EXECUTE, 1, 2),)
    assert woken.records[0].at_ms == due_at_ms
    assert decide(PLAN, failed.saga, Wake(), due_at_ms - 5, 1).effects == ()
