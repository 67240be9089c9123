"""The runtime is killed at every moment of a saga's course."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import amends
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.testing import (
    CrashMatters,
    LostReply,
    NotEnded,
    SagaTest,
    SagaTestError,
    Slow,
    Status,
    check_every_crash,
    every_crash,
)
from tests.testing.orders import ORDER

IMPATIENT = (
    amends.Definition("impatient")
    .step("reserve", "inventory", "reserve")
    .step("charge", "payments", "charge", timeout_s=5, retry=amends.Retry(give_up_after_s=15))
)
"""An order whose charge is given up soon."""

QUICK = amends.Definition("quick").step("one", "a", "do").step("two", "b", "do")


def refused_charge(test: SagaTest) -> None:
    """The card is declined."""
    test.participant("payments").execute("charge").rejects("card_declined")


def refused_pivot(test: SagaTest) -> None:
    """There is no address, and the replies of two other calls get lost."""
    test.participant("payments").execute("charge").answers(LostReply())
    test.participant("payments").compensate("charge").answers(LostReply())
    test.participant("shipping").execute("ship").rejects("no_address")


def given_up_charge(test: SagaTest) -> None:
    """The charge takes effect, and nobody ever hears of it."""
    test.participant("payments").execute("charge").answers(Slow(7), Status("UNKNOWN"))
    test.participant("payments").compensate("charge").answers(Status(), None)


def test_every_moment_of_a_course_is_tried() -> None:
    """Before and after each of the commits and calls: all are counted, and none matters."""
    report = check_every_crash(ORDER, {"n": 1})
    assert report.state is amends.SagaState.COMPLETED
    assert report.effects == ("charge", "confirm", "reserve", "ship")
    # Six commits and five calls, each with a moment before and one after.
    assert len(report.crashes) == len(set(report.crashes)) == 22
    assert report.crashes[0].startswith("moment 1, before the commit of SagaStarted")
    assert "moment 3, before execute quote (attempt 1) reaches inventory" in report.crashes
    assert "moment 4, after inventory has answered execute quote (attempt 1)" in report.crashes
    assert report.crashes[-1].endswith("after the commit of StepExecuted(confirm), SagaEnded")


@pytest.mark.parametrize(
    ("definition", "script"),
    [(ORDER, refused_charge), (ORDER, refused_pivot), (IMPATIENT, given_up_charge)],
    ids=["refused-charge", "refused-pivot", "given-up-charge"],
)
def test_no_crash_matters_when_things_go_wrong(
    definition: amends.Definition, script: Callable[[SagaTest], None]
) -> None:
    """A refusal, lost replies, an effect that comes after its deadline: the end is the same."""
    report = check_every_crash(definition, {"n": 1}, script)
    assert report.state is amends.SagaState.COMPENSATED
    assert report.effects == ()
    assert len(report.crashes) > 10


def test_a_crash_during_the_recovery_does_not_matter() -> None:
    """Killed a second time, at every moment after the first."""

    def refused(test: SagaTest) -> None:
        test.participant("b").execute("do").rejects("no")

    once = check_every_crash(QUICK, None, refused)
    twice = check_every_crash(QUICK, None, refused, twice=True)
    assert twice.state is amends.SagaState.COMPENSATED
    assert twice.effects == ()
    assert len(twice.crashes) > len(once.crashes) ** 2 / 3


def test_a_body_of_ones_own_is_run_at_every_moment() -> None:
    """The test sees its own crash, and asserts what it likes."""
    killed = 0
    for test in every_crash(QUICK):
        with test:
            saga = test.start()
            saga.run_until_step("one", amends.StepState.EXECUTED)
            saga.cancel()
            assert saga.result().state is amends.SagaState.COMPENSATED
            assert test.effects == []
            killed += len(test.crashes)
    assert killed > 8


def test_a_crash_that_matters_is_found_and_named() -> None:
    """A handler that refuses what it is asked a second time makes a crash matter."""

    def forgetful(test: SagaTest) -> None:
        @test.participant("a").execute("do")
        def do(call: amends.Call) -> None:
            if call.attempt > 1:
                raise amends.Rejected("not_again")

    with pytest.raises(CrashMatters, match="without a crash COMPLETED") as caught:
        check_every_crash(QUICK, None, forgetful)
    (note,) = caught.value.__notes__
    assert note.startswith("the runtime was killed at moment 2, after the commit of SagaStarted")


def test_one_crash_can_be_repeated() -> None:
    """By the number that the note names."""
    with SagaTest(QUICK, crash_at=(4,)) as test:
        assert test.run().completed
        (crash,) = test.crashes
        assert crash == "moment 4, after a has answered execute one (attempt 1)"
        assert test.course == ["execute one", "execute one", "execute two"]
        assert test.effects == ["one", "two"]


def test_a_kill_leaves_what_was_durable_and_nothing_else() -> None:
    """Before a commit nothing is known, after it the attempt is, though its call never left."""

    def lost_and_asked(moment: int) -> tuple[int, int]:
        with SagaTest(QUICK, crash_at=(moment,)) as test:
            assert test.run().completed
            history = test.saga().history()
            lost = [one for one in history if one.kind is amends.RecordKind.ATTEMPT_LOST]
            return len(lost), test.course.count("execute one")

    before_commit, after_commit, before_call, after_call = map(lost_and_asked, (1, 2, 3, 4))
    assert before_commit == (0, 1)
    assert after_commit == (1, 1)
    assert before_call == (1, 1)
    assert after_call == (1, 2)


def test_a_runtime_that_recovers_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that is planted in the engine: the saga stands still, and the test says where."""

    async def recovers_nothing(_: Supervisor) -> None:
        """Leaves everything as it is."""

    monkeypatch.setattr(Supervisor, "run_recovery", recovers_nothing)
    with pytest.raises(NotEnded, match="one: EXECUTING") as caught:
        check_every_crash(QUICK, limit_s=60)
    # After moment 2 the start, which was not answered, is asked again and brings the saga in.
    assert "killed at moment 3" in caught.value.__notes__[0]


def test_a_start_that_a_crash_interrupts_is_asked_again() -> None:
    """As a client asks again, under the same id: the saga is started once."""
    for moment in (1, 2):
        with SagaTest(QUICK, crash_at=(moment,)) as test:
            assert test.run().completed
            assert len(test.saga().history()) > 0


def test_a_test_that_is_not_run_is_said() -> None:
    """Each is to be entered; without a saga there is no moment at which to crash."""
    with pytest.raises(SagaTestError, match="in a `with` block"):
        list(every_crash(QUICK))

    tests = every_crash(QUICK)
    with next(tests) as test:
        test.run()
    with next(tests):
        pass
    with pytest.raises(SagaTestError, match="take the same course"):
        next(tests)
