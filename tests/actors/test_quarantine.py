"""A bug in deciding counts against the one saga that it strikes, and is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest

import amends
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core import saga as core
from amends_runtime.core.messages import Answered, CancelSaga, RuntimeRestarted
from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import Answer
from amends_runtime.engine import run_engine
from amends_runtime.errors import Unavailable
from tests.actors.runtimes import ONE_STEP, a_runtime_with, a_shop


async def test_a_saga_whose_decisions_crash_is_stuck_and_all_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three crashes running and it is left alone, which shows; its neighbour completes."""
    decide = core.decide

    def decide_with_a_bug(
        plan: Any, saga: core.Saga | None, message: Any, now_ms: int, epoch: int
    ) -> core.Decision:
        if saga is not None and saga.saga_id == "poison" and isinstance(message, CancelSaga):
            raise ZeroDivisionError
        return decide(plan, saga, message, now_ms, epoch)

    monkeypatch.setattr(core, "decide", decide_with_a_bug)
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("slow", compensatable=False)
    def slow(call: amends.Call) -> amends.InProgress:
        return amends.InProgress(after_s=3600)

    @shop.execute("quick", compensatable=False)
    def quick(call: amends.Call) -> None:
        """Nothing to do."""

    async with amends.serve(shop, listen="127.0.0.1:0") as server:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={"shop": Participant(address=server.address)},
        )
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(amends.Definition("slow").read_only("a", "shop", "slow"))
            await client.register(amends.Definition("quick").read_only("a", "shop", "quick"))
            poison = await client.start("slow", saga_id="poison")
            for _ in range(3):
                with pytest.raises(amends.AmendsError):
                    await client.cancel("poison", reason="test", author="test", timeout_s=0.5)
            assert (await poison.get()).state is amends.SagaState.STUCK
            other = await client.start("quick")
            assert (await other.result(timeout_s=30)).state is amends.SagaState.COMPLETED


async def test_a_quarantined_saga_can_be_retried_or_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once deciding works again a retry lets it go on; while it does not, it can be abandoned."""
    decide = core.decide
    has_bug = True

    def decide_with_a_bug(
        plan: Any, saga: core.Saga | None, message: Any, now_ms: int, epoch: int
    ) -> core.Decision:
        if has_bug and isinstance(message, CancelSaga | RuntimeRestarted | Answered):
            raise ZeroDivisionError
        return decide(plan, saga, message, now_ms, epoch)

    monkeypatch.setattr(core, "decide", decide_with_a_bug)
    async with a_runtime_with(a_shop(), tmp_path) as (engine, client):
        await client.register(ONE_STEP)
        supervisor = engine.supervisor
        for saga_id in ("mended", "hopeless"):
            await client.start("one", saga_id=saga_id)
            while not (await supervisor.view(saga_id)).quarantined:
                await anyio.lowlevel.checkpoint()
        with pytest.raises(Unavailable):
            await supervisor.retry_saga("hopeless", None, "ann", "is it mended?")
        view, answer = await supervisor.abandon_saga("hopeless", "ann", "it is not")
        assert answer is Answer.ABANDONED
        assert view.saga.state is SagaState.ABANDONED

        has_bug = False
        _, answer = await supervisor.retry_saga("mended", None, "ann", "the program is mended")
        assert answer is Answer.RETRIED
        ended = await client.handle("mended").result(timeout_s=30)
        assert ended.state is amends.SagaState.COMPLETED
        assert supervisor.counts().without_wake_up == 0
