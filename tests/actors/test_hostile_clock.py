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
from tests.actors.runtimes import (
    NOWHERE,
    ONE_STEP,
    QUICK,
    a_config,
    a_runtime,
    a_runtime_with,
)

HOUR_MS = 3_600_000


class SetClock(SystemClock):
    """The machine's clocks, the wall clock off by what a test says."""

    off_ms = 0

    def now_ms(self) -> int:
        """UTC milliseconds, or what this clock takes for it."""
        return super().now_ms() + SetClock.off_ms


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SetClock]]:
    """The runtime's clock."""
    monkeypatch.setattr(engine_module, "SystemClock", SetClock)
    yield SetClock
    SetClock.off_ms = 0


async def test_an_attempt_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """Set forward by an hour in the middle of a call, the clock must not use up the retries."""
    began, go_on = asyncio.Event(), asyncio.Event()
    shop = amends.Participant("shop")

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
    shop = amends.Participant("shop")

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
