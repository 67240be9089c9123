"""One AwaitSagas stream: ids come in, ends go out, until the client has no more of either.

Each id is waited for by a task of the stream's own group; a stream that ends, however it ends,
takes them with it. What is found waits in a short queue, so that a client that does not read holds
up its own waits and nobody's memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Final

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from amends.v1 import saga_pb2
from amends_runtime import wire
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.api.door import Context, error_for
from amends_runtime.api.paging import fitting
from amends_runtime.api.validation import Checks
from amends_runtime.errors import Overloaded, Refusal

__all__ = ["MAX_AWAITED", "AwaitedSagas"]

MAX_AWAITED: Final = 10_000
"""Ids of one stream: each costs a task, some 5 KB. A client with more opens another stream."""
MAX_FOUND: Final = 256
"""Ends that wait to be sent; they carry payloads."""
POLL_S: Final = 3600.0
"""How long one wait lasts before it is asked again; any long time will do."""


class AwaitedSagas:
    """What one client waits for."""

    def __init__(self, supervisor: Supervisor, context: Context) -> None:
        self._supervisor = supervisor
        self._context = context
        self._waits: dict[str, anyio.CancelScope] = {}
        self._found, self._to_send = anyio.create_memory_object_stream[saga_pb2.SagaEnd](MAX_FOUND)

    async def run(self, requests: AsyncIterable[saga_pb2.AwaitSagasRequest]) -> None:
        """Until the client has said its last and has got its last end."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read, requests, tasks)
            await self._write()

    async def _read(
        self, requests: AsyncIterable[saga_pb2.AwaitSagasRequest], tasks: TaskGroup
    ) -> None:
        async with self._found:
            async for request in requests:
                for saga_id in request.remove:
                    scope = self._waits.pop(saga_id, None)
                    if scope is not None:
                        scope.cancel()
                for saga_id in request.add:
                    if saga_id in self._waits:
                        continue
                    try:
                        self._check(saga_id)
                    except Refusal as refusal:
                        await self._found.send(_refused(saga_id, refusal))
                        continue
                    # Its own end of the queue: the last one that is closed ends the stream.
                    self._waits[saga_id] = scope = anyio.CancelScope()
                    tasks.start_soon(self._wait, saga_id, scope, self._found.clone())

    def _check(self, saga_id: str) -> None:
        checks = Checks()
        checks.saga_id("add", saga_id)
        checks.passed()
        if len(self._waits) >= MAX_AWAITED:
            raise Overloaded(
                "TOO_MANY_AWAITED",
                f"this stream waits for {MAX_AWAITED} sagas already: add this one when others have"
                " ended, or open another stream",
                1_000,
                {"saga_id": saga_id, "limit": str(MAX_AWAITED)},
            )

    async def _wait(
        self,
        saga_id: str,
        scope: anyio.CancelScope,
        found: MemoryObjectSendStream[saga_pb2.SagaEnd],
    ) -> None:
        async with found:
            with scope:
                end = await self._end_of(saga_id)
                if self._waits.get(saga_id) is scope:
                    del self._waits[saga_id]  # so that it can be added again
                await found.send(end)

    async def _end_of(self, saga_id: str) -> saga_pb2.SagaEnd:
        try:
            view = await self._supervisor.wait(saga_id, POLL_S)
            while not view.saga.ended:
                view = await self._supervisor.wait(saga_id, POLL_S)
        except Exception as error:  # noqa: BLE001  # one saga's error must not end the others' stream
            return _refused(saga_id, error)
        return saga_pb2.SagaEnd(saga_id=saga_id, saga=wire.saga_to_proto(view))

    async def _write(self) -> None:
        async with self._to_send:
            async for end in self._to_send:
                ends = [end]
                while self._to_send.statistics().current_buffer_used:
                    ends.append(self._to_send.receive_nowait())
                while ends:
                    page = fitting(ends, len(ends))
                    await self._context.write(saga_pb2.AwaitSagasResponse(ends=page))
                    del ends[: len(page)]


def _refused(saga_id: str, error: Exception) -> saga_pb2.SagaEnd:
    return saga_pb2.SagaEnd(saga_id=saga_id, error=error_for(error, "AwaitSagas"))
