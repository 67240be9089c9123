"""How a failed call becomes an exception: the one place that reads gRPC's statuses.

What the runtime says of an error travels as ``google.rpc.Status`` in the trailing metadata, with
``ErrorInfo`` (domain ``amends``), ``BadRequest`` and ``RetryInfo``. Statuses without it come from
gRPC itself, a proxy, or a server that is no runtime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from amends.errors import (
    AlreadyExists,
    ApiError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Violation,
    WrongState,
)
from amends.tls import ClientTls, handshake_hint
from amends.v1 import types_pb2

DOMAIN: Final = "amends"
STATUS_KEY: Final = "grpc-status-details-bin"

RETRY_AFTER_MS: Final = "retry_after_ms"
"""Where an item's error says when to ask again; a status has RetryInfo for it."""

CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
"""gRPC's statuses by the number that an item's error has."""

INNER_STATUS: Final = re.compile(r"^[A-Z_]+: (?=ipv4:|ipv6:|unix:)")
"""gRPC's word for what its own socket said; it says nothing that the words after it do not."""
MAX_RETRY_AFTER_S: Final = 3600.0
"""A runtime asks for seconds. Much more, or less than none, is a mistake that nobody waits for."""
MAX_DIGITS: Final = 15
"""Of a number in the metadata: Python refuses to read those of thousands."""

REFUSALS: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""Statuses that mean *nothing was done*, where the runtime itself gave them."""

NEVER_HANDLED: Final = frozenset(
    {
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
"""Statuses that mean *nothing was done*, whoever gave them."""


@dataclass(frozen=True, slots=True)
class Details:
    """What the runtime said of an error, as far as it said anything."""

    message: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None


def error_from_status(
    error: grpc.aio.AioRpcError, target: str, tls: ClientTls | None = None
) -> ApiError:
    """Give the exception for a failed call; its `in_doubt` speaks of this one attempt."""
    details = read_details(error)
    words = details.message or error.details() or "no reason given"
    return _error(error.code(), words, details, target, tls)


def error_from_item(error: types_pb2.Error, target: str) -> ApiError:
    """Give the exception for one item of a batch, which the runtime itself has answered."""
    metadata = dict(error.metadata)
    retry_after_ms = metadata.pop(RETRY_AFTER_MS, "")
    details = Details(
        message=error.message,
        reason=error.reason,
        metadata=metadata,
        retry_after_s=_seconds(retry_after_ms),
    )
    code = CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    return _error(code, error.message or "no reason given", details, target, None)


def _error(
    code: grpc.StatusCode, words: str, details: Details, target: str, tls: ClientTls | None
) -> ApiError:
    reason = details.reason or code.name
    in_doubt = not (code in NEVER_HANDLED or (code in REFUSALS and details.reason))
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return InvalidRequest(
                _with_violations(words, details),
                reason=reason,
                code=code,
                metadata=details.metadata,
                in_doubt=in_doubt,
                violations=details.violations,
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(
                words,
                reason=reason,
                code=code,
                metadata=details.metadata,
                in_doubt=in_doubt,
                retry_after_s=details.retry_after_s,
            )
        case grpc.StatusCode.NOT_FOUND:
            kind: type[ApiError] = NotFound
        case grpc.StatusCode.ALREADY_EXISTS:
            kind = AlreadyExists
        case grpc.StatusCode.FAILED_PRECONDITION:
            kind = WrongState
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            # CANCELLED by the other side: a runtime that stops drops the calls that it still holds.
            kind = Unavailable
            if not details.reason:
                words = unreachable(target, words, tls)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            kind = DeadlineExceeded
            words = f"the runtime at {target} did not answer in time ({words})"
        case grpc.StatusCode.UNIMPLEMENTED:
            kind = ApiError
            if not details.reason:
                words = (
                    f"the server at {target} does not know this call ({words}): "
                    "is it an amends runtime, and not older than this client?"
                )
        case _:
            kind = ApiError
            words = f"the runtime at {target} failed with {code.name}: {words}"
    return kind(words, reason=reason, code=code, metadata=details.metadata, in_doubt=in_doubt)


def unreachable(target: str, why: str, tls: ClientTls | None) -> str:
    """Say that nobody answers at `target`, why, and what to do."""
    # gRPC tells of each address that it tried; the last one's story is enough for a line.
    last = INNER_STATUS.sub("", why.rpartition("last error: ")[2])
    mend = handshake_hint(last, tls) or "start it with `amends serve`, or check the address"
    return f"the runtime at {target} cannot be reached ({last}): {mend}"


def read_details(error: grpc.aio.AioRpcError) -> Details:
    """Read the status that the runtime attached; empty if it attached none that can be read."""
    status = _status(error)
    if status is None:
        return Details()
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for packed in status.details:
        try:
            if packed.Unpack(retry):
                retry_after_s = _bounded_s(retry.retry_delay.ToMilliseconds() / 1000)
            else:
                packed.Unpack(bad_request) or packed.Unpack(info)
        except DecodeError:
            continue
    ours = info.domain == DOMAIN
    return Details(
        message=status.message,
        reason=info.reason if ours else "",
        metadata=dict(info.metadata) if ours else {},
        violations=tuple(Violation(v.field, v.description) for v in bad_request.field_violations),
        retry_after_s=retry_after_s,
    )


def _seconds(milliseconds: str) -> float | None:
    """Read an item's time to ask again; None if it is no number."""
    whole = _whole(milliseconds)
    return None if whole is None else _bounded_s(whole / 1000)


def _whole(digits: str) -> int | None:
    is_whole = digits.isascii() and digits.isdecimal()
    return int(digits[:MAX_DIGITS]) if is_whole else None


def _bounded_s(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _with_violations(message: str, details: Details) -> str:
    """Give each violation a line of its own; the runtime's message has all in one, cut short."""
    if not details.violations:
        return message
    lines = [f"\n  {violation}" for violation in details.violations]
    said = details.metadata.get("violations", "")
    more = (_whole(said) or 0) - len(lines)
    if more > 0:
        lines.append(f"\n  and {more} more")
    return "the runtime refused the request:" + "".join(lines)
