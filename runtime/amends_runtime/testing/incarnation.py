"""One life of the runtime: the real engine, over a memory store and scripted participants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio

from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.definition import Plan
from amends_runtime.dispatch.lanes import LaneStatus
from amends_runtime.engine import Engine
from amends_runtime.ports import Call, ParticipantAddress, Reply, StoreIdentity, Transition
from amends_runtime.storage.memory import MemoryStore
from amends_runtime.telemetry.observers import Observers

if TYPE_CHECKING:
    from amends_runtime.testing.virtual_time import VirtualLoop
    from amends_runtime.testing.world import World  # which imports this module

__all__ = ["Incarnation"]


class Incarnation:
    """One life of the runtime: an engine over a store of its own and a way to the participants."""

    def __init__(self, world: World) -> None:
        self.is_dead = False
        self.task: asyncio.Task[None] | None = None
        self._world = world
        self._store: _Store | None = None
        self._engine: Engine | None = None

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self._engine is not None

    @property
    def identity(self) -> StoreIdentity:
        """What its calls say of its store."""
        assert self._store is not None, "it has begun"
        return self._store.identity

    def supervisor(self) -> Supervisor:
        """Who answers questions."""
        assert self._engine is not None, "a runtime is asked only while it is up"
        return self._engine.supervisor

    def lanes(self) -> list[LaneStatus]:
        """Its lanes, as an operator sees them."""
        assert self._engine is not None, "a runtime is asked only while it is up"
        return self._engine.lanes.status()

    def begin(
        self,
        loop: VirtualLoop,
        plans: Sequence[Plan],
        breaker: BreakerPolicy,
        event: Callable[[object], None],
    ) -> None:
        """Begins its life in a task of its own; `event` is called when it is up, and at its end."""
        self._store = _Store(self._world, self)
        self.task = loop.create_task(self._live(self._store, plans, breaker, event))
        self.task.add_done_callback(event)

    def raise_failure(self) -> None:
        """Raises what it died of, if it has died by itself."""
        if self.task is None or not self.task.done() or self.task.cancelled():
            return
        failure = self.task.exception()
        while isinstance(failure, BaseExceptionGroup) and len(failure.exceptions) == 1:
            failure = failure.exceptions[0]
        if failure is not None:
            raise failure

    async def _live(
        self,
        store: _Store,
        plans: Sequence[Plan],
        breaker: BreakerPolicy,
        event: Callable[[object], None],
    ) -> None:
        world = self._world
        engine = Engine(
            store,
            clock=world.clock,
            observer=Observers([]),
            connect=lambda _, __: _Transport(world, self),
            breaker=breaker,
        )
        await engine.load()
        async with anyio.create_task_group() as tasks:
            engine.open(tasks, [ParticipantAddress(name, "(scripted)") for name in world.services])
            try:
                for plan in plans:
                    await engine.definitions.register(plan.definition)
                engine.run(tasks)
                self._engine = engine
                event(None)
                await engine.wait_stopped()
            finally:
                with anyio.CancelScope(shield=True):
                    await engine.lanes.close()  # its timers would go off in the next life


class _Store(MemoryStore):
    """The memory store of one incarnation, with a moment before and after each commit."""

    def __init__(self, world: World, incarnation: Incarnation) -> None:
        super().__init__(world.disk)
        self._world = world
        self._incarnation = incarnation

    async def commit(self, transitions: Sequence[Transition]) -> int:
        moment = self._world.moment
        await moment(
            self._incarnation,
            lambda: f"before the commit of {_described(transitions, self._world)}",
        )
        seq = await super().commit(transitions)
        await moment(
            self._incarnation, lambda: f"after the commit of {_described(transitions, self._world)}"
        )
        return seq


class _Transport:
    """The way from one incarnation to a participant."""

    name = "scripted"

    def __init__(self, world: World, incarnation: Incarnation) -> None:
        self._world = world
        self._incarnation = incarnation

    async def call(self, call: Call) -> Reply:
        """Sends one attempt and waits for its end."""
        return await self._world.call(self._incarnation, call)

    async def close(self) -> None:
        """Nothing to close."""


def _described(transitions: Sequence[Transition], world: World) -> str:
    """Names what is committed, for a person who asks which moment it was."""
    facts = []
    for transition in transitions:
        names = world.readings.step_names(transition)
        for record in transition.records:
            step = getattr(record, "step", None)
            of = "" if step is None else f"({names[step]})"
            facts.append(type(record).__name__ + of)
    return ", ".join(facts)
