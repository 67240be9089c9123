"""The world of a test: virtual time, a disk, participants, and a runtime that can be killed.

How to think about it. Two things live outside the runtime and outlive it: the disk, and the
participants. The runtime is an `Incarnation`; `restart` kills one, which from that instant reaches
neither disk nor participant, and boots the next on the same disk.

Nothing happens by itself. The loop runs only while the test drives it, in one of two ways:

- `ask` puts a question to the runtime, as a client does, and runs until it is answered. Records may
  become durable meanwhile; calls wait before the participants (the gate is shut), so that "started"
  means started, and nothing more. Answers wait on their way back, too: what is asked is decided
  before anything that has not reached the runtime yet, whatever was done at the same instant.
- `drive` opens the gate and runs until a condition holds or so much time has passed.

*Moments* are where something becomes true: before and after each commit, before and after each
call. The condition of `drive` is looked at there and nowhere else, and what is at a moment then
stays there. They are numbered, so that a course can be repeated with a crash at any of them.

The crash at a moment before a call is that of a runtime whose request never left; after a call, of
one that never got the reply.
"""

from __future__ import annotations

import asyncio
import enum
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import anyio
import grpc
from anyio.abc import TaskGroup

import amends
from amends_runtime import wire
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.definition import Kind, Plan
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Phase, Saga
from amends_runtime.dispatch.lanes import LaneStatus
from amends_runtime.dispatch.status import reply_of
from amends_runtime.ports import Call, Reply
from amends_runtime.storage.memory import MemoryDisk
from amends_runtime.testing.errors import SagaTestError
from amends_runtime.testing.incarnation import Incarnation
from amends_runtime.testing.readings import Readings
from amends_runtime.testing.service import Outside, Service
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop

__all__ = ["Halt", "World"]

T = TypeVar("T")

MAX_CALLS: Final = 10_000
"""Calls of one drive for each saga: a day of retries with the default backoff has 6,000. More is a
loop."""

QUIET_CHECK_S: Final = 600.0
"""How often a drive looks whether anything is left to happen: idle time costs time, too."""

HAIR_S: Final = 1e-6
"""By so much a drive runs past its time, so that all that is due at that instant happens."""


class Halt(enum.Enum):
    """Why the loop came to a stop."""

    REACHED = enum.auto()
    TIME = enum.auto()
    CALLS = enum.auto()
    QUIET = enum.auto()  # nothing is left that could happen
    EVENT = enum.auto()  # a question is answered, a runtime is up, has died or was killed


