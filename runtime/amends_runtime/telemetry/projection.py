"""A saga's trace, as a projection of its history.

How to think about it. A trace is one more reading of the records, as the state is: the same records
always give the same spans, under ids that are derived from what they are about. So it does not
matter who makes them, when, or how often; a trace has no gap where a runtime died, and a saga of
last year has the trace that it had then.

1. A saga is the root span, a step a span below it, an attempt a span below its step; what a
   participant traces hangs below the attempt, whose id the call has carried to it.

       saga order
         step charge
           breaker open: payments             what the lane held back
           …/Execute                          CLIENT, one for each attempt
         compensate charge                    links to the step that it undoes

   Of a two-phase commit's branch it is `prepare debit`, for the vote, and then `commit debit` or
   `compensate debit`, which link to the vote; after a restore the vote may be in lost history.
2. A step's span is one *life* of it: from the first attempt of a verb and round until it ends or
   is stuck. What an operator's retry or another round brings is another life, and links to the one
   before. A branch that an operator should see to is still told the decision: its life goes on.
3. A span that is closed never changes again, whatever follows in the history. So spans may leave
   as they close, and leave once more after a crash: a receiver gets equal ones.
4. Times go forward. The instants of records are wall-clock times, of a clock that may be set back;
   where one lies before its predecessor, it and all later ones are moved by what is missing. What
   lies within `SAME_MS` is the same instant read with different precision, and not moved. So no
   span ends before it begins, none leaves its parent, and steps in sequence do not overlap.
5. A span has its first `MAX_EVENTS` events, and the number of the others: a step that is tried for
   weeks must not become a span that no collector takes.
6. Only what this program made up and words for programs are shown: ids, names, states, reasons,
   numbers. Never an input, a result, or a participant's message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from amends_runtime.core.definition import Plan
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    AttemptWithdrawn,
    CancelRequested,
    CommitDecision,
    DecisionMade,
    HeuristicReported,
    OperatorActed,
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
from amends_runtime.core.tracing import TRACEPARENT, Tracing
from amends_runtime.telemetry.spans import Attributes, Span, SpanEvent, SpanKind, SpanLink

__all__ = ["METHODS", "project"]

SAME_MS: Final = 2  # milliseconds are rounded down, and calls are measured in microseconds
MAX_EVENTS: Final = 128  # of one span, as in OpenTelemetry's own SDK
QUEUED_MS: Final = 100  # a shorter wait in a lane is a commit and a full event loop, and no news

MS: Final = 1_000_000
US: Final = 1_000

METHODS: Final = {
    Verb.PREPARE: "amends.v1.ParticipantService/Prepare",
    Verb.EXECUTE: "amends.v1.ParticipantService/Execute",
    Verb.COMPENSATE: "amends.v1.ParticipantService/Compensate",
}
"""`rpc.method` of each verb, in the words of OpenTelemetry's conventions for RPC."""


def project(
    tracing: Tracing, plan: Plan, records: Sequence[Record], *, open_too: bool = False
) -> list[Span]:
    """The spans of a saga that are closed, parents before their children.

    `records` is its whole history, from SagaStarted on. With `open_too` also those that are not
    closed, marked `is_open`: they end at the last record.
    """
    started = records[0]
    assert isinstance(started, SagaStarted), "a history begins with its start"
    trace = _Trace(tracing, plan, started)
    for record in records[1:]:
        trace.now_ns = trace.instant(record.at_ms)
        _READ[type(record)](trace, record)
    return trace.spans(open_too=open_too)


class _Attempt:
    """An attempt that has begun and not ended. `moved_ns` is the trace's when it began."""

    __slots__ = ("epoch", "moved_ns", "number", "start_ns")

    def __init__(self, number: int, start_ns: int, moved_ns: int, epoch: int) -> None:
        self.number = number
        self.start_ns = start_ns
        self.moved_ns = moved_ns
        self.epoch = epoch


class _Events:
    """What happened during a span; see rule 5."""

    __slots__ = ("dropped", "first")

    def __init__(self) -> None:
        self.first: list[SpanEvent] = []
        self.dropped = 0

    def add(self, event: SpanEvent) -> None:
        if len(self.first) < MAX_EVENTS:
            self.first.append(event)
        else:
            self.dropped += 1


