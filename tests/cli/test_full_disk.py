"""A disk that is full, and a log that nobody takes: the runtime ends in order, or goes on.

The full disk is real to the process: it may write no file any further (RLIMIT_FSIZE).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import amends
from tests.cli.conftest import ORDER, PATIENCE_S, WAITING, Serve, environment
from tests.cli.conftest import amends as run

UNAVAILABLE = 5


@contextlib.contextmanager
def a_full_disk(pid: int) -> Iterator[None]:
    """No file of that process can grow, for the length of the block."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is what it should do
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "arguments",
    [
        ("participants", "add", "mail=127.0.0.1:1", "--reason", "new"),
        ("definitions", "register", "order.json"),
    ],
    ids=["a participant", "a definition"],
)
def test_a_change_that_cannot_be_written_ends_a_runtime_that_cannot_reopen(
    serve: Serve, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """It does not stay as a process that answers and can write nothing: whoever starts it may.

    The caller is told that nobody knows; the next start finds a whole database, and works.
    """
    order = tmp_path / "order.json"
    order.write_text(json.dumps(ORDER), encoding="utf-8")
    arguments = tuple(str(order) if one == order.name else one for one in arguments)
    served = serve("--participant", "payments=127.0.0.1:1")
    address = served.wait_for("amends is up")["address"]
    with a_full_disk(served.process.pid):
        asked = run(*arguments, "--target", address)
        assert asked.returncode == UNAVAILABLE
        assert served.wait_ended() == UNAVAILABLE
    said = [line for line in served.lines if not line.startswith("{")]
    assert len(said) == 1, said
    assert "could not be reopened after a failed commit" in said[0]
    again = serve("--participant", "payments=127.0.0.1:1")
    address = again.wait_for("amends is up")["address"]
    asked = run(*arguments, "--target", address)
    assert asked.returncode == 0, asked.stderr


# -- a log that nobody takes -----------------------------------------------------------------------


def wait_for(path: Path) -> str:
    """The address of a runtime, from its ready file; its log is not to be read."""
    until = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.01)
    found: str = json.loads(path.read_text(encoding="utf-8"))["address"]
    return found


def test_a_log_line_that_cannot_be_written_harms_nobody(tmp_path: Path, payments: str) -> None:
    """Standard error lies on a full disk: sagas complete all the same, and the end is in order."""
    with (
        Path("/dev/full").open("wb") as full,
        a_runtime(tmp_path, payments, full.fileno()) as (
            process,
            address,
        ),
    ):
        works(address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_S) == 0


def test_a_log_whose_reader_has_left_harms_nobody(tmp_path: Path, payments: str) -> None:
    """As in `amends serve 2>&1 | head`: what is logged afterwards is lost, and nothing else."""
    (tmp_path / "order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    reader, writer = os.pipe()
    try:
        with a_runtime(tmp_path, payments, writer) as (process, address):
            os.close(writer)
            os.close(reader)
            works(address)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE_S) == 0
    finally:
        for end in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(end)


def works(address: str) -> None:
    """A change that is logged is made, and an order completes after it."""

    async def use() -> None:
        async with amends.Client(address, timeout_s=PATIENCE_S) as client:
            await client.put_participant("mail", "127.0.0.1:1", author="ada", reason="new")
            await client.start("waiting")
            order = await client.start("order", {"amount": 1})
            assert (await order.result(timeout_s=PATIENCE_S)).completed

    asyncio.run(use())


@contextlib.contextmanager
def a_runtime(
    folder: Path, payments: str, log: int
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`amends serve` whose standard error is this file descriptor; killed at the end."""
    for definition in (ORDER, WAITING):
        path = folder / f"{definition['name']}.json"
        path.write_text(json.dumps(definition), encoding="utf-8")
    arguments = ["--listen", "127.0.0.1:0", "--ready-file", "ready.json", "--definition", "*.json"]
    arguments += ["--participant", f"payments={payments}", "--participant", "absent=127.0.0.1:1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "amends_runtime", "serve", "--until-stdin-closes", *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=log,
    )
    with process:
        try:
            yield process, wait_for(folder / "ready.json")
        finally:
            process.kill()