class World:
    """One test's. `crash_at` are the numbers of the moments at which the runtime is killed."""

    def __init__(
        self, plans: Sequence[Plan], *, breaker: BreakerPolicy, crash_at: frozenset[int]
    ) -> None:
        self.disk = MemoryDisk()
        self.disk.store_id = "test-store"  # or keys and traces would differ with each run
        self.readings = Readings(self.disk, {plan.content_hash: plan for plan in plans})
        self.moments = 0
        self.crashes: list[str] = []
        self._plans = plans
        self._breaker = breaker
        self._crash_at = crash_at
        self._loop = VirtualLoop()
        self._loop.set_exception_handler(self._failed_in_callback)
        self.clock = VirtualClock(self._loop)
        self.outside = Outside(
            now_s=self._loop.time,
            spawn=self._spawn,
            fail=self.fail,
            has_effect=_effects_of(plans),
        )
        self.services = _services(plans, self.outside)
        self._halted: asyncio.Future[Halt] | None = None
        self._condition: Callable[[], bool] | None = None
        self._is_looking = False
        self._gate = asyncio.Event()
        self._delivering = anyio.Lock()
        self._going_on = asyncio.Event()
        self._calls_left = 0
        self._working = 0
        self._failure: BaseException | None = None
        self._tasks: TaskGroup | None = None
        self._participants = self._loop.create_task(self._live_outside())
        self._incarnation = Incarnation(self)
        try:
            self._boot()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends everything. Nothing that was under way is waited for.

        Raises what has failed since the last drive.
        """
        try:
            self._kill()
            self._participants.cancel()
            self._settle(self._participants)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            assert not asyncio.all_tasks(self._loop), "every task has a parent that has ended"
        finally:
            self._loop.close()
        if self._failure is not None:
            raise self._failure

    @property
    def time_s(self) -> float:
        """Virtual seconds since the world began."""
        return self._loop.time()

    def lane(self, participant: str) -> LaneStatus:
        """The runtime's lane to a participant."""
        (lane,) = [one for one in self._incarnation.lanes() if one.name == participant]
        return lane

    # -- driving -------------------------------------------------------------------------------

    def ask(self, question: Callable[[Supervisor], Coroutine[Any, Any, T]]) -> T:
        """Puts a question to the runtime, and again when it was killed meanwhile: a client would.

        Raises what the runtime refuses with.
        """
        while True:
            self._look_after()
            task = self._loop.create_task(question(self._incarnation.supervisor()))
            task.add_done_callback(self._event)
            try:
                self._run()
                if task.done():
                    return task.result()
            finally:
                task.cancel()
                self._settle(task)

    def pass_time(self, seconds: float) -> Halt:
        """Lets the world go on for so many seconds, whether or not anything happens in them."""
        self._calls_left = MAX_CALLS * max(1, len(self.disk.saga_nos))
        return self._go_on(lambda: False, self._loop.time() + seconds)

    def drive(self, until: Callable[[], bool], seconds: float) -> Halt:
        """Lets the world go on until the condition holds, at most for so many seconds."""
        self._calls_left = MAX_CALLS * max(1, len(self.disk.saga_nos))
        over_at_s = self._loop.time() + seconds
        while True:
            part_s = min(over_at_s, self._loop.time() + QUIET_CHECK_S)
            halt = self._go_on(until, part_s)
            if halt is not Halt.TIME or self._loop.time() >= over_at_s:
                return halt
            if self._is_quiet():
                return Halt.QUIET

    def _go_on(self, until: Callable[[], bool], over_at_s: float) -> Halt:
        halt = Halt.EVENT
        while True:
            self._look_after()
            if halt is Halt.REACHED or self._look(until):
                return Halt.REACHED
            if self._calls_left <= 0:
                return Halt.CALLS
            if self._loop.time() >= over_at_s:
                return Halt.TIME
            timer = self._loop.call_at(over_at_s + HAIR_S, self._halt, Halt.TIME)
            self._condition = until
            self._gate.set()
            try:
                halt = self._run()
            finally:
                self._condition = None
                self._gate.clear()
                timer.cancel()

    def _is_quiet(self) -> bool:
        sagas = map(self.readings.saga, self.readings.saga_ids())
        return not self._working and all(_is_at_rest(saga) for saga in sagas)

    def restart(self, down_s: float = 0.0) -> None:
        """Kills the runtime where it stands, and boots the next one after so many seconds."""
        self._check_not_driven()
        self._kill()
        if down_s:
            self.pass_time(down_s)
        self._boot()

    def fail(self, error: BaseException) -> None:
        """Ends the drive under way with an error of the test's own."""
        if self._failure is None:
            self._failure = error
        self._halt(Halt.EVENT)

    # -- moments -------------------------------------------------------------------------------

    async def moment(self, incarnation: Incarnation, what: Callable[[], str]) -> None:
        """Something is about to become true, or has. `what` describes it, should it matter."""
        if incarnation.is_dead:
            await anyio.sleep_forever()
        self.moments += 1
        if self.moments in self._crash_at:
            self.crashes.append(f"moment {self.moments}, {what()}")
            incarnation.is_dead = True
            self._halt(Halt.EVENT)
            await anyio.sleep_forever()
        if self._condition is not None and self._holds(self._condition):
            self._going_on.clear()
            self._gate.clear()
            self._halt(Halt.REACHED)
        await self._going_on.wait()
        if incarnation.is_dead:
            await anyio.sleep_forever()

    async def call(self, incarnation: Incarnation, call: Call) -> Reply:
        """Carries one attempt to its participant and the reply back."""
        name = f"{call.verb.name.lower()} {call.step_name} (attempt {call.attempt})"
        await self.moment(incarnation, lambda: f"before {name} reaches {call.participant}")
        await self._gate.wait()
        self._calls_left -= 1
        if self._calls_left <= 0:
            self._halt(Halt.CALLS)
        deadline_at_ms = self.clock.now_ms() + call.timeout_ms
        message = wire.call_to_proto(call, incarnation.identity, deadline_at_ms)
        reply = reply_of(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        with anyio.move_on_after(call.timeout_ms / 1000):
            reply = await self.services[call.participant].receive(message)
        await self.moment(incarnation, lambda: f"after {call.participant} has answered {name}")
        await self._turn_of_reply(incarnation.supervisor())
        return reply

    async def _turn_of_reply(self, supervisor: Supervisor) -> None:
        """Until the next reply may reach the runtime: one at a time, when the last one is durable.

        In the runtime's mailboxes replies of one instant would come before what the test asks next.
        """
        async with self._delivering:
            while True:
                await self._gate.wait()
                await supervisor.wait_idle()
                if self._gate.is_set():  # or the drive has come to its end meanwhile
                    return

    def _holds(self, condition: Callable[[], bool]) -> bool:
        try:
            return self._look(condition)
        except Exception as error:  # noqa: BLE001  # the test's own condition; the test gets it
            self.fail(error)
            return False

    def _look(self, condition: Callable[[], bool]) -> bool:
        self._is_looking = True
        try:
            return condition()
        finally:
            self._is_looking = False

    # -- the loop ------------------------------------------------------------------------------

    def _run(self) -> Halt:
        """Runs the loop until somebody halts it."""
        self._going_on.set()
        self._halted = self._loop.create_future()
        try:
            return self._loop.run_until_complete(self._halted)
        finally:
            self._halted = None

    def _halt(self, why: Halt) -> None:
        if self._halted is not None and not self._halted.done():
            self._halted.set_result(why)

    def _event(self, _: object = None) -> None:
        self._halt(Halt.EVENT)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        """Runs until a task that was cancelled has ended."""
        if not task.done():
            self._loop.run_until_complete(asyncio.wait([task]))

    def _look_after(self) -> None:
        """Before and after each run: what failed is raised, who was killed is replaced."""
        self._check_not_driven()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._incarnation.is_dead:
            self.restart()
        self._incarnation.raise_failure()

    def _check_not_driven(self) -> None:
        if self._loop.is_closed():
            raise SagaTestError("the block of this test has ended: nothing can be asked any more")
        if self._halted is not None or self._is_looking:
            raise SagaTestError(
                "a condition or a handler can look at the test, and not drive it: let it return,"
                " and go on in the test's own lines"
            )

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        assert self._tasks is not None, "it lives as long as the world"
        self._tasks.start_soon(self._guarded, work)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        self._working += 1
        try:
            await work()
        except Exception as error:  # noqa: BLE001  # a bug of the kit or an error of the test's
            self.fail(error)
        finally:
            self._working -= 1

    async def _live_outside(self) -> None:
        async with anyio.create_task_group() as self._tasks:
            await anyio.sleep_forever()

    def _failed_in_callback(self, _: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.fail(error if error is not None else RuntimeError(context["message"]))

    # -- the runtime's life --------------------------------------------------------------------

    def _boot(self) -> None:
        while not self._incarnation.is_up:
            self._incarnation = Incarnation(self)
            self._incarnation.begin(self._loop, self._plans, self._breaker, self._event)
            self._run()
            if not self._incarnation.is_dead:
                self._incarnation.raise_failure()

    def _kill(self) -> None:
        self._incarnation.is_dead = True
        task = self._incarnation.task
        if task is not None:
            task.cancel()
            self._settle(task)
        self._incarnation = Incarnation(self)  # none, until the next is booted


def _is_at_rest(saga: Saga) -> bool:
    """Whether nothing but a person would move it."""
    deadline = saga.deadline_at_ms and saga.phase is Phase.FORWARD and not saga.past_no_return
    if saga.round:
        return saga.ended  # a two-phase commit that is stuck goes on trying
    return saga.ended or (saga.state is SagaState.STUCK and not deadline)


def _services(plans: Sequence[Plan], outside: Outside) -> dict[str, Service]:
    """The participants that the definitions name, with the actions that they are asked for."""
    actions: dict[str, dict[tuple[str, amends.Verb], None]] = defaultdict(dict)
    for step in (step for plan in plans for step in plan.steps):
        actions[step.participant][step.action, amends.Verb.EXECUTE] = None
        if step.kind is Kind.COMPENSATABLE:
            actions[step.participant][step.action, amends.Verb.COMPENSATE] = None
    for plan in plans:
        for step in plan.steps if plan.two_phase else ():
            actions[step.participant][step.action, amends.Verb.PREPARE] = None
    return {name: Service(name, asked, outside) for name, asked in actions.items()}


def _effects_of(plans: Sequence[Plan]) -> Callable[[str, str], bool]:
    """Tells whether a step of a definition has an effect at all."""
    without = {
        (plan.definition.name, step.name)
        for plan in plans
        for step in plan.steps
        if step.kind is Kind.READ_ONLY
    }
    return lambda definition, step: (definition, step) not in without
