"""One AwaitSagas stream: ids come in, ends go out, until the client has no more of either.

How to think about it:

1. An id is in one place: in `_waits` while its saga runs, in `_found` from its end until it is
   handed to gRPC. Both together are bounded. So a client that does not read holds up itself: with
   too much found, nothing more of what it says is read, and gRPC's flow control tells it to wait.
   The same holds while too many sagas are being read from the store for it.
2. Of what is found only so many bytes are kept. Beyond them the id alone is, and the end is read
   again when its turn comes.
3. Each id is waited for by a future with a callback, not by a task: of the saga's end if it is
   live, else of its coming in. A stream that ends, however it ends, gives them all back.
4. An id that is removed is forgotten wherever it is; what is in the message under way is told.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Final, NamedTuple, TypeAlias

import anyio
import anyio.lowlevel
import grpc.aio
import structlog

from amends.v1 import saga_pb2
from amends_runtime import wire
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.actors.view import SagaView, Told
from amends_runtime.api.door import Context, error_for
from amends_runtime.api.paging import PAGE_BYTES
from amends_runtime.api.validation import Checks, is_saga_id
from amends_runtime.errors import Overloaded, Refusal

__all__ = ["MAX_AWAITED", "AwaitedSagas"]

_log = structlog.get_logger(__name__)

MAX_AWAITED: Final = 10_000
"""Ids of one stream: each costs less than 1 KB. A client with more opens another stream."""
MAX_FOUND: Final = 256
"""Ends that wait to be sent; with more, no further id is taken in."""
MAX_KEPT_BYTES: Final = 8 * 1024 * 1024
"""Of the ends that wait to be sent: `MAX_AWAITED` of them if they have some 800 bytes each."""
MAX_ARRIVING: Final = 256
"""Sagas that are read from the store for one stream at a time: more of them would take the place of
starts, which are admitted while there is little to be done."""
TURN: Final = 256
"""Ids of one request that are looked at in one go: a large request must not stop all else."""


_Waiter: TypeAlias = asyncio.Future[SagaView | None] | asyncio.Future[Told]


class _Found(NamedTuple):
    """An end that waits to be sent, and its bytes; without one it is to be read again."""

    end: saga_pb2.SagaEnd | None
    size: int


_READ_AGAIN: Final = _Found(None, 0)


class _Bell:
    """Wakes one task that waits; rung when nobody does, it is not heard.

    An event would do the same, and is told four times for each end: 0.6 µs, of which this saves
    all but a tenth.
    """

    __slots__ = ("_heard",)

    def __init__(self) -> None:
        self._heard: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    async def wait(self) -> None:
        self._heard = asyncio.get_running_loop().create_future()
        try:
            await self._heard
        finally:
            self._heard = None


class AwaitedSagas:
    """What one client waits for."""

    def __init__(self, supervisor: Supervisor, context: Context) -> None:
        self._supervisor = supervisor
        self._context = context
        self._waits: dict[str, _Waiter] = {}
        self._arriving: set[str] = set()  # those of `_waits` that are read from the store
        self._found: dict[str, _Found] = {}  # in order
        self._kept_bytes = 0
        self._is_all_said = False
        self._for_reader = _Bell()
        self._for_writer = _Bell()

    async def run(self) -> None:
        """Until the client has said its last and has got its last end, or has left."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read)
                try:
                    await self._write()
                except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
                    # What gRPC raises when the client leaves during a write.
                    _log.debug("client_left", method="AwaitSagas", error=str(error))
                    tasks.cancel_scope.cancel()
        finally:
            while self._waits:
                self._forget(next(iter(self._waits)))

    # -- what comes in -------------------------------------------------------------------------

    async def _read(self) -> None:
        # Not by gRPC's iterator: it and our frame, when they are left between two requests, would
        # keep the last one until the collector comes by.
        while (request := await self._context.read()) is not grpc.aio.EOF:
            try:
                for number, saga_id in enumerate(request.remove, 1):
                    self._forget(saga_id)
                    if number % TURN == 0:
                        await anyio.lowlevel.checkpoint()
                for number, saga_id in enumerate(request.add, 1):
                    await self._wait_for_room()
                    self._add(saga_id)
                    if number % TURN == 0:
                        await anyio.lowlevel.checkpoint()
            finally:
                del request
            await self._wait_for_room()
        self._is_all_said = True
        self._for_writer.ring()

    async def _wait_for_room(self) -> None:
        while (
            len(self._found) >= MAX_FOUND
            or self._kept_bytes >= MAX_KEPT_BYTES
            or len(self._arriving) >= MAX_ARRIVING
        ):
            await self._for_reader.wait()

    def _add(self, saga_id: str) -> None:
        if saga_id in self._waits or saga_id in self._found:
            return
        if is_saga_id(saga_id) and len(self._waits) + len(self._found) < MAX_AWAITED:
            self._wait(saga_id)
            return
        try:
            checks = Checks()
            checks.saga_id("add", saga_id)
            checks.passed()
            raise Overloaded(
                "TOO_MANY_AWAITED",
                f"this stream waits for {MAX_AWAITED} sagas already: add this one when others have"
                " ended, or open another stream",
                1_000,
                {"saga_id": saga_id, "limit": str(MAX_AWAITED)},
            )
        except Refusal as refusal:
            self._keep(saga_id, _refused(saga_id, refusal))

    def _forget(self, saga_id: str) -> None:
        waiter = self._waits.get(saga_id)
        if waiter is not None:
            self._no_longer_waits(saga_id)
            self._supervisor.forget_waiter(saga_id, waiter)
        if saga_id in self._found:
            self._take(saga_id)

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self, saga_id: str) -> None:
        try:
            waiter: _Waiter | None = self._supervisor.waiter_for(saga_id)
            if waiter is None:
                waiter = self._supervisor.bring_in(saga_id)
                self._arriving.add(saga_id)
        except Exception as error:  # noqa: BLE001  # one saga's error must not end the others' stream
            self._keep(saga_id, _refused(saga_id, error))
            return
        self._waits[saga_id] = waiter
        waiter.add_done_callback(functools.partial(self._heard, saga_id))

    def _heard(self, saga_id: str, waiter: _Waiter) -> None:
        """There is news of a saga: its end, how it came in, or why it cannot be waited for."""
        if self._waits.get(saga_id) is not waiter:
            return  # forgotten meanwhile
        self._no_longer_waits(saga_id)
        try:
            news = waiter.result()
            view = news.view if isinstance(news, Told) else news
            if view is None or not view.saga.ended:
                self._wait(saga_id)
            else:
                self._keep(saga_id, _ended(view))
        except Exception as error:  # noqa: BLE001  # as above
            self._keep(saga_id, _refused(saga_id, error))

    def _no_longer_waits(self, saga_id: str) -> None:
        del self._waits[saga_id]
        self._arriving.discard(saga_id)
        self._for_reader.ring()
        # Also after a removal: the writer may wait for nothing but the last wait to go.
        self._for_writer.ring()

    # -- what was found ------------------------------------------------------------------------

    def _keep(self, saga_id: str, end: saga_pb2.SagaEnd) -> None:
        size = end.ByteSize()  # asked once: it costs as much as to serialize it
        if end.HasField("saga") and self._kept_bytes + size > MAX_KEPT_BYTES:
            self._found[saga_id] = _READ_AGAIN
        else:
            self._found[saga_id] = _Found(end, size)
            self._kept_bytes += size
        self._for_writer.ring()

    def _take(self, saga_id: str) -> None:
        self._kept_bytes -= self._found.pop(saga_id).size
        self._for_reader.ring()

    # -- what goes out -------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            while not self._found:
                if self._is_all_said and not self._waits:
                    return
                await self._for_writer.wait()
            ends = await self._next_ends()
            if ends:
                await self._context.write(saga_pb2.AwaitSagasResponse(ends=ends))

    async def _next_ends(self) -> list[saga_pb2.SagaEnd]:
        """As many as fit into one message; one always does.

        Taken out before they are written: a client that has read one may add its id again before
        our write returns.
        """
        ends: list[saga_pb2.SagaEnd] = []
        room = PAGE_BYTES
        while self._found:
            saga_id, (end, size) = next(iter(self._found.items()))
            if end is None:
                if ends:
                    break  # what is at hand goes first
                end = await self._read_again(saga_id)
                if saga_id not in self._found:
                    continue  # removed meanwhile
                size = end.ByteSize()
            room -= size + 8  # its tag and length
            if ends and room < 0:
                break
            self._take(saga_id)
            ends.append(end)
        return ends

    async def _read_again(self, saga_id: str) -> saga_pb2.SagaEnd:
        try:
            return _ended(await self._supervisor.view(saga_id))
        except Exception as error:  # noqa: BLE001  # as above
            return _refused(saga_id, error)


def _ended(view: SagaView) -> saga_pb2.SagaEnd:
    end = saga_pb2.SagaEnd(saga_id=view.saga.saga_id)
    wire.put_saga(end.saga, view)
    wire.put_contents(end.saga, view)
    return end


def _refused(saga_id: str, error: Exception) -> saga_pb2.SagaEnd:
    return saga_pb2.SagaEnd(saga_id=saga_id, error=error_for(error, "AwaitSagas", saga_id))
