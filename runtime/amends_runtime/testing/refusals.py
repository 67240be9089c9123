"""What a runtime refuses, as the errors that a client of it gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc

import amends
from amends_runtime import errors
from amends_runtime.actors.view import SagaView
from amends_runtime.core.saga import Answer

__all__ = ["as_a_client_gets_them", "refused"]

_KINDS: Final[tuple[tuple[type[errors.Refusal], type[amends.ApiError], grpc.StatusCode], ...]] = (
    (errors.NotFound, amends.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, amends.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.WrongState, amends.WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Overloaded, amends.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
)

_WHY: Final = {
    Answer.COMPLETED: ("SAGA_COMPLETED", "has completed, and nothing of it is undone"),
    Answer.PAST_NO_RETURN: (
        "PAST_NO_RETURN",
        "is past its point of no return; nothing turns it back",
    ),
    Answer.NOTHING_STUCK: (
        "NOTHING_STUCK",
        "has no such step that is stuck or waits for its next attempt",
    ),
    Answer.NOT_STUCK: ("NOT_STUCK", "is not stuck: abandon it with force=True, or wait"),
    Answer.DECIDED: (
        "DECIDED",
        "has decided COMMIT, which nobody takes back: it commits until all have acknowledged",
    ),
    Answer.ENDED: ("SAGA_ENDED", "has ended"),
}


@contextmanager
def as_a_client_gets_them() -> Iterator[None]:
    """Turns the runtime's refusals into the SDK's errors."""
    try:
        yield
    except errors.InvalidRequest as error:
        raise amends.InvalidRequest(
            str(error),
            reason=error.reason,
            code=grpc.StatusCode.INVALID_ARGUMENT,
            metadata=error.metadata,
            violations=[amends.Violation(one.field, one.message) for one in error.violations],
        ) from None
    except errors.Refusal as error:
        kind, code = next((kind, code) for ours, kind, code in _KINDS if isinstance(error, ours))
        raise kind(str(error), reason=error.reason, code=code, metadata=error.metadata) from None
    except errors.Unavailable as error:
        code = grpc.StatusCode.UNAVAILABLE
        raise amends.Unavailable(str(error), reason=code.name, code=code) from None


def refused(view: SagaView, answer: Answer) -> amends.WrongState:
    """The error for an answer that refuses."""
    reason, why = _WHY[answer]
    saga_id, state = view.saga.saga_id, view.saga.state.name
    return amends.WrongState(
        f"saga {saga_id!r} {why}; it is {state}",
        reason=reason,
        code=grpc.StatusCode.FAILED_PRECONDITION,
        metadata={"saga_id": saga_id, "state": state},
    )
