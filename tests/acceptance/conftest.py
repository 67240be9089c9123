"""The world that the tests of a module share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.acceptance.traced import Traced, traced_world
from tests.acceptance.world import World, opened
from tests.postgres import reachable_folder
from tests.telemetry.otlp_receiver import Receiver, receiving

__all__ = ["reachable_folder"]


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The shop and a runtime, running."""
    async with opened(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """The same, with nothing going wrong until the test says so, nor after it."""
    shared.switch()
    yield shared
    shared.switch()


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    """The collector, which outlives everything that sends to it."""
    async with receiving() as one:
        yield one


@pytest.fixture(scope="module")
async def shared_traced(
    receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Traced]:
    """The shop, a patient participant and a runtime, all of them sending spans."""
    async with traced_world(tmp_path_factory.mktemp("world"), receiver) as one:
        yield one


@pytest.fixture
def traced(shared_traced: Traced) -> Iterator[Traced]:
    """The same, with nothing going wrong until the test says so, nor after it."""
    shared_traced.world.switch()
    yield shared_traced
    shared_traced.world.switch()