class _Life:
    """One life of a step; see rule 2. `end_ns` is 0 until it is closed."""

    __slots__ = (
        "attempt",
        "below",
        "end_ns",
        "error",
        "events",
        "failed",
        "links",
        "outcome",
        "round",
        "span_id",
        "start_ns",
        "step",
        "verb",
    )

    def __init__(self, record: AttemptStarted, span_id: str, start_ns: int) -> None:
        self.step = record.step
        self.verb = record.verb
        self.round = record.round
        self.span_id = span_id
        self.start_ns = start_ns
        self.end_ns = 0
        self.attempt: _Attempt | None = None
        self.below: list[Span] = []
        self.events = _Events()
        self.links: tuple[SpanLink, ...] = ()
        self.outcome = ""
        self.error: str | None = None
        self.failed: AttemptFailed | None = None  # the last attempt that was

    def close(self, at_ns: int, outcome: str, error: str | None = None) -> None:
        self.end_ns, self.outcome, self.error = at_ns, outcome, error


class _Trace:
    """The trace as far as the history was read."""

    def __init__(self, tracing: Tracing, plan: Plan, started: SagaStarted) -> None:
        self.tracing = tracing
        self.plan = plan
        self.started = started
        self.saga_id = started.saga_id
        self.trace_id = tracing.trace_id(started.saga_id, started.traceparent)
        self.root_id = tracing.root_span(started.saga_id)
        self.moved_ns = 0  # how far the wall clock was set back, in all; see rule 4
        self.start_ns = self.now_ns = started.at_ms * MS
        self.end_ns = 0
        self.state: SagaState | None = None
        self.turned: SagaTurnedBack | DecisionMade | None = None  # the latter, if it is an ABORT
        self.decided: DecisionMade | None = None  # the last one
        self.broken: HeuristicReported | None = None  # the first that is contrary to its decision
        self.events = _Events()
        self.epoch = 0
        self.restart: Attributes = {}  # what the last restart's event tells
        self.lives: list[_Life] = []
        self.latest: dict[int, _Life] = {}  # of each step; below, of its forward ones, of each verb
        self.forward: dict[int, _Life] = {}
        self.by_verb: dict[tuple[int, Verb], _Life] = {}

    # -- time ----------------------------------------------------------------------------------

    def instant(self, at_ms: int) -> int:
        """A record's instant, which is never before the one before it."""
        at_ns = at_ms * MS + self.moved_ns
        if at_ns < self.now_ns - SAME_MS * MS:
            self.moved_ns += self.now_ns - at_ns
        return max(self.now_ns, at_ns)

    def on_the_wire(self, attempt: _Attempt, timing: Timing) -> tuple[int, int]:
        """When an attempt was sent and answered; the answer is when the record's turn was, too."""
        sent_ns = timing.sent_at_ms * MS + timing.sent_us * US + attempt.moved_ns
        took_ns = (timing.answered_at_ms - timing.sent_at_ms) * MS
        took_ns += (timing.answered_us - timing.sent_us) * US
        start_ns = max(attempt.start_ns, sent_ns)
        answered_ns = start_ns + max(0, took_ns)
        if answered_ns > self.now_ns + SAME_MS * MS:
            # Either clock was set back between the two. How long it took is known, by a clock that
            # was not, so the record's instant is what moves.
            self.moved_ns += answered_ns - self.now_ns
        self.now_ns = max(self.now_ns, answered_ns)
        return start_ns, answered_ns

    # -- what the parts are called -------------------------------------------------------------

    def event(self, name: str, **attributes: str | int | bool) -> Attributes:
        """Something that happened to the saga as a whole, now; with what is told of it."""
        told = _amends(attributes)
        self.events.add(SpanEvent(name, self.now_ns, told))
        return told

    def event_of(self, life: _Life, name: str, **attributes: str | int | bool) -> None:
        """Something that happened to a step, now."""
        life.events.add(SpanEvent(name, self.now_ns, _amends(attributes)))

    def link(self, span_id: str, what: str) -> SpanLink:
        """A link to another span of this trace."""
        return SpanLink(self.trace_id, span_id, {"amends.link": what})

    # -- attempts ------------------------------------------------------------------------------

    def runtime_is(self, epoch: int) -> None:
        """Notes that another runtime has the saga."""
        if self.epoch and epoch != self.epoch:
            self.restart = self.event("runtime restarted", epoch=epoch)
        self.epoch = epoch

    def begin(self, record: AttemptStarted) -> None:
        """An attempt begins, and a life with it unless one is under way."""
        self.runtime_is(record.epoch)
        life = self.latest.get(record.step)
        if life is None or life.end_ns:
            life = self._new_life(record)
        life.attempt = _Attempt(record.attempt, self.now_ns, self.moved_ns, record.epoch)

    def _new_life(self, record: AttemptStarted) -> _Life:
        span_id = self.tracing.step_span(
            self.saga_id, record.step, record.verb, record.round, record.attempt
        )
        life = _Life(record, span_id, self.now_ns)
        forward = self.forward.get(record.step)
        if record.verb is not Verb.COMPENSATE:
            self.forward[record.step] = life
        elif forward is not None and forward.round == record.round:
            life.links = (self.link(forward.span_id, "undoes"),)
        if record.verb is Verb.EXECUTE and forward is not None and forward.verb is Verb.PREPARE:
            life.links = (self.link(forward.span_id, "commits"),)
        before = self.by_verb.get((record.step, record.verb))
        if before is not None:
            life.links += (self.link(before.span_id, "retries"),)
        self.latest[record.step] = self.by_verb[record.step, record.verb] = life
        self.lives.append(life)
        return life

    def end(self, step: int, timing: Timing, outcome: str, *, error: str | None = None) -> _Life:
        """An attempt that was sent has ended."""
        life, attempt = self._under_way(step)
        sent_ns, answered_ns = self.on_the_wire(attempt, timing)
        self._waited(life, attempt, sent_ns, timing.held_ms)
        attributes: Attributes = {"rpc.response.status_code": timing.status}
        events: tuple[SpanEvent, ...] = ()
        if timing.held_ms:
            attributes["amends.held_ms"] = timing.held_ms
        if timing.polls:
            attributes["amends.polls"] = timing.polls
            events = (SpanEvent("polled", answered_ns, {"amends.polls": timing.polls}),)
        self._attempt_span(life, attempt, sent_ns, answered_ns, outcome, attributes, error, events)
        return life

    def lose(self, record: AttemptLost) -> None:
        """Nobody knows what became of an attempt, nor when."""
        self.runtime_is(record.epoch)
        lost = self.restart.get("amends.lost_attempts", 0)
        assert isinstance(lost, int), "a count"
        self.restart["amends.lost_attempts"] = lost + 1
        life, attempt = self._under_way(record.step)
        why = "lost: its runtime ended"
        self._attempt_span(life, attempt, attempt.start_ns, self.now_ns, "lost", {}, why)

    def withdraw(self, step: int) -> _Life:
        """An attempt was taken out of its lane before it was sent."""
        life, attempt = self._under_way(step)
        self._waited(life, attempt, self.now_ns, 0)
        self.event_of(life, "attempt withdrawn", attempt=attempt.number)
        life.attempt = None
        return life

    def _under_way(self, step: int) -> tuple[_Life, _Attempt]:
        life = self.latest[step]
        assert life.attempt is not None, "what ends has begun"
        return life, life.attempt

    def _attempt_span(  # noqa: PLR0917  # private, and called twice
        self,
        life: _Life,
        attempt: _Attempt,
        start_ns: int,
        end_ns: int,
        outcome: str,
        attributes: Attributes,
        error: str | None = None,
        events: tuple[SpanEvent, ...] = (),
        *,
        is_open: bool = False,
    ) -> None:
        life.attempt = None
        shown: Attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": METHODS[life.verb],
            "service.peer.name": self.plan.steps[life.step].participant,
            "amends.attempt": attempt.number,
            "amends.epoch": attempt.epoch,
            "amends.outcome": outcome,
            **attributes,
        }
        if error is not None:
            status = attributes.get("rpc.response.status_code", "OK")
            shown["error.type"] = error.partition(":")[0] if status == "OK" else status
        key = (self.saga_id, life.step, life.verb, life.round, attempt.number)
        life.below.append(
            Span(
                trace_id=self.trace_id,
                span_id=self.tracing.attempt_span(*key),
                parent_id=life.span_id,
                name=METHODS[life.verb],
                kind=SpanKind.CLIENT,
                start_ns=start_ns,
                end_ns=end_ns,
                attributes=shown,
                events=events,
                error=error,
                is_open=is_open,
            )
        )

    def _waited(self, life: _Life, attempt: _Attempt, until_ns: int, held_ms: int) -> None:
        """The time in a lane, where it was long or the breaker's doing."""
        if not held_ms and until_ns - attempt.start_ns < QUEUED_MS * MS:
            return
        participant = self.plan.steps[life.step].participant
        attributes: Attributes = {"amends.attempt": attempt.number}
        if held_ms:
            attributes["amends.held_ms"] = held_ms
        key = (self.saga_id, life.step, life.verb, life.round, attempt.number)
        life.below.append(
            Span(
                trace_id=self.trace_id,
                span_id=self.tracing.wait_span(*key),
                parent_id=life.span_id,
                name=f"breaker open: {participant}" if held_ms else f"queued: {participant}",
                kind=SpanKind.INTERNAL,
                start_ns=attempt.start_ns,
                end_ns=until_ns,
                attributes=attributes,
            )
        )

    # -- the result ----------------------------------------------------------------------------

    def spans(self, *, open_too: bool) -> list[Span]:
        """What there is, parents before children."""
        found = [self._root()] if self.end_ns or open_too else []
        for life in self.lives:
            if open_too and life.attempt is not None:
                key = (life.attempt, life.attempt.start_ns, self.now_ns)
                self._attempt_span(life, *key, "open", {}, is_open=True)
            if life.end_ns or open_too:
                found.append(self._step(life))
            found += life.below
        return found

    def _root(self) -> Span:
        started, caller = self.started, self.started.traceparent
        state = self.state.name if self.state is not None else "open"
        attributes: Attributes = {
            "amends.saga_id": self.saga_id,
            "amends.definition": started.definition_name,
            "amends.definition_hash": started.definition_hash,
            "amends.store_id": self.tracing.store_id,
            "amends.outcome": state,
        }
        if self.decided is not None:
            attributes["amends.decision"] = self.decided.decision.name.lower()
            attributes["amends.round"] = self.decided.round
        attributes.update((f"amends.label.{key}", text) for key, text in started.labels.items())
        parent_id = ""
        links: tuple[SpanLink, ...] = ()
        if TRACEPARENT.fullmatch(caller):
            if self.tracing.join:
                parent_id = caller[36:52]
            else:
                links = (SpanLink(caller[3:35], caller[36:52], {"amends.link": "started by"}),)
        return Span(
            trace_id=self.trace_id,
            span_id=self.root_id,
            parent_id=parent_id,
            name=f"saga {started.definition_name}",
            kind=SpanKind.INTERNAL,
            start_ns=self.start_ns,
            end_ns=self.end_ns or self.now_ns,
            attributes=attributes,
            events=tuple(self.events.first),
            dropped_events=self.events.dropped,
            links=links,
            error=self._why_not_completed(),
            is_open=not self.end_ns,
        )

    def _why_not_completed(self) -> str | None:
        if self.state is None or self.state is SagaState.COMPLETED:
            return None
        why = self.turned if self.broken is None else self.broken
        if why is None:
            return self.state.name
        where = "" if why.step is None else f" at {self.plan.step_names[why.step]}"
        return f"{self.state.name}: {why.failure.reason}{where}"

    def _step(self, life: _Life) -> Span:
        step = self.plan.steps[life.step]
        compensating = life.verb is Verb.COMPENSATE
        attributes: Attributes = {
            "amends.saga_id": self.saga_id,
            "amends.step": step.name,
            "amends.participant": step.participant,
            "amends.action": step.action,
            "amends.verb": life.verb.name.lower(),
            "amends.round": life.round,
            "amends.outcome": life.outcome or "open",
        }
        if compensating:
            attributes["amends.undoes"] = step.name
        return Span(
            trace_id=self.trace_id,
            span_id=life.span_id,
            parent_id=self.root_id,
            name=f"{self._doing(life.verb)} {step.name}",
            kind=SpanKind.INTERNAL,
            start_ns=life.start_ns,
            end_ns=life.end_ns or self.now_ns,
            attributes=attributes,
            events=tuple(life.events.first),
            dropped_events=life.events.dropped,
            links=life.links,
            error=life.error,
            is_open=not life.end_ns,
        )

    def _doing(self, verb: Verb) -> str:
        commits = verb is Verb.EXECUTE and self.plan.two_phase is not None
        return "commit" if commits else _NAMES[verb]


