"""`amends serve`: one runtime, from its configuration to its last commit.

1. Everything that can be wrong is looked at before anything is opened: configuration, definition
   files, the ready file's folder.
2. The ready file appears when all is up, and is gone when nothing is served any more.
3. The first SIGTERM or SIGINT asks the engine to stop, and the exit code is 0. The second ends the
   process at once with 1; that is safe, because what was acknowledged is on the disk.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import Debug, Flag, parse_pairs

if TYPE_CHECKING:
    from amends_runtime.config import Config
    from amends_runtime.core.definition import Definition

__all__ = ["serve"]


def serve(
    *,
    config: Annotated[
        Path | None, Parameter(name=("--config", "-c"), env_var="AMENDS_CONFIG")
    ] = None,
    listen: str | None = None,
    insecure: Flag = False,
    database: str | None = None,
    participant: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    definition: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    ready_file: Path | None = None,
    until_stdin_closes: Flag = False,
    log_format: Literal["auto", "console", "json"] | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
    debug: Debug = False,
) -> int:
    """Run a runtime until SIGTERM or Ctrl-C.

    Flags go over AMENDS_* variables, these over the configuration file, and
    that over the defaults.

    Ctrl-C or SIGTERM once: no new starts, what is decided is committed, exit
    code 0; sagas go on when the runtime is started again. A second time: the
    process ends at once, exit code 1.

    For example:

      amends serve --config amends.toml
      amends serve --participant payments=127.0.0.1:7001 --definition order.toml
      AMENDS_LOG_LEVEL=debug amends serve --config amends.toml

    Parameters
    ----------
    config:
        Configuration file, TOML; docs/configuration.md lists its keys.
    listen:
        Address for clients: host:port (port 0: any free one) or unix:path. Default 127.0.0.1:7233.
    insecure:
        Take a --listen that other machines reach, although there is no TLS.
    database:
        The SQLite file; made if it is missing. Default amends.db.
    participant:
        NAME=ADDRESS of a participant, such as payments=127.0.0.1:7001; may be repeated.
    definition:
        Definition file (TOML or JSON) or pattern to register at start; may be repeated.
    ready_file:
        Written when all is up, with {"pid", "address"} as JSON; removed at the end.
    until_stdin_closes:
        Also stop when standard input ends: for scripts that must leave nothing behind.
    log_format:
        auto (the default) is console on a terminal and JSON elsewhere.
    log_level:
        The least that is logged. Default info.
    """
    # Heavy, and of no use to any other command.
    from amends_runtime.cli.definition_files import find_definitions  # noqa: PLC0415
    from amends_runtime.config import Flags, load  # noqa: PLC0415
    from amends_runtime.telemetry.logging import configure_logging  # noqa: PLC0415

    flags = Flags(
        listen=listen,
        insecure=insecure or None,
        database=database,
        participants=parse_pairs(participant, "--participant", "NAME=ADDRESS"),
        definitions=definition,
        log_format=log_format,
        log_level=log_level,
    )
    loaded = load(config, flags)
    definitions = find_definitions(loaded.definitions, loaded.participants)
    ready = _ReadyFile(ready_file)
    configure_logging(loaded.log_format, loaded.log_level)
    signals = _Signals(until_stdin_closes=until_stdin_closes, before_force=ready.discard)
    signals.install()
    # Live sagas are many small, long-lived objects that form no cycles; walking them at Python's
    # default pace took a tenth of the runtime's CPU under load (scripts/bench.py, 1,420 to 1,230 µs
    # a saga).
    gc.set_threshold(*GC_THRESHOLDS)
    with ready.absent():
        asyncio.run(_serve(loaded, definitions, ready, signals))
    return ExitCode.OK


async def _serve(
    config: Config, definitions: list[Definition], ready: _ReadyFile, signals: _Signals
) -> None:
    import structlog  # noqa: PLC0415  # as above

    from amends_runtime.engine import run_engine  # noqa: PLC0415  # as above

    log = structlog.get_logger(__name__)
    async with run_engine(config, definitions=definitions) as engine:

        def stop() -> None:
            ready.discard()
            log.info("stopping: nothing new is taken, what is decided is committed")
            engine.request_stop()

        ready.write(engine.address)
        log.info(
            "amends is up",
            address=engine.address,
            database=config.server.database,
            participants=sorted(config.participants),
            definitions=sorted({definition.name for definition in definitions}),
            pid=os.getpid(),
        )
        signals.on_first(stop)
        await engine.wait_stopped()
    log.info("amends has stopped")


GC_THRESHOLDS: Final = (100_000, 50, 100)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class _Signals:
    """SIGTERM and SIGINT: the first asks, the second forces. To be installed by the main thread.

    Plain handlers instead of the event loop's: they also run while the loop is busy, so that the
    second signal always gets through.
    """

    def __init__(self, *, until_stdin_closes: bool, before_force: Callable[[], None]) -> None:
        self._until_stdin_closes = until_stdin_closes
        self._before_force = before_force
        self._signalled = False
        self._asked = False
        self._stop: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> None:
        """From now on until the process ends."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        # The interpreter puts the defaults back when it ends, and a late signal would then spoil
        # the exit code. At exit means: after all threads have ended.
        atexit.register(_ignore_signals)

    def on_first(self, stop: Callable[[], None]) -> None:
        """From now on the first signal calls `stop` in the running loop; at once if it has come."""
        self._loop = asyncio.get_running_loop()
        self._stop = stop
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


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _force_exit(why: str) -> None:
    # No buffered stream: the handler may have interrupted a write to it.
    os.write(2, f"amends: {why}\n".encode())
    os._exit(ExitCode.INTERNAL)


class _ReadyFile:
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

    def write(self, address: str) -> None:
        """Writes the file as a whole: a reader sees all of it or nothing."""
        if self._path is None:
            return
        content = json.dumps({"pid": os.getpid(), "address": address})
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
