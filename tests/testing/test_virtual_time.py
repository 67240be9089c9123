"""The event loop and the clock of tests and simulations."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from amends_runtime.testing.virtual_time import START_MS, Stalled, VirtualClock, VirtualLoop


def test_a_day_passes_as_soon_as_nothing_else_is_to_do() -> None:
    """Sleeping costs no time, and everything happens in the order of its instant."""
    seen: list[str] = []

    async def sleeper(name: str, hours: float) -> None:
        await anyio.sleep(hours * 3600)
        seen.append(name)

    async def main() -> float:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sleeper, "late", 24)
            tasks.start_soon(sleeper, "early", 1)
            tasks.start_soon(sleeper, "first", 0)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == pytest.approx(24 * 3600)
    assert seen == ["first", "early", "late"]


def test_a_bound_on_a_wait_strikes_at_its_instant() -> None:
    """Cancel scopes with a deadline work as in real time."""

    async def main() -> tuple[bool, float]:
        with anyio.move_on_after(30) as scope:
            await anyio.Event().wait()
        return scope.cancelled_caught, asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        struck, at_s = runner.run(main())
    assert struck
    assert at_s == pytest.approx(30)


def test_a_deadlock_is_said_instead_of_waited_for() -> None:
    """When nothing can happen any more, the loop says so."""

    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    loop = VirtualLoop()
    with pytest.raises(Stalled, match="nothing is left"):
        loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


def test_the_wall_clock_can_be_set_and_the_monotonic_one_goes_on() -> None:
    """A jump changes what the wall clock says, and no wait."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        await anyio.sleep(1.5)
        assert clock.now_ms() == START_MS + 1_500
        clock.jump(-3_600_000)
        assert clock.now_ms() == START_MS + 1_500 - 3_600_000
        assert clock.monotonic_s() == pytest.approx(1.5)
        await anyio.sleep(1)
        assert clock.monotonic_s() == pytest.approx(2.5)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
