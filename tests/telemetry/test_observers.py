"""The history in the log: who reads it finds sagas, traces and steps, and what can be done."""

from typing import get_args

import msgspec
import structlog.testing

from amends_runtime.core import saga as core
from amends_runtime.core.definition import Definition, Plan, Step, normalise
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
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
from amends_runtime.core.tracing import Tracing
from amends_runtime.telemetry.observers import HistoryLog, Observers

LOST = Failure("ledger_lost", "secret words of a participant")
STEPS = ("reserve", "charge")
PLAN = Plan(
    normalise(
        Definition(
            name="order",
            steps=tuple(Step(name=name, participant="shop", action=name) for name in STEPS),
        )
    )
)
TRACING = Tracing("store-1")
CALLER = f"00-{'a' * 32}-{'b' * 16}-01"
STARTED = SagaStarted(
    1, "s-1", "order", "hash", "content", Payload(b"secret words"), traceparent=CALLER
)
TIMING = Timing(100, 250, "UNAVAILABLE", polls=2)


def logged(
    *records: Record, in_detail: bool = True, saga: core.Saga | None = None
) -> list[dict[str, object]]:
    """What is written about a turn with these records."""
    saga = saga or core.evolve(PLAN, None, STARTED)
    observers = Observers([HistoryLog(TRACING, in_detail=in_detail)])
    with structlog.testing.capture_logs() as entries:
        observers.turn_committed(PLAN, saga, saga, records)
    return [dict(entry) for entry in entries]


EVERY_RECORD: tuple[Record, ...] = (
    STARTED,
    AttemptStarted(1, 1, Verb.EXECUTE, 1, 2, 3),
    StepExecuted(1, 1, 1, 2, TIMING, Payload(b"secret words")),
    StepRejected(1, 1, 1, 2, TIMING, LOST),
    StepCompensated(1, 1, 1, 2, TIMING),
    AttemptFailed(1, 1, Verb.EXECUTE, 1, 2, TIMING, LOST),
    AttemptLost(1, 1, Verb.EXECUTE, 1, 2, 3),
    AttemptWithdrawn(1, 1, Verb.EXECUTE, 1, 2),
    StepGivenUp(1, 1, 300_000),
    StepStuck(1, 1, Verb.EXECUTE, LOST),
    CancelRequested(1, "ada", "secret words"),
    SagaTurnedBack(1, TurnCause.CANCELLED, None, Failure("CANCELLED", "secret words")),
    OperatorActed(1, OperatorAction.RETRY, 1, "ada", "secret words", 2),
    SagaEnded(1, SagaState.ABANDONED),
    StepPrepared(1, 1, 1, 2, TIMING, Payload(b"secret words")),
    VoteRefused(1, 1, 1, 2, TIMING, LOST),
    DecisionMade(1, CommitDecision.COMMIT, 1),
    HeuristicReported(1, 1, Verb.EXECUTE, 1, 2, TIMING, None, LOST),
    RoundPlanned(1, 2, 701),
    SagaEnded(1, SagaState.MIXED),
)


def test_every_line_names_the_saga_its_trace_and_its_step() -> None:
    """The trace is the one in the spans, which is the caller's where that is joined."""
    entries = logged(*EVERY_RECORD)
    assert len(entries) == len(EVERY_RECORD) - 1  # that an attempt starts is no news
    for entry in entries:
        assert (entry["saga_id"], entry["trace_id"]) == ("s-1", "a" * 32), entry
    steps = {str(entry["event"]): entry.get("step") for entry in entries}
    of_sagas = {"saga_started", "saga_ended", "saga_turned_back", "cancel_requested"}
    of_sagas |= {"decision_made", "round_planned", "saga_mixed"}
    assert {event for event, step in steps.items() if step is None} == of_sagas
    assert set(steps.values()) == {None, "charge"}


def test_a_trace_that_is_not_joined_has_its_own_id() -> None:
    """As in the spans."""
    apart = Tracing("store-1", join=False)
    saga = core.evolve(PLAN, None, STARTED)
    with structlog.testing.capture_logs() as entries:
        HistoryLog(apart).turn_committed(PLAN, saga, saga, [StepGivenUp(1, 1, 5)])
    assert entries[0]["trace_id"] == apart.trace_id("s-1", CALLER) != "a" * 32


