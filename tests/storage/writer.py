"""Commits sagas as fast as it can and says which commits were acknowledged, until it is killed.

Sagas come in groups. A group's sagas always make the same turn in the same commit, so that whoever
looks afterwards can tell a commit that is there by half.
"""

from __future__ import annotations

import sys

import anyio

from amends_runtime.storage import open_sqlite_store
from tests.storage.process import logs_to_stderr, say
from tests.storage.samples import NOW_MS, ORDER, Played

GROUP = 20


async def main(path: str, run: str) -> None:
    """Commits group after group; `run` keeps the names of one run from another's."""
    async with open_sqlite_store(path) as store:
        await store.put_definition(ORDER, NOW_MS)
        say("ready", store.identity.epoch)
        number = 0
        while True:
            number += 1
            group = f"run{run}-{number}"
            sagas = [Played(store.next_saga_no(), f"{group}.{n}") for n in range(GROUP)]
            await store.commit([played.transitions[0] for played in sagas])
            say(group, 1)
            while sagas[0].calls:
                turns = [played.done() for played in sagas]
                await store.commit(turns)
                say(group, turns[0].version)


if __name__ == "__main__":
    logs_to_stderr()
    anyio.run(main, sys.argv[1], sys.argv[2])