_NAMES: Final = {Verb.PREPARE: "prepare", Verb.EXECUTE: "step", Verb.COMPENSATE: "compensate"}


def _amends(attributes: Attributes) -> Attributes:
    return {f"amends.{key}": value for key, value in attributes.items()}


# -- what each record says ---------------------------------------------------------------------


def _executed(trace: _Trace, record: StepExecuted) -> None:
    trace.end(record.step, record.timing, "done").close(trace.now_ns, "done")


def _rejected(trace: _Trace, record: StepRejected | VoteRefused) -> None:
    # A refusal is an answer like any other: the call has not failed, the step has.
    life = trace.end(record.step, record.timing, "rejected")
    life.below[-1].attributes["amends.reason"] = record.failure.reason
    life.close(trace.now_ns, "rejected", record.failure.reason)


def _compensated(trace: _Trace, record: StepCompensated) -> None:
    trace.end(record.step, record.timing, "done").close(trace.now_ns, "done")


def _prepared(trace: _Trace, record: StepPrepared) -> None:
    trace.end(record.step, record.timing, "done").close(trace.now_ns, "prepared")


def _heuristic(trace: _Trace, record: HeuristicReported) -> None:
    """The participant says so: either that it has done what was decided, or that it has not."""
    committing = record.verb is Verb.EXECUTE
    reason, step = record.failure.reason, trace.plan.step_names[record.step]
    did = "nobody knows" if record.committed is None else _DID[record.committed]
    decision = "commit" if committing else "abort"
    if record.committed is committing:
        life = trace.end(record.step, record.timing, "done")
        trace.event_of(life, "heuristic outcome", did=did, reason=reason)
        life.close(trace.now_ns, "done")
    else:
        life = trace.end(record.step, record.timing, "broken", error=reason)
        life.close(trace.now_ns, "broken", reason)
        trace.broken = trace.broken or record
    trace.event("heuristic reported", step=step, decision=decision, did=did, reason=reason)


