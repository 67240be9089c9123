"""The way to the runtime: the SDK's client, and what its errors mean for a command."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc

import amends
from amends import errors
from amends.sagas import SagaState
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import Common

__all__ = ["connect", "exit_of", "whole_hash"]


@asynccontextmanager
async def connect(common: Common, *, patient: bool = False) -> AsyncIterator[amends.Client]:
    """A client of the runtime that --target names; an error of its calls ends the command.

    A runtime that cannot be reached is said at once, since a person waits. `patient` is for waiting
    for sagas: a restart of the runtime meanwhile is waited out.
    """
    try:
        tls = _tls(common)
        async with amends.Client(common.target, tls=tls, retry_unavailable=patient) as client:
            yield client
    except errors.AmendsError as error:
        raise exit_of(error, common.target) from error
    except ValueError as error:  # how the SDK refuses an argument that no request could be made of
        raise Exit(ExitCode.USAGE, str(error)) from error


def _tls(common: Common) -> amends.ClientTls | None:
    files = (common.tls_ca, common.tls_cert, common.tls_key, common.tls_server_name)
    return amends.ClientTls(*files) if any(files) else None


async def whole_hash(client: amends.Client, name: str, given: str, flag: str) -> str:
    """The content hash of a version of `name` that begins with `given`, as tables show it.

    Ends the command if none does, or several do.
    """
    if not HASH_BEGINNING.fullmatch(given):
        raise Exit(
            ExitCode.USAGE,
            f"{flag} {given}: is not a content hash: give its first 8 or more of 64 characters, "
            "0-9 a-f, as amends definitions list --all-versions shows them",
        )
    if len(given) == HASH_LENGTH:
        return given
    of_name = [each for each in await client.definitions(all_versions=True) if each.name == name]
    found = [each.content_hash for each in of_name if each.content_hash.startswith(given)]
    if len(found) == 1:
        return found[0]
    if not of_name:
        # Asked for as it is, so that the runtime says which name it may have been.
        return (await client.definition(name)).content_hash
    what = "several versions begin with it: give more of it" if found else "no version begins so"
    raise Exit(
        ExitCode.USAGE if found else ExitCode.NOT_FOUND,
        f"{flag} {given}: {what}; amends definitions list --all-versions shows them",
    )


HASH_LENGTH: Final = 64
HASH_BEGINNING: Final = re.compile(r"[0-9a-f]{8,64}")


def exit_of(error: errors.AmendsError, target: str) -> Exit:
    """How an error of the SDK ends a command that asks the runtime at `target`."""
    match error:
        case errors.InvalidTls():
            return Exit(ExitCode.USAGE, _in_flags(str(error)))
        case errors.InvalidRequest() if error.violations:
            return Exit(ExitCode.USAGE, *map(str, error.violations))
        case errors.Unavailable():
            return Exit(
                ExitCode.UNAVAILABLE,
                f"{_in_flags(_sentence(error))}; --target or AMENDS_TARGET name another runtime",
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
            if saga.state is SagaState.STUCK:
                return Exit(
                    ExitCode.UNAVAILABLE,
                    f"saga {saga.saga_id} has not ended in that time; it is STUCK: amends get "
                    f"{saga.saga_id} shows why",
                )
            return Exit(
                ExitCode.UNAVAILABLE,
                f"saga {saga.saga_id} has not ended in that time and goes on; it is {saga.state}; "
                f"amends wait {saga.saga_id} waits on",
            )
        case errors.ApiError():
            code, hint = _BY_STATUS.get(error.code, _BUG)
            # What the runtime itself says ends with what can be done, sometimes in the API's words.
            is_ours = error.reason != error.code.name
            has_hint = error.reason.startswith(("UNKNOWN_SAGA", "UNKNOWN_DEFINITION"))
            is_told = is_ours and (not has_hint or "amends " in str(error))
            if error.reason.startswith("UNKNOWN_DEFINITION"):
                hint = "amends definitions list shows all"
            if is_told:
                return Exit(code, _sentence(error))
            sentence = _sentence(error)
            joint = " " if sentence.endswith("?") else "; "
            return Exit(code, f"{sentence}{joint}{hint}")
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
        "amends runtime shows the version of the one at --target",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (ExitCode.USAGE, "ask whoever runs it for access"),
    grpc.StatusCode.PERMISSION_DENIED: (ExitCode.USAGE, "ask whoever runs it for access"),
}


def _in_flags(text: str) -> str:
    """What the SDK says of TLS to a program, for a person at the command line."""
    for pattern, flag in _TLS_WORDS:
        text = pattern.sub(flag, text)
    return text


_TLS_WORDS: Final = (
    (re.compile(r"leave tls= out"), "leave --tls-ca, --tls-cert and --tls-key out"),
    (re.compile(r"tls=amends\.ClientTls\(ca\)"), "--tls-ca (AMENDS_TLS_CA)"),
    (re.compile(r"\bserver_name="), "--tls-server-name"),
    (re.compile(r"\b(ca|cert|key)=(?=')"), r"--tls-\1 "),  # with the path that was given
    (re.compile(r"\b(ca|cert|key)="), r"--tls-\1"),
)


def _sentence(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
