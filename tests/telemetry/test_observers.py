"""The history in the log: who reads it finds steps by name, and what can be done."""

import structlog.testing

from amends_runtime.core.records import (
    AttemptFailed,
    Failure,
    OperatorActed,
    OperatorAction,
    Record,
    SagaTurnedBack,
    StepStuck,
    Timing,
    TurnCause,
    Verb,
)
from amends_runtime.telemetry.observers import HistoryLog, Observers

LOST = Failure("ledger_lost", "words of a participant")
STEPS = ("reserve", "charge")


def logged(*records: Record) -> list[dict[str, object]]:
    """What is written about a turn with these records."""
    with structlog.testing.capture_logs() as entries:
        Observers([HistoryLog()]).turn_committed("s-1", 3, records, STEPS)
    return [dict(entry) for entry in entries]


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


def test_a_stuck_step_on_the_way_forward_names_cancel() -> None:
    """Before the pivot, which the log does not know of, it turns the saga back."""
    [entry] = logged(StepStuck(1, 0, Verb.EXECUTE, LOST))
    assert entry["step"] == "reserve"
    assert "amends cancel s-1 turns it back before its pivot" in str(entry["hint"])


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
    assert (by_hand["cause"], by_hand["step"]) == ("CANCELLED", None)
    assert "words" not in f"{by_step}{by_hand}"


def test_what_an_operator_did_is_written_with_who() -> None:
    """Why is in the history, for it is in people's words."""
    retried, abandoned = logged(
        OperatorActed(1, OperatorAction.RETRY, 1, "ada", "secret words", 2),
        OperatorActed(1, OperatorAction.ABANDON, None, "ada", "secret words"),
    )
    assert (retried["action"], retried["step"], retried["author"]) == ("RETRY", "charge", "ada")
    assert (abandoned["action"], abandoned["step"]) == ("ABANDON", None)
    assert "words" not in f"{retried}{abandoned}"


def test_a_failed_attempt_names_its_step() -> None:
    """By name, since numbers mean nothing outside the definition."""
    [entry] = logged(AttemptFailed(1, 1, Verb.EXECUTE, 1, 2, Timing(1, 2, "UNAVAILABLE"), LOST))
    assert (entry["step"], entry["attempt"]) == ("charge", 2)
