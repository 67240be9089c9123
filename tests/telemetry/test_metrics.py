"""What is counted of a saga: from the records of each course that it can take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from amends_runtime.core import saga as core
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import (
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
    normalise,
)
from amends_runtime.core.messages import (
    AbandonSaga,
    Answered,
    Broken,
    CancelSaga,
    Done,
    Heuristic,
    Message,
    NotSent,
    Outcome,
    Rejected,
    RetrySaga,
    RuntimeRestarted,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.core.saga import Saga
from amends_runtime.telemetry.meters import HistogramValue
from amends_runtime.telemetry.metrics import TABLE, Metrics
from amends_runtime.telemetry.metrics import Kind as MetricKind

IN_DOUBT = Unknown("DEADLINE_EXCEEDED", "no answer")
ONE_TRY = RetryPolicy(first_ms=1, max_ms=1, give_up_after_ms=1)


def a_plan(*steps: Step) -> Plan:
    """The definition `order` with these steps, each of participant `shop`."""
    return Plan(normalise(Definition(name="order", steps=steps)))


def a_step(name: str, kind: Kind = Kind.COMPENSATABLE, retry: RetryPolicy | None = None) -> Step:
    """A step of participant `shop`."""
    return Step(name=name, participant="shop", action=name, kind=kind, retry=retry)


class Course:
    """A saga that is told messages, second by second, and the metrics that look on."""

    def __init__(self, *steps: Step, plan: Plan | None = None) -> None:
        self.plan = plan or a_plan(*steps)
        self.metrics = Metrics()
        self.saga: Saga | None = None
        self.now_ms = 1_000_000
        self.tell(StartSaga(saga_id="saga-1", content_hash="c", input=Payload(b"")))

    def tell(self, message: Message) -> None:
        """One turn, committed."""
        decision = core.decide(self.plan, self.saga, message, self.now_ms, 1)
        if decision.records:
            self.metrics.turn_committed(self.plan, self.saga, decision.saga, decision.records)
        self.saga = decision.saga

    def answer(self, step: int, outcome: Outcome, *, took_us: int = 2_500, **more: Any) -> None:
        """The step's open attempt ends a second later; it was on the wire for `took_us`."""
        assert self.saga is not None
        state = self.saga.steps[step]
        self.now_ms += 1_000
        sent_us = self.now_ms * 1_000 - took_us
        self.tell(
            Answered(
                step=step,
                verb=state.verb,
                round=state.round,
                attempt=state.attempt,
                sent_at_ms=sent_us // 1_000,
                sent_us=sent_us % 1_000,
                answered_at_ms=self.now_ms,
                status="OK" if not isinstance(outcome, Unknown) else outcome.reason,
                polls=0,
                outcome=outcome,
                **more,
            )
        )

    def shown(self, name: str) -> dict[tuple[str, ...], Any]:
        """A metric's series; of a histogram (count, sum)."""
        [values] = [one.values for one in self.metrics.readings() if one.metric.name == name]
        return {
            labels: (value.count, round(value.total, 6))
            if isinstance(value, HistogramValue)
            else value
            for labels, value in values.items()
        }


def test_a_saga_that_completes() -> None:
    """A start, an end, a duration of each step and of the whole, and its attempts."""
    course = Course(a_step("reserve"), a_step("charge"))
    course.answer(0, Done())
    course.answer(1, Done())
    assert course.shown("amends.saga.starts") == {("order",): 1}
    assert course.shown("amends.saga.ends") == {("order", "completed"): 1}
    assert course.shown("amends.saga.duration") == {("order", "completed"): (1, 2.0)}
    assert course.shown("amends.step.duration") == {
        ("order", "reserve", "executed"): (1, 1.0),
        ("order", "charge", "executed"): (1, 1.0),
    }
    assert course.shown("amends.attempts") == {("shop", "execute", "done"): 2}
    assert course.shown("amends.attempt.duration") == {("shop", "execute", "done"): (2, 0.005)}


def test_a_saga_that_is_compensated() -> None:
    """A refusal, and a compensation: the step has an outcome in each direction."""
    course = Course(a_step("reserve"), a_step("charge"))
    course.answer(0, Done())
    course.answer(1, Rejected("card_declined"))
    course.answer(0, Done())
    assert course.shown("amends.saga.ends") == {("order", "compensated"): 1}
    assert course.shown("amends.step.duration") == {
        ("order", "reserve", "executed"): (1, 1.0),
        ("order", "charge", "rejected"): (1, 1.0),
        ("order", "reserve", "compensated"): (1, 1.0),
    }
    assert course.shown("amends.attempts") == {
        ("shop", "execute", "done"): 1,
        ("shop", "execute", "rejected"): 1,
        ("shop", "compensate", "done"): 1,
    }


