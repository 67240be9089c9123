"""What happened in a schedule, in order: what a failing seed is read by, and runs are compared by.

Lines are kept as their parts and put together only when somebody reads them: most traces are of
schedules in which nothing was wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from amends_runtime.errors import StoreError
from amends_runtime.ports import Transition

__all__ = ["ShownTransitions", "Trace", "logs_into"]


class Trace:
    """The course of one schedule. `now_s` is virtual time."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._lines: list[tuple[float, str, tuple[object, ...]]] = []

    def add(self, what: str, *values: object) -> None:
        """Note something. `what` is a format string for `values`, none of which may change."""
        self._lines.append((self._now_s(), what, values))

    def lines(self) -> list[str]:
        """Give all of it, for people: seconds, then what happened."""
        return [f"{at_s:10.4f}  {what.format(*values)}" for at_s, what, values in self._lines]


class ShownTransitions:
    """What a commit wrote, put into words when the trace is read."""

    def __init__(self, transitions: Sequence[Transition]) -> None:
        self._transitions = transitions

    def __format__(self, spec: str) -> str:
        return "; ".join(
            f"no. {t.saga_no} version {t.version}: " + ", ".join(map(repr, t.records))
            for t in self._transitions
        )


class _Log:
    """Takes what one module of the runtime logs."""

    def __init__(self, trace: Trace, crashed: Callable[[str], None]) -> None:
        self._trace = trace
        self._crashed = crashed

    def _note(self, event: str, **values: object) -> None:
        shown = ", ".join(f"{key}={value}" for key, value in values.items() if key != "exc_info")
        self._trace.add("  log   {} {}", event, shown)

    debug = info = warning = error = _note

    def exception(self, event: str, **values: object) -> None:
        """What the runtime logs as an exception is the loss of its store, or a bug in it."""
        error = sys.exc_info()[1]
        self._note(event, **values)
        if not isinstance(error, StoreError):
            self._crashed(f"{event}: {type(error).__name__}: {error}")


@contextmanager
def logs_into(trace: Trace, crashed: Callable[[str], None]) -> Iterator[None]:
    """Let the runtime's modules log into a trace.

    Their loggers are exchanged, because a configuration of structlog does not reach a logger that
    was used before it. `crashed` is told of what they log as an exception.
    """
    log: Any = _Log(trace, crashed)
    modules = _logging_modules()
    before = [module._log for module in modules]
    for module in modules:
        module._log = log
    try:
        yield
    finally:
        for module, logger in zip(modules, before, strict=True):
            module._log = logger


@functools.cache
def _logging_modules() -> list[Any]:
    """The runtime's modules that log. All are imported with the engine."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("amends_runtime.") and hasattr(module, "_log")
    ]
