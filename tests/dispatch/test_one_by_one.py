"""Workers that call one at a time: what they keep, and that they end."""

from __future__ import annotations

import asyncio
import sys

import anyio
import pytest

from amends_runtime.core.messages import Done
from amends_runtime.core.payload import Payload
from amends_runtime.dispatch.one_by_one import OneByOne
from amends_runtime.ports import Call, Reply
from tests.dispatch.test_exchange import call

pytestmark = pytest.mark.anyio


class Quick:
    """A caller that answers at once."""

    name = "quick"

    async def call(self, call: Call) -> Reply:
        """Answer Done."""
        await asyncio.sleep(0)
        return Reply(Done(), "OK", healthy=True)

    async def close(self) -> None:
        """Nothing is open."""


async def test_an_idle_worker_keeps_no_payload() -> None:
    """There may be hundreds of them, and a payload is up to 1 MiB."""
    async with anyio.create_task_group() as tasks:
        transport = OneByOne(Quick())
        transport.open(tasks, lambda: None)
        data = bytes(1_000_000)
        before = sys.getrefcount(data)
        for _ in range(2):
            done = anyio.Event()
            transport.send(call("a", input=Payload(data)), lambda _, done=done: done.set())  # type: ignore[misc]
            await done.wait()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert sys.getrefcount(data) == before
        tasks.cancel_scope.cancel()


async def test_workers_end_with_their_transport() -> None:
    """A lane that an operator moves many times leaves none behind."""
    async with anyio.create_task_group() as tasks:
        transport = OneByOne(Quick())
        transport.open(tasks, lambda: None)
        left = 50
        done = anyio.Event()

        def answered(_: Reply | None) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        for _ in range(50):
            transport.send(call("a"), answered)
        await done.wait()
        await transport.close()
    # The group has ended by itself: there is no task left in it.
