"""Stops and kills at chosen moments: what was acknowledged goes on, and no effect happens twice.

All of it where the services are called over streams, and again where by the unary verbs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sized
from functools import partial

import anyio
import pytest

import amends
from amends import RecordKind, SagaState
from shop.catalogue import SERVICES
from tests.acceptance.world import World, opened, until

CONFLICT = 4


@pytest.fixture(scope="module", params=["exchange", "unary"])
async def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """The shop and a runtime that calls it in one way or the other, which is seen in the end."""
    unary = SERVICES if request.param == "unary" else ()
    async with opened(tmp_path_factory.mktemp("world"), unary=unary) as world:
        yield world
        ways = {each.name: each.transport for each in await world.client.participants()}
        assert ways == dict.fromkeys(SERVICES, request.param)


async def test_a_second_runtime_on_the_same_database(world: World) -> None:
    """It is refused with one clear line and the exit code for conflicts; the first goes on."""
    database = world.processes.database("amends")
    second = await anyio.run_process(
        [
            sys.executable,
            "-m",
            "amends_runtime",
            "serve",
            "--listen=127.0.0.1:0",
            f"--database={database}",
        ],
        check=False,
        env=_plain_environment(),
    )

    assert second.returncode == CONFLICT
    lines = [line for line in second.stderr.decode().splitlines() if line.startswith("amends: ")]
    assert len(lines) == 1
    assert str(database) in lines[0]
    assert str(world.runtime.pid) in lines[0]
    assert b"Traceback" not in second.stderr + second.stdout
    assert (await world.end(await world.start())).completed


async def test_sigterm_under_load(world: World) -> None:
    """The runtime commits what it has decided and ends with 0; started again, all orders end."""
    world.switch(payments={"charge": {"slow": 1, "slow_s": 0.5}})
    started: list[amends.StartedSaga] = []

    async with anyio.create_task_group() as clients:
        for number in range(40):
            clients.start_soon(_start_one, world, started, number)
        await until(lambda: len(started) >= 20, "twenty acknowledged starts")
        world.runtime.terminate()
        assert await world.runtime.wait_ended() == 0
        # The clients that are not answered yet ask again, and that is what they find.
        await world.runtime.start()

    assert len(started) == 40
    for saga in started:
        assert (await world.end(saga)).completed
        assert len(world.effects(saga.saga_id)) == 5


async def test_the_runtime_is_killed_while_a_call_is_on_the_wire(world: World) -> None:
    """The attempt is found as lost and made again under the same key; it took effect once."""
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)

    world.runtime.kill()
    await world.runtime.start()
    ended = await world.end(started)

    assert ended.completed
    (lost,) = await world.records(started.saga_id, RecordKind.ATTEMPT_LOST, "charge")
    assert lost.attempt == 1
    attempts = await world.records(started.saga_id, RecordKind.ATTEMPT_STARTED, "charge")
    assert [record.attempt for record in attempts][:2] == [1, 2]
    assert attempts[0].epoch != attempts[1].epoch
    assert world.effects(started.saga_id).count("charge") == 1


async def test_the_runtime_is_killed_while_it_undoes(world: World) -> None:
    """The way back survives as the way forward does."""
    world.switch(
        shipping={"ship": {"decline": {"next": 1}}},
        payments={"refund": {"hold": {"next": 1}}},
    )
    struck = world.strikes("payments", "refund hold")
    started = await world.start()
    await world.wait_strike("payments", "refund hold", after=struck)

    world.runtime.kill()
    await world.runtime.start()
    ended = await world.end(started)

    assert ended.state is SagaState.COMPENSATED
    effects = world.effects(started.saga_id)
    assert effects.count("refund") == effects.count("charge") == 1
    assert effects[-1] == "cancel"


async def test_the_runtime_is_killed_again_and_again_with_nobody_there(world: World) -> None:
    """Orders that wait for a participant outlive any number of runtimes."""
    await world.take_down("shipping")
    started = [await world.start() for _ in range(10)]
    for saga in started:
        await world.wait_record(saga.saga_id, RecordKind.ATTEMPT_STARTED, "ship")

    for _ in range(3):
        world.runtime.kill()
        await world.runtime.start()

    open_now = {saga.saga_id async for saga in world.client.list(state=SagaState.RUNNING)}
    assert {saga.saga_id for saga in started} <= open_now
    world.switch()
    for saga in started:
        assert (await world.end(saga)).completed
        assert world.effects(saga.saga_id).count("ship") == 1


async def test_a_participant_is_killed_in_the_middle_of_a_call(world: World) -> None:
    """Nobody knows whether it charged; it is asked again when it is back, and charged once."""
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)

    world.services["payments"].kill()
    world.switch()  # the one that comes up counts anew, and would hold once more
    await world.services["payments"].start()
    ended = await world.end(started)

    assert ended.completed
    failed = await world.records(started.saga_id, RecordKind.ATTEMPT_FAILED, "charge")
    assert failed[0].timing is not None
    assert failed[0].timing.status == "UNAVAILABLE"
    assert world.effects(started.saga_id).count("charge") == 1


async def test_every_participant_is_killed_under_load(world: World) -> None:
    """One after another, each after so many ends of orders; every order has its end."""
    ended: list[amends.Saga] = []
    customers = iter(range(60))

    async def order_one_after_another() -> None:
        for number in customers:
            started = await world.start(customer=f"customer-{number:02}")
            ended.append(await world.end(started))

    async with anyio.create_task_group() as clients:
        for _ in range(8):
            clients.start_soon(order_one_after_another)
        for position, service in enumerate(world.services.values(), start=1):
            await until(partial(_has, ended, position * 10), f"{position * 10} ends")
            service.kill()
            await service.start()

    assert [saga.state for saga in ended] == [SagaState.COMPLETED] * 60


def _has(items: Sized, count: int) -> bool:
    return len(items) >= count


async def _start_one(world: World, started: list[amends.StartedSaga], number: int) -> None:
    started.append(await world.start(customer=f"customer-{number:02}"))


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AMENDS_")}
