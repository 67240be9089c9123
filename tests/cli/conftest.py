"""Real processes: a runtime, a participant, and commands against them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PARTICIPANT = Path(__file__).with_name("payments_program.py")
PATIENCE_S = 60  # bounds a test that hangs; nothing is measured by it


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any AMENDS_* variable, and with `extra`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AMENDS_")}
    return {**clean, **extra}


def amends(*arguments: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a process of its own. `extra` goes into its environment."""
    return subprocess.run(
        [sys.executable, "-m", "amends_runtime", *arguments],
        input=stdin,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Served:
    """A process that logs JSON to standard error: `amends serve`, as a user would start it."""

    def __init__(self, *arguments: str, cwd: Path, leashed: bool = True) -> None:
        # Leashed, so that a test run that dies leaves nothing behind.
        leash = ["--until-stdin-closes"] if leashed else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "amends_runtime", "serve", *leash, *arguments],
            cwd=cwd,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._unread: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._unread.put(line.rstrip("\n"))
        self._unread.put(None)

    def wait_for(self, message: str) -> dict[str, Any]:
        """Read the log up to the line that has this message; return it if it is JSON."""
        while (line := self._unread.get(timeout=PATIENCE_S)) is not None:
            self.lines.append(line)
            if message in line:
                entry: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
                return entry
        raise AssertionError(f"no {message!r} in the log:\n" + "\n".join(self.lines))

    def wait_ended(self) -> int:
        """Wait for the end of the process, read the rest of its log, return its exit code."""
        code = self.process.wait(timeout=PATIENCE_S)
        self._reader.join()
        while (line := self._unread.get()) is not None:
            self.lines.append(line)
        return code

    def close(self) -> None:
        """End the process whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what was not yet written has no reader
                stream.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start `amends serve` with these arguments, in a folder of its own, on a free port."""
    started: list[Served] = []

    def start(*arguments: str, leashed: bool = True) -> Served:
        listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
        served = Served(*listen, *arguments, cwd=tmp_path, leashed=leashed)
        started.append(served)
        return served

    yield start
    for served in started:
        served.close()


@pytest.fixture(scope="session")
def payments() -> Iterator[str]:
    """The address of a participant: it charges, and declines amounts above 100."""
    process = subprocess.Popen(
        [sys.executable, str(PARTICIPANT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


ORDER = {
    "name": "order",
    "steps": [{"name": "charge", "participant": "payments", "action": "charge"}],
}
WAITING = {
    "name": "waiting",
    "steps": [{"name": "charge", "participant": "absent", "action": "charge"}],
}
TURNING = {
    "name": "turning",
    "steps": [
        {"name": "charge", "participant": "payments", "action": "charge"},
        {"name": "check", "participant": "payments", "action": "refuse"},
    ],
}


@pytest.fixture(scope="session")
def target(payments: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a runtime that knows the definitions order, waiting and turning.

    Sagas of `waiting` never end: nobody is at the address of its participant. Those of `turning`
    always turn back.
    """
    folder = tmp_path_factory.mktemp("runtime")
    for definition in (ORDER, WAITING, TURNING):
        (folder / f"{definition['name']}.json").write_text(json.dumps(definition), encoding="utf-8")
    served = Served(
        *("--listen", "127.0.0.1:0", "--definition", "*.json"),
        *("--participant", f"payments={payments}", "--participant", "absent=127.0.0.1:1"),
        cwd=folder,
    )
    try:
        yield served.wait_for("amends is up")["address"]
    finally:
        served.close()
