"""The simulation's event loop: processes that stand still while time passes for others."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from amends_runtime.testing.virtual_time import Stalled
from tests.simulation.loop import OWNER, SimulatedLoop


def test_a_held_process_goes_on_later_in_the_order_of_its_own_events() -> None:
    """Its timers become due meanwhile, and fire when it goes on; others' are not held up."""
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps_s: float) -> None:
        for nap_s in naps_s:
            await asyncio.sleep(nap_s)
            seen.append((name, loop.time()))

    async def main() -> None:
        owned = contextvars.copy_context()
        owned.run(OWNER.set, "machine")
        tasks = [
            loop.create_task(sleeper("held", 1.0, 0.5), context=owned),
            loop.create_task(sleeper("free", 2.0, 2.0)),
        ]
        await asyncio.sleep(0.5)
        loop.hold("machine")
        await asyncio.sleep(2.5)
        assert seen == [("free", 2.0)]
        loop.release("machine")
        await asyncio.gather(*tasks)

    loop = SimulatedLoop()
    loop.run_until_complete(main())
    loop.close()
    assert seen == [("free", 2.0), ("held", 3.0), ("held", 3.5), ("free", 4.0)]


def test_a_deadlock_is_said_instead_of_waited_for() -> None:
    """As the virtual loop does."""

    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    loop = SimulatedLoop()
    task = loop.create_task(main())
    with pytest.raises(Stalled, match="nothing is left"):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
