"""What lies on disk: records of every kind, of every format, and what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from amends_runtime.core.definition import Definition, RetryPolicy, Step, content_hash, normalise
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
from amends_runtime.errors import StoreError
from amends_runtime.storage.codec import (
    RECORDS,
    UPCASTS,
    RecordCodec,
    decode_definition,
    decode_labels,
    encode_definition,
    encode_labels,
    new_kinds,
)
from tests.storage.samples import NOW_MS, ORDER, TRANSFER

GOLDEN = [
    Path(__file__).with_name(f"records_format_{number}.txt")
    for number in range(1, RECORDS.format + 1)
]

TIMING = Timing(NOW_MS + 1, NOW_MS + 4, "UNAVAILABLE", 2)
FAILURE = Failure("card_declined", "no funds, größter Betrag 5 €")
PAYLOAD = Payload(bytes(range(256)), "application/x-anything")

ONE_OF_EACH: tuple[Record, ...] = (
    SagaStarted(
        NOW_MS,
        "a/b",
        "order",
        "d" * 64,
        "c" * 64,
        PAYLOAD,
        NOW_MS + 60_000,
        {"tenant": "größe"},
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
    AttemptStarted(NOW_MS, 0, Verb.EXECUTE, 1, 1, 7),
    StepExecuted(NOW_MS, 127, 1, 300, TIMING, PAYLOAD),
    StepRejected(NOW_MS, 1, 2, 1, TIMING, FAILURE),
    StepCompensated(NOW_MS, 1, 1, 1, TIMING),
    AttemptFailed(NOW_MS, 1, Verb.COMPENSATE, 1, 1, TIMING, FAILURE, True, NOW_MS + 100),
    AttemptLost(NOW_MS, 1, Verb.PREPARE, 1, 1, 8),
    AttemptWithdrawn(NOW_MS, 1, Verb.EXECUTE, 1, 1),
    StepGivenUp(NOW_MS, 1, 86_400_000),
    StepStuck(NOW_MS, 1, Verb.EXECUTE, FAILURE),
    CancelRequested(NOW_MS, "ops@example.org", "duplicate"),
    SagaTurnedBack(NOW_MS, TurnCause.DEADLINE, None, FAILURE),
    SagaEnded(NOW_MS, SagaState.COMPENSATED),
    OperatorActed(NOW_MS, OperatorAction.RETRY, 3, "ops@example.org", "mended", 2, "r-1"),
    StepPrepared(NOW_MS, 1, 2, 3, TIMING, PAYLOAD),
    VoteRefused(NOW_MS, 1, 2, 3, TIMING, FAILURE),
    DecisionMade(NOW_MS, CommitDecision.ABORT, 2, TurnCause.REJECTED, 1, FAILURE),
    HeuristicReported(NOW_MS, 1, Verb.EXECUTE, 2, 3, TIMING, None, FAILURE),
    RoundPlanned(NOW_MS, 3, NOW_MS + 250),
)


def test_there_is_one_of_each() -> None:
    """A new kind of record gets its place in these tests."""
    assert {type(record) for record in ONE_OF_EACH} == set(get_args(Record))


def test_a_result_that_was_left_out_comes_back_with_its_reason() -> None:
    """A commit is recorded without the result that was too large, and with why."""
    record = StepExecuted(NOW_MS, 1, 1, 1, TIMING, Payload(), FAILURE)
    assert RECORDS.decode(RECORDS.format, RECORDS.encode((record,)), "s", 1) == (record,)


def test_records_come_back_as_they_were() -> None:
    """All kinds in one turn, with payloads of any bytes and text of any language."""
    data = RECORDS.encode(ONE_OF_EACH)
    assert RECORDS.decode(RECORDS.format, data, "s", 1) == ONE_OF_EACH


@pytest.mark.parametrize("row_format", range(1, RECORDS.format + 1))
def test_what_was_written_once_is_readable_for_ever(row_format: int) -> None:
    """The bytes of every format are fixed: a database of any age opens.

    If this fails because a record has changed its shape: the new shape is a new format, with an
    upcast. The file of a format is never changed once a version of amends has written it.
    """
    by_name = {type(record).__name__: record for record in ONE_OF_EACH}
    stored = dict(row.split() for row in GOLDEN[row_format - 1].read_text().splitlines())
    is_newest = row_format == RECORDS.format
    assert stored.keys() == by_name.keys() if is_newest else stored.keys() <= by_name.keys()
    for name, written in stored.items():
        data, record = bytes.fromhex(written), by_name[name]
        assert RECORDS.decode(row_format, data, "s", 1) == (record,)
        if is_newest:
            assert RECORDS.encode((record,)) == data


# -- formats ---------------------------------------------------------------------------------------


def ended_by_name(turn: list[Any]) -> list[Any]:
    """As if an early format had written the end's state by its name."""
    names = {state.name: state.value for state in SagaState}
    return [[*r[:2], names[r[2]]] if r[0] == 13 else r for r in turn]


