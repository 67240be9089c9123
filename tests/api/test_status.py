"""Every error has its status, its details, and fits the trailers."""

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime import errors
from amends_runtime.api.status import (
    TRAILER_BYTES,
    NotAvailable,
    ShuttingDown,
    _on_the_wire,
    error_to_proto,
    internal_status,
    is_ours,
    status_of,
)
from amends_runtime.errors import AmendsError, FieldViolation, InvalidRequest


def detail(status: status_pb2.Status, kind: type[Message]) -> Message | None:
    """The detail of this kind, if there is one."""
    found = kind()
    return next((found for packed in status.details if packed.Unpack(found)), None)


def info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo, which every status has."""
    found = detail(status, error_details_pb2.ErrorInfo)
    assert isinstance(found, error_details_pb2.ErrorInfo)
    return found


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        pytest.param(
            errors.InvalidRequest("INVALID_REQUEST", [FieldViolation("f", "m")]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            id="InvalidRequest",
        ),
        pytest.param(
            errors.NotFound("UNKNOWN_SAGA", "m"),
            grpc.StatusCode.NOT_FOUND,
            "UNKNOWN_SAGA",
            id="NotFound",
        ),
        pytest.param(
            errors.AlreadyExists("SAGA_EXISTS", "m"),
            grpc.StatusCode.ALREADY_EXISTS,
            "SAGA_EXISTS",
            id="AlreadyExists",
        ),
        pytest.param(
            errors.WrongState("COMPLETED", "m"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "COMPLETED",
            id="WrongState",
        ),
        pytest.param(
            errors.Overloaded("COMMIT_QUEUE", "m", 250),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "COMMIT_QUEUE",
            id="Overloaded",
        ),
        pytest.param(
            errors.Unavailable("m"), grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", id="Unavailable"
        ),
        pytest.param(
            ShuttingDown(), grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", id="ShuttingDown"
        ),
        pytest.param(
            errors.CommitUnknown("m"), grpc.StatusCode.UNAVAILABLE, "STORE_FAILED", id="StoreError"
        ),
        pytest.param(
            NotAvailable("m"), grpc.StatusCode.UNIMPLEMENTED, "NOT_AVAILABLE", id="NotAvailable"
        ),
    ],
)
def test_the_table(error: AmendsError, code: grpc.StatusCode, reason: str) -> None:
    """The code, the reason and our domain; the same in a status and in an item of a batch."""
    status = status_of(error)
    assert status.code == code.value[0]
    assert status.message
    assert (info(status).reason, info(status).domain) == (reason, "amends")
    item = error_to_proto(error)
    assert (item.code, item.reason, item.message) == (status.code, reason, status.message)


def test_bugs_are_not_in_the_table() -> None:
    """What a caller cannot mend has no text for callers."""
    assert not is_ours(errors.IllegalMessage("s", "RUNNING", "Wake"))
    assert not is_ours(errors.ConfigurationError("c"))
    assert not is_ours(ValueError("v"))
    status = internal_status("1234")
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert info(status).metadata == {"incident": "1234"}
    assert "1234" in status.message


def test_overload_says_when_to_come_back() -> None:
    """RetryInfo in a status, metadata in an item."""
    error = errors.Overloaded("COMMIT_QUEUE", "m", 1_250, {"limit": "4096"})
    retry = detail(status_of(error), error_details_pb2.RetryInfo)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1_250
    assert info(status_of(error)).metadata == {"limit": "4096"}
    assert error_to_proto(error).metadata == {"limit": "4096", "retry_after_ms": "1250"}


def test_a_wrong_state_says_what_would_have_to_be_otherwise() -> None:
    """PreconditionFailure with the reason, the saga and the words."""
    error = errors.WrongState("COMPLETED", "m", {"saga_id": "s-1"})
    failure = detail(status_of(error), error_details_pb2.PreconditionFailure)
    assert isinstance(failure, error_details_pb2.PreconditionFailure)
    (violation,) = failure.violations
    assert (violation.type, violation.subject, violation.description) == (
        "COMPLETED",
        "sagas/s-1",
        "m",
    )


texts = st.text(max_size=400) | st.builds(
    str.__mul__, st.sampled_from("x%ä"), st.sampled_from([255, 300, 701, 100_000])
)


@given(
    st.lists(st.builds(FieldViolation, texts, texts), min_size=1, max_size=30),
    st.dictionaries(st.sampled_from(["saga_id", "definition"]), texts),
)
def test_whatever_is_wrong_fits_the_trailers(
    violations: list[FieldViolation], metadata: dict[str, str]
) -> None:
    """Counted as the wire counts: base64 and %-escapes. The number of all violations is there."""
    status = status_of(InvalidRequest("INVALID_REQUEST", violations, metadata))
    assert _on_the_wire(status, []) <= TRAILER_BYTES
    shown = detail(status, error_details_pb2.BadRequest)
    assert isinstance(shown, error_details_pb2.BadRequest)
    count = info(status).metadata["violations"]
    assert int(count) == len(violations)
    assert int(info(status).metadata.get("violations_shown", count)) == len(shown.field_violations)


@given(texts, texts)
def test_other_errors_fit_the_trailers_too(message: str, value: str) -> None:
    """A message and metadata of any length are cut."""
    for error in (
        errors.WrongState("COMPLETED", message, {"saga_id": value}),
        errors.Overloaded("COMMIT_QUEUE", message, 1, {"limit": value}),
        errors.Unavailable(message),
    ):
        assert _on_the_wire(status_of(error), []) <= TRAILER_BYTES


def test_a_few_violations_are_all_shown() -> None:
    """What a person can read in one go is not cut."""
    violations = [FieldViolation(f"steps[{n}].name", "x" * 80) for n in range(25)]
    shown = detail(
        status_of(InvalidRequest("INVALID_DEFINITION", violations)), error_details_pb2.BadRequest
    )
    assert isinstance(shown, error_details_pb2.BadRequest)
    assert len(shown.field_violations) == 25
