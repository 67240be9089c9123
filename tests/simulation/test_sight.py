"""The simulator can see: bugs that a real programmer could write are planted, and must be found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import anyio
import msgspec
import pytest

from amends.barrier import verdict
from amends.outcomes import Verb
from amends_runtime.actors.saga_actor import SagaActor, Turn
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.actors.turns import Turns
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.core import saga as core
from amends_runtime.core import saga_fold
from amends_runtime.core import turn as core_turn
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import AbandonSaga, Answered, RetrySaga
from amends_runtime.core.saga import StepState
from amends_runtime.dispatch.lanes import Lane
from amends_runtime.ports import ParticipantAddress, Transport
from amends_runtime.storage.memory import MemoryStore
from tests.simulation import participants
from tests.simulation.faults import OBSERVED, Fault
from tests.simulation.minimise import Less, minimise, run_less
from tests.simulation.schedule import draw
from tests.simulation.world import Violation, run

Found = tuple[int, Violation]

RULES: dict[Any, Any] = core._RULES

WITHIN = 400
"""Schedules in which each of these must be found; most are in the first dozen."""

SLOW_WORK = {Fault.IN_PROGRESS: 0.6, Fault.GONE_AT_WORK: 1.0}
"""What some bugs need, so that they are found in few schedules."""


def first_finding(
    weather: Mapping[Fault, float] = MappingProxyType({}), *, outage: bool = False
) -> Found | None:
    """The first seed that breaks a rule, and the rule.

    `weather` is everybody's then; `outage`: of schedules that are a long one alone.
    """
    for seed in range(WITHIN * (10 if outage else 1)):  # of which one in a hundred is an outage
        schedule, faults = draw(seed)
        if outage and not schedule.is_outage:
            continue
        faults.weather.update(weather)
        course = run(schedule, faults)
        if course.violations:
            return seed, course.violations[0]
    return None


def assert_found(
    *rules: str, weather: Mapping[Fault, float] = MappingProxyType({}), outage: bool = False
) -> None:
    """One of these rules (any part of its words) is found broken."""
    found = first_finding(weather, outage=outage)
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
            seen = (question.verb, Verb.PREPARE)
            rows = {verb: row for verb, row in rows.items() if verb in seen}
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
    owes = saga_fold.owes_compensation

    def only_what_is_known(plan: Plan, number: int, step: StepState) -> bool:
        return owes(plan, number, step) and step.executed

    monkeypatch.setattr(saga_fold, "owes_compensation", only_what_is_known)
    assert_found("may have run is compensated", "net zero", "reverse dependency order")


def test_an_epoch_that_nobody_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced runtime writes on beside its successor."""
    monkeypatch.setattr(MemoryStore, "_check_epoch", _nothing)
    assert_found("in memory is the fold", "says so", "wakes it", "durable", "has ended", "is over")


def test_a_saga_that_a_failed_commit_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped from memory, and nobody reads it again."""

    def forget(self: Supervisor, actors: Sequence[SagaActor], error: Exception) -> None:
        for actor in actors:
            self._leaving.leave(actor)

    monkeypatch.setattr(Supervisor, "_read_again", forget)
    assert_found("ends, or is stuck")


def test_a_pivot_that_does_not_bind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be undone was done, and the saga turned back all the same."""
    monkeypatch.setattr(saga_fold, "_is_no_return", _never)
    assert_found("net zero", "holds", "order")


def test_a_call_that_outlives_its_abandoned_saga_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A poll waits for its participant, its saga is abandoned, and the lane keeps it."""
    monkeypatch.setattr(Lane, "forget", _nothing)
    monkeypatch.setattr(Lane, "_give_poll_up", _nothing)
    assert_found("a saga that has ended", "a saga, that is over", weather=SLOW_WORK)


def test_an_abandonment_of_what_is_not_stuck_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who did not force anything ends a saga that is well."""
    abandon = core._on_abandon

    def by_force(turn: core_turn.Turn, message: AbandonSaga) -> None:
        abandon(turn, msgspec.structs.replace(message, force=True))

    monkeypatch.setitem(RULES, AbandonSaga, by_force)
    assert_found("without force")


def test_an_answer_that_nothing_follows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """RETRIED, and no step is."""

    def only_say_so(turn: core_turn.Turn, message: RetrySaga) -> None:
        stuck = any(step.status is core.StepStatus.STUCK for step in turn.saga.steps)
        turn.answer = core.Answer.RETRIED if stuck else core.Answer.NOTHING_STUCK
        if turn.saga.ended:
            turn.answer = core.Answer.ENDED

    monkeypatch.setitem(RULES, RetrySaga, only_say_so)
    assert_found("answered holds", "ends a stuck saga")


def test_a_repeated_request_that_is_done_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was lost, the operator's library asks again, and the step is tried anew."""
    retry = core._on_retry

    def again(turn: core_turn.Turn, message: RetrySaga) -> None:
        retry(turn, msgspec.structs.replace(message, request_id=""))

    monkeypatch.setitem(RULES, RetrySaga, again)
    often_waiting = {Fault.OPERATION_REPEATED: 1.0, Fault.FAIL: 0.8}
    assert_found("repeated is done once", weather=often_waiting)


def test_a_move_that_drops_what_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that waited for the participant are in no lane any more."""
    move = Lane.move

    def drop(self: Lane, address: ParticipantAddress, transport: Transport | None) -> None:
        for entry in [entry for entry in self._entries.values() if entry.queued]:
            self._remove(entry)
        move(self, address, transport)

    monkeypatch.setattr(Lane, "move", drop)
    assert_found("wakes it", "ends, or is stuck")


def test_a_poll_that_holds_up_a_compensation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be sent, and its saga, which turned back, waits for as long as that lasts."""
    monkeypatch.setattr(Lane, "_give_poll_up", _nothing)
    assert_found("holds up no compensation", weather=SLOW_WORK)


def test_a_probe_that_uses_up_retries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage turns sagas back although nothing was tried but whether it is over."""
    answered = core._on_answered

    def as_any_other(turn: core_turn.Turn, message: Answered) -> None:
        answered(turn, msgspec.structs.replace(message, probe=False))

    monkeypatch.setitem(RULES, Answered, as_any_other)
    assert_found("uses up no retries", "turns back only after", outage=True)


def test_a_runtime_that_goes_on_without_its_store_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It could not be reopened after an operator's write, and nobody noticed."""

    async def never(self: MemoryStore) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(MemoryStore, "wait_lost", never)
    assert_found("could not be reopened")


def test_a_finding_is_shrunk_and_still_breaks_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the violation does not need is gone: sagas, incidents, and kinds of faults."""
    monkeypatch.setattr(saga_fold, "_is_no_return", _never)
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


def _nothing(*arguments: object) -> None:
    """Takes the place of what does something."""


def _never(plan: Plan, number: int) -> bool:
    """Takes the place of what says yes to some."""
    return False
