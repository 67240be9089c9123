"""Timers: never early, never lost, and a jumping wall clock changes neither."""

from __future__ import annotations

import asyncio

import anyio

from amends_runtime.actors.timers import MIN_DEAD, PACE, SHARE, Timer, Timers
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop
from tests.actors.virtual import in_virtual_time


class HandClock:
    """Clocks that the test moves."""

    def __init__(self) -> None:
        self.at_ms = 1_000_000
        self._elapsed_ms = 5_000

    def pass_ms(self, milliseconds: int) -> None:
        """Time goes by, on both clocks."""
        self.at_ms += milliseconds
        self._elapsed_ms += milliseconds

    def jump_ms(self, milliseconds: int) -> None:
        """The wall clock is set; no time goes by."""
        self.at_ms += milliseconds

    def now_ms(self) -> int:
        """The wall clock."""
        return self.at_ms

    def now_us(self) -> int:
        """The same, as whole milliseconds."""
        return self.at_ms * 1000

    def monotonic_s(self) -> float:
        """The time that went by."""
        return self._elapsed_ms / 1000


def test_what_is_due_is_woken_in_order_and_nothing_early() -> None:
    """A wake-up may come late under load, but a saga is never told of a time that has not come."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    for offset in (300, 100, 200):
        timers.set(f"s{offset}", clock.at_ms + offset)
    assert timers.fire() == 0
    clock.pass_ms(200)
    assert timers.fire() == 2
    assert woken == ["s100", "s200"]
    assert len(timers) == 1


def test_what_falls_due_at_once_is_paced() -> None:
    """After a long sleep of the machine everything is due; it is fired a batch at a time."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    for number in range(PACE * 2 + 1):
        timers.set(f"s{number}", clock.at_ms + 1 + number)
    clock.pass_ms(24 * 3600 * 1000)
    assert [timers.fire() for _ in range(4)] == [PACE, PACE, 1, 0]
    assert len(woken) == PACE * 2 + 1


def test_turns_that_do_not_keep_up_slow_timers_down_and_do_not_stop_them() -> None:
    """A backlog that never ends: all wake, a share for about each commit."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        woken: list[float] = []
        timers = Timers(VirtualClock(loop), lambda *_: woken.append(loop.time()), lambda: PACE + 1)
        for number in range(SHARE * 3):
            timers.set(f"s{number}", 0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(timers.run)
            await anyio.sleep(60)
            tasks.cancel_scope.cancel()
        at_once = [woken.count(instant) for instant in sorted(set(woken))]
        assert at_once == [SHARE, SHARE, SHARE]

    in_virtual_time(main)


def test_a_wall_clock_that_is_set_forward_wakes_nobody_early() -> None:
    """An hour of somebody's correction is no hour of waiting."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    timers.set("s", clock.at_ms + 1_000)
    clock.jump_ms(3_600_000)
    assert timers.fire() == 0
    clock.pass_ms(1_000)
    assert timers.fire() == 1


def test_a_wall_clock_that_is_set_back_holds_nobody_up() -> None:
    """A wait of a second stays a second, and does not become an hour."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    timers.set("s", clock.at_ms + 1_000)
    clock.jump_ms(-3_600_000)
    clock.pass_ms(1_000)
    assert timers.fire() == 1
    assert woken == ["s"]


def test_forgotten_timers_wake_nobody_and_do_not_pile_up() -> None:
    """Sagas that ended long before their deadline must not stay in memory until it."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    day_ms = 24 * 3600 * 1000
    for number in range(MIN_DEAD * 3):
        of_saga: list[Timer] = [timers.set(f"s{number}", clock.at_ms + day_ms)]
        timers.forget(of_saga)
    timers.set("kept", clock.at_ms + day_ms)
    assert len(timers) == 1
    assert timers.held <= MIN_DEAD + 2
    clock.pass_ms(day_ms)
    while timers.fire():
        pass
    assert woken == ["kept"]


def test_who_is_woken_is_told_the_instant_that_was_waited_for() -> None:
    """The clock may have stepped back by the time that the message is decided."""
    clock = HandClock()
    told: list[tuple[str, int]] = []
    timers = Timers(clock, lambda saga_id, at_ms: told.append((saga_id, at_ms)))
    due_at_ms = clock.at_ms + 100
    timers.set("s", due_at_ms)
    clock.pass_ms(107)
    timers.fire()
    assert told == [("s", due_at_ms)]


async def test_a_nearer_timer_shortens_the_wait_that_is_under_way() -> None:
    """The task that waits for the farther one hears of the nearer one."""
    clock = HandClock()
    woken = anyio.Event()
    timers = Timers(clock, lambda *_: woken.set())
    timers.set("far", clock.at_ms + 3_600_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timers.run)
        await anyio.wait_all_tasks_blocked()
        timers.set("now", clock.at_ms)
        with anyio.fail_after(20):
            await woken.wait()
        tasks.cancel_scope.cancel()
