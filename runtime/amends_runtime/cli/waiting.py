"""Waiting for a saga's end: what is said meanwhile, and when the wait is broken off."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from amends.errors import DeadlineExceeded, Unavailable, WaitTimeout
from amends.sagas import Saga, SagaState
from amends_runtime.cli.client import connect
from amends_runtime.cli.exits import Exit, ExitCode, one_line
from amends_runtime.cli.options import Common
from amends_runtime.cli.saga_views import why_stuck

__all__ = ["interruptible", "wait_for_end"]

LOOK_S: Final = 10.0
"""A saga that got stuck is noticed within this; the runtime tells a waiter of ends only."""


async def wait_for_end(saga: Saga, common: Common, *, timeout_s: float | None) -> Saga:
    """Waits for the end of a saga that has not ended, through restarts of the runtime.

    If it is stuck, or gets stuck, that is said on standard error, each time once. Ends the command
    if `timeout_s` is over first.
    """
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    said = False
    async with connect(common, patient=True) as client:
        while True:
            is_stuck = saga.state is SagaState.STUCK
            if is_stuck and not said:
                sys.stderr.write(f"amends: {one_line(why_stuck(saga))}; waiting on\n")
                sys.stderr.flush()
            said = is_stuck
            left_s = max(until - time.monotonic(), 0.0)
            try:
                return await client.wait(saga.saga_id, timeout_s=min(left_s, LOOK_S))
            except WaitTimeout as timeout:
                if left_s <= LOOK_S:
                    raise
                saga = timeout.saga
            except (Unavailable, DeadlineExceeded):
                if left_s <= LOOK_S:
                    raise


@contextlib.contextmanager
def interruptible(line: str | Callable[[], str]) -> Iterator[None]:
    """Ends the command with `line` if Ctrl-C or SIGTERM comes inside; inside a coroutine only.

    A function gives the line as it is by then.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "a command is a task"
    code = ExitCode.INTERRUPTED

    def on_terminate() -> None:
        nonlocal code
        code = ExitCode.TERMINATED
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, on_terminate)
    try:
        yield
    except asyncio.CancelledError:  # nothing else cancels a command; asyncio does it at Ctrl-C
        raise Exit(code, line() if callable(line) else line) from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
