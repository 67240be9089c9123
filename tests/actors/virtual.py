"""A runtime in virtual time, over a disk that outlives it and a participant that can be held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio

from amends_runtime.actors.supervisor import Limits, StartRequest
from amends_runtime.core.definition import Definition, Step
from amends_runtime.core.messages import Done
from amends_runtime.core.payload import Payload
from amends_runtime.engine import Engine
from amends_runtime.ports import Call, ParticipantAddress, Reply, Transition
from amends_runtime.storage.memory import MemoryStore
from amends_runtime.telemetry.observers import Observers
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop

__all__ = ["FailingStore", "Shop", "a_runtime", "in_virtual_time", "start"]


class Shop:
    """A participant's endpoint: every call is answered Done, once `answers` is set.

    It has the calls that left for it, and what the runtime says of its oldest open saga.
    """

    name = "simulated"

    def __init__(self) -> None:
        self.answers = anyio.Event()
        self.calls: list[tuple[str, str]] = []
        self.oldest_open_ms: Callable[[], int] = lambda: 0

    async def call(self, call: Call) -> Reply:
        """Waits for its answer as long as that takes."""
        self.calls.append((call.saga_id, call.verb.name))
        await self.answers.wait()
        return Reply(Done(), "OK", healthy=True)

    async def close(self) -> None:
        """Nothing is open."""


class FailingStore(MemoryStore):
    """A store whose next commit, once `failing` is set to an event, waits for it and then fails."""

    failing: anyio.Event | None = None
    written = False
    """Whether the commit that fails is written all the same."""

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commits, or fails."""
        failing, self.failing = self.failing, None
        if failing is not None:
            await failing.wait()
            self.disk.fail_next_commit(written=self.written)
        return await super().commit(transitions)


@asynccontextmanager
async def a_runtime(
    store: MemoryStore,
    shop: Shop,
    limit: int = 256,
    clock: VirtualClock | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Engine]:
    """A runtime whose only participant is the shop; it is killed at the end of the block.

    `limit` is how many calls the shop gets at once, `clock` its machine's (by default a new one).
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)

    def connect(address: ParticipantAddress, oldest_open_ms: Callable[[], int]) -> Shop:
        shop.oldest_open_ms = oldest_open_ms
        return shop

    engine = Engine(
        store,
        clock=clock or VirtualClock(loop),
        observer=Observers([]),
        connect=connect,
        concurrency={"shop": limit},
        limits=limits,
    )
    await engine.load()
    async with anyio.create_task_group() as tasks:
        engine.open(tasks, [ParticipantAddress("shop", "nowhere")])
        engine.run(tasks)
        yield engine
        tasks.cancel_scope.cancel()


async def start(engine: Engine, *saga_ids: str, deadline_ms: int = 0) -> list[bool]:
    """Starts sagas of one step; whether each existed before."""
    await engine.definitions.register(
        Definition(name="one", steps=(Step(name="a", participant="shop", action="do"),))
    )
    existed = []
    for saga_id in saga_ids:
        request = StartRequest(
            saga_id=saga_id,
            definition_name="one",
            content_hash="c",
            input=Payload(b""),
            deadline_ms=deadline_ms,
        )
        existed.append((await engine.supervisor.start_saga(request))[1])
    return existed


def in_virtual_time(main: Callable[[], Awaitable[None]]) -> None:
    """Runs a test's body."""

    async def body() -> None:
        await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(body())
