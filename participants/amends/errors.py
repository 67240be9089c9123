"""Everything that the SDK itself raises.

Whose fault it was, and what to do next, stands in the message.

::

    Exception
    └── AmendsError
        ├── PayloadError          a value cannot become a payload, or a payload is not what it says
        ├── InvalidOutcome        a handler's outcome that cannot be said; how to mend it
        ├── InvalidParticipant    handlers that must not be served; every fault, with file and line
        ├── ListenError           the server cannot listen where it was told to
        ├── BarrierError          the barrier's database cannot be used now
        │   └── CommitUnknown     a COMMIT failed: it may or may not have happened
        ├── TransactionMisused    a handler used its transaction so that the barrier would break
        ├── HandlerFailed         a handler ended without an outcome: outcome unknown
        ├── NotCompensatable      there is something to undo, and the action has no compensation
        ├── InvalidReservation    a reservation over the author's table that cannot be made or kept
        ├── VoteNotSettled        what is in doubt could not be settled as the runtime decided
        ├── InvalidDefinition     a definition that cannot be sent as it is; every problem at once
        ├── InvalidTls            a client's TLS files cannot be used; says which and why
        ├── ApiError              a call of the runtime failed
        │   ├── InvalidRequest      yours: malformed; carries every violation at once
        │   ├── NotFound            no such saga, definition or participant
        │   ├── AlreadyExists       the id is taken by other content
        │   ├── WrongState          the saga's state does not allow it
        │   ├── Overloaded          a limit of the runtime is reached; says when to try again
        │   ├── Unavailable         the runtime cannot be reached, or cannot answer now
        │   └── DeadlineExceeded    no answer within the call's time limit
        ├── StartUnknown          a saga may or may not have been started; carries its id
        └── WaitTimeout           a saga has not ended within the time that you gave

`Rejected`, `Broken` and `Heuristic` are no errors but outcomes, see `outcomes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import grpc

if TYPE_CHECKING:  # at run time they would import this module back
    from amends.definition_problems import DefinitionProblem
    from amends.sagas import Saga


class AmendsError(Exception):
    """The root of all errors that the SDK raises."""


class PayloadError(AmendsError, ValueError):
    """A value cannot become a payload, or a payload is not what was asked for.

    The message names types, sizes and the names of fields, never a value.
    """


class InvalidOutcome(AmendsError, ValueError):
    """A handler made an outcome that cannot be said, such as `Rejected` with an empty reason.

    In a handler that lets it pass it leaves the outcome unknown, like any other exception. The
    message says how to mend it, and repeats nothing that came from a payload.
    """


class InvalidParticipant(AmendsError):
    """A participant's handlers must not be served as they are.

    Every fault is listed at once; `problems` has one line for each, ``file:line: what and how to
    mend it``.
    """

    def __init__(self, participant: str, problems: list[str]) -> None:
        self.participant = participant
        self.problems = tuple(problems)
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"participant {participant!r} cannot be served:{lines}")


class ListenError(AmendsError):
    """The server cannot listen where it was told to; one line that says why and what to change."""


class BarrierError(AmendsError):
    """The barrier's database cannot be used now.

    While serving, the call is answered with a gRPC error (outcome unknown), and the next call tries
    to open the database again.
    """


class CommitUnknown(BarrierError):
    """A COMMIT failed, which does not say whether it happened.

    The connection is closed and opened anew before anything else is done with the database; when
    the runtime asks again, the row that is there, or is not, answers.
    """


class TransactionMisused(AmendsError):
    """A handler used its transaction in a way that would break the barrier's promise.

    For example ``COMMIT`` inside the handler, or the use of a transaction that has ended. What the
    handler wrote is rolled back.
    """


class HandlerFailed(AmendsError):
    """A handler ended without an outcome, so nobody knows what it did outside its transaction.

    The caller gets a gRPC error (outcome unknown) and asks again. `cause_type` is the name of the
    exception's type, `where` its frames without any values.
    """

    def __init__(self, message: str, *, cause_type: str = "", where: str = "") -> None:
        self.cause_type = cause_type
        self.where = where
        super().__init__(message)


class NotCompensatable(AmendsError):
    """There is something to undo, and the action was declared with ``compensatable=False``.

    Give the action a compensation, or make the step a pivot, retriable or read-only one.
    """

    def __init__(self, *, action: str, step: str, saga_id: str) -> None:
        super().__init__(
            f"action {action!r} has no compensation (compensatable=False), and step {step!r} of "
            f"saga {saga_id} may have an effect to undo: make the step a pivot, retriable or "
            "read-only one, or give the action a compensation"
        )


class InvalidReservation(AmendsError, ValueError):
    """A reservation over the author's table cannot be made or carried out as it was said.

    Of names that are none, a participant without a database, or a table that is not as it was said.
    In a handler it leaves the outcome unknown, like any other error, so that the runtime asks again
    once it is mended. The message says what to change, and repeats nothing that came from a
    payload.
    """


class VoteNotSettled(AmendsError):
    """What is in doubt could not be settled as the runtime decided.

    The participant's own rules or handlers say otherwise: the message has what they answered. It
    stays as it is until somebody has looked.
    """


class InvalidDefinition(AmendsError, ValueError):
    """A definition cannot be sent as it is.

    Every problem is listed at once; `problems` has one line for each, which names the step, in a
    definition file also file and line, and how to mend it. What only the runtime can judge it
    answers with `InvalidRequest`.
    """

    def __init__(self, problems: Sequence[DefinitionProblem], definition: str = "") -> None:
        self.problems = tuple(map(str, problems))
        self.details = tuple(problems)
        """The same for programs: field, message, file, line and column of each."""
        self.definition = definition
        """The definition's name; empty if it is not known."""
        of = f" {definition!r}" if definition else ""
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"the definition{of} is not valid:{lines}")