_DID: Final = {True: "committed", False: "rolled back"}


def _failed(trace: _Trace, record: AttemptFailed) -> None:
    reason = record.failure.reason
    life = trace.end(record.step, record.timing, "unknown", error=reason)
    life.failed = record
    if record.probe:  # the breaker says when the next one leaves, and its wait is a span
        life.below[-1].attributes["amends.probe"] = True
    elif record.retry_at_ms:
        delay_ms = max(0, record.retry_at_ms - record.at_ms)
        trace.event_of(life, "retry scheduled", delay_ms=delay_ms, reason=reason)
    _settle(trace, life)


def _lost(trace: _Trace, record: AttemptLost) -> None:
    trace.lose(record)
    life = trace.latest[record.step]
    trace.event_of(life, "attempt lost", attempt=record.attempt, epoch=record.epoch)
    _settle(trace, life)


def _withdrawn(trace: _Trace, record: AttemptWithdrawn) -> None:
    _settle(trace, trace.withdraw(record.step))


def _settle(trace: _Trace, life: _Life) -> None:
    """Once the saga has turned back, no attempt of a forward step follows the one that ended."""
    if trace.turned is None or life.verb is Verb.COMPENSATE or life.end_ns:
        return
    if any(span.kind is SpanKind.CLIENT for span in life.below):
        life.close(trace.now_ns, "unknown", "the saga turned back")
    else:
        life.close(trace.now_ns, "not run")


