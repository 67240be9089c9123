"""SIGTERM and SIGINT, as a process takes them whose work is to serve a participant.

1. The first asks: the participant drains.
2. The second, while it drains, ends the process at once. Plain handlers instead of the event loop's
   run while the loop is busy, too, so that it always gets through.
3. The system gives a signal to any thread, and only the main one runs handlers, once it wakes up: a
   loop that sleeps is woken by a byte that the interpreter writes for each signal.
4. When the drain is over they are ignored until the process has ended. Then nothing is left to
   stop, and a late signal would only spoil the exit status.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class EndSignals:
    """The two signals, from `install` on; all but the handler is called by the main thread.

    `force` is called for the second signal, from a signal handler: it must end the process, and
    touch as little as it can.
    """

    def __init__(self, force: Callable[[str], None]) -> None:
        self._force = force
        self._before: dict[signal.Signals, Any] = {}
        self._asked = False
        self._is_over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], None] | None = None
        self._alarm: tuple[socket.socket, socket.socket] | None = None

    def install(self) -> None:
        """Take the signals from now on."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)

    def on_first(self, stop: Callable[[], None]) -> None:
        """Let the first signal call `stop` in the running loop; at once if it has come already."""
        self._loop, self._stop = asyncio.get_running_loop(), stop
        heard, rung = self._alarm = socket.socketpair()
        for end in self._alarm:
            end.setblocking(False)
        self._loop.add_reader(heard, _empty, heard)
        signal.set_wakeup_fd(rung.fileno(), warn_on_full_buffer=False)
        if self._asked:
            stop()

    def ignore(self) -> None:
        """Ignore both from now on, until the process has ended. Called in the loop, if one runs."""
        self._is_over = True
        if self._alarm is not None and self._loop is not None:
            signal.set_wakeup_fd(-1)
            self._loop.remove_reader(self._alarm[0])
            for end in self._alarm:
                end.close()
            self._alarm = None
        # The interpreter puts the defaults back when it ends, but not in place of "ignored". Not
        # now already, or processes that are started meanwhile would ignore the signals as well.
        atexit.register(_ignore)

    def restore(self) -> None:
        """Put back what was there before `install`."""
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set by Python, and cannot be either
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_over:
            return
        if self._asked:
            self._force(f"a second signal ({signal.Signals(number).name}): ending at once")
        self._asked = True
        if self._loop is not None and self._stop is not None:
            # The loop may have been closed in between: then there is nothing left to stop.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop)


def _empty(heard: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while heard.recv(64):
            pass


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
