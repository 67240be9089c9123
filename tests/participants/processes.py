"""Starts the programs beside this file as real processes, and talks to them through their pipes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
from anyio.streams.text import TextReceiveStream

PROGRAMS = Path(__file__).parent / "programs"

PATIENCE_S = 60.0
"""Bounds a broken test; no test waits for it."""


class Program:
    """A running program."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        assert process.stdout is not None
        self._stdout = TextReceiveStream(process.stdout)
        self._received = ""

    async def line(self) -> str:
        """Wait for the next line that it prints."""
        with anyio.fail_after(PATIENCE_S):
            while "\n" not in self._received:
                try:
                    self._received += await self._stdout.receive()
                except anyio.EndOfStream:
                    raise AssertionError(f"it ended, and said: {await self.stderr()}") from None
        line, _, self._received = self._received.partition("\n")
        return line

    async def say(self, line: str) -> None:
        """Give it a line on its stdin."""
        assert self._process.stdin is not None
        await self._process.stdin.send(f"{line}\n".encode())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait for its end; give its exit status, or minus the signal that killed it."""
        with anyio.fail_after(PATIENCE_S):
            return await self._process.wait()

    async def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.signal(signal.SIGKILL)
        assert await self.wait() == -signal.SIGKILL

    async def stderr(self) -> str:
        """Read what it wrote on stderr, until its end."""
        assert self._process.stderr is not None
        with anyio.fail_after(PATIENCE_S):
            return "".join([part async for part in TextReceiveStream(self._process.stderr)])


@asynccontextmanager
async def program(name: str, *arguments: str | Path) -> AsyncIterator[Program]:
    """Run a program for the length of a block; kill it at the end if it still runs."""
    command = [sys.executable, str(PROGRAMS / name), *map(str, arguments)]
    async with await anyio.open_process(command) as process:
        try:
            yield Program(process)
        finally:
            if process.returncode is None:
                process.kill()


async def ended_well(code: str, folder: Path) -> str:
    """Run Python code, with warnings as errors, to an end without a word on stderr; give stdout."""
    path = folder / "code.py"
    path.write_text(code, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    with anyio.fail_after(PATIENCE_S):
        ended = await anyio.run_process(
            [sys.executable, "-W", "error", str(path)],
            check=False,
            env=os.environ | {"PYTHONPATH": root},
        )
    assert (ended.returncode, ended.stderr.decode()) == (0, "")
    return ended.stdout.decode()
