"""A saga's trace: well formed whatever happened, and the same whoever makes it, and when."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

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
    Answered,
    Broken,
    Done,
    Heuristic,
    Outcome,
    Rejected,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptFailed,
    AttemptLost,
    AttemptStarted,
    Failure,
    OperatorActed,
    OperatorAction,
    Record,
    SagaEnded,
    SagaStarted,
    SagaState,
    SagaTurnedBack,
    StepCompensated,
    StepExecuted,
    StepRejected,
    StepStuck,
    Timing,
    TurnCause,
    Verb,
)
from amends_runtime.core.saga import decide
from amends_runtime.core.tracing import Tracing
from amends_runtime.telemetry.encoding import Frame, encode_span, sender_attributes
from amends_runtime.telemetry.projection import MAX_EVENTS, project
from amends_runtime.telemetry.spans import Span, SpanKind
from tests.core.definitions import Choose, chooser, plans, two_phase_plans
from tests.core.two_phase_world import VotingWorld
from tests.core.world import World
from tests.telemetry.otlp_receiver import ReceivedSpan
from tests.telemetry.trace_rules import Expectation, assert_well_formed

TRACING = Tracing("store-1")
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
AT = 1_700_000_000_000
MS = 1_000_000
AMENDS = {"service.version": "1", "service.instance.id": "store-1"}

DO, UNDO = Verb.EXECUTE, Verb.COMPENSATE
EXECUTE = "amends.v1.ParticipantService/Execute"
COMPENSATE = "amends.v1.ParticipantService/Compensate"

ORDER = Plan(
    Definition(
        name="order",
        steps=(
            Step(name="reserve", participant="inventory", action="reserve"),
            Step(name="charge", participant="payments", action="charge"),
            Step(name="ship", participant="shipping", action="ship", kind=Kind.PIVOT),
        ),
    )
)


def started(caller: str = "", at_ms: int = AT) -> SagaStarted:
    """The first record of an order."""
    return SagaStarted(
        at_ms,
        "order-1",
        "order",
        "d" * 64,
        "c" * 64,
        Payload(b"secret-input"),
        0,
        {"tenant": "acme"},
        caller,
    )


def begun(
    step: int, attempt: int = 1, *, at: int, verb: Verb = DO, round_: int = 1, epoch: int = 1
) -> AttemptStarted:
    """An attempt's first record, so many milliseconds after the start."""
    return AttemptStarted(AT + at, step, verb, round_, attempt, epoch)


def on_wire(sent: int, answered: int, status: str = "OK", **rest: int) -> Timing:
    """When, in milliseconds after the start."""
    return Timing(AT + sent, AT + answered, status, **rest)


def done(step: int, sent: int, answered: int, attempt: int = 1, **rest: int) -> StepExecuted:
    """A step's success."""
    timing = on_wire(sent, answered, "OK", **rest)
    return StepExecuted(AT + answered, step, 1, attempt, timing, Payload(b"secret-result"))


def ended(state: SagaState, at: int) -> SagaEnded:
    """The last record."""
    return SagaEnded(AT + at, state)


def tree(spans: list[Span]) -> list[str]:
    """The spans as an indented list: name, start and end in milliseconds after the start."""
    depth = {span.span_id: 0 for span in spans}
    lines = []
    for span in spans:
        depth[span.span_id] = depth.get(span.parent_id, -1) + 1
        begin, end = (span.start_ns - AT * MS) / MS, (span.end_ns - AT * MS) / MS
        failed = f" !{span.error}" if span.error else ""
        opened = " open" if span.is_open else ""
        lines.append(f"{'  ' * depth[span.span_id]}{span.name} {begin:g}..{end:g}{failed}{opened}")
    return lines


