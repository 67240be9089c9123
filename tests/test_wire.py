"""The translation between contract and core: nothing is lost, nothing from outside harms."""

import contextlib
import enum
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends.v1 import operator_pb2, participant_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.core.breaker import Breaker, BreakerState
from amends_runtime.core.definition import (
    FORWARD_RETRY,
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
    content_hash,
    normalise,
    violations,
)
from amends_runtime.core.messages import (
    Broken,
    Done,
    Heuristic,
    InProgress,
    Outcome,
    Rejected,
    Unknown,
)
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
from amends_runtime.core.saga import PROGRESS_LIMIT_MS, Saga, StepStatus, fold
from amends_runtime.errors import InvalidRequest
from amends_runtime.ports import Call, RegisteredDefinition, SagaSummary, StoreIdentity
from amends_runtime.wire import definitions as wire_definitions
from amends_runtime.wire import nouns
from amends_runtime.wire import participants as wire_participants
from amends_runtime.wire import sagas as wire_sagas

IDENTITY = StoreIdentity("store-1", "incarnation-1", 7)

ORDER = Definition(
    name="order",
    steps=(
        Step(name="reserve", participant="inventory", action="reserve"),
        Step(name="charge", participant="payments", action="charge", timeout_ms=5_000),
        Step(name="ship", participant="shipping", action="ship", kind=Kind.PIVOT),
    ),
    deadline_ms=60_000,
)
PLAN = Plan(ORDER)


# -- definitions -----------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True)
durations = st.integers(min_value=1, max_value=2**53)
policies = st.builds(
    RetryPolicy,
    first_ms=durations,
    factor=st.floats(min_value=1, max_value=100),
    max_ms=durations,
    give_up_after_ms=durations,
)
steps = st.builds(
    Step,
    name=names,
    participant=names,
    action=names,
    kind=st.sampled_from(Kind),
    after=st.none() | st.lists(names, max_size=3).map(tuple),
    uses=st.none() | st.lists(names, max_size=3).map(tuple),
    timeout_ms=durations,
    retry=st.none() | policies,
    compensation_retry=st.none() | policies,
)
definitions = st.builds(
    Definition,
    name=names,
    steps=st.lists(steps, max_size=5).map(tuple),
    deadline_ms=st.integers(min_value=0, max_value=2**53),
    retention_ms=st.integers(min_value=0, max_value=2**53),
)
commits = st.builds(
    Definition,
    name=names,
    mode=st.just(Mode.TWO_PHASE_COMMIT),
    steps=st.lists(steps, max_size=5).map(tuple),
    deadline_ms=st.integers(min_value=0, max_value=2**53),
    two_phase=st.none()
    | st.builds(
        TwoPhase,
        ordered=st.booleans(),
        locked_retries=st.integers(min_value=-(2**31), max_value=2**31 - 1),
    ),
)


@given(definitions | commits)
def test_a_definition_survives_the_wire(definition: Definition) -> None:
    """Out, through bytes and in again it is the same; so is what was normalised."""
    for one in (definition, normalise(definition)):
        sent = wire.definition_to_proto(one).SerializeToString()
        assert wire.definition_from_proto(types_pb2.Definition.FromString(sent)) == one


def test_zeros_are_the_defaults_of_the_core() -> None:
    """A definition that says only what it must has the content hash of the core's own defaults."""
    message = types_pb2.Definition(name="order")
    for name, kind in (
        ("reserve", types_pb2.STEP_KIND_UNSPECIFIED),
        ("ship", types_pb2.STEP_KIND_PIVOT),
    ):
        message.steps.add(
            name=name,
            kind=kind,
            call=types_pb2.CallStep(
                participant="p",
                action="a",
                retry=types_pb2.RetryPolicy(),
                compensation_retry=types_pb2.RetryPolicy(),
            ),
        )
    expected = Definition(
        name="order",
        steps=(
            Step(name="reserve", participant="p", action="a"),
            Step(name="ship", participant="p", action="a", kind=Kind.PIVOT),
        ),
    )
    assert content_hash(wire.definition_from_proto(message)) == content_hash(expected)


def test_absent_and_empty_after_are_told_apart() -> None:
    """Absent waits for the step before; empty waits for nothing."""
    message = wire.definition_to_proto(ORDER)
    message.steps[1].after.SetInParent()
    first, second, third = normalise(wire.definition_from_proto(message)).steps
    assert (first.after, second.after, third.after) == ((), (), ("charge",))


def test_what_the_core_cannot_say_is_refused_with_everything_else() -> None:
    """Work of later versions, no work, unknown enum values: all of it at once, and the rest too."""
    message = wire.definition_to_proto(ORDER)
    message.name = "Order"
    message.mode = 9  # type: ignore[assignment]  # what a newer client might send
    message.two_phase.ordered = True
    message.steps[0].kind = 8  # type: ignore[assignment]  # as above
    message.steps[1].sleep.duration_ms = 5
    message.steps.add(name="nothing")
    message.steps.add(name="signal", wait_signal=types_pb2.WaitSignalStep(signal="s"))
    message.steps.add(name="child", saga=types_pb2.SubSagaStep(definition="d"))
    with pytest.raises(InvalidRequest) as refused:
        wire.definition_from_proto(message)
    fields = [violation.field for violation in refused.value.violations]
    assert fields[:8] == [
        "definition.mode",
        "definition.two_phase",
        "definition.steps[0].kind",
        "definition.steps[1].sleep",
        "definition.steps[3].call",
        "definition.steps[4].wait_signal",
        "definition.steps[5].saga",
        "definition.name",
    ]
    assert len(set(fields)) == len(fields)
    assert "not available in this version" in refused.value.violations[3].message
    assert "STEP_KIND_PIVOT" in refused.value.violations[2].message