def seconds_to_ms(turn: list[Any]) -> list[Any]:
    """As if the one after it had still counted seconds."""
    return [[r[0], r[1] * 1000, *r[2:]] for r in turn]


def test_old_formats_are_lifted_one_version_at_a_time() -> None:
    """Each row by its own format's number, through all that lies between it and the newest."""
    codec = RecordCodec((*UPCASTS, ended_by_name, seconds_to_ms))
    oldest = msgspec.msgpack.encode([[13, NOW_MS // 1000, "COMPENSATED"]])
    middle = msgspec.msgpack.encode([[13, NOW_MS // 1000, SagaState.COMPENSATED]])
    newest = codec.encode([SagaEnded(NOW_MS, SagaState.COMPENSATED)])
    assert codec.format == len(UPCASTS) + 3
    for row_format, data in enumerate((oldest, middle, newest), start=codec.format - 2):
        decoded = codec.decode(row_format, data, "s", 1)
        assert decoded == (SagaEnded(NOW_MS, SagaState.COMPENSATED),)


def test_a_format_of_new_kinds_alone_is_read_as_it_is() -> None:
    """Nothing of its rows changes, so nothing is spent on them; a change before it still counts."""
    turn = [SagaEnded(NOW_MS, SagaState.COMPENSATED)]
    codec = RecordCodec((ended_by_name, new_kinds))
    by_name = msgspec.msgpack.encode([[13, NOW_MS, "COMPENSATED"]])
    assert codec.decode(1, by_name, "s", 1) == tuple(turn)
    assert codec.decode(2, codec.encode(turn), "s", 1) == tuple(turn)
    with pytest.raises(StoreError, match="format 2, "):
        codec.decode(2, by_name, "s", 1)


@pytest.mark.parametrize("row_format", [0, -1, RECORDS.format + 1])
def test_an_unknown_format_is_refused(row_format: int) -> None:
    """What a newer program wrote is not guessed at."""
    said = rf"saga s, version 3: its records are of format {row_format}, "
    with pytest.raises(StoreError, match=said):
        RECORDS.decode(row_format, RECORDS.encode(ONE_OF_EACH), "s", 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        RECORDS.encode(ONE_OF_EACH)[:-1],
        RECORDS.encode(ONE_OF_EACH) + b"\x00",
        msgspec.msgpack.encode([[99, NOW_MS]]),
        msgspec.msgpack.encode([[13, NOW_MS, 77]]),
        msgspec.msgpack.encode({"secret": b"secret"}),
        msgspec.msgpack.encode([[3, NOW_MS, "secret"]]),
    ],
)
def test_unreadable_bytes_name_the_saga_and_nothing_of_it(data: bytes) -> None:
    """Which saga and version; never a byte of what lies there."""
    lifting = RecordCodec((ended_by_name,))
    for codec in (RECORDS, lifting):
        with pytest.raises(StoreError, match="saga s, version 3: its records") as caught:
            codec.decode(1, data, "s", 3)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


# -- definitions, labels ---------------------------------------------------------------------------


def test_definitions_are_stored_with_every_default() -> None:
    """A later change of a default must not change what a running saga is pinned to."""
    data = encode_definition(ORDER)
    plain = msgspec.json.decode(data)
    assert set(plain) == set(Definition.__struct_fields__)
    assert set(plain["steps"][0]) == set(Step.__struct_fields__)
    assert set(plain["steps"][0]["retry"]) == set(RetryPolicy.__struct_fields__)
    decoded = decode_definition("h", data)
    assert decoded == ORDER
    assert content_hash(decoded) == content_hash(ORDER)


def test_a_two_phase_commit_is_stored_with_its_settings() -> None:
    """And a definition that an older program stored, which knew of none, is still what it was."""
    assert decode_definition("h", encode_definition(TRANSFER)) == TRANSFER
    plain = msgspec.json.decode(encode_definition(ORDER))
    del plain["two_phase"]
    assert decode_definition("h", msgspec.json.encode(plain)) == ORDER


def test_a_definition_that_is_not_normalised_survives_too() -> None:
    """Storing needs no rule of its own."""
    plain = Definition(name="a", steps=(Step(name="s", participant="p", action="x"),))
    assert decode_definition("h", encode_definition(plain)) == plain
    assert normalise(decode_definition("h", encode_definition(plain))) == normalise(plain)


def test_an_unreadable_definition_is_named() -> None:
    """By its hash."""
    with pytest.raises(StoreError, match="definition abc cannot be read"):
        decode_definition("abc", b'{"name": 3}')


def test_labels() -> None:
    """None takes no space; any text survives."""
    assert encode_labels({}) == ""
    assert decode_labels(None) == {}
    labels = {"a": "größe", 'quote"': "\n"}
    assert decode_labels(encode_labels(labels)) == labels