def named(spans: list[Span], name: str) -> Span:
    """The only span of this name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def events(span: Span) -> list[str]:
    """What happened, in order."""
    return [event.name for event in span.events]


COMPLETED: list[Record] = [
    started(),
    begun(0, at=0),
    done(0, 1, 5, sent_us=250, answered_us=750),
    begun(1, at=5),
    done(1, 6, 9),
    begun(2, at=9),
    done(2, 10, 12),
    ended(SagaState.COMPLETED, 12),
]


def test_a_completed_saga() -> None:
    """A root, a step below it for each, an attempt below these; one after the other."""
    spans = project(TRACING, ORDER, COMPLETED)
    assert tree(spans) == [
        "saga order 0..12",
        "  step reserve 0..5.75",
        f"    {EXECUTE} 1.25..5.75",
        "  step charge 5.75..9",
        f"    {EXECUTE} 6..9",
        "  step ship 9..12",
        f"    {EXECUTE} 10..12",
    ]
    root, step, attempt = spans[0], spans[1], spans[2]
    assert root.parent_id == ""
    assert root.attributes == {
        "amends.saga_id": "order-1",
        "amends.definition": "order",
        "amends.definition_hash": "d" * 64,
        "amends.store_id": "store-1",
        "amends.outcome": "COMPLETED",
        "amends.label.tenant": "acme",
    }
    assert step.attributes["amends.participant"] == "inventory"
    assert (attempt.kind, step.kind, root.kind) == (
        SpanKind.CLIENT,
        SpanKind.INTERNAL,
        SpanKind.INTERNAL,
    )
    assert attempt.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": EXECUTE,
        "rpc.response.status_code": "OK",
        "service.peer.name": "inventory",
        "amends.attempt": 1,
        "amends.epoch": 1,
        "amends.outcome": "done",
    }


def test_the_span_that_a_call_names_is_its_attempt() -> None:
    """A participant's own span hangs below what the runtime makes much later."""
    header = TRACING.traceparent("order-1", "", 1, Verb.EXECUTE, 1, 1)
    attempt = project(TRACING, ORDER, COMPLETED)[4]
    assert header == f"00-{attempt.trace_id}-{attempt.span_id}-01"


def test_a_compensation_links_to_what_it_undoes() -> None:
    """The refusal is the step's and the saga's failure, and not the call's."""
    timing = on_wire(3, 4)
    spans = project(
        TRACING,
        ORDER,
        [
            started(),
            begun(0, at=0),
            done(0, 1, 2),
            begun(1, at=2),
            StepRejected(AT + 4, 1, 1, 1, timing, Failure("card_declined", "a secret message")),
            SagaTurnedBack(AT + 4, TurnCause.REJECTED, 1, Failure("card_declined", "secret")),
            begun(0, at=4, verb=UNDO),
            StepCompensated(AT + 6, 0, 1, 1, on_wire(5, 6)),
            ended(SagaState.COMPENSATED, 6),
        ],
    )
    assert tree(spans) == [
        "saga order 0..6 !COMPENSATED: card_declined at charge",
        "  step reserve 0..2",
        f"    {EXECUTE} 1..2",
        "  step charge 2..4 !card_declined",
        f"    {EXECUTE} 3..4",
        "  compensate reserve 4..6",
        f"    {COMPENSATE} 5..6",
    ]
    compensation, step = named(spans, "compensate reserve"), named(spans, "step reserve")
    assert [(link.span_id, link.attributes) for link in compensation.links] == [
        (step.span_id, {"amends.link": "undoes"})
    ]
    assert compensation.attributes["amends.undoes"] == "reserve"
    (turned,) = spans[0].events
    assert (turned.name, turned.at_ns) == ("turned back", (AT + 4) * MS)
    assert turned.attributes == {
        "amends.cause": "rejected",
        "amends.reason": "card_declined",
        "amends.step": "charge",
    }
    assert spans[4].attributes["amends.reason"] == "card_declined"
    assert "secret" not in repr(spans)


def test_retries_and_polls_and_what_the_breaker_held() -> None:
    """Each attempt is a span; what it waited for is one beside it, if it was long."""
    failed = AttemptFailed(
        AT + 3,
        0,
        Verb.EXECUTE,
        1,
        1,
        on_wire(1, 3, "UNAVAILABLE"),
        Failure("UNAVAILABLE", "secret"),
        retry_at_ms=AT + 103,
    )
    spans = project(
        TRACING,
        ORDER,
        [started(), begun(0, at=0), failed, begun(0, 2, at=103), done(0, 903, 950, 2, held_ms=700)],
    )
    assert tree(spans) == [
        "step reserve 0..950",
        f"  {EXECUTE} 1..3 !UNAVAILABLE",
        "  breaker open: inventory 103..903",
        f"  {EXECUTE} 903..950",
    ]
    (retry,) = spans[0].events
    assert retry.attributes == {"amends.delay_ms": 100, "amends.reason": "UNAVAILABLE"}
    assert spans[1].attributes["error.type"] == "UNAVAILABLE"
    assert spans[2].attributes["amends.held_ms"] == 700
    polled = project(
        TRACING, ORDER, [started(), begun(0, at=0), done(0, 200, 950, polls=3), begun(1, at=950)]
    )
    assert [span.name for span in polled] == ["step reserve", "queued: inventory", EXECUTE]
    assert (polled[2].attributes["amends.polls"], events(polled[2])) == (3, ["polled"])