def test_retries_are_attempts_of_one_step() -> None:
    """An unknown outcome is an attempt more; the step lasts from its first one to its outcome."""
    course = Course(a_step("charge"))
    course.answer(0, IN_DOUBT)
    course.now_ms += 60_000
    course.tell(Wake())
    course.answer(0, Done())
    assert course.shown("amends.attempts") == {
        ("shop", "execute", "unknown"): 1,
        ("shop", "execute", "done"): 1,
    }
    assert course.shown("amends.step.duration") == {("order", "charge", "executed"): (1, 62.0)}


def test_a_step_that_is_given_up_and_undone() -> None:
    """It is given up once, and compensated as a life of its own, begun in the very same turn."""
    course = Course(a_step("charge", retry=ONE_TRY))
    course.answer(0, IN_DOUBT)
    course.answer(0, Done())
    assert course.shown("amends.step.duration") == {
        ("order", "charge", "given_up"): (1, 1.0),
        ("order", "charge", "compensated"): (1, 1.0),
    }


@pytest.mark.parametrize(
    ("outcome", "attempt"),
    [
        (Rejected("no"), "rejected"),
        (IN_DOUBT, "unknown"),
        (Broken("ledger_lost"), "broken"),
    ],
    ids=["refused", "given-up", "broken"],
)
def test_a_step_that_gets_stuck(outcome: Outcome, attempt: str) -> None:
    """Whatever led there, the step has one outcome: it is stuck."""
    course = Course(a_step("ship", Kind.RETRIABLE, retry=ONE_TRY))
    course.answer(0, outcome)
    assert course.saga is not None
    assert course.saga.state.name == "STUCK"
    assert course.shown("amends.step.duration") == {("order", "ship", "stuck"): (1, 1.0)}
    assert course.shown("amends.attempts") == {("shop", "execute", attempt): 1}


def test_an_operator_retries_and_abandons() -> None:
    """Two things that a person did; the step's time begins anew with the retry."""
    course = Course(a_step("ship", Kind.RETRIABLE))
    course.answer(0, Broken("ledger_lost"))
    course.now_ms += 3_600_000
    course.tell(RetrySaga(author="ann", reason="mended"))
    course.answer(0, Broken("ledger_lost"))
    course.tell(AbandonSaga(author="ann", reason="done by hand"))
    assert course.shown("amends.operator.actions") == {("retry",): 1, ("abandon",): 1}
    assert course.shown("amends.saga.ends") == {("order", "abandoned"): 1}
    assert course.shown("amends.step.duration") == {("order", "ship", "stuck"): (2, 2.0)}


def test_a_retry_of_two_steps_is_one_action() -> None:
    """One request of a person, whatever number of steps it concerns."""
    steps = [
        Step(name=name, participant="shop", action="do", kind=Kind.RETRIABLE, after=())
        for name in ("left", "right")
    ]
    course = Course(*steps)
    course.answer(0, Broken("b"))
    course.answer(1, Broken("b"))
    course.tell(RetrySaga(author="ann", reason="mended"))
    assert course.shown("amends.operator.actions") == {("retry",): 1}


def test_attempts_that_are_lost_and_withdrawn() -> None:
    """They have ended, and nobody knows how long they took."""
    course = Course(a_step("charge"))
    course.tell(RuntimeRestarted())
    course.tell(CancelSaga(author="ann", reason="no more"))
    course.tell(NotSent(step=0, verb=Verb.EXECUTE, round=1, attempt=2))
    assert course.shown("amends.attempts") == {
        ("shop", "execute", "lost"): 1,
        ("shop", "execute", "withdrawn"): 1,
    }
    assert course.shown("amends.attempt.duration") == {}


def test_attempts_that_are_open_when_a_saga_is_abandoned() -> None:
    """Each has an outcome, the one of the other direction, too; what was over has its own."""
    steps = [
        Step(name=name, participant=name, action="do", after=()) for name in ("one", "two", "three")
    ]
    course = Course(*steps)
    course.answer(0, Done())
    course.answer(1, Rejected("no"))
    course.answer(2, Done())  # and then the first and the third are compensated
    course.answer(2, Done())
    course.tell(AbandonSaga(author="ann", reason="done by hand", force=True))
    assert course.shown("amends.saga.ends") == {("order", "abandoned"): 1}
    assert course.shown("amends.attempts") == {
        ("one", "execute", "done"): 1,
        ("two", "execute", "rejected"): 1,
        ("three", "execute", "done"): 1,
        ("three", "compensate", "done"): 1,
        ("one", "compensate", "abandoned"): 1,
    }
    assert sum(count for count, _ in course.shown("amends.attempt.duration").values()) == 4


