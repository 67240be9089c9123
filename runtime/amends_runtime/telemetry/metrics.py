"""The metrics: which there are, and how they follow from what became durable.

How to think about it. `TABLE` is the whole truth about what there is: the Prometheus endpoint, the
OTLP export and docs/metrics.md are made from it, and nothing is shown that is not in it. A metric's
values come from one of two places:

    meters      counted here, record by record, as turns become durable (`Metrics`)
    snapshot    looked at every few seconds, because it is a state and no event (`gauges`)

Names are OpenTelemetry's; `prometheus_name` makes the other form of them. No label ever holds a
saga's id, a payload, or what a participant wrote: their values are names from definitions and the
configuration, and words from this file. They are lower case, as they are in traces.

What a restart repeats is not counted twice, because records are written once: the numbers are those
of the records that this process has committed.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import BREAKER_OPEN, NO_PARTICIPANT
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
    OperatorAction,
    Record,
    RoundPlanned,
    SagaEnded,
    SagaStarted,
    SagaState,
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
from amends_runtime.core.saga import Saga
from amends_runtime.core.two_phase import LOCKED
from amends_runtime.telemetry.meters import Counter, Histogram, HistogramValue, Labels

__all__ = ["TABLE", "Kind", "Metric", "Metrics", "Reading", "Snapshot", "Values", "word"]


# -- what there is ---------------------------------------------------------------------------------


class Kind(enum.Enum):
    """How a metric's numbers behave."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


class Metric(msgspec.Struct, frozen=True):
    """One metric. `unit` is UCUM's, as OpenTelemetry has it; `labels` name what it is split by.

    `bounds` are a histogram's, in its unit.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def prometheus_unit(self) -> str:
        """The unit as a suffix; empty where Prometheus has none."""
        return {"s": "seconds", "By": "bytes"}.get(self.unit, "")

    @property
    def prometheus_name(self) -> str:
        """The family's name: what a query says, but for a counter's `_total` and an info's."""
        name = self.name.replace(".", "_").removesuffix("_info")
        return f"{name}_{self.prometheus_unit}" if self.prometheus_unit else name

    @property
    def prometheus_series(self) -> str:
        """What a query says; a histogram's has `_bucket`, `_count` or `_sum` behind it."""
        suffix = {Kind.COUNTER: "_total", Kind.INFO: "_info"}.get(self.kind, "")
        return self.prometheus_name + suffix


# From half a millisecond, what a call on one machine takes, to an attempt's usual time-outs.
CALL_BOUNDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
# From a few calls to a night's outage: a saga waits for its participants, however long.
SAGA_BOUNDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0),
)
COMMIT_BOUNDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
TURNS_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
LAG_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