def test_more_steps_than_there_may_be_are_not_read() -> None:
    """The number is named, and those that count are judged all the same."""
    message = types_pb2.Definition(name="order")
    for number in range(200):
        message.steps.add(name=f"s{number}")
    with pytest.raises(InvalidRequest) as refused:
        wire.definition_from_proto(message)
    fields = [violation.field for violation in refused.value.violations]
    assert fields[0] == "definition.steps"
    assert "200 steps, and 128 are the most" in refused.value.violations[0].message
    assert fields[1:] == [f"definition.steps[{number}].call" for number in range(128)]


def test_zeros_in_a_two_phase_commit_are_its_own_defaults() -> None:
    """Of both retry policies as well: locks are held while a branch rolls back."""
    message = types_pb2.Definition(name="transfer", mode=types_pb2.MODE_TWO_PHASE_COMMIT)
    for name in ("debit", "credit"):
        message.steps.add(
            name=name,
            call=types_pb2.CallStep(
                participant="p",
                action="a",
                retry=types_pb2.RetryPolicy(),
                compensation_retry=types_pb2.RetryPolicy(),
            ),
        )
    expected = Definition(
        name="transfer",
        mode=Mode.TWO_PHASE_COMMIT,
        steps=tuple(Step(name=n, participant="p", action="a") for n in ("debit", "credit")),
    )
    read = wire.definition_from_proto(message)
    assert content_hash(read) == content_hash(expected)
    assert normalise(read).steps[0].compensation_retry == FORWARD_RETRY
    assert (read.two_phase, normalise(read).two_phase) == (None, TwoPhase())
    message.two_phase.SetInParent()
    assert content_hash(wire.definition_from_proto(message)) == content_hash(expected)


def test_what_a_two_phase_commit_has_not_reaches_the_core_which_refuses_it() -> None:
    """The wire can say it; whether it means anything is the core's business."""
    message = wire.definition_to_proto(ORDER)
    message.mode = types_pb2.MODE_TWO_PHASE_COMMIT
    message.two_phase.locked_retries = -1
    message.steps[0].after.SetInParent()
    message.steps[1].uses.names.append("reserve")
    found = violations(wire.definition_from_proto(message))
    assert [violation.field for violation in found] == [
        "two_phase.locked_retries",
        "steps[1].uses",
        "steps[2].kind",
    ]


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading_of_a_definition(data: bytes) -> None:
    """Whatever parses is read or refused."""
    message = types_pb2.Definition()
    try:
        message.MergeFromString(data)
    except Exception:  # noqa: BLE001  # gRPC refuses these before we see them
        return
    with contextlib.suppress(InvalidRequest):  # a refusal in words is all that may happen
        wire.definition_from_proto(message)


def test_a_registered_definition() -> None:
    """Content, name, version and whether it is the latest."""
    registered = RegisteredDefinition(normalise(ORDER), PLAN.content_hash, 3, 1_000)
    message = wire.registered_to_proto(registered, latest=True)
    assert wire.definition_from_proto(message.definition) == normalise(ORDER)
    assert (message.content_hash, message.version) == (PLAN.content_hash, 3)
    assert (message.registered_at_ms, message.latest) == (1_000, True)


# -- payloads and starts ---------------------------------------------------------------------------

payloads = st.builds(Payload, st.binary(max_size=50), st.text(max_size=20))


@given(payloads)
def test_a_payload_survives_the_wire(payload: Payload) -> None:
    """Bytes and content type arrive unchanged."""
    sent = wire.payload_to_proto(payload).SerializeToString()
    assert wire.payload_from_proto(types_pb2.Payload.FromString(sent)) == payload


label_maps = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
starts = st.tuples(
    st.text(max_size=5), st.text(max_size=5), payloads, label_maps, st.integers(0, 2**40)
)