def a_transfer(*, locked_retries: int = 0, retry: RetryPolicy | None = None) -> Course:
    """A two-phase commit of `debit` and `credit`, whose votes are both asked for."""
    steps = tuple(a_step(name, retry=retry) for name in ("debit", "credit"))
    definition = Definition(
        name="order",
        mode=Mode.TWO_PHASE_COMMIT,
        steps=steps,
        two_phase=TwoPhase(locked_retries=locked_retries),
    )
    return Course(plan=Plan(normalise(definition)))


def test_a_two_phase_commit_that_commits() -> None:
    """Its votes, its decision, and for how long participants kept what others may have needed."""
    course = a_transfer()
    course.answer(0, Done())
    course.answer(1, Done())
    course.answer(1, Done())
    course.answer(0, Done())
    assert course.shown("amends.saga.ends") == {("order", "completed"): 1}
    assert course.shown("amends.two_phase.votes") == {("shop", "yes"): 2}
    assert course.shown("amends.two_phase.decisions") == {("order", "commit", "all_prepared"): 1}
    assert course.shown("amends.two_phase.acknowledgement.duration") == {
        ("order", "commit"): (1, 2.0)
    }
    assert course.shown("amends.step.duration") == {
        ("order", "debit", "prepared"): (1, 1.0),
        ("order", "credit", "prepared"): (1, 2.0),
        ("order", "credit", "executed"): (1, 1.0),
        ("order", "debit", "executed"): (1, 2.0),
    }
    assert course.shown("amends.attempts") == {
        ("shop", "prepare", "done"): 2,
        ("shop", "execute", "done"): 2,
    }
    assert course.shown("amends.two_phase.heuristics") == {}


def test_a_two_phase_commit_that_meets_a_lock_and_tries_again() -> None:
    """Each round has a decision, and its own acknowledgements; the second one is refused."""
    course = a_transfer(locked_retries=1)
    course.answer(0, Done())
    course.answer(1, Rejected("LOCKED"))
    course.answer(0, Done())
    assert course.shown("amends.two_phase.rounds.retried") == {("order",): 1}
    course.now_ms += 10_000
    course.tell(Wake())
    course.answer(0, Rejected("no_funds"))
    course.answer(1, Rejected("no_funds"))
    assert course.shown("amends.saga.ends") == {("order", "compensated"): 1}
    assert course.shown("amends.two_phase.votes") == {
        ("shop", "yes"): 1,
        ("shop", "locked"): 1,
        ("shop", "no"): 2,
    }
    assert course.shown("amends.two_phase.decisions") == {("order", "abort", "rejected"): 2}
    assert course.shown("amends.two_phase.rounds.retried") == {("order",): 1}
    # One second until what had been debited was undone, and one until the other no had come.
    assert course.shown("amends.two_phase.acknowledgement.duration") == {
        ("order", "abort"): (2, 2.0)
    }


def test_votes_that_nobody_has_cast() -> None:
    """Not asked for, never answered, and an answer that is none: each counts as a no."""
    course = a_transfer()
    course.tell(NotSent(step=0, verb=Verb.PREPARE, round=1, attempt=1, reason="BREAKER_OPEN"))
    assert course.shown("amends.two_phase.votes") == {("shop", "not_asked"): 1}
    assert course.shown("amends.two_phase.decisions") == {("order", "abort", "gave_up"): 1}

    course = a_transfer(retry=ONE_TRY)
    course.answer(0, IN_DOUBT)
    assert course.shown("amends.two_phase.votes") == {("shop", "unknown"): 1}
    assert course.shown("amends.attempts") == {("shop", "prepare", "unknown"): 1}

    course = a_transfer()
    course.answer(0, Broken("ledger_lost"))
    assert course.shown("amends.two_phase.votes") == {("shop", "unknown"): 1}
    assert course.shown("amends.attempts") == {("shop", "prepare", "broken"): 1}

    course = a_transfer()
    course.tell(CancelSaga(author="ada"))
    assert course.shown("amends.two_phase.votes") == {}
    assert course.shown("amends.two_phase.decisions") == {("order", "abort", "cancelled"): 1}


