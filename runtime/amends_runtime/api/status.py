"""How errors leave: AmendsError to google.rpc.Status in the trailers, by one table.

    ErrorInfo             always: a stable reason, our domain, ids and sizes
    BadRequest            InvalidRequest: every field that is wrong
    RetryInfo             Overloaded: when to come back
    PreconditionFailure   WrongState: what would have to be otherwise

Clients drop a response whose trailers together exceed 8 KiB, and with it the status code. So what
is said is cut to `TRAILER_BYTES`, as it is on the wire: texts to their beginnings, violations to
the first ones, with the number of all in the metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from amends.v1 import types_pb2
from amends_runtime.errors import (
    AlreadyExists,
    AmendsError,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    Refusal,
    StoreError,
    Unavailable,
    WrongState,
)

__all__ = [
    "DOMAIN",
    "NotAvailable",
    "ShuttingDown",
    "error_to_proto",
    "internal_error",
    "internal_status",
    "is_ours",
    "status_of",
]

DOMAIN: Final = "amends"

TRAILER_BYTES: Final = 7000
"""Status and message on the wire; the rest of 8 KiB is for what gRPC and proxies add."""
MESSAGE_BYTES: Final = 700
"""A message goes twice, as grpc-message and inside the details."""
VIOLATION_BYTES: Final = 400
"""One violation: a sentence or two, with the beginning of what was sent."""
METADATA_BYTES: Final = 256
"""One value of the metadata: the longest is a saga's id."""


class ShuttingDown(Unavailable):
    """The runtime is stopping: ask again when it is back, with the same id."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class NotAvailable(AmendsError):
    """The contract has this method, and this version of the runtime does not."""


_TABLE: Final[tuple[tuple[type[AmendsError], grpc.StatusCode, str], ...]] = (
    # The first row that matches counts. The reason is for errors that carry none of their own.
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, ""),
    (NotFound, grpc.StatusCode.NOT_FOUND, ""),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, ""),
    (WrongState, grpc.StatusCode.FAILED_PRECONDITION, ""),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    (ShuttingDown, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    (Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    (StoreError, grpc.StatusCode.UNAVAILABLE, "STORE_FAILED"),
    (NotAvailable, grpc.StatusCode.UNIMPLEMENTED, "NOT_AVAILABLE"),
)


def is_ours(error: Exception) -> bool:
    """Whether the table knows this error. Any other is a bug, and its text is not for callers."""
    return any(isinstance(error, kind) for kind, _, _ in _TABLE)


def status_of(error: AmendsError) -> status_pb2.Status:
    """The status that a caller gets for an error of the table."""
    code, reason = _classified(error)
    message = _cut(_message(error), MESSAGE_BYTES)
    metadata = dict(error.metadata) if isinstance(error, Refusal) else {}
    status = status_pb2.Status(code=_number(code), message=message)
    more: list[Message] = []
    if isinstance(error, InvalidRequest):
        used = (
            _on_the_wire(status, [_error_info(reason, metadata)]) + 200
        )  # room for the two counts
        shown = _bad_request(error.violations, (TRAILER_BYTES - used) * 3 // 4)
        metadata["violations"] = str(len(error.violations))
        if len(shown.field_violations) < len(error.violations):
            metadata["violations_shown"] = str(len(shown.field_violations))
        more.append(shown)
    elif isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        more.append(retry)
    elif isinstance(error, WrongState):
        more.append(_precondition_failure(reason, metadata, message))
    status.details.extend(map(_packed, [_error_info(reason, metadata), *more]))
    return status


def internal_status(incident: str) -> status_pb2.Status:
    """The status for a bug. `incident` is what the log entry with the traceback is found by."""
    error = internal_error(incident)
    status = status_pb2.Status(code=error.code, message=error.message)
    status.details.append(_packed(_error_info(error.reason, error.metadata)))
    return status


def internal_error(incident: str) -> types_pb2.Error:
    """The same as the answer to one item of a batch."""
    return types_pb2.Error(
        code=_number(grpc.StatusCode.INTERNAL),
        reason="INTERNAL",
        message=f"a bug in the runtime, incident {incident}; its log has the details under this id."
        " What was asked for may have happened: asking again with the same id is safe",
        metadata={"incident": incident},
    )


def error_to_proto(error: AmendsError) -> types_pb2.Error:
    """An error of the table as the answer to one item of a batch."""
    code, reason = _classified(error)
    metadata = dict(error.metadata) if isinstance(error, Refusal) else {}
    if isinstance(error, Overloaded):
        metadata["retry_after_ms"] = str(error.retry_after_ms)
    return types_pb2.Error(
        code=_number(code),
        reason=reason,
        message=_cut(_message(error), MESSAGE_BYTES),
        metadata={key: _cut(value, METADATA_BYTES) for key, value in metadata.items()},
    )


def _classified(error: AmendsError) -> tuple[grpc.StatusCode, str]:
    code, reason = next((code, reason) for kind, code, reason in _TABLE if isinstance(error, kind))
    return code, error.reason if isinstance(error, Refusal) else reason


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _message(error: AmendsError) -> str:
    """An InvalidRequest's text is cut between violations instead of in one."""
    if not isinstance(error, InvalidRequest):
        return str(error)
    room = MESSAGE_BYTES - 100  # for the last words
    said: list[str] = []
    for violation in error.violations:
        text = f"{violation.field}: {violation.message}"
        room -= len(text.encode()) + 2
        if said and room < 0:
            return f"{'; '.join(said)}; and {len(error.violations) - len(said)} more"
        said.append(_cut(text, VIOLATION_BYTES))
    return "; ".join(said)


# -- details ---------------------------------------------------------------------------------------


def _error_info(reason: str, metadata: Mapping[str, str]) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(
        reason=reason,
        domain=DOMAIN,
        metadata={key: _cut(value, METADATA_BYTES) for key, value in metadata.items()},
    )


def _bad_request(violations: Iterable[FieldViolation], room: int) -> error_details_pb2.BadRequest:
    shown = error_details_pb2.BadRequest()
    for violation in violations:
        field_violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(violation.field, METADATA_BYTES),
            description=_cut(violation.message, VIOLATION_BYTES),
        )
        room -= field_violation.ByteSize() + 4  # its tag and length
        if room < 0:
            break
        shown.field_violations.append(field_violation)
    return shown


def _precondition_failure(
    reason: str, metadata: Mapping[str, str], message: str
) -> error_details_pb2.PreconditionFailure:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=reason,
        subject=_cut(f"sagas/{metadata.get('saga_id', '')}", METADATA_BYTES),
        description=message,
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


# -- sizes -----------------------------------------------------------------------------------------


def _on_the_wire(status: status_pb2.Status, details: Iterable[Message]) -> int:
    """Bytes of the two trailers: details in base64, the message again with %-escapes."""
    binary = status.ByteSize() + sum(_packed(detail).ByteSize() + 4 for detail in details)
    escaped = sum(
        1 if 0x20 <= byte <= 0x7E and byte != ord("%") else 3 for byte in status.message.encode()
    )
    return (binary + 2) // 3 * 4 + escaped


def _cut(text: str, limit: int) -> str:
    """The text, or as much of its beginning as fits into so many bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    return encoded[: limit - 3].decode(errors="ignore") + "…"
