"""Other processes for the store's tests: real ones, with our interpreter, ended by their pid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

ROOT = Path(__file__).resolve().parents[2]
ENDS_WITHIN_S = 120  # far beyond what any of them takes; a process that hangs is the failure


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A script of this folder, talking over pipes; it is killed if it is still there at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.storage.{script}", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def say(*words: object) -> None:
    """What a script tells the test that started it, one line at a time."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def logs_to_stderr() -> None:
    """Standard output is for `say`."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def line(process: subprocess.Popen[str]) -> str:
    """What the process says next; fails with its complaint if it has ended instead."""
    assert process.stdout is not None
    said = process.stdout.readline()
    if not said:
        assert process.stderr is not None
        raise AssertionError(f"the process ended: {process.stderr.read()}")
    return said.strip()


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script of this folder from its start to its end."""
    with running(script, *arguments) as process:
        out, err = process.communicate(timeout=ENDS_WITHIN_S)
    return subprocess.CompletedProcess(script, process.returncode, out, err)