@pytest.mark.parametrize(
    ("outcome", "heuristic", "attempt", "step", "end"),
    [
        (Broken("vote_lost"), "broken", "broken", "broken", "mixed"),
        (Rejected("fenced"), "broken", "broken", "broken", "mixed"),
        (Heuristic(False, "by_hand"), "broken", "broken", "broken", "mixed"),
        (Heuristic(True, "by_hand"), "agrees", "done", "executed", "completed"),
    ],
)
def test_a_branch_that_decides_alone(
    outcome: Outcome, heuristic: str, attempt: str, step: str, end: str
) -> None:
    """It is counted at once, before the others have been told."""
    course = a_transfer()
    course.answer(0, Done())
    course.answer(1, Done())
    course.answer(1, outcome)
    assert course.shown("amends.two_phase.heuristics") == {("order", "credit", heuristic): 1}
    assert course.shown("amends.attempts")[("shop", "execute", attempt)] == 1
    assert course.shown("amends.step.duration")[("order", "credit", step)] == (1, 1.0)
    assert course.shown("amends.saga.ends") == {}
    course.answer(0, Done())
    assert course.shown("amends.saga.ends") == {("order", end): 1}


def test_a_branch_that_an_operator_should_see_to_has_not_come_to_anything_yet() -> None:
    """It is told on and on, and counted once: when it has acknowledged."""
    course = a_transfer(retry=ONE_TRY)
    course.answer(0, Done())
    course.answer(1, Done())
    course.answer(0, Done())
    course.answer(1, IN_DOUBT)
    assert course.saga is not None
    assert course.saga.steps[1].stuck_since_ms
    course.now_ms += 10_000
    course.tell(Wake())
    course.answer(1, Done())
    durations = course.shown("amends.step.duration")
    assert [outcome for _, name, outcome in durations if name == "credit"] == [
        "prepared",
        "executed",
    ]
    assert course.shown("amends.attempts")[("shop", "execute", "unknown")] == 1
    assert course.shown("amends.saga.ends") == {("order", "completed"): 1}


def test_a_clock_that_was_set_back_makes_no_negative_time() -> None:
    """A duration is 0 then, for a sum that falls would look like a restart."""
    course = Course(a_step("charge"))
    course.now_ms -= 100_000
    course.answer(0, Done(), took_us=-5_000)
    assert course.shown("amends.step.duration") == {("order", "charge", "executed"): (1, 0.0)}
    assert course.shown("amends.saga.duration") == {("order", "completed"): (1, 0.0)}
    assert course.shown("amends.attempt.duration") == {("shop", "execute", "done"): (1, 0.0)}


def test_breakers_and_commits() -> None:
    """Each transition is counted where it leads to."""
    metrics = Metrics()
    metrics.breaker_changed("shop", BreakerState.CLOSED, BreakerState.OPEN)
    metrics.breaker_changed("shop", BreakerState.OPEN, BreakerState.HALF_OPEN)
    metrics.breaker_changed("shop", BreakerState.HALF_OPEN, BreakerState.OPEN)
    metrics.batch_committed(7, 0.002)
    shown = {one.metric.name: one.values for one in metrics.readings()}
    assert shown["amends.breaker.transitions"] == {("shop", "open"): 2, ("shop", "half_open"): 1}
    [turns] = shown["amends.commit.turns"].values()
    [took] = shown["amends.commit.duration"].values()
    assert isinstance(turns, HistogramValue)
    assert isinstance(took, HistogramValue)
    assert (turns.count, turns.total) == (1, 7)
    assert (took.count, took.total) == (1, 0.002)


# -- the table -------------------------------------------------------------------------------------


def test_names_units_and_labels_follow_the_conventions() -> None:
    """OpenTelemetry's for names and units, Prometheus' for what becomes of them."""
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    assert len({metric.prometheus_series for metric in TABLE}) == len(names)
    for metric in TABLE:
        assert re.fullmatch(r"amends(\.[a-z]+(_[a-z]+)*)+", metric.name)
        assert metric.unit in {"s", "By", "1"} or re.fullmatch(r"\{[a-z]+\}", metric.unit)
        assert re.fullmatch(r"[a-z_]+", metric.prometheus_series)
        assert metric.description.endswith(".")
        assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.bounds)
        assert not set(metric.labels) & {"saga", "saga_id", "id", "le", "instance", "job"}
    by_name = {metric.name: metric.prometheus_series for metric in TABLE}
    assert by_name["amends.saga.starts"] == "amends_saga_starts_total"
    assert by_name["amends.saga.duration"] == "amends_saga_duration_seconds"
    assert by_name["amends.store.wal.size"] == "amends_store_wal_size_bytes"
    assert by_name["amends.runtime.info"] == "amends_runtime_info"


def test_readings_come_in_the_order_of_the_table() -> None:
    """What is looked at is there once somebody has looked; what is counted from the start."""
    metrics = Metrics()
    order: Sequence[str] = [metric.name for metric in TABLE]
    shown = [one.metric.name for one in metrics.readings()]
    assert shown == [name for name in order if name in shown]
    assert "amends.saga.starts" in shown
    assert "amends.saga.active" not in shown