class InvalidTls(AmendsError, ValueError):
    """A client's TLS files cannot be used: missing, unreadable, no PEM, or not a pair.

    Raised before anything is sent. The message names the file and how to mend it.
    """


class ApiError(AmendsError):
    """A call of the runtime failed.

    Also raised itself, for statuses that have no class of their own, such as ``INTERNAL``.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        code: grpc.StatusCode,
        metadata: Mapping[str, str] | None = None,
        in_doubt: bool = False,
    ) -> None:
        self.message = message
        """For people: what happened, the state now, what can be done."""
        self.reason = reason
        """For programs: UPPER_SNAKE_CASE, stable; the status' name if the runtime gave none."""
        self.code = code
        """The gRPC status."""
        self.metadata = dict(metadata or {})
        """Ids, sizes and limits that the runtime named. Never payloads."""
        self.in_doubt = in_doubt
        """Whether this call, or an earlier attempt of it, may have been carried out."""
        super().__init__(message)

    def __copy__(self) -> Self:
        """Give the same error without its traceback and cause.

        What fails for many callers at once is raised to each as an error of its own.
        """
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request."""

    field: str
    """Path of the field in the request, for example ``definition.steps[2].after``."""
    message: str
    """What is wrong with it, and how to mend it."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidRequest(ApiError):
    """The request is malformed; nothing was stored. `violations` names everything that is wrong."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        code: grpc.StatusCode,
        metadata: Mapping[str, str] | None = None,
        in_doubt: bool = False,
        violations: Sequence[Violation] = (),
    ) -> None:
        self.violations = tuple(violations)
        super().__init__(message, reason=reason, code=code, metadata=metadata, in_doubt=in_doubt)


class NotFound(ApiError):
    """There is no such saga, definition or participant."""


class AlreadyExists(ApiError):
    """The id is taken by a saga with other content. Nothing was changed."""


class WrongState(ApiError):
    """The saga's state does not allow it, and waiting alone will not change that."""


class Overloaded(ApiError):
    """A limit of the runtime is reached; nothing was done."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        code: grpc.StatusCode,
        metadata: Mapping[str, str] | None = None,
        in_doubt: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        self.retry_after_s = retry_after_s
        """When to try again, in seconds from now; None: trying again alone will not help."""
        super().__init__(message, reason=reason, code=code, metadata=metadata, in_doubt=in_doubt)


class Unavailable(ApiError):
    """The runtime cannot be reached, or cannot answer now: it starts, stops or has lost its store.

    `in_doubt` False says that the request has certainly not left this process.
    """


class DeadlineExceeded(ApiError):
    """The runtime did not answer within the call's time limit."""


class StartUnknown(AmendsError):
    """A saga may or may not have been started: the request left, and no answer came.

    Start it again with the same `saga_id` and content, which never starts it twice, or ask for it
    with `Client.get`. The cause is the error of the last attempt.
    """

    def __init__(self, saga_id: str, message: str) -> None:
        self.saga_id = saga_id
        """The id that was sent."""
        super().__init__(message)


class WaitTimeout(AmendsError):
    """A saga has not ended within the time that the caller gave. It goes on."""

    def __init__(self, saga: Saga, message: str) -> None:
        self.saga = saga
        """The saga as it was last seen."""
        super().__init__(message)
