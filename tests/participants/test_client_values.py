"""What a client is given: each message of the contract, in plain Python types."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import pickle

import pytest

import amends
from amends import saga_wire
from amends.v1 import operator_pb2, saga_pb2, types_pb2

SECRET = b'{"card":"4111"}'

ERROR = types_pb2.Error(reason="card_declined", message="no money", metadata={"limit": "5"})
FAILURE = amends.Failure("card_declined", "no money", {"limit": "5"})
KEY = types_pb2.AttemptKey(step="charge", verb=types_pb2.VERB_EXECUTE, round=1, attempt=3)
WIRE_TIMING = types_pb2.AttemptTiming(
    sent_at_ms=5, answered_at_ms=9, status="OK", polls=2, held_ms=3
)
TIMING = amends.Timing(5, 9, "OK", 2, held_ms=3)
WIRE_TURN = types_pb2.Turn(
    cause=types_pb2.TURN_CAUSE_REJECTED, step="charge", error=ERROR, at_ms=1500
)
TURN = amends.Turn(amends.Cause.REJECTED, "charge", FAILURE, 1500)
WIRE_PAYLOAD = types_pb2.Payload(data=SECRET, content_type="application/json")
PAYLOAD = amends.Payload(SECRET, "application/json")

WIRE_SAGA = types_pb2.Saga(
    saga_id="order-1",
    definition="order",
    definition_hash="ab",
    state=types_pb2.SAGA_STATE_COMPENSATED,
    version=7,
    started_at_ms=1000,
    updated_at_ms=2000,
    ended_at_ms=2000,
    deadline_at_ms=3000,
    turn=WIRE_TURN,
    steps=[
        types_pb2.StepStatus(
            name="reserve",
            state=types_pb2.STEP_STATE_COMPENSATED,
            verb=types_pb2.VERB_COMPENSATE,
            round=1,
            attempt=2,
            last_error=ERROR,
            next_attempt_at_ms=4,
            stuck_since_ms=5,
            result=WIRE_PAYLOAD,
            call_open=True,
            prepared_at_ms=6,
        ),
        types_pb2.StepStatus(name="charge", state=types_pb2.STEP_STATE_PENDING),
    ],
    input=WIRE_PAYLOAD,
    labels={"shop": "north"},
    paused=True,
    past_no_return=True,
    parent_saga_id="parent",
    decision=types_pb2.COMMIT_DECISION_ABORT,
    round=2,
)


def test_a_saga_is_read_whole() -> None:
    """Every field arrives; instants and errors that are not there are None."""
    saga = saga_wire.saga_from_wire(WIRE_SAGA)
    assert saga == amends.Saga(
        saga_id="order-1",
        definition="order",
        definition_hash="ab",
        state=amends.SagaState.COMPENSATED,
        version=7,
        started_at_ms=1000,
        updated_at_ms=2000,
        ended_at_ms=2000,
        deadline_at_ms=3000,
        turn=TURN,
        steps=(
            amends.Step(
                name="reserve",
                state=amends.StepState.COMPENSATED,
                verb=amends.Verb.COMPENSATE,
                round=1,
                attempt=2,
                last_error=FAILURE,
                next_attempt_at_ms=4,
                stuck_since_ms=5,
                result=PAYLOAD,
                call_open=True,
                prepared_at_ms=6,
            ),
            amends.Step(name="charge", state=amends.StepState.PENDING),
        ),
        input=PAYLOAD,
        labels={"shop": "north"},
        paused=True,
        past_no_return=True,
        parent_saga_id="parent",
        decision=amends.Decision.ABORT,
        round=2,
    )
    assert saga.ended
    assert not saga.completed
    assert saga.input.json() == {"card": "4111"}


def test_what_a_participant_did_alone_has_three_values() -> None:
    """Committed, rolled back, or nobody knows: the last is not the second."""
    for committed in (True, False, None):
        fact = types_pb2.HeuristicReported(key=KEY, committed=committed, error=ERROR)
        record = saga_wire.record_from_wire(types_pb2.Record(heuristic_reported=fact))
        assert record.committed is committed


def test_a_two_phase_commit_that_ended_mixed_is_read() -> None:
    """Its end is one of the ends, and not as COMPLETED."""
    saga = saga_wire.saga_from_wire(
        types_pb2.Saga(
            state=types_pb2.SAGA_STATE_MIXED,
            ended_at_ms=5,
            decision=types_pb2.COMMIT_DECISION_COMMIT,
            round=1,
            steps=[types_pb2.StepStatus(name="debit", state=types_pb2.STEP_STATE_BROKEN)],
        )
    )
    assert (saga.state, saga.decision) == (amends.SagaState.MIXED, amends.Decision.COMMIT)
    assert saga.ended
    assert not saga.completed
    assert saga.step("debit").state is amends.StepState.BROKEN


def test_a_running_saga_has_not_ended() -> None:
    """What has not happened is None, never the instant 0."""
    saga = saga_wire.saga_from_wire(types_pb2.Saga(state=types_pb2.SAGA_STATE_RUNNING))
    assert (saga.ended_at_ms, saga.deadline_at_ms, saga.turn, saga.parent_saga_id) == (None,) * 4
    assert not saga.ended


def test_a_step_is_found_by_name() -> None:
    """An unknown name is an error that lists the known ones."""
    saga = saga_wire.saga_from_wire(WIRE_SAGA)
    assert saga.step("charge").state is amends.StepState.PENDING
    with pytest.raises(KeyError, match="reserve, charge"):
        saga.step("shipping")


def test_payloads_are_never_shown() -> None:
    """Neither by a saga's repr, nor by a record's."""
    record = types_pb2.Record(step_executed=types_pb2.StepExecuted(key=KEY, result=WIRE_PAYLOAD))
    for value in (saga_wire.saga_from_wire(WIRE_SAGA), saga_wire.record_from_wire(record)):
        assert "4111" not in repr(value)
        assert "15 bytes" in repr(value)


def test_values_are_plain_data() -> None:
    """They hash, pickle, and become dictionaries, as dataclasses do."""
    saga = saga_wire.saga_from_wire(WIRE_SAGA)
    assert pickle.loads(pickle.dumps(saga)) == saga  # noqa: S301  # our own bytes
    assert hash(saga) == hash(saga_wire.saga_from_wire(WIRE_SAGA))
    as_dict = dataclasses.asdict(saga)
    assert as_dict["state"] == "COMPENSATED"
    del as_dict["input"]
    del as_dict["steps"]
    assert json.loads(json.dumps(as_dict))["turn"]["failure"]["reason"] == "card_declined"


FACTS: dict[str, tuple[types_pb2.Record, dict[str, object]]] = {
    "saga_started": (
        types_pb2.Record(
            saga_started=types_pb2.SagaStarted(
                definition="order",
                definition_hash="ab",
                input=WIRE_PAYLOAD,
                deadline_at_ms=9,
                labels={"shop": "north"},
            )
        ),
        {
            "definition": "order",
            "definition_hash": "ab",
            "input": PAYLOAD,
            "deadline_at_ms": 9,
            "labels": {"shop": "north"},
        },
    ),
    "attempt_started": (
        types_pb2.Record(attempt_started=types_pb2.AttemptStarted(key=KEY, epoch=4)),
        {"epoch": 4},
    ),
    "step_executed": (
        types_pb2.Record(
            step_executed=types_pb2.StepExecuted(key=KEY, timing=WIRE_TIMING, result=WIRE_PAYLOAD)
        ),
        {"timing": TIMING, "result": PAYLOAD},
    ),
    "step_rejected": (
        types_pb2.Record(
            step_rejected=types_pb2.StepRejected(key=KEY, timing=WIRE_TIMING, error=ERROR)
        ),
        {"timing": TIMING, "failure": FAILURE},
    ),
    "step_compensated": (
        types_pb2.Record(step_compensated=types_pb2.StepCompensated(key=KEY, timing=WIRE_TIMING)),
        {"timing": TIMING},
    ),
    "attempt_failed": (
        types_pb2.Record(
            attempt_failed=types_pb2.AttemptFailed(
                key=KEY, timing=WIRE_TIMING, error=ERROR, retry_at_ms=12, probe=True
            )
        ),
        {"timing": TIMING, "failure": FAILURE, "retry_at_ms": 12, "probe": True},
    ),
    "attempt_lost": (
        types_pb2.Record(attempt_lost=types_pb2.AttemptLost(key=KEY, epoch=5)),
        {"epoch": 5},
    ),
    "attempt_withdrawn": (
        types_pb2.Record(attempt_withdrawn=types_pb2.AttemptWithdrawn(key=KEY)),
        {},
    ),
    "step_given_up": (
        types_pb2.Record(step_given_up=types_pb2.StepGivenUp(step="charge", spent_ms=1500)),
        {"step": "charge", "spent_s": 1.5},
    ),
    "step_stuck": (
        types_pb2.Record(
            step_stuck=types_pb2.StepStuck(
                step="charge", verb=types_pb2.VERB_COMPENSATE, error=ERROR
            )
        ),
        {"step": "charge", "verb": amends.Verb.COMPENSATE, "failure": FAILURE},
    ),
    "cancel_requested": (
        types_pb2.Record(
            cancel_requested=types_pb2.CancelRequested(author="desk", reason="changed her mind")
        ),
        {"author": "desk", "reason": "changed her mind"},
    ),
    "saga_turned_back": (
        types_pb2.Record(saga_turned_back=types_pb2.SagaTurnedBack(turn=WIRE_TURN)),
        {"turn": TURN},
    ),
    "saga_ended": (
        types_pb2.Record(saga_ended=types_pb2.SagaEnded(state=types_pb2.SAGA_STATE_COMPLETED)),
        {"state": amends.SagaState.COMPLETED},
    ),
    "step_prepared": (
        types_pb2.Record(
            step_prepared=types_pb2.StepPrepared(key=KEY, timing=WIRE_TIMING, result=WIRE_PAYLOAD)
        ),
        {"timing": TIMING, "result": PAYLOAD},
    ),
    "decision_made": (
        types_pb2.Record(
            decision_made=types_pb2.DecisionMade(
                decision=types_pb2.COMMIT_DECISION_ABORT, round=2, turn=WIRE_TURN
            )
        ),
        {"decision": amends.Decision.ABORT, "round": 2, "turn": TURN},
    ),
    "heuristic_reported": (
        types_pb2.Record(
            heuristic_reported=types_pb2.HeuristicReported(
                key=KEY, timing=WIRE_TIMING, committed=True, error=ERROR
            )
        ),
        {"timing": TIMING, "failure": FAILURE, "committed": True},
    ),
    "round_planned": (
        types_pb2.Record(round_planned=types_pb2.RoundPlanned(round=2, starts_at_ms=77)),
        {"round": 2, "starts_at_ms": 77},
    ),
    "timer_changed": (
        types_pb2.Record(timer_changed=types_pb2.TimerChanged(step="sleep", fired=True)),
        {"step": "sleep", "detail": "fired"},
    ),
    "signal_received": (
        types_pb2.Record(
            signal_received=types_pb2.SignalReceived(signal="paid", payload=WIRE_PAYLOAD)
        ),
        {"detail": "paid", "result": PAYLOAD},
    ),
    "operator_acted": (
        types_pb2.Record(
            operator_acted=types_pb2.OperatorActed(
                action="skip", step="charge", author="ops", reason="paid in cash"
            )
        ),
        {"detail": "skip", "step": "charge", "author": "ops", "reason": "paid in cash"},
    ),
    "child_changed": (
        types_pb2.Record(
            child_changed=types_pb2.ChildChanged(
                step="ship",
                child_saga_id="order-1/ship",
                state=types_pb2.SAGA_STATE_COMPENSATED,
            )
        ),
        {"step": "ship", "detail": "order-1/ship", "state": amends.SagaState.COMPENSATED},
    ),
}
ATTEMPT = {"step": "charge", "verb": amends.Verb.EXECUTE, "round": 1, "attempt": 3}


def test_every_fact_of_the_contract_has_a_kind() -> None:
    """A fact that is added to the contract must be added here, too."""
    facts = [field.name for field in types_pb2.Record.DESCRIPTOR.oneofs_by_name["fact"].fields]
    assert sorted(FACTS) == sorted(facts)
    kinds = {kind.name.lower() for kind in amends.RecordKind} - {"unrecognised"}
    assert kinds == set(facts)


@pytest.mark.parametrize("name", FACTS)
def test_a_record_is_read_whole(name: str) -> None:
    """Its kind is the fact's own name; what the fact says is there, and nothing else is."""
    message, says = FACTS[name]
    message.seq, message.version, message.at_ms = 100, 4, 1234
    if hasattr(getattr(message, name), "key"):
        says = ATTEMPT | says
    record = saga_wire.record_from_wire(message)
    kind = amends.RecordKind[name.upper()]
    assert record == amends.Record(seq=100, version=4, at_ms=1234, kind=kind, **says)  # type: ignore[arg-type]
    assert kind == type(getattr(message, name)).__name__


