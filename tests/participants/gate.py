"""A place where a test makes a handler wait."""

from __future__ import annotations

import asyncio
import threading


class Gate:
    """A place where a handler waits, in a thread or in the loop, until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        self._opened_for_threads = threading.Event()
        self._loop = asyncio.get_running_loop()

    def pass_in_thread(self) -> None:
        """Wait in a thread."""
        self._loop.call_soon_threadsafe(self.reached.set)
        self._opened_for_threads.wait()

    async def pass_in_loop(self) -> None:
        """Wait in the event loop."""
        self.reached.set()
        await self.opened.wait()

    def open(self) -> None:
        """Let it go on."""
        self.opened.set()
        self._opened_for_threads.set()