SAGA_STARTS: Final = Metric(
    "amends.saga.starts",
    Kind.COUNTER,
    "{saga}",
    "Sagas that were started.",
    ("definition",),
)
SAGA_ENDS: Final = Metric(
    "amends.saga.ends",
    Kind.COUNTER,
    "{saga}",
    "Sagas that have ended; `outcome` is completed, compensated, abandoned or mixed (a participant"
    " of a two-phase commit broke its vote).",
    ("definition", "outcome"),
)
SAGA_DURATION: Final = Metric(
    "amends.saga.duration",
    Kind.HISTOGRAM,
    "s",
    "From a saga's start to its end, restarts and waiting included.",
    ("definition", "outcome"),
    SAGA_BOUNDS,
)
SAGA_ACTIVE: Final = Metric(
    "amends.saga.active",
    Kind.GAUGE,
    "{saga}",
    "Sagas that have not ended; `state` is running, compensating or stuck (nothing else moves).",
    ("state",),
)
SAGA_PARKED: Final = Metric(
    "amends.saga.parked",
    Kind.GAUGE,
    "{saga}",
    "Those of them that are not in memory, because they only wait for an instant or a person;"
    " `state` as above.",
    ("state",),
)
STEP_DURATION: Final = Metric(
    "amends.step.duration",
    Kind.HISTOGRAM,
    "s",
    "From a step's first attempt to what came of it, retries and waiting included; `outcome` is"
    " executed, rejected, given_up, compensated or stuck. An operator's retry begins anew. A branch"
    " of a two-phase commit counts for its vote (prepared, rejected, given_up), and again for what"
    " came of the decision (executed, compensated, broken).",
    ("definition", "step", "outcome"),
    SAGA_BOUNDS,
)
ATTEMPTS: Final = Metric(
    "amends.attempts",
    Kind.COUNTER,
    "{attempt}",
    "Attempts that have ended; `outcome` is done, rejected, broken (the participant cannot keep the"
    " contract, or has broken its vote), unknown (an error or a time-out), lost (the runtime ended"
    " meanwhile), withdrawn (never sent) or abandoned (an operator gave the saga up meanwhile).",
    ("participant", "verb", "outcome"),
)
ATTEMPT_DURATION: Final = Metric(
    "amends.attempt.duration",
    Kind.HISTOGRAM,
    "s",
    "From sending an attempt for the first time to its answer, polls included. Lost, withdrawn and"
    " abandoned ones have none.",
    ("participant", "verb", "outcome"),
    CALL_BOUNDS,
)
BREAKER_STATE: Final = Metric(
    "amends.breaker.state",
    Kind.GAUGE,
    "1",
    "1 for the state that a participant's breaker is in, 0 for the others; `state` is closed, open"
    " or half_open.",
    ("participant", "state"),
)
BREAKER_TRANSITIONS: Final = Metric(
    "amends.breaker.transitions",
    Kind.COUNTER,
    "{transition}",
    "How often a participant's breaker went into a state.",
    ("participant", "state"),
)
LANE_WAITING: Final = Metric(
    "amends.lane.waiting",
    Kind.GAUGE,
    "{call}",
    "Calls that wait in a participant's lane: for its breaker, or for others to end.",
    ("participant",),
)
LANE_IN_FLIGHT: Final = Metric(
    "amends.lane.in_flight",
    Kind.GAUGE,
    "{call}",
    "Calls of a participant that are on the wire.",
    ("participant",),
)
LANE_LIMIT: Final = Metric(
    "amends.lane.limit",
    Kind.GAUGE,
    "{call}",
    "How many calls a participant gets at the same time: what it announces on its stream, or"
    " `concurrency` of its section, the smaller one.",
    ("participant",),
)
COMMIT_DURATION: Final = Metric(
    "amends.commit.duration",
    Kind.HISTOGRAM,
    "s",
    "One commit, its sync to the disk included.",
    bounds=COMMIT_BOUNDS,
)
COMMIT_TURNS: Final = Metric(
    "amends.commit.turns",
    Kind.HISTOGRAM,
    "{turn}",
    "Turns of sagas in one commit.",
    bounds=TURNS_BOUNDS,
)
MAILBOX_MESSAGES: Final = Metric(
    "amends.mailbox.messages",
    Kind.GAUGE,
    "{message}",
    "Messages that wait in the mailboxes of all sagas.",
)
MAILBOX_FULLEST: Final = Metric(
    "amends.mailbox.fullest",
    Kind.GAUGE,
    "{message}",
    "Messages that wait in the fullest mailbox; its bound is `[limits] mailbox`.",
)
TURNS_BACKLOG: Final = Metric(
    "amends.turns.backlog",
    Kind.GAUGE,
    "{turn}",
    "Sagas that wait to be read, to decide, or for their commit. At `[limits] commit_queue` starts"
    " are refused.",
)
REQUESTS_REFUSED: Final = Metric(
    "amends.requests.refused",
    Kind.COUNTER,
    "{request}",
    "Requests that were refused because a limit is reached; `reason` is the error's, such as"
    " commit_queue.",
    ("reason",),
)
LOOP_LAG: Final = Metric(
    "amends.event_loop.lag",
    Kind.HISTOGRAM,
    "s",
    "How late the event loop is: a timer of half a second, and how much later it went off. What"
    " blocks the loop for less than that is seen now and then, not every time.",
    bounds=LAG_BOUNDS,
)
WAL_SIZE: Final = Metric(
    "amends.store.wal.size",
    Kind.GAUGE,
    "By",
    "The size of SQLite's write-ahead log. It is written anew from its beginning after each"
    " checkpoint, and grows only while readers hold it back; after that the next commits cut it to"
    " some 32 MB.",
)
STORE_SIZE: Final = Metric(
    "amends.store.size",
    Kind.GAUGE,
    "By",
    "The size of the database file.",
)
SAGA_STUCK: Final = Metric(
    "amends.saga.stuck",
    Kind.GAUGE,
    "{saga}",
    "Sagas with a step that waits for an operator, whether or not others of their steps go on;"
    " quarantined ones, too; and two-phase commits of which a participant has been told the"
    " decision for long and does not acknowledge it.",
)
STEP_IN_DOUBT: Final = Metric(
    "amends.step.in_doubt",
    Kind.GAUGE,
    "{step}",
    "Steps of which an attempt ended without a definite outcome, while nothing definite is known"
    " since: they may have an effect, or may have been undone. A saga that was parked before the"
    " runtime started counts as one such step until it moves.",
)
SAGA_WITHOUT_WAKE_UP: Final = Metric(
    "amends.saga.without_wake_up",
    Kind.GAUGE,
    "{saga}",
    "Sagas that have not ended and that nothing would wake, unreadable and quarantined ones among"
    " them. 0, or something is wrong with amends or its database.",
)
SAGA_UNREADABLE: Final = Metric(
    "amends.saga.unreadable",
    Kind.GAUGE,
    "{saga}",
    "Sagas whose history is damaged.",
)
SAGA_QUARANTINED: Final = Metric(
    "amends.saga.quarantined",
    Kind.GAUGE,
    "{saga}",
    "Sagas that are left alone because deciding about them failed three times: a bug in amends.",
)
RECOVERY_SAGAS: Final = Metric(
    "amends.recovery.sagas",
    Kind.COUNTER,
    "{saga}",
    "Sagas that had not ended when the runtime came up, and that were brought in.",
)
RECOVERY_RUNNING: Final = Metric(
    "amends.recovery.running",
    Kind.GAUGE,
    "1",
    "1 while such sagas are brought in, else 0.",
)
RECOVERY_DURATION: Final = Metric(
    "amends.recovery.duration",
    Kind.GAUGE,
    "s",
    "How long bringing them in took, or has taken so far.",
)
RUNTIME_EPOCH: Final = Metric(
    "amends.runtime.epoch",
    Kind.GAUGE,
    "1",
    "How often the database has been opened by a runtime.",
)
RUNTIME_INFO: Final = Metric(
    "amends.runtime.info",
    Kind.INFO,
    "1",
    "Always 1: the version of amends, and the store's id.",
    ("version", "store_id"),
)
TELEMETRY_SPANS: Final = Metric(
    "amends.telemetry.spans",
    Kind.COUNTER,
    "{span}",
    "Spans on their way to the collector; `result` is exported, dropped (they came faster than it"
    " takes them) or failed (it could not be reached, or refused them).",
    ("result",),
)
TELEMETRY_OVERFLOWS: Final = Metric(
    "amends.telemetry.overflows",
    Kind.COUNTER,
    "{measurement}",
    "Measurements that had no series of their own, because `metric` has 2000 already. They are in"
    " the one whose labels are all (other).",
    ("metric",),
)
VOTES: Final = Metric(
    "amends.two_phase.votes",
    Kind.COUNTER,
    "{vote}",
    "Votes of two-phase commits; `vote` is yes, no, locked (a no, because it would have had to wait"
    " for a lock), unknown (no answer that is a vote, which counts as a no) or not_asked (its"
    " breaker was open, or it is not registered).",
    ("participant", "vote"),
)
DECISIONS: Final = Metric(
    "amends.two_phase.decisions",
    Kind.COUNTER,
    "{decision}",
    "Decisions of two-phase commits, one a round; `decision` is commit or abort, `cause` why:"
    " all_prepared, or rejected, gave_up, deadline or cancelled.",
    ("definition", "decision", "cause"),
)
ROUNDS_RETRIED: Final = Metric(
    "amends.two_phase.rounds.retried",
    Kind.COUNTER,
    "{round}",
    "Two-phase commits that are tried again as a whole, because of a lock.",
    ("definition",),
)
HEURISTICS: Final = Metric(
    "amends.two_phase.heuristics",
    Kind.COUNTER,
    "{branch}",
    "Branches that decided alone, or broke their vote; `outcome` is broken (not what was decided,"
    " or nobody knows: the saga ends MIXED) or agrees (it happens to be what was decided).",
    ("definition", "step", "outcome"),
)
PHASE_2_DURATION: Final = Metric(
    "amends.two_phase.acknowledgement.duration",
    Kind.HISTOGRAM,
    "s",
    "From a decision to its last acknowledgement: for so long participants keep what others may"
    " need; `decision` is commit or abort.",
    ("definition", "decision"),
    SAGA_BOUNDS,
)
IN_DOUBT: Final = Metric(
    "amends.two_phase.in_doubt",
    Kind.GAUGE,
    "{branch}",
    "Branches of two-phase commits that have voted yes, or of which nobody knows how they voted,"
    " and have not acknowledged the decision: their participants keep what others may need. A saga"
    " that was parked before the runtime started counts once its next attempt is due.",
)
OLDEST_IN_DOUBT: Final = Metric(
    "amends.two_phase.oldest_in_doubt",
    Kind.GAUGE,
    "s",
    "For how long the oldest of them has; 0 if there is none.",
)
OPERATOR_ACTIONS: Final = Metric(
    "amends.operator.actions",
    Kind.COUNTER,
    "{action}",
    "What operators did to sagas; `action` is retry or abandon.",
    ("action",),
)

