"""The world that the tests of a module share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.acceptance.world import World, opened


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