def test_a_probe_schedules_no_retry() -> None:
    """The breaker says when the next attempt leaves, and the wait for that is a span."""
    failed = AttemptFailed(
        AT + 3,
        0,
        Verb.EXECUTE,
        1,
        1,
        on_wire(1, 3, "UNAVAILABLE"),
        Failure("UNAVAILABLE", "secret"),
        retry_at_ms=AT + 3,
        probe=True,
    )
    spans = project(
        TRACING,
        ORDER,
        [started(), begun(0, at=0), failed, begun(0, 2, at=3), done(0, 903, 950, 2, held_ms=900)],
    )
    assert spans[0].events == ()
    assert [span.attributes.get("amends.probe") for span in spans] == [None, True, None, None]


def test_a_step_that_is_tried_for_weeks_has_no_span_of_megabytes() -> None:
    """The first events are shown, the others counted; nothing follows that would change these."""
    history: list[Record] = [started()]
    for attempt in range(1, 1_001):
        at = 60_000 * attempt
        history += [
            begun(0, attempt, at=at),
            AttemptFailed(
                AT + at + 2,
                0,
                DO,
                1,
                attempt,
                on_wire(at, at + 2, "UNAVAILABLE"),
                Failure("UNAVAILABLE", "gone"),
                False,
                AT + at + 60_000,
            ),
        ]
    for day in range(1_000):
        history.append(OperatorActed(AT + 10**8 + day, OperatorAction.RETRY, 0, "ada", "again"))
    spans = project(TRACING, ORDER, history, open_too=True)
    step, root = named(spans, "step reserve"), spans[0]
    assert (len(step.events), step.dropped_events) == (MAX_EVENTS, 1_000 - MAX_EVENTS)
    assert (len(root.events), root.dropped_events) == (MAX_EVENTS, 1_000 - MAX_EVENTS)
    shorter = project(TRACING, ORDER, history[:401], open_too=True)
    assert named(shorter, "step reserve").events == step.events
    assert len(encode_span(step)) < 64 * 1024


def test_a_lost_attempt_is_seen_and_so_is_the_restart() -> None:
    """The trace goes on where the runtime died."""
    lost = AttemptLost(AT + 2_000, 0, Verb.EXECUTE, 1, 1, 2)
    spans = project(
        TRACING,
        ORDER,
        [
            started(),
            begun(0, at=0),
            lost,
            begun(0, 2, at=2_000, epoch=2),
            done(0, 2_001, 2_005, 2),
        ],
        open_too=True,
    )
    assert tree(spans) == [
        "saga order 0..2005 open",
        "  step reserve 0..2005",
        f"    {EXECUTE} 0..2000 !lost: its runtime ended",
        f"    {EXECUTE} 2001..2005",
    ]
    (restart,) = spans[0].events
    assert restart.name == "runtime restarted"
    assert restart.attributes == {"amends.epoch": 2, "amends.lost_attempts": 1}
    assert (spans[2].attributes["amends.outcome"], spans[2].attributes["error.type"]) == (
        "lost",
        "lost",
    )


def test_a_stuck_step_that_is_retried_has_two_spans() -> None:
    """The first was closed when it got stuck, and is not touched by what an operator does later."""
    stuck: list[Record] = [
        started(),
        begun(0, at=0),
        AttemptFailed(
            AT + 2, 0, Verb.EXECUTE, 1, 1, on_wire(1, 2), Failure("ledger_lost", "secret")
        ),
        StepStuck(AT + 2, 0, Verb.EXECUTE, Failure("ledger_lost", "secret")),
    ]
    retried: list[Record] = [
        *stuck,
        OperatorActed(AT + 60_000, OperatorAction.RETRY, 0, "ann", "mended", 1),
        begun(0, 2, at=60_000),
        done(0, 60_001, 60_002, 2),
    ]
    before, after = project(TRACING, ORDER, stuck), project(TRACING, ORDER, retried)
    assert tree(after) == [
        "step reserve 0..2 !ledger_lost",
        f"  {EXECUTE} 1..2 !ledger_lost",
        "step reserve 60000..60002",
        f"  {EXECUTE} 60001..60002",
    ]
    assert after[:2] == before
    assert before[1].attributes["amends.outcome"] == "broken"  # which the participant said itself
    assert [(one.span_id, one.attributes) for one in after[2].links] == [
        (before[0].span_id, {"amends.link": "retries"})
    ]
    root = project(TRACING, ORDER, retried, open_too=True)[0]
    assert events(root) == ["step stuck", "operator acted"]


