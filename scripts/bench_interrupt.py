"""An interrupted benchmark leaves nothing behind: no process, no folder.

SIGINT and SIGTERM both end a benchmark by a KeyboardInterrupt, which unwinds whatever it has begun.
Only the first counts, so that nobody's impatience strikes the cleaning up; and what would be lost
track of in the middle, a process that is being started or a folder that is being removed, is done
under `held_back`. Processes are started in a process group of their own: a terminal's Ctrl-C is for
the benchmark alone, which then ends them in their order.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

INTERRUPTED: Final = 130
"""The exit code."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
ENDS_WITHIN_S: Final = 30.0


class _Held:
    """How many blocks hold an interrupt back now, and whether one has come meanwhile."""

    blocks = 0
    came = False


def interruptible(work: Callable[[], int | None]) -> int:
    """Does the work; gives its exit code, or 130 if SIGINT or SIGTERM has ended it."""
    for one in SIGNALS:
        signal.signal(one, _strike)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """For the length of the block nothing interrupts; what has come is raised at its end."""
    _Held.blocks += 1
    try:
        yield
    finally:
        _Held.blocks -= 1
        if _Held.came and not _Held.blocks:
            _Held.came = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def child(
    command: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: Any = None,
    stderr: Any = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    text: bool = False,
) -> Iterator[subprocess.Popen[Any]]:
    """A process for the length of the block; what still runs then is ended by SIGTERM.

    The arguments are those of `subprocess.Popen`. One that has not ended after 30 s is killed.
    """
    with contextlib.ExitStack() as stack:
        with held_back():
            popen = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd=cwd,
                text=text,
                process_group=0,
            )
            stack.callback(_end, popen)
        yield popen


@contextlib.contextmanager
def bench_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for the length of the block, in `parent` or where such folders are."""
    with contextlib.ExitStack() as stack:
        with held_back():
            made = tempfile.TemporaryDirectory(prefix="amends-bench-", dir=parent)
            stack.callback(_remove, made)
        yield Path(made.name)


def _strike(_number: int, _frame: FrameType | None) -> None:
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    if not _Held.blocks:
        raise KeyboardInterrupt
    _Held.came = True


def _end(popen: subprocess.Popen[Any]) -> None:
    with held_back():
        popen.terminate()
        try:
            popen.wait(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _remove(folder: tempfile.TemporaryDirectory[str]) -> None:
    with held_back():
        folder.cleanup()
