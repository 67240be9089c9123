"""A real runtime in this process: a store in a file, a participant on a port, a client."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

import amends
from amends.v1 import operator_pb2_grpc, saga_pb2_grpc
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.actors.view import SagaView
from amends_runtime.config import Config, Participant, Server
from amends_runtime.core.saga import Saga
from amends_runtime.engine import Engine, run_engine
from tests.api.shop import ORDER, Held, Shop
from tests.api.stubs import Operator, Sagas


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    """The participant; whatever still waits in it at the end is let go."""
    shop = Shop()
    async with amends.serve(shop.participant(), grace_s=5) as server:
        shop.address = server.address
        yield shop
        for behaviour in shop.behaviours.values():
            if isinstance(behaviour, Held):
                behaviour.let_go.set()


@pytest.fixture
def config(tmp_path: Path, shop: Shop) -> Config:
    """A runtime on a free port, with the shop as its only participant."""
    return Config(
        server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
        participants={"shop": Participant(address=shop.address)},
    )


@pytest.fixture
async def engine(config: Config, shop: Shop) -> AsyncIterator[Engine]:
    """The running runtime, which knows the definition `order`."""
    async with run_engine(config, [ORDER]) as engine:
        yield engine
        for behaviour in shop.behaviours.values():
            if isinstance(behaviour, Held):
                behaviour.let_go.set()  # so that the way down need not wait for replies


@pytest.fixture
async def channel(engine: Engine) -> AsyncIterator[grpc.aio.Channel]:
    """A client's channel, as any client would open it."""
    async with grpc.aio.insecure_channel(engine.address) as channel:
        yield channel


@pytest.fixture
def sagas(channel: grpc.aio.Channel) -> Sagas:
    """The generated stub of SagaService."""
    return saga_pb2_grpc.SagaServiceStub(channel)


@pytest.fixture
def operator(channel: grpc.aio.Channel) -> Operator:
    """The generated stub of OperatorService."""
    return operator_pb2_grpc.OperatorServiceStub(channel)


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait for a saga may take at most; all of them are over at once."""
    waits: list[float] = []
    wait = Supervisor.wait

    async def over_at_once(
        self: Supervisor, saga_id: str, timeout_s: float, until: Callable[[Saga], bool]
    ) -> SagaView:
        waits.append(timeout_s)
        return await wait(self, saga_id, 0.0, until)

    monkeypatch.setattr(Supervisor, "wait", over_at_once)
    return waits
