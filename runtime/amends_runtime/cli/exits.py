"""How a command ends: its exit code, and one line that says what happened and what to try next.

Exit codes are part of the interface and never change their meaning:

    0     done
    1     internal: a bug in amends, or standard output could not be written
    2     usage: a flag, a file, an address or a request is wrong; nothing was done
    3     not found: no such saga, definition or participant
    4     wrong state or conflict: the saga's state forbids it, the id is taken, another runtime
          owns the database, a definition file differs (definitions diff --exit-code)
    5     unavailable: nothing answers, it does not answer in time, or the database cannot be used
    6     the saga ended, and not as COMPLETED
    130   interrupted with Ctrl-C
    143   ended by SIGTERM while a saga was started, waited for or watched
"""

from __future__ import annotations

import enum
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from amends_runtime import errors

__all__ = ["Exit", "ExitCode", "explain", "one_line", "report"]


class ExitCode(enum.IntEnum):
    """What the process ends with."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNAVAILABLE = 5
    NOT_COMPLETED = 6
    INTERRUPTED = 130
    TERMINATED = 143


class Exit(Exception):
    """A command ends here: with this code, and these lines for standard error."""

    def __init__(self, code: ExitCode, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.code = code
        self.lines = lines


def report(error: BaseException, *, debug: bool) -> ExitCode:
    """Writes what a person needs to know about `error` to standard error; returns the exit code."""
    code, lines = explain(error)
    for line in lines:
        sys.stderr.write(f"amends: {one_line(line)}\n")
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    elif code is ExitCode.INTERNAL and not isinstance(error, Exit):
        sys.stderr.write(
            "amends: run it again with --debug (or AMENDS_DEBUG=1) and report what it shows\n"
        )
    return code


def explain(error: BaseException) -> tuple[ExitCode, list[str]]:
    """The exit code of an error, and its lines."""
    if isinstance(error, BaseExceptionGroup):
        # Several tasks can fail of one cause; the gravest known one speaks, a bug before all.
        found = [explain(single) for single in _leaves(error)]
        code = min(found, key=lambda each: each[0] is not ExitCode.INTERNAL)[0]
        lines = [line for each, lines in found if each is code for line in lines]
        return code, list(dict.fromkeys(lines))
    match error:
        case Exit():
            return error.code, list(error.lines)
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, []
        case errors.ConfigurationError() | errors.InvalidRequest():
            return ExitCode.USAGE, str(error).splitlines()
        case errors.NotFound():
            return ExitCode.NOT_FOUND, str(error).splitlines()
        case errors.StoreInUse() | errors.AlreadyExists() | errors.WrongState():
            return ExitCode.CONFLICT, str(error).splitlines()
        case errors.StoreError() | errors.Unavailable() | errors.Overloaded():
            return ExitCode.UNAVAILABLE, str(error).splitlines()
        case _:
            pass
    return ExitCode.INTERNAL, [f"internal error: {type(error).__name__}{_where(error)}"]


def _where(error: BaseException) -> str:
    """Where it was raised. Its text is left out: it may quote what must not be shown."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}"


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


_CONTROLS = {
    code: repr(chr(code))[1:-1] for code in [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]
}


def one_line(text: str) -> str:
    """The text with control characters written out: what others wrote cannot drive a terminal."""
    return text.translate(_CONTROLS)


def debug_wanted(arguments: list[str]) -> bool:
    """Whether tracebacks are to be shown."""
    return "--debug" in arguments or os.environ.get("AMENDS_DEBUG", "") not in ("", "0")
