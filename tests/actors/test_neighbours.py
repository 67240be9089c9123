"""A participant that is away fills memory with its sagas: those of others come in all the same."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from amends_runtime.actors.supervisor import Limits, StartRequest
from amends_runtime.core.definition import Definition, Step
from amends_runtime.core.messages import Done, Rejected, Unknown
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState
from amends_runtime.engine import Engine
from amends_runtime.errors import Overloaded
from amends_runtime.ports import Call, ParticipantAddress, Reply
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.observers import Observers
from amends_runtime.testing.virtual_time import VirtualClock, VirtualLoop
from tests.actors.test_parking import FAILED, SLOW, Scripted, run, settle

MONEY = Definition(
    name="money",
    steps=(
        Step(name="charge", participant="shop", action="do", compensation_retry=SLOW),
        Step(name="pay", participant="shop", action="do"),
    ),
)
OTHER = Definition(name="other", steps=(Step(name="x", participant="away", action="do"),))


class Away:
    """A participant to which there is no connection."""

    name = "away"

    async def call(self, _: Call) -> Reply:
        """Fails at once."""
        await anyio.lowlevel.checkpoint()
        return Reply(Unknown("UNAVAILABLE", "away"), "UNAVAILABLE", healthy=False, away=True)

    async def close(self) -> None:
        """Nothing is open."""


def test_a_refund_is_tried_again_though_live_sagas_are_at_their_bound() -> None:
    """Starts are refused, for nothing at rest can make room; what exists has its reserve."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        shop = Scripted(s=[Done(), Rejected("no"), FAILED, Done()])

        def connect(address: ParticipantAddress, _: object) -> Scripted | Away:
            return shop if address.name == "shop" else Away()

        engine = Engine(
            MemoryStore(MemoryDisk()),
            clock=VirtualClock(loop),
            observer=Observers([]),
            connect=connect,
            concurrency={},
            limits=Limits(live_sagas=20),
        )
        await engine.load()

        async def start(saga_id: str, definition: str) -> None:
            request = StartRequest(
                saga_id=saga_id,
                definition_name=definition,
                content_hash="c",
                input=Payload(b""),
            )
            await engine.supervisor.start_saga(request)

        async def start_until_refused() -> None:
            for number in range(100):
                await start(f"o{number}", "other")
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            engine.open(tasks, [ParticipantAddress(name, "x") for name in ("shop", "away")])
            engine.run(tasks)
            await engine.definitions.register(MONEY)
            await engine.definitions.register(OTHER)
            await start("s", "money")
            await settle(engine)
            view = await engine.supervisor.view("s")
            assert view.saga.state is SagaState.COMPENSATING
            with pytest.raises(Overloaded, match="live_sagas"):  # once the breaker is open
                await start_until_refused()
            ahead_ms = view.saga.steps[0].retry_at_ms - engine.supervisor._clock.now_ms()
            await anyio.sleep(ahead_ms / 1000 + 5)
            assert engine.supervisor.counts().live >= 20
            view = await engine.supervisor.view("s")
            assert view.saga.state is SagaState.COMPENSATED
            tasks.cancel_scope.cancel()

    run(main)