@given(starts, starts)
def test_two_starts_have_one_hash_only_if_they_are_one(
    one: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    """Equal content, equal hash; anything else, another hash."""
    same = wire.start_content_hash(*one) == wire.start_content_hash(*other)
    assert same == (one == other)


def test_the_order_of_labels_and_the_border_between_fields_are_unambiguous() -> None:
    """A map has no order; bytes do not wander from one field into the next."""

    def hash_of(data: bytes, content_type: str, labels: dict[str, str]) -> str:
        return wire.start_content_hash("d", "", Payload(data, content_type), labels, 0)

    assert hash_of(b"", "", {"a": "1", "b": "2"}) == hash_of(b"", "", {"b": "2", "a": "1"})
    assert hash_of(b"ab", "c", {}) != hash_of(b"a", "bc", {})
    assert hash_of(b"", "", {"a": "b"}) != hash_of(b"", "", {"ab": ""})


def test_the_hash_of_a_start_never_changes() -> None:
    """It is stored with every saga, so a later version must come to the same one."""
    payload = Payload(b'{"sku":"A"}', "application/json")
    assert wire.start_content_hash("order", "", payload, {"a": "1"}, 60_000) == (
        "34dadea25466c45d8a34339634e203c66cbd6986455a109400b4dafa1a1dac13"
    )


# -- sagas and histories ---------------------------------------------------------------------------

TIMING = Timing(110, 120, "OK", 2)
INPUT = Payload(b"input", "text/plain")
RESULT = Payload(b"result", "text/plain")
REFUSAL = Failure("card_declined", "no money")
HISTORY: list[Record] = [
    SagaStarted(
        at_ms=100,
        saga_id="s-1",
        definition_name="order",
        definition_hash=PLAN.content_hash,
        content_hash="c",
        input=INPUT,
        deadline_at_ms=60_100,
        labels={"a": "1"},
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    ),
    AttemptStarted(100, 0, Verb.EXECUTE, 1, 1, 7),
    StepExecuted(120, 0, 1, 1, TIMING, RESULT),
    AttemptStarted(120, 1, Verb.EXECUTE, 1, 1, 7),
    AttemptFailed(
        130,
        1,
        Verb.EXECUTE,
        1,
        1,
        TIMING,
        Failure("UNIMPLEMENTED"),
        misconfigured=True,
        retry_at_ms=140,
    ),
    AttemptStarted(140, 1, Verb.EXECUTE, 1, 2, 7),
    AttemptLost(150, 1, Verb.EXECUTE, 1, 2, 8),
    AttemptStarted(150, 1, Verb.EXECUTE, 1, 3, 8),
    AttemptWithdrawn(155, 1, Verb.EXECUTE, 1, 3),
    AttemptStarted(156, 1, Verb.EXECUTE, 1, 4, 8),
    StepRejected(160, 1, 1, 4, TIMING, REFUSAL),
    CancelRequested(161, "ann", "changed her mind"),
    SagaTurnedBack(162, TurnCause.REJECTED, 1, REFUSAL),
    AttemptStarted(162, 1, Verb.COMPENSATE, 1, 1, 8),
    StepCompensated(170, 1, 1, 1, TIMING),
    AttemptStarted(170, 0, Verb.COMPENSATE, 1, 1, 8),
    AttemptFailed(180, 0, Verb.COMPENSATE, 1, 1, TIMING, Failure("UNAVAILABLE", "gone")),
    StepGivenUp(180, 0, 10_000),
    StepStuck(180, 0, Verb.COMPENSATE, Failure("RETRIES_EXHAUSTED", "gone")),
]


TRANSFER = Definition(
    name="transfer",
    mode=Mode.TWO_PHASE_COMMIT,
    steps=(
        Step(name="debit", participant="east", action="debit"),
        Step(name="credit", participant="west", action="credit"),
    ),
    two_phase=TwoPhase(locked_retries=1),
)
TRANSFER_PLAN = Plan(TRANSFER)
LOCKED = Failure("LOCKED", "somebody else is at it")
BEGUN = msgspec.structs.replace(
    HISTORY[0], definition_name="transfer", definition_hash=TRANSFER_PLAN.content_hash
)
FIRST_ROUND: list[Record] = [
    BEGUN,
    AttemptStarted(100, 0, Verb.PREPARE, 1, 1, 7),
    AttemptStarted(100, 1, Verb.PREPARE, 1, 1, 7),
    StepPrepared(120, 0, 1, 1, TIMING, RESULT),
    VoteRefused(121, 1, 1, 1, TIMING, LOCKED),
    DecisionMade(121, CommitDecision.ABORT, 1, TurnCause.REJECTED, 1, LOCKED),
    AttemptStarted(121, 0, Verb.COMPENSATE, 1, 1, 7),
    StepCompensated(130, 0, 1, 1, TIMING),
    RoundPlanned(130, 2, 230),
]
VOTES: list[Record] = [
    *FIRST_ROUND,
    AttemptStarted(230, 0, Verb.PREPARE, 2, 1, 7),
    AttemptStarted(230, 1, Verb.PREPARE, 2, 1, 7),
    StepPrepared(240, 0, 2, 1, TIMING, RESULT),
    StepPrepared(241, 1, 2, 1, TIMING, Payload()),
]
SECOND_ROUND: list[Record] = [
    *VOTES,
    DecisionMade(241, CommitDecision.COMMIT, 2),
    AttemptStarted(241, 0, Verb.EXECUTE, 2, 1, 7),
    AttemptStarted(241, 1, Verb.EXECUTE, 2, 1, 7),
    HeuristicReported(250, 1, Verb.EXECUTE, 2, 1, TIMING, False, Failure("let_go", "by hand")),
]

RETRIED = OperatorActed(185, OperatorAction.RETRY, 0, "ann", "it is mended", 2)
ABANDONED = OperatorActed(186, OperatorAction.ABANDON, None, "ann", "done by hand")


def test_a_result_that_was_left_out_says_why() -> None:
    """In the history; a result that is there has no error beside it."""
    failure = Failure("RESULT_TOO_LARGE", "2 bytes, and 1 is the most")
    left_out = translated(StepExecuted(260, 0, 1, 1, TIMING, Payload(), failure)).step_executed
    assert left_out.error == types_pb2.Error(reason=failure.reason, message=failure.message)
    there = translated(StepExecuted(260, 0, 1, 1, TIMING, Payload(b"1"))).step_executed
    assert not there.HasField("error")


def test_each_kind_of_record_is_translated() -> None:
    """Every kind of record has its own fact in the contract."""
    ended = SagaEnded(190, SagaState.COMPENSATED)
    records = [*HISTORY, *SECOND_ROUND, ended, RETRIED, ABANDONED]
    assert {type(record) for record in records} == set(get_args(Record))
    kinds = {translated(record).WhichOneof("fact") for record in records}
    assert kinds == {
        "saga_started",
        "attempt_started",
        "step_executed",
        "step_rejected",
        "step_compensated",
        "attempt_failed",
        "attempt_lost",
        "attempt_withdrawn",
        "step_given_up",
        "step_stuck",
        "cancel_requested",
        "saga_turned_back",
        "saga_ended",
        "operator_acted",
        "step_prepared",
        "decision_made",
        "heuristic_reported",
        "round_planned",
    }


def translated(record: Record, plan: Plan = PLAN) -> types_pb2.Record:
    """One record on the wire and back."""
    sent = wire.record_to_proto(plan, 5, 2, record).SerializeToString()
    return types_pb2.Record.FromString(sent)


def test_records_name_steps_attempts_and_what_the_wire_said() -> None:
    """Steps by name, the attempt's key, when it was sent and answered, and the error's reason."""
    failed = translated(HISTORY[4])
    assert (failed.seq, failed.version, failed.at_ms) == (5, 2, 130)
    assert failed.attempt_failed == types_pb2.AttemptFailed(
        key=types_pb2.AttemptKey(step="charge", verb=types_pb2.VERB_EXECUTE, round=1, attempt=1),
        timing=types_pb2.AttemptTiming(sent_at_ms=110, answered_at_ms=120, status="OK", polls=2),
        error=types_pb2.Error(reason="UNIMPLEMENTED", metadata={"misconfigured": "true"}),
        retry_at_ms=140,
    )
    turned = translated(HISTORY[12]).saga_turned_back.turn
    assert (turned.cause, turned.step) == (types_pb2.TURN_CAUSE_REJECTED, "charge")
    assert (turned.error.reason, turned.error.message) == ("card_declined", "no money")
    undone = translated(HISTORY[14]).step_compensated.key
    assert (undone.step, undone.verb) == ("charge", types_pb2.VERB_COMPENSATE)
    assert translated(RETRIED).operator_acted == types_pb2.OperatorActed(
        action="retry", step="reserve", author="ann", reason="it is mended", round=2
    )
    assert translated(ABANDONED).operator_acted == types_pb2.OperatorActed(
        action="abandon", author="ann", reason="done by hand"
    )
    started = translated(HISTORY[0]).saga_started
    assert (started.input.data, started.deadline_at_ms) == (b"input", 60_100)
    assert dict(started.labels) == {"a": "1"}


def test_records_of_a_two_phase_commit_name_the_vote_and_the_round() -> None:
    """A vote of no is a refusal whose verb is PREPARE; an abort says why, a commit needs no why."""
    yes = translated(SECOND_ROUND[3], TRANSFER_PLAN).step_prepared
    assert (yes.key.step, yes.key.verb, yes.key.round) == ("debit", types_pb2.VERB_PREPARE, 1)
    assert (yes.result.data, yes.timing.answered_at_ms) == (b"result", 120)
    no = translated(SECOND_ROUND[4], TRANSFER_PLAN).step_rejected
    assert (no.key.step, no.key.verb, no.key.round) == ("credit", types_pb2.VERB_PREPARE, 1)
    assert (no.error.reason, no.error.message) == (LOCKED.reason, LOCKED.message)
    abort = translated(SECOND_ROUND[5], TRANSFER_PLAN).decision_made
    assert (abort.decision, abort.round) == (types_pb2.COMMIT_DECISION_ABORT, 1)
    assert abort.turn == types_pb2.Turn(
        cause=types_pb2.TURN_CAUSE_REJECTED,
        step="credit",
        error=types_pb2.Error(reason=LOCKED.reason, message=LOCKED.message),
        at_ms=121,
    )
    planned = translated(SECOND_ROUND[8], TRANSFER_PLAN).round_planned
    assert (planned.round, planned.starts_at_ms) == (2, 230)
    commit = translated(SECOND_ROUND[-4], TRANSFER_PLAN).decision_made
    assert commit == types_pb2.DecisionMade(decision=types_pb2.COMMIT_DECISION_COMMIT, round=2)


@pytest.mark.parametrize("committed", [True, False, None])
def test_a_broken_vote_says_what_was_done_if_anybody_knows(committed: bool | None) -> None:  # noqa: FBT001
    """Rolled back and unknown are told apart."""
    record = HeuristicReported(
        250, 1, Verb.EXECUTE, 2, 1, TIMING, committed, Failure("let_go", "by hand")
    )
    shown = translated(record, TRANSFER_PLAN).heuristic_reported
    assert (shown.key.step, shown.key.verb) == ("credit", types_pb2.VERB_EXECUTE)
    assert (shown.error.reason, shown.error.message) == ("let_go", "by hand")
    assert shown.HasField("committed") == (committed is not None)
    assert shown.committed == bool(committed)


class View(msgspec.Struct, frozen=True):
    """What the supervisor answers with."""

    plan: Plan
    saga: Saga
    version: int
    quarantined: bool = False


def test_a_saga_with_its_steps() -> None:
    """The saga shows where it stands and why it turned back, and each step, in order."""
    saga = fold(PLAN, HISTORY)
    assert saga is not None
    message = wire.saga_to_proto(View(PLAN, saga, 4))
    assert (message.saga_id, message.version) == ("s-1", 4)
    assert message.state == types_pb2.SAGA_STATE_STUCK
    assert message.turn.step == "charge"
    reserve, charge, ship = message.steps
    assert [step.name for step in message.steps] == ["reserve", "charge", "ship"]
    assert (reserve.state, reserve.verb) == (
        types_pb2.STEP_STATE_STUCK,
        types_pb2.VERB_COMPENSATE,
    )
    assert (reserve.stuck_since_ms, reserve.last_error.reason) == (180, "RETRIES_EXHAUSTED")
    assert (reserve.result.data, message.input.data) == (b"result", b"input")
    assert charge.state == types_pb2.STEP_STATE_COMPENSATED
    assert (ship.state, ship.round) == (types_pb2.STEP_STATE_PENDING, 0)
    assert not ship.HasField("result")


def shown(history: list[Record]) -> types_pb2.Saga:
    """A transfer after these records."""
    saga = fold(TRANSFER_PLAN, history)
    assert saga is not None
    return wire.saga_to_proto(View(TRANSFER_PLAN, saga, 4))


def test_a_two_phase_commit_shows_its_round_its_decision_and_who_holds_what() -> None:
    """`prepared_at_ms` is there for as long as a branch may be holding what it voted for."""
    states = types_pb2
    votes = shown(VOTES)
    assert (votes.round, votes.decision) == (2, states.COMMIT_DECISION_PENDING)
    assert [step.state for step in votes.steps] == [states.STEP_STATE_PREPARED] * 2
    assert [step.prepared_at_ms for step in votes.steps] == [240, 241]
    assert not votes.HasField("turn")
    first = shown(FIRST_ROUND[:7])
    assert (first.round, first.decision) == (1, states.COMMIT_DECISION_ABORT)
    assert first.turn.step == "credit"
    debit, credit = first.steps
    assert (debit.state, debit.prepared_at_ms) == (states.STEP_STATE_COMPENSATING, 120)
    assert (credit.state, credit.prepared_at_ms) == (states.STEP_STATE_REJECTED, 0)
    assert [step.prepared_at_ms for step in shown(FIRST_ROUND[:8]).steps] == [0, 0]
    again = shown(FIRST_ROUND)
    assert (again.round, again.decision) == (2, states.COMMIT_DECISION_PENDING)
    assert again.steps[0].next_attempt_at_ms == 230
    commit = shown(SECOND_ROUND)
    assert commit.decision == states.COMMIT_DECISION_COMMIT
    assert commit.past_no_return
    debit, credit = commit.steps
    assert (debit.state, debit.prepared_at_ms) == (states.STEP_STATE_EXECUTING, 240)
    assert (credit.state, credit.prepared_at_ms) == (states.STEP_STATE_BROKEN, 0)
    assert credit.last_error.reason == "let_go"
    executed = StepExecuted(260, 0, 2, 1, TIMING, Payload())
    ended = shown([*SECOND_ROUND, executed, SagaEnded(260, SagaState.MIXED)])
    assert (ended.state, ended.steps[0].prepared_at_ms) == (states.SAGA_STATE_MIXED, 0)


def test_a_saga_has_neither_round_nor_decision() -> None:
    """In its own mode there is nothing to decide."""
    saga = fold(PLAN, HISTORY)
    assert saga is not None
    message = wire.saga_to_proto(View(PLAN, saga, 4))
    assert (message.round, message.decision) == (0, types_pb2.COMMIT_DECISION_UNSPECIFIED)
    assert not any(step.prepared_at_ms for step in message.steps)


def test_a_quarantined_saga_shows_as_stuck() -> None:
    """Nothing moves it before a restart, so it must not look as if it ran."""
    saga = fold(PLAN, HISTORY[:1])
    assert saga is not None
    assert wire.saga_to_proto(View(PLAN, saga, 1)).state == types_pb2.SAGA_STATE_RUNNING
    message = wire.saga_to_proto(View(PLAN, saga, 1, quarantined=True))
    assert message.state == types_pb2.SAGA_STATE_STUCK


def test_a_saga_without_payloads_has_none() -> None:
    """Neither its input nor its steps are there, and the rest is the same."""
    saga = fold(PLAN, HISTORY)
    assert saga is not None
    whole = wire.saga_to_proto(View(PLAN, saga, 4))
    without = types_pb2.Saga()
    wire.put_saga(without, View(PLAN, saga, 4))
    for field in ("input", "steps"):
        assert field not in {descriptor.name for descriptor, _ in without.ListFields()}
        whole.ClearField(field)
    assert without == whole


def test_a_saga_in_a_list() -> None:
    """A summary has what lists show, and no steps."""
    summary = SagaSummary(
        saga_no=9,
        saga_id="s-1",
        definition_name="order",
        definition_hash="h",
        state=SagaState.COMPLETED,
        version=4,
        started_at_ms=1,
        updated_at_ms=2,
        ended_at_ms=3,
        deadline_at_ms=4,
        past_no_return=True,
        labels={"a": "1"},
    )
    assert wire.summary_to_proto(summary) == types_pb2.Saga(
        saga_id="s-1",
        definition="order",
        definition_hash="h",
        state=types_pb2.SAGA_STATE_COMPLETED,
        version=4,
        started_at_ms=1,
        updated_at_ms=2,
        ended_at_ms=3,
        deadline_at_ms=4,
        past_no_return=True,
        labels={"a": "1"},
    )


@pytest.mark.parametrize(
    ("table", "values"),
    [
        pytest.param(nouns.STATES_OUT, SagaState, id="saga states"),
        pytest.param(wire_sagas.STEP_STATES_OUT, StepStatus, id="step states"),
        pytest.param(nouns.VERBS_OUT, Verb, id="verbs"),
        pytest.param(nouns.CAUSES_OUT, TurnCause, id="causes"),
        pytest.param(wire_definitions.KINDS_OUT, Kind, id="kinds"),
        pytest.param(nouns.DECISIONS_OUT, CommitDecision, id="decisions"),
        pytest.param(wire_definitions.MODES_OUT, Mode, id="modes"),
        pytest.param(wire_participants.BREAKER_STATES_OUT, BreakerState, id="breaker states"),
    ],
)
def test_every_value_of_the_core_has_its_own_on_the_wire(
    table: dict[enum.Enum, int], values: type[enum.Enum]
) -> None:
    """No enum of the core has a member that cannot be sent, and none is "unspecified"."""
    assert set(table) == set(values)
    assert len(set(table.values())) == len(table)
    assert 0 not in table.values()


def test_no_decision_is_that_of_no_two_phase_commit() -> None:
    """Which is a word of its own, and neither commit nor abort."""
    assert wire.decision_to_proto(None) == types_pb2.COMMIT_DECISION_UNSPECIFIED
    for decision, number in nouns.DECISIONS_OUT.items():
        assert wire.decision_to_proto(decision) == number


def test_states_are_read_back() -> None:
    """A filter's states; "any" and numbers of a later version are none."""
    for state, number in nouns.STATES_OUT.items():
        assert wire.saga_state_from_proto(number) is state
    assert wire.saga_state_from_proto(types_pb2.SAGA_STATE_UNSPECIFIED) is None
    assert wire.saga_state_from_proto(99) is None


# -- calls -----------------------------------------------------------------------------------------


def call(**changes: Any) -> Call:
    """An attempt of `charge`."""
    plain = Call(
        saga_id="s-1",
        definition_name="order",
        step=1,
        step_name="charge",
        participant="payments",
        action="charge",
        verb=Verb.EXECUTE,
        round=2,
        attempt=3,
        timeout_ms=5_000,
        input=INPUT,
        results=(("reserve", RESULT),),
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    )
    return msgspec.structs.replace(plain, **changes)


def test_an_execution_on_the_wire() -> None:
    """Everything that the participant and its barrier need, and nothing of a compensation."""
    message = wire.call_to_proto(call(), IDENTITY, 9_000)
    assert message == participant_pb2.Call(
        idempotency_key="store-1/s-1/charge/execute/2",
        store_id="store-1",
        saga_id="s-1",
        definition="order",
        step="charge",
        action="charge",
        verb=types_pb2.VERB_EXECUTE,
        round=2,
        attempt=3,
        epoch=7,
        deadline_at_ms=9_000,
        input=types_pb2.Payload(data=b"input", content_type="text/plain"),
        results=[
            participant_pb2.StepResult(
                step="reserve",
                result=types_pb2.Payload(data=b"result", content_type="text/plain"),
            )
        ],
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        incarnation="incarnation-1",
        mode=types_pb2.MODE_SAGA,
        participant="payments",
    )


@pytest.mark.parametrize("verb", Verb)
def test_a_call_says_whether_it_belongs_to_a_two_phase_commit(verb: Verb) -> None:
    """So that Execute means commit, and not do it."""
    message = wire.call_to_proto(call(verb=verb, two_phase=True), IDENTITY, 9_000)
    assert message.mode == types_pb2.MODE_TWO_PHASE_COMMIT
    assert message.verb == nouns.VERBS_OUT[verb]
    assert message.incarnation == IDENTITY.incarnation
    assert message.HasField("compensation") == (verb is Verb.COMPENSATE)


def test_a_compensation_on_the_wire() -> None:
    """It says whether Done was recorded, hands back the step's own result, and says why."""
    message = wire.call_to_proto(
        call(
            verb=Verb.COMPENSATE,
            executed=True,
            own_result=RESULT,
            turn=SagaTurnedBack(162, TurnCause.REJECTED, 2, REFUSAL),
            turn_step_name="ship",
            poll=True,
        ),
        IDENTITY,
        9_000,
        oldest_open_at_ms=55,
    )
    assert message.idempotency_key == "store-1/s-1/charge/compensate/2"
    assert message.participant == "payments"
    assert message.compensation.executed
    assert message.compensation.result.data == b"result"
    assert message.compensation.turn.step == "ship"
    assert message.compensation.turn.error.reason == "card_declined"
    assert message.poll
    assert message.oldest_open_at_ms == 55


def test_a_compensation_of_a_step_that_may_not_have_run() -> None:
    """Without a recorded Done the participant is told so, and handed no result."""
    message = wire.call_to_proto(call(verb=Verb.COMPENSATE), IDENTITY, 9_000)
    assert message.HasField("compensation")
    assert not message.compensation.executed
    assert not message.compensation.HasField("result")


def test_the_key_is_the_same_for_all_attempts_and_no_other() -> None:
    """Attempts and polls share it; each of store, saga, step, verb and round makes another."""
    same = {wire.idempotency_key(IDENTITY, call(attempt=n, poll=n > 1)) for n in range(1, 4)}
    others = {
        wire.idempotency_key(StoreIdentity("store-2", "i", 1), call()),
        wire.idempotency_key(IDENTITY, call(saga_id="s-2")),
        wire.idempotency_key(IDENTITY, call(step_name="reserve")),
        wire.idempotency_key(IDENTITY, call(verb=Verb.COMPENSATE)),
        wire.idempotency_key(IDENTITY, call(round=1)),
    }
    assert len(same) == 1
    assert len(others | same) == 6


# -- outcomes --------------------------------------------------------------------------------------

P = participant_pb2
LARGE = types_pb2.Payload(data=bytes(wire.MAX_PAYLOAD_BYTES + 1))
LARGEST = types_pb2.Payload(data=bytes(wire.MAX_PAYLOAD_BYTES), content_type="t" * 256)
BAD_TYPE = types_pb2.Payload(content_type="t" * 257)


@pytest.mark.parametrize(
    ("message", "verb", "outcome"),
    [
        pytest.param(P.Outcome(done=P.Done()), Verb.EXECUTE, Done(), id="done without result"),
        pytest.param(
            P.Outcome(done=P.Done(result=types_pb2.Payload(data=b"r", content_type="t"))),
            Verb.EXECUTE,
            Done(Payload(b"r", "t")),
            id="done",
        ),
        pytest.param(
            P.Outcome(done=P.Done(result=LARGEST)),
            Verb.EXECUTE,
            Done(Payload(LARGEST.data, LARGEST.content_type)),
            id="the largest result",
        ),
        pytest.param(
            P.Outcome(done=P.Done(result=LARGE)),
            Verb.COMPENSATE,
            Done(),
            id="the result of a compensation has no reader",
        ),
        pytest.param(
            P.Outcome(rejected=P.Rejected(reason="card_declined", message="no money")),
            Verb.EXECUTE,
            Rejected("card_declined", "no money"),
            id="rejected",
        ),
        pytest.param(
            P.Outcome(rejected=P.Rejected()),
            Verb.COMPENSATE,
            Rejected("UNSPECIFIED"),
            id="a rejected compensation is the core's to judge",
        ),
        pytest.param(
            P.Outcome(in_progress=P.InProgress(poll_after_ms=250)),
            Verb.EXECUTE,
            InProgress(250),
            id="in progress",
        ),
        pytest.param(
            P.Outcome(in_progress=P.InProgress(poll_after_ms=-5)),
            Verb.EXECUTE,
            InProgress(1000),
            id="a poll in the past",
        ),
        pytest.param(
            P.Outcome(in_progress=P.InProgress(poll_after_ms=2**63 - 1)),
            Verb.EXECUTE,
            InProgress(PROGRESS_LIMIT_MS),
            id="a poll after the end of the world",
        ),
        pytest.param(
            P.Outcome(broken=P.Broken(reason="barrier_lost", message="m")),
            Verb.COMPENSATE,
            Broken("barrier_lost", "m"),
            id="broken",
        ),
        pytest.param(
            P.Outcome(rejected=P.Rejected(reason="LOCKED")),
            Verb.PREPARE,
            Rejected("LOCKED"),
            id="a vote of no",
        ),
        pytest.param(
            P.Outcome(heuristic=P.Heuristic(committed=True, reason="by_hand", message="m")),
            Verb.COMPENSATE,
            Heuristic(committed=True, reason="by_hand", message="m"),
            id="heuristic",
        ),
        pytest.param(
            P.Outcome(heuristic=P.Heuristic()),
            Verb.EXECUTE,
            Heuristic(committed=False, reason="UNSPECIFIED"),
            id="heuristic without a word: the core judges who may say it",
        ),
    ],
)
def test_outcomes(message: P.Outcome, verb: Verb, outcome: Outcome) -> None:
    """What a participant may say, up to the limits."""
    sent = P.Outcome.FromString(message.SerializeToString())
    assert wire.outcome_from_proto(sent, verb) == outcome


@pytest.mark.parametrize(
    ("message", "verb", "reason"),
    [
        pytest.param(P.Outcome(), Verb.EXECUTE, "NO_OUTCOME", id="nothing"),
        pytest.param(P.Outcome(), Verb.COMPENSATE, "NO_OUTCOME", id="nothing to compensate"),
        pytest.param(
            P.Outcome.FromString(bytes([0x7A, 0])),
            Verb.EXECUTE,
            "NO_OUTCOME",
            id="an outcome of a later contract",
        ),
        pytest.param(
            P.Outcome(done=P.Done(result=LARGE)), Verb.EXECUTE, "RESULT_TOO_LARGE", id="too large"
        ),
        pytest.param(
            P.Outcome(done=P.Done(result=BAD_TYPE)),
            Verb.EXECUTE,
            "CONTENT_TYPE_TOO_LONG",
            id="a novel as content type",
        ),
    ],
)
def test_nonsense_is_an_unknown_outcome(message: P.Outcome, verb: Verb, reason: str) -> None:
    """Nothing is decided by it; since a retry alone won't mend it, it counts as misconfigured."""
    outcome = wire.outcome_from_proto(message, verb)
    assert isinstance(outcome, Unknown)
    assert (outcome.reason, outcome.misconfigured) == (reason, True)


@pytest.mark.parametrize("result", [LARGE, BAD_TYPE], ids=["bytes", "content type"])
def test_a_commit_is_one_whatever_it_brings(result: types_pb2.Payload) -> None:
    """It would be said again for ever: what is too large is left out, and why is said.

    A vote's is refused.
    """
    done = P.Outcome(done=P.Done(result=result))
    outcome = wire.outcome_from_proto(done, Verb.EXECUTE, two_phase=True)
    assert isinstance(outcome, Done)
    assert outcome.result == Payload()
    assert outcome.left_out is not None
    assert outcome.left_out.reason in {"RESULT_TOO_LARGE", "CONTENT_TYPE_TOO_LONG"}
    assert " bytes, and " in outcome.left_out.message  # how many, and how many are the most
    assert isinstance(wire.outcome_from_proto(done, Verb.PREPARE, two_phase=True), Unknown)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: P.Outcome(rejected=P.Rejected(reason=t, message=t)), id="rejected"),
        pytest.param(lambda t: P.Outcome(broken=P.Broken(reason=t, message=t)), id="broken"),
        pytest.param(
            lambda t: P.Outcome(heuristic=P.Heuristic(reason=t, message=t)), id="heuristic"
        ),
    ],
)
def test_foreign_texts_are_bounded_and_printable(make: Callable[[str], P.Outcome]) -> None:
    """A megabyte of escape sequences does not reach a history, a log or a terminal."""
    outcome = wire.outcome_from_proto(make("\x1b[2J\tok\u202e" * 200_000), Verb.EXECUTE)
    assert not isinstance(outcome, Done | InProgress)
    assert len(outcome.reason) <= wire.MAX_OUTCOME_REASON_CHARS
    assert len(outcome.message) <= wire.MAX_OUTCOME_MESSAGE_CHARS
    assert outcome.reason.isprintable()
    assert outcome.message.isprintable()


