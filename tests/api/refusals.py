"""Reads what a client gets when it is refused: the status and its details."""

from collections.abc import Awaitable
from dataclasses import dataclass

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Refused:
    """A refusal, as far as its details go."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]
    violations: dict[str, str]
    retry_after_ms: int | None
    preconditions: list[tuple[str, str]]


async def refused(call: Awaitable[object]) -> Refused:
    """Makes a call that must be refused, with ErrorInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return read(raised.value)


def read(error: grpc.aio.AioRpcError) -> Refused:
    """The details of an error, which must have ErrorInfo."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has a call's methods
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    failure = error_details_pb2.PreconditionFailure()
    found = {
        type(detail).DESCRIPTOR.name
        for packed in status.details
        for detail in (info, bad_request, retry, failure)
        if packed.Unpack(detail)
    }
    assert "ErrorInfo" in found
    return Refused(
        code=error.code(),
        message=error.details() or "",
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        violations={v.field: v.description for v in bad_request.field_violations},
        retry_after_ms=retry.retry_delay.ToMilliseconds() if "RetryInfo" in found else None,
        preconditions=[(v.type, v.subject) for v in failure.violations],
    )
