"""What is wrong with a script or a test is said where it is written, with what to do."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
from pathlib import Path

import grpc
import pytest
import structlog

import amends
from amends_runtime.testing import (
    InsideEventLoop,
    InvalidScript,
    LostReply,
    NotEnded,
    SagaTest,
    SagaTestError,
    Slow,
    Status,
    UnusedScript,
)
from tests.testing.orders import ORDER


def test_an_unknown_participant_is_refused_with_the_nearest() -> None:
    """A typo is not a script for nobody."""
    with SagaTest(ORDER) as test, pytest.raises(InvalidScript, match="did you mean 'payments'"):
        test.participant("paymets")


def test_an_unknown_action_is_refused_with_the_nearest() -> None:
    """Actions are those that the definitions ask the participant for."""
    with SagaTest(ORDER) as test, pytest.raises(InvalidScript, match="did you mean 'charge'"):
        test.participant("payments").execute("chrage")


def test_a_compensation_that_never_comes_is_refused() -> None:
    """Nobody compensates a pivot, so there is nothing to script."""
    with SagaTest(ORDER) as test, pytest.raises(InvalidScript, match="never compensated"):
        test.participant("shipping").compensate("ship")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (amends.Rejected, "not an answer"),
        (ValueError("x"), "not an answer"),
        (print, "use it as a handler"),
        (LostReply(amends.InProgress(1)), "what decides"),
        (LostReply(Status()), "what decides"),
    ],
    ids=["class", "exception", "function", "lost-progress", "lost-status"],
)
def test_what_is_no_answer_is_refused(answer: object, what: str) -> None:
    """At the line where it is scripted."""
    with SagaTest(ORDER) as test, pytest.raises(InvalidScript, match=what):
        test.participant("payments").execute("charge").answers(answer)


def test_what_cannot_be_sent_is_refused() -> None:
    """A result is a payload; what cannot be one is the SDK's own error."""
    with SagaTest(ORDER) as test, pytest.raises(amends.PayloadError):
        test.participant("payments").execute("charge").answers({1, 2})


def test_wrong_words_are_refused() -> None:
    """Statuses, times, and how long something takes."""
    with pytest.raises(InvalidScript, match="did you mean 'UNAVAILABLE'"):
        Status("UNAVAILABEL")
    with pytest.raises(InvalidScript, match="did you mean 'UNAVAILABLE'"):
        Status("unavailable")
    with pytest.raises(InvalidScript, match="not a gRPC error status"):
        Status("OK")
    with pytest.raises(InvalidScript) as all_named:
        Status("NOPE")
    for code in grpc.StatusCode:
        assert (code.name in str(all_named.value)) is (code is not grpc.StatusCode.OK)
    with pytest.raises(InvalidScript, match="finite seconds"):
        Slow(-1)
    with SagaTest(ORDER) as test:
        charge = test.participant("payments").execute("charge")
        with pytest.raises(InvalidScript, match="at least once"):
            charge.fails(times=0)
        with pytest.raises(InvalidScript, match="at least one answer"):
            charge.answers()
        with pytest.raises(InvalidScript, match="cannot be refused"):
            test.participant("payments").compensate("charge").rejects("no")


def test_what_is_no_definition_is_refused() -> None:
    """A file's name says how it is read."""
    for file in ("trip.yaml", Path("trip.yaml")):
        with pytest.raises(TypeError, match=r"amends\.Definition\.from_file\('trip\.yaml'\)"):
            SagaTest(file)  # type: ignore[arg-type]  # that is it
    with pytest.raises(TypeError, match="not a dict"):
        SagaTest({"name": "trip"})  # type: ignore[arg-type]  # as above


def test_a_handler_with_a_transaction_is_refused() -> None:
    """There is no database here, and the message says where there is one."""
    with SagaTest(ORDER) as test, pytest.raises(InvalidScript, match=r"amends\.serve"):

        @test.participant("payments").execute("charge")  # type: ignore[type-var]  # that is it
        def charge(call: amends.Call, tx: amends.Transaction) -> None: ...


def test_a_handler_that_answers_nonsense_fails_the_test() -> None:
    """What a script may not say, a handler may not return."""
    with SagaTest(ORDER) as test:

        @test.participant("payments").execute("charge")
        def charge(call: amends.Call) -> object:
            return amends.Rejected

        with pytest.raises(InvalidScript, match="not an answer"):
            test.run()


def test_an_unused_script_fails_the_test() -> None:
    """A test whose script was never asked for does not test what it says."""

    def a_test() -> None:
        with SagaTest(ORDER) as test:
            test.participant("payments").execute("charge").rejects("card_declined")
            test.participant("shipping").execute("ship").rejects("no_address")
            test.run()

    with pytest.raises(UnusedScript, match="strict=False") as caught:
        a_test()
    assert caught.value.scripts == ('shipping.execute("ship")',)


def test_an_unused_script_can_be_meant() -> None:
    """With strict=False it is only told."""
    with SagaTest(ORDER, strict=False) as test:
        test.participant("shipping").execute("ship").rejects("no_address")
        assert test.unused == ('shipping.execute("ship")',)


def test_a_failing_test_is_not_told_of_unused_scripts_as_well() -> None:
    """The test's own error is the one that counts."""

    def a_test() -> None:
        with SagaTest(ORDER) as test:
            test.participant("shipping").execute("ship").rejects("no_address")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        a_test()


