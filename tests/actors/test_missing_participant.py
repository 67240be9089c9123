"""A participant that is in a definition and, since a restart, in no configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

import amends
from amends_runtime.config import Config, Participant, Server
from amends_runtime.engine import run_engine


def a_shop() -> amends.Participant:
    """One action that takes its time, and one that does not."""
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("wait", compensatable=False)
    def wait(call: amends.Call) -> amends.InProgress:
        return amends.InProgress(after_s=3600)

    return shop


async def test_no_new_saga_starts_and_those_under_way_wait(tmp_path: Path) -> None:
    """A start is refused with the name; a repeated one of a saga under way is still answered."""
    definition = amends.Definition("d").read_only("a", "shop", "wait")
    server = Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db"))
    async with amends.serve(a_shop(), listen="127.0.0.1:0") as shop:
        config = Config(server=server, participants={"shop": Participant(address=shop.address)})
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(definition)
            await client.start("d", saga_id="under-way")
        async with (
            run_engine(Config(server=server)) as engine,
            amends.Client(engine.address) as client,
        ):
            with pytest.raises(amends.WrongState, match="shop"):
                await client.start("d", saga_id="new")
            with pytest.raises(amends.NotFound):
                await client.get("new")
            again = await client.start("d", saga_id="under-way")
            assert again.existed
            assert again.saga.state is amends.SagaState.RUNNING
