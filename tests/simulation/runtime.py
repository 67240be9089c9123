"""A runtime process: the real engine over a simulated store, network and clock, and its death.

How to think about death. `die` is kill -9 at that very instant, also in the middle of the process's
own code: from then on whatever it does reaches nothing. Its store and its transports answer nobody,
no request of a client's is answered, no task of its begins. Then its tasks are cancelled, which is
only the sweeping up: what they still do on their way out they do to nobody.

A pause is the same for everybody outside, but it ends: the loop holds all that the process has
scheduled, and lets it go on later as if no time had passed for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from anyio.abc import TaskGroup

from amends_runtime.actors import arrivals, horizon, recovery, timers, turns
from amends_runtime.core.breaker import BreakerState
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import Record
from amends_runtime.core.saga import Saga
from amends_runtime.dispatch import exchange
from amends_runtime.engine import Engine
from amends_runtime.errors import AmendsError, OwnershipLost, Unavailable
from amends_runtime.ports import Clock, ParticipantAddress
from amends_runtime.storage.memory import MemoryStore
from amends_runtime.testing.virtual_time import VirtualClock
from tests.simulation.faults import Fault
from tests.simulation.loop import OWNER
from tests.simulation.network import Way, way_to
from tests.simulation.store import Store

if TYPE_CHECKING:
    from amends_runtime.actors.supervisor import Supervisor
    from tests.simulation.schedule import Schedule
    from tests.simulation.world import World

__all__ = ["Deployment", "Process", "constants_of"]

T = TypeVar("T")

CONCURRENCY = 4  # a lane that is sometimes full
BOOT_S = (0.005, 0.4)  # a process starts
MACHINES = 2


class _Tasks:
    """The tasks of a process: what the engine needs of a task group, in a fixed order.

    A cancelled task group of anyio goes through a set, in the order of addresses.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.running: dict[asyncio.Task[Any], None] = {}

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, Any]],
        *arguments: Any,
        name: object = None,
    ) -> None:
        """Start a task in the process, if it lives."""
        if not self._process.is_dead:
            _ = self.start(function(*arguments))

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task in the process."""
        loop, context = asyncio.get_running_loop(), self._process.context.copy()
        task = loop.create_task(coroutine, context=context)
        self.running[task] = None
        task.add_done_callback(self._ended, context=self._process.world.context)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.running.pop(task, None)
        if task.cancelled() or task.exception() is None or self._process.is_dead:
            return
        error = task.exception()
        if not isinstance(error, AmendsError):
            self._process.world.violation(
                "no task of the runtime's dies", f"{type(error).__name__}: {error}"
            )


class Process:
    """One incarnation of the runtime."""

    def __init__(self, world: World, number: int, clock: VirtualClock) -> None:
        self.world = world
        self.number = number
        self.clock: Clock = clock
        self.name = f"runtime {number}"
        self.is_dead = False
        self.is_paused = False
        self._paused_at_s = 0.0
        self.is_serving = False
        self.context = world.context.copy()
        self.context.run(OWNER.set, self)
        self.tasks = _Tasks(self)
        self._requests: dict[asyncio.Future[Any], None] = {}
        self.store = Store(self, MemoryStore(world.disk))
        self.engine = Engine(
            cast("Any", self.store),
            clock=clock,
            observer=self,
            connect=self._connect,
            breaker=world.schedule.breaker,
            limits=world.schedule.limits,
            concurrency=dict.fromkeys(world.participants, CONCURRENCY),
        )
        self.oldest_open_ms: Callable[[], int] = lambda: 0
        world.trace.add("{} starts, epoch {}", self.name, self.store.identity.epoch)
        self._main = self.tasks.start(self._run())

    @property
    def supervisor(self) -> Supervisor:
        """What the API asks."""
        return self.engine.supervisor

    async def _run(self) -> None:
        """Come up as the engine's own order has it, then last until a part dies."""
        await self.engine.load()
        group = cast("TaskGroup", self.tasks)
        self.engine.open(group, self.world.configured())
        self.engine.run(group)
        self.is_serving = True
        try:
            await self.engine.wait_stopped()
        except AmendsError as failure:
            self._exit(failure)

    def _exit(self, failure: AmendsError) -> None:
        """It has noticed that it cannot go on, and ends."""
        if self.is_dead:
            return
        self.world.trace.add("{} ends: {}", self.name, str(failure))
        if isinstance(failure, OwnershipLost):
            self.world.faults.count(Fault.OWNERSHIP_LOST, self.name)
        self.die()

    def _connect(self, address: ParticipantAddress, oldest_open_ms: Callable[[], int]) -> Way:
        self.oldest_open_ms = oldest_open_ms
        return way_to(self, self.world.participants[address.name], oldest_open_ms)

    # -- requests --------------------------------------------------------------------------------

    @property
    def unanswered(self) -> int:
        """Requests that were taken in and have no answer yet."""
        return len(self._requests)

    def handle(self, request: Callable[[Supervisor], Awaitable[T]]) -> asyncio.Future[T]:
        """Serve a client's request.

        The future is the client's: it gets the answer, or Unavailable when the process dies.
        """
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self.is_dead or not self.is_serving:
            reply.set_exception(Unavailable("nobody listens"))
            return reply
        self._requests[reply] = None

        async def serve() -> None:
            answer: T | None = None
            refusal: Exception | None = None
            try:
                answer = await request(self.supervisor)
            except AmendsError as error:
                refusal = error
            if self.is_dead or reply.done():
                return
            self._requests.pop(reply, None)
            if refusal is not None:
                reply.set_exception(refusal)
            else:
                reply.set_result(cast("T", answer))

        _ = self.tasks.start(serve())
        return reply

    # -- observer --------------------------------------------------------------------------------

    def turn_committed(
        self, plan: Plan, before: Saga | None, saga: Saga, records: Sequence[Record]
    ) -> None:
        """A turn's effects have left, and those of others of its commit have not."""
        if not self.is_dead and self.world.faults.strikes(Fault.CRASH_AMONG_EFFECTS, self.name):
            self.die()

    def batch_committed(self, transitions: int, seconds: float) -> None:
        """A commit was acknowledged, and nothing has followed from it yet."""
        if not self.is_dead and self.world.faults.strikes(Fault.CRASH_AFTER_COMMIT, self.name):
            self.die()

    def breaker_changed(self, participant: str, before: BreakerState, state: BreakerState) -> None:
        """Counted, and in the trace."""
        if self.is_dead:
            return
        self.world.trace.add("{} breaker of {} {}", self.name, participant, state.name)
        if state is BreakerState.OPEN:
            self.world.faults.count(Fault.BREAKER_OPEN, participant)

    # -- pause and death -------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop, while everybody else's time passes."""
        self.is_paused = True
        self._paused_at_s = self.world.now_s()
        self.world.loop.hold(self)
        self.world.trace.add("{} is paused", self.name)

    def resume(self) -> None:
        """Go on, as if no time had passed."""
        if self.is_paused:
            self.is_paused = False
            self.store.went_on(self._paused_at_s)
            self.world.loop.release(self)
            self.world.trace.add("{} goes on", self.name)

    def die(self) -> None:
        """End at this very instant."""
        if self.is_dead:
            return
        self.is_dead = True
        self.world.trace.add("{} is dead", self.name)
        self.resume()  # what was held runs against closed doors
        for reply in self._requests:
            if not reply.done():
                reply.set_exception(Unavailable("the connection broke"))
        self._requests.clear()
        for task in list(self.tasks.running):
            task.cancel()
        self.world.deployment.lost(self)

    async def wait_if_dead(self) -> None:
        """The door of everything outside: a dead process stands before it for ever."""
        if self.is_dead:
            await asyncio.get_running_loop().create_future()

    async def bury(self) -> None:
        """Wait until nothing of a dead process is left, its timers included."""
        while self.tasks.running:  # noqa: ASYNC110  # a few rounds of the loop
            await asyncio.sleep(0)
        await self.engine.lanes.close()