def _given_up(trace: _Trace, record: StepGivenUp) -> None:
    life = trace.latest[record.step]
    trace.event_of(life, "gave up", spent_ms=record.spent_ms)
    last = life.below[-1].error if life.below else None
    life.close(trace.now_ns, "given up", last or "gave up")


def _stuck(trace: _Trace, record: StepStuck) -> None:
    # It may have been closed before: in this very turn, so nobody has seen it closed otherwise.
    life, reason = trace.latest[record.step], record.failure.reason
    if trace.plan.two_phase is not None:
        trace.event_of(life, "needs operator", reason=reason)
        trace.event("branch needs operator", step=trace.plan.step_names[record.step], reason=reason)
        return  # it is still told the decision
    if life.failed is not None and _says_broken(life.failed, record):
        life.below[-1].attributes["amends.outcome"] = "broken"
    trace.event_of(life, "stuck", reason=reason)
    trace.event("step stuck", step=trace.plan.step_names[record.step], reason=reason)
    life.close(trace.now_ns, "stuck", reason)


def _says_broken(failed: AttemptFailed, stuck: StepStuck) -> bool:
    """Whether it is stuck at once, for what the participant answered itself."""
    answered = failed.timing.status == "OK" and not failed.misconfigured
    return answered and (failed.at_ms, failed.failure) == (stuck.at_ms, stuck.failure)