def test_an_invalid_definition_is_refused_with_everything_that_is_wrong() -> None:
    """As registration would, and before anything runs."""
    wrong = (
        amends.Definition("wrong")
        .pivot("one", "a", "do")
        .pivot("two", "a", "do")
        .step("three", "a", "do", timeout_s=100_000_000)
    )
    with pytest.raises(amends.InvalidDefinition) as caught:
        SagaTest(wrong)
    assert len(caught.value.problems) >= 2
    assert "'two'" in str(caught.value)
    assert "'three'" in str(caught.value)


def test_a_test_is_about_something() -> None:
    """No definition, or two of one name, is a mistake."""
    with pytest.raises(TypeError, match="at least one"):
        SagaTest()
    with pytest.raises(ValueError, match="same name"):
        SagaTest(ORDER, ORDER)


def test_it_is_used_inside_its_block_and_once() -> None:
    """Before and after there is no world."""
    test = SagaTest(ORDER)
    with pytest.raises(RuntimeError, match="inside its block"):
        test.run()
    with test:
        saga = test.start()
        test.finish()
    with pytest.raises(RuntimeError, match="inside its block"):
        test.run()
    assert saga.get().completed
    with pytest.raises(SagaTestError, match="has ended"):
        saga.cancel()
    with pytest.raises(RuntimeError, match="make another one"), test:
        pass


async def test_inside_an_event_loop_it_says_what_to_do() -> None:
    """It drives a loop of its own; in a thread that is possible."""
    with pytest.raises(InsideEventLoop, match="to_thread"), SagaTest(ORDER):
        pass

    def in_a_thread() -> bool:
        with SagaTest(ORDER) as test:
            return test.run().completed

    assert await asyncio.to_thread(in_a_thread)


def test_a_saga_that_never_ends_says_where_it_stands() -> None:
    """Ten thousand calls are a loop, and the message names the step and how often it was asked."""
    with SagaTest(ORDER) as test:
        test.participant("orders").execute("confirm").answers(amends.InProgress(1))
        with pytest.raises(NotEnded) as caught:
            test.run()
    said = str(caught.value)
    assert "saga 'saga-1' was to end" in said
    assert "too many calls" in said
    assert "confirm: EXECUTING, attempt 1 to execute, asked 9996 times, a call is open" in said


def test_a_limit_of_time_can_be_set() -> None:
    """The message says who is down, and what his breaker does."""
    with SagaTest(ORDER, limit_s=600) as test:
        test.participant("shipping").down()
        with pytest.raises(NotEnded) as caught:
            test.run()
    said = str(caught.value)
    assert "600 s are the limit" in said
    assert "saga saga-1 (order) is RUNNING" in said
    assert "last error UNAVAILABLE: participant shipping is down" in said
    assert "participant shipping is down; its breaker is OPEN" in said


def test_what_a_runtime_refuses_is_refused_as_a_client_is() -> None:
    """The SDK's errors, with reasons for programs."""
    with SagaTest(ORDER) as test:
        saga = test.start({"n": 1}, saga_id="one")
        assert test.start({"n": 1}, saga_id="one").saga_id == saga.saga_id
        with pytest.raises(amends.AlreadyExists) as taken:
            test.start({"n": 2}, saga_id="one")
        assert taken.value.reason == "SAGA_EXISTS_WITH_OTHER_CONTENT"
        with pytest.raises(amends.InvalidRequest, match="reserved for child sagas"):
            test.start(saga_id="a/b")
        with pytest.raises(amends.NotFound, match="did you mean 'order'"):
            test.start(definition="oder")
        with pytest.raises(KeyError, match="did you mean 'one'"):
            test.saga("onee")
        with pytest.raises(KeyError, match="has no step 'chrage'"):
            saga.run_until_step("chrage", amends.StepState.EXECUTED)
        assert saga.result().completed
        with pytest.raises(amends.WrongState) as completed:
            saga.cancel()
        assert completed.value.reason == "SAGA_COMPLETED"
        with pytest.raises(amends.WrongState):
            saga.retry()
        with pytest.raises(amends.WrongState):
            saga.abandon(force=True)


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """No task, no warning, no word on the terminal; structlog is as it was."""
    structlog.reset_defaults()  # a test before this one may have captured logs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SagaTest(ORDER) as test:
            payments = test.participant("payments")
            payments.execute("charge").answers(Slow(100))
            saga = test.start()
            test.advance(3)
            payments.down()
            test.advance(30)
            test.restart()
            test.start()
            assert saga.get().state is amends.SagaState.RUNNING
        gc.collect()
    assert not structlog.is_configured()
    assert capsys.readouterr() == ("", "")


def test_a_long_outage_does_not_bury_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """That the breaker opens and closes is said; its probes are details, which DEBUG shows."""
    structlog.reset_defaults()  # a test before this one may have captured logs

    def said() -> list[str]:
        records = list(caplog.records)
        caplog.clear()
        return [one.levelname for one in records if "breaker_changed" in one.getMessage()]

    for level, probes in ((logging.INFO, False), (logging.DEBUG, True)):
        caplog.set_level(level, "amends_runtime")
        with SagaTest(ORDER) as test:
            test.participant("payments").down(for_s=3600)
            assert test.run().completed
        levels = said()
        assert [one for one in levels if one != "DEBUG"] == ["WARNING", "INFO"]
        assert (len(levels) > 10) is probes
