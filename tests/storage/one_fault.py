"""Commits while one system call fails with EIO, reopens, goes on, says what the store made of it.

strace is attached to this process between two commits, so that the fault meets a commit and not the
opening.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys

import anyio

from amends_runtime.errors import CommitUnknown
from amends_runtime.storage import open_sqlite_store
from tests.storage.process import logs_to_stderr, say
from tests.storage.samples import Played, start

GROUP = 200  # several pages of the log
PR_SET_PTRACER = 0x59616D61


async def main(path: str, call: str, nth: str) -> None:
    """Commits until the fault strikes, reopens, commits once more."""
    said: dict[str, object] = {"fired": False, "after": [], "unknown": []}
    async with open_sqlite_store(path) as store:
        acknowledged = [played.saga_id for played in await start(store, GROUP)]
        tracer = attach(call, nth)
        try:
            # With a failing call behind it every batch is in doubt or acknowledged; never both.
            for _ in range(5):
                batch = [Played(store.next_saga_no()) for _ in range(GROUP)]
                saga_ids = [played.saga_id for played in batch]
                try:
                    await store.commit([played.transitions[0] for played in batch])
                except CommitUnknown:
                    said["fired"] = True
                    said["unknown"] = saga_ids
                    break
                acknowledged += saga_ids
        finally:
            tracer.send_signal(signal.SIGINT)  # detaches
            tracer.wait()
        said["acknowledged"] = acknowledged
        if said["fired"]:
            await store.reopen()
            await store.commit([Played(store.next_saga_no(), "after").transitions[0]])
            said["after"] = ["after"]
    say(json.dumps(said))


def attach(call: str, nth: str) -> subprocess.Popen[str]:
    """From now on the nth such call of each of our threads fails."""
    # Where only parents may trace (Yama's default), a process may still let anybody trace it.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, -1, 0, 0, 0)
    strace = shutil.which("strace")
    assert strace is not None
    tracer = subprocess.Popen(
        [
            strace,
            "--follow-forks",
            f"--trace={call}",
            f"--inject={call}:error=EIO:when={nth}",
            "--output=/dev/null",
            f"--attach={os.getpid()}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert "attached" in said, said
    return tracer


if __name__ == "__main__":
    logs_to_stderr()
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
