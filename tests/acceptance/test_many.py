"""A thousand sagas from one client at once, written as anybody would write it.

With real processes; also when the runtime is killed in the middle. ``AMENDS_MANY=10000`` sets how
many; by default so many as `make test` has time for.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sized
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

import amends
from amends.connection import Connection
from shop.processes import Process, Processes
from shop.switches import write_switches
from tests.acceptance.world import ORDER, PATIENCE_S, until

MANY: Final = int(os.environ.get("AMENDS_MANY", "1000"))

PLACE: Final = amends.Definition("place").step("place", "orders", "place")
"""One step, whose effect is a line in the ledger of a real participant."""

MAX_GROWTH_BYTES: Final = 300 * 1024 * 1024
"""Of the client, for all that it holds at once: some ten times what 10,000 sagas take."""


@dataclass
class Calls:
    """What the client asked of the runtime: calls by method, and streams."""

    count: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return self.count.total()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Count what leaves the client from here on."""
    calls = Calls()
    attempt, stream = Connection.attempt, Connection.stream

    async def counted_attempt(self: Connection, method: Any, *args: Any) -> Any:
        calls.count[method._method.decode()] += 1
        return await attempt(self, method, *args)

    def counted_stream(self: Connection, method: Any) -> Any:
        calls.count[method._method.decode()] += 1
        return stream(self, method)

    monkeypatch.setattr(Connection, "attempt", counted_attempt)
    monkeypatch.setattr(Connection, "stream", counted_stream)
    return calls


@dataclass
class Shop:
    """A runtime and the one service that its sagas need."""

    processes: Processes
    runtime: Process

    def effects(self) -> Counter[tuple[str, str]]:
        """Count the lines of the service's ledger by saga and effect."""
        uri = f"{self.processes.database('orders').as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return Counter(connection.execute("SELECT saga_id, effect FROM effects").fetchall())


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    """Start both."""
    async with Processes(tmp_path) as processes:
        write_switches(processes.switches, {})
        [orders] = await processes.start_services(["orders"])
        yield Shop(processes, await processes.start_runtime({"orders": orders.address}))


async def start_and_wait(
    client: amends.Client, started: list[amends.SagaHandle], ended: list[amends.Saga]
) -> str:
    """Do what a user's task does; give the saga's id."""
    saga = await client.start("place", ORDER)
    started.append(saga)
    ended.append(await saga.result())
    return saga.saga_id


def has(items: Sized, count: int) -> bool:
    """Whether there are so many."""
    return len(items) >= count


async def test_many_sagas_from_one_client(
    shop: Shop, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error, every end, each effect once, a few calls, and memory that comes to rest."""
    ended: list[amends.Saga] = []
    async with amends.Client(shop.runtime.address, timeout_s=PATIENCE_S) as client:
        await client.register(PLACE)
        before = calls.total
        async with memory_watched() as memory:
            began = time.monotonic()
            ids = await asyncio.gather(*(start_and_wait(client, [], ended) for _ in range(MANY)))
            took_s = time.monotonic() - began
        asked = calls.total - before
        info = await client.runtime()

    assert {saga.state for saga in ended} == {amends.SagaState.COMPLETED}
    assert sorted(saga.saga_id for saga in ended) == sorted(ids)
    assert len(set(ids)) == MANY
    assert shop.effects() == Counter({(saga_id, "place"): 1 for saga_id in ids})
    assert info.sagas == {"COMPLETED": MANY}
    assert memory.growth < MAX_GROWTH_BYTES
    # Two for each thousand starts, even if they did not come together; and a stream.
    assert asked <= 10 + MANY // 100
    tell(
        capsys,
        f"{MANY} sagas in {took_s:.1f} s by {asked} calls; the client grew by "
        f"{memory.growth / 1e6:.0f} MB",
    )


async def test_many_sagas_outlive_a_killed_runtime(
    shop: Shop, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle, restarted at the same address: the same code carries on by itself.

    No task sees an error, no saga is started twice, every effect is there once, and all end.
    """
    started: list[amends.SagaHandle] = []
    ended: list[amends.Saga] = []
    async with amends.Client(shop.runtime.address, timeout_s=PATIENCE_S) as client:
        await client.register(PLACE)
        async with asyncio.TaskGroup() as tasks:
            many = [tasks.create_task(start_and_wait(client, started, ended)) for _ in range(MANY)]
            # While most starts are on their way, soon after, and late.
            for moments, count in ((started, 1), (ended, MANY // 10), (ended, MANY // 2)):
                await until(partial(has, moments, count), f"{count} starts or ends")
                shop.runtime.kill()
                await shop.runtime.start()
        ids = [task.result() for task in many]
        info = await client.runtime()
        listed = [saga.saga_id async for saga in client.list()]

    assert {saga.state for saga in ended} == {amends.SagaState.COMPLETED}
    assert len(set(ids)) == MANY
    assert sorted(listed) == sorted(ids)
    assert shop.effects() == Counter({(saga_id, "place"): 1 for saga_id in ids})
    assert (info.sagas, info.epoch) == ({"COMPLETED": MANY}, 4)
    tell(capsys, f"{MANY} sagas through three kills by {calls.total} calls")


@dataclass
class Memory:
    """How much larger than before this process has been."""

    growth: int = 0
    """In bytes."""


@asynccontextmanager
async def memory_watched() -> AsyncIterator[Memory]:
    """Look at this process's memory all the time, for the length of the block."""
    memory, before = Memory(), resident()

    async def look() -> None:
        while True:
            memory.growth = max(memory.growth, resident() - before)
            await anyio.sleep(0.02)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        yield memory
        tasks.cancel_scope.cancel()


def resident() -> int:
    """Give how many bytes of this process are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tell(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Say what was run, also where nobody asked for output."""
    with capsys.disabled():
        sys.stdout.write(f"\n  {line}\n")
