"""Opens a database, says how that went, and does as it is told: `close`, `raise`, `hang`.

With a user id it becomes that user first, so that a test that runs as root meets permissions too.
"""

from __future__ import annotations

import asyncio
import os
import sys

import anyio.lowlevel

from amends_runtime.errors import StoreError
from amends_runtime.storage import open_sqlite_store
from tests.storage.process import logs_to_stderr, say


async def main(path: str, what: str, user: str) -> int:
    """The exit code: 0, or 3 for a database that was refused."""
    await anyio.lowlevel.checkpoint()  # everything is imported before the rights are gone
    if user:
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    try:
        async with open_sqlite_store(path) as store:
            say("open", store.identity.epoch)
            if what == "raise":
                raise RuntimeError("as told")
            if what == "hang":
                await asyncio.Event().wait()
    except StoreError as error:
        say(type(error).__name__, error)
        return 3
    return 0


if __name__ == "__main__":
    logs_to_stderr()
    sys.exit(anyio.run(main, sys.argv[1], sys.argv[2], "".join(sys.argv[3:])))