TABLE: Final[tuple[Metric, ...]] = (
    SAGA_STARTS,
    SAGA_ENDS,
    SAGA_DURATION,
    SAGA_ACTIVE,
    SAGA_PARKED,
    STEP_DURATION,
    ATTEMPTS,
    ATTEMPT_DURATION,
    BREAKER_STATE,
    BREAKER_TRANSITIONS,
    LANE_WAITING,
    LANE_IN_FLIGHT,
    LANE_LIMIT,
    COMMIT_DURATION,
    COMMIT_TURNS,
    MAILBOX_MESSAGES,
    MAILBOX_FULLEST,
    TURNS_BACKLOG,
    REQUESTS_REFUSED,
    LOOP_LAG,
    WAL_SIZE,
    STORE_SIZE,
    VOTES,
    DECISIONS,
    ROUNDS_RETRIED,
    HEURISTICS,
    PHASE_2_DURATION,
    IN_DOUBT,
    OLDEST_IN_DOUBT,
    SAGA_STUCK,
    STEP_IN_DOUBT,
    SAGA_WITHOUT_WAKE_UP,
    SAGA_UNREADABLE,
    SAGA_QUARANTINED,
    RECOVERY_SAGAS,
    RECOVERY_RUNNING,
    RECOVERY_DURATION,
    RUNTIME_EPOCH,
    RUNTIME_INFO,
    TELEMETRY_SPANS,
    TELEMETRY_OVERFLOWS,
    OPERATOR_ACTIONS,
)
"""All of them, in the order in which they are shown."""


