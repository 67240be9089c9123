"""Sagas that wait for a place among the live ones, and the timers of those that have one."""

from __future__ import annotations

import pytest

from amends_runtime.actors.supervisor import Limits
from amends_runtime.clock import SystemClock
from amends_runtime.engine import Engine
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.observers import Observers


@pytest.mark.parametrize(("live_sagas", "waited_for"), [(10, 3), (0, 0)])
async def test_timers_wait_for_arrivals_only_while_these_have_room(
    live_sagas: int, waited_for: int
) -> None:
    """Else a live saga whose timer is due could never leave its place to one that waits for it."""
    engine = Engine(
        MemoryStore(MemoryDisk()),
        clock=SystemClock(),
        observer=Observers([]),
        connect=lambda *_: None,
        limits=Limits(live_sagas=live_sagas),
    )
    supervisor = engine.supervisor
    for number in range(3):
        supervisor._arrivals.of(f"s{number}", at_leisure=True)
    assert supervisor._timers._backlog() == waited_for