def test_no_line_has_anybody_s_words_or_a_payload() -> None:
    """What a participant or a person says in words of their own stays in the history."""
    assert "secret" not in str(logged(*EVERY_RECORD))


def test_without_detail_there_is_what_a_person_may_have_to_see_to() -> None:
    """The rest would be written for nobody."""
    entries = logged(*EVERY_RECORD, in_detail=False)
    assert [(entry["log_level"], entry["event"]) for entry in entries] == [
        ("warning", "step_given_up"),
        ("error", "step_stuck"),
        ("info", "cancel_requested"),
        ("info", "saga_turned_back"),
        ("info", "operator_acted"),
        ("error", "heuristic_reported"),
        ("error", "saga_mixed"),
    ]


def test_there_is_an_example_of_every_record() -> None:
    """So that none is forgotten here."""
    assert {type(record) for record in EVERY_RECORD} == set(get_args(Record))


def test_an_attempt_s_line_tells_how_it_went() -> None:
    """Which attempt, its status, how long it took, how often it was asked again."""
    executed, failed = logged(
        StepExecuted(1, 1, 1, 2, TIMING, Payload(b"")),
        AttemptFailed(1, 1, Verb.EXECUTE, 1, 2, TIMING, LOST, probe=True),
    )
    for entry in (executed, failed):
        assert (entry["round"], entry["attempt"], entry["status"]) == (1, 2, "UNAVAILABLE")
        assert (entry["took_ms"], entry["polls"]) == (150, 2)
    assert (failed["reason"], failed["probe"]) == ("ledger_lost", True)


def test_a_stuck_compensation_is_an_error_that_says_what_can_be_done() -> None:
    """The saga has turned back, so cancelling it is no advice."""
    [entry] = logged(StepStuck(1, 1, Verb.COMPENSATE, LOST))
    assert (entry["log_level"], entry["event"]) == ("error", "step_stuck")
    assert (entry["step"], entry["verb"], entry["reason"]) == (
        "charge",
        "COMPENSATE",
        "ledger_lost",
    )
    assert entry["hint"] == "amends get s-1 shows why; amends retry s-1 tries again"


def test_a_stuck_step_on_the_way_forward_names_cancel_where_it_can_work() -> None:
    """Before the point of no return it turns the saga back; later it would be refused."""
    before = core.evolve(PLAN, None, STARTED)
    past = msgspec.structs.replace(before, past_no_return=True)
    backward = msgspec.structs.replace(before, phase=core.Phase.BACKWARD)
    hints = {}
    for name, saga in (("before", before), ("past", past), ("backward", backward)):
        [entry] = logged(StepStuck(1, 0, Verb.EXECUTE, LOST), saga=saga)
        assert entry["step"] == "reserve"
        hints[name] = str(entry["hint"])
    retry = "amends get s-1 shows why; amends retry s-1 tries again"
    assert hints["before"] == f"{retry}, and amends cancel s-1 turns it back"
    assert hints["past"] == hints["backward"] == retry


def test_a_turn_back_names_its_step_and_reason() -> None:
    """And no step where there is none."""
    by_step, by_hand = logged(
        SagaTurnedBack(1, TurnCause.REJECTED, 1, LOST),
        SagaTurnedBack(1, TurnCause.CANCELLED, None, Failure("CANCELLED", "secret words")),
    )
    assert (by_step["cause"], by_step["step"], by_step["reason"]) == (
        "REJECTED",
        "charge",
        "ledger_lost",
    )
    assert by_hand["cause"] == "CANCELLED"
    assert "step" not in by_hand
    assert "words" not in f"{by_step}{by_hand}"


def test_what_an_operator_did_is_written_with_who() -> None:
    """Why is in the history, for it is in people's words."""
    retried, abandoned = logged(
        OperatorActed(1, OperatorAction.RETRY, 1, "ada", "secret words", 2),
        OperatorActed(1, OperatorAction.ABANDON, None, "ada", "secret words"),
    )
    assert (retried["action"], retried["step"], retried["author"]) == ("RETRY", "charge", "ada")
    assert abandoned["action"] == "ABANDON"
    assert "step" not in abandoned
    assert "words" not in f"{retried}{abandoned}"


