"""One decorated function: what shape it has, and how what it does becomes an outcome."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from amends.errors import AmendsError, HandlerFailed
from amends.outcomes import Broken, Call, Done, Heuristic, InProgress, Outcome, Rejected, Verb

SDK_FOLDER: Final = str(Path(__file__).parent)

FRAMES_SHOWN: Final = 6
"""Innermost frames that are logged: enough to find the line, short enough for one log line."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A function of the author's, bound to a verb of an action.

    Whatever it raises fails this one call. Its sys.exit() must end neither the thread nor the event
    loop, nor must its KeyboardInterrupt (a real Ctrl-C is the process's affair: see `signals.py`)
    or a panic of an extension, which is no `Exception` on purpose.
    """

    verb: Verb
    action: str
    function: Callable[..., object]
    where: str
    """File and line of the function."""
    is_async: bool
    takes_transaction: bool

    def answer(self, call: Call, transaction: object) -> Outcome:
        """Run a `def` handler. Raises `HandlerFailed` if it ends without an outcome."""
        assert not self.is_async
        try:
            value = self._invoke(call, transaction)
            if inspect.isawaitable(value):
                if inspect.iscoroutine(value):
                    value.close()  # or it warns that it was never awaited
                raise TypeError("it returned an awaitable")
            return self._outcome(call, value)
        except (Rejected, Broken, Heuristic) as outcome:
            return self._outcome(call, outcome)
        except BaseException as error:
            raise self._failed(error) from error

    async def answer_async(self, call: Call, transaction: object) -> Outcome:
        """Run an `async def` handler. Raises `HandlerFailed` if it ends without an outcome."""
        assert self.is_async
        try:
            value = await cast("Awaitable[object]", self._invoke(call, transaction))
            return self._outcome(call, value)
        except (Rejected, Broken, Heuristic) as outcome:
            return self._outcome(call, outcome)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled us: the handler awaited something that was cancelled.
            raise self._failed(error) from error
        except GeneratorExit as error:
            if _is_being_closed():
                raise
            raise self._failed(error) from error
        except BaseException as error:
            raise self._failed(error) from error

    @property
    def finds_held(self) -> Callable[[Call, Any], Any] | None:
        """What tells whether something is held for a call's life, where the handler knows that.

        An attribute of its function, which takes the same arguments. It matters to Compensate of a
        life that the barrier has no row of: what is held is let go of all the same. See
        `barrier.verdict.has_no_rows`.
        """
        return getattr(self.function, "finds_held", None)

    def holds(self, call: Call, transaction: object) -> bool:
        """Ask a `def` handler's `finds_held`. Raises `HandlerFailed` if it fails."""
        assert not self.is_async
        if self.finds_held is None:
            return False
        try:
            return bool(self.finds_held(call, transaction))
        except Exception as error:
            raise self._failed(error) from error

    async def holds_async(self, call: Call, transaction: object) -> bool:
        """Ask an `async def` handler's `finds_held`. Raises `HandlerFailed` if it fails."""
        assert self.is_async
        if self.finds_held is None:
            return False
        try:
            return bool(await self.finds_held(call, transaction))
        except Exception as error:
            raise self._failed(error) from error

    def _invoke(self, call: Call, transaction: object) -> object:
        if self.takes_transaction:
            return self.function(call, transaction)
        return self.function(call)

    def _outcome(self, call: Call, value: object) -> Outcome:
        match value:
            case Rejected() if self.verb is Verb.COMPENSATE:
                raise HandlerFailed(
                    f"the compensation of {self.action!r} ({self.where}) raised Rejected: a "
                    "compensation cannot be refused. Make it succeed in the end, raise Broken if "
                    "that is impossible, or return InProgress if it takes longer",
                    cause_type="Rejected",
                    where=self.where,
                )
            case Heuristic() if self.verb is Verb.PREPARE or not call.two_phase:
                raise HandlerFailed(
                    f"the handler of {self.verb} {self.action!r} ({self.where}) reported Heuristic,"
                    " which answers only Execute and Compensate of a two-phase commit: there alone"
                    " has a participant voted. Raise Rejected or Broken",
                    cause_type="Heuristic",
                    where=self.where,
                )
            case Done() | InProgress() | Rejected() | Broken() | Heuristic():
                return value
            case _:  # None, too
                return Done(value)

    def _failed(self, error: BaseException) -> HandlerFailed:
        if isinstance(error, HandlerFailed):
            return error
        # Only our own messages are known to hold no payload.
        detail = f": {error}" if isinstance(error, AmendsError) else ""
        return HandlerFailed(
            f"the handler of {self.verb} {self.action!r} raised {type(error).__name__}{detail}",
            cause_type=type(error).__name__,
            where=_frames(error) or self.where,
        )


def _is_being_closed() -> bool:
    """Tell whether a coroutine that meets `GeneratorExit` is thrown away, and not run by a task."""
    try:
        return asyncio.current_task() is None
    except RuntimeError:  # no event loop runs any more
        return True


def _frames(error: BaseException) -> str:
    """Name the innermost frames outside the SDK, without the message or any value."""
    frames = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(SDK_FOLDER)
    ]
    return " > ".join(frames[-FRAMES_SHOWN:])


def thread_context() -> contextvars.Context:
    """Copy the context variables of the task that answers a call, for a thread to work in.

    So a `def` handler finds what an `async def` one does: the current span, and what interceptors
    and loggers have bound to the call.
    """
    context = contextvars.copy_context()
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        # Or a handler that runs an event loop of its own would be told that one runs already.
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


def locate(function: Callable[..., object]) -> str:
    """Give ``file:line`` of a function, as an editor understands it."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    code = getattr(inner, "__code__", None) or getattr(_call_method(inner), "__code__", None)
    if code is None:
        return f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', inner)!s}"
    return f"{code.co_filename}:{code.co_firstlineno}"


def is_async(function: Callable[..., object]) -> bool:
    """Tell whether calling the function gives a coroutine."""
    return any(map(inspect.iscoroutinefunction, [function, _call_method(function)]))


def _call_method(thing: object) -> object:
    """Give what an object with a method ``__call__`` is called by."""
    return getattr(type(thing), "__call__", None)  # noqa: B004  # wanted: the method, not whether