def test_the_callers_trace_is_joined_or_linked() -> None:
    """By configuration; a header that is none is as if there were none."""
    caller = started(CALLER)
    joined = project(TRACING, ORDER, [caller, ended(SagaState.ABANDONED, 1)])[0]
    assert (joined.trace_id, joined.parent_id) == (CALLER[3:35], CALLER[36:52])
    assert joined.links == ()
    apart = Tracing("store-1", join=False)
    linked = project(apart, ORDER, [caller, ended(SagaState.ABANDONED, 1)])[0]
    assert linked.trace_id != CALLER[3:35]
    assert linked.parent_id == ""
    assert [(one.trace_id, one.span_id) for one in linked.links] == [(CALLER[3:35], CALLER[36:52])]
    alone = project(TRACING, ORDER, [started("nonsense"), ended(SagaState.ABANDONED, 1)])[0]
    assert (alone.parent_id, alone.links) == ("", ())
    assert alone.trace_id == linked.trace_id


def test_a_clock_that_is_set_back_makes_no_nonsense() -> None:
    """How long calls took is known from another clock, and shows as it was."""
    hour = 3_600_000
    spans = project(
        TRACING,
        ORDER,
        [
            started(),
            begun(0, at=0),
            # Set back while the call was on the wire: it was answered by a clock that was not.
            msgspec.structs.replace(done(0, 1, 2_001), at_ms=AT + 2_001 - hour),
            begun(1, at=2_001 - hour),
            done(1, 2_002 - hour, 2_052 - hour),
            # And once more while nothing was.
            begun(2, at=2_052 - 2 * hour),
            done(2, 2_053 - 2 * hour, 2_063 - 2 * hour),
            ended(SagaState.COMPLETED, 2_063 - 2 * hour),
        ],
    )
    assert tree(spans) == [
        "saga order 0..2063",
        "  step reserve 0..2001",
        f"    {EXECUTE} 1..2001",
        "  step charge 2001..2052",
        f"    {EXECUTE} 2002..2052",
        "  step ship 2052..2063",
        f"    {EXECUTE} 2053..2063",
    ]


# -- two-phase commits -----------------------------------------------------------------------------

PREPARE = "amends.v1.ParticipantService/Prepare"

Told = tuple[int, Outcome]
"""A step, and what its open attempt ends with."""


def a_transfer(*answers: Told, retry: RetryPolicy | None = None) -> list[Span]:
    """The trace of a two-phase commit of `debit` and `credit`, answered 10 ms after each other."""
    steps = tuple(
        Step(name=name, participant=bank, action=name, retry=retry, compensation_retry=retry)
        for name, bank in (("debit", "east"), ("credit", "west"))
    )
    definition = Definition(
        name="transfer",
        mode=Mode.TWO_PHASE_COMMIT,
        steps=steps,
        two_phase=TwoPhase(locked_retries=1),
    )
    plan, now_ms = Plan(normalise(definition)), AT
    start = StartSaga(saga_id="t-1", content_hash="c", input=Payload(b""))
    decision = decide(plan, None, start, now_ms, 1)
    records = [*decision.records]
    for number, outcome in answers:
        now_ms += 10
        step = decision.saga.steps[number]
        if not step.open:  # another round's, or another attempt's, time has come
            decision = decide(plan, decision.saga, Wake(now_ms + 600_000), now_ms, 1)
            records += decision.records
            step = decision.saga.steps[number]
        message = Answered(
            step=number,
            verb=step.verb,
            round=step.round,
            attempt=step.attempt,
            sent_at_ms=now_ms - 5,
            answered_at_ms=now_ms,
            status=outcome.reason if isinstance(outcome, Unknown) else "OK",
            polls=0,
            outcome=outcome,
        )
        decision = decide(plan, decision.saga, message, now_ms, 1)
        records += decision.records
    assert decision.saga.ended
    return project(TRACING, plan, records)


def outcomes(spans: list[Span]) -> list[tuple[str, object]]:
    """What became of each step's life, in order."""
    return [(each.name, each.attributes["amends.outcome"]) for each in spans if each.parent_id]