# -- two-phase commits -----------------------------------------------------------------------------


def committing() -> core.Saga:
    """A two-phase commit that is decided."""
    saga = core.evolve(PLAN, None, STARTED)
    return msgspec.structs.replace(saga, round=1, decision=CommitDecision.COMMIT)


def test_a_decision_says_which_one_and_an_abort_why() -> None:
    """In detail only: an abort is no accident."""
    commit, abort = logged(
        DecisionMade(1, CommitDecision.COMMIT, 1),
        DecisionMade(1, CommitDecision.ABORT, 2, TurnCause.REJECTED, 1, LOST),
    )
    assert (commit["log_level"], commit["event"]) == ("debug", "decision_made")
    assert (commit["decision"], commit["round"], "cause" in commit) == ("COMMIT", 1, False)
    assert (abort["decision"], abort["round"], abort["step"]) == ("ABORT", 2, "charge")
    assert (abort["cause"], abort["reason"]) == ("REJECTED", "ledger_lost")


def test_a_broken_vote_is_an_error_and_one_that_happens_to_agree_a_warning() -> None:
    """Both say what was decided and what the participant did."""
    attempt = (1, Verb.EXECUTE, 1, 2, TIMING)
    nobody_knows, broken, agrees, undone = logged(
        HeuristicReported(1, *attempt, None, LOST),
        HeuristicReported(1, *attempt, False, LOST),
        HeuristicReported(1, *attempt, True, LOST),
        HeuristicReported(1, 1, Verb.COMPENSATE, 1, 2, TIMING, False, LOST),
        saga=committing(),
    )
    entries = (nobody_knows, broken, agrees, undone)
    assert [(each["decision"], each["did"]) for each in entries] == [
        ("COMMIT", "UNKNOWN"),
        ("COMMIT", "ABORT"),
        ("COMMIT", "COMMIT"),
        ("ABORT", "ABORT"),
    ]
    levels = [each["log_level"] for each in entries]
    assert levels == ["error", "error", "warning", "warning"]
    assert {each["event"] for each in entries} == {"heuristic_reported"}
    assert str(broken["hint"]).startswith("settle it by hand; amends get s-1 ")


def test_a_branch_that_does_not_acknowledge_needs_an_operator_and_is_not_stuck() -> None:
    """It is told again and again: a warning, and no advice to retry or to cancel."""
    [entry] = logged(StepStuck(1, 1, Verb.EXECUTE, LOST), saga=committing(), in_detail=False)
    assert (entry["log_level"], entry["event"]) == ("warning", "branch_needs_operator")
    assert (entry["step"], entry["verb"], entry["reason"]) == ("charge", "EXECUTE", "ledger_lost")
    assert "cancel" not in str(entry["hint"])


def test_a_result_that_was_left_out_is_a_warning() -> None:
    """Whatever the level; a commit with its result is a detail."""
    failure = Failure("RESULT_TOO_LARGE", "4 bytes, and 3 are the most")
    record = StepExecuted(1, 1, 1, 1, Timing(1, 2), Payload(), failure)
    usual = StepExecuted(1, 1, 1, 1, Timing(1, 2), Payload(b"res"))
    for in_detail in (False, True):
        [entry] = logged(record, saga=committing(), in_detail=in_detail)
        assert (entry["log_level"], entry["event"]) == ("warning", "result_left_out")
        assert (entry["step"], entry["reason"]) == ("charge", "RESULT_TOO_LARGE")
        assert len(logged(usual, saga=committing(), in_detail=in_detail)) == in_detail


def test_a_mixed_end_is_an_error_whatever_the_level() -> None:
    """It has the decision that not all have followed; any other end is a detail."""
    [entry] = logged(SagaEnded(1, SagaState.MIXED), saga=committing(), in_detail=False)
    assert (entry["log_level"], entry["event"]) == ("error", "saga_mixed")
    assert entry["decision"] == "COMMIT"
    assert logged(SagaEnded(1, SagaState.COMPLETED), saga=committing(), in_detail=False) == []
