"""Timers: never early, never lost, and a jumping wall clock changes neither."""

from __future__ import annotations

import anyio

from amends_runtime.actors.timers import MIN_DEAD, PACE, Timer, Timers


class HandClock:
    """A wall clock that the test moves; the monotonic one is not asked."""

    def __init__(self) -> None:
        self.at_ms = 1_000_000

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic_s(self) -> float:
        raise AssertionError("timers keep wall-clock instants")


def test_what_is_due_is_woken_in_order_and_nothing_early() -> None:
    """A wake-up may come late under load, but a saga is never told of a time that has not come."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    for offset in (300, 100, 200):
        timers.set(f"s{offset}", clock.at_ms + offset)
    assert timers.fire() == 0
    clock.at_ms += 200
    assert timers.fire() == 2
    assert woken == ["s100", "s200"]
    assert len(timers) == 1


def test_a_jump_forward_is_paced() -> None:
    """A clock that jumps a year makes everything due; it is fired a batch at a time."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    for number in range(PACE * 2 + 1):
        timers.set(f"s{number}", clock.at_ms + 1 + number)
    clock.at_ms += 365 * 24 * 3600 * 1000
    assert [timers.fire() for _ in range(4)] == [PACE, PACE, 1, 0]
    assert len(woken) == PACE * 2 + 1


def test_a_jump_backward_loses_nothing() -> None:
    """What was planned before the jump is due when its instant comes, by the new time."""
    clock = HandClock()
    woken: list[str] = []
    timers = Timers(clock, lambda saga_id, _: woken.append(saga_id))
    timers.set("s", clock.at_ms + 100)
    clock.at_ms -= 5_000
    assert timers.fire() == 0
    clock.at_ms += 5_100
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
    clock.at_ms += day_ms
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
    clock.at_ms = due_at_ms + 7
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