def test_a_two_phase_commit_shows_votes_and_what_was_told() -> None:
    """The decision is an event of the root, at the instant of the last vote."""
    spans = a_transfer((0, Done()), (1, Done()), (1, Done()), (0, Done()))
    assert tree(spans) == [
        "saga transfer 0..40",
        "  prepare debit 0..10",
        f"    {PREPARE} 5..10",
        "  prepare credit 0..20",
        f"    {PREPARE} 15..20",
        "  commit debit 20..40",
        f"    {EXECUTE} 35..40",
        "  commit credit 20..30",
        f"    {EXECUTE} 25..30",
    ]
    root = spans[0]
    [decided] = root.events
    assert (decided.name, decided.at_ns) == ("decision made", (AT + 20) * MS)
    assert decided.attributes == {"amends.decision": "commit", "amends.round": 1}
    assert (root.attributes["amends.decision"], root.attributes["amends.round"]) == ("commit", 1)
    [link] = named(spans, "commit debit").links
    assert link.span_id == named(spans, "prepare debit").span_id
    assert link.attributes == {"amends.link": "commits"}


def test_a_lock_another_round_and_a_refusal() -> None:
    """Each round's lives link those of the one before; the root says why the last one failed."""
    locked = ((0, Done()), (1, Rejected("LOCKED")), (0, Done()))
    spans = a_transfer(*locked, (0, Done()), (1, Rejected("no_funds")), (0, Done()))
    root = spans[0]
    assert events(root) == ["decision made", "round planned", "decision made"]
    assert root.error == "COMPENSATED: no_funds at credit"
    assert root.events[0].attributes == {
        "amends.decision": "abort",
        "amends.round": 1,
        "amends.cause": "rejected",
        "amends.reason": "LOCKED",
        "amends.step": "credit",
    }
    assert (root.attributes["amends.decision"], root.attributes["amends.round"]) == ("abort", 2)
    first, second = (each for each in spans if each.name == "prepare debit")
    assert [link.span_id for link in second.links] == [first.span_id]
    _, undone = (each for each in spans if each.name == "compensate debit")
    assert {link.attributes["amends.link"]: link.span_id for link in undone.links} == {
        "undoes": second.span_id,
        "retries": next(each for each in spans if each.name == "compensate debit").span_id,
    }


@pytest.mark.parametrize(
    ("outcome", "did"),
    [
        (Broken("vote_lost"), "nobody knows"),
        (Rejected("vote_lost"), "rolled back"),
        (Heuristic(False, "vote_lost"), "rolled back"),
    ],
)
def test_a_broken_vote_is_an_error_from_the_attempt_up_to_the_root(
    outcome: Outcome, did: str
) -> None:
    """And an event of the root at once, though the others are told for a while yet."""
    spans = a_transfer((0, Done()), (1, Done()), (0, outcome), (1, Done()))
    branch = named(spans, "commit debit")
    [attempt] = [each for each in spans if each.parent_id == branch.span_id]
    assert (branch.error, branch.attributes["amends.outcome"]) == ("vote_lost", "broken")
    assert (attempt.error, attempt.attributes["amends.outcome"]) == ("vote_lost", "broken")
    assert named(spans, "commit credit").error is None
    root = spans[0]
    assert root.error == "MIXED: vote_lost at debit"
    assert events(root) == ["decision made", "heuristic reported"]
    assert root.events[1].attributes == {
        "amends.step": "debit",
        "amends.decision": "commit",
        "amends.did": did,
        "amends.reason": "vote_lost",
    }


def test_a_heuristic_outcome_that_agrees_is_no_error_and_is_not_hidden() -> None:
    """It is on the branch and on the root."""
    spans = a_transfer((0, Done()), (1, Done()), (0, Heuristic(True, "by_hand")), (1, Done()))
    assert all(each.error is None for each in spans)
    assert events(named(spans, "commit debit")) == ["heuristic outcome"]
    assert events(spans[0]) == ["decision made", "heuristic reported"]


def test_a_branch_that_needs_an_operator_is_one_life_all_the_same() -> None:
    """It is told on and on: nothing has ended until it acknowledges."""
    hasty = RetryPolicy(first_ms=1, max_ms=1, give_up_after_ms=1)
    unknown = Unknown("UNAVAILABLE")
    spans = a_transfer(
        (0, Done()), (1, Done()), (1, Done()), (0, unknown), (0, unknown), (0, Done()), retry=hasty
    )
    told = named(spans, "commit debit")
    assert (told.error, told.attributes["amends.outcome"]) == (None, "done")
    assert [name for name in events(told) if name != "retry scheduled"] == ["needs operator"]
    assert events(spans[0]) == ["decision made", "branch needs operator"]
    assert len([each for each in spans if each.parent_id == told.span_id]) == 3