# -- what they say ---------------------------------------------------------------------------------

Values = Mapping[Labels, float] | Mapping[Labels, HistogramValue]
"""A metric's series: a histogram's are HistogramValues, all others' numbers."""

Snapshot = Mapping[Metric, Mapping[Labels, float]]
"""What was looked at last. Never changed once it is made: readers are in other threads."""


class Reading(NamedTuple):
    """A metric, and what it says now."""

    metric: Metric
    values: Values


def word(value: enum.Enum) -> str:
    """A value of an enumeration as a label has it."""
    return value.name.lower()


# A dictionary each: they are numbers, and those of one would be found for those of another.
_VERBS: Final = {verb: word(verb) for verb in Verb}
_ENDS: Final = {state: word(state) for state in SagaState}


class Metrics:
    """The observer that counts, and where all readers find what they show.

    One event loop calls it; `readings` may be called in any thread.
    """

    def __init__(self) -> None:
        self.began_ns = time.time_ns()
        """UTC nanoseconds: since when it counts."""
        self.snapshot: Snapshot = {}
        """Replaced as a whole by whoever looks; see `gauges`."""
        self._meters: dict[Metric, Counter | Histogram] = {}
        self._starts = self._counter(SAGA_STARTS)
        self._ends = self._counter(SAGA_ENDS)
        self._saga_duration = self._histogram(SAGA_DURATION)
        self._step_duration = self._histogram(STEP_DURATION)
        self._attempts = self._counter(ATTEMPTS)
        self._attempt_duration = self._histogram(ATTEMPT_DURATION)
        self._transitions = self._counter(BREAKER_TRANSITIONS)
        self._commit_duration = self._histogram(COMMIT_DURATION)
        self._commit_turns = self._histogram(COMMIT_TURNS)
        self._actions = self._counter(OPERATOR_ACTIONS)
        self._votes = self._counter(VOTES)
        self._decisions = self._counter(DECISIONS)
        self._rounds_retried = self._counter(ROUNDS_RETRIED)
        self._heuristics = self._counter(HEURISTICS)
        self._phase_2_duration = self._histogram(PHASE_2_DURATION)
        # Plans are as many as there are definitions, and in memory as long as the runtime is.
        self._plan_labels: dict[Plan, _PlanLabels] = {}
        self.loop_lag = self._histogram(LOOP_LAG)
        """For whoever measures it."""

    def readings(self) -> Iterator[Reading]:
        """Everything that there is to show, in the order of `TABLE`."""
        snapshot = self.snapshot
        for metric in TABLE:
            meter = self._meters.get(metric)
            if meter is not None:
                yield Reading(metric, meter.values())
            elif metric is TELEMETRY_OVERFLOWS:
                yield Reading(metric, self._overflows())
            elif metric in snapshot:
                yield Reading(metric, snapshot[metric])

    def _overflows(self) -> dict[Labels, int]:
        return {
            (metric.name,): meter.overflowed
            for metric, meter in self._meters.items()
            if metric.labels
        }

    def _counter(self, metric: Metric) -> Counter:
        meter = self._meters[metric] = Counter(len(metric.labels))
        return meter

    def _histogram(self, metric: Metric) -> Histogram:
        meter = self._meters[metric] = Histogram(metric.bounds, len(metric.labels))
        return meter

    # -- what is observed ----------------------------------------------------------------------

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """Counts what these records say."""
        # To tell what a record is not takes as long as a count: this runs for every turn.
        for record in records:
            kind = type(record)
            if kind is AttemptStarted:
                continue
            if kind is SagaStarted:
                self._starts.add((saga.definition_name,))
            elif kind is SagaEnded:
                labels = (saga.definition_name, _ENDS[saga.state])
                self._ends.add(labels)
                lasted_ms = max(0, saga.ended_at_ms - saga.started_at_ms)
                self._saga_duration.record(lasted_ms / 1000, labels)
                if saga.abandoned:
                    self._abandoned(plan, before)
                elif saga.round:
                    self._phase_2_over(before, record.at_ms, saga)
            elif isinstance(record, _DEFINITE_KINDS):
                of_attempt, of_step = self._labels_of(plan)[type(record)][record.step]
                self._answered(record.timing, of_attempt)
                if kind is StepRejected and _gets_stuck(record.step, records):
                    continue  # refused where nothing can be undone any more
                self._step_over(before, record.step, record.at_ms, of_step)
                if saga.round:
                    self._voted(plan, record)
            else:
                self._seldom(plan, before, saga, record, records)

    def _seldom(
        self,
        plan: Plan,
        before: Saga | None,
        saga: Saga,
        record: Record,
        records: Sequence[Record],
    ) -> None:
        """The records of what went wrong, or was done by hand."""
        if isinstance(record, AttemptFailed):
            was_broken = _was_broken if plan.two_phase is None else _was_broken_to_vote
            outcome = "broken" if was_broken(record, records) else "unknown"
            participant = plan.steps[record.step].participant
            self._answered(record.timing, (participant, _VERBS[record.verb], outcome))
        elif isinstance(record, AttemptLost | AttemptWithdrawn):
            outcome = "lost" if isinstance(record, AttemptLost) else "withdrawn"
            participant = plan.steps[record.step].participant
            self._attempts.add((participant, _VERBS[record.verb], outcome))
        elif plan.two_phase is not None and isinstance(record, _OF_TWO_PHASE):
            self._of_two_phase(plan, before, saga, record)
        elif isinstance(record, StepStuck):
            labels = (saga.definition_name, plan.step_names[record.step], "stuck")
            self._step_over(before, record.step, record.at_ms, labels)
        elif isinstance(record, StepGivenUp):
            if not _gets_stuck(record.step, records):
                labels = (saga.definition_name, plan.step_names[record.step], "given_up")
                self._step_over(before, record.step, record.at_ms, labels)
        elif isinstance(record, OperatorActed) and _counts(record, records):
            self._actions.add((word(record.action),))

    def _of_two_phase(
        self, plan: Plan, before: Saga | None, saga: Saga, record: _OfTwoPhase
    ) -> None:
        name = plan.definition.name
        if isinstance(record, DecisionMade):
            cause = "all_prepared" if record.cause is None else word(record.cause)
            self._decisions.add((name, word(record.decision), cause))
            if record.cause is TurnCause.GAVE_UP and record.step is not None:
                asked = record.failure.reason not in _NOT_ASKED
                vote = "unknown" if asked else "not_asked"
                self._votes.add((plan.steps[record.step].participant, vote))
        elif isinstance(record, RoundPlanned):
            self._rounds_retried.add((name,))
            self._phase_2_over(before, record.at_ms, saga)
        elif isinstance(record, HeuristicReported):
            agrees = record.committed is (record.verb is Verb.EXECUTE)
            step = plan.steps[record.step]
            outcome = "done" if agrees else "broken"
            self._answered(record.timing, (step.participant, _VERBS[record.verb], outcome))
            if agrees:
                outcome = "executed" if record.committed else "compensated"
            self._step_over(before, record.step, record.at_ms, (name, step.name, outcome))
            self._heuristics.add((name, step.name, "agrees" if agrees else "broken"))
        # StepStuck: the branch is still told the decision, so nothing has come of it.

    def _voted(self, plan: Plan, record: Record) -> None:
        if isinstance(record, StepPrepared):
            self._votes.add((plan.steps[record.step].participant, "yes"))
        elif isinstance(record, VoteRefused):
            vote = "locked" if record.failure.reason == LOCKED else "no"
            self._votes.add((plan.steps[record.step].participant, vote))

    def _phase_2_over(self, before: Saga | None, at_ms: int, saga: Saga) -> None:
        """Of the round that `before` was in. One in which nothing was held took no time."""
        assert before is not None, "a two-phase commit is not over in the turn that starts it"
        decision, decided_at_ms = before.decision, at_ms
        if before.turn is not None:
            decided_at_ms = before.turn.at_ms
        elif decision is not None:
            decided_at_ms = max(step.prepared_at_ms for step in before.steps)
        word_of = "commit" if decision is CommitDecision.COMMIT else "abort"
        took_ms = max(0, at_ms - decided_at_ms)
        self._phase_2_duration.record(took_ms / 1000, (saga.definition_name, word_of))

    def _abandoned(self, plan: Plan, before: Saga | None) -> None:
        """What was open has no answer that anybody takes in any more, and no record of its own."""
        assert before is not None, "a saga is not abandoned in the turn that starts it"
        for step, state in enumerate(before.steps):
            if state.open:
                participant = plan.steps[step].participant
                self._attempts.add((participant, _VERBS[state.verb], "abandoned"))

    def _labels_of(self, plan: Plan) -> _PlanLabels:
        """Made once per plan: making them takes longer than counting."""
        labels = self._plan_labels.get(plan)
        if labels is None:
            labels = self._plan_labels[plan] = {
                kind: tuple(
                    (
                        (step.participant, _VERBS[kind.verb], of_attempt),
                        (plan.definition.name, step.name, of_step),
                    )
                    for step in plan.steps
                )
                for kind, (of_attempt, of_step) in _DEFINITE.items()
            }
        return labels

    def _answered(self, timing: Timing, labels: Labels) -> None:
        self._attempts.add(labels)
        took_us = (
            (timing.answered_at_ms - timing.sent_at_ms) * 1000 + timing.answered_us - timing.sent_us
        )
        self._attempt_duration.record(took_us / 1_000_000 if took_us > 0 else 0.0, labels)

    def _step_over(self, before: Saga | None, step: int, at_ms: int, labels: Labels) -> None:
        # From the state before the turn: the same turn may have begun to compensate the step.
        assert before is not None, "a saga starts without answers"
        took_ms = at_ms - before.steps[step].began_at_ms
        self._step_duration.record(took_ms / 1000 if took_ms > 0 else 0.0, labels)

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """One commit of so many turns took so long."""
        self._commit_duration.record(seconds)
        self._commit_turns.record(transitions)

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """A participant's breaker is in another state now."""
        self._transitions.add((participant, word(state)))


