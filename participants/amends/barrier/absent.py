"""No barrier: handlers are called directly.

Weaker, and meant for actions whose effect lies in a system that recognises our idempotency key by
itself. Of the rules in `verdict.py` only the first holds: a call that comes while another one of
the same step runs *in this process* is answered `InProgress`. Repeated calls run the handler again,
compensations run even if there is nothing to undo, and nothing refuses an Execute that comes late.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from functools import partial
from types import NoneType
from typing import Any, Final

from amends.barrier.verdict import POLL_AFTER_S
from amends.errors import NotCompensatable
from amends.handler import Handler, thread_context
from amends.outcomes import Call, InProgress, Outcome

MAX_THREADS: Final = 32
"""`def` handlers that run at once; they wait for other systems most of the time."""


class NoBarrier:
    """Calls handlers directly; `def` handlers in threads, so that they do not block the loop."""

    transaction_types: tuple[type[Any], type[Any]] = (NoneType, NoneType)

    def __init__(self) -> None:
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: set[tuple[str, str, str, int]] = set()

    async def open(self) -> None:
        """Make ready to run `def` handlers."""
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_THREADS, "amends handler")

    async def run(self, call: Call, handler: Handler | None) -> Outcome:
        """Run the handler, unless a call of the same step runs in this process."""
        if handler is None:
            raise NotCompensatable(action=call.action, step=call.step, saga_id=call.saga_id)
        life = call.store_id, call.saga_id, call.step, call.round
        if life in self._running:
            return InProgress(POLL_AFTER_S)
        self._running.add(life)
        if handler.is_async:
            try:
                return await handler.answer_async(call, None)
            finally:
                self._running.discard(life)
        assert self._threads is not None, "open() comes first"
        future = self._threads.submit(thread_context().run, handler.answer, call, None)
        # When the thread has ended, which may be after the caller left.
        future.add_done_callback(lambda _: self._running.discard(life))
        return await asyncio.wrap_future(future)

    async def aclose(self) -> None:
        """Wait for the `def` handlers that run; those that have not begun are dropped."""
        if self._threads is not None:
            threads, self._threads = self._threads, None
            await asyncio.to_thread(partial(threads.shutdown, cancel_futures=True))
