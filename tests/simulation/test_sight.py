"""The simulator can see: bugs that a real programmer could write are planted, and must be found."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from amends.barrier import verdict
from amends.outcomes import Verb
from amends_runtime.actors.saga_actor import SagaActor, Turn
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.actors.turns import Turns
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.saga import StepState
from amends_runtime.storage.memory import MemoryStore
from tests.simulation import participants
from tests.simulation.faults import OBSERVED
from tests.simulation.minimise import Less, minimise, run_less
from tests.simulation.world import Violation

WITHIN = 400
"""Schedules in which each of these must be found; most are in the first dozen."""


def first_finding() -> tuple[int, Violation] | None:
    """The first seed that breaks a rule, and the rule."""
    for seed in range(WITHIN):
        course = run_less(seed, Less())
        if course.violations:
            return seed, course.violations[0]
    return None


def assert_found(*rules: str) -> None:
    """One of these rules (any part of its words) is found broken."""
    found = first_finding()
    assert found is not None, "nothing was found"
    assert any(rule in found[1].rule for rule in rules), found


def test_an_acknowledgement_before_the_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saga that a client was told of is gone after a crash."""
    decide_one = Turns._decide_one

    def tell_too_early(self: Turns, actor: SagaActor, now_ms: int, epoch: int) -> Turn | None:
        turn = decide_one(self, actor, now_ms, epoch)
        if turn is not None and turn.transition is not None:
            view = SagaView(actor.plan, turn.decision.saga, turn.transition.version)
            turn.envelope.tell(Told(turn.decision.answer, view))
        return turn

    monkeypatch.setattr(Turns, "_decide_one", tell_too_early)
    assert_found("acknowledge", "shown is durable")


def test_effects_that_leave_before_the_commit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is on the wire, and its attempt is not on the disk."""
    decide_one = Turns._decide_one

    def send_too_early(self: Turns, actor: SagaActor, now_ms: int, epoch: int) -> Turn | None:
        turn = decide_one(self, actor, now_ms, epoch)
        if turn is not None and turn.transition is not None:
            self._perform(turn)
        return turn

    monkeypatch.setattr(Turns, "_decide_one", send_too_early)
    assert_found("persist before send")


def test_a_missing_fence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late Execute takes effect after its compensation."""

    def without_fence(question: verdict.Question, rows: verdict.Rows | None) -> verdict.Verdict:
        if rows is not None and question.verb is not Verb.COMPENSATE:
            rows = {verb: row for verb, row in rows.items() if verb is question.verb}
        said = verdict.judge(question, rows)
        if not isinstance(said, verdict.Answer):
            return said
        kept = tuple(w for w in said.writes if w.state is not verdict.RowState.FENCED)
        return verdict.Answer(said.outcome, kept)

    monkeypatch.setattr(participants, "judge", without_fence)
    assert_found("fence", "copy of an old call", "net zero")


def test_taking_an_unknown_outcome_for_a_failure_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that may have run is left alone going backward, and its effect remains."""
    owes = core.owes_compensation

    def only_what_is_known(plan: Plan, number: int, step: StepState) -> bool:
        return owes(plan, number, step) and step.executed

    monkeypatch.setattr(core, "owes_compensation", only_what_is_known)
    assert_found("may have run is compensated", "net zero")


def test_an_epoch_that_nobody_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced runtime writes on beside its successor."""
    monkeypatch.setattr(MemoryStore, "_check_epoch", _nothing)
    assert_found("in memory is the fold", "stuck and says so", "wakes it", "durable")


def test_a_saga_that_a_failed_commit_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped from memory, and nobody reads it again."""

    def forget(self: Supervisor, actors: Sequence[SagaActor], error: Exception) -> None:
        for actor in actors:
            self._leave(actor)

    monkeypatch.setattr(Supervisor, "_read_again", forget)
    assert_found("ends, or is stuck")


def test_a_pivot_that_does_not_bind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be undone was done, and the saga turned back all the same."""
    monkeypatch.setattr(core, "_is_no_return", _never)
    assert_found("net zero", "holds", "order")


def test_a_finding_is_shrunk_and_still_breaks_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the violation does not need is gone: sagas, incidents, and kinds of faults."""
    monkeypatch.setattr(core, "_is_no_return", _never)
    found = first_finding()
    assert found is not None
    seed, violation = found
    shrunk = minimise(seed, _nothing)
    assert shrunk is not None
    less, course = shrunk
    assert violation.rule in {other.rule for other in course.violations}
    assert not less.faults & set(OBSERVED)
    again = run_less(seed, less)
    assert again.trace.lines() == course.trace.lines()
    whole = run_less(seed, Less())
    assert len(again.trace.lines()) < len(whole.trace.lines())


def _nothing(argument: object) -> None:
    """Takes the place of what does something."""


def _never(plan: Plan, number: int) -> bool:
    """Takes the place of what says yes to some."""
    return False
