"""A wall clock that somebody sets: waits stay as long as they were, and nobody is undone for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import amends
from amends_runtime import engine as engine_module
from amends_runtime.clock import SystemClock
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.messages import Done, Unknown
from amends_runtime.core.records import SagaState
from amends_runtime.ports import Call, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop
from tests.actors.runtimes import (
    NOWHERE,
    ONE_STEP,
    QUICK,
    a_config,
    a_runtime,
    a_runtime_with,
)
from tests.actors.virtual import Shop, in_virtual_time, start
from tests.actors.virtual import a_runtime as a_virtual_runtime

HOUR_MS = 3_600_000


class SetClock(SystemClock):
    """The machine's clocks, the wall clock off by what a test says."""

    off_ms = 0

    def now_ms(self) -> int:
        """UTC milliseconds, or what this clock takes for it."""
        return super().now_ms() + SetClock.off_ms

    def now_us(self) -> int:
        """The same in microseconds."""
        return super().now_us() + SetClock.off_ms * 1000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SetClock]]:
    """The runtime's clock."""
    monkeypatch.setattr(engine_module, "SystemClock", SetClock)
    yield SetClock
    SetClock.off_ms = 0


async def test_an_attempt_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """Set forward by an hour in the middle of a call, the clock must not use up the retries."""
    began, go_on = asyncio.Event(), asyncio.Event()
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("do")
    async def do(call: amends.Call) -> None:
        if call.attempt == 1:
            began.set()
            await go_on.wait()
            raise RuntimeError

    @shop.compensate("do")
    async def undo(call: amends.Call) -> None:
        """Nothing to undo."""

    definition = amends.Definition("d").step("a", "shop", "do")
    async with a_runtime_with(shop, tmp_path) as (_engine, client):
        await client.register(definition)
        handle = await client.start("d")
        await began.wait()
        SetClock.off_ms = HOUR_MS
        go_on.set()
        saga = await handle.result(timeout_s=30)
        assert saga.state is amends.SagaState.COMPLETED


@pytest.mark.parametrize("off_ms", [-HOUR_MS, HOUR_MS])
async def test_a_backoff_comes_to_its_end(tmp_path: Path, off_ms: int) -> None:
    """A wait of some milliseconds stays one, whichever way the clock is set meanwhile."""
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("do")
    async def do(call: amends.Call) -> None:
        if call.attempt < 4:
            SetClock.off_ms = off_ms if call.attempt % 2 else 0
            raise RuntimeError

    @shop.compensate("do")
    async def undo(call: amends.Call) -> None:
        """Nothing to undo."""

    async with a_runtime_with(shop, tmp_path) as (_engine, client):
        await client.register(amends.Definition("d").step("a", "shop", "do", retry=QUICK))
        handle = await client.start("d")
        with anyio.fail_after(30):
            assert (await handle.result()).state is amends.SagaState.COMPLETED


async def test_an_open_breaker_probes_although_the_clock_was_set_back(tmp_path: Path) -> None:
    """Its second is a second: it goes half-open again and again while the clock is an hour off."""
    async with a_runtime(a_config(tmp_path, NOWHERE)) as (engine, client):
        await client.register(ONE_STEP)
        for number in range(6):
            await client.start("one", saga_id=f"s-{number}")
        lane = engine.lanes.of("shop")

        async def opened_anew(than: int) -> int:
            with anyio.fail_after(30):
                while True:
                    breaker = lane.status().breaker
                    if breaker.state is BreakerState.OPEN and breaker.generation > than:
                        return breaker.generation
                    await anyio.sleep(0.01)

        first = await opened_anew(-1)
        SetClock.off_ms = -HOUR_MS
        await opened_anew(first)


class FailsFirst(Shop):
    """A shop whose first answer is none."""

    async def call(self, call: Call) -> Reply:
        """No outcome at the first attempt, Done at any other."""
        if call.attempt == 1:
            return Reply(Unknown("UNAVAILABLE"), "UNAVAILABLE", healthy=None)
        return Reply(Done(), "OK", healthy=True)


@pytest.mark.parametrize("deadline_ms", [0, 4 * HOUR_MS])
def test_a_clock_set_back_while_the_runtime_is_down_holds_no_retry_up(deadline_ms: int) -> None:
    """A retry that was a moment away is at most a backoff away after it, not an hour."""
    disk = MemoryDisk()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        async with a_virtual_runtime(MemoryStore(disk), FailsFirst(), clock=clock) as engine:
            await start(engine, "s", deadline_ms=deadline_ms)
            await engine.supervisor.wait("s", 30, lambda saga: saga.steps[0].retry_at_ms > 0)
        clock.jump(-HOUR_MS)
        began_s = loop.time()
        async with a_virtual_runtime(MemoryStore(disk), FailsFirst(), clock=clock) as engine:
            view = await engine.supervisor.wait("s", 24 * 3600)
        assert view.saga.state is SagaState.COMPLETED
        assert loop.time() - began_s <= 30  # of virtual time: the longest backoff

    in_virtual_time(main)