def test_a_participant_that_cannot_vote_is_broken_and_the_others_not_run_or_undone() -> None:
    """Its attempt says so; who was asked meanwhile and answers is rolled back."""
    spans = a_transfer((0, Broken("ledger_lost")), (1, Done()), (0, Done()), (1, Done()))
    asked = named(spans, "prepare debit")
    [attempt] = [each for each in spans if each.parent_id == asked.span_id]
    assert attempt.attributes["amends.outcome"] == "broken"
    assert outcomes([each for each in spans if each.kind is SpanKind.INTERNAL]) == [
        ("prepare debit", "broken"),
        ("prepare credit", "prepared"),
        ("compensate debit", "done"),
        ("compensate credit", "done"),
    ]
    assert spans[0].error == "COMPENSATED: ledger_lost at debit"


def check_form(trace: list[Span], *, ended_too: bool) -> None:
    """What must hold of every trace, given with its open spans."""
    by_id = {span.span_id: span for span in trace}
    assert len(by_id) == len(trace)
    assert {span.trace_id for span in trace} == {TRACING.trace_id("s-1", "")}
    root, *rest = trace
    assert root.parent_id == ""
    assert root.is_open is not ended_too
    for span in trace:
        assert span.start_ns <= span.end_ns
        assert all(span.start_ns <= event.at_ns <= span.end_ns for event in span.events)
        assert all(link.span_id in by_id for link in span.links)
        assert (span.error is None) or span.error
    for span in rest:
        parent = by_id[span.parent_id]
        assert parent.start_ns <= span.start_ns
        assert span.end_ns <= parent.end_ns
        assert parent.is_open or not span.is_open


@given(plans(), st.data(), st.integers(0, 60), st.booleans())
def test_every_history_has_a_well_formed_trace(
    plan: Plan,
    data: st.DataObject,
    count: int,
    clock_jumps: bool,  # noqa: FBT001  # drawn
) -> None:
    """Whatever happened; and what is closed after some turn looks the same after every later one.

    So it does not matter when a span is sent, or that a new runtime sends it again.
    """
    choose = chooser(data)
    world = World(plan, choose)
    for _ in range(count):
        world.act()
    check_every_prefix(world, choose, clock_jumps=clock_jumps)


@given(two_phase_plans(), st.data(), st.integers(0, 60), st.booleans())
def test_every_two_phase_commit_has_a_well_formed_trace(
    plan: Plan,
    data: st.DataObject,
    count: int,
    clock_jumps: bool,  # noqa: FBT001  # drawn
) -> None:
    """The same, whatever is voted, decided and broken; and by all the rules of a trace at its end.

    Nobody is told what is not decided, in any round, and each end links its vote.
    """
    choose = chooser(data)
    world = VotingWorld(plan, choose, deadline_ms=60_000)
    for _ in range(count):
        world.act()
    world.calm_down()
    check_every_prefix(world, choose, clock_jumps=clock_jumps)
    frame = Frame(sender_attributes("store-1", {}))
    message = frame.encode(project(TRACING, plan, world.records))
    request = ExportTraceServiceRequest.FromString(message)
    received = [
        ReceivedSpan(proto, {"service.name": "amends", **AMENDS}, scoped.scope.name)
        for resource in request.resource_spans
        for scoped in resource.scope_spans
        for proto in scoped.spans
    ]
    assert_well_formed(received, Expectation(crashed=True, traced=False))


def check_every_prefix(world: World, choose: Choose, *, clock_jumps: bool) -> None:
    """Of a history, turn by turn; `clock_jumps`: each turn may be at another time of its own."""
    plan = world.plan
    records: list[Record] = []
    sent: dict[str, Span] = {}
    off_ms = 0
    for _, decision in world.told:
        if clock_jumps:
            off_ms += choose([0, 0, 0, -50, -7_200_000, 3_600_000])
        records += [
            msgspec.structs.replace(one, at_ms=max(1, one.at_ms + 10**10 + off_ms))
            for one in decision.records
        ]
        now = {span.span_id: span for span in project(TRACING, plan, records)}
        assert not any(span.is_open for span in now.values())
        assert {key: now[key] for key in sent} == sent
        sent = now
        check_form(
            project(TRACING, plan, records, open_too=True),
            ended_too=decision.saga.end is not None,
        )
    assert world.saga is not None
    if world.saga.ended:
        assert len(sent) == len(project(TRACING, plan, records, open_too=True))
