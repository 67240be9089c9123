"""What an operator does to a running shop, and what of it survives that the runtime is killed."""

from __future__ import annotations

from collections import defaultdict

import anyio

import amends
from amends import RecordKind, SagaState
from tests.acceptance.world import PATIENCE_S, World, until

NOBODY = "127.0.0.1:1"


async def test_a_watch_over_kills_tells_every_turn_once(world: World) -> None:
    """The same loop, through two deaths of the runtime under load: no turn twice, none missed."""
    turns: defaultdict[str, list[int]] = defaultdict(list)
    positions: list[int] = []
    ended: set[str] = set()
    watching, all_told = anyio.Event(), anyio.Event()
    started: list[amends.StartedSaga] = []

    async def watch() -> None:
        async for event in world.client.watch(definition="order"):
            watching.set()
            assert event.purged_turns == 0
            if event.saga is not None:
                positions.append(event.records[0].seq)
                turns[event.saga.saga_id].append(event.saga.version)
                if event.saga.ended:
                    ended.add(event.saga.saga_id)
            if len(ended) == 30:
                all_told.set()
                return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await watching.wait()
        for _ in range(3):
            started += [await world.start() for _ in range(10)]
            if len(started) < 30:
                world.runtime.kill()
                await world.runtime.start()
        with anyio.fail_after(PATIENCE_S):
            await all_told.wait()

    assert positions == sorted(set(positions))
    for saga in started:
        versions = {record.version for record in await world.history(saga.saga_id)}
        assert turns[saga.saga_id] == sorted(versions)
        assert (await world.end(saga)).completed


async def test_a_refusal_past_the_point_of_no_return_is_mended_by_a_retry(world: World) -> None:
    """Stuck, killed, restarted, retried: in a new round, and every effect took place once."""
    world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await world.start()
    await world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")

    world.runtime.kill()
    await world.runtime.start()
    assert (await started.get()).state is SagaState.STUCK
    saga = await started.retry(step="confirm", author="ada", reason="the shop is open again")

    assert saga.state is SagaState.RUNNING
    ended = await world.end(started)
    assert ended.completed
    assert ended.step("confirm").round == 2
    (acted,) = await world.records(started.saga_id, RecordKind.OPERATOR_ACTED)
    assert (acted.detail, acted.step, acted.round) == ("retry", "confirm", 2)
    assert (acted.author, acted.reason) == ("ada", "the shop is open again")
    assert world.effects(started.saga_id).count("confirm") == 1


async def test_a_stuck_order_is_abandoned_for_good(world: World) -> None:
    """It ends with what remains named, and stays so through a kill; nothing more is called."""
    world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await world.start()
    world.may_be_stuck.add(started.saga_id)
    await world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")
    effects = world.effects(started.saga_id)

    abandoned = await started.abandon(author="ada", reason="confirmed by telephone")
    assert abandoned.saga.state is SagaState.ABANDONED
    assert abandoned.remaining_steps == ("place", "charge", "reserve", "ship")

    world.runtime.kill()
    await world.runtime.start()
    ended = await world.client.wait(started.saga_id, timeout_s=PATIENCE_S)
    assert ended.state is SagaState.ABANDONED
    assert (await world.history(started.saga_id))[-1].state is SagaState.ABANDONED
    assert world.effects(started.saga_id) == effects


async def test_a_participant_is_moved_and_moved_back_under_load(world: World) -> None:
    """Moved by mistake to where nobody is: orders wait, through a kill, and none is undone."""

    async def shipping() -> amends.ParticipantInfo:
        return next(p for p in await world.client.participants() if p.name == "shipping")

    configured = (await shipping()).address
    await world.client.put_participant("shipping", NOBODY, author="ada", reason="a slip")
    started = [await world.start() for _ in range(5)]

    async def all_wait() -> bool:
        return all([(await saga.get()).past_no_return for saga in started])

    await until(all_wait, "all orders to have come as far as shipping")
    world.runtime.kill()
    await world.runtime.start()
    held = await shipping()
    assert (held.address, held.by_operator, held.configured_address) == (NOBODY, True, configured)
    assert "participant_held_elsewhere" in world.runtime.log.read_text(encoding="utf-8")

    await world.client.remove_participant("shipping", author="ada", reason="it was a slip")
    back = await shipping()
    assert (back.address, back.by_operator) == (configured, False)
    for saga in started:
        assert (await world.end(saga)).completed
        assert world.effects(saga.saga_id).count("ship") == 1
