"""What a gRPC status says of an attempt, in one table.

Rule 3 of the semantics: no error status decides anything, so every outcome here is `Unknown`. The
table only says two more things of each status:

    misconfigured   retrying alone is unlikely to mend it
    healthy         what it tells the breaker: False, the endpoint is unwell; None, nothing

UNKNOWN is what a handler that raised becomes: the endpoint is there, and one action's bug must not
close the way for all others, so it tells the breaker nothing.
"""

from __future__ import annotations

import grpc

from amends_runtime.core.messages import Unknown
from amends_runtime.ports import Reply

__all__ = ["is_too_large", "reply_of"]

_MISCONFIGURED = frozenset(
    (
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
)
_UNWELL = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DATA_LOSS,
    )
)
_TOO_LARGE = "larger than max"  # how gRPC words it when a message exceeds the receiver's limit
_MAX_DETAILS = 500  # characters of a foreign text that go into the history


def is_too_large(status: grpc.StatusCode, details: str) -> bool:
    """Whether it was our own side that ended it, because a message was larger than we take."""
    return status is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details


def reply_of(status: grpc.StatusCode, details: str | None, *, away: bool = False) -> Reply:
    """The reply that an error status amounts to; `away`: without a connection to the endpoint."""
    text = details or ""
    if is_too_large(status, text):
        # Our own side refused the reply; the endpoint is well, and retrying brings the same again.
        return Reply(Unknown("REPLY_TOO_LARGE", text, misconfigured=True), status.name, None)
    if len(text) > _MAX_DETAILS:
        text = text[:_MAX_DETAILS] + "…"
    outcome = Unknown(status.name, text, misconfigured=status in _MISCONFIGURED)
    return Reply(outcome, status.name, False if status in _UNWELL else None, away)
