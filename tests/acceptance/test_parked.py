"""Sagas at rest, and a runtime that is killed: what was parked is back when its time has come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import amends
from amends import RecordKind, SagaState
from shop.processes import Processes
from tests.acceptance.world import PATIENCE_S, until

DEADLINE_S = 1800.0  # far beyond the ten seconds from which on a saga's row says that it rests
SAGAS = 20

# `amends` on a machine whose wall clock says an hour later: nobody waits for a deadline here.
AN_HOUR_LATER = """
from amends_runtime.__main__ import main
from amends_runtime.clock import SystemClock

now_us = SystemClock.now_us
SystemClock.now_us = lambda clock: now_us(clock) + 3_600_000_000
SystemClock.now_ms = lambda clock: clock.now_us() // 1000
main()
"""


@asynccontextmanager
async def unwell() -> AsyncIterator[tuple[str, list[str]]]:
    """A participant in this process that books and can undo it, and whose `stamp` gets stuck."""
    service = amends.Participant("service", barrier=None)
    undone: list[str] = []

    @service.execute("book")
    async def book(call: amends.Call) -> None:
        """Do it."""

    @service.compensate("book")
    async def cancel(call: amends.Call) -> None:
        """Undo it."""
        undone.append(call.saga_id)

    @service.execute("stamp", compensatable=False)
    async def stamp(call: amends.Call) -> None:
        """Never do it, and say so in a way that needs a person."""
        raise amends.Broken("out_of_ink")

    async with amends.serve(service, listen="127.0.0.1:0") as server:
        yield server.address, undone


async def test_parked_sagas_wake_on_time_after_a_kill(tmp_path: Path) -> None:
    """A runtime that comes back before their deadline leaves them alone, a later one turns back."""
    async with Processes(tmp_path) as processes, unwell() as (address, undone):
        runtime = await processes.start_runtime({"service": address}, settings="")
        async with amends.Client(runtime.address) as client:
            await client.register(
                amends.Definition("booking")
                .step("book", "service", "book")
                .read_only("stamp", "service", "stamp")
            )
            ids = [f"booking-{number}" for number in range(SAGAS)]
            for saga_id in ids:
                await client.start("booking", saga_id=saga_id, deadline_s=DEADLINE_S)

            async def all_are_stuck() -> bool:
                stuck = [saga async for saga in client.list(state=SagaState.STUCK)]
                return len(stuck) == SAGAS

            await until(all_are_stuck, "all to be stuck")
            runtime.kill()
            await runtime.start()
            await until(all_are_stuck, "all to be stuck as before")
            assert undone == []

            runtime.kill()
            python, _, _, *arguments = runtime.command  # python -m amends_runtime serve ...
            runtime.command = (python, "-c", AN_HOUR_LATER, *arguments)
            await runtime.start()
            for saga_id in ids:
                ended = await client.wait(saga_id, timeout_s=PATIENCE_S)
                assert ended.state is SagaState.COMPENSATED
                assert ended.ended_at_ms is not None
                assert ended.ended_at_ms - ended.started_at_ms >= DEADLINE_S * 1000
                kinds = [record.kind async for record in client.history(saga_id)]
                assert RecordKind.ATTEMPT_LOST not in kinds
        assert sorted(undone) == sorted(ids)