def _cancel(trace: _Trace, record: CancelRequested) -> None:
    trace.event("cancel requested", author=record.author)


def _turned_back(trace: _Trace, record: SagaTurnedBack) -> None:
    trace.turned = record
    where = {} if record.step is None else {"step": trace.plan.step_names[record.step]}
    cause, reason = record.cause.name.lower(), record.failure.reason
    trace.event("turned back", cause=cause, reason=reason, **where)
    for life in trace.latest.values():
        if life.attempt is None:
            _settle(trace, life)


def _decided(trace: _Trace, record: DecisionMade) -> None:
    trace.decided = record
    decision = record.decision.name.lower()
    if record.decision is CommitDecision.COMMIT:
        trace.event("decision made", decision=decision, round=record.round)
        return
    assert record.cause is not None, "an ABORT has a cause"
    trace.turned = record
    where = {} if record.step is None else {"step": trace.plan.step_names[record.step]}
    why = {"cause": record.cause.name.lower(), "reason": record.failure.reason}
    trace.event("decision made", decision=decision, round=record.round, **why, **where)
    asked = None if record.step is None else trace.latest[record.step]
    if asked is not None and _voted_broken(asked, record):
        asked.below[-1].attributes["amends.outcome"] = "broken"
        asked.close(trace.now_ns, "broken", record.failure.reason)
    for life in trace.latest.values():
        if life.attempt is None:
            _settle(trace, life)


def _voted_broken(life: _Life, abort: DecisionMade) -> bool:
    """Whether it is aborted at once, for what the participant answered itself."""
    failed = life.failed
    return (
        failed is not None
        and abort.cause is TurnCause.GAVE_UP
        and life.outcome != "given up"
        and (failed.timing.status, failed.misconfigured, failed.probe) == ("OK", False, False)
        and (failed.at_ms, failed.failure) == (abort.at_ms, abort.failure)
    )


def _another_round(trace: _Trace, record: RoundPlanned) -> None:
    trace.turned = None
    delay_ms = max(0, record.starts_at_ms - record.at_ms)
    trace.event("round planned", round=record.round, delay_ms=delay_ms)


def _operated(trace: _Trace, record: OperatorActed) -> None:
    where = {} if record.step is None else {"step": trace.plan.step_names[record.step]}
    action = record.action.name.lower()
    trace.event("operator acted", action=action, author=record.author, **where)


def _ended(trace: _Trace, record: SagaEnded) -> None:
    trace.state, trace.end_ns = record.state, trace.now_ns
    for life in trace.latest.values():
        if life.attempt is not None:
            key = (life.attempt, life.attempt.start_ns, trace.now_ns)
            trace._attempt_span(life, *key, "unknown", {}, "abandoned")  # noqa: SLF001  # one file
        if not life.end_ns:
            life.close(trace.now_ns, record.state.name.lower(), record.state.name)


_READ: Final[dict[type[Record], Callable[[_Trace, Any], None]]] = {
    AttemptStarted: _Trace.begin,
    StepExecuted: _executed,
    StepRejected: _rejected,
    StepCompensated: _compensated,
    AttemptFailed: _failed,
    AttemptLost: _lost,
    AttemptWithdrawn: _withdrawn,
    StepGivenUp: _given_up,
    StepStuck: _stuck,
    CancelRequested: _cancel,
    SagaTurnedBack: _turned_back,
    OperatorActed: _operated,
    StepPrepared: _prepared,
    VoteRefused: _rejected,
    DecisionMade: _decided,
    HeuristicReported: _heuristic,
    RoundPlanned: _another_round,
    SagaEnded: _ended,
}
