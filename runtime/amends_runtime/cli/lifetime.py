"""A serving process from the outside: the signals that end it, and the file that says it is up."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from amends_runtime.cli.exits import Exit, ExitCode

__all__ = ["ReadyFile", "Signals"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """SIGTERM and SIGINT: the first asks, the second forces. To be installed by the main thread.

    Plain handlers instead of the event loop's: they also run while the loop is busy, so that the
    second signal always gets through. The system gives a signal to any thread, and only the main
    one runs handlers, once it wakes up: so a loop that sleeps is woken by a byte that the
    interpreter writes for each signal.
    """

    def __init__(self, *, until_stdin_closes: bool, before_force: Callable[[], None]) -> None:
        self._until_stdin_closes = until_stdin_closes
        self._before_force = before_force
        self._signalled = False
        self._asked = False
        self._stop: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alarm: tuple[socket.socket, socket.socket] | None = None

    def install(self) -> None:
        """From now on until the process ends."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        # The interpreter puts the defaults back when it ends, and a late signal would then spoil
        # the exit code. At exit means: after all threads have ended.
        atexit.register(self._ignore)

    def on_first(self, stop: Callable[[], None]) -> None:
        """From now on the first signal calls `stop` in the running loop; at once if it has come."""
        self._loop = asyncio.get_running_loop()
        self._stop = stop
        heard, rung = self._alarm = socket.socketpair()
        for end in self._alarm:
            end.setblocking(False)
        self._loop.add_reader(heard, _empty, heard)
        signal.set_wakeup_fd(rung.fileno(), warn_on_full_buffer=False)
        if self._asked:
            stop()
        if self._until_stdin_closes:
            # A daemon: reading standard input cannot be interrupted, and must not hold up the exit.
            threading.Thread(target=self._wait_for_stdin, name="stdin", daemon=True).start()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # The end of standard input does not count: a script that dies sends both.
        if self._signalled:
            self._before_force()
            _force_exit(f"a second signal ({signal.Signals(number).name}): ending at once")
        self._signalled = True
        self._ask()

    def _ignore(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _wait_for_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self._ask()

    def _ask(self) -> None:
        self._asked = True
        if self._loop is not None and self._stop is not None:
            # The loop may have ended in between: then there is nothing left to stop.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop)


def _empty(heard: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while heard.recv(64):
            pass


def _force_exit(why: str) -> None:
    # No buffered stream: the handler may have interrupted a write to it.
    os.write(2, f"amends: {why}\n".encode())
    os._exit(ExitCode.INTERNAL)


class ReadyFile:
    """Says to scripts that all is up. `path` None: nobody asked for it."""

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.absolute()
        if self._path is not None and not self._path.parent.is_dir():
            raise Exit(
                ExitCode.USAGE,
                f"--ready-file {path}: there is no folder {self._path.parent}; make it first",
            )

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """No file before and after, whatever happens: one of an earlier run would be a lie."""
        self.remove()
        try:
            yield
        finally:
            self.remove()

    def write(self, address: str, metrics: str = "") -> None:
        """Writes the file as a whole: a reader sees all of it or nothing.

        `metrics` is where Prometheus finds them; empty: nowhere, and it is left out.
        """
        if self._path is None:
            return
        endpoint = {"metrics": metrics} if metrics else {}
        content = json.dumps({"pid": os.getpid(), "address": address, **endpoint})
        try:
            handle, temporary = tempfile.mkstemp(
                prefix=f".{self._path.name}.", dir=self._path.parent
            )
            try:
                os.fchmod(handle, 0o644)  # who waits for it may be another user
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content + "\n")
                Path(temporary).replace(self._path)
            except BaseException:
                Path(temporary).unlink()
                raise
        except OSError as error:
            raise self._failed("written", error) from None

    def remove(self) -> None:
        """Removes the file if it is there."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed("removed", error) from None

    def discard(self) -> None:
        """Removes the file as far as it can be, where there is nobody to complain to."""
        with contextlib.suppress(Exit):
            self.remove()

    def _failed(self, what: str, error: OSError) -> Exit:
        return Exit(
            ExitCode.USAGE,
            f"--ready-file {self._path}: cannot be {what} ({error.strerror}); choose another place",
        )
