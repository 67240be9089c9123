"""Commits until the file may not grow any further, and says what the store made of it.

A limit on file sizes is a real write error from the kernel, wherever the tests run. With `lifted`
the limit goes away before the store is reopened, with `kept` it stays.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Awaitable, Callable

import anyio

from amends_runtime.errors import CommitUnknown, StoreError
from amends_runtime.ports import SagaFilter
from amends_runtime.storage import open_sqlite_store
from tests.storage.process import logs_to_stderr, say
from tests.storage.samples import NOW_MS, ORDER, Played

GROUP = 20


def limit_file_size(limit: int) -> None:
    """From now on no file of this process grows beyond this."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


async def main(path: str, mode: str) -> None:
    """Commits until it fails, asks for this and that, reopens."""
    said: dict[str, object] = {"acknowledged": []}
    async with open_sqlite_store(path) as store:
        await store.put_definition(ORDER, NOW_MS)
        limit_file_size(store.wal_bytes + 300_000)
        acknowledged: list[str] = []
        while True:
            saga_nos = [store.next_saga_no() for _ in range(GROUP)]
            sagas = [Played(saga_no) for saga_no in saga_nos]
            try:
                await store.commit([played.transitions[0] for played in sagas])
            except CommitUnknown as error:
                said["failed"] = str(error)
                said["unknown"] = [played.saga_id for played in sagas]
                break
            acknowledged += [played.saga_id for played in sagas]
        said["acknowledged"] = acknowledged
        said["refusals"] = [
            await refusal(store.load, ["a"]),
            await refusal(store.list_sagas, SagaFilter(), 1),
            await refusal(store.commit, []),
        ]
        limit_file_size(resource.RLIM_INFINITY if mode == "lifted" else 4096)
        said["reopening"] = await refusal(store.reopen)
        if mode == "lifted":
            await store.commit([Played(store.next_saga_no(), "after").transitions[0]])
    say(json.dumps(said))


async def refusal(call: Callable[..., Awaitable[object]], *arguments: object) -> str:
    """What a call is refused with; empty if it is not."""
    try:
        await call(*arguments)
    except StoreError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails instead of killing us
    logs_to_stderr()
    anyio.run(main, sys.argv[1], sys.argv[2])
