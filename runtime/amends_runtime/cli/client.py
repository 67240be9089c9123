"""The way to the runtime: the SDK's client, and what its errors mean for a command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc

import amends
from amends import errors
from amends.connection import Connection
from amends.v1 import operator_pb2, operator_pb2_grpc
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import Common

__all__ = ["DefinitionDiff", "Violation", "connect", "diff_definition"]

DIFF_TIMEOUT_S: Final = 10.0  # it is computed in milliseconds; this is for a slow network


@asynccontextmanager
async def connect(common: Common, *, patient: bool = False) -> AsyncIterator[amends.Client]:
    """A client of the runtime that --target names; an error of its calls ends the command.

    A runtime that cannot be reached is said at once, since a person waits. `patient` is for waiting
    for sagas: a restart of the runtime meanwhile is waited out.
    """
    try:
        async with amends.Client(common.target, retry_unavailable=patient) as client:
            yield client
    except errors.AmendsError as error:
        raise _exit(error, common.target) from error
    except ValueError as error:  # how the SDK refuses an argument that no request could be made of
        raise Exit(ExitCode.USAGE, str(error)) from error


@dataclass(frozen=True, slots=True)
class Violation:
    """One reason for which registration would refuse a definition."""

    field: str
    """Path of what is wrong, for example `definition.steps[2].after`."""
    message: str
    """What is wrong with it, and how to mend it."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


@dataclass(frozen=True, slots=True)
class DefinitionDiff:
    """How a definition differs from the latest registered version of its name."""

    same: bool
    """The same content is registered."""
    differences: tuple[str, ...]
    """One line per difference, for people."""
    violations: tuple[Violation, ...]
    """What registration would refuse; empty if it would register it."""


async def diff_definition(common: Common, definition: amends.Definition) -> DefinitionDiff:
    """Asks the runtime how a definition differs from what is registered; an error ends the command.

    Over a connection of its own: the SDK's client registers definitions, and leaves this to tools.
    """
    request = operator_pb2.DiffDefinitionRequest(definition=definition.to_proto())
    connection = Connection(common.target, retry_unavailable=False)
    try:
        stub = operator_pb2_grpc.OperatorServiceStub(connection.channel)
        found = await connection.call(stub.DiffDefinition, lambda _left_s: request, DIFF_TIMEOUT_S)
    except errors.AmendsError as error:
        raise _exit(error, common.target) from error
    finally:
        await connection.close()
    return DefinitionDiff(
        same=found.same,
        differences=tuple(found.differences),
        violations=tuple(
            Violation(each.metadata.get("field", ""), each.message) for each in found.violations
        ),
    )


def _exit(error: errors.AmendsError, target: str) -> Exit:
    match error:
        case errors.InvalidRequest() if error.violations:
            return Exit(ExitCode.USAGE, *map(str, error.violations))
        case errors.Unavailable():
            return Exit(
                ExitCode.UNAVAILABLE,
                f"{_sentence(error)}; --target or AMENDS_TARGET name another runtime",
            )
        case errors.StartUnknown():
            return Exit(
                ExitCode.UNAVAILABLE,
                f"saga {error.saga_id} may or may not have been started ({error.__cause__}); see "
                f"with: amends get {error.saga_id}, or start it again with --id {error.saga_id}, "
                "which never starts it twice",
            )
        case errors.WaitTimeout():
            saga = error.saga
            return Exit(
                ExitCode.UNAVAILABLE,
                f"saga {saga.saga_id} has not ended in that time and goes on; it is {saga.state}; "
                f"amends wait {saga.saga_id} waits on",
            )
        case errors.ApiError():
            code, hint = _BY_STATUS.get(error.code, _BUG)
            # What the runtime itself says ends with what can be done, sometimes in the API's words.
            is_ours = error.reason != error.code.name
            is_told = is_ours and (code is not ExitCode.NOT_FOUND or "amends " in str(error))
            return Exit(code, _sentence(error) if is_told else f"{_sentence(error)}; {hint}")
        case _:
            return Exit(ExitCode.USAGE, *str(error).splitlines())


_BUG: Final = (ExitCode.INTERNAL, "the runtime's log says more")
_BY_STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: (ExitCode.USAGE, "see --help"),
    grpc.StatusCode.OUT_OF_RANGE: (ExitCode.USAGE, "see --help"),
    grpc.StatusCode.NOT_FOUND: (ExitCode.NOT_FOUND, "amends list shows the sagas that there are"),
    grpc.StatusCode.ALREADY_EXISTS: (ExitCode.CONFLICT, "choose another id"),
    grpc.StatusCode.FAILED_PRECONDITION: (ExitCode.CONFLICT, "amends get shows where it stands"),
    grpc.StatusCode.ABORTED: (ExitCode.CONFLICT, "try again"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (ExitCode.UNAVAILABLE, "try again later"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (ExitCode.UNAVAILABLE, "try again"),
    grpc.StatusCode.UNIMPLEMENTED: (
        ExitCode.UNAVAILABLE,
        "is it an amends runtime, and of this version? amends runtime shows it",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (ExitCode.USAGE, "ask whoever runs it for access"),
    grpc.StatusCode.PERMISSION_DENIED: (ExitCode.USAGE, "ask whoever runs it for access"),
}


def _sentence(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