_OfTwoPhase = DecisionMade | RoundPlanned | HeuristicReported | StepStuck
_OF_TWO_PHASE: Final = (DecisionMade, RoundPlanned, HeuristicReported, StepStuck)

_NOT_ASKED: Final = frozenset((BREAKER_OPEN, NO_PARTICIPANT))
"""Reasons of a lane that did not ask for a vote."""

_Definite = (
    type[StepExecuted]
    | type[StepCompensated]
    | type[StepRejected]
    | type[StepPrepared]
    | type[VoteRefused]
)
_PlanLabels = Mapping[_Definite, Sequence[tuple[Labels, Labels]]]
"""By what became of it, for each step: the labels of its attempt, and its own."""

_DEFINITE: Final[Mapping[_Definite, tuple[str, str]]] = {
    StepExecuted: ("done", "executed"),
    StepCompensated: ("done", "compensated"),
    StepRejected: ("rejected", "rejected"),
    StepPrepared: ("done", "prepared"),
    VoteRefused: ("rejected", "rejected"),
}
"""What a record says of its attempt, and of its step."""

_DEFINITE_KINDS: Final = (StepExecuted, StepCompensated, StepRejected, StepPrepared, VoteRefused)


def _was_broken(record: AttemptFailed, records: Sequence[Record]) -> bool:
    """Whether the participant said so: the step is stuck at once then, for that very reason."""
    if record.misconfigured or record.timing.status != "OK":
        return False
    return any(
        isinstance(each, StepStuck) and each.step == record.step and each.failure == record.failure
        for each in records
    )


def _was_broken_to_vote(record: AttemptFailed, records: Sequence[Record]) -> bool:
    """The same of a vote: it is an abort at once. The second phase has a record for it."""
    if record.retry_at_ms or record.misconfigured or record.timing.status != "OK":
        return False
    if any(isinstance(each, StepGivenUp) for each in records):
        return False
    return any(
        isinstance(each, DecisionMade)
        and (each.step, each.failure) == (record.step, record.failure)
        for each in records
    )


def _gets_stuck(step: int, records: Sequence[Record]) -> bool:
    """Whether the same turn says that the step is stuck: that is what came of it, then."""
    return any(isinstance(each, StepStuck) and each.step == step for each in records)


def _counts(record: OperatorActed, records: Sequence[Record]) -> bool:
    """Whether it stands for its request, which may concern several steps with a record each.

    The confirmation of a restore does not: it is one, and in the histories of many sagas.
    """
    if record.action is OperatorAction.CONFIRM_RESTORE:
        return False
    return record is next(each for each in records if isinstance(each, OperatorActed))