def test_ordinary_texts_are_left_alone() -> None:
    """Umlauts and line breaks of a message are fine."""
    message = P.Outcome(rejected=P.Rejected(reason="zu_groß", message="Zeile 1\nZeile 2 — ok"))
    outcome = wire.outcome_from_proto(message, Verb.EXECUTE)
    assert outcome == Rejected("zu_groß", "Zeile 1\nZeile 2 — ok")


@given(st.binary(max_size=200), st.sampled_from(Verb))
def test_no_bytes_break_the_reading_of_an_outcome(data: bytes, verb: Verb) -> None:
    """Whatever parses has an outcome."""
    message = P.Outcome()
    try:
        message.MergeFromString(data)
    except Exception:  # noqa: BLE001  # gRPC refuses these before we see them
        return
    assert isinstance(wire.outcome_from_proto(message, verb), Outcome)


# -- participants ----------------------------------------------------------------------------------


class Lane(msgspec.Struct, frozen=True):
    """What the lanes answer with."""

    name: str
    address: str
    by_operator: bool
    breaker: Breaker
    in_flight: int
    waiting: int
    limit: int
    transport: str
    last_error: str


def test_a_participant_with_lane_and_breaker() -> None:
    """All that an operator sees of it."""
    breaker = Breaker(state=BreakerState.OPEN, failures=5, since_ms=10, probe_at_ms=20)
    lane = Lane("payments", "h:1", False, breaker, 1, 2, 3, "unary", "UNAVAILABLE: x")
    assert wire.participant_to_proto(lane) == operator_pb2.Participant(
        name="payments",
        address="h:1",
        source=operator_pb2.PARTICIPANT_SOURCE_CONFIGURATION,
        breaker=operator_pb2.Breaker(
            participant="payments",
            state=operator_pb2.BREAKER_STATE_OPEN,
            consecutive_failures=5,
            since_ms=10,
            next_probe_at_ms=20,
        ),
        calls_in_flight=1,
        calls_waiting=2,
        concurrency_limit=3,
        transport="unary",
        last_error="UNAVAILABLE: x",
    )
    registered = wire.participant_to_proto(msgspec.structs.replace(lane, by_operator=True), "h:0")
    assert registered.source == operator_pb2.PARTICIPANT_SOURCE_OPERATOR
    assert registered.configured_address == "h:0"
    gone = wire.participant_to_proto(msgspec.structs.replace(lane, address=""))
    assert gone.source == operator_pb2.PARTICIPANT_SOURCE_UNSPECIFIED
