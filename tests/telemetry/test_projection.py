"""A saga's trace: well formed whatever happened, and the same whoever makes it, and when."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.definition import Definition, Kind, Plan, Step
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
from amends_runtime.core.tracing import Tracing
from amends_runtime.telemetry.encoding import encode_span
from amends_runtime.telemetry.projection import MAX_EVENTS, project
from amends_runtime.telemetry.spans import Span, SpanKind
from tests.core.definitions import chooser, plans
from tests.core.world import World

TRACING = Tracing("store-1")
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
AT = 1_700_000_000_000
MS = 1_000_000

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