@contextmanager
def constants_of(schedule: Schedule) -> Iterator[None]:
    """Let the runtime go in the schedule's pages, and look ahead and try again as it says."""
    values: list[tuple[Any, str, float]] = [(exchange, "TRY_AGAIN_S", schedule.stream_again_s)]
    if schedule.page is not None:  # so that few sagas are many pages
        values += [(module, name, schedule.page) for module, name in _PAGES]
    if schedule.horizon_ms is not None:  # it is looked at twice as often as it is long
        values.append((horizon, "AHEAD_MS", schedule.horizon_ms))
        values.append((horizon, "LOOK_EVERY_S", schedule.horizon_ms / 2000))
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    for module, name, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


_PAGES = (
    (recovery, "RECOVERY_PAGE"),
    (arrivals, "LOAD_TOGETHER"),
    (horizon, "PAGE"),
    (turns, "DECIDE_SLICE"),
    (timers, "PACE"),
    (exchange, "MAX_CALLS"),
)


class Deployment:
    """Who runs the runtime: starts it again when it dies, and sometimes a second one too early."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.processes: list[Process] = []  # all that were ever started
        self.clocks = [VirtualClock(world.loop) for _ in range(MACHINES)]
        self._machine = 0
        self._starting = 0

    @property
    def current(self) -> Process | None:
        """The latest process, if it lives."""
        return self.processes[-1] if self.processes and not self.processes[-1].is_dead else None

    def living(self) -> list[Process]:
        """Every process that lives: a replaced one may not know it yet."""
        return [process for process in self.processes if not process.is_dead]

    def start(self, *, elsewhere: bool = False) -> None:
        """Start a process, here or on the other machine."""
        if elsewhere:
            self._machine = (self._machine + 1) % MACHINES
        clock = self.clocks[self._machine]
        self.processes.append(Process(self._world, len(self.processes) + 1, clock))

    def lost(self, process: Process) -> None:
        """A process has died: if it was the latest, another one is started."""
        if process is self.processes[-1] and not self._world.is_over:
            self._starting += 1
            self._world.later(self._world.faults.between(*BOOT_S), self._start_again, process)

    def _start_again(self, died: Process) -> None:
        self._starting -= 1
        if died is self.processes[-1] and not self._world.is_over:
            self.start()