def test_what_a_newer_runtime_says_is_not_taken_for_something_else() -> None:
    """Unknown numbers are UNRECOGNISED, and nothing is raised."""
    saga = saga_wire.saga_from_wire(
        types_pb2.Saga(state=99, steps=[types_pb2.StepStatus(state=99, verb=99)])  # type: ignore[arg-type]
    )
    assert saga.state is amends.SagaState.UNRECOGNISED
    assert saga.steps[0].state is amends.StepState.UNRECOGNISED
    assert saga.steps[0].verb is None
    assert saga_wire.record_from_wire(types_pb2.Record()).kind is amends.RecordKind.UNRECOGNISED
    breaker = saga_wire.breaker_from_wire(operator_pb2.Breaker(state=99))  # type: ignore[arg-type]
    assert breaker.state is amends.BreakerState.UNRECOGNISED
    registered = saga_wire.registered_from_wire(
        types_pb2.RegisteredDefinition(
            definition=types_pb2.Definition(
                name="nap",
                steps=[types_pb2.Step(name="wait", sleep=types_pb2.SleepStep(duration_ms=5))],
            ),
            version=2,
        )
    )
    assert (registered.name, registered.version, registered.definition) == ("nap", 2, None)


@pytest.mark.parametrize(
    ("ours", "prefix", "theirs"),
    [
        (amends.SagaState, "SAGA_STATE_", types_pb2.SagaState),
        (amends.StepState, "STEP_STATE_", types_pb2.StepState),
        (amends.Cause, "TURN_CAUSE_", types_pb2.TurnCause),
        (amends.BreakerState, "BREAKER_STATE_", operator_pb2.BreakerState),
        (amends.CancelDisposition, "CANCEL_DISPOSITION_", saga_pb2.CancelDisposition),
        (amends.StepKind, "STEP_KIND_", types_pb2.StepKind),
        (amends.Mode, "MODE_", types_pb2.Mode),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_enumerations_are_those_of_the_contract(
    ours: type[enum.StrEnum], prefix: str, theirs: object
) -> None:
    """Member for member; a new one in the contract must be added here, too."""
    names = {name.removeprefix(prefix) for name in theirs.keys()}  # type: ignore[attr-defined]  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == set(ours.__members__) - {"UNSPECIFIED", "UNRECOGNISED"}


# -- sagas that are read when they are looked at ---------------------------------------------------


def test_every_field_of_a_saga_can_be_read() -> None:
    """Whichever is asked for first; and a name that is no field's is none."""
    fields = [field.name for field in dataclasses.fields(amends.Saga)]
    assert sorted(saga_wire.SAGA_FIELDS) == sorted(fields)
    whole = saga_wire.saga_from_wire(WIRE_SAGA)
    for name in fields:
        assert getattr(saga_wire.saga_from_wire(WIRE_SAGA), name) == getattr(whole, name)
    with pytest.raises(AttributeError, match="'Saga' has no attribute 'stat'"):
        whole.stat  # type: ignore[attr-defined]  # noqa: B018


def test_a_saga_stays_as_it_was_told() -> None:
    """What becomes of the message that it came in is not its business."""
    message = types_pb2.Saga()
    message.CopyFrom(WIRE_SAGA)
    saga = saga_wire.saga_from_wire(message)
    message.Clear()
    assert saga == saga_wire.saga_from_wire(WIRE_SAGA)


def test_a_saga_is_a_value_however_much_of_it_was_read() -> None:
    """It compares, copies, pickles and replaces as one that was made by hand."""

    def read() -> amends.Saga:
        return saga_wire.saga_from_wire(WIRE_SAGA)

    by_hand = amends.Saga(
        **{field.name: getattr(read(), field.name) for field in dataclasses.fields(amends.Saga)}
    )
    assert read() == by_hand
    assert by_hand == read()
    assert hash(read()) == hash(by_hand)
    assert repr(read()) == repr(by_hand)
    assert copy.copy(read()) == copy.deepcopy(read()) == by_hand
    assert pickle.loads(pickle.dumps(read())) == by_hand  # noqa: S301  # our own
    assert dataclasses.replace(read(), version=8) == dataclasses.replace(by_hand, version=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().version = 8  # type: ignore[misc]
